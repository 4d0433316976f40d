"""Schedules against independent closed forms, torch's own schedulers and their promises."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from lightning_optim.schedules import WarmupConstant, WarmupCosine, WarmupLinear, WarmupStableDecay

SCHEDULES = [WarmupConstant, WarmupCosine, WarmupLinear, WarmupStableDecay]
# Closed forms in float64 agree to rounding.
ROUNDING = 1e-12


def make_optimizer(*lrs: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs or (1.0,)])


def run(scheduler: LRScheduler, steps: int) -> list[list[float]]:
    """The learning rates of every group that the next `steps` optimizer steps use."""
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return used


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of WarmupStableDecay in steps."""
    total = draw(st.integers(1, 120))
    warmup = draw(st.integers(0, total))
    return {
        "total_steps": total,
        "warmup": warmup,
        "decay": draw(st.integers(0, total - warmup)),
        "tail": draw(st.sampled_from(["linear", "cosine"])),
        "min_lr_ratio": draw(st.sampled_from([0.0, 0.1, 1.0]) | st.floats(0, 1)),
    }


def expected_factor(step: int, total_steps: int, warmup: int, decay: int, tail: str, min_lr_ratio: float) -> float:
    """Warm-up as interpolation from (-1, 0) to (warmup - 1, 1), tail as interpolation or a squared cosine."""
    rise = float(np.interp(step, [-1, warmup - 1], [0, 1])) if warmup else 1.0
    if decay == 0:
        return rise
    progress = float(np.interp(step, [total_steps - decay, total_steps], [0, 1]))
    fall = 1 - progress if tail == "linear" else math.cos(math.pi * progress / 2) ** 2
    return rise * (min_lr_ratio + (1 - min_lr_ratio) * fall)


@settings(deadline=None)
@given(shapes())
def test_stable_decay_matches_an_independent_closed_form(shape):
    schedule = WarmupStableDecay(make_optimizer(), **shape)
    for step in range(shape["total_steps"] + 5):
        assert schedule.factor(step) == pytest.approx(expected_factor(step, **shape), abs=ROUNDING)


@settings(deadline=None)
@given(shapes())
def test_shape_is_bounded_continuous_and_monotone_in_its_parts(shape):
    schedule = WarmupStableDecay(make_optimizer(), **shape)
    total, warmup, decay, floor = (shape[key] for key in ("total_steps", "warmup", "decay", "min_lr_ratio"))
    factors = [schedule.factor(step) for step in range(total + 3)]
    changes = np.diff(factors)
    assert all(0 < factor <= 1 for factor in factors[:total])
    assert all(factor >= floor - ROUNDING for factor in factors[warmup:])
    assert all(changes[: max(warmup - 1, 0)] > 0)
    assert all(changes[warmup:] <= 0)
    # The steepest slope is that of the warm-up or the middle of a half cosine.
    steepest = max(1 / max(warmup, 1), math.pi / 2 * (1 - floor) / decay if decay else 0)
    assert np.abs(changes).max() <= steepest + ROUNDING
    assert factors[total:] == [factors[total]] * 3


@settings(deadline=None)
@given(shapes())
def test_cosine_linear_and_constant_are_special_cases(shape):
    total, warmup, floor = shape["total_steps"], shape["warmup"], shape["min_lr_ratio"]
    rest = total - warmup
    cosine = WarmupCosine(make_optimizer(), total, warmup, floor)
    linear = WarmupLinear(make_optimizer(), total, warmup, floor)
    constant = WarmupConstant(make_optimizer(), total, warmup)
    for step in range(total + 5):
        for schedule, decay, tail in (
            (cosine, rest, "cosine"),
            (linear, rest, "linear"),
            (constant, 0, "linear"),
        ):
            expected = expected_factor(step, total, warmup, decay, tail, floor)
            assert schedule.factor(step) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_without_warmup_equals_torch(floor):
    ours = run(WarmupCosine(make_optimizer(0.3), 20, min_lr_ratio=floor), 20)
    torchs = run(CosineAnnealingLR(make_optimizer(0.3), T_max=20, eta_min=0.3 * floor), 20)
    np.testing.assert_allclose(ours, torchs, rtol=1e-9)  # torch multiplies step by step
    ours = run(WarmupLinear(make_optimizer(0.3), 20, min_lr_ratio=floor), 30)
    torchs = run(LinearLR(make_optimizer(0.3), start_factor=1.0, end_factor=floor, total_iters=20), 30)
    np.testing.assert_allclose(ours, torchs, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_groups_keep_their_ratios(schedule):
    scheduler = schedule(make_optimizer(1.0, 0.25, 8.0), total_steps=30, warmup=7)
    for peak, quarter, eightfold in run(scheduler, 35):
        # Powers of two scale without rounding.
        assert quarter == peak / 4
        assert eightfold == peak * 8


@settings(deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(2, 40),
    warmup=st.floats(0, 0.5),
    stop=st.integers(0, 45),
)
def test_resume_equals_uninterrupted(schedule, total, warmup, stop):
    arguments = {"total_steps": total, "warmup": warmup}
    expected = run(schedule(make_optimizer(0.1, 0.7), **arguments), stop + 10)

    first = schedule(make_optimizer(0.1, 0.7), **arguments)
    before = run(first, stop)
    file = io.BytesIO()
    torch.save({"optimizer": first.optimizer.state_dict(), "scheduler": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = schedule(make_optimizer(0.1, 0.7), **arguments)
    second.optimizer.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["scheduler"])
    assert before + run(second, 10) == expected


def test_resume_takes_the_shape_from_the_arguments():
    """A run stopped in its constant part can go on for longer."""
    first = WarmupStableDecay(make_optimizer(), total_steps=10, warmup=2, decay=4)
    run(first, 6)
    longer = WarmupStableDecay(make_optimizer(), total_steps=20, warmup=2, decay=4)
    longer.load_state_dict(first.state_dict())
    assert run(longer, 14)[-3:] == [[0.75], [0.5], [0.25]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pickle_continues(schedule):
    scheduler = schedule(make_optimizer(0.5), total_steps=12, warmup=3)
    run(scheduler, 5)
    copy = pickle.loads(pickle.dumps(scheduler))
    assert run(copy, 5) == run(scheduler, 5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lengths_are_steps_or_fractions(schedule):
    in_steps = run(schedule(make_optimizer(), total_steps=40, warmup=10), 40)
    assert run(schedule(make_optimizer(), total_steps=40, warmup=0.25), 40) == in_steps
    one_step = schedule(make_optimizer(), total_steps=40, warmup=1)
    assert one_step.factor(0) == 1.0
    if schedule is not WarmupStableDecay:
        whole_run = schedule(make_optimizer(), total_steps=40, warmup=1.0)
        assert [whole_run.factor(step) for step in range(40)] == [(step + 1) / 40 for step in range(40)]


def test_fractions_that_fill_the_run_fit():
    for total in range(1, 200):
        schedule = WarmupStableDecay(make_optimizer(), total_steps=total, warmup=0.29, decay=0.71)
        assert total - 1 <= schedule.warmup + schedule.decay <= total
    assert WarmupConstant(make_optimizer(), total_steps=100, warmup=0.29).warmup == 29


@pytest.mark.parametrize(
    ("text", "warmup"), [("1", 1), ("1.0", 1.0), ("0.1", 0.1), ("100", 100), ("5e-2", 0.05), ("0", 0)]
)
def test_command_line_tells_steps_from_fractions(text, warmup):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LRScheduler, "lr_scheduler", skip={"optimizer"}, instantiate=False)
    parsed = parser.parse_args(["--lr_scheduler=WarmupCosine", f"--lr_scheduler.warmup={text}"])
    value = parsed.lr_scheduler.init_args.warmup
    assert value == warmup
    assert type(value) is type(warmup)


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        (WarmupCosine, {}, r"WarmupCosine needs the length of the run, but total_steps is None: give it total_steps=N"),
        (WarmupLinear, {"total_steps": math.inf}, r"total_steps is inf: give it total_steps"),
        (WarmupStableDecay, {"total_steps": -1}, r"total_steps is -1: give it total_steps"),
        (WarmupConstant, {"warmup": 0.1}, r"WarmupConstant needs the length of the run"),
        (WarmupConstant, {"total_steps": 10, "warmup": -1}, r"warmup must not be negative, got -1"),
        (WarmupConstant, {"total_steps": 10, "warmup": 11}, r"warm-up \(11 steps\).*10 steps of the run"),
        (
            WarmupCosine,
            {"total_steps": 10, "warmup": 100.0},
            r"warmup as a float is a fraction.*100.0.*integer",
        ),
        (WarmupCosine, {"total_steps": 10, "warmup": math.nan}, r"warmup as a float is a fraction.*nan"),
        (WarmupCosine, {"total_steps": 10, "warmup": 11}, r"warm-up \(11 steps\).*10 steps of the run"),
        (WarmupCosine, {"total_steps": 10, "min_lr_ratio": 1.5}, r"min_lr_ratio.*\[0, 1\], got 1.5"),
        (WarmupStableDecay, {"total_steps": 10, "decay": -0.1}, r"decay as a float is a fraction.*-0.1"),
        (
            WarmupStableDecay,
            {"total_steps": 10, "warmup": 6, "decay": 5},
            r"\(6 steps\).*\(5 steps\).*10 steps",
        ),
        (
            WarmupStableDecay,
            {"total_steps": 10, "tail": "sqrt"},
            r"tail must be 'linear' or 'cosine', got 'sqrt'",
        ),
    ],
)
def test_bad_arguments(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(make_optimizer(), **arguments)


def test_constant_needs_no_length():
    assert run(WarmupConstant(make_optimizer(), warmup=2), 4) == [[0.5], [1.0], [1.0], [1.0]]
