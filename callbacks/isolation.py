"""What a copy of a module shares with the original, and how what a copy does is kept from the run."""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

#: Hooks of a module that run in a forward or backward pass.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Attributes that every LightningModule has, or that the command line sets, and that a training step does not use.
_OWN = {*vars(pl.LightningModule()), "configure_optimizers", "log", "log_dict"}
_CONTAINERS = (list, dict, set, deque)
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, range, type, types.ModuleType, types.FunctionType)


class StandInTrainer:
    """A Trainer to be read: what is assigned stays here, and loggers, metrics and callbacks are not the run's.

    Args:
        trainer: The Trainer of the run.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        logger = DummyLogger()
        vars(self).update(_trainer=trainer, logger=logger, loggers=[logger], callbacks=[])
        for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
            vars(self)[name] = dict(getattr(trainer, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_trainer"], name)


def not_isolated(module: nn.Module) -> str:
    """What a deep copy of a module would share with the original, in words; empty if nothing was found.

    Functions are not copied: a closure, a bound method or a hook goes on reaching what it was made with.
    """
    for name, part in module.named_modules():
        where = f" of {name!r}" if name else ""
        for kind in _HOOKS:
            if any(_reaches_out(hook) for hook in getattr(part, kind).values()):
                return f"a hook{where} is a function that holds other objects"
        for attribute, value in vars(part).items() if not _is_installed(type(part)) else ():
            if attribute not in _OWN and not attribute.startswith("_") and _reaches_out(value, hook=False):
                return f"its attribute {attribute!r}{where} is a function that holds other objects"
    for found, value in _globals_of(classes_of(module)):
        if not _is_plain(value):
            return f"{type(module).__name__} uses the global {found!r} (a {type(value).__name__})"
    return ""


@contextmanager
def isolated_steps(optimizer: Optimizer) -> Iterator[None]:
    """To be entered for steps of a copy of an optimizer, which then change nothing outside of the copy.

    Raises:
        MisconfigurationException: The methods of the optimizer's class, which is not a library's, reach other objects.
    """
    classes = [cls for cls in type(optimizer).__mro__ if not cls.__module__.startswith("lightning_optim.")]
    reason = ""
    for cls in classes:
        for name, method in vars(cls).items() if not _is_installed(cls) else ():
            if any(_reaches_out(function) for function in _functions(method) if not _is_installed(function)):
                reason = f"its method {name!r} is a function that holds other objects"
    for name, value in _globals_of(classes):
        if not _is_plain(value):
            reason = f"it uses the global {name!r} (a {type(value).__name__})"
    if reason:
        raise MisconfigurationException(
            f"probes make steps on a copy of {type(optimizer).__name__}, and {reason}, which steps of the copy would "
            "change. Leave probe_every_n_steps out."
        )
    with kept_globals(classes):
        yield


def _reaches_out(x: Any, hook: bool = True) -> bool:
    """Whether something to call is, or wraps, a function that a copy shares with the original."""
    if isinstance(x, functools.partial):
        return any(_reaches_out(y, hook) for y in (x.func, *x.args, *x.keywords.values()))
    if isinstance(x, types.MethodType):  # which is copied with its object
        x, hook = x.__func__, False
    if isinstance(x, types.FunctionType):
        held = [
            y for function in _functions(x) if function is x or not _is_installed(function) for y in _held(function)
        ]
        # A hook has somewhere to put what it sees; other functions may be made of settings.
        return any(isinstance(y, nn.Module) or not _is_plain(y) or (hook and isinstance(y, _CONTAINERS)) for y in held)
    return False


def _held(function: types.FunctionType) -> list[Any]:
    """What a closure holds."""
    cells = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # of a name that has no value yet
            cells.append(cell.cell_contents)
    return cells


def _functions(x: Any) -> list[types.FunctionType]:
    """A function and those that it wraps, as a decorated function wraps the one that was written."""
    found: dict[types.FunctionType, None] = {}
    queue = [getattr(x, "__func__", x)]
    while queue:
        function = queue.pop()
        if isinstance(function, types.FunctionType) and function not in found:
            found[function] = None
            queue += [getattr(y, "__func__", y) for y in _held(function)]
    return list(found)


def classes_of(module: nn.Module) -> Iterable[type]:
    """The class of a module, its bases, and those of its submodules."""
    return dict.fromkeys(cls for part in module.modules() for cls in type(part).__mro__)


def _globals_of(classes: Iterable[type]) -> Iterator[tuple[str, Any]]:
    """Globals that the methods of classes use, and what the classes hold. Libraries' classes are left out."""
    for cls in classes:
        if _is_installed(cls):
            continue
        for attribute, value in vars(cls).items():
            if isinstance(value, (*_CONTAINERS, Tensor)) and not attribute.startswith("__"):
                yield f"{cls.__name__}.{attribute}", value
        for method in vars(cls).values():
            for function in _functions(method):
                if not _is_installed(function):
                    for name in (name for code in _codes(function.__code__) for name in code.co_names):
                        if name in function.__globals__:
                            yield name, function.__globals__[name]


def _is_installed(x: type | types.FunctionType) -> bool:
    """Whether a class or function is an installed library's, whose globals are not what a training step remembers."""
    file = x.__code__.co_filename if isinstance(x, types.FunctionType) else _file_of(x)
    return file is None or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _file_of(cls: type) -> str | None:
    return getattr(sys.modules.get(cls.__module__), "__file__", None)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_plain(x: Any) -> bool:
    """Whether something cannot be changed, or is a container of such, which :func:`kept_globals` puts back."""
    if isinstance(x, dict):
        return all(_is_plain(y) for y in x.values())
    if isinstance(x, (list, set, deque, tuple, frozenset)):
        return all(_is_plain(y) for y in x)
    if isinstance(x, (*_CONSTANTS, types.BuiltinFunctionType, functools.partial)):
        return True
    if isinstance(x, nn.Module):  # such as a loss: without buffers there is nothing that a forward pass changes
        return next(x.buffers(), None) is None
    return type(x).__module__.partition(".")[0] in ("logging", "enum", "pathlib", "re") or _is_torch_constant(x)


def _is_torch_constant(x: Any) -> bool:
    return type(x).__module__ == "torch" and type(x).__name__ in ("dtype", "device", "Size", "layout", "memory_format")


@contextmanager
def kept_globals(classes: Iterable[type]) -> Iterator[None]:
    """Containers that the methods of classes use hold afterwards what they held before."""
    kept = [(y, copy.copy(y)) for _, x in _globals_of(classes) for y in _containers(x)]
    try:
        yield
    finally:
        for x, before in kept:
            # Not only if they differ: tensors in them cannot be compared as one.
            x.clear()
            x.update(before) if isinstance(x, (dict, set)) else x.extend(before)


def _containers(x: Any) -> Iterator[Any]:
    """A container and those in it."""
    if isinstance(x, (*_CONTAINERS, tuple)):
        for y in x.values() if isinstance(x, dict) else x:
            yield from _containers(y)
    if isinstance(x, _CONTAINERS):
        yield x
