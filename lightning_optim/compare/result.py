"""The result of a comparison, in numbers and words."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .design import Design, Run
from .search import Tuning
from .statistics import Difference, basin, difference, pairs_needed, spread, steps_until, tuning_noise

__all__ = ["Comparison", "Standing"]


@dataclass(frozen=True)
class Standing:
    """What is reported of one contender.

    Args:
        name: The contender.
        chosen: Its best setting.
        args: All its arguments there.
        decay: How its weight decay acts.
        edge: On which edge of the range its best rate stayed when the bound of trials was reached, if it did.
        dropped: Why it is out, if it is.
        tried: Every setting that was tried, and its cost.
        scores: Final values of the metric by reporting seed; ``None`` for a run that diverged.
        difference: To the baseline; ``None`` for the baseline itself.
        words: The verdict.
        basin: Lowest and highest rate that are nearly as good as the best, and whether the range goes on.
        speedup: Steps of the baseline over steps until its final value; median of the pairs, ``None`` if not reached.
        time: Seconds until the baseline's final value over the baseline's seconds.
        step_ms: Time of a step, median of the runs.
        state_bytes: Size of the optimizer's state.
        peak_bytes: Most memory used.
        diverged: How many of all its runs diverged.
        runs: How many runs it had.
    """

    name: str
    chosen: Mapping[str, float]
    args: Mapping[str, Any]
    decay: str
    edge: str
    dropped: str
    tried: Sequence[tuple[Mapping[str, float], float]]
    scores: Sequence[float | None]
    difference: Difference | None
    words: str
    basin: tuple[float, float, bool] | None
    speedup: float | None
    time: float | None
    step_ms: float
    state_bytes: int
    peak_bytes: int
    diverged: int
    runs: int

    @property
    def mean(self) -> float:
        """Mean of the final values of the runs that did not diverge."""
        finite = [score for score in self.scores if score is not None]
        return sum(finite) / len(finite) if finite else math.nan


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Args:
        task: Name of what was trained.
        metric: What was compared.
        design: On which terms.
        standings: The contenders, the baseline first.
        runs: Every run and its result.
        settings: The task's settings.
        code: Fingerprint of the task and of the code.
        command: The command line that was used.
        remarks: What a reader should know of the runs.
    """

    task: str
    metric: str
    design: Design
    standings: tuple[Standing, ...]
    runs: tuple[tuple[Run, Mapping[str, Any]], ...]
    settings: Mapping[str, Any]
    code: str
    command: str
    remarks: tuple[str, ...]

    @classmethod
    def of(
        cls,
        task: str,
        design: Design,
        tunings: Sequence[Tuning],
        runs: Sequence[tuple[Run, Mapping[str, Any]]],
        settings: Mapping[str, Any],
        code: str = "",
        command: str = "",
    ) -> Comparison:
        """Draw the conclusions from runs."""
        reported = {
            t.contender.name: [
                outcome
                for run, outcome in sorted(runs, key=lambda pair: pair[0].seed)
                if run.phase == "reporting" and run.contender == t.contender.name
            ]
            for t in tunings
        }
        base = reported[design.baseline.name]
        metric = next((outcome["metric"] for outcome in base if "metric" in outcome), design.metric or "loss")
        standings = [_standing(design, tuning, tunings[0], reported, runs, metric) for tuning in tunings]
        remarks = _remarks(design, tunings, runs, standings)
        return cls(task, metric, design, tuple(standings), tuple(runs), dict(settings), code, command, tuple(remarks))

    @property
    def baseline(self) -> Standing:
        return self.standings[0]

    @property
    def noise(self) -> str:
        """In words, how much the baseline differs between seeds."""
        costs = [self.design.cost(score) for score in self.baseline.scores]
        if len(costs) < 2:
            return "One reporting seed: there is no measure of the noise between seeds, and so no verdict."
        value = spread(costs)
        mean = self.baseline.mean
        return (
            f"Noise: between {len(costs)} seeds, {self.baseline.name} ends at {self.metric} {number(mean)} with a "
            f"standard deviation of {number(value)}" + (f" ({value / abs(mean):.1%})." if mean else ".")
        )

    def standing(self, name: str) -> Standing:
        """What is reported of a contender.

        Raises:
            KeyError: There is none of this name.
        """
        for standing in self.standings:
            if standing.name == name:
                return standing
        raise KeyError(f"There is no contender {name!r}. Known: {', '.join(s.name for s in self.standings)}.")

    def apply(self, module: Any, name: str) -> None:
        """Make a LightningModule train with the best setting of a contender.

        The rates of its parameter groups keep their ratios, and its schedule its course.

        Args:
            module: The module.
            name: The contender.

        Raises:
            KeyError: There is none of this name.
            ValueError: It has no best setting: it failed, or diverged with every rate.
        """
        from .task import set_optimizer

        standing = self.standing(name)
        if not standing.args:
            raise ValueError(f"{name} has no setting to train with: {standing.words}.")
        optimizer = next(c.optimizer for c in self.design.contenders if c.name == name)
        set_optimizer(module, optimizer, standing.args)

    # --- forms --------------------------------------------------------------------------------------------------------

    def rows(self) -> list[list[str]]:
        """The table of verdicts; :data:`COLUMNS` names its columns."""
        rows = []
        for s in self.standings:
            d = s.difference
            shown = f"{d.mean:+.2g} +- {d.half_width:.2g}" if d and math.isfinite(d.half_width) else ""
            settings = ", ".join(f"{name} {value:g}" for name, value in s.chosen.items())
            rows.append([s.name, settings, number(s.mean), shown, s.words])
        return rows

    def table(self) -> str:
        """The verdicts as a table of text."""
        rows = [list(COLUMNS), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([self.noise, "", *lines])

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows())
        return f"<p>{html.escape(self.noise)}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def plot(self) -> Any:
        """The metric against the learning rate, and the curves of the best rates, as a ``matplotlib`` figure."""
        from .report import overview

        return overview(self)

    def records(self) -> list[dict[str, Any]]:
        """Every run as a flat dictionary."""
        records = []
        for run, outcome in self.runs:
            settings = {f"args/{name}": value for name, value in run.args.items()}
            plain = {k: v for k, v in outcome.items() if isinstance(v, (int, float, str)) or v is None}
            row = {"contender": run.contender, "phase": run.phase, "seed": run.seed, "lr": run.args["lr"]}
            metrics = {f"metric/{name}": value for name, value in outcome.get("metrics", {}).items()}
            records.append({**row, **plain, **metrics, **settings})
        return records

    def to_frame(self) -> Any:
        """Every run as a row of a ``pandas.DataFrame``.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(self.records())

    def to_csv(self) -> str:
        """Every run as a line."""
        records = self.records()
        columns = list(dict.fromkeys(name for record in records for name in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue()

    def to_json(self) -> str:
        """All of it. Infinity and what is not a number become ``null``."""
        whole = {
            "task": self.task,
            "metric": self.metric,
            "noise": self.noise,
            "design": asdict(self.design),
            "standings": [asdict(s) for s in self.standings],
            "remarks": self.remarks,
            "settings": self.settings,
            "code": self.code,
            "command": self.command,
            "runs": [{**asdict(run), "result": outcome} for run, outcome in self.runs],
        }
        return json.dumps(_plain(whole), indent=1) + "\n"

    def write(self, folder: str | Path) -> Path:
        """Write the report in every form into a folder.

        Returns:
            The HTML page. Beside it lie ``report.md``, ``study.json``, ``runs.csv`` and the folder ``tensorboard``.
        """
        from .report import write

        return write(self, Path(folder))


COLUMNS = ("optimizer", "best setting", "final value", "difference", "verdict")


# --- words ------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """
    >>> number(0.123456), number(float("nan")), number(1234567.0)
    ('0.1235', 'none', '1.235e+06')
    """
    return "none" if math.isnan(value) else f"{value:.4g}"


#: More pairs than a study has.
_MANY_PAIRS = 1000


def words(d: Difference, name: str, baseline: str, design: Design) -> str:
    """A verdict as a sentence."""
    pairs = f"{d.pairs} {'pair' if d.pairs == 1 else 'pairs'}"
    if d.verdict == "equal":
        return f"the same as {baseline} ({pairs})"
    if d.verdict == "diverged":
        counts = [(name, d.diverged), (baseline, d.diverged_baseline)]
        lost = " and ".join(f"{who} diverged in {n} of {design.seeds} runs" for who, n in counts if n)
        return f"no verdict: {lost}"
    if d.verdict in ("better", "worse"):
        return f"{d.verdict} than {baseline} by {abs(d.mean):.2g} +- {d.half_width:.2g} ({pairs})"
    comparisons = len(design.contenders) - 1
    needed = pairs_needed(d.mean, d.deviation, comparisons, d.tuning, design.level)
    if needed is None or needed > _MANY_PAIRS:
        certain = pairs_needed(d.mean, d.deviation, comparisons, 0.0, design.level)
        hint = "if there is a difference, it is too small for more seeds to show"
        if certain is not None and certain <= _MANY_PAIRS:
            hint = "which learning rate is best is too uncertain: more tuning seeds would be needed"
    elif needed <= d.pairs:
        hint = "a few more would show whether there is a difference as large as this one"
    else:
        hint = f"about {needed} would be needed"
    return f"not distinguishable from {baseline} at {d.pairs} seeds; {hint}"


def _standing(
    design: Design,
    tuning: Tuning,
    base: Tuning,
    reported: Mapping[str, Sequence[Mapping[str, Any]]],
    runs: Sequence[tuple[Run, Mapping[str, Any]]],
    metric: str,
) -> Standing:
    name = tuning.contender.name
    mine, theirs = reported[name], reported[base.contender.name]
    costs, base_costs = ([design.cost(outcome["score"]) for outcome in x] for x in (mine, theirs))
    every = [outcome for run, outcome in runs if run.contender == name]
    found: Difference | None = None
    verdict = "the baseline" if tuning is base else ""
    failed = next((outcome["message"] for outcome in mine if outcome["status"] == "failed"), "")
    dropped = tuning.dropped or failed or ("" if tuning.best else "it diverged with every rate that was tried")
    if dropped:
        verdict = f"out: {dropped}"
    elif tuning is not base and len(costs) < 2:
        verdict = "no verdict from one seed"
    elif tuning is not base:
        noise = spread([a - b for a, b in zip(costs, base_costs) if math.isfinite(a + b)]) / math.sqrt(2)
        tau = math.hypot(*(_noise_of(t, noise / math.sqrt(design.tuning_seeds)) for t in (tuning, base)))
        found = difference(costs, base_costs, len(design.contenders) - 1, tau, design.level)
        verdict = words(found, name, base.contender.name, design)
    if tuning.edge and not dropped:
        verdict += f"; its best rate is still on the {tuning.edge} edge"
    width = None
    if not dropped and design.search == "grid":
        width = basin({c["lr"]: cost for c, cost in tuning.finished}, _tolerance(base, base_costs))
    speedup, time = (None, None) if dropped else _speed(design, mine, theirs)
    fine = [outcome for outcome in mine if outcome["status"] == "ok"]
    best = tuning.best or {}
    return Standing(
        name=name,
        chosen=best,
        args=tuning.contender.arguments(best) if best else {},
        decay=tuning.contender.decay,
        edge=tuning.edge,
        dropped=dropped,
        tried=tuning.finished,
        scores=[outcome["score"] for outcome in mine],
        difference=found,
        words=verdict,
        basin=width,
        speedup=speedup,
        time=time,
        step_ms=median([x["step_ms"] for x in fine]) if fine else math.nan,
        state_bytes=max((x["state_bytes"] for x in fine), default=0),
        peak_bytes=max((x["peak_bytes"] for x in fine), default=0),
        diverged=sum(outcome["status"] == "diverged" for outcome in every),
        runs=len(every),
    )


def _noise_of(tuning: Tuning, noise: float) -> float:
    return tuning_noise([*tuning.finals.values()] or [cost for _, cost in tuning.finished], noise)


def _tolerance(base: Tuning, costs: Sequence[float]) -> float:
    """What counts as nearly as good: 5 % of the baseline's best, or twice the noise between seeds."""
    best = min(cost for _, cost in base.finished)
    noise = spread(costs)
    return max(0.05 * abs(best), 2 * noise if math.isfinite(noise) else 0.0)


def _speed(
    design: Design, mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> tuple[float | None, float | None]:
    """How much sooner than the baseline its final value is reached: in steps, and the time it takes over its time."""
    speedups, times = [], []
    for own, base in zip(mine, theirs):
        if own["status"] != "ok" or base["status"] != "ok":
            continue
        curve = own["curve"]
        step = steps_until(design.cost(base["score"]), curve["steps"], [design.cost(x) for x in curve["values"]])
        speedups.append(base["steps"] / step if step else 0.0)
        times.append(step * own["step_ms"] / (base["steps"] * base["step_ms"]) if step else math.inf)
    if not speedups:
        return None, None
    speedup, time = median(speedups), median(times)
    return speedup or None, time if math.isfinite(time) else None


def _remarks(
    design: Design,
    tunings: Sequence[Tuning],
    runs: Sequence[tuple[Run, Mapping[str, Any]]],
    standings: Sequence[Standing],
) -> list[str]:
    remarks = []
    for tuning, standing in zip(tunings, standings):
        if tuning.edge and not standing.dropped:
            remarks.append(
                f"{tuning.contender.name}: the best learning rate, {standing.chosen['lr']:g}, lies on the "
                f"{tuning.edge} edge of what was tried, and the search stopped at its bound of {design.most_trials} "
                "trials: a better one may lie beyond."
            )
    pairs: dict[int, set[tuple[str, str]]] = {}
    for run, outcome in runs:
        if outcome.get("status") == "ok":
            pairs.setdefault(run.seed, set()).add((outcome["weights"], outcome["data"]))
    if odd := [seed for seed, prints in pairs.items() if len(prints) > 1]:
        remarks.append(
            f"The runs of {'seed' if len(odd) == 1 else 'seeds'} {', '.join(map(str, odd))} did not have the same "
            "initial weights and order of data: an optimizer or the task draws random numbers in between. The "
            "differences hold, with more noise."
        )
    elif pairs:
        remarks.append(
            "Checked: all runs of a seed had the same initial weights and the same batches in the same order."
        )
    ends = [outcome["lr_end"] for _, outcome in runs if outcome.get("status") == "ok"]
    if ends:
        level = median(ends)
        remarks.append(
            f"At the end of a run the learning rate was {level:.0%} of its highest"
            + (": runs end before their schedule does, or have none." if level > 0.2 else ".")
        )
    points = [len(outcome["curve"]["steps"]) for _, outcome in runs if outcome.get("status") == "ok"]
    if points and median(points) < 2:
        remarks.append(
            "The metric was measured once in a run, at its end: speed-up and time say only whether the baseline's "
            "final value was reached. Validate more often (--trainer.val_check_interval) to know when."
        )
    lost = {s.name: s.diverged for s in standings if s.diverged}
    if lost:
        counts = ", ".join(f"{name} {count}" for name, count in lost.items())
        remarks.append(f"Diverged runs, which count as infinitely bad: {counts}.")
    return remarks


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
