"""Values of a hyperparameter for the tests, good and bad, from its declaration.

Whether a value is good is asked of the declared constraint; no hyperparameter needs a list of its own.
"""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

import torch
from hypothesis import strategies as st

from lightning_optim.engine.hyperparameters import Field, satisfies
from lightning_optim.engine.rule import Rule, as_attributes, buffers_of

Strategy = st.SearchStrategy[Any]


def thousandths(least: float, most: float) -> Strategy:
    """Numbers that are zero or not tiny: of a decay rate of 1e-14 what is left after a difference is rounding."""
    return st.floats(least, most).map(lambda x: round(x, 3))


_NAN, _INF = float("nan"), float("inf")
#: Numbers at the bounds of what is allowed, and between.
_NUMBERS = [0.0, 1e-18, 1e-8, 1e-3, 0.1, 0.5, 0.95, 0.9999999, 1.0, 100.0]
_WHOLE = [1, 2, 3]
#: What is wrong for some hyperparameter or other.
_SUSPECTS: list[Any] = [
    *(_NAN, _INF, -_INF, -1e-9, -0.1, -1.0, 0, 0.0, 1e-30, 1, 1.0, 1.5, 2.5, 1e20, 1e30, None, True, False),
    *("a tenth", "sometimes", "kj0", "svd", ("exact",), torch.tensor(_NAN), torch.ones(2)),
    *((1.0, 0.9), (0.9, -0.1), (0.9, _NAN), (0.9,), (0.9, 0.9, 0.9), "ab"),
]

#: Hyperparameters that mean the same everywhere: usual values, and extreme ones.
_SHARED: dict[str, tuple[Strategy, Strategy]] = {
    "lr": (st.just(0.01), st.sampled_from([0.0, 1e-18, 1e-3, 0.1, 1.0, torch.tensor(0.01)])),
    "betas": (
        st.tuples(thousandths(0, 0.99), thousandths(0.1, 0.999)),
        st.tuples(st.sampled_from([0.0, 0.5, 0.9, 0.999]), st.sampled_from([0.0, 0.5, 0.99, 0.999, 0.9999999])),
    ),
    "eps": (st.sampled_from([1e-8, 1e-4]), st.sampled_from([1e-18, 1e-16, 1e-8, 1e-3, 1.0])),
    "weight_decay": (st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 1e-18, 1e-3, 0.1, 1.0])),
    "orthogonalizer": (st.sampled_from(["exact", "kj5", "kj5-schatten"]),) * 2,
}


def choices(field: Field) -> list[Any] | None:
    """All values of a switch or a choice, else ``None``."""
    found: list[Any] = []
    union = get_origin(field.annotation) in (Union, types.UnionType)
    for kind in get_args(field.annotation) if union else (field.annotation,):
        if get_origin(kind) is Literal:
            found += get_args(kind)
        elif kind is bool:
            found += [False, True]
        elif kind is type(None):
            found.append(None)
        else:
            return None
    return found


def is_decay_rate(field: Field) -> bool:
    """Whether its values are from 0 to less than 1."""
    return satisfies(field.constraint, 0.9999999) and not satisfies(field.constraint, 1.0)


def usual(field: Field) -> Strategy:
    """Values with which a few steps are well conditioned: around the default, and every choice."""
    if field.name in _SHARED:
        return _SHARED[field.name][0]
    if (known := choices(field)) is not None:
        return st.sampled_from(known)
    good = [x for x in _NUMBERS if satisfies(field.constraint, x)]
    if not good:
        good = [x for x in _WHOLE if satisfies(field.constraint, x)]
        _require(field, good)
        return st.integers(1, 4).filter(lambda x: satisfies(field.constraint, x))
    default = field.default or 0.0
    if is_decay_rate(field):
        numbers = thousandths(0, 0.99)
    elif default:
        numbers = st.floats(*sorted((default / 4, default * 4)))
    else:
        numbers = thousandths(0, 1)
    numbers = numbers.filter(lambda x: satisfies(field.constraint, x))
    return st.none() | numbers if satisfies(field.constraint, None) else numbers


def extreme(field: Field) -> Strategy:
    """Any good value, at the bounds too."""
    if field.name in _SHARED:
        return _SHARED[field.name][1]
    if (known := choices(field)) is not None:
        return st.sampled_from(known)
    good = [x for x in [*_NUMBERS, None] if satisfies(field.constraint, x)]
    if is_decay_rate(field):
        good = [x for x in good if not x or x > 1e-7]  # What float32 loses beside 1 is 0 to the rule.
    if good in ([], [None]):
        good += [x for x in _WHOLE if satisfies(field.constraint, x)]
    _require(field, good)
    return st.sampled_from(good)


def _require(field: Field, good: list[Any]) -> None:
    if not good:
        raise TypeError(
            f"No values of the hyperparameter {field.name!r} ({field.constraint[1]}) are known to the tests: give some "
            "as `trajectory` and `fuzz` in the optimizer's row."
        )


def bad(field: Field) -> list[Any]:
    """Values that its constraint does not allow; none for one that is checked elsewhere."""
    return [x for x in _SUSPECTS if not satisfies(field.constraint, x)]


def decides_on_state(rule: type[Rule], name: str) -> bool:
    """Whether a hyperparameter may not change after the first step."""
    if name in rule.fixed:
        return True
    field = rule.fields[name]
    tried = choices(field) or [x for x in [*_NUMBERS, 1, 5, 10000] if satisfies(field.constraint, x)]
    if name in _SHARED or not tried:
        return False
    shapes = [(4, 6), (4, 2, 3, 3), (5,)] if not getattr(rule, "flatten", True) else [(4, 6), (4, 2, 3, 3)]
    known = {
        str([buffers_of(rule, shape, as_attributes(rule.hyperparameters() | {name: x})) for shape in shapes])
        for x in tried
    }
    return len(known) > 1
