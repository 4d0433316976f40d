"""What a copy of a module shares with the original, and how what a copy does is kept from the run."""

from __future__ import annotations

import copy
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.trainer import is_lightning

#: Hooks of a module that run in a forward or backward pass.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Attributes that every LightningModule has, or that the command line sets, and that a training step does not use.
_OWN = {*vars(pl.LightningModule()), "configure_optimizers", "log", "log_dict"}
_CONTAINERS = (list, dict, set, deque)
_VALUES = (type(None), bool, int, float, complex, str, bytes, range, type, types.ModuleType)
_CONSTANTS = (*_VALUES, types.FunctionType)


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
            yield from _globals_used(method)


def _globals_used(method: Any) -> Iterator[tuple[str, Any]]:
    """Globals that a function or method uses, and those that it wraps."""
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
    with kept_state(x for _, x in _globals_of(classes) if isinstance(x, _CONTAINERS)):
        yield


@contextmanager
def kept_state(objects: Iterable[Any]) -> Iterator[None]:
    """Objects that a copy of a module shares with the run hold afterwards what they held before.

    That is their attributes, what containers hold, and the states of random generators, also of objects within them.
    What is changed in a tensor or an array stays changed, and so does a container of more than 10,000 elements. The
    Trainer and its module are left alone.
    """
    undo = [restore for x in _reachable(objects) if (restore := _restoring(x)) is not None]
    try:
        yield
    finally:
        for restore in undo:
            restore()


#: How many objects are looked at, and how long containers may be whose elements are.
_OBJECTS, _ELEMENTS = 20_000, 10_000
#: Objects of the run itself, which a probe does not get.
_RUN = ("Trainer", "LightningModule")
#: Modules whose objects threads and processes share.
_THREADS = ("queue", "threading", "_thread", "multiprocessing", "concurrent", "asyncio")


def _reachable(objects: Iterable[Any]) -> Iterator[Any]:
    """Objects, and what they hold."""
    seen: dict[int, Any] = {}
    queue = deque(objects)
    while queue and len(seen) < _OBJECTS:
        x = queue.popleft()
        if id(x) in seen or isinstance(x, (*_VALUES, Tensor)) or type(x).__module__.partition(".")[0] in _THREADS:
            continue
        if any(is_lightning(x, name) for name in _RUN):
            continue
        seen[id(x)] = x
        yield x
        if isinstance(x, (*_CONTAINERS, tuple)):
            if len(x) <= _ELEMENTS:
                queue.extend(x.values() if isinstance(x, dict) else x)
        elif isinstance(x, (types.FunctionType, types.MethodType)):
            queue.extend(y for _, y in _globals_used(x) if isinstance(y, _CONTAINERS))
            queue.extend([*(y for f in _functions(x) for y in _held(f)), getattr(x, "__self__", None)])
        elif isinstance(x, functools.partial):
            queue.extend([x.func, *x.args, *x.keywords.values()])
        elif hasattr(x, "__dict__"):
            queue.append(vars(x))
            queue.extend(y for _, y in _globals_of(type(x).__mro__) if isinstance(y, _CONTAINERS))


def _restoring(x: Any) -> Callable[[], Any] | None:
    """What puts back what an object holds now."""
    if isinstance(x, torch.Generator):
        return functools.partial(x.set_state, x.get_state())
    if isinstance(x, random.Random):
        return functools.partial(x.setstate, x.getstate())
    if isinstance(x, np.random.Generator):
        return functools.partial(setattr, x.bit_generator, "state", copy.deepcopy(x.bit_generator.state))
    if isinstance(x, np.random.RandomState):
        return functools.partial(x.set_state, x.get_state(legacy=False))
    if not isinstance(x, _CONTAINERS) or len(x) > _ELEMENTS:
        return None
    before: Any = copy.copy(x)

    def restore() -> None:
        # By identity: tensors cannot be compared as one. What has not changed is left alone, as threads may read it.
        if isinstance(x, dict):
            for key in [key for key in x if key not in before]:
                del x[key]
            for key, value in before.items():
                if key not in x or x[key] is not value:
                    x[key] = value
        elif len(x) != len(before) or any(now is not then for now, then in zip(x, before)):
            x.clear()
            x.update(before) if isinstance(x, set) else x.extend(before)

    return restore
