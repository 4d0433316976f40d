"""The parser behind the commands of LightningCLI."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from jsonargparse import ActionConfigFile, _typehints, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LRSchedulerTypeTuple, ReduceLROnPlateau
from torch.optim.lr_scheduler import LRScheduler

from .. import schedules
from ..registry import OPTIMIZERS
from .errors import UsageError, exit_with, explain, import_class
from .presets import find_config
from .tracebacks import fault_in_module

set_parsing_settings(docstring_parse_attribute_docstrings=True)

# A bare name is looked up in the first type that has it, so ours come before torch's of the same name.
OPTIMIZER_TYPES: tuple[type, ...] = (*(info.cls for info in OPTIMIZERS.values()), torch.optim.Optimizer)
SCHEDULER_TYPES: tuple[type, ...] = (
    *(getattr(schedules, name) for name in schedules.__all__),
    ReduceLROnPlateau,
    LRScheduler,
)


class PresetOrFile(ActionConfigFile):
    """The argument ``--config``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, find_config(values), option_string)


class OptimArgumentParser(LightningArgumentParser):
    """Lightning's parser, with this library's optimizers and schedules, and errors in one message.

    The message says what is wrong, instead of all options and the inner workings of types.
    """

    arguments: Sequence[str] = ()
    """What is parsed, for messages."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))

    def add_lightning_class_args(self, lightning_class: Any, *args: Any, **kwargs: Any) -> list[str]:
        bases = lightning_class.__mro__ if isinstance(lightning_class, type) else ()
        if any(base.__module__.startswith("pytorch_lightning.") for base in bases):
            raise UsageError(
                f"{lightning_class.__name__} is a class of pytorch_lightning, and OptimCLI is for lightning.pytorch, "
                "the same code under its other name. Import lightning.pytorch in its place, or use pytorch_lightning's "
                'own LightningCLI with trainer_defaults={"callbacks": [OptimizerSwap("NAMO")]}.'
            )
        return super().add_lightning_class_args(lightning_class, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)  # raises
        if fault := fault_in_module(message):
            raise fault from None
        parser = getattr(ex, "subcommand_parser", None) or self
        exit_with(explain(message, parser, self.arguments), self.prog.split()[0])

    def add_optimizer_args(
        self, optimizer_class: Any = (torch.optim.Optimizer,), nested_key: str = "optimizer", link_to: str = "AUTOMATIC"
    ) -> None:
        if optimizer_class != (torch.optim.Optimizer,):
            super().add_optimizer_args(optimizer_class, nested_key, link_to)
            return
        what = "Name or class path; `lightning-optim list` shows ours. Arguments follow as --optimizer.ARGUMENT."
        self._add_types(OPTIMIZER_TYPES, nested_key, {"params"}, what)
        self._optimizers[nested_key] = (OPTIMIZER_TYPES, link_to)

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: Any = LRSchedulerTypeTuple,
        nested_key: str = "lr_scheduler",
        link_to: str = "AUTOMATIC",
    ) -> None:
        if lr_scheduler_class != LRSchedulerTypeTuple:
            super().add_lr_scheduler_args(lr_scheduler_class, nested_key, link_to)
            return
        what = "Name or class path. Arguments follow as --lr_scheduler.ARGUMENT; a missing total_steps is found out."
        self._add_types(SCHEDULER_TYPES, nested_key, {"optimizer"}, what)
        self._lr_schedulers[nested_key] = (SCHEDULER_TYPES, link_to)

    def _add_types(self, types: tuple[type, ...], key: str, skip: set[str], what: str) -> None:
        group = self.add_argument_group("Learning-rate schedule" if "optimizer" in skip else "Optimizer")
        group.add_subclass_arguments(
            types, key, skip=skip, help=what, as_group=False, instantiate=False, fail_untyped=False, metavar="NAME"
        )

    def set_defaults(self, *args: Any, **kwargs: Any) -> None:
        for key in [key for arg in args if isinstance(arg, Mapping) for key in arg] + list(kwargs):
            self._add_automatic(key)
        super().set_defaults(*args, **kwargs)

    def link_arguments(self, source: Any, target: str, *args: Any, **kwargs: Any) -> None:
        self._add_automatic(target)
        super().link_arguments(source, target, *args, **kwargs)

    def _add_automatic(self, key: str) -> None:
        """Add the options that LightningCLI adds after those of a project, which refers to them earlier."""
        name = key.partition(".")[0]
        if name == "optimizer" and not self._optimizers and "--optimizer" not in self._option_string_actions:
            self.add_optimizer_args()
        if name == "lr_scheduler" and not self._lr_schedulers and "--lr_scheduler" not in self._option_string_actions:
            self.add_lr_scheduler_args()


@contextmanager
def forgets_on_change() -> Iterator[None]:
    """While this lasts, another optimizer or schedule drops all arguments of the one before, wherever they came from.

    jsonargparse hands the new class those that it has too, such as the learning rate. What decides on it is private
    (checked with 4.53), so that without it jsonargparse's own way is what happens.
    """
    name = "discard_init_args_on_class_path_change"
    keep = getattr(_typehints, name, None)
    if keep is None:
        yield
        return

    def forget(parser_or_action: Any, before: Any, now: Any) -> None:
        if before and "class_path" in before and before["class_path"] != now["class_path"]:
            old, new = _class_of(before["class_path"]), _class_of(now["class_path"])
            if old is new and old is not None:  # by another path
                return
            are_classes = isinstance(old, type) and isinstance(new, type)  # and not functions that make an object
            if are_classes and any(issubclass(old, some) and issubclass(new, some) for some in _FORGOTTEN):
                for key in ("init_args", "dict_kwargs"):
                    if before.get(key):
                        for argument in list(before[key].keys()):
                            del before[key][argument]
                return
        keep(parser_or_action, before, now)

    setattr(_typehints, name, forget)
    try:
        yield
    finally:
        setattr(_typehints, name, keep)


def _class_of(path: str) -> Any:
    """What a class path names, ``None`` if nothing: a default such as ``"auto"`` stands there as one, too."""
    try:
        return import_class(path)
    except (ImportError, AttributeError, ValueError):
        return None


_FORGOTTEN = (torch.optim.Optimizer, LRSchedulerTypeTuple)
