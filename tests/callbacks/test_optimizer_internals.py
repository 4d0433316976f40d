"""What rules declare about themselves is what their state and their equations say."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import OPTIMIZERS, OptimizerConfig, build_optimizer
from lightning_optim.callbacks import OptimizerInternals


class Model(pl.LightningModule):
    def __init__(self, optimizer: str, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.optimizer, self.settings = optimizer, settings

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        h = self.second(self.first(batch[0]).tanh()).tanh()
        return (self.head(h) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, OptimizerConfig(self.optimizer, self.settings))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(80, 6, generator=torch.Generator().manual_seed(0))), batch_size=8)


def fit(model: Model, steps: int = 6) -> tuple[dict[str, list[float]], torch.optim.Optimizer]:
    monitor = OptimizerInternals(1, layers=["*"])
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model)
    return {tag: [value for _, value in pairs] for tag, pairs in monitor.history.items()}, trainer.optimizers[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_that_is_declared_is_logged_and_nothing_else(name: str) -> None:
    values, optimizer = fit(Model(name))
    declared = set(OPTIMIZERS[name].internals)
    if hasattr(optimizer, "_fallback"):
        declared |= set(OPTIMIZERS[optimizer._fallback["rule"]].internals)
    assert {tag.removeprefix("internals/") for tag in values if tag.startswith("internals/")} == declared
    assert all(math.isfinite(x) for xs in values.values() for x in xs)
    assert all(internal.description for internal in OPTIMIZERS[name].internals.values())


@pytest.mark.parametrize(("name", "state"), [("AdamW", "exp_avg_sq"), ("LaProp", "v"), ("MVNGrad", "v")])
def test_gradient_to_variance(name: str, state: str) -> None:
    model = Model(name)
    values, optimizer = fit(model, steps=3)
    parameters = dict(model.named_parameters())
    betas = optimizer.param_groups[0]["betas"]
    squares = {key: float(p.grad.double().square().sum()) for key, p in parameters.items()}
    averages = {
        key: float(optimizer.state[p][state].double().sum()) / (1 - betas[1] ** 3) for key, p in parameters.items()
    }
    for key in parameters:
        expected = squares[key] / averages[key]
        assert values[f"internals_gradient_to_variance/{key}"][-1] == pytest.approx(expected, rel=1e-5)
    together = sum(squares.values()) / sum(averages.values())
    assert values["internals/gradient_to_variance"][-1] == pytest.approx(together, rel=1e-5)


def test_adam_starts_with_a_ratio_of_one() -> None:
    """After one step the corrected second moment is the squared gradient."""
    values, _ = fit(Model("AdamW"), steps=1)
    assert values["internals/gradient_to_variance"] == [pytest.approx(1, rel=1e-4)]


def test_namo_starts_with_a_scale_of_one_and_namod_clamps() -> None:
    """Without look-ahead, ||m||/(1 - b1) = ||g|| and sqrt(v/(1 - b2)) = ||g|| in the first step."""
    values, _ = fit(Model("NAMO", nesterov=False), steps=3)
    assert values["internals/adaptive_scale"][0] == pytest.approx(1, rel=1e-4)
    assert set(values) >= {"internals_adaptive_scale/first.weight", "internals_adaptive_scale/second.weight"}
    assert "internals_adaptive_scale/head.weight" not in values  # the fallback's

    free, _ = fit(Model("NAMOD", clamp=1e-3), steps=5)
    tight, _ = fit(Model("NAMOD", clamp=0.99), steps=5)
    assert free["internals/clamp_rate"] == [0.0] * 5
    assert 0.5 < tight["internals/clamp_rate"][-1] <= 1


def test_variance_adaptation_of_deva() -> None:
    values, _ = fit(Model("DeVA"), steps=4)
    tag = "internals_variance_adaptation_spread/second.weight"
    assert len(values[tag]) == 3  # the first step only starts the bases
    assert 0 < values[tag][-1] < 10
    assert values["internals_variance_adaptation/head.bias"][0] > 0  # of the fallback, DeVA's vector form
    assert 0 <= values["internals/basis_error"][-1] < 1


def test_bases_follow_when_refreshed_often() -> None:
    often, _ = fit(Model("SOAP", precondition_frequency=1), steps=10)
    never, _ = fit(Model("SOAP", precondition_frequency=1000), steps=10)
    assert often["internals/basis_error"][-1] < 0.8 * never["internals/basis_error"][-1]
    # After the start the bases are the eigenvectors of the first average, up to the ridge.
    assert never["internals/basis_error"][0] < 1e-2


def test_hidden_vector_of_hvadam() -> None:
    values, optimizer = fit(Model("HVAdam"), steps=6)
    state = next(iter(optimizer.state.values()))
    cosine, count = float(state["cosine"]), float(state["count"])
    assert values["internals/steps_since_restart"][-1] == count
    assert values["internals/alignment"][-1] == pytest.approx(cosine / (1 - 0.999**count))
    assert values["internals/lr_factor"][-1] == pytest.approx(10 ** (6 * cosine - 3))
    assert len(values["internals/alignment"]) == sum(x > 0 for x in values["internals/steps_since_restart"])


def test_refreshes_of_anon() -> None:
    values, _ = fit(Model("Anon"), steps=9)
    assert values["internals/refreshes"] == [1, 2, 2, 3, 3, 3, 3, 4, 4]
    assert values["internals/steps_since_refresh"] == [0, 0, 1, 0, 1, 2, 3, 0, 1]


def test_optimizers_that_declare_nothing_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        values, _ = fit(Model("SGD"), steps=3)
    assert not values
    assert caplog.text.count("SGD declares no scalars of its own") == 1


def test_nothing_is_said_of_an_optimizer_in_a_step_without_gradients(caplog: pytest.LogCaptureFixture) -> None:
    """As in the epoch in which StochasticWeightAveraging only runs the model."""

    class WithoutGradients(Model):
        def on_after_backward(self) -> None:
            self.zero_grad()

    with caplog.at_level(logging.INFO):
        values, _ = fit(WithoutGradients("NAMO"), steps=2)
    assert not values
    assert "declares no scalars" not in caplog.text
