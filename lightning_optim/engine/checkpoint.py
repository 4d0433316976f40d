"""Whether a checkpoint fits an optimizer, and if not, why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import processes
from ..names import clean_name
from . import formats
from .formats import CheckpointError as CheckpointError

#: Keys of a parameter group that say how its parameters are treated, ...
STRUCTURE = ("rule", "role", "blocks", "transposed", "split", "interleaved", "decoupled_weight_decay")
#: ... what they are called, ...
LABELS = ("params", "param_names", "name")
#: ... and what schedules store there. All other keys are hyperparameters.
SCHEDULED = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")

_REMEDY = (
    "Build model and optimizer as in the run that wrote the checkpoint, let this optimizer take over what it can "
    "(--resume.change_optimizer true, lightning_optim.carry_over), or load only the model's weights and begin with a "
    "new optimizer."
)


def matched(optimizer: Optimizer, state_dict: Any) -> dict[str, Any]:
    """A checkpoint of any format in the present one, its groups and parameters in the order of an optimizer's.

    Parameters are found by name where both sides have names, whatever the module is or was wrapped in
    (:func:`.clean_name`), otherwise by position.

    Args:
        optimizer: Any torch optimizer.
        state_dict: What its ``state_dict()`` has returned earlier.

    Returns:
        The state dict, reordered. Hyperparameters that it lacks are those of the optimizer.

    Raises:
        CheckpointError: It is of another optimizer, of other parameters, of other groups of them, or of a later format.

    Example:
        >>> a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in "ab")
        >>> saved = torch.optim.SGD([("a", a), ("b", b)], lr=0.1).state_dict()
        >>> matched(torch.optim.SGD([("b", b), ("a", a)], lr=0.1), saved)["param_groups"][0]["params"]
        [1, 0]
        >>> try:
        ...     matched(torch.optim.SGD([("b", b), ("c", a)], lr=0.1), saved)
        ... except CheckpointError as error:
        ...     print(str(error).rpartition("Build")[0])
        The checkpoint does not fit this SGD.
        Only in the checkpoint: a.
        Not in the checkpoint: c.
        <BLANKLINE>
    """
    check_form(state_dict)
    state_dict = formats.current(state_dict)
    name = type(optimizer).__name__
    here, saved = with_clean_names(optimizer.param_groups), with_clean_names(state_dict["param_groups"])
    _check_author(name, here, saved)
    named = all("param_names" in group for group in (*here, *saved))
    origins = (_by_name if named else _by_position)(name, here, saved)
    groups = []
    for group, built, i in zip(here, optimizer.param_groups, origins):
        hyperparameters = {key: value for key, value in group.items() if key not in (*LABELS, "initial_lr")}
        merged = hyperparameters | dict(saved[i])
        if named:
            keys = dict(zip(saved[i]["param_names"], saved[i]["params"]))
            merged |= {"params": [keys[n] for n in group["param_names"]], "param_names": list(built["param_names"])}
        groups.append(merged)
    return {**state_dict, "param_groups": groups}


def with_clean_names(groups: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The groups with names that no wrapper has changed, unless two parameters would then have the same."""
    if not all("param_names" in group for group in groups):
        return groups
    cleaned = [{**group, "param_names": [clean_name(name) for name in group["param_names"]]} for group in groups]
    names = [name for group in cleaned for name in group["param_names"]]
    return cleaned if len({*names}) == len(names) else groups


def check_state(saved: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Compare the saved state of parameters with what it has to be.

    Args:
        saved: For each parameter, by its label, its state in the checkpoint. Entries that a wrapper
            keeps there under names of its own are ignored.
        expected: By label, tensors of the right names, shapes, dtypes and placements; their values do not matter.

    Raises:
        CheckpointError: A tensor is missing, of another shape or dtype, or sharded otherwise.
    """
    problems = {name: _state_problems(state, expected[name]) for name, state in saved.items()}
    if found := [f"{name} ({problem})" for name, problem in problems.items() if problem]:
        raise CheckpointError(f"The checkpoint's state does not fit the parameters: {several(found)}. {_REMEDY}")


def _state_problems(saved: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str:
    problems = [f"{name} is missing" for name in expected if name not in saved]
    if problems:
        problems += [f"{name} is unknown" for name in saved if name not in expected]
    for name, x in expected.items():
        value = saved.get(name, x)
        if not isinstance(value, Tensor):
            problems.append(f"{name} is a {type(value).__name__} instead of a tensor")
        elif value.shape != x.shape:
            problems.append(f"{name} is of shape {tuple(value.shape)} instead of {tuple(x.shape)}")
        elif x.dtype == torch.int64 and formats.whole(value).dtype != torch.int64:
            problems.append(f"{name} is {value.item()} instead of a whole number")
        elif not _converts(value.dtype, x.dtype):
            problems.append(f"{name} is {_short(value.dtype)} instead of {_short(x.dtype)}")
        elif processes.placements(value) not in (None, processes.placements(x)):
            problems.append(f"{name} has placements {processes.placements(value)} instead of {processes.placements(x)}")
    return ", ".join(problems)


def _converts(saved: torch.dtype, expected: torch.dtype) -> bool:
    """Whether state of one dtype is taken for another: another precision of the parameters, and counts as floats."""
    wide = (torch.float32, torch.float64)
    return saved == expected or expected == torch.int64 or (saved in wide and expected in wide)


def label(group: Mapping[str, Any], i: int, j: int) -> str:
    """What to call the ``j``-th parameter of the ``i``-th group: its name, or its place and shape."""
    if "param_names" in group:
        return group["param_names"][j]
    return f"parameter {j} of group {i}, of shape {tuple(group['params'][j].shape)}"


def check_form(state_dict: Any) -> None:
    if not _has_form(state_dict):
        raise CheckpointError(f"This is not an optimizer's checkpoint. {_REMEDY}")


def _has_form(state_dict: Any) -> bool:
    if not isinstance(state_dict, Mapping):
        return False
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        return False
    keys: list[Any] = []
    for group in groups:
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            return False
        names = group.get("param_names", [str(key) for key in group["params"]])
        if not isinstance(names, list) or len(names) != len(group["params"]):
            return False
        if not all(isinstance(name, str) for name in [group.get("rule", ""), *names]):
            return False
        if not all(isinstance(group.get(key, ""), (str, int, tuple, list)) for key in STRUCTURE):
            return False
        keys += group["params"]
    return (
        all(isinstance(key, (int, str)) for key in keys)
        and len({*keys}) == len(keys)
        and all(isinstance(x, Mapping) for x in state.values())
    )


def _check_author(name: str, here: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a checkpoint of another optimizer, as far as the keys of its groups show that it is one."""
    rules_here, rules_saved = ({group.get("rule") for group in groups} for groups in (here, saved))
    keys_here, keys_saved = ({key for group in groups for key in group} - {*SCHEDULED} for groups in (here, saved))
    odd, lacking = sorted(keys_saved - keys_here - {*LABELS}), sorted(keys_here - keys_saved - {*LABELS})
    lacking = [key for key in lacking if not str(key).startswith("__")]  # what optimizers keep there for themselves
    if rules_here.isdisjoint(rules_saved) or (odd and lacking):
        rules = " and ".join(sorted(repr(rule) for rule in rules_saved if rule))
        author = f"an optimizer with rule {rules}" if rules else "another optimizer"
        details = f" Its groups have {', '.join(odd)} and no {', '.join(lacking)}." if odd and lacking else ""
        raise CheckpointError(f"The checkpoint was written by {author} and does not fit {name}.{details} {_REMEDY}")


def _by_name(optimizer: str, here: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[int]:
    """For each group the index of the saved group with the same parameters."""
    now, then = ({n: i for i, group in enumerate(groups) for n in group["param_names"]} for groups in (here, saved))
    # A group is the saved one of its name, else that with most of its parameters: the difference is the smaller part.
    origin: dict[int, int] = {}
    shared = Counter((now[n], then[n]) for n in now if n in then)
    for i, j in sorted(shared, key=lambda ij: (_group_name(here, ij[0]) != _group_name(saved, ij[1]), -shared[ij])):
        if i not in origin and j not in origin.values():
            origin[i] = j
    kept = [n for n in now if n in then]
    changes = {n: _changes(here[now[n]], saved[then[n]]) for n in kept}
    moved = [n for n in kept if not changes[n] and origin.get(now[n]) != then[n]]
    differences = {
        "Only in the checkpoint": [n for n in then if n not in now],
        "Not in the checkpoint": [n for n in now if n not in then],
        "Treated otherwise": [f"{n} ({change})" for n, change in changes.items() if change],
        "Grouped otherwise": [
            f"{n} ({_group_name(saved, then[n])} in the checkpoint, {_group_name(here, now[n])})" for n in moved
        ],
    }
    lines = [f"{what}: {several(names)}." for what, names in differences.items() if names]
    if lines:
        raise CheckpointError("\n".join([f"The checkpoint does not fit this {optimizer}.", *lines, _REMEDY]))
    return [origin[i] for i in range(len(here))]


def _by_position(optimizer: str, here: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[int]:
    sizes_here, sizes_saved = ([len(group["params"]) for group in groups] for groups in (here, saved))
    if sizes_here != sizes_saved:
        raise CheckpointError(
            f"The checkpoint does not fit this {optimizer}: its groups hold {_sum_of(sizes_saved)} parameters, "
            f"those here {_sum_of(sizes_here)}. {_REMEDY} With named parameters, as build_optimizer gives them, this "
            "message says which."
        )
    for i, (group, then) in enumerate(zip(here, saved)):
        if changes := _changes(group, then):
            raise CheckpointError(f"The checkpoint does not fit this {optimizer}. Group {i}: {changes}. {_REMEDY}")
    return list(range(len(here)))


def _changes(here: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {saved[key]!r} in the checkpoint, {here[key]!r} here"
        for key in STRUCTURE
        if key in here and key in saved and here[key] != saved[key]
    )


def _group_name(groups: Sequence[Mapping[str, Any]], i: int) -> str:
    return f"group {groups[i].get('name', i)!r}"


def _sum_of(values: Sequence[int]) -> str:
    return " + ".join(map(str, values)) or "no"


def several(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
