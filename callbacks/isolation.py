"""What a copy of a module shares with the original, and how what a copy does is kept from the run."""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

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
    for found, value in _globals_of(module):
        if not _is_plain(value):
            return f"{type(module).__name__} uses the global {found!r} (a {type(value).__name__})"
    return ""


def _reaches_out(x: Any, hook: bool = True) -> bool:
    """Whether something to call is, or wraps, a function that a copy shares with the original."""
    if isinstance(x, functools.partial):
        return any(_reaches_out(y, hook) for y in (x.func, *x.args, *x.keywords.values()))
    if isinstance(x, types.MethodType):  # which is copied with its object
        x, hook = x.__func__, False
    if isinstance(x, types.FunctionType):
        held = [cell.cell_contents for cell in x.__closure__ or ()]
        # A hook has somewhere to put what it sees; other functions may be made of settings.
        return any(isinstance(y, nn.Module) or not _is_plain(y) or (hook and isinstance(y, _CONTAINERS)) for y in held)
    return False


def _globals_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Globals that the methods of a module's class, its bases and its submodules use, and what these classes hold.

    Libraries' classes are left out.
    """
    for cls in dict.fromkeys(cls for part in module.modules() for cls in type(part).__mro__):
        if _is_installed(cls):
            continue
        for attribute, value in vars(cls).items():
            if isinstance(value, (*_CONTAINERS, Tensor)) and not attribute.startswith("__"):
                yield f"{cls.__name__}.{attribute}", value
        for method in vars(cls).values():
            function = getattr(method, "__func__", method)
            for code in _codes(getattr(function, "__code__", None)):
                for name in code.co_names:
                    if name in getattr(function, "__globals__", {}):
                        yield name, function.__globals__[name]


def _is_installed(cls: type) -> bool:
    """Whether a class is an installed library's, whose globals are not what a training step remembers."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return file is None or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _codes(code: types.CodeType | None) -> Iterator[types.CodeType]:
    if code is not None:
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
def kept_globals(module: nn.Module) -> Iterator[None]:
    """Containers that the methods of a module's class use hold afterwards what they held before."""
    kept = [(x, copy.copy(x)) for _, x in _globals_of(module) if isinstance(x, _CONTAINERS)]
    try:
        yield
    finally:
        for x, before in kept:
            # Not only if they differ: tensors in them cannot be compared as one.
            x.clear()
            x.update(before) if isinstance(x, (dict, set)) else x.extend(before)
