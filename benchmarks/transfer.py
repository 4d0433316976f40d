"""How far the learning rates that ``lightning-optim transfer`` suggests are from those that a study found.

    python -m benchmarks.transfer fashion-mnist -c fashion-mnist --data.root data ...    # what is trained
    python -m benchmarks.report

Starts from the tuned rate of AdamW in ``benchmarks/results/study-NAME.json``, and adds to
``benchmarks/results/transfer.json``.
"""

from __future__ import annotations

import json
import sys

from lightning_optim.cli.commands.transfer import _task
from lightning_optim.compare.transfer import suggest

from .study import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    name, *args = sys.argv[1:]
    study = json.loads((RESULTS / f"study-{name}.json").read_text())
    tuned = {row["name"]: row["chosen"]["lr"] for row in study["rows"] if row["chosen"]}
    module, loss = _task(args)
    rows = [
        {
            "task": name,
            "optimizer": optimizer,
            "tuned": rate,
            "measured": suggest("AdamW", optimizer, tuned["AdamW"], module=module, loss=loss).lr,
            "formula": suggest("AdamW", optimizer, tuned["AdamW"]).lr,
        }
        for optimizer, rate in tuned.items()
        if optimizer != "AdamW"
    ]
    place = RESULTS / "transfer.json"
    before = json.loads(place.read_text())["rows"] if place.is_file() else []
    kept = [row for row in before if row["task"] != name]
    place.write_text(json.dumps({"rows": [*kept, *rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
