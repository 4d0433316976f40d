"""Everything that has to be checked and measured on a GPU, in one run.

    python -m benchmarks.gpu --minutes 10 --json benchmarks/results/gpu-h100.json && python -m benchmarks.report

Run it from a checkout, with torch (and NumPy) installed; what needs Lightning or pytest is left out where these are
missing. Correctness comes before time: every rule against the CPU, waits of the host, graphs, torch's settings, two
processes, 16-mixed with overflows, resuming; then steps at 2.7M to 354M parameters, the quality and time of
orthogonalisation by dtype, clipping and diagnostics. Each part runs in a process of its own, within its share of the
time; what a part leaves over goes to those after it. The file is written after each part, so that whatever ends the
sitting, what is known stays known. The exit status is 1 if anything is wrong.

The file holds ``{"machine": ..., "minutes", "device", "parts": [{"name", "about", "status", "seconds", "rows"}]}``;
the status is ``"done"``, ``"stopped"`` (out of time) or ``"failed"`` (its process ended with an error).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import gpu_parts
from .gpu_parts import PARTS, Sitting

#: Seconds beyond its share in which a part may finish what it is doing, before it is killed.
GRACE, GRACE_OF_THE_SMALLEST = 20.0, 90.0
#: Parts start from a process that has imported what they need and never touched the GPU.
_PROCESSES: Any = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["benchmarks.gpu_parts", "torch._dynamo"])  # torch.optim imports the latter, late.


def run_part(name: str, device: str, seconds: float, folder: Path, smallest: bool) -> None:
    """Run one part in this process, which runs nothing else, and write its rows to a file, as lines of JSON."""
    os.setsid()  # What it starts ends with it.
    with (folder / "errors").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    gpu_parts.threads()
    sitting = Sitting(torch.device(device), time.monotonic() + seconds, smallest)
    with (folder / "rows").open("w") as out:
        for row in PARTS[name].run(sitting):
            print(json.dumps(row), file=out, flush=True)


def start_part(name: str, device: str, seconds: float, smallest: bool) -> dict[str, Any]:
    """Run one part in a process of its own; returns what it found, however it ended."""
    begin, status, shown = time.monotonic(), "done", 0.0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "rows").touch()
        process = _PROCESSES.Process(target=run_part, args=(name, device, seconds, folder, smallest))
        process.start()
        while process.is_alive():
            process.join(0.1)
            spent = time.monotonic() - begin
            if spent > seconds + (GRACE_OF_THE_SMALLEST if smallest else GRACE):
                status = "stopped"
                break
            if spent - shown >= 10:
                shown = spent
                print(f"  {name}: {spent:.0f} s, {len(_rows(folder))} rows", flush=True)
        _end(process)
        part: dict[str, Any] = {"name": name, "about": PARTS[name].about, "status": status}
        if status == "done" and process.exitcode:
            part |= {"status": "failed", "error": (folder / "errors").read_text()[-2000:]}
        return part | {"seconds": round(time.monotonic() - begin, 1), "rows": _rows(folder)}


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rows so far; the last line may not be complete."""
    return [json.loads(line) for line in (folder / "rows").read_text().splitlines(True) if line.endswith("\n")]


def _end(process: Any) -> None:
    """Kill a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def verdict(part: dict[str, Any]) -> str:
    """A part's result in one line."""
    right = sum(row["ok"] is True for row in part["rows"])
    wrong = [row["what"] for row in part["rows"] if row["ok"] is False]
    text = f"{part['name']}: {part['status']} in {part['seconds']:.0f} s, {len(part['rows'])} rows"
    if right or wrong:
        text += f", {right} right, {len(wrong)} wrong"
    return text + (f" ({'; '.join(wrong[:5])}{'; ...' if len(wrong) > 5 else ''})" if wrong else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="about how long all parts may take")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--smallest", action="store_true", help="the first case of everything, to see that it runs")
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type not in ("cpu", "cuda"):
        parser.error(f"--device must be cuda or cpu, got {options.device!r}")
    deadline = time.monotonic() + 60 * options.minutes
    options.json.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"machine": {}, "minutes": options.minutes, "device": options.device, "parts": []}
    remaining = list(options.parts)
    while remaining:
        name = remaining[0]
        share = PARTS[name].share / sum(PARTS[other].share for other in remaining)
        seconds = max(1.0, (deadline - time.monotonic()) * share)
        print(f"{name} ({seconds:.0f} s): {PARTS[name].about}", flush=True)
        part = start_part(name, options.device, seconds, options.smallest)
        remaining.pop(0)
        if name == "machine" and part["rows"]:
            content["machine"] = {key: x for key, x in part["rows"][0].items() if key not in ("what", "ok")}
        content["parts"].append(part)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
        print(f"  {verdict(part)}", flush=True)
    wrong = [p for p in content["parts"] if p["status"] == "failed" or any(row["ok"] is False for row in p["rows"])]
    print("nothing wrong" if not wrong else f"wrong: {', '.join(part['name'] for part in wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
