"""Orthogonality of real updates, matrix by matrix."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import Grouping, OptimizerConfig, build_optimizer
from lightning_optim.callbacks import OrthogonalityError
from lightning_optim.registry import OPTIMIZERS

from ..optimizers.rows import MATRIX, amplifies


class Model(pl.LightningModule):
    """A linear layer, three matrices in one, a convolution, a transposed one, and a head."""

    def __init__(self, optimizer: str = "SGD", **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, 6)
        self.qkv = nn.Linear(6, 18)
        self.conv = nn.Conv2d(2, 5, (1, 2))
        self.transposed = nn.ConvTranspose2d(5, 2, (1, 2))
        self.head = nn.Linear(6, 3)
        self.optimizer, self.settings = optimizer, settings

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        h = self.linear(batch[0])
        q, k, v = self.qkv(h).chunk(3, -1)
        h = q * k.sigmoid() + v.tanh()
        h = self.transposed(self.conv(h.view(-1, 2, 1, 3)).tanh()).flatten(1)
        return (self.head(h) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return build_optimizer(self, OptimizerConfig(self.optimizer, self.settings))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(16, 12, generator=torch.Generator().manual_seed(0))), batch_size=8)


class Updates(pl.Callback):
    """The changes of the first step, float64."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.updates = {name: p.detach() - self.before[name] for name, p in pl_module.named_parameters()}


def fit(model: Model, *callbacks: pl.Callback, steps: int = 1) -> None:
    pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model)


def last(monitor: OrthogonalityError) -> dict[str, float]:
    return {tag: pairs[-1][1] for tag, pairs in monitor.history.items()}


def error(u: Tensor) -> float:
    s2 = torch.linalg.svdvals(u.double()).square()
    return float(s2.std(correction=0) / s2.square().mean().sqrt())


def test_matrices_are_those_of_the_router() -> None:
    monitor, updates = OrthogonalityError(1, layers=["*"]), Updates()
    fit(Model(), monitor, updates)
    u = updates.updates
    matrices = {f"qkv.weight/{i}": u["qkv.weight"][6 * i : 6 * i + 6] for i in range(3)} | {
        "linear.weight": u["linear.weight"],
        "conv.weight": u["conv.weight"].flatten(1),
        "transposed.weight": u["transposed.weight"].transpose(0, 1).flatten(1),
    }
    values = last(monitor)
    assert {tag.split("/", 1)[1] for tag in values if tag.startswith("orthogonality_error/")} == set(matrices)
    errors = [error(x) for x in matrices.values()]
    # The update is a difference of float32 weights near 0.3, off by 3e-8, and its entries are about 1e-3.
    for name, expected in zip(matrices, errors):
        assert values[f"orthogonality_error/{name}"] == pytest.approx(expected, abs=1e-3)
        norm = float(torch.linalg.matrix_norm(matrices[name].double(), 2))
        assert values[f"orthogonality_spectral_norm/{name}"] == pytest.approx(norm, rel=1e-5)
    assert values["orthogonality/error"] == pytest.approx(sum(errors) / len(errors), abs=1e-3)
    assert values["orthogonality/error_worst"] == pytest.approx(max(errors), abs=1e-3)
    assert not any("factor" in tag or "polar" in tag for tag in values)


def test_layers_are_chosen_by_the_name_of_the_parameter() -> None:
    monitor = OrthogonalityError(1, layers=["qkv.weight"], parameters=["qkv.*", "linear.*"])
    fit(Model(), monitor)
    layers = {tag.split("/", 1)[1] for tag in last(monitor) if not tag.startswith("orthogonality/")}
    assert layers == {"qkv.weight/0", "qkv.weight/1", "qkv.weight/2"}


@pytest.mark.parametrize(
    "optimizer", [n for n in MATRIX if "orthogonalizer" in OPTIMIZERS[n].defaults and not amplifies(n, "factor")]
)
def test_exact_factors_have_no_error(optimizer: str) -> None:
    monitor = OrthogonalityError(1, polar=True, layers=["*"])
    form = {"form": "shampoo"} if optimizer == "MARS" else {}  # The one that orthogonalises.
    fit(Model(optimizer, orthogonalizer="exact", **form), monitor, steps=3)
    values = last(monitor)
    # The factor is rounded to float32. (Gradients of rank below r have a factor that is no isometry.)
    assert values["orthogonality_factor_error/linear.weight"] < 1e-5
    assert values["orthogonality/polar_error_worst"] < 1e-5


def test_muon_without_decay_moves_by_multiples_of_the_factor() -> None:
    monitor = OrthogonalityError(1, layers=["*"])
    fit(Model("Muon", orthogonalizer="exact", weight_decay=0.0, lr=0.1), monitor)
    assert last(monitor)["orthogonality_error/linear.weight"] < 1e-5  # rounding of the weights over the step's size


def test_newton_schulz_is_seen_to_be_approximate() -> None:
    monitor = OrthogonalityError(1, polar=True, layers=["*"])  # layers for the worst
    fit(Model("Muon"), monitor, steps=3)
    values = last(monitor)
    assert 0.05 < values["orthogonality/factor_error"] <= values["orthogonality/factor_error_worst"] <= 1
    assert 0.03 < values["orthogonality/polar_error"] <= 1


def test_parameter_groups_of_our_optimizers_decide() -> None:
    """The user's patterns send a head to the matrix rule, and a layer to the fallback."""

    class Chosen(Model):
        def configure_optimizers(self) -> torch.optim.Optimizer:

            return build_optimizer(
                self, OptimizerConfig("Muon"), Grouping(matrix=["head.weight"], fallback=["linear.*"])
            )

    monitor = OrthogonalityError(1, layers=["*.weight"])
    fit(Chosen(), monitor)
    assert "orthogonality_factor_error/head.weight" in monitor.history
    assert "orthogonality_error/linear.weight" not in monitor.history


def test_reports_are_not_kept() -> None:
    monitor = OrthogonalityError(1, polar=True)
    fit(Model("Muon"), monitor, steps=2)
    assert not monitor._reported
    assert not monitor._orthogonalized


def test_what_has_no_factor_is_told_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Model(), OrthogonalityError(1, polar=True), steps=2)
    assert caplog.text.count("SGD reports none") == 1


def test_nonfinite_updates_do_no_harm() -> None:
    class Broken(Model):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * math.nan

    monitor = OrthogonalityError(1)
    fit(Broken(), monitor)
    assert not last(monitor)


@pytest.mark.parametrize("layers", [(), ("qkv.*",)])
def test_spectra_go_to_tensorboard(tmp_path: Any, layers: tuple[str, ...]) -> None:
    model, updates = Model(), Updates()
    monitor = OrthogonalityError(every_n_steps=1, layers=layers, spectra=True)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    pl.Trainer(
        accelerator="cpu", max_steps=1, callbacks=[monitor, updates], logger=logger, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(model)  # fmt: skip
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0, "images": 0}).Reload()
    tags = {tag.removeprefix("orthogonality_spectrum/") for tag in events.Tags()["histograms"]}
    packed = {f"qkv.weight/{i}" for i in range(3)}
    assert tags == (packed if layers else packed | {"linear.weight", "conv.weight", "transposed.weight"})
    (histogram,) = events.Histograms("orthogonality_spectrum/qkv.weight/1")
    true = torch.linalg.svdvals(updates.updates["qkv.weight"][6:12].double())
    assert histogram.histogram_value.num == 6
    # From a float32 Gram matrix: squares of singular values to 1e-6 of the largest one.
    assert histogram.histogram_value.sum == pytest.approx(float(true.sum()), rel=5e-3)
    assert histogram.histogram_value.max == pytest.approx(float(true.max()), rel=1e-5)
    assert events.Tags()["images"] == ["orthogonality/spectra"]
