"""Write the tables and plots of the documentation from the figures in benchmarks/results.

    python -m benchmarks.report

Replaces what stands between the markers in the pages, and the images beside them; the text around is written by hand.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from lightning_optim.diagnostics.causes import CAUSES
from lightning_optim.diagnostics.diagnosis import RULES

from .contenders import PERIODS
from .paths import FUNCTIONS
from .step_time import SHOWN, cells, left_out

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

#: Levels of the contours, and what is shown of the plane, for each function of :mod:`.paths`.
_PLANES = {
    "valley": ([2, 5, 10, 20, 30], ((-2.5, 6.0), (-2.5, 6.0))),
    "rosenbrock": ([1, 5, 20, 100, 400], ((-1.8, 1.8), (-0.8, 2.2))),
}
_OURS, _OTHERS = "#c4500c", "#8a93a3"
_SWEEPS = {"parameters": "parameters, in 16 tensors", "tensors": "tensors that hold 2^22 parameters"}

Figures = Mapping[str, Any]
Row = Mapping[str, Any]


def figures(kind: str) -> dict[str, Figures]:
    """The contents of all result files of a kind, by the names of the files."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{kind}*.json"))}


def page(name: str, text: str) -> str:
    """A page with the parts between its markers replaced.

    Args:
        name: Its name in :data:`PAGES`.
        text: Its text so far.

    Raises:
        ValueError: The text lacks a marker.
    """
    for marker, part in PAGES[name].items():
        marked = re.search(f"(?<=<!-- {marker} -->\n).*?(?=<!-- /{marker} -->)", text, re.DOTALL)
        if not marked:
            raise ValueError(f"{name} has no part <!-- {marker} --> ... <!-- /{marker} -->.")
        text = f"{text[: marked.start()]}{part()}\n{text[marked.end() :]}"
    return text


def images() -> Iterator[str]:
    """Names of the images that the pages show."""
    for name in figures("step-time"):
        yield f"{name}.png"
    for name in (*figures("scaling"), *figures("claims"), *(f"paths-{name}" for name in FUNCTIONS)):
        yield f"{name}.png"
    for name, content in figures("growth").items():
        yield from (f"{name}-{sweep}.png" for sweep, _ in _by(content["rows"], "sweep"))


# --- tables ---------------------------------------------------------------------------------------------------------


def _machine(machine: Row) -> str:
    packages = ", ".join(
        f"{name} {found}" for name, found in {"torch": machine["torch"], **machine["packages"]}.items() if found
    )
    bandwidth, products = machine["bandwidth_gb_per_s"], machine["matmul_gflop_per_s"]
    return (
        f"{machine['accelerator'] or machine['processor']}, {machine['threads']} of {machine['cores']} cores "
        f"({machine['capability']}), load average {machine['load_average']} at the start; "
        f"{packages}. Measured: {bandwidth['best']:.3g} GB/s, matrix products "
        f"{products['float32']:.3g} GFLOP/s in float32, {products['bfloat16']:.3g} in bfloat16."
    )


def _step_time(name: str, content: Figures) -> str:
    parts = [
        f"### {name}",
        _machine(content["machine"]),
        f"![Time of a step over that of fused AdamW](images/{name}.png)",
        *_models(content),
    ]
    return "\n\n".join(parts)


def _models(content: Figures) -> Iterator[str]:
    for model, rows in _by(content["rows"], "model"):
        size = f"{rows[0]['parameters'] / 1e6:.3g} million parameters in {rows[0]['tensors']} tensors"
        head = ["optimizer", "implementation", *SHOWN]
        lines = [_line(head), _line(["---"] * len(head)), *(_line(cells(row)) for row in rows if not row["note"])]
        notes = "".join(f"\n- {note}" for note in left_out(rows))
        yield f"**{model}** ({size})\n\n" + "\n".join(lines) + ("\n" + notes if notes else "")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _growth(name: str, content: Figures) -> str:
    parts = [_machine(content["machine"])]
    for sweep, rows in _by(content["rows"], "sweep"):
        at = sorted({row[sweep] for row in rows})
        lines = [_line(["median ms at", *(f"{x:.3g}" for x in at)]), _line(["---"] * (len(at) + 1))]
        for label, points in _lines(rows, sweep).items():
            lines.append(_line([label, *(f"{points[x]:.3g}" if x in points else "" for x in at)]))
        image = f"![Time of a step against the number of {sweep}](images/{name}-{sweep}.png)"
        parts.append(f"{image}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _lines(rows: Sequence[Row], sweep: str) -> dict[str, dict[int, float]]:
    """For each optimizer, milliseconds by size."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        label = f"{row['optimizer']} ({row['implementation']})"
        lines.setdefault(label, {})[row[sweep]] = row["median_ms"]
    return lines


def _by(rows: Sequence[Row], key: str) -> list[tuple[str, list[Row]]]:
    return [(value, list(group)) for value, group in groupby(rows, lambda row: row[key])]


def _step_times() -> str:
    return "\n\n".join(_step_time(name, content) for name, content in figures("step-time").items())


def _rounding_times() -> str:
    return "\n\n".join(
        part
        for content in figures("rounding-time").values()
        for part in (_machine(content["machine"]), *_models(content))
    )


#: Rows of the table of distances.
_ROUNDINGS = {
    "nearest": '`"nearest"`',
    "independent": '`"stochastic"`, were its numbers independent',
    "stochastic": '`"stochastic"`',
    "kahan": '`"kahan"`',
    "split": '`"split"`',
    "floor": "float32, rounded once for the distances",
}


def _roundings() -> str:
    content = figures("rounding")["rounding"]
    experiments = list(dict.fromkeys(row["experiment"] for row in content["rows"] if row["experiment"] != "training"))
    head = ["stored by", *experiments, "a training of its own", "its validation loss"]
    lines = [_line(head), _line(["---"] * len(head))]
    for way, label in _ROUNDINGS.items():
        rows = [row for row in content["rows"] if row["way"] == way]
        cells = [_distance([row for row in rows if row["experiment"] == x]) for x in experiments]
        own = [row for row in rows if row["experiment"] == "training"]
        losses = [row["loss"] for row in own]
        loss = f"{statistics.mean(losses):.4f} ({min(losses):.4f}-{max(losses):.4f})"
        lines.append(_line([label, *cells, _distance(own), loss]))
    return "\n".join(lines)


def _distance(rows: Sequence[Row]) -> str:
    return f"{statistics.mean(row['distance'] for row in rows):.2g}"


def _state_dtypes() -> str:
    content = figures("state-dtype").get("state-dtype")
    if content is None:
        return "That table is not made yet."
    kinds = list(dict.fromkeys(row["state_dtype"] for row in content["rows"]))
    head = ["optimizer", "`state_dtype`", "state B/parameter", "seeds", "loss", "difference"]
    lines = [_line(head), _line(["---"] * len(head))]
    for name, rows in _by(sorted(content["rows"], key=lambda row: row["optimizer"]), "optimizer"):
        losses = {kind: {row["seed"]: row["loss"] for row in rows if row["state_dtype"] == kind} for kind in kinds}
        exact = losses["float32"]
        for kind in kinds:
            found = losses[kind]
            gaps = [found[seed] - exact[seed] for seed in found if seed in exact]
            gap = f"{statistics.mean(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f})"
            size = statistics.mean(row["bytes_per_parameter"] for row in rows if row["state_dtype"] == kind)
            loss = f"{statistics.mean(found.values()):.4f} ({min(found.values()):.4f}-{max(found.values()):.4f})"
            cells = [f"{size:.2f}", str(len(found)), loss, "" if kind == "float32" else gap]
            lines.append(_line([name, f"`{kind}`", *cells]))
    return "\n".join(lines)


def _small_models() -> str:
    content = figures("small-models").get("small-models")
    if content is None:
        return "That table is not made yet."
    machine = content["machine"]
    head = ["model", "ours", "other", "ours, µs", "other, µs", "ratio", "of the fastest"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in content["rows"]:
        numbers = (f"{row['ours_us']:.0f}", f"{row['theirs_us']:.0f}", f"{row['ratio']:.2f}")
        lines.append(_line([row["model"], row["optimizer"], row["peer"], *numbers, f"{row['ratio_of_fastest']:.2f}"]))
    where = (
        f"{machine['processor']}, one thread, load average {machine['load_average']} at the start; "
        f"torch {machine['torch']}, timm {machine['packages']['timm']}."
    )
    return f"{where}\n\n" + "\n".join(lines)


#: Rows of the table of LoRA.
_FACTORS = {"neither": "neither: AdamW trains both", "B": "B", "A": "A", "both": "both, the default"}


def _lora() -> str:
    content = figures("lora")["lora"]
    rates = sorted({row["lr"] for row in content["rows"]})
    lines = [_line(["factors with Muon", *(f"lr {x:g}" for x in rates)]), _line(["---"] * (len(rates) + 1))]
    for way, label in _FACTORS.items():
        losses = [[row["loss"] for row in content["rows"] if (row["way"], row["lr"]) == (way, x)] for x in rates]
        cells = [f"{statistics.mean(x):.3f} ({min(x):.3f}-{max(x):.3f})" if x else "" for x in losses]
        lines.append(_line([label, *cells]))
    return "\n".join(lines)


def _growths() -> str:
    return "\n\n".join(_growth(name, content) for name, content in figures("growth").items())


def _causes() -> str:
    rows = [
        _line([f"`{name}`", meaning, (RULES[name].__doc__ or "").partition("\n\n")[0].replace("\n    ", " ")])
        for name, meaning in CAUSES.items()
    ]
    return "\n".join(["| cause | what it means | when it is named |", "|---|---|---|", *rows])


def _confusion() -> str:
    content = figures("diagnosis").get("diagnosis")
    if content is None:
        return "That table is not made yet."
    by_illness: dict[str, list[Row]] = {}
    for row in content["rows"]:
        by_illness.setdefault(row["illness"], []).append(row)
    lines = ["| run | should say | right | said instead |", "|---|---|---|---|"]
    for illness, rows in by_illness.items():
        expected = rows[0]["expected"] or ["healthy"]
        wrong = Counter(row["first"] for row in rows if row["first"] not in expected)
        said = ", ".join(f"{name} ({count})" for name, count in wrong.items())
        lines.append(_line([illness, " or ".join(expected), f"{len(rows) - wrong.total()} of {len(rows)}", said]))
    ill = [row for row in content["rows"] if row["expected"]]
    well = [row for row in content["rows"] if not row["expected"]]
    named = sum(row["first"] in row["expected"] for row in ill)
    alarms = sum(row["first"] != "healthy" for row in well)
    return (
        f"Of {len(ill)} ill runs, {named} ({named / len(ill):.1%}) are named right in first place; of {len(well)} "
        f"healthy ones, {alarms} ({alarms / len(well):.1%}) get anything but healthy.\n\n" + "\n".join(lines)
    )


def _overhead() -> str:
    parts = []
    for content in figures("diagnostics-overhead").values():
        machine, settings = content["machine"], content["settings"]
        pairs = sorted({row["pairs"] for row in content["rows"]})
        parts.append(
            f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, load average "
            f"{machine['load_average']}; torch {machine['torch']}; {settings['optimizer']}, "
            f"{' or '.join(map(str, pairs))} measured steps. CPU time with over CPU time without, median (quartiles)."
        )
        for model, rows in _by(content["rows"], "model"):
            intervals = sorted({row["interval"] for row in rows})
            head = [f"{model}, {rows[0]['step_ms']:.3g} ms a step", *(f"every {i}" for i in intervals)]
            lines = [_line(head), _line(["---"] * len(head))]
            for callback, measured in _by(rows, "callback"):
                shown = {r["interval"]: _ratio(r) for r in measured}
                lines.append(_line([f"`{callback}`", *(shown.get(i, "") for i in intervals)]))
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.4f} ({row['low']:.4f}-{row['high']:.4f})"


def _polar_quality() -> str:
    parts = []
    for content in figures("polar_quality").values():
        rows = content["rows"]
        steps = {row["method"]: row["steps"] for row in rows}
        spectra = list(dict.fromkeys(row["spectrum"] for row in rows))
        errors = {(row["method"], row["spectrum"], row["dtype"]): f"{row['error']:.3f}" for row in rows}
        lines = [_line(["preset", "steps", *spectra]), _line(["---"] * (len(spectra) + 2))]
        for preset, count in steps.items():
            cells = ([errors[preset, s, dtype] for dtype in ("float32", "float16", "bfloat16")] for s in spectra)
            shown = (" / ".join(cell) if len(set(cell)) > 1 else cell[0] for cell in cells)
            lines.append(_line([f"`{preset}`", str(count), *shown]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _scaling() -> str:
    parts = []
    for name, content in figures("scaling").items():
        measured = content["measured"]
        processes = sorted({row["processes"] for row in measured})
        heads = [f"{n} process{'es' * (n > 1)}" for n in processes]
        lines = [_line(["model", "optimizer", "strategy", *heads]), _line(["---"] * (len(heads) + 3))]
        alone = {(r["model"], r["optimizer"]): _milliseconds_and_bytes(r) for r in measured if r["processes"] == 1}
        several: dict[tuple[str, str, str], dict[int, str]] = {}
        for row in measured:
            if row["processes"] > 1:
                key = (row["model"], row["optimizer"], row["strategy"])
                several.setdefault(key, {})[row["processes"]] = _milliseconds_and_bytes(row)
        for key, shown in several.items():
            lines.append(_line([*key, alone.get(key[:2], ""), *(shown.get(n, "") for n in processes if n > 1)]))
        parts += [_machine(content["machine"]), "\n".join(lines)]
        assumed = ", ".join(f"{key} {value:g}" for key, value in content["cluster"].items())
        reached = content["fractions"]
        parts.append(
            f"Assumed (SI units): {assumed}. Measured here and carried over: {reached['bandwidth']:.0%} of the "
            f"memory's bandwidth, {reached['matmul']:.0%} of the rate of matrix products.\n\n"
            f"![Time of a step against the number of GPUs](images/{name}.png)"
        )
        for model, rows in _by(content["computed"], "model"):
            gpus = sorted({row["gpus"] for row in rows})
            size = f"{model} ({rows[0]['parameters'] / 1e9:.3g}e9 parameters), ms a step at"
            lines = [_line([size, *(f"{n} GPUs" for n in gpus)]), _line(["---"] * (len(gpus) + 1))]
            for strategy, points in _by(rows, "strategy"):
                at = {row["gpus"]: f"{row['total_ms']:.3g}" for row in points}
                lines.append(_line([strategy, *(at[n] for n in gpus)]))
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _milliseconds_and_bytes(row: Row) -> str:
    return f"{row['median_ms']:.3g} ms, {row['sent_bytes'] / 1e6:.2f} MB, {row['state_bytes'] / 1e6:.2f} MB"


def _gpu() -> str:
    """What ``python -m benchmarks.gpu`` found, one section for each file."""
    found = figures("gpu")
    return "\n\n".join(_sitting(name, content) for name, content in found.items()) if found else "Not measured yet."


def _sitting(name: str, content: Figures) -> str:
    about = _machine(content["machine"]) if content["machine"] else f"On {content['device']}."
    lines = ["| part | what | status | right | wrong |", "|---|---|---|---|---|"]
    wrong = []
    for part in content["parts"]:
        judged = Counter(row["ok"] for row in part["rows"])
        cells = [part["name"], part["about"], part["status"], str(judged[True]), str(judged[False])]
        lines.append(_line(cells))
        said = [(row["what"], row.get("error", "")) for row in part["rows"] if row["ok"] is False]
        wrong += [f"- {part['name']}: {what}{f' ({error[:200]})' if error else ''}" for what, error in said]
    rows = {part["name"]: part["rows"] for part in content["parts"]}
    times = [row for row in rows.get("step-times", []) if row["ok"] is None]
    qualities = rows.get("polar", [])
    sections = [f"### {name}", about, "\n".join(lines), "\n".join(wrong)]
    sections += _models({"rows": times})
    sections += [_qualities(qualities)] if qualities else []
    steps = [row for row in rows.get("training", []) if "median_ms" in row]
    if steps:
        shown = [_line([row["what"], f"{row['median_ms']:.3g}"]) for row in steps]
        sections.append("\n".join(["| a step of training at 16-mixed | median ms |", "|---|---|", *shown]))
    return "\n\n".join(section for section in sections if section)


def _qualities(rows: Sequence[Row]) -> str:
    spectra = list(rows[0]["errors"])
    head = ["iteration", "products in", "matrix", "median ms", *spectra]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        size = f"{row['m']} x {row['n']}"
        errors = (f"{row['errors'][spectrum]:.3f}" for spectrum in spectra)
        lines.append(_line([f"`{row['method']}`", row["dtype"], size, f"{row['median_ms']:.3g}", *errors]))
    return "\n".join(lines)


def _studies() -> str:
    """Which learning rates won in the studies of docs/results, and by how much."""
    parts = []
    for name, content in figures("study").items():
        task = name.removeprefix("study-")
        base = next(row for row in content["rows"] if row["name"] == "AdamW")
        head = ["optimizer", "best lr", "over AdamW's", "good lr", f"final {content['metric']}", "of AdamW's"]
        lines = [_line(head), _line(["---"] * len(head))]
        for row in sorted(content["rows"], key=_final):
            rate, low_high = row["chosen"]["lr"], "none"
            if row["basin"]:
                low, high, is_open = row["basin"]
                low_high = f"{low:.2g} to {high:.2g}{' or more' if is_open else ''}"
            shown = [f"`{row['name']}`", f"{rate:g}", f"{rate / base['chosen']['lr']:.2g}", low_high]
            lines.append(_line([*shown, f"{_final(row):.4g}", f"{_final(row) / _final(base):.3f}"]))
        parts.append(
            f"[{task}](results/{task}.md), {content['steps']} steps of {content['parameter_bytes'] // 4:,} parameters. "
            f"{content['noise']}\n\n" + "\n".join(lines)
        )
    return "\n\n".join(parts)


#: A suggested learning rate further from the tuned one than this is a miss.
_NEAR = 4.0


def _transfers() -> str:
    rows = figures("transfer")["transfer"]["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    head = ["optimizer", *(f"{task}: tuned, suggested, ratio" for task in tasks)]
    lines = [_line(head), _line(["---"] * len(head))]
    for optimizer, of in _by(sorted(rows, key=lambda row: row["optimizer"]), "optimizer"):
        shown = {row["task"]: row for row in of}
        cells = []
        for task in tasks:
            ratio = shown[task]["measured"] / shown[task]["tuned"] if task in shown else 0.0
            miss = ", **a miss**" if ratio and not 1 / _NEAR <= ratio <= _NEAR else ""
            cells.append(f"{shown[task]['tuned']:g}, {shown[task]['measured']:g}, {ratio:.2f}{miss}" if ratio else "")
        lines.append(_line([f"`{optimizer}`", *cells]))
    near = sum(1 / _NEAR <= row["measured"] / row["tuned"] <= _NEAR for row in rows)
    return f"{near} of {len(rows)} suggestions are within a factor of {_NEAR:g}.\n\n" + "\n".join(lines)


def _final(row: Row) -> float:
    """Mean final value of the reporting runs that did not diverge."""
    return statistics.mean(score for score in row["scores"] if score is not None)


def _costs() -> str:
    """Time of a step and size of the state of each optimizer, on the small vision transformer."""
    found: dict[str, Row] = {}
    for name in ("step-time", "step-time-matrix"):
        content = figures(name)[name]
        for row in content["rows"]:
            ours = row["backend"] is not None or row["optimizer"] in ("AdamW", "SGD")
            if row["model"] != "vit-tiny" or row["note"] or not ours:
                continue
            if row["optimizer"] not in found or row["mean_ratio"] < found[row["optimizer"]]["mean_ratio"]:
                found[row["optimizer"]] = {**row, "threads": content["machine"]["threads"]}
    rows = sorted(found.values(), key=lambda row: row["mean_ratio"])
    head = ["optimizer", "time of a step over AdamW's", "threads", "state, B per parameter", "way"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        size = f"{row['state_bytes_per_parameter']:.1f}"
        cells = [f"{row['mean_ratio']:.2f}", str(row["threads"]), size, row["implementation"]]
        lines.append(_line([f"`{row['optimizer']}`", *cells]))
    return "\n".join(lines)


# --- claims -----------------------------------------------------------------------------------------------------------


def _claims() -> Figures:
    return figures("claims")["claims"]


def _trace() -> str:
    head = ["Hessian", "method", "here: quartiles and median", "authors' program", "the median is within its quartiles"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in _claims()["rows"]:
        within = row["released"][0] <= row["quartiles"][1] <= row["released"][2]
        cells = (" / ".join(f"{x:.3g}" for x in row[key]) for key in ("quartiles", "released"))
        lines.append(_line([row["hessian"], f"`{row['method']}`", *cells, "yes" if within else "**no**"]))
    return "\n".join(lines)


def _valley() -> str:
    lines = ["| optimizer | value after 600 steps | after 1200 | after 2400 | first below 1 |", "|---|---|---|---|---|"]
    for row in _claims()["valley"]:
        values = row["values"]  # of every tenth step
        below = next((f"step {10 * i}" for i, x in enumerate(values) if x < 1), "not within 3,000 steps")
        lines.append(_line([f"`{row['method']}`", *(f"{values[i]:.3g}" for i in (60, 120, 240)), below]))
    return "\n".join(lines)


def _low_variance() -> str:
    rows = _claims()["low_variance"]
    noises = sorted({row["noise"] for row in rows}, reverse=True)
    lines = [_line(["exponent at noise", *(f"{x:g}" for x in noises)]), _line(["---"] * (len(noises) + 1))]
    for method, of in _by(rows, "method"):
        at = {row["noise"]: f"{row['exponent']:.2f}" for row in of}
        lines.append(_line([f"`{method}`", *(at[x] for x in noises)]))
    return "\n".join(lines)


def _quadratic() -> str:
    lines = [
        "| optimizer | beta2 | lowest loss | at lr | learning rates within twice the lowest |",
        "|---|---|---|---|---|",
    ]
    for row in _claims()["quadratic"]:
        losses = {float(lr): loss for lr, loss in row["losses"].items()}
        best = min(losses, key=lambda lr: losses[lr])
        near = sum(loss <= 2 * losses[best] for loss in losses.values())
        cells = [f"{losses[best]:.3g}", f"{best:.2g}", f"{near} of {len(losses)}"]
        lines.append(_line([f"`{row['method']}`", f"{row['beta2']:g}", *cells]))
    return "\n".join(lines)


#: What stands between the markers of each page.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "performance.md": {"step-time": _step_times, "growth": _growths, "small-models": _small_models},
    "optimizers.md": {"studies": _studies, "costs": _costs, "polar-quality": _polar_quality},
    "compare.md": {"transfer": _transfers},
    "claims.md": {"trace": _trace, "valley": _valley, "low-variance": _low_variance, "quadratic": _quadratic},
    "routing.md": {"lora": _lora},
    "precision.md": {"rounding": _roundings, "rounding-time": _rounding_times, "state-dtype": _state_dtypes},
    "processes.md": {"scaling": _scaling},
    "devices.md": {"gpu": _gpu},
    "diagnostics.md": {"causes": _causes, "confusion": _confusion, "overhead": _overhead},
}


# --- plots ----------------------------------------------------------------------------------------------------------


def _draw_step_time(name: str, content: Figures) -> None:
    models = [(model, [row for row in rows if not row["note"]]) for model, rows in _by(content["rows"], "model")]
    longest = max(len(rows) for _, rows in models)
    figure = _figure(5 * len(models), 1 + 0.22 * longest)
    for axis, (model, rows) in zip(figure.subplots(1, len(models), squeeze=False)[0], models):
        labels = [f"{row['optimizer']}  {row['implementation']}" for row in rows]
        values = [row["mean_ratio"] if row["optimizer"] in PERIODS else row["ratio"] for row in rows]
        colors = [_OURS if row["backend"] else _OTHERS for row in rows]
        axis.hlines(range(len(rows)), 1, values, color=colors)
        axis.scatter(values, range(len(rows)), color=colors, s=18)
        axis.set_yticks(range(len(rows)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("log", subs=[2, 3, 5])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(model, fontsize=10)
        axis.set_xlabel("time over fused AdamW", fontsize=8)
    figure.savefig(DOCS / "images" / f"{name}.png", dpi=110)


def _draw_growth(name: str, content: Figures) -> None:
    for sweep, rows in _by(content["rows"], "sweep"):
        figure = _figure(6, 4)
        axis = figure.subplots()
        for label, points in _lines(rows, sweep).items():
            style = "-" if "ours/" in label else "--"
            axis.loglog(list(points), list(points.values()), style, marker="o", markersize=3, label=label)
        axis.set_xlabel(_SWEEPS[sweep])
        axis.set_ylabel("ms per step")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
        figure.savefig(DOCS / "images" / f"{name}-{sweep}.png", dpi=110)


def _draw_scaling(name: str, content: Figures) -> None:
    models = _by(content["computed"], "model")
    figure = _figure(5 * len(models), 4)
    for axis, (model, rows) in zip(figure.subplots(1, len(models), squeeze=False)[0], models):
        for strategy, points in _by(rows, "strategy"):
            at = {row["gpus"]: row["total_ms"] for row in points}
            axis.loglog(list(at), list(at.values()), marker="o", markersize=3, label=strategy)
        axis.set_title(model, fontsize=10)
        axis.set_xlabel("GPUs")
        axis.set_ylabel("ms per step, computed")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(DOCS / "images" / f"{name}.png", dpi=110)


def _draw_claims(name: str, content: Figures) -> None:
    figure = _figure(10, 7)
    (trace, other), (valley, regime) = figure.subplots(2, 2)
    for axis, hessian in ((trace, "heterogeneous"), (other, "homogeneous")):
        for row in content["rows"]:
            if row["hessian"] == hessian:
                axis.plot(list(map(int, row["medians"])), list(row["medians"].values()), label=row["method"])
        axis.set(yscale="log", title=f"trace quadratic, {hessian}", xlabel="step", ylabel="median suboptimality")
    for row in content["valley"]:
        valley.plot([10 * i for i in range(len(row["values"]))], row["values"], label=row["method"])
    valley.set(yscale="log", title="4 |x - y| + |x + y|", xlabel="step", ylabel="value")
    for method, rows in _by(content["low_variance"], "method"):
        regime.plot([row["noise"] for row in rows], [row["exponent"] for row in rows], marker="o", label=method)
    regime.set(xscale="log", title="update as a power of the gradient", xlabel="noise", ylabel="exponent")
    for axis in (trace, other, valley, regime):
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(DOCS / "images" / f"{name}.png", dpi=90)


def _draw_paths(content: Figures) -> None:
    for function, (f, _) in FUNCTIONS.items():
        rows = [row for row in content["rows"] if row["function"] == function]
        levels, limits = _PLANES[function]
        across = 7
        down = -(-len(rows) // across)
        figure = _figure(1.55 * across, 1.6 * down)
        x, y = (torch.linspace(*ends, 200) for ends in limits)
        plane = f(x[None, :], y[:, None])
        axes = list(figure.subplots(down, across, sharex=True, sharey=True).flat)
        for axis in axes:
            axis.axis("off")
        for axis, row in zip(axes, rows):
            points = row["points"]
            axis.contour(x, y, plane, levels=levels, colors="#c9ced6", linewidths=0.5)
            axis.plot([p[0] for p in points], [p[1] for p in points], color="#8a93a3", linewidth=0.6)
            steps = range(len(points))
            axis.scatter([p[0] for p in points], [p[1] for p in points], c=steps, cmap="plasma", s=3, zorder=2)
            axis.set(xlim=limits[0], ylim=limits[1])
            axis.set_title(f"{row['optimizer']}  lr {row['lr']:.2g}\nends at {points[-1][2]:.2g}", fontsize=7)
        figure.savefig(DOCS / "images" / f"paths-{function}.png", dpi=100)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # here, because the tables do without

    return Figure(figsize=(width, height), layout="constrained")


def main() -> None:
    (DOCS / "images").mkdir(exist_ok=True)
    for name, content in figures("step-time").items():
        _draw_step_time(name, content)
    for name, content in figures("growth").items():
        _draw_growth(name, content)
    for name, content in figures("scaling").items():
        _draw_scaling(name, content)
    for name, content in figures("claims").items():
        _draw_claims(name, content)
    for content in figures("paths").values():
        _draw_paths(content)
    for name in PAGES:
        (DOCS / name).write_text(page(name, (DOCS / name).read_text()))


if __name__ == "__main__":
    main()
