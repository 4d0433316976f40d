from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_optim import MVNGrad, NonFiniteGradientsError
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
        max_epochs=1, accelerator="cpu", enable_model_summary=False, **({"callbacks": [health]} | quiet | kwargs)
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
    if "fused" in precision:  # Lightning does not clip with fused optimizers in 16-mixed, and nothing is said twice.
        assert "gradient/norm_clipped" not in values
    else:
        assert values["gradient/norm_clipped"] == pytest.approx([0.5] * 3, rel=1e-4)
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


def test_a_run_that_comes_to_the_limit_of_skipped_steps_tells_of_them():
    module = Quadratic(lambda p: MVNGrad(p, lr=1e-3, max_consecutive_skips=3), batches=9, batch_size=1)
    module.x[2:] = float("nan")
    health = GradientHealth(1)
    with pytest.raises(NonFiniteGradientsError, match="3 steps in a row, all since its step 2"):
        fit(module, health)
    assert list(health.history["gradient/skipped_steps"])[-2:] == [(1, 0.0), (4, 3.0)]


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_loss_scaler_skips(fused):
    module = Quadratic(lambda p: torch.optim.SGD(p, lr=1e-3, fused=fused), batches=5, batch_size=1)
    module.x[1, 0] = 3e38  # times the scale: infinite
    values = fit(module, GradientHealth(1), plugins=[scaler(init_scale=1024.0)])
    assert values["gradient/skipped_steps"] == [0, 1, 1, 1]
    assert values["gradient/loss_scale"] == [1024, 512, 512, 512]


class Two(pl.LightningModule):
    """Two optimizers of different numbers of parameters."""

    def __init__(self, x):
        super().__init__()
        self.automatic_optimization = False
        self.nets, self.x = nn.ModuleList([nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), nn.Linear(3, 2)]), x

    def training_step(self, batch):
        for net, optimizer in zip(self.nets, self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(net(batch).square().sum())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=1e-3) for net in self.nets]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.x, batch_size=4)


def test_optimizers_have_numbers_of_their_own():
    x = torch.ones(20, 3)
    x[4] = float("inf")
    health = GradientHealth(1)
    values = fit(Two(x), health, plugins=[scaler(init_scale=64.0)])
    for label in ("SGD0", "SGD1"):
        assert values[f"{label}/gradient/skipped_steps"] == [0, 1, 1, 1]
        assert values[f"{label}/gradient/nonfinite"][1] > 0
        assert values[f"{label}/gradient/nonfinite"][2] == 0
    assert values["SGD1/gradient/nonfinite"][1] <= 8  # its elements
    assert health.state_dict()["skips"] == {"SGD0/": 1, "SGD1/": 1}


def test_clipping_of_one_optimizer_is_not_told_of_another():
    class ClipsFirst(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if optimizer is trainer.optimizers[0]:
                nn.utils.clip_grad_norm_(pl_module.nets[0].parameters(), 1e-3)

    health = GradientHealth(1)
    values = fit(Two(torch.ones(20, 3)), health, callbacks=[health, ClipsFirst()])
    assert values["SGD0/gradient/clipped_fraction"] == [1.0] * 5
    assert values["SGD1/gradient/clipped_fraction"] == [0.0] * 5


class Box:
    def __init__(self, xs):
        self.x = torch.stack(xs)


def test_batches_of_unknown_size_have_no_noise_scale():
    module = Quadratic(still, batches=4)
    module.train_dataloader = lambda: torch.utils.data.DataLoader(module.x, batch_size=8, collate_fn=Box)
    step = module.training_step
    module.training_step = lambda batch: step(batch.x)
    values = fit(module, GradientHealth(1), accumulate_grad_batches=2)
    assert len(values["gradient/norm"]) == 2
    assert "gradient/noise_scale" not in values


def test_compiled_modules_are_not_compiled_anew_for_the_noise_scale():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module = Quadratic(still, batches=16)
    module.training_step = torch.compile(module.training_step, backend=count)
    values = fit(module, GradientHealth(2), accumulate_grad_batches=2)
    assert len(values["gradient/noise_scale"]) == 4
    assert len(graphs) == 1


class Alternating(Quadratic):
    """Micro-batches have gradients of different parameters, some of none of the optimizer's."""

    def __init__(self):
        super().__init__(lambda params: torch.optim.SGD(params, lr=0.0), std=0.0, batches=8)
        self.other, self.frozen = nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(3))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch) + 5 * self.frozen.sum()
        return loss + self.other.sum() if batch_idx % 2 else loss

    def configure_optimizers(self):
        return torch.optim.SGD([self.other, self.w], lr=0.0)


def test_noise_scale_is_of_the_parameters_of_the_optimizer():
    values = fit(Alternating(), GradientHealth(1), accumulate_grad_batches=2)
    # Gradients of norm^2 1000 and 1007, their mean 1000 + 7/4: noise = (1003.5 - 1001.75) * 16, signal = 1000.
    assert values["gradient/noise_scale"] == pytest.approx([28 / 1000] * 4, rel=1e-2)  # float32 differences


class Twice(pl.LightningModule):
    """A block whose weights are used twice, as in a recurrent network. Every step has the same two micro-batches."""

    def __init__(self, run, every=1):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head, self.run, self.every = nn.Linear(6, 6), nn.Linear(6, 1), run, every

    def training_step(self, batch, batch_idx):
        x = batch.requires_grad_()  # as reentrant checkpointing wants it
        x = self.run(self.block, x).tanh()
        if batch_idx % self.every == 0:
            x = self.run(self.block, x).tanh()
        return self.head(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        return torch.utils.data.DataLoader(torch.randn(8, 6, generator=generator).repeat(4, 1), batch_size=4)


def checkpointed(use_reentrant):
    return lambda block, x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=use_reentrant)


def nested(block, x):
    return checkpointed(True)(lambda y: checkpointed(True)(block, y), x)


RUNS = {"once": (checkpointed(False), 0), "in parts": (checkpointed(True), 1), "nested": (nested, 1)}


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("every", [1, 2])
def test_noise_scale_of_a_block_that_runs_twice(how, every):
    run, known_from = RUNS[how]
    health = GradientHealth(1)
    expected = fit(Twice(lambda block, x: block(x), every), GradientHealth(1), accumulate_grad_batches=2)
    values = fit(Twice(run, every), health, accumulate_grad_batches=2)["gradient/noise_scale"]
    assert len(expected["gradient/noise_scale"]) == 4
    assert len(values) == 4 - known_from  # In the first step with parts their sum is not known.
    assert values == pytest.approx(expected["gradient/noise_scale"][known_from:], rel=1e-4)  # float32 sums
    assert not health._small._sums, "nothing of the gradients is kept"


class Silent(Quadratic):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch)


def test_a_step_without_a_loss_has_no_values():
    assert len(fit(Silent(still, batches=3), GradientHealth(1))["gradient/norm"]) == 2


class Sparse(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Embedding(10, 4, sparse=True)

    def training_step(self, batch):
        return self.net(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.tensor([3, 5]), batch_size=1)


def test_sparse_gradients_are_measured():
    values = fit(Sparse(), GradientHealth(1))
    assert values["gradient/norm"] == [2.0, 2.0]
    assert values["gradient/zeros"] == pytest.approx([0.9, 0.9])
