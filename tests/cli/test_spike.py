"""The command ``lightning-optim spike``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_optim.cli import main


def test_table_plot_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure, figures = tmp_path / "spike.png", tmp_path / "spike.json"
    options = ["--optimizers", "MVNGrad", "Muon", "SGD", "--scales", "10", "1e3", "--at", "20", "--after", "5"]
    main(["spike", *options, "--out", str(figure), "--json", str(figures)])
    assert figure.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(figures.read_text())
    names = [(row["optimizer"], row["scale"]) for row in rows]
    assert names == [(name, scale) for name in ("MVNGrad", "Muon", "SGD") for scale in (10.0, 1000.0)]
    assert all(len(row["rms"]) == 26 for row in rows)
    # RMS of 8,192 normal numbers, relative standard error 0.8 %.
    assert rows[5]["amplification"] == pytest.approx(1000, rel=0.04)
    assert rows[5]["recovery_steps"] == 1
    table = capsys.readouterr().out
    assert all(name in table for name in ("MVNGrad", "Muon", "SGD", "1e+01", "1e+03", ">5"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optimizers", "Namo"], "There is no optimizer 'Namo'. Did you mean NAMO"),
        (["--scales", "ten"], "invalid float value: 'ten'"),
        (["--at", "0", "--optimizers", "SGD"], "at least 1, got spike_at=0"),
        (["--out", "no/such/folder/x.png"], "There is no folder no/such/folder"),
        (["--jsn", "x"], "--jsn"),
    ],
)
def test_mistakes_are_explained(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["spike", *args])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
