"""Probes leave a run as it would be without them, bit for bit, whatever the optimizer."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import lightning_optim as lo
from lightning_optim.callbacks import SpikeResponse, UpdateVariance
from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.engine.rule import ModelRule
from lightning_optim.registry import OPTIMIZERS

from .probed import fit, normal

TORCH: dict[str, Any] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.1),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, fused=True),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.1),
    "torch-Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2], lr=0.1),
}
OURS = [name for name, info in OPTIMIZERS.items() if issubclass(info.cls, RuleOptimizer)]


class Everything(pl.LightningModule):
    """Dropout, batch normalisation, a metric, a schedule, random augmentation, and data in random order."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.metric = MeanMetric()
        self.optimizer = optimizer
        self.seen: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch[0])
        x = batch[0] * (1 + 0.1 * random.random() + 0.1 * np.random.rand())  # noqa: NPY002
        loss = self.net(x).square().mean()
        self.metric(loss.detach())
        self.log("metric", self.metric, on_epoch=True)
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        if self.optimizer in TORCH:
            optimizer = TORCH[self.optimizer](self)
        else:
            optimizer = lo.build_optimizer(self.net, self.optimizer)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer), "interval": "step"}]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(normal(40, 6)), batch_size=4, shuffle=True)


def trace(optimizer: str, callbacks: list[pl.Callback], **options: Any) -> list[Any]:
    """Everything that a run leaves behind."""
    module = Everything(optimizer)
    pl.seed_everything(1, verbose=False)
    trainer = fit(module, callbacks, steps=-1, max_epochs=2, **options)
    state = [x for s in trainer.optimizers[0].state_dict()["state"].values() for x in s.values()]
    logged = [trainer.callback_metrics[name] for name in ("metric_epoch", "loss_epoch", "loss_step")]
    tensors = [*module.state_dict().values(), *module.seen, *state, *logged, torch.get_rng_state()]
    return [*map(torch.as_tensor, tensors), torch.tensor([random.random(), np.random.rand()])]  # noqa: NPY002


def probing(source: Any) -> list[Any]:
    return [
        UpdateVariance(probe_every_n_steps=3, source=source, batches=2, every_n_steps=2),
        SpikeResponse(probe_every_n_steps=4, probe_scales=[1e1, 1e9], probe_steps=2),
    ]


@pytest.mark.parametrize("optimizer", [*OURS, *TORCH])
def test_a_run_is_the_same_with_probes(optimizer: str) -> None:
    callbacks = probing("batches")
    with_probes = trace(optimizer, callbacks)
    without = trace(optimizer, [])
    assert len(with_probes) == len(without)
    for x, y in zip(with_probes, without):
        assert torch.equal(x, y)
    assert len(callbacks[0].history["update_variance/conditional"]) == 6
    if not issubclass(OPTIMIZERS[optimizer].cls if optimizer in OPTIMIZERS else object, ModelRule):
        # A copy has no loss of its own, which decides here how long a step is.
        assert len(callbacks[1].history["spike/probe_amplification/1e+09"]) == 5


def test_a_run_is_the_same_with_probes_of_accumulation_and_clipping() -> None:
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    callbacks = probing("accumulation")
    for x, y in zip(trace("MVNGrad", callbacks, **options), trace("MVNGrad", [], **options)):
        assert torch.equal(x, y)
    assert len(callbacks[0].history["update_variance/conditional"]) == 3


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.net], ids=["module", "part"])
def test_a_compiled_run_is_the_same_with_probes(part: Any) -> None:
    """Compiled steps of a copied module are still those of the real one."""
    states = []
    for callbacks in ([], probing("batches")):
        module = Everything("AdamW")
        if part(module) is module.net:
            module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
        pl.seed_everything(1, verbose=False)
        compiled = torch.compile(module, backend="eager") if part(module) is module else module
        fit(compiled, callbacks, steps=6)  # type: ignore[arg-type]
        states.append(module.state_dict())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    assert all(value > 0 for _, value in callbacks[0].history["update_variance/conditional"])


shared = nn.Linear(3, 1)


class Outside(pl.LightningModule):
    """Some of its weights belong to no module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return shared(self.net(batch[0])).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), *shared.parameters()], lr=0.1, momentum=0.9)

    train_dataloader = Everything.train_dataloader


def test_a_run_is_the_same_where_parameters_belong_to_no_module() -> None:
    states = []
    for callbacks in ([], probing("batches")):
        pl.seed_everything(1, verbose=False)
        shared.reset_parameters()
        fit(module := Outside(), callbacks, steps=6)
        states.append([p.detach().clone() for p in (*module.parameters(), *shared.parameters())])
    assert all(torch.equal(x, y) for x, y in zip(*states))


class Uncopyable(torch.optim.SGD):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no")


@pytest.mark.parametrize("source", ["batches", "accumulation"])
def test_an_optimizer_that_cannot_be_copied_is_named(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TORCH, "SGD", lambda m: Uncopyable(m.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="leaves probes out of this run: Uncopyable makes no steps on a copy"):
        trace("SGD", probing(source), accumulate_grad_batches=3)
