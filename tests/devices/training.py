"""A whole run with all diagnostics on a pretended device: `python -m tests.devices.training KIND`."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_optim import build_optimizer
from lightning_optim.callbacks import Diagnostics, Resume

from .pretended import DEVICE, KINDS, PretendedDevice, PretendedTensor, register


class Accelerator(CPUAccelerator):
    """Lightning's idea of the device."""

    def setup_device(self, device: torch.device) -> None: ...

    @staticmethod
    def is_available() -> bool:
        return True


class HostCheckpoints(TorchCheckpointIO):
    """torch cannot write the storage of a tensor on a pretended device."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(tree_map_only(PretendedTensor, Tensor.cpu, checkpoint), path, storage_options)


class Module(pl.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, self.optimizer)


def trained(folder: str, name: str, steps: int, checkpoint: str | None = None, **diagnostics: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    data = torch.utils.data.DataLoader(torch.randn(64, 8), batch_size=4)
    trainer = pl.Trainer(
        accelerator=Accelerator(),
        strategy=SingleDeviceStrategy(device=torch.device(DEVICE, 0)),
        plugins=[HostCheckpoints()],
        max_steps=steps,
        callbacks=[Diagnostics(**diagnostics), Resume()],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(Module(name), data, ckpt_path=checkpoint)
    return trainer


def main(kind: str) -> None:
    register()
    with PretendedDevice(KINDS[kind]) as device, tempfile.TemporaryDirectory() as folder:
        result = {}
        for name in ("NAMO", "SOAP", "LaProp", "HVAdam"):
            trainer = trained(folder, name, 6, every_n_steps=1, tier="full")
            trainer.save_checkpoint(f"{folder}/{name}.ckpt")
            assert trained(folder, name, 8, f"{folder}/{name}.ckpt", every_n_steps=1, tier="full").global_step == 8
            values = {key: float(value) for key, value in trainer.callback_metrics.items()}
            result[name] = {key: value for key, value in values.items() if value != value}
            assert "update/to_weight" in values, sorted(values)
        counts = []
        for steps in (5, 15):
            device.waits.clear()
            trained(folder, "LaProp", steps, every_n_steps=1000)
            counts.append(Counter(device.waits))
        counts[1].subtract(counts[0])
        result["waits in ten steps"] = dict(+counts[1])
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
