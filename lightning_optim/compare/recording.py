"""What is written down of a run while it trains."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from ..callbacks import Diagnostics
from ..diagnostics.causes import CAUSES
from .design import Run

__all__ = ["Recorder", "follow", "without_files"]

_POINTS = 120  # of a curve
_SAMPLE = 256  # elements of a tensor that go into a fingerprint
_CHECK = 16  # steps between looks at the loss

#: Names of the metric that is compared unless one is named, the first that is logged in validation.
_METRICS = ("val/loss", "val_loss", "valid/loss", "valid_loss", "validation/loss", "validation_loss", "loss/val")


class _Anything:
    """Stands for the experiment of any logger: takes every call and does nothing."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Anything:
        return self


class MemoryLogger(Logger):
    """Keeps scalars in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[str, tuple[list[int], list[float]]] = {}
        self.experiment = _Anything()

    @property
    def name(self) -> str:
        return "compare"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for tag, value in metrics.items():
            steps, values = self.scalars.setdefault(tag, ([], []))
            steps.append(step or 0)
            values.append(float(value))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Recorder(pl.Callback):
    """Seeds a run, ends it when its loss is no longer finite, and writes down what is reported of it.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.logger = MemoryLogger()
        self.losses: list[Tensor | float] = []
        self.validated: dict[str, tuple[list[int], list[float]]] = {}
        self.diverged = False
        self.step_seconds: list[float] = []
        self.peak_bytes = 0
        self.weights = ""
        self._data = hashlib.sha256()
        self._rates: list[float] = []
        self._begun = 0.0
        self._last = 0

    # --- training -----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # What the optimizer drew when it was built must not change the order of the data.
        self._seed(0)
        self.weights = _fingerprint(pl_module.parameters())
        _reset_peak(pl_module.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seed(1 + trainer.current_epoch)

    def _seed(self, part: int) -> None:
        seed = int(np.random.SeedSequence([self.run.seed, part]).generate_state(1)[0])
        pl.seed_everything(seed, verbose=False)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for tensor in _tensors(batch):
            self._data.update(_sample(tensor))
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.step_seconds.append(time.perf_counter() - self._begun)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self.losses.append(loss.detach())
        for optimizer in trainer.optimizers[:1]:
            self._rates.append(float(optimizer.param_groups[0]["lr"]))
        if len(self.losses) - self._last >= _CHECK:
            self._look()
            if self.diverged:
                trainer.should_stop = True
                # Lightning goes on until `min_steps` and `min_epochs`, of which a run that is lost has no use.
                trainer.fit_loop.epoch_loop.min_steps, trainer.fit_loop.min_epochs = None, None

    def _look(self) -> None:
        """Fetch the losses since the last look, in one piece."""
        new = [x for x in self.losses[self._last :] if isinstance(x, Tensor)]
        if new:
            self.losses[self._last :] = torch.stack([x.float().reshape(()) for x in new]).tolist()
            self.diverged |= not all(math.isfinite(x) for x in self.losses[self._last :])
        self._last = len(self.losses)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._keep(trainer, trainer.callback_metrics)

    def _keep(self, trainer: pl.Trainer, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            steps, values = self.validated.setdefault(name, ([], []))
            if not steps or steps[-1] != trainer.global_step:
                steps.append(trainer.global_step)
                values.append(float(value))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look()
        self.peak_bytes = _peak(pl_module.device)

    # --- result -------------------------------------------------------------------------------------------------------

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> dict[str, Any]:
        """Measure the model at the end of the run, and say all that is reported of it."""
        steps = trainer.global_step
        validates = is_overridden("validation_step", module)
        last = max((s[-1] for s, _ in self.validated.values()), default=-1)
        if validates and not self.diverged and last != steps:
            # The last step of a run is compared, wherever in an epoch it lies.
            trainer.validate(module, datamodule=data, verbose=False)  # which calls `on_validation_end`
        name = self.run.metric or _metric(self.validated)
        score, curve = self._score(name, steps)
        if score is not None and not math.isfinite(score):
            self.diverged = True
        optimizers = trainer.optimizers
        return {
            "status": "diverged" if self.diverged else "ok",
            "score": None if self.diverged else score,
            "metric": name or "train loss",
            "metrics": {
                tag: v[-1] for tag, (at, v) in self.validated.items() if at[-1] == steps and math.isfinite(v[-1])
            },
            "curve": _thin(*curve),
            "train": _thin(*_smooth([float(x) for x in self.losses])),
            "steps": steps,
            "step_ms": 1000 * median(self.step_seconds) if self.step_seconds else 0.0,
            "train_seconds": sum(self.step_seconds),
            "state_bytes": sum(map(_state_bytes, optimizers)),
            "parameter_bytes": _bytes(module.parameters()),
            "peak_bytes": self.peak_bytes,
            "peak_of": "GPU" if module.device.type == "cuda" else "process",
            "weights": self.weights,
            "data": self._data.hexdigest()[:16],
            "lr_end": self._rates[-1] / max(self._rates) if self._rates and max(self._rates) > 0 else 1.0,
            "diagnostics": {tag: _thin(*series) for tag, series in self.logger.scalars.items() if _is_ours(tag)},
            "findings": _meanings(trainer),
            "groups": [_settings(group) for optimizer in optimizers for group in optimizer.param_groups],
        }

    def _score(self, name: str | None, steps: int) -> tuple[float | None, tuple[list[int], list[float]]]:
        if name is None:
            losses = [float(x) for x in self.losses]
            if not losses:
                raise ValueError(
                    f"{self.run.optimizer}: the run logged no validation metric and returned no loss to compare. Log "
                    "one in validation_step, and name it by metric=... (--metric NAME)."
                )
            tail = losses[-max(len(losses) // 20, 1) :]
            return sum(tail) / len(tail), _smooth(losses)
        if name not in self.validated:
            if self.diverged:
                return None, ([], [])
            measured = {"diagnostics", *(monitor.family for monitor in Diagnostics("full").monitors)}
            known = ", ".join(sorted(x for x in self.validated if x.partition("/")[0] not in measured)) or "none"
            raise ValueError(f"metric {name!r} is not logged in validation. Logged are: {known}.")
        at, values = self.validated[name]
        return values[-1], (at, values)


def _metric(validated: Iterable[str]) -> str | None:
    names = list(validated)
    for name in _METRICS:
        if name in names:
            return name
    return next((name for name in names if "val" in name.lower() and "loss" in name.lower()), None)


# --- the Trainer ------------------------------------------------------------------------------------------------------

#: Callbacks that write files, show progress or end a run early, in which only its end counts.
_LEFT_OUT = ("Checkpoint", "ModelCheckpoint", "EarlyStopping", "ProgressBar", "ModelSummary", "RescueCheckpoint")


def _meanings(trainer: Any) -> list[str]:
    """What the diagnosis of the run has found, in words that are the same for all runs with the same finding."""
    diagnosis = next((c.diagnosis() for c in trainer.callbacks if isinstance(c, Diagnostics)), None)
    return [] if diagnosis is None else [f"{CAUSES[f.cause].capitalize()}." for f in diagnosis.findings]


def without_files(callbacks: Iterable[Any] | None) -> list[Any]:
    """Those of a task's callbacks that take part in training."""
    return [c for c in callbacks or [] if not any(cls.__name__ in _LEFT_OUT for cls in type(c).__mro__)]


def follow(recorder: Recorder, trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> dict[str, Any]:
    """Train, and say how it went.

    Raises:
        ValueError: The Trainer uses several devices.
    """
    if trainer.world_size > 1:
        raise ValueError(
            f"A run takes one device, and the Trainer has {trainer.world_size}: set trainer.devices to 1. Runs are "
            "made side by side with jobs=N (--jobs N)."
        )
    trainer.fit(module, datamodule=data)
    return recorder.finish(trainer, module, data)


# --- measuring --------------------------------------------------------------------------------------------------------


def _tensors(batch: Any) -> Iterable[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    stride = max(flat.numel() // _SAMPLE, 1)
    return flat[::stride][:_SAMPLE].float().cpu().numpy().tobytes()


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    known = hashlib.sha256()
    for tensor in tensors:
        known.update(_sample(tensor))
    return known.hexdigest()[:16]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _state_bytes(optimizer: Any) -> int:
    return _bytes(x for state in optimizer.state.values() for x in _tensors(state))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:  # Linux
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _thin(steps: list[int], values: list[float]) -> dict[str, list[Any]]:
    """At most a hundred or so points of a curve, the first and the last among them; what is not finite is left out."""
    kept = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(len(steps), _POINTS))})
    pairs = [(steps[i], float(f"{values[i]:.6g}")) for i in kept if math.isfinite(values[i])]
    return {"steps": [step for step, _ in pairs], "values": [value for _, value in pairs]}


def _smooth(losses: list[float]) -> tuple[list[int], list[float]]:
    """Means of the loss over pieces of the run, and the last steps of the pieces."""
    if not losses:
        return [], []
    pieces = [piece for piece in np.array_split(np.array(losses), min(len(losses), _POINTS // 2)) if len(piece)]
    ends = np.cumsum([len(piece) for piece in pieces])
    return [int(end) for end in ends], [float(piece.mean()) for piece in pieces]


def _is_ours(tag: str) -> bool:
    rooms = ("update", "update_variance", "spike", "orthogonality", "sign_collapse", "gradient", "internals")
    return tag.partition("/")[0] in (*rooms, "coverage", "diagnostics") and tag.count("/") == 1


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in group.items() if isinstance(value, (int, float, str, bool))}
    sequences = {key: list(v) for key, v in group.items() if isinstance(v, tuple) and key != "params"}
    return {**plain, **sequences, "parameters": len(group["params"])}
