"""Verdicts: how often they are false alarms, and how often true differences are found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lightning_optim.compare.statistics import (
    LEVEL,
    basin,
    difference,
    pairs_needed,
    power,
    spread,
    steps_until,
    tuning_noise,
)

RATES = np.arange(-3, 4)  # steps of the grid


def study(rng: np.random.Generator, contenders: int, seeds: int, curvature: float, effect: float = 0.0) -> list[str]:
    """Verdicts of a simulated study: contenders that are one optimizer under several names, unless there is an effect.

    All are tuned on one seed, the best three rates on two more, and reported on others. The cost is a parabola of the
    logarithm of the rate, with noise of standard deviation 1 that is shared by a seed, and as much that is not.
    """
    curve = curvature * (RATES - rng.uniform(-1, 1)) ** 2
    shared = rng.standard_normal(seeds)
    reported, finals = [], []
    for i in range(contenders + 1):
        tuned = curve + rng.standard_normal((3, len(RATES)))
        best = tuned[0].argsort()[:3]
        finals.append(tuned.mean(0)[best])
        chosen = best[finals[-1].argmin()]
        reported.append(curve[chosen] + shared + rng.standard_normal(seeds) - effect * (i > 0))
    verdicts = []
    for costs, final in zip(reported[1:], finals[1:]):
        noise = spread(costs - reported[0]) / math.sqrt(2 * 3)
        tau = math.hypot(tuning_noise(final, noise, 200), tuning_noise(finals[0], noise, 200))
        verdicts.append(difference(costs, reported[0], contenders, tau).verdict)
    return verdicts


@pytest.mark.parametrize(("contenders", "seeds"), [(1, 5), (2, 5), (5, 3), (2, 12)])
def test_false_alarms(contenders: int, seeds: int) -> None:
    """Of 200 studies in which all contenders are the same optimizer, at most 5 % call any of them different."""
    for curvature in (0.0, 0.3, 1.0, 3.0, 10.0):
        rng = np.random.default_rng([int(10 * curvature), contenders, seeds])
        alarms = sum(
            any(v in ("better", "worse") for v in study(rng, contenders, seeds, curvature)) for _ in range(200)
        )
        assert alarms <= 10, curvature


@pytest.mark.parametrize("comparisons", [1, 2, 13])
def test_false_alarms_of_the_interval_alone(comparisons: int) -> None:
    """Without noise of the tuning the chance is what the level says: Bonferroni's correction loses little."""
    rng = np.random.default_rng(comparisons)
    alarms = 0
    studies = 2000
    for _ in range(studies):
        baseline = rng.standard_normal(5)
        verdicts = [difference(rng.standard_normal(5), baseline, comparisons).verdict for _ in range(comparisons)]
        alarms += any(v != "unclear" for v in verdicts)
    # Three standard errors of a share of 2 % among 2,000.
    assert 0.005 < alarms / studies <= 0.02 + 3 * math.sqrt(0.02 * 0.98 / studies)


@pytest.mark.parametrize(("effect", "pairs", "comparisons"), [(1.0, 5, 1), (1.5, 5, 2), (0.7, 14, 1), (0.8, 20, 6)])
def test_power_is_as_computed(effect: float, pairs: int, comparisons: int) -> None:
    rng = np.random.default_rng(pairs)
    d = effect + rng.standard_normal((4000, pairs))
    found = np.mean([difference(row, np.zeros(pairs), comparisons).verdict == "worse" for row in d])
    # Four standard errors; the chance of an error in the wrong direction, which `power` counts too, is below 1e-3 here.
    assert found == pytest.approx(power(effect, 1.0, pairs, comparisons), abs=4 * math.sqrt(0.25 / 4000) + 1e-3)


def test_pairs_needed_are_the_fewest_that_do() -> None:
    for effect in (0.3, 1.0, 4.0):
        for comparisons in (1, 3):
            n = pairs_needed(effect, 1.0, comparisons)
            assert n is not None
            assert power(effect, 1.0, n, comparisons) >= 0.8
            assert n == 2 or power(effect, 1.0, n - 1, comparisons) < 0.8
    assert pairs_needed(0.01, 1.0, tuning=0.01) is None  # Seeds do not help against noise of the tuning.


def test_a_difference_that_the_pairs_show() -> None:
    """The noise that the runs of a seed share does not hide a difference."""
    rng = np.random.default_rng(0)
    shared = 10 * rng.standard_normal(5)
    d = difference(shared - 1 + 0.1 * rng.standard_normal(5), shared)
    assert d.verdict == "better"
    low, high = d.mean - d.half_width, d.mean + d.half_width
    assert low < -1 < high
    # The interval is scipy's.
    expected = stats.t.interval(LEVEL, 4, d.mean, d.deviation / math.sqrt(5))
    assert (low, high) == pytest.approx(expected)


def test_equal_and_diverged_runs_are_no_verdict() -> None:
    assert difference([1.0, 2.0], [1.0, 2.0]).verdict == "equal"
    lost = difference([1.0, math.inf, 2.0], [1.5, 1.5, math.inf])
    assert (lost.verdict, lost.diverged, lost.diverged_baseline, lost.pairs) == ("diverged", 1, 1, 1)
    assert difference([math.inf] * 3, [1.0] * 3).verdict == "diverged"
    with pytest.raises(ValueError, match="two pairs"):
        difference([1.0], [1.0])
    assert math.isnan(spread([1.0, math.inf]))


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ({1.0: 0.0, 2.0: 0.0, 4.0: 0.0}, (1.0, 4.0, True)),
        ({1.0: 2.0, 2.0: 0.0, 4.0: 2.0}, (math.sqrt(2), math.sqrt(8), False)),
        ({1.0: math.inf, 2.0: 0.0, 4.0: math.inf}, (2.0, 2.0, False)),
        ({1.0: 0.5, 2.0: 0.0, 4.0: math.inf, 8.0: 0.0}, (1.0, 2.0, True)),
        ({1.0: 0.0, 2.0: 2.0, 4.0: 0.0}, (1.0, math.sqrt(2), True)),
    ],
)
def test_basin(costs: dict[float, float], expected: tuple[float, float, bool]) -> None:
    assert basin(costs, 1.0) == pytest.approx(expected)


def test_steps_until() -> None:
    assert steps_until(0.1, [1, 2], [1.0, 0.5]) is None
    assert steps_until(2.0, [10, 20], [1.0, 0.5]) == 10
    assert steps_until(0.5, [10, 20], [math.inf, 0.4]) == 20
    assert steps_until(0.75, [10, 20, 30], [1.0, 0.5, 0.9]) == 15
