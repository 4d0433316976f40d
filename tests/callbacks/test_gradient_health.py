from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_optim import MVNGrad
from lightning_optim.callbacks import GradientHealth
from lightning_optim.diagnostics import NoiseScale


class Quadratic(pl.LightningModule):
    """Loss |w - x|^2 / 2 with x ~ N(mean, std^2): the gradient is w - x, so |G|^2 = d mean^2, tr(Sigma) = d std^2."""

    def __init__(self, optimizer, d=1000, mean=1.0, std=2.0, batch_size=8, batches=120):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d))
        self.make, self.batch_size = optimizer, batch_size
        generator = torch.Generator().manual_seed(0)
        self.x = mean + std * torch.randn(batches * batch_size, d, generator=generator)

    def training_step(self, batch):
        return 0.5 * (self.w - batch).square().sum(1).mean()

    def configure_optimizers(self):
        return self.make([self.w])

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.x, batch_size=self.batch_size)


def still(params):
    return torch.optim.SGD(params, lr=0.0)


def fit(module, health, **kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[health], enable_model_summary=False, **(quiet | kwargs)
    )
    trainer.fit(module)
    return {tag: [value for _, value in series] for tag, series in health.history.items()}


def scaler(**kwargs):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **kwargs))


@pytest.mark.parametrize("kwargs", [{}, {"plugins": lambda: [scaler(init_scale=256.0)]}], ids=["32", "16-mixed"])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_noise_scale_of_a_known_problem(kwargs, micro_batches):
    kwargs = {name: make() for name, make in kwargs.items()}
    values = fit(Quadratic(still), GradientHealth(1), accumulate_grad_batches=micro_batches, **kwargs)
    # tr(Sigma) / |G|^2 = 4. With d = 1000 and about 20 effective steps its standard error is below 2 %.
    assert values["gradient/noise_scale"][-1] == pytest.approx(4.0, rel=0.06)


def test_noise_scale_with_a_short_last_window():
    # 10 batches in windows of 4, 4 and 2: Lightning divides the losses of the last one by 4, too.
    module = Quadratic(still, batches=10, std=0.0)
    values = fit(module, GradientHealth(1), accumulate_grad_batches=4)
    assert len(values["gradient/noise_scale"]) == 3
    assert values["gradient/noise_scale"][-1] == pytest.approx(0.0, abs=1e-5)  # no noise; float32 norms


def test_no_noise_scale_without_small_batches():
    assert "gradient/noise_scale" not in fit(Quadratic(still, batches=3), GradientHealth(1))


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.integers(1, 64), st.integers(2, 16))
def test_noise_scale_is_exact_for_expected_norms(signal, noise, small, factor):
    estimate, big = NoiseScale(), small * factor
    for _ in range(3):
        estimate.update(signal + noise / small, signal + noise / big, small, big)
    # What is subtracted may cancel all but noise / (signal * small * factor) of the digits.
    assert estimate.value == pytest.approx(noise / signal, rel=1e-7 * (1 + signal / noise * big + noise / signal))


@pytest.mark.parametrize("precision", ["32", "16-mixed", "16-mixed fused"])
def test_norms_before_and_after_clipping(precision):
    kwargs = {} if precision == "32" else {"plugins": [scaler(init_scale=64.0)]}
    make = (lambda p: torch.optim.SGD(p, lr=0.0, fused=True)) if "fused" in precision else still
    if "fused" not in precision:
        kwargs |= {"gradient_clip_val": 0.5}
    module = Quadratic(make, std=0.0, batches=6)  # the gradient is -1 in each of 1000 elements
    values = fit(module, GradientHealth(2, layers=["w"]), **kwargs)
    assert values["gradient/norm"] == pytest.approx([1000**0.5] * 3, rel=1e-5)
    after = 1000**0.5 if "fused" in precision else 0.5
    assert values["gradient/norm_clipped"] == pytest.approx([after] * 3, rel=1e-4)
    assert values["gradient_norm_clipped/w"] == values["gradient/norm_clipped"]
    assert values["gradient/clipped_fraction"] == [float("fused" not in precision)] * 3
    assert values.get("gradient/loss_scale") == (None if precision == "32" else [64.0] * 3)


def test_clipped_fraction_counts_steps():
    module = Quadratic(still, batches=6)
    module.x = torch.zeros(48, 1000)
    module.x[::16] = 100.0  # every other batch of 8 has an outlier
    values = fit(module, GradientHealth(1), gradient_clip_val=1.0)
    assert values["gradient/clipped_fraction"][-1] == pytest.approx(0.5, abs=0.05)


def test_zeros_are_elements_without_a_gradient():
    module = Quadratic(still, batches=2, std=0.0)
    module.x[:, :250] = 0.0  # where w is, too
    assert fit(module, GradientHealth(1))["gradient/zeros"] == [0.25, 0.25]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradients_and_skipped_steps(value):
    module = Quadratic(lambda p: MVNGrad(p, lr=1e-3), batches=5, batch_size=1)
    module.x[2, :7] = value
    values = fit(module, GradientHealth(1))
    # The third step changes nothing and has no values of its own.
    assert len(values["gradient/norm"]) == 4
    assert values["gradient/nonfinite"] == [0, 0, 7, 0]
    assert values["gradient/skipped_steps"] == [0, 0, 1, 1]


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_loss_scaler_skips(fused):
    module = Quadratic(lambda p: torch.optim.SGD(p, lr=1e-3, fused=fused), batches=5, batch_size=1)
    module.x[1, 0] = 3e38  # times the scale: infinite
    values = fit(module, GradientHealth(1), plugins=[scaler(init_scale=1024.0)])
    assert values["gradient/skipped_steps"] == [0, 1, 1, 1]
    assert values["gradient/loss_scale"] == [1024, 512, 512, 512]
