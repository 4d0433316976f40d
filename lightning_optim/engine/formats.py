"""The format of an optimizer's state dict: its number, and how older ones are brought up to date.

The number follows the name of the rule in each parameter group, ``"rule": "NAMO (format 3)"``. A key of its own would
be easier to find, but no place keeps one:

- at the top of the state dict, ``get_optimizer_state_dict``, FSDP and DeepSpeed drop it: they keep ``"state"`` and
  ``"param_groups"`` only;
- in the parameter groups of the state dict, ``set_optimizer_state_dict`` drops it where the checkpoint is flattened: it
  asks for the keys of the *optimizer's* groups only;
- in those, too, checkpoints that lack the key can no longer be loaded: ``torch.distributed.checkpoint`` asks a folder
  for every key that the optimizer has now;
- in the state, a key that is no parameter ends ``get_optimizer_state_dict`` with a ``KeyError``.

The *value* of a key that was always there survives all of these. And versions of this library that know no format
number take the name for another rule's and refuse it, rather than misread the state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

#: The format that is written.
FORMAT = 3

_NAME = re.compile(r"(?P<rule>.*) \(format (?P<number>\d+)\)", re.DOTALL)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded. The message says what is wrong and what to do."""


def stamped(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with its format number.

    >>> stamped({"state": {}, "param_groups": [{"rule": "NAMO", "params": [0]}]})["param_groups"]
    [{'rule': 'NAMO (format 3)', 'params': [0]}]
    """
    return _with_rules(state_dict, lambda rule: f"{_rule_and_format(rule)[0]} (format {FORMAT})")


def current(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of any known format in the present one, without its number. It is not changed itself.

    Raises:
        CheckpointError: A later version has written it.

    >>> current({"state": {}, "param_groups": [{"rule": "NAMO (format 2)", "params": [0]}]})["param_groups"]
    [{'rule': 'NAMO', 'params': [0]}]
    """
    numbers = {_rule_and_format(group["rule"])[1] for group in state_dict["param_groups"] if "rule" in group}
    unknown = sorted(number for number in numbers if not 1 <= number <= FORMAT)
    if unknown:
        raise CheckpointError(
            f"The checkpoint has format {unknown[-1]}, and this lightning-optim reads formats 1 to {FORMAT}: "
            "a later version has written it. To update: pip install -U lightning-optim."
        )
    state_dict = _with_rules(state_dict, lambda rule: _rule_and_format(rule)[0])
    for number in range(min(numbers, default=FORMAT), FORMAT):
        state_dict = MIGRATIONS[number](state_dict)
    return state_dict


def _rule_and_format(rule: Any) -> tuple[Any, int]:
    """A rule's name and the format behind it; version 0.1.0, whose format is 1, wrote the name alone.

    So do other writers that take the parameter groups as they are, such as DeepSpeed, whatever the version: a migration
    must leave alone what is up to date.
    """
    found = _NAME.fullmatch(rule) if isinstance(rule, str) else None
    return (found["rule"], int(found["number"])) if found else (rule, 1)


def _with_rules(state_dict: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    groups = [
        {**group, "rule": change(group["rule"])} if isinstance(group, Mapping) and "rule" in group else group
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


# --- migrations -------------------------------------------------------------------------------------------------


def _counts_to_integers(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Step counts were float32, which cannot count beyond 2^24."""
    state = {key: {**x, "step": whole(x["step"])} if "step" in x else x for key, x in state_dict["state"].items()}
    return {**state_dict, "state": state}


def whole(count: Any) -> Any:
    """A step count as an integer tensor; anything else as it is, to be refused where state is compared.

    >>> whole(torch.tensor(3.0))
    tensor(3)
    """
    if not isinstance(count, Tensor) or count.ndim:
        return count
    value = count.item()
    fits = isinstance(value, (int, float)) and 0 <= value < 2**62 and value == int(value)
    return count.to(torch.int64) if fits else count


def _decay_by_name(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The form of weight decay was a switch ``decoupled``, of some optimizers."""
    groups = [
        {**{key: x for key, x in group.items() if key != "decoupled"}, "decay": form}
        if isinstance(group, Mapping) and (form := _FORMS.get(group.get("decoupled"))) and "decay" not in group
        else group
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


_FORMS: dict[Any, str] = {True: "decoupled", False: "coupled"}

#: From each format to the next one.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _counts_to_integers, 2: _decay_by_name}
