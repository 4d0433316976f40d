from __future__ import annotations

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_optim import cli
from lightning_optim.diagnostics.report import CHECKS, Run, charts, examine, plot, read_runs


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


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.tag)
def test_every_check_tells_healthy_from_not(check):
    def verdict(value):
        (finding,) = examine(Run("r", {f"AdamW1/{check.tag}": ([0, 1], [value, value])}))
        return finding

    inside = verdict(check.high or 0.0)
    assert inside.healthy
    assert inside.meaning == check.healthy
    above = verdict(check.high * 1.01 + 1e-6)
    assert not above.healthy
    assert above.meaning == check.above != ""
    if check.low:
        assert verdict(check.low * 0.99).meaning == check.below != ""
    assert not verdict(float("nan")).healthy


def test_the_beginning_of_a_run_does_not_decide():
    values = [1.0] * 40 + [1e-3] * 60
    (finding,) = examine(Run("r", {"update/to_weight": (list(range(100)), values)}))
    assert finding.healthy


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
    # Sentences have the width of the terminal, of 80 columns here, and not of a column beside others.
    assert "the learning rate" in next(line for line in out.splitlines() if "hundredth per step" in line)
    printed = " ".join(out.split())
    assert printed.count("look") == 2
    assert "learning rate may be too large" in printed
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
