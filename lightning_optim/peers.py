"""Other libraries' optimizers for matrices: what they need from routing, or what to use instead."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from .names import clean_name
from .routing import Route

__all__ = ["check_peer", "declared_arguments", "entry_of_role"]


def declared_arguments(cls: type[Optimizer]) -> dict[str, Any]:
    """The arguments of an optimizer and their defaults, as the signatures of it and its base classes say.

    >>> declared_arguments(torch.optim.Adam)["betas"]
    (0.9, 0.999)
    """
    declared: dict[str, Any] = {}
    for base in reversed(cls.__mro__):  # A class may hand what it does not name to its base class.
        if (constructor := vars(base).get("__init__")) is not None and base is not object:
            for parameter in list(inspect.signature(constructor).parameters.values())[2:]:
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    declared[parameter.name] = None if parameter.default is parameter.empty else parameter.default
    declared.pop("defaults", None)  # of torch's Optimizer itself
    return declared


def entry_of_role(cls: type[Optimizer]) -> str | None:
    """The entry of parameter groups by which an optimizer tells hidden matrices from the rest; ``None`` if it has none.

    ``use_fallback`` in timm's, ``use_muon`` in those of pytorch_optimizer and others. They do not declare it, so it is
    looked for in their source.

    >>> entry_of_role(torch.optim.AdamW)
    """
    found = set()
    for base in cls.__mro__:
        if issubclass(base, Optimizer) and base is not Optimizer and not base.__module__.startswith("torch."):
            try:
                source = inspect.getsource(base)
            except (OSError, TypeError):
                continue
            found |= {name for name in ("use_fallback", "use_muon") if f"'{name}'" in source or f'"{name}"' in source}
    return min(found, default=None)


def check_peer(cls: type[Optimizer], routes: Iterable[Route]) -> None:
    """Refuse what an optimizer does not take, before it does in words that do not say what to use.

    Raises:
        ValueError: ``torch.optim.Muon`` is to train parameters that are not matrices.
    """
    if cls is not getattr(torch.optim, "Muon", None):
        return
    others = [r for r in routes if len(r.shape) != 2]
    if others:
        raise ValueError(
            f"optimizer torch.optim.Muon takes matrices only, and {clean_name(others[0].name)!r} has shape "
            f"{others[0].shape} ({len(others)} such tensors). Use optimizer 'Muon', which is lightning_optim.Muon: it "
            "trains the hidden matrices and leaves the rest to a fallback rule."
        )
