"""The report of a comparison: a page, Markdown, JSON, CSV, and a folder for TensorBoard."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..page import Page, series_style
from .result import COLUMNS, Comparison, Standing, number

__all__ = ["overview", "page", "write"]


def write(comparison: Comparison, folder: Path) -> Path:
    """Write every form of the report; the HTML page is returned."""
    made = page(comparison)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(comparison.to_json())
    (folder / "runs.csv").write_text(comparison.to_csv())
    made.write_markdown(folder / "report.md")
    _tensorboard(comparison, folder / "tensorboard")
    return made.write_html(folder / "report.html")


# --- page -------------------------------------------------------------------------------------------------------------


def page(comparison: Comparison) -> Page:
    """The report as a page."""
    c = comparison
    design = c.design
    names = [s.name for s in c.standings[1:]]
    made = Page(
        f"{', '.join(names)} against {c.baseline.name} on {c.task}",
        f"{c.metric}, {'lower' if design.mode == 'min' else 'higher'} is better. {c.noise}",
    )
    made.heading("Verdict")
    made.table(COLUMNS, c.rows())
    made.text(
        f"Final values are means over {design.seeds} seeds that were not used for tuning. Differences are over pairs "
        "of runs with the same initial weights and order of data; their intervals hold for all of them together at "
        f"{design.level:.0%}, and include that the best setting was chosen from noisy runs."
    )
    for remark in c.remarks:
        made.text(remark)
    made.figure(overview(c), f"Left: {c.metric} of all learning rates. Right: course of the best ones, with all seeds.")

    made.heading("Speed, time and memory")
    columns = ["optimizer", "speed-up in steps", "time to it", "ms per step", "optimizer state", "peak memory"]
    made.table([*columns, "good learning rates", "diverged"], [_cost(c, s) for s in c.standings])
    made.text(
        f"Speed-up: steps of the baseline over the steps after which its final {c.metric} is reached, median of the "
        "pairs. Time: seconds until then, over those of the baseline. Schedules are as long as the run, so a run that "
        "gets there early does so before its learning rate has come down. Good learning rates lose at most 5 % of the "
        "baseline's best value, or twice the noise, against the best one of the optimizer."
    )

    made.heading("What the optimizers do")
    rows = _diagnostics(c)
    if rows:
        made.table(["median of the second half", *(s.name for s in c.standings)], [row for _, row in rows])
        for sentence in [sentence for sentence, _ in rows if sentence][:8]:
            made.text(sentence)
    for standing in c.standings:
        if findings := _findings(c, standing):
            made.text(f"**{standing.name}**: {' '.join(findings)}")

    made.heading("What was tried")
    made.text(
        f"Every optimizer had {max((len(s.tried) for s in c.standings), default=0)} trials on the same seed, "
        f"{_SEARCHES[design.search]}, further trials around the best one where others needed an extension. The "
        f"best three of each were tried on {design.tuning_seeds - 1} further seeds, and the best mean was taken."
    )
    made.table(
        ["optimizer", "weight decay", "other arguments", "tried (lr: value)"],
        [
            [
                s.name,
                s.decay,
                ", ".join(f"{k}={v}" for k, v in s.args.items() if k not in (*s.chosen, "weight_decay")),
                "; ".join(f"{_setting(chosen)}: {_value(c, cost)}" for chosen, cost in s.tried),
            ]
            for s in c.standings
        ],
    )

    made.heading("How to repeat it", folded=True)
    made.code(c.command or "compare(...) from Python")
    made.text("The best setting of each, as options of `lightning-optim fit`:")
    made.code("\n".join(_options(s) for s in c.standings if s.args))
    made.heading("Settings of the task", folded=True)
    made.code(_settings(c.settings))
    made.heading("All runs", folded=True)
    made.table(
        ["run", "phase", c.metric, "status", "seconds"],
        [
            [
                f"{run.contender}, {_setting(_searched(c, run.contender, run.args))}, seed {run.seed}",
                run.phase,
                "none" if outcome["score"] is None else number(outcome["score"]),
                outcome["status"] + (f": {outcome['message']}" if "message" in outcome else ""),
                f"{outcome['seconds']:.1f}",
            ]
            for run, outcome in c.runs
        ],
    )
    return made


_SEARCHES = {"grid": "a grid of learning rates that is extended while the best lies on its edge", "tpe": "by TPE"}


def _setting(chosen: Mapping[str, float]) -> str:
    first, *others = chosen.items()
    return ", ".join(
        [f"{first[1]:g}" if first[0] == "lr" else f"{first[0]}={first[1]:g}", *(f"{k}={v:g}" for k, v in others)]
    )


def _searched(c: Comparison, name: str, args: Mapping[str, Any]) -> dict[str, float]:
    return {"lr": args["lr"], **{key: args[key] for key in c.design.also if key in args}}


def _value(c: Comparison, cost: float) -> str:
    return "diverged" if math.isinf(cost) else number(cost if c.design.mode == "min" else -cost)


def _cost(c: Comparison, s: Standing) -> list[str]:
    base = s is c.baseline
    low, high, is_open = s.basin or (math.nan, math.nan, False)
    width = f"x{high / low:.2g} ({low:.2g} to {high:.2g}{' or more' if is_open else ''})" if s.basin else "none"
    return [
        s.name,
        "1" if base else "not reached" if s.speedup is None else f"{s.speedup:.2f}",
        "1" if base else "not reached" if s.time is None else f"{s.time:.2f}",
        number(s.step_ms),
        _size(s.state_bytes),
        _size(s.peak_bytes),
        width,
        f"{s.diverged} of {s.runs}",
    ]


def _size(size: float) -> str:
    """
    >>> _size(1234), _size(5_000_000)
    ('1.2 kB', '5.0 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"


def _options(s: Standing) -> str:
    return " ".join([f"--optimizer {s.name.partition(':')[0]}", *(f"--optimizer.{k} {v}" for k, v in s.args.items())])


def _settings(settings: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(settings), sort_keys=False).rstrip()


# --- diagnostics ------------------------------------------------------------------------------------------------------


def _outcomes(c: Comparison, name: str) -> list[Mapping[str, Any]]:
    return [
        outcome
        for run, outcome in c.runs
        if run.contender == name and run.phase == "reporting" and outcome["status"] == "ok"
    ]


def _typical(outcome: Mapping[str, Any], tag: str) -> float | None:
    values = outcome["diagnostics"].get(tag, {}).get("values", [])
    return median(values[len(values) // 2 :]) if values else None


def _diagnostics(c: Comparison) -> list[tuple[str, list[str]]]:
    """For each diagnostic, what is remarkable about it, and its row of the table; the most different first."""
    tags: dict[str, None] = {}
    for standing in c.standings:
        for outcome in _outcomes(c, standing.name):
            tags |= dict.fromkeys(tag for tag in outcome["diagnostics"] if not tag.startswith("diagnostics/"))
    found = []
    for tag in tags:
        values = {}
        for s in c.standings:
            typical = [x for outcome in _outcomes(c, s.name) if (x := _typical(outcome, tag)) is not None]
            values[s.name] = typical
        row = [tag, *(f"{median(values[s.name]):.3g}" if values[s.name] else "" for s in c.standings)]
        sentence, size = "", 0.0
        base = values[c.baseline.name]
        for s in c.standings[1:]:
            mine = values[s.name]
            if len(mine) < 2 or len(base) < 2 or min(*mine, *base) <= 0:
                continue
            ratio = median(mine) / median(base)
            apart = min(mine) > max(base) or max(mine) < min(base)
            if apart and abs(math.log(ratio)) > max(math.log(2), size):
                size = abs(math.log(ratio))
                times = f"{ratio:.3g} times" if ratio > 1 else f"1/{1 / ratio:.3g} of"
                sentence = f"`{tag}`: {s.name} has {times} the value of {c.baseline.name}, in every seed."
        found.append((size, sentence, row))
    found.sort(key=lambda item: -item[0])
    return [(sentence, row) for _, sentence, row in found]


def _findings(c: Comparison, s: Standing) -> list[str]:
    """What `lightning-optim diagnostics` would say of most runs of a contender."""
    outcomes = _outcomes(c, s.name)
    every = [meaning for outcome in outcomes for meaning in outcome["findings"]]
    return [meaning for meaning in dict.fromkeys(every) if every.count(meaning) > len(outcomes) / 2]


# --- figures ----------------------------------------------------------------------------------------------------------


def overview(c: Comparison) -> Any:
    """The metric against the learning rate, and the course of the best rates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    sign = 1 if c.design.mode == "min" else -1
    for i, s in enumerate(c.standings):
        style = series_style(i)
        finite = [(chosen["lr"], sign * cost) for chosen, cost in s.tried if math.isfinite(cost)]
        left.plot([lr for lr, _ in finite], [y for _, y in finite], markersize=4, label=s.name, **style)
        seeds = [y for y in s.scores if y is not None]
        left.plot([s.chosen.get("lr")] * len(seeds), seeds, "_", color=style["color"], markersize=12)
        lost = [chosen["lr"] for chosen, cost in s.tried if math.isinf(cost)]
        for lr in lost:
            left.plot([lr], [1.0], "x", color=style["color"], transform=left.get_xaxis_transform(), clip_on=False)
        _band(right, [outcome["curve"] for outcome in _outcomes(c, s.name)], style)
    left.set(xscale="log", xlabel="learning rate (bars: reporting seeds, x: diverged)", ylabel=c.metric)
    right.set(xlabel="step", ylabel=c.metric)
    for axes in (left, right):
        values = np.concatenate([line.get_ydata() for line in axes.lines if len(line.get_ydata())] or [np.array([1.0])])
        values = values[np.isfinite(values.astype(float))]
        if len(values) and values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    if c.standings:
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=min(len(c.standings), 6))
    return figure


def _band(axes: Any, curves: Sequence[Mapping[str, Sequence[float]]], style: Mapping[str, Any]) -> None:
    """Mean and range of curves over the steps that they share."""
    curves = [curve for curve in curves if curve["steps"]]
    if not curves:
        return
    steps = np.array(max((curve["steps"] for curve in curves), key=len))
    ys = np.array([np.interp(steps, curve["steps"], curve["values"]) for curve in curves])
    axes.plot(steps, ys.mean(0), color=style["color"], linestyle=style["linestyle"])
    axes.fill_between(steps, ys.min(0), ys.max(0), color=style["color"], alpha=0.15, linewidth=0)


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def _tensorboard(c: Comparison, folder: Path) -> None:
    """A run of TensorBoard for each run, named by what differs, with its settings and final values as HPARAMS."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    shutil.rmtree(folder, ignore_errors=True)
    for run, outcome in c.runs:
        if outcome["status"] == "failed":
            continue
        place = folder / run.contender.replace("/", "_") / f"lr={run.args['lr']:g},seed={run.seed},{run.phase}"
        extra = [f"{name}={run.args[name]:g}" for name in c.design.also if name in run.args]
        place = place.with_name(",".join([place.name, *extra]))
        with SummaryWriter(str(place), flush_secs=600) as writer:
            series = {c.metric: outcome["curve"], "train/loss": outcome["train"], **outcome["diagnostics"]}
            for tag, curve in series.items():
                for step, value in zip(curve["steps"], curve["values"]):
                    writer.add_scalar(tag, value, step)
            settings = {"optimizer": run.contender, "seed": run.seed, "phase": run.phase, **run.args}
            plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()}
            final = {f"final/{name}": value for name, value in outcome["metrics"].items()}
            if outcome["score"] is not None:
                final[f"final/{c.metric}"] = outcome["score"]
            for summary in hparams(plain, final):
                writer._get_file_writer().add_summary(summary)
            for name, value in final.items():
                writer.add_scalar(name, value, outcome["steps"])
