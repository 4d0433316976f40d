"""PyTorch's generic optimizer tests, as this library's optimizers have to pass them.

The cases are those of PyTorch's ``test/test_optim.py``, its tests of schedules and of ``swa_utils``, written anew for
every optimizer of the registry. What is not here:

==============================================  ========================================================================
case                                            why
==============================================  ========================================================================
foreach, fused, differentiable, capturable      Arguments of torch's implementations. Here the backends have to agree
                                                (``test_execution.py``), and CUDA graphs (``test_graphs.py``).
foreach_large_tensor, peak_memory_foreach       Measured in ``benchmarks``, not tested.
defaults_changed_to_foreach                     There is no such default.
load_nontensor_step                             Refused on purpose: see docs/checkpoints.md and ``test_mismatch.py``.
rosenbrock_sparse, only_supports_sparse_grads   Sparse gradients are refused, below.
grad_scaling_autocast_fused, fused found_inf    ``_step_supports_amp_scaling`` is not set, so that the scaler unscales
                                                and clipping works: ``tests/precision``.
cuda_params, multigpu, mps                      ``test_cuda.py`` on a GPU.
tensor betas                                    Only with torch's ``capturable``; refused with a message, below.
step_is_noop_for_zero_grads                     Holds without weight decay and before any other gradient, below; later
                                                momentum goes on.
==============================================  ========================================================================
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import lightning_optim as lo
from lightning_optim.engine.rule import RULES, ModelRule
from lightning_optim.engine.two_rules import MatrixOptimizer
from lightning_optim.registry import OPTIMIZERS

from .rows import OURS, build, each_configuration, each_optimizer, gradients, network, run

FLAT = [name for name in OURS if OPTIMIZERS[name].kind != "matrix"]
MATRIX = [name for name in OURS if OPTIMIZERS[name].kind == "matrix"]
each_flat = pytest.mark.parametrize("name", FLAT)


def covering(cases: Iterable[str]) -> list[Any]:
    """Pairs of an optimizer and a case: by default each of both occurs, and one optimizer of each kind has every case.

    All others are marked slow.
    """
    cases = list(cases)
    few = {(OURS[i % len(OURS)], cases[i % len(cases)]) for i in range(max(len(OURS), len(cases)))}
    few |= {(name, case) for name in ("MVNGrad", "HVAdam", "NAMO") for case in cases}
    return [
        pytest.param(name, case, marks=() if (name, case) in few else pytest.mark.slow)
        for name in OURS
        for case in cases
    ]


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A matrix and a vector."""
    return [nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64).view(shape).to(dtype)) for shape, n in
            (((3, 4), 12), ((5,), 5))]  # fmt: skip


def equal(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return len(xs) == len(ys) and all(torch.equal(x, y) for x, y in zip(xs, ys))


def values(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def roundtrip(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def groups_of(name: str, params: list[Tensor], *settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A parameter group for each parameter, with settings of its own."""
    matrix = OPTIMIZERS[name].kind == "matrix"
    roles: list[dict[str, Any]] = [{"role": "matrix" if p.ndim == 2 else "fallback"} if matrix else {} for p in params]
    return [{"params": [p]} | role | own for p, role, own in zip(params, roles, settings)]


def make(name: str, groups: Any, **arguments: Any) -> torch.optim.Optimizer:
    cls: Any = OPTIMIZERS[name].cls
    return cls(groups, **arguments)


def descends(
    optimizer: torch.optim.Optimizer,
    params: list[Tensor],
    schedule: Callable[[Any], list[Any]] = lambda optimizer: [],
    maximize: bool = False,
    steps: int = 15,
) -> None:
    """A least squares problem gets better, or worse if that is asked for."""
    x = torch.linspace(-1, 1, params[0].shape[1], dtype=params[0].dtype)
    plans = schedule(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (params[0] @ x).square().sum() + (params[1] - 3).square().sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(steps):
        loss = optimizer.step(closure)
        for plan in plans:
            plan.step(*([loss.item()] if isinstance(plan, schedulers.ReduceLROnPlateau) else []))
    last = closure().item()
    assert last > first if maximize else last < first


# --- goes in the right direction --------------------------------------------------------------------------------


#: Optimizers that bring weights to a norm, whatever the gradients.
ON_A_SPHERE = ["SSO"]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
@each_optimizer
def test_it_goes_in_the_right_direction(name: str, contiguous: bool, maximize: bool) -> None:
    if maximize and issubclass(RULES[name], ModelRule):
        return  # It takes objectives that are not positive only, and has a test of that.
    if name in ON_A_SPHERE:
        pytest.skip("to ascend from outside the sphere would lead away from it")
    if contiguous:
        params = parameters()
    else:
        params = [nn.Parameter(torch.stack([p.detach(), p.detach()], -1)[..., 0]) for p in parameters()]
        assert not any(p.is_contiguous() for p in params)
    descends(build(name, params, maximize=maximize, lr=0.01), params, maximize=maximize)


@each_optimizer
def test_contiguous_or_not_gives_equal_steps(name: str) -> None:
    straight = parameters()
    strided = [nn.Parameter(torch.stack([p.detach(), p.detach()], -1)[..., 0]) for p in straight]
    for params in (straight, strided):
        run(build(name, params), params, range(1, 4))
    # A matrix product may add in another order where its factors are stored otherwise.
    torch.testing.assert_close(values(straight), values(strided), rtol=1e-5, atol=1e-6)


@each_optimizer
def test_parameter_groups_have_rates_and_decays_of_their_own(name: str) -> None:
    """Each group moves as if it were alone; one with rate 0 does not move."""
    if issubclass(RULES[name], ModelRule):
        return  # All groups move together.
    decay = {} if name in NO_DECAY else {"weight_decay": 0.3}
    params, alone = parameters(), parameters()
    both = make(name, groups_of(name, params, {"lr": 0.01}, {"lr": 0.02} | decay))
    run(both, params, range(1, 4))
    for i, own in enumerate(({"lr": 0.01}, {"lr": 0.02} | decay)):
        others = parameters()
        single = make(name, groups_of(name, others, *({} if j != i else own for j in range(2)))[i : i + 1])
        for t in range(1, 4):
            others[i].grad = gradients(others, t)[i]
            single.step()
        assert torch.equal(others[i], params[i])
    still = make(name, groups_of(name, alone, {"lr": 0.0}, {}))
    before = values(alone)
    run(still, alone, range(1, 3))
    assert torch.equal(alone[0], before[0])
    assert not torch.equal(alone[1], before[1])


NO_DECAY = [name for name in OURS if "weight_decay" not in OPTIMIZERS[name].defaults]


@each_optimizer
def test_the_constructors_rate_is_the_default_of_groups(name: str) -> None:
    params = parameters()
    optimizer = make(name, groups_of(name, params, {}, {"lr": 0.5}), lr=0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]


@each_optimizer
def test_a_valley_is_found(name: str) -> None:
    """Rosenbrock's function from (1.5, 1.5), where it is 56.5; its minimum is at (1, 1)."""
    p = nn.Parameter(torch.tensor([1.5, 1.5]))
    rate = 1e-5 if name.startswith("Admeta") else 1e-3  # Their first steps are 14 and 7 gradients long.
    optimizer = build(name, [p], **({"fallback_lr": 1e-2} if name in MATRIX else {"lr": rate}))

    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = p
        value = (1 - x) ** 2 + 100 * (y - x**2) ** 2
        value.backward()
        return value

    for _ in range(200):
        optimizer.step(closure)
    assert closure() < 56.5 / 2


# --- learning rates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)])
@each_optimizer
def test_the_rate_may_be_a_tensor(name: str, shape: tuple[int, ...]) -> None:
    """Changed in place, too."""
    with_tensor, with_number = parameters(), parameters()
    rate = torch.full(shape, 0.0078125)
    a, b = build(name, with_tensor, lr=rate), build(name, with_number, lr=0.0078125)
    run(a, with_tensor, range(1, 3))
    run(b, with_number, range(1, 3))
    assert equal(values(with_tensor), values(with_number))
    rate.mul_(0.5)
    b.param_groups[0]["lr"] = 0.0078125 / 2
    run(a, with_tensor, range(3, 5))
    run(b, with_number, range(3, 5))
    assert equal(values(with_tensor), values(with_number))
    loaded = build(name, with_number, lr=0.1)
    loaded.load_state_dict(roundtrip(a.state_dict()))
    assert torch.equal(loaded.param_groups[0]["lr"], rate)


def test_a_tensor_of_several_rates_and_tensor_betas_are_refused() -> None:
    with pytest.raises(ValueError, match="lr"):
        lo.MVNGrad(parameters(), lr=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="betas must be two numbers"):
        lo.MVNGrad(parameters(), betas=(torch.tensor(0.9), torch.tensor(0.99)))


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.4, 0.8, 4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 20, 0.9),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, *_bounds(o), 3, cycle_momentum=_cycles(o), base_momentum=0.8),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(
        o, [g["lr"] for g in o.param_groups], total_steps=40, cycle_momentum=_cycles(o)
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.5, 1.0, 3), schedulers.CosineAnnealingLR(o, 10)], [3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 4), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, [g["lr"] / 2 for g in o.param_groups], anneal_epochs=3),
}


def _bounds(optimizer: torch.optim.Optimizer) -> tuple[list[float], list[float]]:
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return [rate / 2 for rate in rates], rates


def _cycles(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch finds a momentum in the first group, which is where it looks."""
    return bool({"momentum", "betas"} & optimizer.defaults.keys())


@pytest.mark.parametrize(("name", "plan"), covering(SCHEDULES))
def test_every_schedule_of_torch_works(name: str, plan: str) -> None:
    params = parameters()
    optimizer = build(name, params, lr=0.01)
    rates: list[float] = []

    def watched(o: Any) -> list[Any]:
        found = [SCHEDULES[plan](o)]
        o.register_step_post_hook(lambda *_: rates.append(float(o.param_groups[0]["lr"])))
        return found

    descends(optimizer, params, watched, steps=10)
    assert len(rates) == 10
    assert plan == "ReduceLROnPlateau" or len(set(rates)) > 1


@each_optimizer
def test_several_schedules_at_once(name: str) -> None:
    params = parameters()
    several = ["StepLR", "ExponentialLR", "ReduceLROnPlateau"]
    descends(build(name, params, lr=0.01), params, lambda o: [SCHEDULES[plan](o) for plan in several])


@pytest.mark.parametrize("plan", ["StepLR", "ConstantLR", "CosineAnnealingLR", "OneCycleLR"])
@each_flat
def test_schedules_change_a_tensor_rate_in_place(name: str, plan: str) -> None:
    params = parameters()
    rate = torch.tensor(0.01)
    optimizer = build(name, params, lr=rate)
    scheduler = SCHEDULES[plan](optimizer)
    for t in range(1, 6):
        run(optimizer, params, range(t, t + 1))
        scheduler.step()
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)


# --- steps that change nothing ----------------------------------------------------------------------------------


@each_optimizer
def test_a_step_without_gradients_changes_nothing(name: str) -> None:
    params = parameters()
    before = values(params)
    optimizer = build(name, params)
    optimizer.step()
    assert equal(values(params), before)
    assert not any(optimizer.state[p] for p in params)
    run(optimizer, params, range(1, 3))
    counts = [int(optimizer.state[p]["step"]) for p in params]
    before = values(params)
    optimizer.zero_grad()
    optimizer.step()
    assert equal(values(params), before)
    assert [int(optimizer.state[p]["step"]) for p in params] == counts


@each_optimizer
def test_steps_with_zero_gradients_change_nothing(name: str) -> None:
    if name in ON_A_SPHERE:
        pytest.skip("it brings the weights to the sphere")
    decay = {} if name in NO_DECAY else {"weight_decay": 0.0}
    no_decay = decay | ({"fallback_weight_decay": 0.0} if name in MATRIX else {})
    params = parameters()
    before = values(params)
    optimizer = build(name, params, **no_decay)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert equal(values(params), before)


@pytest.mark.parametrize("set_to_none", [True, False])
@each_optimizer
def test_zero_grad(name: str, set_to_none: bool) -> None:
    params = parameters()
    optimizer = build(name, params)
    run(optimizer, params, range(1, 2))
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)
    run(optimizer, params, range(2, 3))


@each_flat
def test_tensors_of_any_shape(name: str) -> None:
    """0-d, empty, one element, several axes, transposed; those without elements are left alone."""
    shapes = [(), (0,), (1,), (3, 0, 2), (2, 1, 3, 2), (4, 3)]
    params: list[Tensor] = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    params.append(nn.Parameter(torch.ones(3, 4).t()))
    optimizer = build(name, params)
    run(optimizer, params, range(1, 4))
    for p in params:
        assert p.isfinite().all()
        assert not p.numel() or (p != 1).all()


@each_optimizer
def test_a_closure_is_called_once_with_gradients(name: str) -> None:
    params = parameters()
    optimizer = build(name, params)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() > 0


# --- precisions -------------------------------------------------------------------------------------------------


@each_optimizer
def test_parameters_of_several_precisions_in_one_group(name: str) -> None:
    """Each moves as it would alone. (HVAdam's group is one vector, so that its parameters depend on one another.)"""
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    params = [p for dtype in kinds for p in parameters(dtype)]
    optimizer = build(name, params)
    for t in range(1, 4):
        for p in params:
            p.grad = gradients([p], t)[0]
        optimizer.step()
    assert all(p.isfinite().all() for p in params)
    for i, dtype in enumerate(kinds if OPTIMIZERS[name].kind != "group" else ()):
        alone = parameters(dtype)
        single = build(name, alone)
        for t in range(1, 4):
            for p in alone:
                p.grad = gradients([p], t)[0]
            single.step()
        for p, q in zip(alone, params[2 * i : 2 * i + 2]):
            # One unit in the last place, twice: stacked with others a matrix product may round otherwise.
            torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@each_optimizer
def test_a_default_dtype_of_double_changes_nothing(name: str) -> None:
    params, others = parameters(), parameters()
    a = build(name, params)
    torch.set_default_dtype(torch.float64)
    try:
        b = build(name, others)
        run(b, others, range(1, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    run(a, params, range(1, 4))
    assert equal(values(params), values(others))


# --- complex parameters -----------------------------------------------------------------------------------------


def complex_pair(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A complex parameter, and a real one of the same values."""
    torch.manual_seed(1)
    z = nn.Parameter(torch.randn(shape, dtype=dtype))
    return z, nn.Parameter(torch.view_as_real(z.detach()).clone())


@pytest.mark.parametrize("backend", ["plain", "chunked"])
@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.complex64, (3, 4)), (torch.complex128, (5,)), (torch.complex64, ())]
)
@each_flat
def test_complex_parameters_are_their_real_views(name: str, dtype: torch.dtype, shape: Any, backend: str) -> None:
    z, x = complex_pair(dtype, shape)
    a, b = build(name, [z], backend=backend), build(name, [x], backend=backend)
    for t in range(1, 5):
        x.grad = gradients([x], t)[0]
        z.grad = torch.view_as_complex(x.grad.clone())
        a.step()
        b.step()
    assert torch.equal(torch.view_as_real(z), x)
    for key, value in b.state[x].items():
        assert torch.equal(a.state[z][key], value)
        assert not a.state[z][key].is_complex()


@each_flat
def test_complex_parameters_go_on_from_a_checkpoint(name: str) -> None:
    """Beside real ones; and when they are cast."""
    (straight, _), (resumed, _) = complex_pair(torch.complex64, (3, 2)), complex_pair(torch.complex64, (3, 2))
    others = parameters(), parameters()
    a, b = build(name, [straight, *others[0]]), build(name, [resumed, *others[1]])
    run(a, [straight, *others[0]], range(1, 6))
    run(b, [resumed, *others[1]], range(1, 3))
    c = build(name, [resumed, *others[1]])
    c.load_state_dict(roundtrip(b.state_dict()))
    run(c, [resumed, *others[1]], range(3, 6))
    assert torch.equal(straight, resumed)
    assert equal(values(others[0]), values(others[1]))
    resumed.data = resumed.data.to(torch.complex128)
    resumed.grad = None
    run(c, [resumed, *others[1]], range(6, 8))
    assert {x.dtype for x in c.state[resumed].values() if x.ndim} == {torch.float64}


@each_flat
def test_gradients_of_complex_functions(name: str) -> None:
    """torch's convention: the gradient is that of the real view; conjugates arrive lazily."""
    z, x = complex_pair(torch.complex64, (4,))
    a, b = build(name, [z], lr=0.01), build(name, [x], lr=0.01)
    for _ in range(4):
        for p, value in ((z, z), (x, torch.view_as_complex(x))):
            p.grad = None
            (value * value.conj() - 2 * value).abs().square().sum().backward()
        z.grad = z.grad.conj().resolve_conj().conj()
        assert z.grad.is_conj()
        a.step()
        b.step()
    assert torch.equal(torch.view_as_real(z.detach()), x.detach())


@pytest.mark.parametrize("name", MATRIX)
def test_matrix_rules_refuse_complex_matrices_and_their_fallback_takes_them(name: str) -> None:
    z, _ = complex_pair(torch.complex64, (3, 4))
    with pytest.raises(ValueError, match=rf"{name} .*complex .*\(3, 4\).*role='fallback'"):
        make(name, [{"params": [z], "role": "matrix"}])
    with pytest.warns(UserWarning, match="0 of 1 tensors"):
        optimizer = make(name, [z])
    assert optimizer.param_groups[0]["role"] == "fallback"
    before = z.detach().clone()
    run(optimizer, [z], range(1, 3))
    assert (z != before).all()


def test_complex_tensors_that_no_step_could_update_are_refused() -> None:
    z, _ = complex_pair(torch.complex64, (3, 4))
    with pytest.raises(ValueError, match="resolve_conj"):
        lo.MVNGrad([nn.Parameter(z.detach().conj())])
    with pytest.raises(ValueError, match="complex64 or complex128"):
        lo.MVNGrad([nn.Parameter(z.detach().to(torch.complex32))])


# --- state dicts ------------------------------------------------------------------------------------------------


def trained(name: str, named: bool = False, **arguments: Any) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    params = parameters()
    optimizer = with_names(name, params, named, **arguments)
    run(optimizer, params, range(1, 4))
    return optimizer, params


def with_names(name: str, params: list[Tensor], named: bool = True, **arguments: Any) -> torch.optim.Optimizer:
    groups = groups_of(name, params, {}, {})
    for group, label in zip(groups, ("weight", "bias")) if named else ():
        group["params"] = [(label, p) for p in group["params"]]
    return make(name, groups, **arguments)


def assert_same_state(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for key, state in a.items():
        assert state.keys() == b[key].keys()
        assert all(torch.equal(x, b[key][name]) for name, x in state.items())


@pytest.mark.parametrize("named", [False, True])
@each_configuration
def test_state_dicts_are_deterministic(name: str, arguments: dict[str, Any], named: bool) -> None:
    """Equal runs have equal ones; loading one gives it back, and does not change it."""
    first, params = trained(name, named, **arguments)
    saved = copy.deepcopy(first.state_dict())
    again, _ = trained(name, named, **arguments)
    assert_same_state(again.state_dict()["state"], saved["state"])
    others = [nn.Parameter(p.detach().clone()) for p in params]
    second = with_names(name, others, named, **arguments)
    second.load_state_dict(saved)
    run(first, params, range(4, 7))
    run(second, others, range(4, 7))
    assert equal(values(params), values(others))
    assert_same_state(first.state_dict()["state"], second.state_dict()["state"])
    assert first.state_dict()["param_groups"] == second.state_dict()["param_groups"]
    assert_same_state(again.state_dict()["state"], saved["state"])  # Loading it aliased nothing.


@each_optimizer
def test_state_is_not_empty_and_keyed_by_integers(name: str) -> None:
    optimizer, _ = trained(name)
    state = optimizer.state_dict()["state"]
    assert list(state) == [0, 1]
    assert all(state[i] for i in range(2))
    assert all(isinstance(x, Tensor) for i in range(2) for x in state[i].values())


@each_optimizer
def test_weights_only_files_give_the_state_back(name: str) -> None:
    optimizer, _ = trained(name)
    saved = optimizer.state_dict()
    assert_same_state(roundtrip(saved)["state"], saved["state"])
    assert roundtrip(saved)["param_groups"] == saved["param_groups"]


@pytest.mark.parametrize(("written", "read"), [(True, False), (False, True)])
@each_optimizer
def test_state_with_names_loads_without_and_the_other_way_round(name: str, written: bool, read: bool) -> None:
    optimizer, _ = trained(name, written)
    other = with_names(name, parameters(), read)
    other.load_state_dict(optimizer.state_dict())
    assert_same_state(other.state_dict()["state"], optimizer.state_dict()["state"])
    assert [group["param_names"] for group in other.param_groups] == [["weight"], ["bias"]]


@each_optimizer
def test_state_dicts_of_before_an_option_existed_load(name: str) -> None:
    """What is not there keeps the optimizer's own value."""
    optimizer, params = trained(name)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["maximize"]
    other = with_names(name, params, named=False, maximize=True)
    other.load_state_dict(saved)
    assert all(group["maximize"] is True for group in other.param_groups)
    run(other, params, range(4, 5))


@each_optimizer
def test_deepcopy_and_pickle_keep_every_public_attribute(name: str) -> None:
    optimizer, params = trained(name)
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    for how in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        twin, twins = how((optimizer, params))
        assert {key for key in vars(twin) if not key.startswith("_")} == public
        run(twin, twins, range(4, 6))
        assert twin.state[twins[0]]["step"] == 5


@each_optimizer
def test_an_optimizer_can_be_printed(name: str) -> None:
    optimizer, _ = trained(name)
    text = repr(optimizer)
    assert text.startswith(f"{name} (")
    assert "lr: " in text


@each_optimizer
def test_a_group_added_in_the_middle_of_a_run(name: str) -> None:
    params = parameters()
    optimizer = build(name, params[:1])
    run(optimizer, params[:1], range(1, 3))
    role = {"role": "fallback"} if name in MATRIX else {}
    optimizer.add_param_group({"params": params[1:], "lr": 0.5, **role})
    run(optimizer, params, range(3, 5))
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 2]
    assert optimizer.param_groups[1]["lr"] == 0.5


# --- hooks ------------------------------------------------------------------------------------------------------


@each_optimizer
def test_step_hooks(name: str) -> None:
    """Global ones first, then the optimizer's own; removed ones no longer."""
    params = parameters()
    optimizer = build(name, params)
    calls: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append(("all before", o is optimizer))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append(("all after", o is optimizer))),
        optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("before", o is optimizer))),
        optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("after", o is optimizer))),
    ]
    try:
        run(optimizer, params, range(1, 2))
        expected = [("all before", True), ("before", True), ("after", True), ("all after", True)]
        assert sorted(calls) == sorted(expected)
        assert [what for what, _ in calls[:2]] == ["all before", "before"]
    finally:
        for handle in handles:
            handle.remove()
    run(optimizer, params, range(2, 3))
    assert len(calls) == 4


def test_a_step_hook_may_replace_the_arguments() -> None:
    params = parameters()
    optimizer = lo.MVNGrad(params)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((args[0], lambda: 7), {}))
    assert optimizer.step(lambda: 3) == 7


@each_optimizer
def test_steps_are_named_in_profiles(name: str) -> None:
    params = parameters()
    optimizer = build(name, params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(optimizer, params, range(1, 2))
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#{name}.step" in names
    assert f"Optimizer.zero_grad#{name}.zero_grad" in names


@each_optimizer
def test_state_dict_hooks(name: str) -> None:
    """One before may change the optimizer, one after the dict, in place or by returning another."""
    optimizer, params = trained(name)
    calls: list[str] = []
    before = optimizer.register_state_dict_pre_hook(lambda o: calls.append("before"))
    after = optimizer.register_state_dict_post_hook(lambda o, d: calls.append("after") or d.update(note=1))
    assert optimizer.state_dict()["note"] == 1
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "note": 2})
    first = optimizer.register_state_dict_post_hook(lambda o, d: calls.append("first"), prepend=True)
    assert optimizer.state_dict()["note"] == 2
    assert calls == ["before", "after", "before", "first", "after"]
    for handle in (before, after, first):
        handle.remove()
    saved = optimizer.state_dict()
    assert saved["note"] == 2
    assert len(calls) == 5
    with_names(name, params, named=False).load_state_dict(saved)


@each_optimizer
def test_load_hooks_before(name: str) -> None:
    """They see a copy that they may change or replace, in their order; what they make of it is checked and loaded."""
    optimizer, params = trained(name)
    saved = optimizer.state_dict()
    groups = saved["param_groups"]
    other = with_names(name, params, named=False)
    rates: list[float] = []

    def change(o: Any, d: dict[str, Any]) -> None:
        rates.append(float(d["param_groups"][0]["lr"]))
        d["param_groups"] = [{**group, "lr": 0.5} for group in d["param_groups"]]

    def replace(o: Any, d: dict[str, Any]) -> dict[str, Any]:
        rates.append(float(d["param_groups"][0]["lr"]))
        return {**d, "param_groups": [{**group, "lr": 0.25} for group in d["param_groups"]]}

    other.register_load_state_dict_pre_hook(change)
    handle = other.register_load_state_dict_pre_hook(replace, prepend=True)
    other.load_state_dict(saved)
    assert rates == [groups[0]["lr"], 0.25]
    assert {group["lr"] for group in other.param_groups} == {0.5}
    assert saved["param_groups"] is groups
    handle.remove()
    other.load_state_dict(saved)
    assert len(rates) == 3
    other.register_load_state_dict_pre_hook(lambda o, d: {**d, "state": {0: {"step": torch.zeros(3)}}})
    with pytest.raises(ValueError, match="does not fit"):
        other.load_state_dict(saved)


@each_optimizer
def test_load_hooks_after(name: str) -> None:
    """They see the state that the next step uses; in their order."""
    optimizer, params = trained(name)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = with_names(name, others, named=False)
    calls: list[Any] = []

    def restart(o: Any) -> None:
        calls.append([int(o.state[p]["step"]) for p in others])
        for state in o.state.values():
            state["step"] = torch.zeros_like(state["step"])

    other.register_load_state_dict_post_hook(restart)
    other.register_load_state_dict_post_hook(lambda o: calls.append("first"), prepend=True)
    other.load_state_dict(optimizer.state_dict())
    assert calls == ["first", [3, 3]]
    run(other, others, range(4, 5))
    assert [int(other.state[p]["step"]) for p in others] == [1, 1]


@pytest.mark.parametrize("name", ["MVNGrad", "NAMO", "HVAdam"])
def test_a_hook_that_picks_parameters_by_name(name: str) -> None:
    """A checkpoint of more parameters is cut down to those that are here."""
    large = nn.ParameterDict({"a": torch.ones(3), "old": torch.ones(4), "b": torch.ones(5)})
    small = nn.ParameterDict({"b": torch.ones(5), "a": torch.ones(3)})
    one, two = (
        make(name, [{"params": list(net.named_parameters())} | ({"role": "fallback"} if name in MATRIX else {})])
        for net in (large, small)
    )
    run(one, list(large.parameters()), range(1, 3))

    def pick(o: Any, d: dict[str, Any]) -> dict[str, Any]:
        (group,), here = d["param_groups"], o.param_groups[0]["param_names"]
        kept = [(n, i) for n, i in zip(group["param_names"], group["params"]) if n in here]
        names, keys = map(list, zip(*kept))
        return {"state": {i: d["state"][i] for i in keys},
                "param_groups": [{**group, "params": keys, "param_names": names}]}  # fmt: skip

    two.register_load_state_dict_pre_hook(pick)
    two.load_state_dict(one.state_dict())
    for key in ("a", "b"):
        assert all(torch.equal(x, two.state[small[key]][n]) for n, x in one.state[large[key]].items())


# --- wrappers ---------------------------------------------------------------------------------------------------

#: What wrappers keep in ``optimizer.state[p]``.
FOREIGN: dict[str, Callable[[Tensor], Any]] = {
    "a tensor of its shape": lambda p: torch.full_like(p, 2.0),
    "a tensor of another": lambda p: torch.ones(2),
    "a number": lambda p: 3,
    "a dictionary": lambda p: {"average": torch.ones(2), "count": 1, "names": ["x"]},
}


@pytest.mark.parametrize("when", ["before the first step", "in between"])
@pytest.mark.parametrize(("name", "what"), covering(FOREIGN))
def test_what_wrappers_keep_in_the_state_stays(name: str, what: str, when: str) -> None:
    """It changes no step, is saved, loaded, copied, and is not touched."""
    params, others = parameters(), parameters()
    backend = "plain" if when == "in between" else "chunked"
    optimizer, usual = build(name, params, backend=backend), build(name, others, backend=backend)
    first = 0 if when == "before the first step" else 2
    run(optimizer, params, range(1, first + 1))
    for p in params:
        optimizer.state[p]["note"] = FOREIGN[what](p.detach())
    run(optimizer, params, range(first + 1, 4))
    run(usual, others, range(1, 4))
    assert equal(values(params), values(others))
    for p in params:
        assert unchanged(optimizer.state[p]["note"], FOREIGN[what](p.detach()))
    loaded = build(name, params, backend=backend)
    loaded.load_state_dict(roundtrip(optimizer.state_dict()))
    twin, twins = copy.deepcopy((loaded, params))
    for o, ps in ((loaded, params), (twin, twins)):
        assert unchanged(o.state[ps[0]]["note"], FOREIGN[what](ps[0].detach()))
    run(twin, twins, range(4, 6))
    run(usual, others, range(4, 6))
    assert equal(values(twins), values(others))


def unchanged(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(unchanged(found[key], x) for key, x in expected.items())
    return torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


def test_a_wrappers_averages_keep_their_precision() -> None:
    """torch casts what it loads to the parameter's dtype, which would round float32 averages of bfloat16 parameters."""
    params = parameters(torch.bfloat16)
    optimizer = lo.MVNGrad(params)
    run(optimizer, params, range(1, 3))
    average = torch.full((3, 4), 1 + 2**-20)
    optimizer.state[params[0]]["average"] = average
    saved = optimizer.state_dict()
    loaded = lo.MVNGrad(params)
    loaded.load_state_dict(saved)
    assert torch.equal(loaded.state[params[0]]["average"], average)
    assert loaded.state[params[0]]["average"] is not average


def test_state_of_a_wrapper_alone_is_no_state() -> None:
    """A checkpoint of before the first step, in which a wrapper has left something."""
    params = parameters()
    optimizer = lo.NAMO(groups_of("NAMO", params, {}, {}))
    optimizer.state[params[0]]["note"] = torch.ones(2)
    other = lo.NAMO(groups_of("NAMO", params, {}, {}))
    other.load_state_dict(roundtrip(optimizer.state_dict()))
    run(other, params, range(1, 3))
    assert torch.equal(other.state[params[0]]["note"], torch.ones(2))


@each_optimizer
def test_lookahead_around_it(name: str) -> None:
    """timm's, which keeps slow weights in the state and counts in the groups; and it goes on from a checkpoint."""
    lookahead = pytest.importorskip("timm.optim").Lookahead
    straight, resumed = parameters(), parameters()
    a, b = (lookahead(build(name, params), k=2) for params in (straight, resumed))
    run(a, straight, range(1, 8))
    run(b, resumed, range(1, 4))
    c = lookahead(build(name, resumed), k=2)
    c.load_state_dict(roundtrip(b.state_dict()))
    run(c, resumed, range(4, 8))
    assert equal(values(straight), values(resumed))
    assert "lookahead_slow_buff" in a.state_dict()["state"][0]


def test_averaged_models() -> None:
    """``AveragedModel``, an exponential one and ``update_bn``, with a schedule for the averaged part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 2))
    optimizer = lo.build_optimizer(model, "NAMO")
    averaged = AveragedModel(model)
    exponential = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    schedule = SWALR(optimizer, swa_lr=[group["lr"] / 2 for group in optimizer.param_groups], anneal_epochs=2)
    data = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(6)]
    seen = []
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
        exponential.update_parameters(model)
        seen.append(model[2].weight.detach().clone())
    update_bn([x for x, _ in data], averaged)
    torch.testing.assert_close(averaged.module[2].weight, torch.stack(seen).mean(0), rtol=1e-5, atol=1e-6)
    expected = seen[0]
    for weight in seen[1:]:
        expected = expected.lerp(weight, 0.5)
    torch.testing.assert_close(exponential.module[2].weight, expected, rtol=1e-5, atol=1e-6)
    assert averaged.module[1].num_batches_tracked == 6


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*without their modules")
@each_optimizer
def test_what_is_no_list_of_parameters_is_refused(name: str) -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        make(name, p)
    with pytest.raises(TypeError, match="another order in every run"):
        make(name, [{"params": {p, q}}])
    with pytest.raises(ValueError, match="more than one parameter group"):
        make(name, [{"params": p}, {"params": p}])
    with pytest.raises(ValueError, match="empty parameter list"):
        make(name, [])
    with pytest.raises(ValueError, match="names"):
        make(name, [{"params": [("weight", p), q], "role": "fallback"}])
    with pytest.raises((TypeError, ValueError)):
        make(name, [{"params": [torch.ones(2).requires_grad_() * 2]}])  # not a leaf


@each_optimizer
def test_sparse_gradients_are_refused(name: str) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = build(name, [embedding.weight])
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", -0.1), ("lr", "fast"), ("lr", float("nan")), ("betas", (1.0, 0.0)), ("betas", (0.9, -0.5)),
        ("betas", (0.0, 1.0)), ("eps", -1e-8), ("weight_decay", -1.0), ("momentum", 1.0), ("momentum", -0.5),
    ],
)  # fmt: skip
@each_optimizer
def test_hyperparameters_out_of_range_are_refused(name: str, argument: str, value: Any) -> None:
    if argument not in OPTIMIZERS[name].defaults:
        pytest.skip(f"{name} has no {argument}")
    with pytest.raises(ValueError, match=argument):
        build(name, parameters(), **{argument: value})


def test_every_matrix_optimizer_is_told_from_the_others() -> None:
    assert set(MATRIX) == {name for name in OURS if issubclass(OPTIMIZERS[name].cls, MatrixOptimizer)}


def test_a_network_trains() -> None:
    """With everything at once: groups, schedule, hooks and a checkpoint in the middle."""
    torch.manual_seed(0)
    model = network()
    x = torch.randn(32, 2, 4, 4)
    y = x.flatten(1)[:, :3].argmax(1)
    losses: list[float] = []
    steps: list[int] = []

    def train(optimizer: torch.optim.Optimizer, first: int, last: int) -> Any:
        schedule = SCHEDULES["CosineAnnealingLR"](optimizer)
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        for _ in range(first, last):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x) * model.scale, y)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return roundtrip(optimizer.state_dict())

    saved = train(lo.build_optimizer(model, "NAMO"), 0, 15)
    resumed = lo.build_optimizer(model, "NAMO")
    resumed.load_state_dict(saved)
    train(resumed, 15, 30)
    assert len(steps) == 30
    assert losses[-1] < losses[0]
