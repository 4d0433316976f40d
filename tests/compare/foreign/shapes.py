"""A project of its own, which knows nothing of this library: a module that builds its own optimizer and schedule."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Points(pl.LightningDataModule):
    def __init__(self, count: int = 256, batch_size: int = 32) -> None:
        super().__init__()
        self.count, self.batch_size = count, batch_size

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.count, 8, generator=generator)
        y = (x[:, :4].prod(1) + x[:, 4:].sum(1)).unsqueeze(1)
        self.train_set, self.val_set = TensorDataset(x[64:], y[64:]), TensorDataset(x[:64], y[:64])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, 64)


class Regression(pl.LightningModule):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, width), nn.Dropout(0.1), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.head(self.net(x)), y)
        self.logger.experiment.add_text("note", "as projects do")
        self.log("fit_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.head(self.net(x)), y))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(
            [{"params": self.net.parameters()}, {"params": self.head.parameters(), "lr": 1e-4}], lr=1e-3
        )
        length = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
