"""Constraints on hyperparameters: a predicate, and a description for error messages."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

from torch import Tensor

from ..polar import METHODS, find

Constraint: TypeAlias = tuple[Callable[[Any], bool], str]

#: Products of a few numbers up to ``LARGEST`` stay finite in float32, and so do quotients by numbers down to
#: ``SMALLEST``, also where gradients are so small that their squares underflow.
LARGEST, SMALLEST = 1e10, 1e-18


def number(least: float = 0.0, most: float = LARGEST) -> Constraint:
    """A number in a closed interval."""
    return lambda x: is_number(x) and least <= x <= most, f"a number in [{least:g}, {most:g}]"


def fraction() -> Constraint:
    """A number from 0 to less than 1."""
    return _is_fraction, "a number in [0, 1)"


def count() -> Constraint:
    """A whole number from 1."""
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 1, "a whole number >= 1"


def counts() -> Constraint:
    """Several whole numbers from 1."""
    one = count()[0]
    return lambda x: isinstance(x, (tuple, list)) and len(x) > 0 and all(map(one, x)), "several whole numbers >= 1"


def one_of(*values: Any) -> Constraint:
    """One of a few values."""
    return lambda x: x in values, f"one of {values}"


def switch() -> Constraint:
    """True or False."""
    return lambda x: isinstance(x, bool), "True or False"


def anything() -> Constraint:
    """Any value: it is checked where it is used."""
    return lambda x: True, "anything"


def optional(constraint: Constraint) -> Constraint:
    """``None``, or what a constraint says."""
    holds, what = constraint
    return lambda x: x is None or holds(x), f"None or {what}"


def satisfies(constraint: Constraint, x: Any) -> bool:
    """Whether a value, of any type, fulfils a constraint.

    >>> satisfies(number(), 0.1), satisfies(number(), float("nan")), satisfies(number(), "0.1")
    (True, False, False)
    """
    try:
        return bool(constraint[0](x))
    except (TypeError, ValueError, RuntimeError):
        return False


def is_number(x: Any) -> bool:
    """Whether a value is a number, and no switch."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_fraction(x: Any) -> bool:
    return is_number(x) and 0 <= x < 1


_NOT_NEGATIVE = number()

#: Constraints on numbers that several rules share and schedules change.
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

#: Constraints on entries of any parameter group: numbers that schedules set, and the layout of its parameters.
GROUP_ENTRIES: dict[str, Constraint] = NUMBERS | {
    "maximize": switch(),
    "blocks": count(),
    "transposed": switch(),
    "split": counts(),
    "interleaved": switch(),
}

#: Constraints on fields by name, unless their annotation has another.
_BY_NAME: dict[str, Constraint] = NUMBERS | {
    "decoupled": switch(),
    "orthogonalizer": (lambda x: x == "exact" or bool(find(x)), f"one of {('exact', *METHODS)} or 'kjN' for N steps"),
}


@dataclass(frozen=True)
class Field:
    """A hyperparameter as an algorithm declares it.

    Args:
        name: Its name.
        annotation: Its type, without what :data:`typing.Annotated` adds.
        default: Its default.
        constraint: The constraint on its values.
        kw_only: Whether it can only be given by name.
    """

    name: str
    annotation: Any
    default: Any
    constraint: Constraint
    kw_only: bool = False

    @classmethod
    def declared(cls, name: str, annotation: Any, default: Any, inherited: Field | None = None) -> Field:
        """A field from its annotation and default, which may be a :func:`dataclasses.field`.

        The constraint is the one in ``Annotated[..., constraint]``, else that of the type (``bool``, ``Literal``), else
        that of the name (``lr``, ``betas``, ...), else that of the ``inherited`` field which this one overrides.
        ``X | None`` also allows ``None``.

        >>> Field.declared("clamp", Annotated[float | None, number(0, 1)], None).constraint[1]
        'None or a number in [0, 1]'

        Raises:
            TypeError: No constraint is found.
        """
        constraint = None
        if get_origin(annotation) is Annotated:
            annotation, constraint = get_args(annotation)
        kw_only = inherited is not None and inherited.kw_only
        if isinstance(default, dataclasses.Field):
            default, kw_only = default.default, default.kw_only is True
        types_ = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
        if constraint is None and len(types_) == 1:
            if get_origin(annotation) is Literal:
                constraint = one_of(*get_args(annotation))
            elif annotation is bool:
                constraint = switch()
        constraint = constraint or _BY_NAME.get(name) or (inherited.constraint if inherited else None)
        if constraint is None:
            raise TypeError(
                f"Nothing says what values {name!r} may take: annotate it, for instance "
                f"{name}: Annotated[float, number()]."
            )
        if type(None) in types_:
            constraint = optional(constraint)
        return cls(name, annotation, default, constraint, kw_only)
