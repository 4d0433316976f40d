"""Keep a study of ``lightning-optim compare``: its page for the docs, all runs, the figure, and a summary.

    python -m benchmarks.study comparisons/fashion-mnist fashion-mnist
    python -m benchmarks.report    # the tables that are made from summaries

Writes ``docs/results/NAME.csv`` and ``.svg``, ``benchmarks/results/study-NAME.json``, and what stands between the
markers ``<!-- study -->`` of ``docs/results/NAME.md``; the text around is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: What is kept of each contender.
_KEPT = ("name", "chosen", "basin", "scores", "words", "difference", "edge", "tried", "state_bytes", "diverged", "runs")


def summary(study: dict[str, Any]) -> dict[str, Any]:
    """A study without its runs."""
    steps = [run["result"]["steps"] for run in study["runs"] if run["result"].get("steps")]
    return {
        "task": study["task"],
        "metric": study["metric"],
        "noise": study["noise"],
        "steps": max(steps),
        "command": study["command"],
        "remarks": study["remarks"],
        "parameter_bytes": max(run["result"].get("parameter_bytes", 0) for run in study["runs"]),
        "rows": [{key: row[key] for key in _KEPT} for row in study["standings"]],
    }


def page(report: str, name: str) -> str:
    """The report as a part of a page: without its title, and without the table of all runs, which is a file."""
    body = report.partition("\n\n")[2].partition("## All runs")[0].rstrip()
    return re.sub(r"\(report-figures/[^)]*\)", f"({name}.svg)", body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the study")
    parser.add_argument("name", help="of the page")
    args = parser.parse_args()
    results = ROOT / "docs" / "results"
    study = json.loads((args.folder / "study.json").read_text())
    kept = json.dumps(summary(study), indent=1)
    (ROOT / "benchmarks" / "results" / f"study-{args.name}.json").write_text(kept + "\n")
    shutil.copy(args.folder / "runs.csv", results / f"{args.name}.csv")
    shutil.copy(next((args.folder / "report-figures").glob("*.svg")), results / f"{args.name}.svg")
    place = results / f"{args.name}.md"
    before, rest = place.read_text().split("<!-- study -->\n")
    body = page((args.folder / "report.md").read_text(), args.name)
    place.write_text(f"{before}<!-- study -->\n{body}\n<!-- /study -->{rest.partition('<!-- /study -->')[2]}")


if __name__ == "__main__":
    main()
