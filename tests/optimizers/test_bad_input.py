"""What is refused, what it says, and that nothing has happened then. `test_fuzz.py` looks for what is missing here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim as lo
from lightning_optim.engine.hyperparameters import SMALLEST
from lightning_optim.registry import OPTIMIZERS

from .rows import OURS, build, each_optimizer, gradients, network, run


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(network(dtype).parameters())


def assert_refused(optimizer: torch.optim.Optimizer, params: list[Tensor], match: str) -> None:
    before = [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    after = [x for p in params for x in (p, *optimizer.state[p].values())]
    assert all(torch.equal(x, y) for x, y in zip(before, after))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("lr", -1.0), ("lr", torch.tensor(float("nan"))), ("weight_decay", 1e20), ("maximize", "no"), ("maximize", None)],
)
@each_optimizer
def test_edits_are_validated_and_can_be_taken_back(name: str, argument: str, value: Any) -> None:
    params, others = parameters(), parameters()
    edited, untouched = build(name, params), build(name, others)
    run(edited, params, range(1, 3))
    run(untouched, others, range(1, 4))
    group = edited.param_groups[-1]
    if argument not in group:
        assert argument not in OPTIMIZERS[name].defaults
        return
    old = group[argument]
    group[argument] = value
    for p, g in zip(params, gradients(params, 3)):
        p.grad = g
    assert_refused(edited, params, argument)
    group[argument] = old
    edited.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("argument", ["lr", "betas"])
def test_edits_in_place_are_validated(argument: str, loaded: bool) -> None:
    params = parameters()
    optimizer = lo.MVNGrad(params)
    group = optimizer.param_groups[0]
    group |= {"lr": torch.tensor(1e-3), "betas": [0.9, 0.99]}
    run(optimizer, params, range(1, 3))
    if loaded:
        optimizer.load_state_dict(optimizer.state_dict())
        group = optimizer.param_groups[0]
    values = group["lr"].unsqueeze(0) if argument == "lr" else group["betas"]
    before = float(values[0])
    values[0] = -1.0
    for p, g in zip(params, gradients(params, 3)):
        p.grad = g
    assert_refused(optimizer, params, argument)
    values[0] = before
    optimizer.step()


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.9, 0.9), 0.9, "ab", (0.9, 1.0)])
def test_betas_are_two_numbers(betas: Any) -> None:
    with pytest.raises(ValueError, match="betas must be two numbers"):
        lo.MVNGrad(parameters(), betas=betas)


@pytest.mark.parametrize("eps", [0, 0.5 * SMALLEST])
@pytest.mark.parametrize("name", [name for name in OURS if "eps" in OPTIMIZERS[name].defaults])
def test_eps_that_lets_zero_be_divided_by_zero_is_refused(name: str, eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be a number in"):
        build(name, parameters(), eps=eps)
    params = [nn.Parameter(torch.ones(4, 4))]
    optimizer = build(name, params, eps=SMALLEST)
    for _ in range(4):
        params[0].grad = torch.zeros(4, 4)
        optimizer.step()
    assert params[0].isfinite().all()


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("AdaBelief", "amsgrad", True),
        ("LaProp", "centered", True),
        ("AdaPNM", "amsgrad", False),
        ("MAdam", "amsgrad", True),
        ("Anon", "refresh", "every_step"),
        ("DeVA", "form", "efficient"),
        ("SOAP", "max_precondition_dim", 5),
        ("SOAP", "merge_dims", True),
        ("NAMO", "blocks", 2),
        ("NAMOD", "transposed", True),
    ],
)
def test_what_decides_on_the_state_is_fixed_after_the_first_step(name: str, argument: str, value: Any) -> None:
    params = [nn.Parameter(torch.randn(4, 6))]
    optimizer = build(name, params)
    run(optimizer, params, range(1, 2))
    optimizer.param_groups[0][argument] = value
    assert_refused(optimizer, params, argument)


@pytest.mark.parametrize(("key", "value"), [("role", "fallback"), ("rule", "AdamW"), ("rule", "HVAdam")])
def test_role_and_rule_of_a_group_are_fixed(key: str, value: str) -> None:
    params = parameters()
    optimizer = build("Muon", params)
    run(optimizer, params, range(1, 2))
    optimizer.param_groups[0][key] = value
    assert_refused(optimizer, params, key)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="rule='Adam'"):
        lo.LaProp([{"params": parameters(), "rule": "Adam"}])
    with pytest.raises(ValueError, match="rule='HVAdam'"):
        lo.Muon([{"params": parameters()[-1:], "role": "fallback", "rule": "HVAdam"}])


def test_a_lost_hyperparameter_is_named_and_others_may_go() -> None:
    params = parameters()
    optimizer = lo.MVNGrad(params)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    run(optimizer, params, range(1, 2))
    del optimizer.param_groups[0]["initial_lr"]
    run(optimizer, params, range(2, 3))
    del optimizer.param_groups[0]["eps"]
    assert_refused(optimizer, params, "lost eps=1e-08")


@each_optimizer
def test_duplicated_and_expanded_parameters_are_refused(name: str) -> None:
    p = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(ValueError, match="twice"), pytest.warns(UserWarning, match="duplicate"):
        build(name, [p, p])
    with pytest.raises(ValueError, match="expanded"):
        build(name, [nn.Parameter(torch.ones(1, 4).expand(3, 4))])


@each_optimizer
def test_a_parameter_of_another_shape_is_refused_until_its_state_is_deleted(name: str) -> None:
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = build(name, [p])
    run(optimizer, [p], range(1, 3))
    stale = p.grad
    p.data = torch.ones(4, 4)
    assert_refused(optimizer, [p], r"gradient of shape \(3, 4\)")
    assert p.grad is stale
    p.grad = torch.ones(4, 4)
    assert_refused(optimizer, [p], r"replaced by one of shape \(4, 4\)")
    del optimizer.state[p]
    run(optimizer, [p], range(3, 6))
    assert not torch.equal(p, torch.ones(4, 4))


@pytest.mark.parametrize(("before", "after"), [(torch.bfloat16, torch.float64), (torch.float64, torch.float16)])
@each_optimizer
def test_state_follows_a_parameter_that_is_cast(name: str, before: torch.dtype, after: torch.dtype) -> None:
    """From equal values the step is that of an optimizer which loaded the state at the new precision."""
    model = network(before)
    params = list(model.parameters())
    optimizer = build(name, params)
    run(optimizer, params, range(1, 4))
    model.to(after)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = build(name, others)
    loaded.load_state_dict(optimizer.state_dict())
    for p in params:
        p.grad = None
    run(optimizer, params, range(4, 7))
    run(loaded, others, range(4, 7))
    assert all(torch.equal(p, q) for p, q in zip(params, others))
    matrix = params[1]
    state = {x.dtype for x in optimizer.state[matrix].values() if x.ndim}
    assert state == {torch.float64 if after == torch.float64 else torch.float32}


def test_state_that_a_narrower_parameter_cannot_have_is_refused() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = lo.MVNGrad([p])
    p.grad = torch.full((3,), 1e30, dtype=torch.float64)
    optimizer.step()
    p.data = p.data.float()
    p.grad = torch.ones(3)
    assert_refused(optimizer, [p], "cast to torch.float32, for which its state is too large")


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@each_optimizer
def test_numbers_do_not_take_the_default_precision(name: str, default: torch.dtype) -> None:
    """Which Lightning lowers within training steps at 16-true: bfloat16 cannot count beyond 256."""
    params, others = parameters(), parameters()
    optimizer, usual = build(name, params), build(name, others)
    torch.set_default_dtype(default)
    try:
        run(optimizer, params, range(1, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    run(usual, others, range(1, 4))
    for p, q in zip(params, others):
        assert torch.equal(p, q)
        for key, x in usual.state[q].items():
            assert optimizer.state[p][key].dtype == x.dtype


def test_cycled_momentum_reaches_the_fallback_of_muon() -> None:
    params = parameters()
    optimizer = build("Muon", params)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, max_momentum=0.75)
    run(optimizer, params, range(1, 2))
    vector = params[-1]
    torch.testing.assert_close(optimizer.state[vector]["m"], 0.25 * vector.grad)


def test_soap_with_all_axes_merged() -> None:
    """One axis of all entries is preconditioned by their outer product."""
    params = [nn.Parameter(torch.zeros(2, 3))]
    optimizer = build("SOAP", params, merge_dims=True, lr=0.1)
    run(optimizer, params, range(1, 5))
    assert optimizer.state[params[0]]["gram0"].shape == (1, 6, 6)
    assert params[0].isfinite().all()
    assert params[0].all()


def test_hvadams_variance_stays_finite() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = lo.HVAdam([p], betas=(0.0, 0.0))
    for scale in (1e15, 1.0, 1.0):
        p.grad = torch.arange(1.0, 5.0) * scale
        optimizer.step()
        assert p.isfinite().all()
        assert optimizer.state[p]["s"].isfinite().all()


@pytest.mark.parametrize("name", [name for name in OURS if "decay" in OPTIMIZERS[name].defaults])
def test_coupled_decay_of_huge_parameters_stays_finite(name: str) -> None:
    p = nn.Parameter(torch.full((2, 2), 1e30))
    optimizer = build(name, [p], decay="coupled", weight_decay=1.0)
    for t in range(1, 5):
        p.grad = gradients([p], t)[0]
        optimizer.step()
        assert p.isfinite().all()


def test_namo_d_bounds_the_step_in_the_decay() -> None:
    p = nn.Parameter(torch.full((4, 4), 100.0))
    optimizer = build("NAMOD", [p], lr=5.0, weight_decay=0.1)
    p.grad = torch.eye(4)
    optimizer.step()
    # lr * d is about 10 in every column, its bound 1: the parameter shrinks by 1 - 0.1, and a step of at most about 1.2
    # (the largest entry of the iteration's factor) follows.
    assert ((p - 90.0).abs() < 1.5).all()


def test_nesterovs_mix_at_a_momentum_near_one() -> None:
    p, q = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    for x in (p, q):
        optimizer = build("Muon", [x], momentum=1 - 1e-7, orthogonalizer="exact")
        for g in ([[1.0, 2.0], [0.0, 1.0]], [[-1.0, 0.0], [1.0, 1.0]]):
            x.grad = torch.tensor(g, dtype=x.dtype)
            optimizer.step()
    torch.testing.assert_close(p.double(), q, rtol=0, atol=1e-7)  # Of steps of 0.02.
