"""A project of somebody else: its own module and data, the stock LightningCLI, nothing of this library."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def train_dataloader(self):
        x = torch.randn(64, 8)
        return torch.utils.data.DataLoader(list(zip(x, (x[:, 0] > 0).long())), batch_size=16)

    def on_train_start(self) -> None:
        self.before = [p.detach().clone() for p in self.parameters()]

    def on_train_end(self) -> None:
        moved = all(not torch.equal(p, q) for p, q in zip(self.parameters(), self.before))
        optimizer = self.trainer.optimizers[0]
        print("OPTIMIZER", type(optimizer).__module__, type(optimizer).__name__, optimizer.defaults["lr"], moved)


if __name__ == "__main__":
    LightningCLI(Module, trainer_defaults={"accelerator": "cpu", "logger": False, "enable_checkpointing": False})
