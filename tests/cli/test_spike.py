"""The command ``lightning-optim spike``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_optim.cli import main


def test_table_plot_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure, figures = tmp_path / "spike.png", tmp_path / "spike.json"
    options = ["--optimizers", "MVNGrad", "Muon", "SGD", "--scales", "1e3", "10", "--at", "20", "--after", "5"]
    main(["spike", *options, "--out", str(figure), "--json", str(figures)])
    assert figure.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(figures.read_text())
    names = [(row["optimizer"], row["scale"]) for row in rows]
    assert names == [(name, scale) for name in ("MVNGrad", "Muon", "SGD") for scale in (10.0, 1000.0)]
    assert all(len(row["rms"]) == 26 for row in rows)
    # Compared with the same step without the spike: exactly the factor, in float32.
    assert rows[5]["amplification"] == pytest.approx(1000, rel=1e-5)
    assert rows[5]["recovery_steps"] == 1
    assert len(rows[5]["lost"]) == 26
    assert rows[5]["lost"][-1] == rows[5]["lost_steps"]
    table = " ".join(capsys.readouterr().out.split())
    assert all(name in table for name in ("MVNGrad", "Muon", "SGD", "1e+01", "1e+03", ">5"))
    # A sentence for each.
    assert "SGD: a spike of 1e+03 makes its updates up to 1e+03 times as large, and a larger one more; back to" in table
    assert "Muon: the size of its updates does not respond to a spike of 1e+03" in table
    assert "MVNGrad: a spike of 1e+03 makes its updates up to" in table


def test_optimizers_that_respond_alike_are_named_and_others_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["AdamW", "Adam", "SGD", "MVNGrad"]
    main(["spike", "--optimizers", *names, "--scales", "1e3", "--at", "30", "--after", "30"])
    shown = " ".join(capsys.readouterr().out.split())
    # Without weight decay the first two are the same. Among noise MVN-Grad is, too; with a signal it is not.
    assert "AdamW and Adam respond alike: to within 10 % at every step." in shown
    assert shown.count("alike") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optimizers", "Namo"], "There is no optimizer 'Namo'. Did you mean NAMO"),
        (["--scales", "ten"], "invalid float value: 'ten'"),
        (["--at", "0", "--optimizers", "SGD"], "at least 1, got spike_at=0"),
        (["--out", "no/such/folder/x.png"], "there is no folder no/such/folder"),
        (["--jsn", "x"], "--jsn"),
        (["--signal", "0"], "--signal must be positive, got 0.0"),
    ],
)
def test_mistakes_are_explained(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["spike", *args])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
