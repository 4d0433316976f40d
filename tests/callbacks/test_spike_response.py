"""Gradient spikes in training, real and virtual."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_optim.callbacks import GradientHealth, SpikeResponse, UpdateSize

from .probed import Quadratic, fit, normal, sgd, values


def adam(lr: float = 0.1, **options: Any) -> Any:
    return lambda params: torch.optim.Adam(params, lr=lr, **options)


def far_away(count: int, optimizer: Any) -> Quadratic:
    """A loss whose gradient is about the same in all steps."""
    return Quadratic(normal(4 * count, 50), optimizer, start=100.0)


def test_a_real_spike_is_followed() -> None:
    spikes, size = SpikeResponse(), UpdateSize(every_n_steps=1)
    module = far_away(120, sgd(1e-4, momentum=0.5))
    module.factors = {69: 101.0}
    fit(module, [spikes, size], steps=120)
    # The factor 101 comes in step 70 and adds 100 gradients, half of which are left in each step after it. With
    # momentum 0.5 an ordinary update is two gradients.
    assert values(spikes, "amplification") == pytest.approx([51], rel=0.01)
    # Ratios 1 + 50 / 2^k are below 1.1 from k = 9 on.
    assert values(spikes, "recovery_steps") == [9]
    # The spike moves w, and so the gradient, by 2 %.
    assert values(spikes, "suppression") == pytest.approx([1.0 - 0.02], rel=0.01)
    assert values(spikes, "count")[-1] == 1
    assert max(values(spikes, "zscore")) > 100
    # It is known at the fifth step of calm.
    assert [step for step, _ in spikes.history["spike/amplification"]] == [82]
    # The same updates as UpdateSize sees.
    rms = dict(size.history["update/rms"])
    assert values(spikes, "amplification")[0] == pytest.approx(rms[69] / rms[59], rel=0.01)


def test_steps_away_from_spikes_are_measured_now_and_then_only() -> None:
    spikes = SpikeResponse()
    fit(far_away(100, sgd(1e-4)), [spikes], steps=100)
    # A z-score needs 32 gradient norms to compare with.
    assert [step for step, _ in spikes.history["spike/zscore"]] == [39, 49, 59, 69, 79, 89, 99]
    values = {"spike/zscore", "spike/zscore_log10", "spike/norm_max", "spike/score"}
    assert set(spikes.history) == values  # there was no spike to count
    assert {score for _, score in spikes.history["spike/score"]} == {0.0}


def test_clipping_does_not_hide_a_spike() -> None:
    spikes = SpikeResponse()
    module = far_away(100, sgd(1e-3))
    module.factors = {69: 100.0}
    fit(module, [spikes], steps=100, gradient_clip_val=1.0)
    assert values(spikes, "count")[-1] == 1
    assert values(spikes, "amplification") == pytest.approx([1], rel=0.01)


def test_a_spike_beyond_the_root_of_the_largest_number_counts() -> None:
    """Of float32; it is as large as its square, 1e41, is not."""
    spikes, health = SpikeResponse(), GradientHealth(every_n_steps=1)
    module = far_away(100, sgd(1e-30))
    module.factors = {69: 1e18}
    fit(module, [spikes, health], steps=100)
    assert values(spikes, "count")[-1] == 1
    norms = dict(health.history["gradient/norm"])
    assert norms[69] == pytest.approx(1e18 * norms[68], rel=0.1)
    assert sum(values(health, "nonfinite")) == 0
    assert set(values(health, "clipped_fraction")) == {0}


def test_probes_answer_what_would_happen() -> None:
    # Adam, settled on a gradient g that hardly changes, meets g +- s g. With s = 1e3, b1 = .9, b2 = .999: momentum
    # g (1 +- .1 s), root of the second moment g sqrt(1 + .001 s^2), up to bias corrections.
    spikes = SpikeResponse(probe_every_n_steps=60, probe_scales=[1e3], probe_steps=20)
    module = far_away(60, adam(1e-4))
    fit(module, [spikes], steps=60)
    t = 60
    momentum = 100 / (1 - 0.9**t)
    root = math.sqrt(1 + 0.001 * 1e6 / (1 - 0.999**t))
    # The gradient varies by 1/2 of 100 from batch to batch.
    assert values(spikes, "probe_amplification/1e+03") == pytest.approx([math.hypot(1, momentum) / root], rel=0.02)
    assert values(spikes, "probe_recovery_steps/1e+03") == [20]
    # What a probe says does not depend on what was probed before.
    again = SpikeResponse(probe_every_n_steps=20, probe_scales=[1e1, 1e3], probe_steps=20)
    fit(far_away(60, adam(1e-4)), [again], steps=60)
    for name in ("amplification", "displacement"):
        assert values(again, f"probe_{name}/1e+03")[-1] == values(spikes, f"probe_{name}/1e+03")[-1]


def test_a_probe_predicts_a_real_spike() -> None:
    class Spiked(Quadratic):
        """Adds to the gradient of step 81 what the probe before it tried."""

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if self.trainer.global_step == 80 and self.factors:
                size = self.w.grad.square().mean().sqrt()  # type: ignore[union-attr]
                generator = torch.Generator().manual_seed(81)
                signs = torch.empty(50).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
                self.w.grad.add_(1e3 * size * signs)  # type: ignore[union-attr]

    spikes = SpikeResponse(probe_every_n_steps=81, probe_scales=[1e3], probe_steps=15)
    size = UpdateSize(every_n_steps=1)
    data = torch.zeros(4 * 100, 50)
    module = Spiked(data, adam(1e-4), start=100.0)
    module.factors = {10**9: 1.0}
    fit(module, [spikes, size], steps=81)
    rms = [x for _, x in size.history["update/rms"]]
    # All data are 0, so that the gradient of all steps is w = 100 within 1 %, and the twin's update is lr.
    assert values(spikes, "probe_amplification/1e+03") == pytest.approx([rms[80] / 1e-4], rel=0.02)


def test_only_tracked_parameters_are_measured() -> None:
    class Two(Quadratic):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.other = nn.Parameter(torch.zeros(3))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + (1e6 if batch_idx == 69 else 1) * self.other.sum()

    for parameters, count in ((["w"], 0), (["other"], 1), (["*"], 1)):
        spikes = SpikeResponse(parameters=parameters)
        fit(Two(normal(400, 50), sgd(1e-4), 4, False, 100.0), [spikes], steps=100)
        assert [x for _, x in spikes.history.get("spike/count", [])][-1:] == [1] * count


def test_resumed_runs_remember(tmp_path: Path) -> None:
    def module() -> Quadratic:
        module = Quadratic(normal(200, 50), sgd(1e-4, momentum=0.9), start=100.0)
        module.factors = {48: 10.0}  # the last batch but one of each epoch of 50
        return module

    whole = SpikeResponse(follow_steps=30)
    fit(module(), [whole], steps=-1, max_epochs=3)
    checkpoint = ModelCheckpoint(tmp_path, filename="first")
    # Ends in the middle of recovering.
    fit(module(), [SpikeResponse(follow_steps=30), checkpoint], steps=-1, max_epochs=1, enable_checkpointing=True)
    torch.load(tmp_path / "first.ckpt", weights_only=True)
    resumed = SpikeResponse(follow_steps=30)
    fit(module(), [resumed], steps=-1, max_epochs=3, ckpt_path=tmp_path / "first.ckpt")
    assert set(whole.history) == set(resumed.history)
    assert values(whole, "recovery_steps")
    for tag, pairs in whole.history.items():
        assert list(resumed.history[tag]) == [pair for pair in pairs if pair[0] >= 50]


@pytest.mark.parametrize(
    "arguments",
    [
        *({"window": 1}, {"follow_steps": 0}, {"probe_every_n_steps": 0}, {"probe_steps": 0}),
        *({"threshold": 0.0}, {"probe_scales": [-1.0]}),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any]) -> None:
    [name] = arguments
    with pytest.raises(ValueError, match=f"SpikeResponse: .*{name}.* must be"):
        SpikeResponse(**arguments)
