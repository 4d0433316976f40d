"""State that one optimizer takes over from another one's checkpoint.

What a state tensor means is declared by :attr:`.rule.Rule.moments`. A tensor is kept where both rules have one of the
same meaning. Averages that start at zero share one step count for bias correction, and an old average next to a new one
would be far too large or too small. So a rule that uses the count gets all of its state or starts from zero; one that
does not, such as Muon, keeps whatever the checkpoint has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint, formats
from .checkpoint import CheckpointError
from .layout import layout_of, parts_of, to_blocks
from .optimizer import RuleOptimizer
from .rounding import RESIDUAL
from .rule import LIKE_PARAMETER, RULES, ElementwiseRule, MatrixRule, Rule, hyperparameters_of
from .state import compute_dtype, expected_state, new_state, real_view, state_shapes

__all__ = ["carried", "carry_over"]

#: The state of torch's Adam and AdamW.
_TORCH = {"exp_avg": ("g", "beta1"), "exp_avg_sq": ("g^2", "beta2")}
_ANEW = "begins anew"


def carry_over(optimizer: Optimizer, state_dict: Mapping[str, Any], module: nn.Module | None = None) -> str:
    """Load what an optimizer can use of another optimizer's checkpoint.

    Parameters are found by name. State of the same meaning is kept, with the step count, and the rest begins anew.
    Hyperparameters stay those of ``optimizer``; where the checkpoint's learning rate was scheduled, the new one
    continues at the same fraction of its highest. A checkpoint of the same optimizer is loaded as ``load_state_dict``
    does.

    Args:
        optimizer: A new optimizer of this library, or of torch, with named parameters, as from
            :func:`~lightning_optim.build_optimizer`.
        state_dict: What the ``state_dict()`` of the other optimizer has returned.
        module: The module. In a checkpoint without names, parameters are identified by their order in it.

    Returns:
        What was kept and what begins anew, in words.

    Raises:
        CheckpointError: It is not an optimizer's checkpoint, or parameters cannot be found by name.

    Example:
        >>> import torch, lightning_optim
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> before = torch.optim.AdamW(net.parameters())
        >>> net(torch.randn(3, 4)).sum().backward(); before.step()
        >>> after = lightning_optim.build_optimizer(net, "NAMO")
        >>> print(carry_over(after, before.state_dict(), net))
        NAMO takes over from torch's Adam.
        torch's Adam to AdamW, 4 parameters: m and v are kept.
        torch's Adam to NAMO, 2 parameters: m and v are kept.
    """
    state, said = carried(optimizer, state_dict, module)
    optimizer.load_state_dict(state)
    return said


def carried(
    optimizer: Optimizer, state_dict: Mapping[str, Any], module: nn.Module | None = None
) -> tuple[dict[str, Any], str]:
    """What :func:`carry_over` loads, and what it says; an empty text where the checkpoint is loaded as it is."""
    if _fits(optimizer, state_dict):
        return dict(state_dict), ""
    saved = formats.current(dict(state_dict))
    then = _by_name(saved["param_groups"], module)
    names = _names_here(optimizer)
    fresh = optimizer.state_dict()
    outcomes: Counter[tuple[str, str, str]] = Counter()
    new: dict[Any, Any] = {}
    for group, plain in zip(optimizer.param_groups, fresh["param_groups"]):
        scheduled: Mapping[str, Any] = {}
        for p, key, name in zip(group["params"], plain["params"], names[id(group)]):
            if name not in then:
                continue
            old_key, old_group = then[name]
            scheduled = scheduled or old_group
            old = saved["state"].get(old_key) or {}
            state, outcome = _state(optimizer, p, group, old, old_group) if old else ({}, "")
            if state:
                new[key] = state
            if outcome:
                outcomes[_name(old_group, old), _rule_name(optimizer, group), outcome] += 1
        if "initial_lr" in scheduled:
            plain["initial_lr"] = plain.get("initial_lr", plain["lr"])
            plain["lr"] = plain["initial_lr"] * _fraction(scheduled)
    here = [name for each in names.values() for name in each]
    return {**fresh, "state": new}, _words(type(optimizer).__name__, outcomes, here, list(then))


def _fits(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> bool:
    """Whether the checkpoint can be loaded as it is."""
    checkpoint.check_form(state_dict)
    try:
        found = checkpoint.matched(optimizer, dict(state_dict))
        if isinstance(optimizer, RuleOptimizer):
            optimizer._loaded_state(found)
    except CheckpointError:
        return False
    return True


def _by_name(groups: Sequence[Mapping[str, Any]], module: nn.Module | None) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """For each parameter of a checkpoint its key and its group."""
    if not all("param_names" in group for group in groups):
        keys = [key for group in groups for key in group["params"]]
        every = list(module.named_parameters()) if module is not None else []
        trained = [(name, p) for name, p in every if p.requires_grad]
        fitting = next((named for named in (every, trained) if named and len(named) == len(keys)), None)
        if fitting is None or len(groups) != 1:
            raise CheckpointError(
                f"The checkpoint's {len(keys)} parameters in {len(groups)} group(s) have no names, by which another "
                "optimizer finds them. Without names it takes one group of all parameters of the module, in its order, "
                "and the module."
            )
        groups = [{**groups[0], "param_names": [name for name, _ in fitting]}]
    groups = checkpoint.with_clean_names(groups)
    return {name: (key, group) for group in groups for name, key in zip(group["param_names"], group["params"])}


def _names_here(optimizer: Optimizer) -> dict[int, list[str]]:
    groups = optimizer.param_groups
    if not all("param_names" in group for group in groups):
        raise CheckpointError(
            f"The parameters of this {type(optimizer).__name__} have no names, by which those of another optimizer's "
            "checkpoint are found: build it with lightning_optim.build_optimizer, or of (name, parameter) pairs."
        )
    return {id(group): clean["param_names"] for group, clean in zip(groups, checkpoint.with_clean_names(groups))}


def _fraction(group: Mapping[str, Any]) -> float:
    """How far a schedule has lowered the learning rate of a group."""
    highest = float(group["initial_lr"])
    return float(group["lr"]) / highest if highest else 1.0


# --- state ------------------------------------------------------------------------------------------------------------


def _state(
    optimizer: Optimizer, p: Tensor, group: Mapping[str, Any], old: Mapping[str, Any], old_group: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """The new state of a parameter, empty if there is nothing to keep, and in words what is kept."""
    available = _available(p, old, old_group)
    count = int(old["step"]) if "step" in old else 0
    if not isinstance(optimizer, RuleOptimizer):
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or group.get("amsgrad") or p.is_complex():
            return {}, _ANEW
        found = _found(_TORCH, dict.fromkeys(_TORCH, LIKE_PARAMETER), p, group, group, available, count)
        if len(found) < len(_TORCH):
            return {}, _ANEW
        return {"step": torch.tensor(float(count)), **found}, _kept(found, _TORCH)
    rule = optimizer.rule(group)
    residual = {RESIDUAL: old[RESIDUAL]} if RESIDUAL in old else {}
    if whole := _same_state(rule, p, group, old, old_group):
        return whole, "all state is kept"
    shapes = state_shapes(rule, real_view(p), group)
    found = _found(rule.moments, shapes, p, group, vars(hyperparameters_of(rule, group)), available, count)
    complete = len(found) == len(shapes) and not rule.host_state and issubclass(rule, (ElementwiseRule, MatrixRule))
    if not found or not (complete or not _counts(rule, p, group)):
        found = {}
    if not found and not residual:
        return {}, _ANEW if shapes else ""
    state = dict(new_state(rule, torch.empty_like(p, device=p.device), group)) | found | residual
    if found:
        state["step"] = torch.tensor(count, dtype=torch.int64)
    return state, _kept(found, shapes)


def _same_state(
    rule: type[Rule], p: Tensor, group: Mapping[str, Any], old: Mapping[str, Any], old_group: Mapping[str, Any]
) -> dict[str, Any]:
    """The old state where the rule is the same and it fits as it is."""
    if old_group.get("rule") != rule.name or not issubclass(rule, (ElementwiseRule, MatrixRule)):
        return {}
    if layout_of(old_group) != layout_of(group):
        return {}
    try:
        checkpoint.check_state({"": old}, {"": expected_state(rule, p, group, old)})
    except CheckpointError:
        return {}
    return dict(old)


def _available(p: Tensor, old: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, tuple[Tensor, float]]:
    """By meaning, the averages in a parameter's old state and their decays."""
    if "rule" in group:
        rule = RULES.get(group["rule"])
        if rule is None:
            return {}
        moments, h = rule.moments, vars(hyperparameters_of(rule, group))
    elif _TORCH.keys() <= old.keys() and "betas" in group:
        moments, h = _TORCH, dict(zip(("beta1", "beta2"), group["betas"]))
    else:
        return {}
    found: dict[str, tuple[Tensor, float]] = {}
    for name, (meaning, decay) in moments.items():
        x = old.get(name)
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):  # not codes of 8 bits
            found[meaning] = (real_view(x).to(compute_dtype(p.dtype)), float(h[decay]))
    return found


def _found(
    moments: Mapping[str, tuple[str, str]],
    shapes: Mapping[str, Any],
    p: Tensor,
    group: Mapping[str, Any],
    h: Mapping[str, Any],
    available: Mapping[str, tuple[Tensor, float]],
    count: int,
) -> dict[str, Tensor]:
    """Those of a rule's state tensors that are available."""
    if "betas" in h and "beta1" not in h:
        h = {**h, "beta1": h["betas"][0], "beta2": h["betas"][1]}
    found = {}
    for name, (meaning, decay) in moments.items():
        if name not in shapes or meaning not in available or count < 1:
            continue
        x, before = available[meaning]
        value = _shaped(x, shapes[name], p, group)
        if value is None:
            continue
        now = float(h[decay])
        if now != before:  # The corrected average, by 1 - decay^t, stays the same.
            value = value * ((1 - now**count) / (1 - before**count) if before < 1 and now < 1 else 1.0)
        found[name] = value.clone()
    return found


def _shaped(x: Tensor, shape: Any, p: Tensor, group: Mapping[str, Any]) -> Tensor | None:
    """An average in the shape of a state tensor: itself, or sums over the axes along which that has one entry."""
    whole = real_view(p).shape
    if shape is LIKE_PARAMETER:
        return x if x.shape == whole else None
    if x.shape != whole:
        return _summed(x, shape)
    (part, *others) = parts_of(whole, group)
    if others or not part.whole:
        return None  # Of unequal matrices in one tensor.
    return _summed(to_blocks(x, group).flatten(2), (part.blocks, *shape[1:]))


def _summed(x: Tensor, shape: Sequence[int]) -> Tensor | None:
    if x.ndim != len(shape) or any(a != b and b != 1 for a, b in zip(x.shape, shape)):
        return None
    axes = [i for i, (a, b) in enumerate(zip(x.shape, shape)) if a != b]
    return x.sum(axes, keepdim=True) if axes else x


def _counts(rule: type[Rule], p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the updates of a rule depend on the number of steps."""
    if rule.host_state or not issubclass(rule, (ElementwiseRule, MatrixRule)):
        return True
    h = hyperparameters_of(rule, {**group, "lr": 1.0})
    details = (parts_of(p.shape, group)[0].shape,) if issubclass(rule, MatrixRule) else ()
    return rule.scalars(2, h, *details) != rule.scalars(1000, h, *details)


# --- words ------------------------------------------------------------------------------------------------------------


def _name(group: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    if "rule" in group:
        return str(group["rule"])
    return "torch's Adam" if _TORCH.keys() <= state.keys() else "another optimizer"


def _rule_name(optimizer: Optimizer, group: Mapping[str, Any]) -> str:
    return optimizer.rule(group).name if isinstance(optimizer, RuleOptimizer) else type(optimizer).__name__


def _kept(found: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    if not found:
        return _ANEW
    rest = [name for name in names if name not in found]
    kept = f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'} kept"
    return f"{kept}, {' and '.join(rest)} {'begins' if len(rest) == 1 else 'begin'} anew" if rest else kept


def _words(name: str, outcomes: Counter[tuple[str, str, str]], here: list[str], then: list[str]) -> str:
    sources = list(dict.fromkeys(old for old, _, _ in outcomes)) or ["an optimizer without state"]
    lines = [f"{name} takes over from {' and '.join(sources)}."]
    for (old, new, outcome), count in sorted(outcomes.items()):
        lines.append(f"{old} to {new}, {count} {'parameter' if count == 1 else 'parameters'}: {outcome}.")
    for what, names in (
        ("Only in the checkpoint", [n for n in then if n not in {*here}]),
        ("Not in the checkpoint, begin anew", [n for n in here if n not in {*then}]),
    ):
        if names:
            lines.append(f"{what}: {checkpoint.several(names)}.")
    return "\n".join(lines)
