"""A project of somebody else, which knows nothing of this library but its callbacks."""

import sys

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_optim.callbacks import Diagnostics


class Clipped(torch.optim.Optimizer):
    """A third party's optimizer: gradient descent whose steps are cut off at a thousandth."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= (group["lr"] * p.grad).clamp(-1e-3, 1e-3)
        return loss


OPTIMIZERS = {
    "AdamW": lambda module: torch.optim.AdamW(module.parameters(), lr=1e-3),
    "Muon": lambda module: torch.optim.Muon([p for p in module.parameters() if p.ndim == 2], lr=1e-3),
    "SGD": lambda module: torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9),
    "Clipped": lambda module: Clipped(module.parameters()),
}


class Module(pl.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        self.optimizer = optimizer
        self.expected = []

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](self)

    def train_dataloader(self):
        x = torch.randn(64, 8)
        return torch.utils.data.DataLoader(list(zip(x, (x[:, 0] > 0).long())), batch_size=16)

    # What the project measures by itself, to compare with.
    def on_train_batch_start(self, batch, batch_idx):
        self.before = self.stepped()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        after = self.stepped()
        change = torch.cat([(p - q).flatten() for p, q in zip(after, self.before)])
        weights = torch.cat([p.flatten() for p in after])
        gradients = torch.cat([p.grad.flatten() for g in self.trainer.optimizers[0].param_groups for p in g["params"]])
        rms = change.square().mean().sqrt()
        self.expected.append((float(rms), float(change.norm() / weights.norm()), float(gradients.norm())))

    def stepped(self):
        return [p.detach().clone() for g in self.trainer.optimizers[0].param_groups for p in g["params"]]


def train(name, folder):
    pl.seed_everything(0, verbose=False)
    module = Module(name)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=CSVLogger(folder, name=name, version=""), enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=0.1,
        callbacks=[Diagnostics(every_n_steps=1)],
    )  # fmt: skip
    trainer.fit(module)
    for row in module.expected:
        print("EXPECTED", name, *row)


if __name__ == "__main__":
    for name in OPTIMIZERS:
        train(name, sys.argv[1])
