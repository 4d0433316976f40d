"""What is prepared for a step is used again only as long as nothing that it depends on has changed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.engine.optimizer import RuleOptimizer

from .rows import OURS, build, gradients, network

Params = list[Tensor]


def each_state(optimizer: RuleOptimizer, change: Callable[[dict[str, Any]], Any]) -> None:
    for state in optimizer.state.values():
        change(state)


def replace_state(state: dict[str, Any]) -> None:
    for name, x in state.items():
        if isinstance(x, Tensor):
            state[name] = 0.5 * x if x.is_floating_point() and name != "fresh" else x.clone()


def replace_memory(params: Params) -> None:
    for p in params:
        p.data = p.data.clone()


def to_bfloat16(params: Params) -> None:
    for p in params:
        p.data = p.data.bfloat16()
        p.grad = None if p.grad is None else p.grad.bfloat16()


def narrow_gradients(params: Params) -> None:
    if not hasattr(params[0], "grad_dtype"):
        pytest.skip("this version of torch has no gradients of another precision")
    for p in params:
        p.grad_dtype = None
        p.grad = None if p.grad is None else p.grad.bfloat16()


def edit(name: str, value: Callable[[Any], Any]) -> Callable[[RuleOptimizer, Params], None]:
    def change(optimizer: RuleOptimizer, params: Params) -> None:
        for group in optimizer.param_groups:
            if name in group:
                group[name] = value(group[name])

    return change


def in_place(optimizer: RuleOptimizer, params: Params) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.5  # A tensor, of which the group keeps the same object.
        if isinstance(group.get("betas"), list):
            group["betas"][0] = 0.7


def no_gradient(optimizer: RuleOptimizer, params: Params) -> None:
    params[1].grad = None


def set_counts(optimizer: RuleOptimizer, params: Params) -> None:
    each_state(optimizer, lambda state: state["step"].fill_(7))


def set_one_count(optimizer: RuleOptimizer, params: Params) -> None:
    optimizer.state[params[0]]["step"].fill_(9)


def forget_one(optimizer: RuleOptimizer, params: Params) -> None:
    del optimizer.state[params[2]]


def reload(optimizer: RuleOptimizer, params: Params) -> None:
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))


CHANGES: dict[str, Callable[[RuleOptimizer, Params], None]] = {
    "nothing": lambda optimizer, params: None,
    "learning rate": edit("lr", lambda lr: 0.3 * lr),
    "weight decay": edit("weight_decay", lambda _: 0.05),
    "betas": edit("betas", lambda _: (0.8, 0.9)),
    "direction": edit("maximize", lambda _: True),
    "an entry of a wrapper": lambda optimizer, params: optimizer.param_groups[0].update(note=1),
    "in place": in_place,
    "gradients of another precision": lambda optimizer, params: narrow_gradients(params),
    "precision": lambda optimizer, params: to_bfloat16(params),
    "memory": lambda optimizer, params: replace_memory(params),
    "no gradient for one": no_gradient,
    "state": lambda optimizer, params: each_state(optimizer, replace_state),
    "counts": set_counts,
    "one count": set_one_count,
    "state of one": forget_one,
    "checkpoint": reload,
    "rounding": lambda optimizer, params: setattr(optimizer, "rounding", "kahan"),
    "backend": lambda optimizer, params: setattr(optimizer, "backend", "plain"),
}


def trajectory(name: str, change: Callable[[RuleOptimizer, Params], None], prepared: bool) -> list[Tensor]:
    """Parameters and state after a few steps, with a change before the fourth; with or without what was prepared."""
    params: Params = list(network().parameters())
    optimizer = build(name, params)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
        if "betas" in group:
            group["betas"] = list(group["betas"])
    for t in range(1, 7):
        for p, g in zip(params, gradients(params, t)):
            p.grad = g.to(p.dtype)
        if t == 4:
            change(optimizer, params)
        if not prepared:
            optimizer._batches.clear()
            optimizer._seen.clear()
        optimizer.step()
    state = [x for p in params for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    return [p.detach().float() for p in params] + state


#: Rules of every kind, with and without host state, group state, state that has shapes of its own, and phases.
QUICK = ("MVNGrad", "LaProp", "HVAdam", "NAMO", "SOAP")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in OURS])
def test_a_change_is_noticed(name: str, change: str) -> None:
    with_it, without = (trajectory(name, CHANGES[change], prepared) for prepared in (True, False))
    assert len(with_it) == len(without)
    for x, y in zip(with_it, without):
        assert torch.equal(x, y)


@pytest.mark.parametrize("change", [x for x in CHANGES if x not in ("nothing", "an entry of a wrapper", "checkpoint")])
def test_the_changes_make_a_difference(change: str) -> None:
    """So that the test above could fail. Memory and backend make none; a residual is another tensor in the state."""
    before, after = (trajectory("MVNGrad", CHANGES[x], True) for x in ("nothing", change))
    if change not in ("memory", "backend", "rounding"):
        assert not all(torch.equal(x, y) for x, y in zip(before, after))
