"""Which settings are tried next: a function of what the settings before have cost, so that a study goes on as it would.

Every contender gets equally many trials. The range of learning rates is extended while the best lies on its edge; those
who needed no extension get as many trials between their best rate and its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .design import Contender, Design, rounded

__all__ = ["Tuning", "as_key", "next_trials"]

_FINALISTS = 3

Chosen = Mapping[str, float]


@dataclass
class Tuning:
    """What has been tried of a contender.

    Args:
        contender: The contender.
        tried: Settings in the order in which they were asked for.
        costs: Their costs, as far as they are known.
        finals: Of the best settings, the mean costs over all tuning seeds.
        edge: ``"lower"`` or ``"upper"`` where the best rate lay on the edge of the range when the bound was reached.
        dropped: Why the contender is out, if it is.
    """

    contender: Contender
    tried: list[dict[str, float]] = field(default_factory=list)
    costs: dict[tuple[tuple[str, float], ...], float] = field(default_factory=dict)
    finals: dict[tuple[tuple[str, float], ...], float] = field(default_factory=dict)
    edge: str = ""
    dropped: str = ""

    def cost(self, chosen: Chosen) -> float | None:
        return self.costs.get(as_key(chosen))

    @property
    def finished(self) -> list[tuple[dict[str, float], float]]:
        """Settings and costs, by learning rate."""
        known = [(chosen, self.costs[as_key(chosen)]) for chosen in self.tried if as_key(chosen) in self.costs]
        return sorted(known, key=lambda pair: pair[0]["lr"])

    @property
    def best(self) -> dict[str, float] | None:
        """The setting with the lowest cost, ``None`` if all diverged."""
        finalists = [(dict(key), cost) for key, cost in self.finals.items()]
        finite = [pair for pair in finalists or self.finished if math.isfinite(pair[1])]
        return min(finite, key=lambda pair: pair[1])[0] if finite else None

    @property
    def finalists(self) -> list[dict[str, float]]:
        """The best settings, which are tried on further seeds: on one seed, a setting may be best by luck."""
        finite = sorted((pair for pair in self.finished if math.isfinite(pair[1])), key=lambda pair: pair[1])
        return [chosen for chosen, _ in finite[:_FINALISTS]]


def as_key(chosen: Chosen) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(chosen.items()))


def next_trials(design: Design, tunings: Sequence[Tuning]) -> list[tuple[Tuning, dict[str, float]]]:
    """Settings to try next, in rounds: what the next round is depends on all results of the one before.

    Each is added to the ``tried`` of its contender.
    """
    active = [tuning for tuning in tunings if not tuning.dropped]
    propose = _propose_grid if design.search == "grid" else _propose_tpe
    while True:
        pending = [(t, chosen) for t in active for chosen in t.tried if t.cost(chosen) is None]
        if pending:
            return pending
        for tuning in active:
            tuning.tried += propose(design, tuning)
        if all(t.cost(chosen) is not None for t in active for chosen in t.tried):  # Nobody asks for more on their own.
            longest = max((len(t.tried) for t in active), default=0)
            for tuning in active:
                if len(tuning.tried) < longest:
                    tuning.tried += _more(design, tuning, longest - len(tuning.tried))
            if all(t.cost(chosen) is not None for t in active for chosen in t.tried):
                return []


# --- grid -------------------------------------------------------------------------------------------------------------


def _propose_grid(design: Design, tuning: Tuning) -> list[dict[str, float]]:
    if not tuning.tried:
        return [{"lr": rate} for rate in design.first_rates(tuning.contender)]
    side = _side(tuning)
    tuning.edge = side if len(tuning.tried) >= design.most_trials else ""
    if not side or tuning.edge:
        return []
    rates = [chosen["lr"] for chosen in tuning.tried]
    factor = design.rates.factor if design.rates else design.factor
    end, factor = (min(rates), 1 / factor) if side == "lower" else (max(rates), factor)
    # Two at a time: the second costs no waiting where there are two jobs, and the number must not depend on that.
    count = min(2, design.most_trials - len(tuning.tried))
    return [{"lr": rounded(end * factor ** (i + 1))} for i in range(count)]


def _side(tuning: Tuning) -> str:
    """On which edge of the range the best rate lies."""
    finished = tuning.finished
    if tuning.best is None:
        return "lower"
    if tuning.best["lr"] == finished[-1][0]["lr"]:
        return "upper"
    return "lower" if tuning.best["lr"] == finished[0][0]["lr"] else ""


def _more(design: Design, tuning: Tuning, count: int) -> list[dict[str, float]]:
    """Rates between the best one and its neighbours; for TPE further trials in the range that there is."""
    if design.search == "tpe":
        return _ask(design, tuning, min(count, _BATCH))
    finished = tuning.finished
    if tuning.best is None:
        return [{"lr": rounded(finished[0][0]["lr"] / design.factor ** (i + 1))} for i in range(count)]
    rates = [chosen["lr"] for chosen, _ in finished]
    i = rates.index(tuning.best["lr"])
    near = [j for j in (i - 1, i + 1) if 0 <= j < len(rates)]
    near.sort(key=lambda j: finished[j][1])  # The better side first.
    middles = [rounded(math.sqrt(rates[i] * rates[j])) for j in near]
    fresh = [{"lr": rate} for rate in middles if rate not in rates][:count]
    # Where rates are so near that three digits do not tell them apart, the grid is widened instead.
    return fresh or [{"lr": rounded(rates[0] / design.factor)}]


# --- TPE --------------------------------------------------------------------------------------------------------------

_BATCH = 2


def _propose_tpe(design: Design, tuning: Tuning) -> list[dict[str, float]]:
    if len(tuning.tried) < design.trials:
        return _ask(design, tuning, min(_BATCH, design.trials - len(tuning.tried)))
    low, high = _range(design, tuning)
    best = tuning.best
    side = "lower" if best is None or best["lr"] < low * design.factor else ""
    side = "upper" if best is not None and best["lr"] > high / design.factor else side
    tuning.edge = side if len(tuning.tried) >= design.most_trials else ""
    if not side or tuning.edge:
        return []
    rates = [chosen["lr"] for chosen in tuning.tried]
    beyond = min(rates) / design.factor if side == "lower" else max(rates) * design.factor
    others = {key: value for key, value in (best or tuning.tried[-1]).items() if key != "lr"}
    return [{"lr": rounded(beyond), **others}]


def _range(design: Design, tuning: Tuning) -> tuple[float, float]:
    rates = design.first_rates(tuning.contender)
    tried = [chosen["lr"] for chosen in tuning.tried]
    return min([rates[0], *tried]), max([rates[-1], *tried])


def _ask(design: Design, tuning: Tuning, count: int) -> list[dict[str, float]]:
    """What Optuna's sampler asks for, given all results so far."""
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.samplers import TPESampler
    from optuna.trial import create_trial

    spaces = {"lr": FloatDistribution(*_range(design, tuning), log=True)}
    for name, (low, high) in design.also.items():
        if name in tuning.contender.searchable:
            spaces[name] = FloatDistribution(low, high, log=True)
    # The seed counts the trials, so that a study that goes on asks for the same.
    sampler = TPESampler(seed=len(tuning.tried), n_startup_trials=max(design.trials // 2, 3), multivariate=True)
    study = optuna.create_study(sampler=sampler)
    for chosen, cost in ((c, tuning.cost(c)) for c in tuning.tried):
        if cost is not None and math.isfinite(cost):
            study.add_trial(create_trial(params=dict(chosen), distributions=dict(spaces), value=cost))
    asked: list[dict[str, Any]] = [{**study.ask(dict(spaces)).params} for _ in range(count)]
    if not tuning.tried:  # One that the declaration recommends.
        asked[0]["lr"] = tuning.contender.start
        low, high = spaces["lr"].low, spaces["lr"].high
        asked[0]["lr"] = min(max(asked[0]["lr"], low), high)
    return [{name: rounded(value) for name, value in chosen.items()} for chosen in asked]
