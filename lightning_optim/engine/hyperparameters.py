"""What hyperparameters must be: a predicate and the words for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from ..polar import METHODS, find

Constraint: TypeAlias = tuple[Callable[[Any], bool], str]

#: Products of a few numbers up to the first stay finite in float32, and so do quotients by numbers down to the second,
#: also of gradients so small that their squares vanish.
LARGEST, SMALLEST = 1e10, 1e-18


def number(least: float = 0.0, most: float = LARGEST) -> Constraint:
    """A number within bounds that are allowed themselves."""
    return lambda x: _is_number(x) and least <= x <= most, f"a number in [{least:g}, {most:g}]"


def fraction() -> Constraint:
    """A number from 0 to less than 1."""
    return _is_fraction, "a number in [0, 1)"


def count() -> Constraint:
    """A whole number from 1."""
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 1, "a whole number >= 1"


def one_of(*values: Any) -> Constraint:
    """One of a few values."""
    return lambda x: x in values, f"one of {values}"


def optional(constraint: Constraint) -> Constraint:
    """``None``, or what a constraint says."""
    holds, what = constraint
    return lambda x: x is None or holds(x), f"None or {what}"


def satisfies(constraint: Constraint, x: Any) -> bool:
    """Whether a value of any type is what it must be.

    >>> satisfies(number(), 0.1), satisfies(number(), float("nan")), satisfies(number(), "0.1")
    (True, False, False)
    """
    try:
        return bool(constraint[0](x))
    except (TypeError, ValueError, RuntimeError):
        return False


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_fraction(x: Any) -> bool:
    return _is_number(x) and 0 <= x < 1


def _is_switch(x: Any) -> bool:
    return isinstance(x, bool)


_NOT_NEGATIVE = number()
_SWITCHES = (
    "amsgrad", "centered", "correct_bias", "decoupled", "maximize", "merge_dims", "nesterov", "precondition_1d",
    "rectify", "stagger", "transposed",
)  # fmt: skip

#: Numbers that several rules share, and that schedules change.
NUMBERS: dict[str, Constraint] = {
    "lr": (lambda x: _NOT_NEGATIVE[0](float(x) if isinstance(x, Tensor) else x), _NOT_NEGATIVE[1]),
    "betas": (
        lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and all(_is_fraction(b) for b in x),
        "two numbers in [0, 1)",
    ),
    "momentum": fraction(),
    "eps": number(SMALLEST),
    "weight_decay": number(),
}

#: All that rules share. A rule's own stand in its ``constraints``.
SHARED: dict[str, Constraint] = NUMBERS | dict.fromkeys(_SWITCHES, (_is_switch, "True or False")) | {"blocks": count()}

ORTHOGONALIZER: dict[str, Constraint] = {
    "orthogonalizer": (lambda x: x == "exact" or bool(find(x)), f"one of {('exact', *METHODS)} or 'kjN' for N steps")
}

EIGENBASIS: dict[str, Constraint] = {
    "shampoo_beta": optional(fraction()),
    "precondition_frequency": count(),
    "max_precondition_dim": count(),
}
