"""Parameters that are added to an optimizer during training, such as by Lightning's finetuning callbacks."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from .engine.optimizer import RuleOptimizer
from .engine.two_rules import MatrixOptimizer
from .grouping import Grouping, is_exempt, marked_parameters
from .routing import clean_name

_ADDED = "added-"


class AddedGroups:
    """Router of an optimizer: gives added parameters their names, rules and weight decay.

    What is added as one group becomes several, one after another. A learning rate that comes with them is that of the
    optimizer's first group, from which callbacks take it, and parameters of the other rule get it in proportion. The
    last of the groups has the first group's rule where it can: ``BackboneFinetuning`` sets the learning rate of the
    last group in later epochs, and the others follow.

    Args:
        optimizer: The optimizer.
        module: The module whose parameters it trains.
        grouping: As for :func:`lightning_optim.build_optimizer`; only ``matrix``, ``fallback``, ``split`` and
            ``heads`` of its patterns apply.
    """

    def __init__(self, optimizer: RuleOptimizer, module: nn.Module, grouping: Grouping) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._module = weakref.ref(module)
        self._no_decay = Grouping(no_decay=grouping.no_decay)
        self._grouping = grouping
        optimizer.register_step_pre_hook(self._follow)

    def __call__(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """The groups in place of one without names."""
        optimizer, module = self._optimizer(), self._module()
        assert optimizer is not None
        routed = isinstance(optimizer, MatrixOptimizer)
        names: dict[Tensor, Any] = {}
        if module is not None:
            parameters = dict(nn.Module.named_parameters(module))  # as the module tree names them
            known = self._grouping.route(module, set(group["params"]))
            names = {parameters[name]: r for name, r in known.items()}
            marked = marked_parameters(module) if "marked" in self._no_decay.no_decay else set()
        count = 1 + len({_set_of(g) for g in optimizer.param_groups} - {None})
        parts: dict[str, dict[str, Any]] = {}
        for i, p in enumerate(group["params"]):
            r = names.get(p)
            labels, settings = [f"{_ADDED}{count}"], {key: x for key, x in group.items() if key != "params"}
            if routed:
                structure = {"role": r.role, **r.layout} if r else {}
                settings |= structure or {"role": "fallback"}
                labels += [settings["role"], f"blocks{settings.get('blocks', 1)}" * (settings.get("blocks", 1) > 1)]
                labels += ["split" + "-".join(map(str, r.split))] if r and r.split else []
                labels += ["transposed" * settings.get("transposed", False)]
                if "lr" in group:
                    settings["lr"] = group["lr"] * self._ratio(settings, optimizer.param_groups[0])
            decays = "weight_decay" not in group and optimizer.group_defaults(settings).get("weight_decay")
            if r and decays and is_exempt(r, p, self._no_decay, marked):
                settings["weight_decay"] = 0.0
                labels.append("no_decay")
            name = "/".join(filter(None, labels))
            part = parts.setdefault(name, settings | {"name": name, "params": []})
            part["params"].append((clean_name(r.name) if r else f"added.{len(optimizer.param_groups)}.{i}", p))
        first = optimizer.param_groups[0].get("role")
        return sorted(parts.values(), key=lambda part: (part.get("role") == first, part.get("weight_decay") != 0.0))

    def _ratio(self, group: dict[str, Any], other: dict[str, Any]) -> float:
        """The learning rate of a group's rule over that of another's, as the optimizer was built."""
        optimizer = self._optimizer()
        assert optimizer is not None
        if not isinstance(optimizer, MatrixOptimizer):
            return 1.0
        mine, others = (float(optimizer.group_defaults({"role": g["role"]})["lr"]) for g in (group, other))
        return mine / others if others else 1.0

    def _follow(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Groups that were added together keep the ratios of their learning rates to that of the last."""
        last = {}
        for group in optimizer.param_groups:
            if number := _set_of(group):
                last[number] = group
        for group in optimizer.param_groups if last else ():
            number = _set_of(group)
            if number and group is not last[number]:
                group["lr"] = last[number]["lr"] * self._ratio(group, last[number])


def _set_of(group: dict[str, Any]) -> str | None:
    """What groups that were added together have in common."""
    name = str(group.get("name", ""))
    return name.partition("/")[0] if name.startswith(_ADDED) else None
