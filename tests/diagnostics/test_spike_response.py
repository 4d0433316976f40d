"""Responses to gradient spikes: published figures, the bound of MVN-Grad, and how they are measured."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_optim as lo
from lightning_optim.diagnostics import spike_response
from lightning_optim.diagnostics.spike_response import (
    SpikeWatch,
    recovery_steps,
    robust_zscore,
    spike_probe,
    spike_probe_sums,
)


def matrices(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params, "role": "matrix"}]


#: As configured in the gradient-spike primer of NVIDIA's Emerging-Optimizers (SOAP there is its KL-Shampoo variant).
PRIMER: dict[str, Any] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0),
    "LaProp": lambda ps: lo.LaProp(ps, lr=1.0, betas=(0.9, 0.65), eps=1e-8),
    "Muon": lambda ps: lo.Muon(matrices(ps), lr=1.0, momentum=0.95),
    "SOAP": lambda ps: lo.SOAP(
        matrices(ps), lr=1.0, betas=(0.9, 0.95), shampoo_beta=0.95, weight_decay=0.0, precondition_frequency=1
    ),
}


# --- offline --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "published"), [("AdamW", 28), ("LaProp", 1), ("Muon", 1), ("SOAP", 56)])
def test_crossing_steps_are_those_published(name: str, published: int) -> None:
    # Other random numbers than theirs, and another variant of SOAP. Over 8 seeds: AdamW 27 to 29, SOAP 48 to 62.
    crossing = spike_response(PRIMER[name], 1e3, spike_at=100).crossing_steps
    assert crossing is not None
    assert abs(crossing - published) <= {"AdamW": 1, "SOAP": 8}.get(name, 0)


def test_crossing_the_band_is_not_recovery() -> None:
    adamw = spike_response(PRIMER["AdamW"], 1e3)
    # It passes the band on its way down, to updates seven times too small.
    assert adamw.suppression < 0.2
    assert adamw.recovery_steps is None
    muon = spike_response(PRIMER["Muon"], 1e3)
    assert (muon.recovery_steps, round(muon.amplification, 1), round(muon.suppression, 1)) == (1, 1.0, 1.0)


def test_response_of_sgd_is_known() -> None:
    # Update = -gradient, so the spike's step is the only one that differs: by 99 times a gradient.
    r = spike_response(lambda ps: torch.optim.SGD(ps, lr=1.0), 100.0, spike_at=40, after=20)
    # Relative to the same step without the spike: exactly the factor, in float32.
    assert r.amplification == pytest.approx(100, rel=1e-5)
    assert r.suppression == 1
    # RMS of 8,192 normal numbers is 1 within 1/sqrt(2 * 8192) = 0.8 %, one standard error; the baseline is closer.
    assert r.extra_displacement == pytest.approx(99, rel=0.04)
    assert r.recovery_steps == r.crossing_steps == 1
    assert len(r.rms) == 61
    assert torch.equal(r.rms[:40], r.twin_rms[:40])
    assert torch.equal(r.rms[41:], r.twin_rms[41:])


def test_recovery_is_to_what_updates_would_be_without_the_spike() -> None:
    """An optimizer whose updates shrink anyway, as by a schedule, has recovered when it is where its twin is."""

    class Shrinking(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            self.param_groups[0]["lr"] *= 0.97
            return loss

    r = spike_response(lambda ps: Shrinking(ps, lr=1.0), 100.0, spike_at=40, after=20)
    assert r.recovery_steps == 1
    assert r.suppression == 1
    assert r.amplification == pytest.approx(100, rel=1e-5)


def test_lost_progress_is_known_for_sgd() -> None:
    # The spike's step goes 99 noises astray, whose mean along 8,192 random signs is 0 within 99/sqrt(8192) = 1.1.
    r = spike_response(lambda ps: torch.optim.SGD(ps, lr=1.0), 100.0, spike_at=40, after=20, signal=1.0)
    assert torch.equal(r.lost[:40], torch.zeros(40, dtype=torch.float64))
    assert abs(r.lost_steps) < 4.4
    # An optimizer that takes no steps after a spike loses all of them.
    skipping = spike_response(Skipping, 1e6, spike_at=40, after=20, signal=1.0)
    assert skipping.lost_steps == pytest.approx(21, rel=0.02)  # Each step's progress differs a little.
    assert math.isnan(spike_response(Skipping, 10.0, spike_at=5, after=5).lost_steps)


class Skipping(torch.optim.SGD):
    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=1.0)
        self.stopped = False

    def step(self, closure: Any = None) -> Any:
        self.stopped = self.stopped or bool(self.param_groups[0]["params"][0].grad.abs().max() > 1e3)
        return None if self.stopped else super().step(closure)


@pytest.mark.parametrize("argument", ["spike_at", "after"])
def test_steps_on_both_sides_are_needed(argument: str) -> None:
    arguments: dict[str, Any] = {argument: 0}
    with pytest.raises(ValueError, match=f"{argument}=0"):
        spike_response(PRIMER["AdamW"], 1.0, **arguments)


@given(st.lists(st.floats(0, 3), min_size=2, max_size=20))
def test_recovery_is_the_first_step_from_which_nothing_is_off(ratios: list[float]) -> None:
    steps = recovery_steps(ratios)
    if steps is None:
        assert abs(ratios[-1] - 1) > 0.1
    else:
        assert all(abs(r - 1) <= 0.1 for r in ratios[steps:])
        assert steps == 1 or abs(ratios[steps - 1] - 1) > 0.1


# --- theory -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    b1=st.floats(0.05, 0.995),
    b2=st.floats(0.05, 0.9995),
    exponent=st.floats(2, 9),
    before=st.integers(1, 60),
    seed=st.integers(0, 100),
)
def test_one_outlier_moves_mvn_grad_by_no_more_than_the_bound(
    b1: float, b2: float, exponent: float, before: int, seed: int
) -> None:
    # After `before` steps of noise of size 1 an outlier S comes at step t = before + 1, and zeros after it; the twin
    # gets zeros only. What differs is b1^k (1-b1) z_t, k steps after the outlier, with its normalised gradient
    #     |z_t| <= sqrt(1 - b2^t) |S| / (sqrt(1-b2) b1 |S - m_{t-1}|).
    # So the bound is lr b1^k (1-b1) / (b1 sqrt(1-b2)), times the bias corrections sqrt(1 - b2^t) / (1 - b1^(t+k)) and
    # |S| / (|S| - |m|), which tends to 1 with the size of S.
    generator = torch.Generator().manual_seed(seed)
    lr, outlier = 0.1, 10**exponent
    optimizers = []
    for _ in range(2):
        w = nn.Parameter(torch.zeros(50, dtype=torch.float64))
        optimizers.append((w, lo.MVNGrad([w], lr=lr, betas=(b1, b2), eps=1e-18)))  # far below rounding
    for _ in range(before):
        gradient = torch.randn(50, generator=generator, dtype=torch.float64)
        for w, optimizer in optimizers:
            w.grad = gradient
            optimizer.step()
    momentum = optimizers[0][1].state[optimizers[0][0]]["m"].abs().max().item()
    for k in range(40):
        updates = []
        for (w, optimizer), g in zip(optimizers, (outlier if k == 0 else 0.0, 0.0)):
            w.grad = torch.full_like(w, g)
            start = w.detach().clone()
            optimizer.step()
            updates.append(w.detach() - start)
        bound = lr * b1**k * (1 - b1) / (b1 * math.sqrt(1 - b2))
        t = before + 1
        bound *= math.sqrt(1 - b2**t) / (1 - b1 ** (t + k)) * outlier / (outlier - momentum)
        response = (updates[0] - updates[1]).abs().max().item()
        # Rounding: weights of size 1 to 100 in float64.
        assert response <= bound * (1 + 1e-9) + 1e-12
        if (
            k == 0
        ):  # and the bound is no more than twice too large if b2 is not tiny against the history of the variance
            variance = b2 * 10 / ((1 - b2) * (b1 * outlier) ** 2)
            assert response >= bound / 2 or variance > 1e-3


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.99, 0.9), (0.99, 0.5)])
def test_amplification_of_mvn_grad_does_not_grow_with_the_spike(betas: tuple[float, float]) -> None:
    responses = [
        spike_response(lambda ps: lo.MVNGrad(ps, lr=1.0, betas=betas), 10.0**n, spike_at=300, shape=(32, 32))
        for n in (3, 6, 9)
    ]
    assert max(r.amplification for r in responses[1:]) <= 1.01 * responses[0].amplification


def test_amplification_of_adam_grows_without_bound_where_its_second_moment_is_the_faster_to_forget() -> None:
    # Bounded if and only if b1^2 <= b2. Afterwards updates shrink by 0.99 and grow by 1/sqrt(0.9) per step, until the
    # second moment is the ordinary one again: about S^(1 - log(0.99)/log(sqrt(0.9))) = S^0.81, so 268 for 1e3.
    def amplification(scale: float, betas: tuple[float, float]) -> float:
        adam = lambda ps: torch.optim.Adam(ps, lr=1.0, betas=betas)  # noqa: E731
        return spike_response(adam, scale, spike_at=300, after=500, shape=(32, 32)).amplification

    growth = [amplification(10.0 ** (n + 3), (0.99, 0.9)) / amplification(10.0**n, (0.99, 0.9)) for n in (3, 6)]
    assert growth == pytest.approx([268, 268], rel=0.2)
    assert amplification(1e9, (0.9, 0.999)) <= 1.01 * amplification(1e6, (0.9, 0.999))


# --- probe ------------------------------------------------------------------------------------------------------------


def test_probe_of_momentum_sgd_is_known() -> None:
    # From rest and with gradient 1, the twin's updates are 1, 1.5, 1.75, ...; a spike of +-s of the RMS gradient 1
    # adds +-s 0.5^t. Ratios of RMS are sqrt(1 + (s 0.5^t / twin)^2), if signs are balanced.
    w = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=0.5)
    signs = torch.ones(1000)
    signs[::2] = -1
    sums = spike_probe_sums(optimizer, {w: torch.ones(1000)}, {w: signs}, [10.0], steps=12)
    values = spike_probe(sums, [10.0])
    assert values["amplification/1e+01"] == pytest.approx(math.sqrt(1 + 10**2), rel=1e-5)
    assert values["displacement/1e+01"] == pytest.approx(10 * (2 - 0.5**12), rel=1e-5)
    # Ratio at step t: 1 + (10 * 0.5^t / (2 - 0.5^t))^2 <= 1.21 first holds for t = 4 (0.323^2 = 0.10).
    assert values["recovery_steps/1e+01"] == 4
    assert not w.any()


def test_probe_counts_as_not_recovered_at_its_end() -> None:
    w = nn.Parameter(torch.zeros(100))
    adam = torch.optim.Adam([w], lr=1.0)
    sums = spike_probe_sums(adam, {w: torch.ones(100)}, {w: torch.ones(100)}, [1e6], steps=7)
    assert spike_probe(sums, [1e6])["recovery_steps/1e+06"] == 7


def test_sums_of_large_parameters_are_scaled_up() -> None:
    w = nn.Parameter(torch.zeros(3, 5000))
    sums = spike_probe_sums(torch.optim.SGD([w], lr=1.0), {w: torch.ones(3, 5000)}, {w: torch.ones(3, 5000)}, [2.0], 1)
    assert sums["calm_0"].tolist() == pytest.approx([15000.0])
    assert sums["spiked_2e+00_0"].tolist() == pytest.approx([9 * 15000.0])
    assert sums["extra_2e+00_0"].tolist() == pytest.approx([4 * 15000.0])


def test_scales_of_several_digits_are_told_apart() -> None:
    w = nn.Parameter(torch.zeros(4))
    sums = spike_probe_sums(torch.optim.SGD([w], lr=1.0), {w: torch.ones(4)}, {w: torch.ones(4)}, [11.0, 14.0], 1)
    values = spike_probe(sums, [11.0, 14.0])
    assert (values["amplification/11"], values["amplification/14"]) == pytest.approx((12, 15))


# --- online -----------------------------------------------------------------------------------------------------------


def test_robust_zscore() -> None:
    assert robust_zscore(0.0, [0.0] * 40) == 0  # a frozen model has no spikes
    normal = torch.randn(20_001, generator=torch.Generator().manual_seed(0), dtype=torch.float64).add(50).tolist()
    # Standard errors of median and MAD of 20,000 normal values are 0.9 % and 1.2 %.
    assert robust_zscore(56.0, normal) == pytest.approx(6.0, abs=0.2)
    assert robust_zscore(56.0, [*normal, *[1e9] * 1000]) == pytest.approx(6.0, abs=0.6)  # spikes do not count
    assert robust_zscore(1.03, [1.0] * 50) == pytest.approx(3.0)
    assert robust_zscore(1.0, [0.0] * 50) == math.inf


def run(watch: SpikeWatch, norms: list[float], rms: dict[int, float]) -> list[tuple[int, dict[str, float]]]:
    """Feed a watch; update RMS is 1 but for the steps given."""
    said = []
    for step, norm in enumerate(norms, start=1):
        if watch.see(norm):
            said.append((step, watch.measured(step, rms.get(step, 1.0))))
    return said


def norms(count: int, **spikes: float) -> list[float]:
    noise = torch.rand(count, generator=torch.Generator().manual_seed(0))
    return [spikes.get(f"at{i}", 1 + 0.1 * float(x)) for i, x in enumerate(noise, start=1)]


def test_a_spike_is_followed_until_updates_have_recovered() -> None:
    rms = {64: 4.0, 65: 2.0, 66: 0.25, 67: 0.5, 68: 0.95}
    said = run(SpikeWatch(), norms(100, at64=50.0), rms)
    # A baseline now and then, every step after the spike until five are calm.
    assert [step for step, _ in said] == [1, 2, 10, 20, 30, 40, 50, 60, *range(64, 73), 80, 90, 100]
    [(step, values)] = [(step, values) for step, values in said if "amplification" in values]
    assert step == 72
    assert (values["amplification"], values["suppression"], values["recovery_steps"]) == (4.0, 0.25, 4.0)
    assert values["count"] == 1
    assert max(v["zscore"] for s, v in said if s != 64 and not math.isnan(v["zscore"])) < 6 < dict(said)[64]["zscore"]


def test_baselines_are_measured_less_often_after_a_hundred_steps() -> None:
    said = run(SpikeWatch(), norms(260), {})
    assert [step for step, _ in said] == [1, 2, *range(10, 101, 10), 150, 200, 250]


def test_a_spike_without_recovery_is_given_up() -> None:
    said = run(SpikeWatch(follow=20), norms(150, at64=50.0), dict.fromkeys(range(64, 200), 3.0))
    [(step, values)] = [(step, values) for step, values in said if "amplification" in values]
    assert (step, values["recovery_steps"]) == (84, 20.0)
    # From now on that is the baseline.
    assert said[-1][0] == 150


def test_where_updates_vary_recovery_is_to_that() -> None:
    wild = {step: 1.0 + 0.4 * math.sin(step) for step in range(200)}
    said = run(SpikeWatch(), norms(150, at104=50.0), wild | {104: 10.0})
    [(_, values)] = [(step, values) for step, values in said if "amplification" in values]
    assert values["recovery_steps"] == 1


def test_too_few_norms_are_no_evidence_and_infinite_ones_no_spike() -> None:
    watch = SpikeWatch()
    run(watch, norms(40, at20=50.0), {})
    assert watch.count == 0
    run(watch, [math.inf, math.nan], {})
    assert watch.count == 0
    assert all(math.isfinite(x) for x in watch.norms)
    run(watch, [50.0], {})
    assert watch.count == 1


def test_only_the_window_counts() -> None:
    watch = SpikeWatch(window=32)
    run(watch, [1.0] * 40 + [100.0] * 40, {})
    assert len(watch.norms) == 32
    assert watch.norms == [100.0] * 32
    count = watch.count
    run(watch, [100.0], {})
    assert watch.count == count
