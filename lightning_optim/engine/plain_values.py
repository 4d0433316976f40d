"""Plain values in place of those of configuration libraries."""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from decimal import Decimal
from enum import Enum
from numbers import Integral, Real
from typing import Any

from torch import Tensor

_SCALARS = (float, int, bool, str, type(None))
_INTEGER = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def plain_hyperparameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as :func:`plain` makes them, with tuples in place of lists.

    >>> plain_hyperparameters({"lr": "1e-3", "betas": [0.9, 0.98]})
    {'lr': 0.001, 'betas': (0.9, 0.98)}
    """
    values = {name: plain(value) for name, value in values.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def plain(x: Any) -> Any:
    """The same value made of Python's own numbers, strings, lists, tuples and dictionaries.

    Configuration libraries pass lists, mappings and numbers of types of their own (OmegaConf and Hydra,
    ml_collections, NumPy, ruamel.yaml, ...), which a checkpoint must not hold. YAML 1.1 reads ``1e-3`` as a string, so
    a string that is written as a number becomes one. Objects that only hold settings (dataclasses, attrs, pydantic,
    namespaces) become dictionaries of them. Sequences that are no lists become tuples. Tensors and all other objects
    stay as they are.

    >>> import numpy
    >>> plain({"lr": "1e-3", "betas": numpy.array([0.5, 0.75]), "nesterov": numpy.True_, "fallback": "AdamW"})
    {'lr': 0.001, 'betas': (0.5, 0.75), 'nesterov': True, 'fallback': 'AdamW'}
    """
    if x is None or isinstance(x, (bool, Tensor, type)):
        return x
    if isinstance(x, Enum):
        return plain(x.value)
    if isinstance(x, str):
        if _INTEGER.fullmatch(x):
            return int(x)
        return float(x) if _NUMBER.fullmatch(x) else str(x)  # a str and none of its subclasses
    if isinstance(x, Integral):
        return int(x)
    if isinstance(x, (Real, Decimal)):
        return float(x)
    if hasattr(x, "dtype") and hasattr(x, "tolist"):  # NumPy's scalars and arrays
        values = x.tolist()
        return tuple(map(plain, values)) if isinstance(values, list) else plain(values)
    if (names := _settings(x)) is not None:
        return {name: plain(getattr(x, name)) for name in names}
    if isinstance(x, Mapping) or (hasattr(x, "keys") and hasattr(x, "__getitem__")):
        return {key: plain(x[key]) for key in x.keys()}  # noqa: SIM118 (ml_collections' have keys only)
    if isinstance(x, list):
        return [plain(value) for value in x]
    if isinstance(x, Sequence) and not isinstance(x, (bytes, bytearray, range)):
        return tuple(map(plain, x))
    return x


def is_plain(x: Any) -> bool:
    """Whether a hyperparameter is what :func:`plain` makes of it, or a list of such values.

    >>> import numpy
    >>> is_plain(0.1), is_plain([0.9, 0.99]), is_plain(numpy.float64(0.1)), is_plain((0.9, numpy.float32(0.5)))
    (True, True, False, False)
    """
    if type(x) in (list, tuple):
        return all(type(value) in _SCALARS for value in x)
    return type(x) in _SCALARS or isinstance(x, Tensor)


def _settings(x: Any) -> Iterable[str] | None:
    """The names of the settings of an object that holds nothing else."""
    if isinstance(x, (argparse.Namespace, types.SimpleNamespace)):  # jsonargparse's, too, whose keys are all leaves
        return vars(x)
    if is_dataclass(x):
        return [f.name for f in fields(x)]
    if hasattr(x, "__attrs_attrs__"):
        return [attribute.name for attribute in x.__attrs_attrs__]
    return getattr(type(x), "model_fields", None)  # pydantic
