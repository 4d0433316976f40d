from __future__ import annotations

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_optim import cli
from lightning_optim.diagnostics.report import Run, charts, plot, read_runs


def write(folder, scalars):
    writer = SummaryWriter(folder)
    for tag, values in scalars.items():
        for step, value in values:
            writer.add_scalar(tag, value, step)
    writer.close()


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "a", {"update/to_weight": [(0, 1e-3), (10, 2e-3)], "gradient/norm": [(0, 1.0), (10, 2.0)]})
    write(tmp_path / "b", {"update/to_weight": [(0, 0.5), (10, 0.4)], "SGD0/gradient/clipped_fraction": [(0, 0.9)]})
    return tmp_path


def test_runs_below_a_folder(folder):
    runs = read_runs([folder])
    assert [run.name for run in runs] == ["a", "b"]
    assert runs[0].scalars["gradient/norm"] == ([0, 10], [1.0, 2.0])
    (single,) = read_runs([folder / "b"])
    assert single.name == "b"


def test_more_than_the_10_000_values_that_tensorboard_samples(tmp_path):
    write(tmp_path, {"update/rms": [(step, 1.0) for step in range(10_500)]})
    (run,) = read_runs([tmp_path])
    assert len(run.scalars["update/rms"][0]) == 10_500


def test_a_resumed_run_is_one_and_its_later_values_count(tmp_path):
    write(tmp_path, {"update/rms": [(0, 1.0), (1, 2.0)]})
    (first,) = tmp_path.iterdir()
    first.rename(f"{first}.later")
    write(tmp_path, {"update/rms": [(1, 3.0), (2, 4.0)]})
    (second,) = (path for path in tmp_path.iterdir() if path.name != f"{first.name}.later")
    second.rename(f"{first}.earlier")
    (run,) = read_runs([tmp_path])
    assert run.scalars["update/rms"] == ([0, 1, 2], [1.0, 3.0, 4.0])


def test_no_event_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no TensorBoard event files"):
        read_runs([tmp_path])


def test_charts_hold_what_runs_have(folder):
    figure = plot(read_runs([folder]))
    by_title = {axes.get_title(): axes for axes in figure.axes}
    # In the order of the questions.
    assert list(by_title) == ["update to weight", "gradient norm", "clipped steps"]
    assert len(by_title["update to weight"].lines) == 2
    assert len(by_title["update to weight"].patches) == 1, "what is healthy"
    assert not by_title["gradient norm"].patches
    assert len(by_title["clipped steps"].lines) == 1
    assert by_title["update to weight"].get_yscale() == "log"
    assert set(by_title) <= set(charts())
    with pytest.raises(ValueError, match="nothing to plot"):
        plot([Run("empty", {"epoch": ([0], [0.0])})])


def test_the_command(folder, capsys):
    cli.main(["diagnostics", str(folder), "--out", str(folder / "figure.png")])
    out = capsys.readouterr().out
    assert out.count("unknown: no diagnostics in the logs") == 2  # a few values, and no records
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [(["nowhere"], "no TensorBoard event files"), ([], "required: logdir"), ([".", "--tier"], "--tier")],
)
def test_the_command_explains_mistakes(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["diagnostics", *args])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
