"""Cautious updates and control of norms: arguments with one meaning in every optimizer and on every path.

That both are right for every rule is tested with all other hyperparameters in ``test_against_references.py``, and on
several processes in ``tests/distributed``. Here is what those do not see.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.engine import elementwise, gradients, matrices, reference, switches
from lightning_optim.engine.rule import RULES, entry
from lightning_optim.registry import OPTIMIZERS

from .rows import FLAT, MATRIX, OURS, build, each_optimizer

#: Those that need their steps as they make them: a lookahead, norms of rows in the state, a sphere, steps back.
REFUSE = ["AdmetaR", "AdmetaS", "Muown", "SSO", "ELRA"]
TAKE = [name for name in OURS if name not in REFUSE]
SWITCHES: list[dict[str, Any]] = [
    {"cautious": True},
    {"norm_control": "hyperball"},
    {"norm_control": "radial"},
    {"cautious": True, "norm_control": "radial", "weight_decay": 0.5, "decay": "cautious"},
    {"cautious": True, "norm_control": "hyperball", "weight_decay": 0.5},
]
each_switch = pytest.mark.parametrize("switch", SWITCHES, ids=lambda x: "-".join(map(str, x.values())))
#: A rule of each kind: element-wise, over groups, of matrices by rows, with a decay of its own, of whole matrices.
SOME = ["MVNGrad", "HVAdam", "Muon", "NAMO", "SOAP"]
SHAPES = [(5, 4), (3, 6), (4, 2, 3, 3), (7,), (), (33, 9)]


def parameters(dtype: torch.dtype = torch.float64, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def made(name: str, params: list[nn.Parameter], **arguments: Any) -> Any:
    cls: Any = OPTIMIZERS[name].cls
    if name not in MATRIX:
        return cls(params, **arguments)
    roles = {"matrix": [p for p in params if p.ndim > 1], "fallback": [p for p in params if p.ndim < 2]}
    groups = [{"params": some, "role": role} for role, some in roles.items() if some]
    return cls(groups, fallback_lr=arguments.get("lr"), **arguments)


def train(optimizer: Any, params: list[nn.Parameter], steps: Any, sign: float = 1.0) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(100 + t)
        for p in params:
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64) + 0.2
            p.grad = (sign * g).to(p.dtype)
        optimizer.step()


# --- the arguments ------------------------------------------------------------------------------------------------


@each_optimizer
def test_every_optimizer_has_the_arguments(name: str) -> None:
    cls: Any = OPTIMIZERS[name].cls
    p = nn.Parameter(torch.ones(2, 2))
    for key, wrong in (("cautious", "sometimes"), ("cautious", 1), ("norm_control", "sphere"), ("norm_control", None)):
        assert inspect.signature(cls).parameters[key].default == switches.FIELDS[key].default
        assert f"    {key}: " in str(cls.__doc__)
        with pytest.raises(ValueError, match=rf"{name}: {key} must be .*, got {key}={wrong!r}"):
            build(name, [p], **{key: wrong})
    group = build(name, [p], cautious=False, norm_control="none").param_groups[0]
    assert not switches.FIELDS.keys() & group.keys(), "folders of shards from before there were such entries lack them"


@pytest.mark.parametrize("name", REFUSE)
@pytest.mark.parametrize(
    ("key", "value"), [("cautious", True), ("norm_control", "hyperball"), ("norm_control", "radial")]
)
def test_optimizers_that_need_their_own_steps_refuse_others(name: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}: {key} must be .*relies on steps .*, got {key}={value!r}"):
        build(name, [nn.Parameter(torch.ones(2, 2))], **{key: value})


@pytest.mark.parametrize("name", ["Muon", "SOAP"])
@pytest.mark.parametrize(("fallback", "cautious"), [("AdamW", True), ("HVAdam", True), ("AdmetaR", False)])
def test_the_fallback_is_cautious_too_and_its_norms_are_its_own(name: str, fallback: str, cautious: bool) -> None:
    cls: Any = OPTIMIZERS[name].cls
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "role": "fallback"}]
    (group,) = cls(groups, cautious=True, norm_control="hyperball", fallback=fallback).param_groups
    assert entry(RULES[fallback], group, "cautious") is cautious
    assert entry(RULES[fallback], group, "norm_control") == "none"


@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_what_is_off_is_not_called(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits follow, which ``tests.freeze`` compares with a commit."""

    def fail(*arguments: Any) -> Any:
        raise AssertionError("called")

    for module in (elementwise, matrices, reference):
        for name in ("displacement", "sums_of", "adjusted", "displacing", "factors", "_update_adjusted"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fail)
    for name in SOME:
        params = parameters(torch.float32)
        train(made(name, params, backend=backend), params, range(2))
    params = parameters(torch.float32)
    with pytest.raises(AssertionError, match="called"):
        train(made(name, params, backend=backend, cautious=True), params, range(2))


# --- cautious -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_by_hand(backend: Any) -> None:
    """The momentum of the first step is the gradient; that of the second disagrees in the second element.

    Two of three elements move, 3 / (2 + 1) times as far; of a single one, half as far. Weight decay takes all.
    """
    p, q = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = lo.PNM([p, q], lr=0.1, momentum=0.0, beta0=0.0, cautious=True, weight_decay=0.5, backend=backend)
    plain = copy.deepcopy(optimizer)
    p.grad, q.grad = torch.tensor([1.0, 0.0, -2.0]).double(), torch.ones(()).double()
    optimizer.step()
    (a, b), keep = plain.param_groups[0]["params"], 0.95
    a.grad, b.grad = p.grad, q.grad
    plain.param_groups[0]["cautious"] = False
    plain.step()
    torch.testing.assert_close(p.detach() - keep, (a.detach() - keep) * 3 / (2 + 1))
    assert p[1].item() == pytest.approx(keep, rel=1e-15)
    torch.testing.assert_close(q.detach() - keep, (b.detach() - keep) / 2)


@pytest.mark.parametrize("name", SOME)
def test_nothing_moves_against_the_gradient(name: str) -> None:
    params = parameters()
    optimizer = made(name, params, lr=0.01, cautious=True, weight_decay=0.0)
    for sign in (1.0, -1.0):
        for t in range(3):
            before = [p.detach().clone() for p in params]
            train(optimizer, params, [t], sign)
            for p, old in zip(params, before):
                assert p.grad is not None
                assert ((p.detach() - old) * p.grad <= 0).all()


def test_a_tiny_step_agrees_with_a_tiny_gradient() -> None:
    """Their product, 1e-50, is 0 in float32."""
    p = nn.Parameter(torch.zeros(9))
    p.grad = torch.full((9,), 1e-25)
    lo.PNM([p], lr=1.0, momentum=0.0, beta0=0.0, weight_decay=0.0, cautious=True).step()
    torch.testing.assert_close(p.detach(), torch.full((9,), -1e-25 * 9 / 10))


@pytest.mark.parametrize("name", SOME)
def test_ascending_is_cautious_of_the_ascent(name: str) -> None:
    params, others = parameters(), parameters()
    train(made(name, params, cautious=True), params, range(4))
    train(made(name, others, cautious=True, maximize=True), others, range(4), sign=-1.0)
    for p, q in zip(params, others):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


# --- control of norms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["MVNGrad", "Muon"])
def test_hyperball_keeps_norms_and_makes_steps_of_the_rate(name: str, dtype: torch.dtype) -> None:
    params = parameters(dtype, [(24, 16), (40, 12)])
    rounding: Any = "nearest" if dtype == torch.float32 else "split"
    optimizer = made(name, params, lr=0.01, norm_control="hyperball", weight_decay=0.1, rounding=rounding)
    norms = [optimizer.exact(p).double().norm() for p in params]
    for t in range(300):
        before = [optimizer.exact(p).double().clone() for p in params]
        train(optimizer, params, [t])
        for p, old, norm in zip(params, before, norms):
            cosine = (optimizer.exact(p).double() * old).sum() / norm**2
            # The step is lr times the norm before it is brought back to the sphere: an angle from 0 to lr, its tangent
            # where it is at a right angle. Cosines within float32's rounding of one.
            assert 1 - 0.5 * 0.0101**2 - 1e-6 < cosine < 1 + 1e-6
    for p, norm in zip(params, norms):
        # Rounding, of 6e-8 per step in no particular direction.
        torch.testing.assert_close(optimizer.exact(p).double().norm(), norm, rtol=300 * 6e-8, atol=0)


def test_hyperball_by_hand() -> None:
    """A step of 0.1 times the norm, at a right angle to a matrix of norm 2, and back to norm 2."""
    p = nn.Parameter(torch.tensor([[2.0, 0.0]], dtype=torch.float64))
    p.grad = torch.tensor([[0.0, -5.0]], dtype=torch.float64)
    lo.PNM([p], lr=0.1, norm_control="hyperball", weight_decay=10.0).step()
    expected = torch.tensor([[2.0, 0.2]], dtype=torch.float64) / 1.01**0.5
    torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize(("g", "scale"), [(-1.0, 0.5), (1.0, 1.0)])
def test_the_brake_by_hand(g: float, scale: float) -> None:
    """Along the weights: outwards half as far, inwards as far. Weight decay, before, is not braked."""
    found = []
    for control in ("none", "radial"):
        p = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64))
        p.grad = g * p.detach() / 5
        lo.PNM([p], lr=0.1, norm_control=control, weight_decay=0.5).step()  # type: ignore[arg-type]
        found.append(p.detach().norm() - 5 * 0.95)
    torch.testing.assert_close(found[1], scale * found[0])
    assert found[0].sign() == -g


@pytest.mark.parametrize("control", ["hyperball", "radial"])
@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_each_matrix_has_a_norm_of_its_own_and_vectors_have_none(control: Any, backend: Any) -> None:
    packed, parts = nn.Parameter(torch.randn(6, 4).double()), []
    for part in packed.detach().chunk(3):
        parts.append(nn.Parameter(part.clone()))
    optimizer = lo.Muon([{"params": [packed], "role": "matrix", "blocks": 3}], norm_control=control, backend=backend)
    other = lo.Muon([{"params": parts, "role": "matrix"}], norm_control=control, backend=backend)
    for t in range(3):
        g = torch.randn(6, 4, generator=torch.Generator().manual_seed(t)).double()
        packed.grad = g
        for p, part in zip(parts, g.chunk(3)):
            p.grad = part.clone()
        optimizer.step()
        other.step()
    torch.testing.assert_close(packed.detach(), torch.cat([p.detach() for p in parts]))

    vectors, complex_ = parameters(shapes=[(), (4,)]), nn.Parameter(torch.randn(4, dtype=torch.complex128))
    controlled = [copy.deepcopy(x) for x in (*vectors, complex_)]
    for params, arguments in (([*vectors, complex_], {}), (controlled, {"norm_control": control})):
        optimizer = lo.MVNGrad(params, weight_decay=0.1, backend=backend, **arguments)  # type: ignore[assignment]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p, q in zip((*vectors, complex_), controlled):
        assert torch.equal(p, q)


def test_zero_has_no_norm_to_keep() -> None:
    zero = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"norm_control='hyperball' keeps the norms .* shape \(3, 2\) is zero"):
        lo.MVNGrad([nn.Parameter(torch.ones(2, 2)), zero], norm_control="hyperball")
    lo.MVNGrad([zero], norm_control="radial")
    lo.MVNGrad([nn.Parameter(torch.zeros(3))], norm_control="hyperball")


# --- every path ---------------------------------------------------------------------------------------------------


@each_switch
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("backend", ["chunked", pytest.param("compiled", marks=pytest.mark.slow)])
def test_backends_agree(name: str, switch: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in several chunks, several tensors in one, and more than one bucket, in float64."""
    for limits in (elementwise.SMALL, elementwise.SMALL_EAGER):
        monkeypatch.setitem(limits, "cpu", 20)
    monkeypatch.setitem(elementwise.CHUNK, "cpu", 64)
    monkeypatch.setattr(elementwise, "BUCKET", 128)
    found = []
    for way in ("plain", backend):
        params = parameters()
        params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)
        train(made(name, params, lr=0.01, backend=way, **switch), params, range(5))
        found.append(params)
    # HVAdam divides by the difference of nearly equal inner products in its first steps.
    rtol = 1e-3 if name == "HVAdam" else 1e-11
    for p, q in zip(*found):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)


@each_switch
@pytest.mark.parametrize("name", ["MVNGrad", "Muon"])
@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_low_precision(name: str, switch: dict[str, Any], backend: str) -> None:
    """``rounding="split"`` has the arithmetic of float32, whose bits it keeps."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        params = parameters(torch.bfloat16)
        params = [nn.Parameter(p.detach().to(dtype)) for p in params]
        optimizer = made(name, params, lr=1e-3, rounding="split", backend=backend, **switch)
        for t in range(10):
            for p in params:
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
                p.grad = g.to(torch.bfloat16).to(dtype)
            optimizer.step()
        found.append([optimizer.exact(p) for p in params])
    for p, q in zip(*found):
        assert torch.equal(p, q)


@each_switch
@pytest.mark.parametrize("name", ["MVNGrad", "Muon"])
def test_state_in_low_precision_and_random_rounding(name: str, switch: dict[str, Any]) -> None:
    """Chunks, rows of state in 8 bits and random numbers come together in the same places as plain ones."""
    found = []
    for backend in ("plain", "chunked"):
        params = parameters(torch.bfloat16, [(80, 70), (9,), (6, 5)])
        optimizer = made(name, params, lr=0.01, rounding="stochastic", state_dtype="8bit", backend=backend, **switch)
        train(optimizer, params, range(4))
        found.append(params)
    for p, q in zip(*found):
        # Sums in another order are apart by a unit of float32, which the random numbers round another way at times.
        assert (p != q).double().mean() < 0.01
        torch.testing.assert_close(p, q, rtol=2**-6, atol=2**-8)


@each_switch
@pytest.mark.parametrize("name", TAKE)
def test_extreme_gradients_give_finite_steps(name: str, switch: dict[str, Any]) -> None:
    if switch.get("decay") == "cautious" and "decay" not in RULES[name].fields:
        pytest.skip("no weight decay")
    arguments = {key: x for key, x in switch.items() if key in RULES[name].fields}
    for size in (0.0, 1e-40, 1e30):
        params = parameters(torch.float32)
        optimizer = made(name, params, lr=0.01, **arguments)
        for _ in range(3):
            for p in params:
                p.grad = torch.full_like(p, size)
            optimizer.step()
        assert all(p.isfinite().all() for p in params), size


@each_switch
@pytest.mark.parametrize("name", SOME)
def test_a_rate_of_zero_moves_nothing(name: str, switch: dict[str, Any]) -> None:
    """torch.distributed.checkpoint makes such a step to create state."""
    params = parameters(torch.float32)
    before = [p.detach().clone() for p in params]
    optimizer = made(name, params, lr=0.0, **switch)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before))


@each_switch
@pytest.mark.parametrize("name", SOME)
def test_a_step_that_is_skipped_on_the_device_changes_nothing(
    name: str, switch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on accelerators, where the host learns of it later."""
    monkeypatch.setattr(gradients, "_known_on_host", lambda grads: False)
    found = []
    for bad in (False, True):
        params = parameters(torch.float32)
        optimizer = made(name, params, lr=0.01, **switch)
        train(optimizer, params, range(2))
        if bad:
            optimizer.settle()
            before = [x.clone() for p in params for x in (p.detach(), *optimizer.state[p].values())]
            for p in params:
                p.grad = torch.full_like(p, torch.nan)
            optimizer.step()
            optimizer.settle()
            after = [x for p in params for x in (p.detach(), *optimizer.state[p].values())]
            assert all(torch.equal(x, y) for x, y in zip(before, after))
        train(optimizer, params, range(2, 4))
        found.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*found))


def test_nan_is_not_masked() -> None:
    """Without the check, NaN reaches the parameter, as it would without the mask, and does not go unseen."""
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = lo.MVNGrad([p], cautious=True, skip_nonfinite=False)
    p.grad = torch.tensor([[1.0, torch.nan], [1.0, -1.0]])
    optimizer.step()
    assert p[0, 1].isnan()


# --- checkpoints --------------------------------------------------------------------------------------------------


@each_switch
@pytest.mark.parametrize("name", SOME)
def test_a_run_goes_on_from_a_checkpoint(name: str, switch: dict[str, Any]) -> None:
    params = parameters(torch.float32)
    optimizer = made(name, params, lr=0.01, **switch)
    train(optimizer, params, range(3))
    state, others = copy.deepcopy(optimizer.state_dict()), [copy.deepcopy(p) for p in params]
    train(optimizer, params, range(3, 6))
    resumed = made(name, others, lr=0.01, **switch)
    resumed.load_state_dict(state)
    train(resumed, others, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, others))


def test_the_checkpoint_says_what_is_on() -> None:
    """As with every hyperparameter, those that it lacks are the optimizer's."""
    params = parameters()
    on, off = lo.MVNGrad(params, cautious=True), lo.MVNGrad(params)
    train(on, params, range(1))
    state = on.state_dict()
    off.load_state_dict(state)
    assert off.param_groups[0]["cautious"] is True
    del state["param_groups"][0]["cautious"]
    on.load_state_dict(state)
    assert on.param_groups[0]["cautious"] is True
    off = lo.MVNGrad(params)
    off.load_state_dict(state)
    assert "cautious" not in off.param_groups[0]


def test_an_edit_between_steps_has_an_effect() -> None:
    params, others = parameters(), parameters()
    edited, always = lo.MVNGrad(params), lo.MVNGrad(others, cautious=True, norm_control="radial")
    edited.param_groups[0] |= {"cautious": True, "norm_control": "radial"}
    for optimizer, some in ((edited, params), (always, others)):
        train(optimizer, some, range(3))
    assert all(torch.equal(p, q) for p, q in zip(params, others))
    edited.param_groups[0]["norm_control"] = "sphere"
    with pytest.raises(ValueError, match="norm_control must be one of"):
        train(edited, params, range(1))


@pytest.mark.parametrize("name", FLAT[:1])
@pytest.mark.parametrize("switch", [{"cautious": True}, {"norm_control": "radial"}], ids=str)
def test_parts_of_vectors_are_refused(name: str, switch: dict[str, Any]) -> None:
    """FSDP1 and DeepSpeed hold parts of vectors that do not say of which matrix."""
    params = parameters()
    optimizer = made(name, params, **switch)
    optimizer.shard_group = object()
    with pytest.raises(ValueError, match="needs sums over whole parameters, and under FSDP1 and DeepSpeed"):
        optimizer.check_shard_group()
