"""The variance of updates in training, against closed forms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_optim.callbacks import SpikeResponse, UpdateVariance

from .probed import Quadratic, fit, normal, sgd, values


def test_conditional_variance_of_sgd_is_known() -> None:
    # Var(d) = lr^2 trace(Sigma) / B, Sigma = diag(1, 4, 9, ...) of 60 elements. An estimate from K batches has the
    # relative standard error sqrt(2 sum(s^4) / (K - 1)) / sum(s^2); the average over probes n times less squared.
    sigma = torch.arange(60).remainder(4) + 1.0
    data = normal(4000, 60) * sigma
    callback = UpdateVariance(probe_every_n_steps=10, batches=10, every_n_steps=1000)
    fit(Quadratic(data, sgd(0.1), batch_size=8, shuffle=True), [callback], steps=60)
    estimates = values(callback, "conditional")
    assert len(estimates) == 6
    truth = 0.1**2 * (data.var(0).sum().item()) / 8
    standard_error = math.sqrt(2 * (sigma**4).sum().item() / 9) / (sigma**2).sum().item() / math.sqrt(6)
    assert standard_error < 0.05
    assert sum(estimates) / 6 == pytest.approx(truth, rel=4 * standard_error)
    assert values(callback, "batches") == [10] * 6


def test_a_ratio_and_the_cosine_spread_are_known() -> None:
    # The mean gradient is w - E x = 10 in each of 400 elements, its variance 1 / B.
    callback = UpdateVariance(probe_every_n_steps=1, batches=16, every_n_steps=1000)
    fit(Quadratic(normal(4000, 400), sgd(0.1), batch_size=4, start=10.0), [callback], steps=1)
    # Relative standard error sqrt(2 / (15 * 400)) = 1.8 %.
    assert values(callback, "conditional_ratio")[0] == pytest.approx(0.25 / 10**2, rel=0.08)
    # Each update is at an angle with tan^2 = ratio * (K-1)/K to the mean of K; 1 - cos is half of that.
    assert values(callback, "cosine_spread")[0] == pytest.approx(0.5 * 0.0025 * 15 / 16, rel=0.08)


def test_accumulated_micro_batches_are_compared() -> None:
    data = normal(12, 5)
    callback = UpdateVariance(probe_every_n_steps=2, source="accumulation", every_n_steps=1000)
    module = Quadratic(data, sgd(0.1), batch_size=2)
    fit(module, [callback], steps=2, accumulate_grad_batches=3)
    # The second step's micro-batches are rows 6 to 11 in pairs, of gradients w - mean.
    means = data[6:].reshape(3, 2, 5).mean(1)
    # Float32 arithmetic in another order.
    assert values(callback, "conditional") == pytest.approx([0.1**2 * means.var(0).sum().item()], rel=1e-5)
    assert values(callback, "batches") == [3]


def test_online_variance_of_momentum_sgd_is_known() -> None:
    # With curvature 1 and noise of variance s^2, stationary updates of momentum SGD have the variance
    # lr^2 s^2 / ((1 - mu)(1 + mu - lr/2)) per element, from the fixed point of the covariance of (w, momentum).
    # Measured every 40 steps, when what lasts of an update, (1 - lr/(1-mu))^40 = 1e-5, is nothing.
    lr, mu, batch, d = 0.125, 0.5, 4, 400
    data = normal(20_000, d)
    callback = UpdateVariance(every_n_steps=40)
    fit(Quadratic(data, sgd(lr, momentum=mu), batch_size=batch, shuffle=True), [callback], steps=4000)
    estimates = values(callback, "online")[20:]  # 80 of them, the first 20 before it is stationary and remembered
    truth = lr**2 * d / batch / ((1 - mu) * (1 + mu - lr / 2))
    # 80 estimates that weigh the last ten updates are worth 80 updates of d elements.
    standard_error = math.sqrt(2 / (80 * d))
    assert sum(estimates) / len(estimates) == pytest.approx(truth, rel=4 * standard_error)


def test_online_and_conditional_agree_for_sgd() -> None:
    # SGD without momentum, from far away and with a small step, so that the mean update hardly changes.
    callback = UpdateVariance(every_n_steps=1, probe_every_n_steps=20, batches=20)
    fit(Quadratic(normal(4000, 1000), sgd(1e-4), start=5.0), [callback], steps=20)
    truth = 1e-8 * 1000 / 4
    # Standard errors sqrt(2 / (K d)) with K = 19 in both (weights 0.9^i of 20 steps are worth 15).
    assert values(callback, "online")[-1] == pytest.approx(truth, rel=0.05)
    assert values(callback, "conditional")[-1] == pytest.approx(truth, rel=0.05)
    # E d = lr * 5 per element; the standard error of |E d|^2 is smaller than that of the variance.
    assert values(callback, "online_ratio")[-1] == pytest.approx(0.25 / 25, rel=0.06)
    assert values(callback, "conditional_ratio")[-1] == pytest.approx(0.25 / 25, rel=0.06)


def test_large_parameters_are_sampled_and_scaled_up() -> None:
    callback = UpdateVariance(every_n_steps=1, probe_every_n_steps=30, batches=30, layers=["w"])
    fit(Quadratic(normal(200, 40_000), sgd(1.0), batch_size=1), [callback], steps=30)
    # Of 40,000 elements of variance 1 each 4,000 are looked at: relative standard error sqrt(2 / (29 * 4000)) = 0.4 %.
    assert values(callback, "conditional")[-1] == pytest.approx(40_000, rel=0.03)
    assert callback.history["update_variance_conditional/w"][-1][1] == pytest.approx(
        values(callback, "conditional")[-1]
    )


def test_gradients_of_probes_are_clipped_as_those_of_training() -> None:
    # Gradients of norm about 1000 are clipped to 1e-3, so that updates are lr * 1e-3 times unit vectors.
    callback = UpdateVariance(probe_every_n_steps=1, batches=4, every_n_steps=1000)
    options = {"gradient_clip_val": 1e-3}
    fit(Quadratic(100 * normal(100, 100), sgd(1.0), batch_size=1), [callback], steps=1, **options)
    # Almost orthogonal unit vectors: |d_k|^2 - |mean|^2 = 1 - 1/4, times K/(K-1) = 1; cosines of +-0.1 between them.
    assert values(callback, "conditional") == pytest.approx([1e-6], rel=0.2)


@pytest.mark.parametrize("options", [{}, {"fused": True}])
@pytest.mark.parametrize("source", ["batches", "accumulation"])
def test_the_loss_scale_does_not_count(source: Any, options: dict[str, Any]) -> None:
    results = []
    for scaled in (False, True):
        callback = UpdateVariance(probe_every_n_steps=2, source=source, every_n_steps=1)
        plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))] if scaled else []
        fit(
            Quadratic(normal(40, 6), sgd(0.1, **options), batch_size=2),
            [callback],
            steps=4,
            accumulate_grad_batches=2,
            plugins=plugins,
        )
        results.append(values(callback, "conditional") + values(callback, "online"))
    assert len(results[0]) == 2 + 3
    # Squares, sums and means are float32 with and without autocast; the scale is a power of 2.
    assert results[1] == pytest.approx(results[0], rel=1e-5)


class Logging(Quadratic):
    """Logs, counts and transforms its batches, and takes a batch only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.transferred = 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.transferred += 1
        return [100 * batch[0]]

    def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        loss = super().training_step(batch, 0)
        self.log("step", float(self.trainer.global_step), on_epoch=True, reduce_fx="sum")
        return {"loss": loss, "other": loss.detach()}


def test_probes_use_the_modules_hooks_and_do_not_log() -> None:
    callback = UpdateVariance(probe_every_n_steps=2, batches=3, every_n_steps=1000)
    module = Logging(normal(16, 500), sgd(0.0), batch_size=4)
    trainer = fit(module, [callback], steps=4)
    assert trainer.callback_metrics["step_epoch"] == 0 + 1 + 2 + 3
    assert module.transferred == 4  # What the hook counts in probes is put back; that they call it, the factor shows.

    # lr = 0 moves nothing.
    assert values(callback, "conditional") == [0, 0]
    callback = UpdateVariance(probe_every_n_steps=1, batches=3, every_n_steps=1000)
    fit(Logging(normal(4000, 500), sgd(1.0), batch_size=4), [callback], steps=1)
    # Relative standard error sqrt(2 / (2 * 500)) = 4.5 %.
    assert values(callback, "conditional") == pytest.approx([100**2 * 500 / 4], rel=0.2)


def test_resumed_runs_remember(tmp_path: Path) -> None:
    def module() -> Quadratic:
        return Quadratic(normal(20, 7), sgd(0.1, momentum=0.9), batch_size=2)

    settings: dict[str, Any] = {"every_n_steps": 3, "probe_every_n_steps": 4, "batches": 3}
    whole = UpdateVariance(**settings)
    fit(module(), [whole], steps=-1, max_epochs=2)
    checkpoint = ModelCheckpoint(tmp_path, filename="first")
    fit(module(), [UpdateVariance(**settings), checkpoint], steps=-1, max_epochs=1, enable_checkpointing=True)
    torch.load(tmp_path / "first.ckpt", weights_only=True)
    resumed = UpdateVariance(**settings)
    fit(module(), [resumed], steps=-1, max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    for name in ("online", "conditional"):
        late = [pair for pair in whole.history[f"update_variance/{name}"] if pair[0] >= 10]
        assert list(resumed.history[f"update_variance/{name}"]) == late
        assert late


class Manual(Quadratic):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()  # type: ignore[union-attr]


class Stream(IterableDataset[list[Tensor]]):
    def __iter__(self) -> Any:
        yield [torch.zeros(2)]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("accumulation", {}, "accumulate_grad_batches=N"),
        ("ranks", {}, "strategy='ddp'"),
    ],
)
def test_runs_without_the_mini_batches_are_refused(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(Quadratic(normal(8, 2), sgd()), [UpdateVariance(probe_every_n_steps=1, source=source)], 1, **options)


def test_what_batches_cannot_come_from_is_named() -> None:
    callback = UpdateVariance(probe_every_n_steps=1)
    with pytest.raises(MisconfigurationException, match="automatic optimization"):
        fit(Manual(normal(8, 2), sgd()), [callback], 1)
    module = Quadratic(normal(8, 2), sgd())
    module.train_dataloader = lambda: torch.utils.data.DataLoader(Stream())  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="got one over Stream"):
        fit(module, [callback], 1)


def test_manual_optimization_is_measured_online() -> None:
    callback = UpdateVariance(every_n_steps=1)
    fit(Manual(normal(8, 2), sgd()), [callback], 2)
    assert len(values(callback, "online")) == 1


@pytest.mark.parametrize(
    "arguments", [{"decay": 1.0}, {"probe_every_n_steps": 0}, {"source": "none"}, {"batches": 1}, {"every_n_steps": 0}]
)
def test_wrong_arguments_are_named(arguments: dict[str, Any]) -> None:
    [(name, value)] = arguments.items()
    with pytest.raises(ValueError, match=rf"UpdateVariance: {name} must be .* got {value!r}"):
        UpdateVariance(**arguments)


def test_it_is_a_callback_for_the_command_line() -> None:
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_class_arguments(pl.Trainer, "trainer")
    config = parser.parse_args(
        [
            *("--trainer.callbacks+=lightning_optim.callbacks.UpdateVariance", "--trainer.callbacks.every_n_steps=10"),
            *("--trainer.callbacks.source=ranks", "--trainer.callbacks.probe_every_n_steps=null"),
            *(
                "--trainer.callbacks+=lightning_optim.callbacks.SpikeResponse",
                "--trainer.callbacks.probe_scales=[1e2, 1e4]",
            ),
        ]
    )
    callbacks = parser.instantiate_classes(config).trainer.callbacks
    variance, spikes = [c for c in callbacks if isinstance(c, (UpdateVariance, SpikeResponse))]
    assert (variance.every_n_steps, variance.source, variance.probe_every_n_steps) == (10, "ranks", None)
    assert spikes.probe_scales == (1e2, 1e4)
