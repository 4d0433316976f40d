"""The command for a machine with a GPU, run on the CPU: what it finds, how it fails, and that torch is enough."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, gpu_parts, report

ROOT = Path(__file__).parents[2]
#: What a machine with torch only does not have.
ABSENT = ["lightning", "pytorch_lightning", "rich", "timm", "torchvision", "jsonargparse", "torchmetrics", "sklearn"]
ABSENT += ["scipy", "matplotlib", "tensorboard", "pytest", "hypothesis", "optuna", "filelock"]


def run(file: Path, *arguments: str, absent: bool = False) -> tuple[int, dict[str, Any]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if absent:  # Modules that refuse to be imported stand before those that are installed.
        folder = file.parent / "absent"
        folder.mkdir()
        for name in ABSENT:
            (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('no module named {name}', name='{name}')\n")
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--json", str(file), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590, env=environment)
    assert file.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode, json.loads(file.read_text())


def rows_are_whole(content: dict[str, Any]) -> None:
    for part in content["parts"]:
        assert {"name", "about", "status", "seconds", "rows"} <= set(part)
        for row in part["rows"]:
            assert row["ok"] in (True, False, None)
            assert row["what"]


def test_the_smallest_form_needs_torch_only(tmp_path: Path) -> None:
    parts = ["correctness", "waits", "graphs", "settings", "resume", "16-mixed"]
    code, content = run(tmp_path / "gpu.json", "--minutes", "1", "--smallest", "--parts", *parts, absent=True)
    assert [(part["name"], part["status"], part.get("error")) for part in content["parts"]] == [
        (name, "done", None) for name in parts
    ]
    rows_are_whole(content)
    assert code == 0, content
    assert all(part["rows"] for part in content["parts"])


@pytest.mark.slow
@pytest.mark.distributed
def test_everything_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, content = run(tmp_path / "gpu-cpu.json", "--minutes", "1", "--smallest")
    assert [part["name"] for part in content["parts"]] == list(gpu_parts.PARTS)
    rows_are_whole(content)
    assert code == 0, [gpu.verdict(part) for part in content["parts"]]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.page("devices.md", (report.DOCS / "devices.md").read_text())
    assert "### gpu-cpu" in text
    assert "baseline/batched-float32" in text
    assert report.page("devices.md", text) == text


def a_part(what: str) -> Any:
    def failing(sitting: gpu_parts.Sitting) -> Any:
        """A part of the test."""
        yield {"what": "first", "ok": True}
        if what == "error":
            raise RuntimeError("broken driver")
        if what == "death":
            os._exit(3)
        time.sleep(60)

    return gpu_parts.Part(failing, 1)


@pytest.mark.parametrize("what", ["error", "death", "sleep"])
def test_a_part_that_fails_leaves_what_it_found(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    monkeypatch.setattr(gpu, "_PROCESSES", multiprocessing.get_context("fork"))  # Its parts are those of this process.
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    parts = {"bad": a_part(what), "good": gpu_parts.Part(gpu_parts.graphs, 1)}
    for module in (gpu, gpu_parts):
        monkeypatch.setattr(module, "PARTS", parts)
    file = tmp_path / "gpu.json"
    code = gpu.main(["--device", "cpu", "--minutes", "0.01", "--parts", "bad", "good", "--json", str(file)])
    bad, good = json.loads(file.read_text())["parts"]
    assert bad["rows"] == [{"what": "first", "ok": True}]
    assert bad["status"] == ("stopped" if what == "sleep" else "failed")
    assert ("broken driver" in bad.get("error", "")) == (what == "error")
    assert good["status"] == "done"
    assert code == (what != "sleep")


def test_a_device_that_computes_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert gpu_parts.agreement("LaProp", torch.float32, "nearest", "chunked", cpu)["ok"]
    moved = gpu_parts.moved

    def wrongly(name: str, dtype: torch.dtype, device: Any, backend: str, rounding: str = "nearest") -> Tensor:
        found = moved(name, dtype, device, backend, rounding)
        return found * 1.001 if backend == "chunked" else found

    monkeypatch.setattr(gpu_parts, "moved", wrongly)
    assert not gpu_parts.agreement("LaProp", torch.float32, "nearest", "chunked", cpu)["ok"]


def test_without_a_file_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "Not measured yet." in report.page("devices.md", (report.DOCS / "devices.md").read_text())
