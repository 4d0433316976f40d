"""Checkpoints that do not fit are refused by name, and change nothing."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_optim import Grouping, build_optimizer
from lightning_optim.engine.checkpoint import CheckpointError
from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS

from ..optimizers.rows import build, each_optimizer, network, run


def trained(optimizer: torch.optim.Optimizer, steps: int = 2) -> torch.optim.Optimizer:
    run(optimizer, [p for group in optimizer.param_groups for p in group["params"]], range(1, steps + 1))
    return optimizer


def net(**layers: nn.Module) -> nn.Module:
    """Hidden layers ``a`` and ``b`` between an embedding and a head, or others in their place."""
    torch.manual_seed(0)
    parts = {"embed": nn.Embedding(5, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 3)} | layers
    return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})


def refused(optimizer: torch.optim.Optimizer, state: Any) -> str:
    """The message with which a checkpoint is refused; optimizer and parameters are as before."""
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError) as caught:
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    return str(caught.value)


def lines(message: str) -> dict[str, str]:
    return dict(line.rstrip(".").split(": ", 1) for line in message.splitlines() if ": " in line)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_that_are_missing_and_new_are_named(name: str) -> None:
    saved = trained(build_optimizer(net(b=None, c=nn.Linear(4, 4, bias=False)), name)).state_dict()
    message = lines(refused(trained(build_optimizer(net(), name)), saved))
    assert message["Only in the checkpoint"] == "c.weight"
    assert set(message["Not in the checkpoint"].split(", ")) == {"b.weight", "b.bias"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_grouping_is_named(name: str) -> None:
    saved = trained(build_optimizer(net(), name, Grouping(lr_multipliers={"a.*": 0.5}))).state_dict()
    message = lines(refused(build_optimizer(net(), name), saved))
    assert set(message) == {"Grouped otherwise"}
    assert "a.weight (group '" in message["Grouped otherwise"]
    assert "a.*" in message["Grouped otherwise"]
    assert "b.weight" not in message["Grouped otherwise"]


def test_the_group_that_kept_its_name_is_the_same_group() -> None:
    """Also where most of its parameters have left it: those are named, not the few that stayed."""
    nets = [net(norm=nn.LayerNorm(4, bias=False)) for _ in range(2)]
    saved = trained(build_optimizer(nets[0], "AdamW")).state_dict()
    message = refused(build_optimizer(nets[1], "AdamW", Grouping(lr_multipliers={"*.bias": 0.5})), saved)
    assert "a.bias (group 'params/no_decay' in the checkpoint, group 'params/*.bias/no_decay')" in message
    assert "norm.weight" not in message


def test_another_routing_and_another_fallback_are_named() -> None:
    saved = trained(build_optimizer(net(), "NAMO")).state_dict()
    message = lines(refused(build_optimizer(net(), "NAMO", Grouping(fallback=["a.weight"])), saved))
    assert "a.weight (rule 'NAMO' in the checkpoint, 'AdamW' here, role 'matrix'" in message["Treated otherwise"]
    assert "b.weight" not in message["Treated otherwise"]
    other = build_optimizer(net(), {"name": "NAMO", "args": {"fallback": "LaProp"}})
    message = lines(refused(other, saved))
    assert "embed.weight (rule 'AdamW' in the checkpoint, 'LaProp' here)" in message["Treated otherwise"]
    assert "a.weight" not in message["Treated otherwise"]


@each_optimizer
def test_another_shape_is_named(name: str) -> None:
    saved = trained(build_optimizer(net(), name)).state_dict()
    message = refused(build_optimizer(net(b=nn.Linear(4, 6)), name), saved)
    assert re.search(r"b.weight \([^)]*\bof shape .*[46](, 5)?\) instead of .*[46]", message)
    assert re.search(r"b\.bias \(\w+ is of shape \(4,\) instead of \(6,\)", message)
    assert "a.weight" not in message


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_are_found_by_name(name: str) -> None:
    """A module that lists the same parameters in another order continues with the state of each."""
    straight = net()
    reordered = nn.ModuleDict({key: copy.deepcopy(straight[key]) for key in ("head", "b", "a", "embed")})
    first = trained(build_optimizer(straight, name))
    second = build_optimizer(reordered, name)
    second.load_state_dict(first.state_dict())
    second.state_dict()  # Numbers that the host computes with are tensors again.
    expected, found = dict(straight.named_parameters()), dict(reordered.named_parameters())
    for key, p in expected.items():
        torch.testing.assert_close(second.state[found[key]], first.state[p], rtol=0, atol=0)
    assert [group["param_names"] for group in second.param_groups] != [g["param_names"] for g in first.param_groups]


@each_optimizer
def test_parameters_without_names_are_told_by_place_and_shape(name: str) -> None:
    params = list(network().parameters())
    saved = trained(build(name, params)).state_dict()
    fewer = refused(build(name, params[:-1]), saved)
    assert "parameters" in fewer
    assert "build_optimizer" in fewer
    params[2] = nn.Parameter(torch.zeros(5))
    assert "of shape (5,)" in refused(build(name, params), saved)


FOREIGN: dict[str, Callable[[list[Tensor]], Any]] = {
    "torch's AdamW": lambda ps: trained(torch.optim.AdamW(ps)).state_dict(),
    "a library with groups like ours": lambda ps: {
        "state": {0: {"step": 3, "exp_avg": torch.zeros(2, 2)}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0, "params": list(range(len(ps)))}],
    },
    "a model": lambda ps: network().state_dict(),
    "a list": lambda ps: [1, 2],
    "nothing": lambda ps: {},
    "no groups": lambda ps: {"state": {}, "param_groups": None},
    "groups without parameters": lambda ps: {"state": {}, "param_groups": [{}]},
}


@pytest.mark.parametrize("what", FOREIGN)
@each_optimizer
def test_foreign_checkpoints_are_refused(name: str, what: str) -> None:
    params = list(network().parameters())
    message = refused(build(name, params), FOREIGN[what](params))
    assert "begin with a new optimizer" in message


@pytest.mark.parametrize(
    ("written", "read"), [("SGD", "AdamW"), ("Adam", "SGD"), ("Adam", "AdamW"), ("MVNGrad", "Adam")]
)
def test_torch_optimizers_refuse_those_of_others(written: str, read: str) -> None:
    saved = trained(build_optimizer(net(), written)).state_dict()
    assert "begin with a new optimizer" in refused(build_optimizer(net(), read), saved)


def test_a_rule_is_not_taken_for_the_optimizer() -> None:
    """NAMO's checkpoint has groups of AdamW's rule."""
    message = refused(build_optimizer(net(), "AdamW"), trained(build_optimizer(net(), "NAMO")).state_dict())
    assert "written by an optimizer with rule 'AdamW' and 'NAMO' and does not fit AdamW" in message


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedules_and_later_options_do_not_make_a_checkpoint_foreign(name: str) -> None:
    a = build_optimizer(net(), name)
    rates = [group["lr"] for group in a.param_groups]
    cycles = not {"betas", "momentum"}.isdisjoint(a.defaults)
    torch.optim.lr_scheduler.OneCycleLR(a, max_lr=rates, total_steps=10, cycle_momentum=cycles)
    saved = trained(a).state_dict()
    for group in saved["param_groups"]:
        group.pop("maximize", None)
    b = build_optimizer(net(), name)
    b.load_state_dict(saved)
    assert [group["max_lr"] for group in b.param_groups] == rates
    assert b.param_groups[0].get("maximize", False) is False
    trained(b)


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "missing": lambda state: state.popitem(),
    "unknown": lambda state: state.update(exp_avg=state.popitem()[1]),
    "2.5 instead of a whole number": lambda state: state.update(step=torch.tensor(2.5)),
    "float instead of a tensor": lambda state: state.update(step=3.0),
    "(7,) instead of": lambda state: state.update(step=torch.zeros(7)),
}


@pytest.mark.parametrize("expected", DAMAGE)
@each_optimizer
def test_damaged_state_is_refused_whole(name: str, expected: str) -> None:
    """Also where only the last parameter's state is."""
    params = list(network().parameters())
    saved = copy.deepcopy(trained(build(name, params)).state_dict())
    DAMAGE[expected](list(saved["state"].values())[-1])
    assert expected in refused(trained(build(name, params), 3), saved)


@each_optimizer
def test_hyperparameters_out_of_range_are_refused(name: str) -> None:
    params = list(network().parameters())
    saved = copy.deepcopy(trained(build(name, params)).state_dict())
    saved["param_groups"][-1]["lr"] = -1.0
    assert "lr must be" in refused(trained(build(name, params), 3), saved)


@pytest.mark.parametrize("rule", [[], {}, None, 3, torch.zeros(3)], ids=["list", "dict", "None", "number", "tensor"])
def test_a_rule_that_is_no_name_is_refused(rule: Any) -> None:
    optimizer = build_optimizer(net(), "NAMO")
    saved = trained(build_optimizer(net(), "NAMO")).state_dict()
    saved["param_groups"][0]["rule"] = rule
    with pytest.raises(CheckpointError):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_is_changed_is_refused_or_loads_whole(data: st.DataObject) -> None:
    """Values at random places of a checkpoint are replaced; nothing but a CheckpointError may come of it."""
    optimizer = build_optimizer(net(), "NAMO")
    assert isinstance(optimizer, RuleOptimizer)
    file = io.BytesIO()
    torch.save(trained(build_optimizer(net(), "NAMO")).state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = saved
        key: Any = None
        for _ in range(data.draw(st.integers(1, 4))):
            if not isinstance(place, (dict, list)) or not place:
                break
            parent = place
            key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
            place = place[key]
        values = st.sampled_from([None, 0, -1.5, "x", (), [], {}, torch.zeros(3), torch.tensor(float("nan")), "AdamW"])
        parent[key] = data.draw(values)
    try:
        optimizer.load_state_dict(saved)
    except CheckpointError:
        assert not optimizer.state
