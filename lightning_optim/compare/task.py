"""What is trained: a LightningModule and its data, made anew for every run."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from ..callbacks import Diagnostics
from ..factory import OptimizerConfig, OptimizerMixin, replace_optimizers
from .design import Run, digest
from .recording import Recorder, follow, without_files

__all__ = ["ModuleTask", "code_version", "set_optimizer"]


@dataclass
class ModuleTask:
    """A task that is given by functions.

    Args:
        model: Makes a LightningModule, as a class or a ``functools.partial`` of one does.
        data: Makes a LightningDataModule; ``None`` for a module with dataloaders of its own.
        trainer: Arguments of the Trainer.
        name: Its name.
    """

    model: Callable[[], pl.LightningModule]
    data: Callable[[], pl.LightningDataModule] | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            value = getattr(self, name)
            is_made = isinstance(value, (torch.nn.Module, pl.LightningDataModule))
            if is_made or not (value is None or callable(value)):
                raise ValueError(
                    f"{name} must be a class or a function that makes one, not the {type(value).__name__} itself: each "
                    f"seed has its own. Write {name}=lambda: {type(value).__name__}(...)."
                )
        self.name = self.name or _name(self.model)

    def describe(self) -> dict[str, Any]:
        settings = {
            "model": _described(self.model),
            "data": _described(self.data),
            "trainer": {key: str(value) for key, value in self.trainer.items()},
        }
        model = self.model()
        if self.data is not None:
            self.data()
        # Two functions with one name may make different networks.
        shape = [(name, list(p.shape)) for name, p in model.named_parameters()]
        return {**settings, "fingerprint": digest(settings, shape, code_version())}

    def train(self, run: Run) -> dict[str, Any]:
        pl.seed_everything(run.seed, workers=True, verbose=False)
        model = self.model()
        data = self.data() if self.data is not None else None
        recorder = Recorder(run)
        settings = dict(self.trainer)
        callbacks = without_files(settings.pop("callbacks", None))
        if not any(isinstance(callback, Diagnostics) for callback in callbacks):
            callbacks.append(Diagnostics(every_n_steps=run.interval, quiet=True))
        if run.steps is not None:
            settings |= {"max_steps": run.steps, "max_epochs": -1}
        quiet = {
            "logger": recorder.logger,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        set_optimizer(model, run.optimizer, run.args)
        return follow(recorder, pl.Trainer(**settings | quiet, callbacks=[*callbacks, recorder]), model, data)


def set_optimizer(module: pl.LightningModule, name: str, args: Mapping[str, Any]) -> None:
    """Make a module train with another optimizer; what its own says of groups and schedules is kept."""
    optimizer = OptimizerConfig(name, dict(args))
    if isinstance(module, OptimizerMixin):
        module.optimizer, module.lr = optimizer, None
        return
    own = module.configure_optimizers
    module.configure_optimizers = partial(  # type: ignore[method-assign]
        replace_optimizers, module, own, optimizer, said_by="compare"
    )


def _name(function: Callable[..., Any]) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _described(function: Callable[..., Any] | None) -> str:
    if isinstance(function, partial):
        arguments = [*map(repr, function.args), *(f"{key}={value!r}" for key, value in function.keywords.items())]
        return f"{_described(function.func)}({', '.join(arguments)})"
    if function is None:
        return "none"
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    hashed = hashlib.sha256(source.encode()).hexdigest()[:8]
    return f"{getattr(function, '__module__', '')}.{_name(function)} [{hashed}]"


def code_version() -> str:
    """A hash of the code that results depend on: this library, torch, Lightning, and the files of the user's project.

    The files of the project are those of modules that have been imported from outside the installed packages.
    """
    package = Path(__file__).parents[1]
    files = {path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in ("cli", "page.py")}
    files -= {path for path in (package / "compare").glob("*.py") if path.name not in ("recording.py", "task.py")}
    for room in ("callbacks", "models"):  # which an editable install has elsewhere
        spec = find_spec(f"lightning_optim.{room}")
        if spec is not None and spec.origin:
            files |= {*Path(spec.origin).parent.glob("*.py")}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name != "__main__" and not _is_installed(Path(file)) and not name.startswith("lightning_optim"):
            files.add(Path(file))
    known = hashlib.sha256(f"{torch.__version__} {pl.__version__}".encode())
    for path in sorted(files, key=lambda path: (path.name, str(path))):
        if path.is_file():
            known.update(path.name.encode() + path.read_bytes())
    return known.hexdigest()[:16]


def _is_installed(path: Path) -> bool:
    places = (Path(sys.prefix), Path(sys.base_prefix), Path(torch.__file__).parents[1])
    return any(path.is_relative_to(place) for place in places) or path.suffix not in (".py", "")
