"""What differences between optimizers mean: intervals, verdicts, the number of seeds that would be needed.

Costs are what is to be small: a loss, or a metric that is to be large with its sign changed. A run that diverged has
the cost infinity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy import stats

__all__ = [
    "LEVEL",
    "Difference",
    "basin",
    "difference",
    "pairs_needed",
    "power",
    "spread",
    "steps_until",
    "tuning_noise",
]

Verdict: TypeAlias = Literal["better", "worse", "unclear", "equal", "diverged"]

_MOST_PAIRS = 10_000

#: Confidence level of all comparisons of a study together. With 0.95, studies of one optimizer under several names
#: would call two of them different in up to 8 % of all cases, since the choice of the learning rate is noisy, too. With
#: 0.98, and with the best three settings tried on further seeds, it is at most 5 %
#: (`tests/compare/test_statistics.py`).
LEVEL = 0.98


@dataclass(frozen=True)
class Difference:
    """A contender's cost minus the baseline's, over pairs of runs with the same seed.

    Args:
        verdict: ``better`` or ``worse`` where the interval leaves zero out, ``equal`` where all pairs are equal,
            ``diverged`` where a run of the pair did, else ``unclear``.
        pairs: Number of pairs.
        mean: Mean difference.
        half_width: The confidence interval is ``mean`` plus and minus this.
        deviation: Standard deviation of the differences.
        tuning: Standard deviation that the choice of hyperparameters adds; see :func:`tuning_noise`.
        diverged: How many runs of the contender diverged.
        diverged_baseline: How many of the baseline did.
    """

    verdict: Verdict
    pairs: int
    mean: float
    half_width: float
    deviation: float
    tuning: float
    diverged: int
    diverged_baseline: int


def spread(costs: Sequence[float]) -> float:
    """Standard deviation between the runs that did not diverge; not a number with fewer than two."""
    finite = [cost for cost in costs if math.isfinite(cost)]
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan


def difference(
    costs: Sequence[float],
    baseline: Sequence[float],
    comparisons: int = 1,
    tuning: float = 0.0,
    level: float = LEVEL,
) -> Difference:
    r"""Compare a contender with the baseline over pairs of runs.

    With the differences :math:`d_i` of ``n`` pairs, their mean :math:`\bar d` and standard deviation :math:`s`, and
    ``m`` comparisons with the same baseline, the interval is

    .. math:: \bar d \pm t_{1 - \alpha / 2m,\, n - 1} \sqrt{s^2 / n + \tau^2},

    with :math:`\alpha` = 1 - ``level`` and Bonferroni's correction, so that the chance of one false alarm or more among
    all comparisons is at most :math:`\alpha`. The noise of the tuning, :math:`\tau`, is not made smaller by more seeds.

    Args:
        costs: The contender's costs.
        baseline: The baseline's, in the same order of seeds.
        comparisons: How many contenders are compared with the baseline.
        tuning: :math:`\tau`.
        level: Confidence level of all comparisons together.

    Raises:
        ValueError: There are fewer than two pairs, or not equally many costs.

    Example:
        >>> d = difference([0.29, 0.30, 0.28, 0.31], [0.33, 0.34, 0.31, 0.35])
        >>> d.verdict, f"{d.mean:.4f} +- {d.half_width:.4f}"
        ('better', '-0.0375 +- 0.0114')
    """
    if len(costs) != len(baseline) or len(costs) < 2:
        raise ValueError(f"A comparison takes two pairs or more, got {len(costs)} and {len(baseline)} costs.")
    lost, lost_baseline = (sum(not math.isfinite(x) for x in xs) for xs in (costs, baseline))
    pairs = np.array([(a, b) for a, b in zip(costs, baseline) if math.isfinite(a) and math.isfinite(b)]).reshape(-1, 2)
    d = pairs[:, 0] - pairs[:, 1]
    n = len(d)
    mean = float(d.mean()) if n else math.nan
    deviation = float(d.std(ddof=1)) if n > 1 else math.nan
    if lost or lost_baseline:
        return Difference("diverged", n, mean, math.nan, deviation, tuning, lost, lost_baseline)
    if not d.any():
        return Difference("equal", n, 0.0, 0.0, 0.0, tuning, 0, 0)
    half_width = _critical(n, comparisons, level) * math.sqrt(deviation**2 / n + tuning**2)
    verdict: Verdict = "unclear" if abs(mean) <= half_width else "better" if mean < 0 else "worse"
    return Difference(verdict, n, mean, half_width, deviation, tuning, 0, 0)


def _critical(n: int, comparisons: int, level: float) -> float:
    return float(stats.t.ppf(1 - (1 - level) / (2 * comparisons), n - 1))


def power(
    effect: float, deviation: float, pairs: int, comparisons: int = 1, tuning: float = 0.0, level: float = LEVEL
) -> float:
    """The chance that :func:`difference` calls a true difference of this size different (noncentral t).

    Args:
        effect: The true difference.
        deviation: Standard deviation of the differences of pairs.
        pairs: Number of pairs.
        comparisons: As for :func:`difference`.
        tuning: As for :func:`difference`.
        level: As for :func:`difference`.

    Example:
        >>> round(power(0.5, 1.0, 34, level=0.95), 2)  # the textbook's 80 % for half a standard deviation
        0.81
    """
    error = math.sqrt(deviation**2 / pairs + tuning**2)
    if error == 0:
        return float(effect != 0)
    critical, shift = _critical(pairs, comparisons, level), abs(effect) / error
    # The noncentral t as a mean of normal distributions over the estimated deviation: scipy's own series is not a
    # number for large effects.
    deviations = np.sqrt(stats.chi2.ppf((np.arange(500) + 0.5) / 500, pairs - 1) / (pairs - 1))
    found = stats.norm.cdf(shift - critical * deviations) + stats.norm.cdf(-shift - critical * deviations)
    return float(found.mean())


def pairs_needed(
    effect: float,
    deviation: float,
    comparisons: int = 1,
    tuning: float = 0.0,
    level: float = LEVEL,
    wanted: float = 0.8,
) -> int | None:
    """The smallest number of pairs with which a true difference of this size is found with a chance of ``wanted``.

    ``None`` if not even 10,000 would do.

    >>> [pairs_needed(d, 1.0, level=0.95) for d in (0.5, 1.0, 0.0)]
    [34, 10, None]
    """
    if power(effect, deviation, _MOST_PAIRS, comparisons, tuning, level) < wanted:
        return None
    low, high = 2, _MOST_PAIRS
    while low < high:
        middle = (low + high) // 2
        if power(effect, deviation, middle, comparisons, tuning, level) < wanted:
            low = middle + 1
        else:
            high = middle
    return low


def tuning_noise(costs: Sequence[float], noise: float, draws: int = 2000) -> float:
    """What it costs that hyperparameters were chosen from runs with noise, root of the mean square.

    The setting with the lowest cost may be lucky and another one better. This draws what the true costs may be, the
    observed ones plus normal noise, and counts how much the chosen setting costs more than the best.

    Args:
        costs: Costs of all that were tried.
        noise: Standard deviation of one of them.
        draws: Number of draws.

    Example:
        >>> tuning_noise([1.0, 0.5, 1.0], 0.01)  # nothing else can be the best
        0.0
        >>> 0.02 < tuning_noise([1.0, 0.5, 0.52], 0.05) < 0.05
        True
    """
    finite = np.array([cost for cost in costs if math.isfinite(cost)])
    if len(finite) < 2 or not math.isfinite(noise):
        return 0.0
    truth = finite + noise * np.random.default_rng(0).standard_normal((draws, len(finite)))
    return float(np.sqrt(np.mean((truth[:, finite.argmin()] - truth.min(1)) ** 2)))


def basin(costs: Mapping[float, float], tolerance: float) -> tuple[float, float, bool]:
    """The range of learning rates around the best one within which the cost stays near it.

    Args:
        costs: Costs by learning rate.
        tolerance: How much more than the best is near.

    Returns:
        Lowest and highest rate, between those tried by linear interpolation over their logarithms, and whether the
        range goes on beyond those that were tried.

    Example:
        >>> low, high, open = basin({0.001: 2.0, 0.01: 1.0, 0.1: math.inf}, 0.5)
        >>> f"{low:.4f} to {high:.2f}", open
        ('0.0032 to 0.01', False)
    """
    rates = sorted(costs)
    best = min(rates, key=lambda rate: costs[rate])
    bound = costs[best] + tolerance
    ends = []
    is_open = False
    for steps in (range(rates.index(best), -1, -1), range(rates.index(best), len(rates))):
        inside = best
        for i in steps:
            if costs[rates[i]] <= bound:
                inside = rates[i]
                continue
            if math.isfinite(costs[rates[i]]):
                share = (bound - costs[inside]) / (costs[rates[i]] - costs[inside])
                inside = inside * (rates[i] / inside) ** share
            break
        else:
            is_open = True
        ends.append(inside)
    return ends[0], ends[1], is_open


def steps_until(target: float, steps: Sequence[float], costs: Sequence[float]) -> float | None:
    """The step at which a curve first is as low as a target, between its points by linear interpolation.

    >>> steps_until(0.5, [10, 20, 30], [1.0, 0.6, 0.4])
    25.0
    """
    for i, cost in enumerate(costs):
        if cost <= target:
            if i == 0 or not math.isfinite(costs[i - 1]):
                return float(steps[i])
            share = (costs[i - 1] - target) / (costs[i - 1] - cost)
            return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    return None
