"""Every optimizer trains from the command line: its defaults, and the settings of its preset."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest

from lightning_optim.cli import main
from lightning_optim.registry import OPTIMIZERS

from ..optimizers.rows import ROWS

STEPS = 60
TINY = [
    *("--model.layers", "1", "--model.width", "32", "--data.max_bytes", "50000", "--data.sequence_length", "32"),
    *("--trainer.max_steps", str(STEPS), "--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.accelerator", "cpu", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"),
    *("--trainer.callbacks", "[]", "--trainer.enable_checkpointing", "false"),
]


@pytest.mark.slow
@pytest.mark.parametrize("preset", [False, True], ids=["row", "preset"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_goes_down(name: str, preset: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-optim"])
    rate = ["--optimizer.lr", str(ROWS[name].lr)] if name in ROWS and not preset else []
    main(["fit", "-c", "stdlib-text", *(["-c", name.lower()] if preset else ["--optimizer", name, *rate]), *TINY])
    (log,) = Path("logs").rglob("metrics.csv")
    with log.open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    # Bytes begin at about ln 256 = 5.5; batches differ by about 0.1. Some published rates are for longer runs.
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - (0.05 if preset else 0.2)
