"""The parts of ``python -m benchmarks.gpu``: what is checked and measured. torch and this package are enough.

A part is a function of a :class:`Sitting` that yields rows, the most valuable first, and stops at its deadline. A row
says in ``"what"`` what it is about and in ``"ok"`` whether it is right: ``None`` where there is nothing to judge or the
device at hand has no such thing; ``"note"`` says so.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim import capture_step
from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.engine.rule import RULES
from lightning_optim.polar import METHODS
from lightning_optim.registry import OPTIMIZERS
from tests.optimizers.drive import build, gradients, settings

from . import contenders, polar_quality
from .machine import describe, limits, synchronize
from .step_time import time_steps
from .workload import MODELS, Workload

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]

OURS = [name for name, info in OPTIMIZERS.items() if issubclass(info.cls, RuleOptimizer)]
#: Vectors, a matrix and its transpose, equal matrices, and one that is not small; a kernel with four axes.
SHAPES = [(5,), (64, 32), (32, 64), (64, 32), (300, 200), (8, 4, 3, 3)]
STEPS = 4
ROUNDINGS = ("nearest", "stochastic", "kahan", "split")


@dataclass(frozen=True)
class Sitting:
    """The arguments of a part.

    Args:
        device: The device.
        deadline: When it has to be done, in seconds of :func:`time.monotonic`.
        smallest: Whether to do the first of everything only, to see that it runs.
    """

    device: torch.device
    deadline: float
    smallest: bool = False

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, as long as there is time; at least one."""
        for i, item in enumerate(items):
            if i and (self.smallest or self.left <= 0):
                return
            yield item

    @property
    def has_streams(self) -> bool:
        """Whether the host can run ahead of the device, which is then CUDA."""
        return self.device.type == "cuda"


def attempt(what: str, work: Callable[[], Row]) -> Row:
    """A row of a check that may fail."""
    try:
        return {"what": what, **work()}
    except Exception as error:
        return {"what": what, "ok": False, "error": f"{type(error).__name__}: {error}"[:1000]}


# --- correctness ----------------------------------------------------------------------------------------------------


def start(dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
    """Parameters whose values every dtype can hold."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in SHAPES]
    return [nn.Parameter(x.to(device, dtype)) for x in values]


def steps(optimizer: Any, params: list[Tensor], of: range) -> None:
    """Steps with the gradients of :func:`gradients`, and a loss for rules that need one."""
    for t in of:
        for p, g in zip(params, gradients(params, t)):
            p.grad = g.to(p.device)
        optimizer.step(lambda: torch.ones(()))


def moved(name: str, dtype: torch.dtype, device: torch.device | str, backend: str, rounding: str = "nearest") -> Tensor:
    """How far some steps of an optimizer move all parameters, in float64 on the CPU."""
    params = start(dtype, device)
    steps(build(name, params, backend=backend, rounding=rounding), params, range(1, 1 + STEPS))
    return torch.cat([(p.detach().cpu().double() - q.detach()).flatten() for p, q in zip(params, start(torch.float64))])


@cache
def reference(name: str, dtype: torch.dtype, rounding: str = "nearest") -> Tensor:
    """The same on the CPU, one parameter at a time."""
    return moved(name, dtype, "cpu", "plain", rounding)


def agreement(name: str, dtype: torch.dtype, rounding: str, backend: str, device: torch.device) -> Row:
    """How far the device is from the CPU, over the way that is moved in float64.

    The CPU's own distance from float64 says what rounding does to this rule in this dtype. The device may be three
    times as far from the CPU, since its roundings are others, or as far as the dtype of its matrix products allows:
    float16 products (2^-11), which an iteration adds up; an element-wise rule has only other roots and divisions.
    """
    wide, narrow = reference(name, torch.float64), reference(name, dtype, rounding)
    there = moved(name, dtype, device, backend, rounding)
    size = wide.norm()
    own, apart = ((narrow - wide).norm() / size).item(), ((there - narrow).norm() / size).item()
    least = 2e-2 if OPTIMIZERS[name].kind == "matrix" else 1e-4
    return {"ok": math.isfinite(apart) and apart <= max(least, 3 * own), "apart": apart, "cpu_from_float64": own}


def correctness(sitting: Sitting) -> Iterator[Row]:
    """Every rule against the CPU: float32 and, with each way of rounding, bfloat16, run in each way."""
    kinds = [(torch.float32, "nearest"), *((torch.bfloat16, rounding) for rounding in ROUNDINGS)]
    cases = [
        (name, dtype, rounding, backend)
        for backend in ("chunked", "plain", "compiled")
        for dtype, rounding in kinds
        for name in OURS
    ]
    for name, dtype, rounding, backend in sitting.each(cases):
        what = f"{name}, {str(dtype).removeprefix('torch.')}, {rounding}, {backend}"
        yield attempt(what, lambda: agreement(name, dtype, rounding, backend, sitting.device))  # noqa: B023


def waits(sitting: Sitting) -> Iterator[Row]:
    """No ordinary step makes the host wait, under ``torch.cuda.set_sync_debug_mode("error")``."""
    ways = [("chunked", "nearest"), ("plain", "nearest"), *(("chunked", rounding) for rounding in ROUNDINGS[1:])]
    cases = [(name, *way) for way in (*ways, ("compiled", "nearest")) for name in OURS if RULES[name].capturable]

    def ordinary(name: str, backend: str, rounding: str) -> Row:
        dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
        params = start(dtype, sitting.device)
        optimizer = build(name, params, backend=backend, rounding=rounding)
        for t in range(1, 15):
            for p in params:
                p.grad = torch.randn_like(p)
            if t == 12 and sitting.has_streams:  # Every form of every rule has been compiled by then.
                torch.cuda.set_sync_debug_mode("error")
            optimizer.step()
        return {"ok": all(bool(p.isfinite().all()) for p in _after_waiting(params))}

    def _after_waiting(params: list[Tensor]) -> list[Tensor]:
        if sitting.has_streams:
            torch.cuda.set_sync_debug_mode("default")
        return params

    for name, backend, rounding in sitting.each(cases):
        row = attempt(f"{name}, {rounding}, {backend}", lambda: ordinary(name, backend, rounding))  # noqa: B023
        _after_waiting([])
        yield row if sitting.has_streams else row | {"ok": None, "note": "a CPU is never waited for"}


def graphs(sitting: Sitting) -> Iterator[Row]:
    """Captured steps equal eager ones: with other gradients and learning rates, and a gradient that is not finite."""

    def captured(name: str) -> Row:
        params, others = start(torch.float32, sitting.device), start(torch.float32, sitting.device)
        optimizers = [build(name, ps, backend="chunked") for ps in (params, others)]
        capture_step(optimizers[1])
        for p in (*params, *others):
            p.grad = torch.zeros_like(p)
        for t in range(1, 13):
            for ps, optimizer in zip((params, others), optimizers):
                for p, g in zip(ps, gradients(ps, t)):
                    p.grad.copy_(g)  # type: ignore[union-attr]
                if t == 8:
                    params_with_nan = ps[1].grad
                    params_with_nan[0, 0] = math.nan  # type: ignore[index]
                if t == 6:
                    optimizer.param_groups[0]["lr"] *= 0.5
                optimizer.step()
        begin = torch.cat([p.detach().flatten() for p in start(torch.float32, sitting.device)])
        a, b = (torch.cat([p.detach().flatten() for p in ps]) for ps in (params, others))
        apart = ((a - b).norm() / (a - begin).norm()).item()
        for optimizer in optimizers:
            optimizer.settle()
        skipped = [optimizer.skipped_steps for optimizer in optimizers]
        # Numbers that are tensors are multiplied in another order, as in compiled kernels.
        return {"ok": apart <= 1e-2 and skipped == [1, 1], "apart": apart, "skipped": skipped}

    for name in sitting.each([name for name in OURS if RULES[name].capturable]):
        if sitting.has_streams:
            yield attempt(name, lambda: captured(name))  # noqa: B023
        else:
            yield {"what": name, "ok": None, "note": "a CPU has no graphs"}


def global_settings(sitting: Sitting) -> Iterator[Row]:
    """torch's global settings are after a step what they were before."""

    def kept(name: str) -> Row:
        params = start(torch.float32, sitting.device)
        optimizer = build(name, params)
        torch.set_float32_matmul_precision("medium")
        before = settings()
        steps(optimizer, params, range(1, 3))
        changed = [key for key, value in settings().items() if value != before[key]]
        return {"ok": not changed, "changed": changed}

    for name in sitting.each(OURS):
        yield attempt(name, lambda: kept(name))  # noqa: B023


def resume(sitting: Sitting) -> Iterator[Row]:
    """A run that is saved and resumed equals one that is not interrupted, bit for bit."""

    def resumed(name: str) -> Row:
        params = start(torch.float32, sitting.device)
        optimizer = build(name, params)
        steps(optimizer, params, range(1, 4))
        with tempfile.TemporaryFile() as file:
            torch.save({"p": params, "o": optimizer.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, sitting.device, weights_only=True)
        copies: list[Tensor] = [nn.Parameter(p.detach()) for p in saved["p"]]
        other = build(name, copies)
        other.load_state_dict(saved["o"])
        for ps, one in ((params, optimizer), (copies, other)):
            steps(one, ps, range(4, 7))
        return {"ok": all(torch.equal(p, q) for p, q in zip(params, copies))}

    for name in sitting.each(OURS):
        yield attempt(name, lambda: resumed(name))  # noqa: B023


def mixed(sitting: Sitting) -> Iterator[Row]:
    """16-mixed: a loss scale so large that gradients overflow, clipping by norm, and training goes on."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).to(sitting.device)
    y = x[:, :4].sin()

    def trained(name: str, clip: bool) -> Row:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
        net.to(sitting.device)
        params: list[Tensor] = list(net.parameters())
        optimizer = build(name, params)
        # float16 ends at 65504: the first scales overflow.
        scaler = torch.amp.GradScaler(sitting.device.type, init_scale=2.0**24)
        losses, scales = [], [scaler.get_scale()]
        for _ in range(60):
            optimizer.zero_grad()
            with torch.autocast(sitting.device.type, torch.float16):
                out = net(x)
            loss = (out.float() - y).square().mean()
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
            scales.append(scaler.get_scale())
        overflows = sum(after < before for before, after in pairwise(scales))
        first, last = losses[0].item(), torch.stack(losses[-5:]).mean().item()
        finite = all(bool(p.isfinite().all()) for p in net.parameters())
        return {"ok": finite and overflows > 0 and last < first, "overflows": overflows, "loss": [first, last]}

    # Those that need a closure are refused by the scaler.
    names = [name for name in OURS if OPTIMIZERS[name].cls.__name__ != "ELRA"]
    for name, clip in sitting.each([(name, clip) for clip in (True, False) for name in names]):
        yield attempt(f"{name}, {'clipped' if clip else 'not clipped'}", lambda: trained(name, clip))  # noqa: B023


def two_processes(sitting: Sitting) -> Iterator[Row]:
    """DDP and FSDP2 with mixed precision on two processes against one: NCCL with a card for each, otherwise gloo."""
    cards = torch.cuda.device_count() if sitting.has_streams else 0
    # NCCL refuses two processes on one card.
    ways = [("nccl", 2)] if cards > 1 else [("nccl", 1), ("gloo", 2)] if cards else [("gloo", 2)]
    for backend, processes in sitting.each(ways):
        for how in sitting.each(("ddp", "fsdp2", "fsdp2-bf16", "ddp-16-mixed")):
            yield from _processes(sitting, backend, processes, how)


def _processes(sitting: Sitting, backend: str, processes: int, how: str) -> Iterator[Row]:
    what = f"{how}, {processes} process{'es' * (processes > 1)}, {backend}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu_processes"]
        files = [Path(folder) / f"{rank}.json" for rank in range(processes)]
        running = [
            subprocess.Popen(
                [*command, how, backend, str(sitting.device), folder, str(rank), str(processes)],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        try:
            errors = [process.communicate(timeout=max(60.0, min(90.0, sitting.left)))[1] for process in running]
        except subprocess.TimeoutExpired:
            yield {"what": what, "ok": False, "error": "did not end in time"}
            return
        finally:
            for process in running:
                process.kill()
                process.wait()
        if any(process.returncode for process in running):
            last = [line for text in errors for line in text.splitlines() if "Error" in line]
            yield {"what": what, "ok": False, "error": (last or [errors[0][-500:]])[0][:1000]}
            return
        for row in json.loads(files[0].read_text()):
            yield {**row, "what": f"{row['what']}, {what}"}


def own_tests(sitting: Sitting) -> Iterator[Row]:
    """The project's tests marked ``gpu``, where pytest and the tests' other packages are installed."""
    missing = [name for name in ("pytest", "hypothesis", "lightning") if importlib.util.find_spec(name) is None]
    files = ["test_rounding.py", "test_execution.py", "test_graphs.py"]
    if missing or sitting.smallest:
        why = f"{', '.join(missing)} not installed" if missing else "not in the smallest form"
        yield {"what": "pytest -m gpu", "ok": None, "note": why}
        return
    for file in sitting.each(files):
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x", f"tests/optimizers/{file}"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(20.0, sitting.left))
        except subprocess.TimeoutExpired as error:
            said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            passed = re.sub(r"[^.]", "", said).count(".")
            yield {"what": f"pytest -m gpu {file}", "ok": None, "note": f"stopped after {passed} that passed"}
            return
        summary = done.stdout.strip().splitlines()[-1:] or [""]
        # 5: nothing was selected; without a GPU all are skipped.
        yield {"what": f"pytest -m gpu {file}", "ok": done.returncode in (0, 5), "note": summary[0]}


# --- time -----------------------------------------------------------------------------------------------------------


@cache
def measured_limits(device: torch.device) -> dict[str, Any]:
    return describe(device) | limits(device)


def machine(sitting: Sitting) -> Iterator[Row]:
    """A description of the machine, its bandwidth, and its rates of matrix products."""
    yield {"what": "machine", "ok": None, **measured_limits(sitting.device)}


class Silence:
    """In place of a progress bar."""

    def add_task(self, *_: Any, **__: Any) -> int:
        return 0

    def update(self, *_: Any, **__: Any) -> None: ...

    reset = advance = remove_task = update


#: Models in the order of their size: 2.7M, 19M, 124M and 354M parameters.
SIZES = ("vit-tiny", "d512", "w768", "w1024")


def step_times(sitting: Sitting) -> Iterator[Row]:
    """Steps beside torch's fused AdamW, its Muon, and a batched Muon as published."""
    found = measured_limits(sitting.device)
    names = ["AdamW", "Muon", "NAMO", "LaProp", "MVNGrad", "SOAP", "NAMOD", "HVAdam"]
    if sitting.smallest:
        names = ["AdamW", "Muon"]
    for model in sitting.each(SIZES):
        yield from _models_times(sitting, model, names, found)


def _models_times(sitting: Sitting, model: str, names: list[str], found: dict[str, Any]) -> Iterator[Row]:
    with sitting.device:
        work = Workload(MODELS[model]())
    who = [
        contender
        for contender in contenders.contenders(names, ["auto"], ["torch", "baseline"], graphs=sitting.has_streams)
        if contender.backend or contender.implementation in _PEERS
    ]
    seconds = min(25.0, max(0.5, sitting.left / len(SIZES) / 2))
    try:
        rows = time_steps(work, who, 30, seconds, 2.0, found, Silence())
    except Exception as error:  # Most likely memory; the next model is larger, and the error says which this was.
        yield {"what": model, "ok": False, "error": f"{type(error).__name__}: {error}"[:1000]}
        return
    for row in rows:
        yield {"what": f"{model}, {row['optimizer']} {row['implementation']}", "ok": None, "model": model, **row}


_PEERS = ("torch/fused", "torch/muon+fused-adamw", "baseline/batched-bfloat16", "baseline/batched-float32")


def polar(sitting: Sitting) -> Iterator[Row]:
    """Distance from the polar factor, and time of a call, by dtype of the products."""
    m, n = (64, 128) if sitting.smallest or not sitting.has_streams else (1024, 4096)
    matrices = {name: x.to(sitting.device) for name, x in polar_quality.spectra(m, n).items()}
    exact = {name: polar_quality.orthogonalize(x, "exact") for name, x in matrices.items()}
    half = ("float16", "bfloat16") if sitting.has_streams else ("bfloat16",)
    for dtype in sitting.each(("float32", *half)):
        times = polar_quality.call_times(matrices["gaussian"].float(), polar_quality.DTYPES[dtype], 10)
        for method in METHODS:
            errors = {
                name: polar_quality.polar_error(x, method, polar_quality.DTYPES[dtype], exact[name])[0]
                for name, x in matrices.items()
            }
            yield {
                "what": f"{method}, {dtype}, {m} x {n}",
                "ok": None,
                "method": method,
                "dtype": dtype,
                "m": m,
                "n": n,
                "median_ms": times[method],
                "errors": errors,
            }


def training(sitting: Sitting) -> Iterator[Row]:
    """A step of training at 16-mixed: what clipping adds and, where Lightning is installed, the diagnostics."""
    width = 1024 if sitting.has_streams else 32  # CPUs multiply float16 slowly.
    net = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    net.to(sitting.device)
    x = torch.randn(256, width, device=sitting.device)
    ways: dict[str, tuple[Any, Any, Any, bool]] = {}
    for name in ("AdamW", "LaProp", "NAMO"):
        for clip in (False, True):
            twin = copy.deepcopy(net)
            params: list[Tensor] = list(twin.parameters())
            optimizer = torch.optim.AdamW(params, fused=True) if name == "AdamW" else build(name, params)
            scaler = torch.amp.GradScaler(sitting.device.type)
            ways[f"{name}, {'clipped' if clip else 'not clipped'}"] = (twin, optimizer, scaler, clip)

    def training_step(net: Any, optimizer: Any, scaler: Any, clip: bool) -> float:
        synchronize(sitting.device)
        begin = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(sitting.device.type, torch.float16):
            out = net(x)
        scaler.scale(out.float().square().mean()).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        synchronize(sitting.device)
        return time.perf_counter() - begin

    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in sitting.each(range(4 if sitting.smallest else 60)):
        for name, objects in ways.items():
            times[name].append(training_step(*objects))
    for name, taken in times.items():
        yield {"what": name, "ok": None, "median_ms": 1e3 * statistics.median(taken[len(taken) // 4 :])}
    if importlib.util.find_spec("lightning") is None or importlib.util.find_spec("lightning_optim.callbacks") is None:
        yield {"what": "diagnostics", "ok": None, "note": "Lightning or lightning_optim.callbacks is not installed"}
        return
    yield attempt("diagnostics", lambda: _diagnostics(sitting))


def _diagnostics(sitting: Sitting) -> Row:
    """Time of training with diagnostics over that without, taken in turns."""
    from . import diagnostics_overhead as overhead

    accelerator = "gpu" if sitting.has_streams else "cpu"
    tiers = overhead.contenders()
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        for name in sitting.each(("Diagnostics('light')", "Diagnostics('standard')")):
            run = overhead.train("gpt", "LaProp", tiers[name](overhead.EVERY), 20, folder, accelerator)
            ratios[name] = statistics.median(run.ratios())
    return {"ok": None, "measured step over those around it": ratios}


# --- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Args:
        run: What it does.
        share: Of the time, relative to the other parts.
    """

    run: Callable[[Sitting], Iterator[Row]]
    share: float

    @property
    def about(self) -> str:
        """What it answers."""
        return " ".join((self.run.__doc__ or "").split())


#: The parts by name, most important first: correctness before time.
PARTS: dict[str, Part] = {
    "machine": Part(machine, 1),
    "correctness": Part(correctness, 6),
    "waits": Part(waits, 2),
    "graphs": Part(graphs, 2),
    "settings": Part(global_settings, 1),
    "two-processes": Part(two_processes, 4),
    "16-mixed": Part(mixed, 2),
    "resume": Part(resume, 1),
    "step-times": Part(step_times, 7),
    "polar": Part(polar, 2),
    "training": Part(training, 2),
    "tests": Part(own_tests, 3),
}


def threads() -> None:
    """The number that OMP_NUM_THREADS says, otherwise that of the cores."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
