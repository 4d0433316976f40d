"""The benchmark measures what it says; no test looks at how long anything takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import nn

from benchmarks import growth, step_time
from benchmarks.contenders import PEERS, PublishedMuon, contenders, installed
from benchmarks.step_time import COLUMNS, time_steps
from benchmarks.workload import MODELS, Workload

MACHINE = {"bandwidth_gb_per_s": {"best": 10.0}, "matmul_gflop_per_s": {"float32": 100.0, "bfloat16": 100.0}}
HERE = [peer for peer in PEERS if installed(peer) and peer != "heavyball"]

Command = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs a command with the fewest samples and reads what it wrote."""

    def run(main: Callable[[], None], *arguments: str) -> dict[str, Any]:
        file = tmp_path_factory.mktemp("results") / "folder" / "figures.json"
        with pytest.MonkeyPatch.context() as patch:
            common = ["--threads", "1", "--rounds", "3", "--seconds", "0", "--json", str(file)]
            patch.setattr(sys, "argv", ["command", *arguments, *common])
            main()
        return json.loads(file.read_text())

    return run


@pytest.fixture(scope="module")
def figures(command: Command) -> dict[str, Any]:
    arguments = ["--models", "cnn-small", "--optimizers", "AdamW", "LaProp", "Muon", "SOAP"]
    return command(step_time.main, *arguments, "--backends", "plain", "--limit", "0.01")


def _row(figures: dict[str, Any], optimizer: str, implementation: str) -> dict[str, Any]:
    (row,) = (r for r in figures["rows"] if (r["optimizer"], r["implementation"]) == (optimizer, implementation))
    return row


def test_every_row_has_every_field(figures: dict[str, Any]) -> None:
    assert set(figures) == {"machine", "settings", "rows"}
    assert {"processor", "cores", "threads", "torch", "packages", "bandwidth_gb_per_s"} <= set(figures["machine"])
    assert figures["machine"]["threads"] == 1
    for row in figures["rows"]:
        assert set(row) == {"model", "optimizer", "implementation", "backend", "note", *COLUMNS}
        assert row["model"] == "cnn-small"
        assert row["tensors"] == 20
        if row["note"]:
            assert row["median_ms"] is None
        else:
            assert 0 < row["min_ms"] <= row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
            assert row["ratio"] > 0
            assert row["peak_extra_bytes"] >= 0


def test_every_installed_contender_asked_for_is_there_once(figures: dict[str, Any]) -> None:
    found = [(row["optimizer"], row["implementation"]) for row in figures["rows"]]
    assert len(set(found)) == len(found)
    expected = {("LaProp", "ours/plain"), ("Muon", "ours/plain"), ("SOAP", "ours/plain"), ("LaProp", "timm")}
    expected |= {("AdamW", "torch/fused"), ("AdamW", "torch/default"), ("Muon", "torch/muon+fused-adamw")}
    expected |= (
        {("LaProp", "pytorch_optimizer"), ("SOAP", "pytorch_optimizer")} if "pytorch_optimizer" in HERE else set()
    )
    assert expected <= set(found)
    assert not any(name == "heavyball" for _, name in found)
    assert _row(figures, "LaProp", "ours/plain")["backend"] == "plain"
    assert _row(figures, "LaProp", "timm")["backend"] is None


def test_the_reference_is_its_own_measure(figures: dict[str, Any]) -> None:
    row = _row(figures, "AdamW", "torch/fused")
    assert row["ratio"] == row["mean_ratio"] == 1.0
    assert row["peak_extra_bytes"] < 1000  # a fused kernel writes in place


def test_state_is_counted(figures: dict[str, Any]) -> None:
    for name, implementation in (("AdamW", "torch/fused"), ("LaProp", "ours/plain"), ("LaProp", "timm")):
        # Two float32 per parameter, and at most five scalars of eight bytes for each of 20 tensors of 0.58M in all.
        state = _row(figures, name, implementation)["state_bytes_per_parameter"]
        assert 8.0 <= state <= 8.0 + 20 * 5 * 8 / 5.8e5 + 5e-4  # and rounding to three digits


def test_periodic_optimizers_are_timed_for_whole_periods(figures: dict[str, Any]) -> None:
    assert _row(figures, "SOAP", "ours/plain")["samples"] == 10
    assert _row(figures, "LaProp", "ours/plain")["samples"] == 3


def test_hopeless_steps_are_left_out_and_said_so(figures: dict[str, Any]) -> None:
    # The limit of 10 ms allows 140 GFLOP/s or more: no machine multiplies bfloat16 that fast with one thread, except
    # those with units for it.
    machine = figures["machine"]["matmul_gflop_per_s"]["bfloat16"]
    expected = Workload(MODELS["cnn-small"]()).iteration_flops / (machine * 1e9) > 0.01
    row = _row(figures, "Muon", "torch/muon+fused-adamw")
    assert bool(row["note"]) is expected
    assert not _row(figures, "Muon", "baseline/batched-float32")["note"]


def test_peers_that_are_not_installed_are_named(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_time, "installed", lambda peer: peer != "pytorch_optimizer")
    monkeypatch.setattr(step_time, "limits", lambda device: MACHINE)
    arguments = ["--models", "cnn-small", "--optimizers", "LaProp", "--backends", "plain"]
    found = command(step_time.main, *arguments, "--peers", "pytorch_optimizer", "timm")
    assert [row["implementation"] for row in found["rows"]] == ["torch/fused", "ours/plain", "timm"]
    assert "not installed: pytorch_optimizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet"], "invalid choice: 'resnet'"),
        (["--optimizers", "Namo"], "invalid choice: 'Namo'"),
        (["--peers", "optax"], "invalid choice: 'optax'"),
        (["--backends", "fast"], "invalid choice: 'fast'"),
        (["--rounds", "2"], "must be at least 3, got 2"),
        (["--threads", "0"], "must be at least 1, got 0"),
        (["--threads", "two"], "invalid int value: 'two'"),
        (["--seconds", "nan"], "must be at least 0, got nan"),
        (["--device", "quantum"], "there is no device 'quantum' here"),
        (["--device", "meta"], "device must be cpu or cuda, got 'meta'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["step_time", *arguments])
    with pytest.raises(SystemExit):
        step_time.main()
    assert message in capsys.readouterr().err


# --- parts ----------------------------------------------------------------------------------------------------------


def test_sizes_of_the_models() -> None:
    sizes = {name: sum(p.numel() for p in MODELS[name]().parameters()) for name in ("cnn-small", "vit-tiny", "d512")}
    assert sizes == {"cnn-small": 583_172, "vit-tiny": 2_658_816, "d512": 18_886_656}
    shapes = [tuple(p.shape) for p in MODELS["cnn-small"]().parameters() if p.ndim > 1]
    assert len(shapes) == len(set(shapes))
    assert len(list(MODELS["vit-tiny"]().parameters())) == 60


def test_matrices_are_views_of_the_parameters() -> None:
    qkv, conv = nn.Linear(4, 12), nn.Conv2d(3, 6, 3)
    module = nn.ModuleDict({"qkv": qkv, "conv": conv, "head": nn.Linear(4, 2)})
    work = Workload(module)
    assert [tuple(x.shape) for x in work.matrices] == [(4, 4)] * 3 + [(6, 27)]
    assert [tuple(x.shape) for x in work.blocks] == [(4, 4)] * 3 + [(6, 3, 3, 3)]
    assert sum(x.numel() for x in [*work.matrices, *work.others]) == work.size
    work.load(0)
    assert qkv.weight.grad is not None
    with torch.no_grad():
        for i, x in enumerate(work.matrices[:3]):
            assert x.grad is not None
            assert torch.equal(x.grad, qkv.weight.grad[4 * i : 4 * i + 4])
            x.fill_(i)
    assert qkv.weight[:, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


def test_gradients_alternate_and_are_refilled_once_written_to() -> None:
    work = Workload(nn.Linear(50, 50))
    seen = []
    for step in range(4):
        work.load(step)
        p = work.parameters[0]
        assert p.grad is not None
        seen.append(p.grad.clone())
        if step == 1:
            p.grad.zero_()
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[3])
    assert seen[3].std().item() == pytest.approx(1, abs=0.1)  # five standard errors of 2500 normal numbers: 0.07


def test_memory_and_operations_are_counted() -> None:
    kept = []

    def work() -> None:
        a = torch.ones(100, 200)  # 80,000 bytes
        kept.append(a @ torch.ones(200, 300))  # 240,000 beside it, 120,000 stay

    left, peak, flops = step_time._profiled(work, torch.device("cpu"), flops=True)
    assert (left, peak, flops) == (120_000, 440_000, 2 * 100 * 200 * 300)


def test_published_muon_is_the_same_stacked_or_not_and_orthogonal() -> None:
    torch.manual_seed(0)
    start = [torch.randn(12, 30) for _ in range(3)] + [torch.randn(30, 12)]
    moved = []
    for stacked in (True, False):
        parameters = [nn.Parameter(x.clone()) for x in start]
        optimizer = PublishedMuon(list(parameters), torch.float32, stacked)
        torch.manual_seed(1)
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        moved.append([p.detach() for p in parameters])
        for p in parameters:
            values = torch.linalg.svdvals(optimizer.orthogonalize(p.grad[None]))
            # Five steps of Polar Express map singular values above 1e-3 of the norm to 0.869 ... 1.131.
            assert 0.85 < values.min() <= values.max() < 1.15
    for a, b in zip(*moved):
        # Of the order of rounding: batched and single products may add in another order.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_captured_steps_take_part_where_they_can() -> None:
    who = {
        (c.optimizer, c.implementation): c for c in contenders(["LaProp", "NAMO", "SOAP"], ["auto"], [], graphs=True)
    }
    assert {key for key in who if "graph" in key[1]} == {("LaProp", "ours/auto+graph"), ("NAMO", "ours/auto+graph")}
    with pytest.raises(ValueError, match="a graph runs on one CUDA device"):
        who["LaProp", "ours/auto+graph"].build(Workload(nn.Linear(3, 3)))


def test_a_slow_contender_takes_part_in_fewer_rounds() -> None:
    work = Workload(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), matrix=("*.weight",))
    who = contenders(["LaProp"], ["plain"], [])
    with Progress(disable=True) as progress:
        fast = time_steps(work, who, 5, 1e9, 1, MACHINE, progress)
        slow = time_steps(work, who, 5, 0, 1, MACHINE, progress)
    assert [row["samples"] for row in fast] == [5, 5]
    assert slow[1]["samples"] == 3


def test_growth(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    points = list(growth.sweeps(1e8))
    sizes = {"parameters": [], "tensors": []}
    for sweep, (count, rows, columns) in points:
        sizes[sweep].append((count, count * rows * columns))
    assert {count for count, _ in sizes["parameters"]} == {16}
    assert sizes["parameters"][0][1] == pytest.approx(1e5, rel=0.02)  # columns are whole
    assert sizes["parameters"][-1][1] == pytest.approx(1e8, rel=0.02)
    assert sizes["tensors"][0][0] == 1
    assert sizes["tensors"][-1][0] == 4096
    assert {size for _, size in sizes["tensors"]} == {2**22}
    monkeypatch.setattr(step_time, "limits", lambda device: MACHINE)
    found = command(growth.main, "--largest", "2e5")
    timed = [(row["sweep"], row["optimizer"], row["implementation"]) for row in found["rows"]]
    assert timed == [
        ("parameters", "AdamW", "torch/fused"),
        ("parameters", "LaProp", "ours/chunked"),
        ("parameters", "LaProp", "ours/compiled"),
        *([("parameters", "LaProp", "pytorch_optimizer")] if "pytorch_optimizer" in HERE else []),
        ("parameters", "NAMO", "ours/auto"),
    ]
