"""What the engine promises for every rule, in every configuration of its row."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import lightning_optim as lo
from lightning_optim.engine import gradients as inspection
from lightning_optim.engine.rule import RULES, ElementwiseRule, hyperparameters_of, numbers_of
from lightning_optim.registry import OPTIMIZERS

from .rows import CONFIGURATIONS, MATRIX, OURS, ROWS, build, each_configuration, each_optimizer, gradients, network, run
from .strategies import bad


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(network(dtype).parameters())


def snapshot(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[Tensor]:
    """Copies of all parameters and state tensors."""
    state = [x for p in params for x in optimizer.state[p].values()]
    return [x.detach().clone() for x in (*params, *state)]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_configuration
def test_training_lowers_the_loss(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = network()
    x = torch.randn(64, 2, 4, 4)
    y = x.flatten(1)[:, :3].argmax(1)
    optimizer = build(name, list(model.parameters()), lr=ROWS[name].lr, **arguments)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x) * model.scale, y)
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(80):
        optimizer.step(closure)
    assert closure().item() < 0.9 * first


@each_optimizer
def test_closure_runs_once_with_gradients_enabled(name: str) -> None:
    params = parameters()
    optimizer = build(name, params)
    calls = []

    def closure() -> str:
        calls.append(torch.is_grad_enabled())
        return "loss"

    assert optimizer.step(closure) == "loss"
    assert calls == [True]


@each_configuration
def test_gradients_are_read_only_and_not_aliased(name: str, arguments: dict[str, Any]) -> None:
    params = parameters()
    optimizer = build(name, params, **arguments)
    for t in range(1, 5):
        given = gradients(params, t)
        for p, g in zip(params, given):
            p.grad = g.clone()
        optimizer.step()
        for p, g in zip(params, given):
            assert torch.equal(p.grad, g)
    owned = {x.untyped_storage().data_ptr() for p in params for x in optimizer.state[p].values()}
    for p in params:
        assert p.untyped_storage().data_ptr() not in owned
        assert p.grad.untyped_storage().data_ptr() not in owned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each_configuration
def test_resume_is_bit_for_bit(name: str, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    straight, resumed = parameters(dtype), parameters(dtype)
    a, b = build(name, straight, **arguments), build(name, resumed, **arguments)
    run(a, straight, range(1, 10))
    run(b, resumed, range(1, 5))
    c = build(name, resumed, **arguments)
    c.load_state_dict(through_a_file(b.state_dict()))
    run(c, resumed, range(5, 10))
    assert_equal(snapshot(c, resumed), snapshot(a, straight))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p in resumed:
        for key, x in c.state[p].items():
            assert x.dtype == wide or x.ndim == 0, key


@each_configuration
def test_resume_through_a_flattened_distributed_checkpoint(name: str, arguments: dict[str, Any]) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    straight, saved, loaded = network(), network(), network()
    a = build(name, list(straight.parameters()), **arguments)
    b = build(name, list(saved.parameters()), **arguments)
    c = build(name, list(loaded.parameters()), **arguments)
    run(a, list(straight.parameters()), range(1, 8))
    run(b, list(saved.parameters()), range(1, 4))
    state = through_a_file(get_optimizer_state_dict(saved, b, options=options))
    loaded.load_state_dict(saved.state_dict())
    set_optimizer_state_dict(loaded, c, state, options=options)
    run(c, list(loaded.parameters()), range(4, 8))
    assert_equal(list(loaded.parameters()), list(straight.parameters()))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@each_configuration
def test_copies_continue_alike(name: str, arguments: dict[str, Any], how: Any) -> None:
    params = parameters()
    optimizer = build(name, params, **arguments)
    run(optimizer, params, range(1, 4))
    params2, optimizer2 = how((params, optimizer))
    run(optimizer, params, range(4, 7))
    run(optimizer2, params2, range(4, 7))
    assert_equal(snapshot(optimizer, params), snapshot(optimizer2, params2))


@each_configuration
def test_zero_learning_rate_and_zero_gradients_are_safe(name: str, arguments: dict[str, Any]) -> None:
    """torch.distributed.checkpoint makes such a step to create the state."""
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = build(name, params, **arguments)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.step()
    assert_equal(before, [p.detach() for p in params])
    for p in params:
        assert optimizer.state[p]
        assert all(x.isfinite().all() for x in optimizer.state[p].values())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    run(optimizer, params, range(1, 4))
    assert all(p.isfinite().all() for p in params)


@each_configuration
def test_parameters_without_gradient_are_left_alone(name: str, arguments: dict[str, Any]) -> None:
    params = parameters()
    optimizer = build(name, params, **arguments)
    idle = params[1]
    before = idle.detach().clone()
    for t in range(1, 4):
        for p, g in zip(params, gradients(params, t)):
            p.grad = None if p is idle else g
        optimizer.step()
    assert torch.equal(idle, before)
    assert not optimizer.state[idle]
    run(optimizer, params, range(4, 6))
    assert optimizer.state[idle]["step"] == 2
    assert not torch.equal(idle, before)


EXTREMES = {
    "zero": lambda g: torch.zeros_like(g),
    "huge": lambda g: g.sign() * 1e30,
    "one huge entry": lambda g: torch.where(torch.arange(g.numel()).view(g.shape) == 0, 1e30, g),
    "largest": lambda g: g.sign() * torch.finfo(g.dtype).max,
    "subnormal": lambda g: g * 1e-40,
    "rank one": lambda g: torch.ones_like(g),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("at", [1, 4], ids=["first", "later"])
@each_configuration
def test_extreme_gradients_give_finite_updates(name: str, arguments: dict[str, Any], extreme: str, at: int) -> None:
    params = parameters()
    optimizer = build(name, params, **arguments)
    for t in range(1, 8):
        for p, g in zip(params, gradients(params, t)):
            p.grad = EXTREMES[extreme](g) if t in (at, at + 1) else g
        optimizer.step()
        assert all(p.isfinite().all() for p in params), f"step {t}"
    assert optimizer.skipped_steps == 0
    assert not any(x.isnan().any() for p in params for x in optimizer.state[p].values())


@pytest.mark.parametrize("host", [True, False], ids=["verdict on the host", "verdict on the device"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@each_configuration
def test_nonfinite_gradients_change_nothing(
    name: str, arguments: dict[str, Any], bad: float, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad entry anywhere: no parameter or state moves, the step is counted, and training goes on as if it had
    not been. On an accelerator the host learns of it only at the next step."""
    monkeypatch.setattr(inspection, "_known_on_host", lambda x: host)
    clean, dirty = parameters(), parameters()
    a, b = build(name, clean, **arguments), build(name, dirty, **arguments)
    for t in range(1, 8):
        run(a, clean, range(t, t + 1))
        if t in (1, 4, 5):
            for p, g in zip(dirty, gradients(dirty, 50 + t)):
                p.grad = g
            dirty[t % len(dirty)].grad.view(-1)[-1] = bad
            b.step()
        run(b, dirty, range(t, t + 1))
    a.settle()
    b.settle()
    assert b.skipped_steps == 3
    assert_equal(snapshot(a, clean), snapshot(b, dirty))


@each_optimizer
def test_skipping_can_be_turned_off(name: str) -> None:
    params = parameters()
    optimizer = build(name, params, skip_nonfinite=False)
    run(optimizer, params, range(1, 3))
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert not params[-1].isfinite().all()


def poison(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    """A step with a NaN among the gradients."""
    for p in params:
        p.grad = torch.ones_like(p)
    params[-1].grad.view(-1)[0] = float("nan")
    optimizer.step()


@pytest.mark.parametrize("host", [True, False], ids=["verdict on the host", "verdict on the device"])
@each_optimizer
def test_too_many_skips_in_a_row_are_an_error(name: str, host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_known_on_host", lambda x: host)
    params = parameters()
    optimizer = build(name, params, max_consecutive_skips=3)
    run(optimizer, params, range(1, 3))
    for t in (3, 4):  # A finite step between them begins the count anew.
        poison(optimizer, params)
        poison(optimizer, params)
        run(optimizer, params, range(t, t + 1))
    optimizer.settle()
    before = snapshot(optimizer, params)
    # Where the verdict is the device's, the host learns of the third skip at the step after it.
    for _ in range(2 if host else 3):
        poison(optimizer, params)
    with pytest.raises(lo.NonFiniteGradientsError, match=f"{name} has skipped 3 steps in a row, all since its step 4"):
        poison(optimizer, params)
    assert optimizer.skipped_steps == 7
    assert_equal(before, snapshot(optimizer, params))
    # It can be saved, and goes on with as many tries as before.
    saved = through_a_file(optimizer.state_dict())
    other = build(name, params, max_consecutive_skips=3)
    other.load_state_dict(saved)
    for going_on in (optimizer, other):
        poison(going_on, params)
        run(going_on, params, range(5, 6))


@pytest.mark.parametrize("host", [True, False], ids=["verdict on the host", "verdict on the device"])
def test_the_count_of_skips_starts_anew_with_a_checkpoint(host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the host has not yet heard of the last skip."""
    monkeypatch.setattr(inspection, "_known_on_host", lambda x: host)
    params = parameters()
    optimizer = build("LaProp", params, max_consecutive_skips=2)
    run(optimizer, params, range(1, 3))
    saved = through_a_file(optimizer.state_dict())
    poison(optimizer, params)
    optimizer.load_state_dict(saved)
    poison(optimizer, params)
    run(optimizer, params, range(3, 4))  # the first of a row, not the second
    optimizer.settle()
    assert (optimizer.skipped_steps, optimizer.consecutive_skips) == (2, 0)


def test_copies_keep_the_count_of_skips() -> None:
    params = parameters()
    optimizer = build("LaProp", params, max_consecutive_skips=2)
    poison(optimizer, params)
    copies, copied = pickle.loads(pickle.dumps((params, optimizer)))
    assert copied.consecutive_skips == 1
    with pytest.raises(lo.NonFiniteGradientsError, match="2 steps in a row, all since its step 0"):
        poison(copied, copies)


def test_the_limit_of_skips_can_be_turned_off_and_has_to_be_a_number() -> None:
    params = parameters()
    optimizer = build("Muon", params, max_consecutive_skips=None)
    for _ in range(120):
        poison(optimizer, params)
    assert optimizer.skipped_steps == 120
    for value in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"max_consecutive_skips must be None or .* >= 1, got .*{value}"):
            build("Muon", params, max_consecutive_skips=value)


@pytest.mark.parametrize("option", ["skip_nonfinite", "max_consecutive_skips", "backend", "rounding"])
@each_optimizer
def test_what_is_the_engines_is_not_a_groups(name: str, option: str) -> None:
    """It would be stored and ignored."""
    params = parameters()
    optimizer = build(name, params)
    role = {"role": "matrix"} if OPTIMIZERS[name].kind == "matrix" else {}
    assert all(option not in group for group in optimizer.param_groups)
    with pytest.raises(ValueError, match=f"{option} is one for all parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], option: None, **role})


@each_configuration
def test_maximize_is_descent_on_the_negative(name: str, arguments: dict[str, Any]) -> None:
    up, down = parameters(), parameters()
    a, b = build(name, up, maximize=True, **arguments), build(name, down, **arguments)
    for t in range(1, 6):
        for p, q, g in zip(up, down, gradients(up, t)):
            p.grad, q.grad = g, -g
        a.step()
        b.step()
    assert_equal(up, down)


@each_optimizer
def test_parameters_without_names_join_those_that_have_some(name: str) -> None:
    """As Lightning's callbacks for finetuning add them; to a matrix optimizer they have to bring a role."""
    first, later = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    matrix = OPTIMIZERS[name].kind == "matrix"
    role = {"role": "matrix"} if matrix else {}
    optimizer = OPTIMIZERS[name].cls([{"params": [("weight", first)], **role}])
    if matrix:
        with pytest.raises(ValueError, match=r"lr=0\.001 needs a role"):
            optimizer.add_param_group({"params": [later], "lr": 1e-3})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [later], "lr": 1e-3, **role})
    run(optimizer, [first, later], range(1, 4))
    assert not torch.equal(later, torch.ones(4, 4))
    assert optimizer.param_groups[1]["param_names"] == ["added.1.0"]


@each_optimizer
def test_a_set_has_no_order(name: str) -> None:
    with pytest.raises(TypeError, match="use a list"):
        OPTIMIZERS[name].cls([{"params": {nn.Parameter(torch.ones(4, 4))}}])


@each_configuration
def test_groups_have_their_own_hyperparameters_and_can_be_added(name: str, arguments: dict[str, Any]) -> None:
    params = parameters()
    optimizer = build(name, params[:2], **arguments)
    run(optimizer, params[:2], range(1, 4))
    frozen = nn.Parameter(torch.ones(4, 4))
    moving = nn.Parameter(torch.ones(4, 4))
    role = {"role": "matrix"} if OPTIMIZERS[name].kind == "matrix" else {}
    optimizer.add_param_group({"params": [frozen], "lr": 0.0, "weight_decay": 0.0, **role})
    optimizer.add_param_group({"params": moving, **role})
    run(optimizer, [*params[:2], frozen, moving], range(4, 8))
    assert torch.equal(frozen, torch.ones(4, 4))
    assert not torch.equal(moving, torch.ones(4, 4))
    assert optimizer.state[moving]["step"] == 4


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@each_optimizer
def test_empty_parameters_are_passed_over(name: str, shape: tuple[int, ...]) -> None:
    empty, other = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(3, 3))
    optimizer = build(name, [empty, other])
    run(optimizer, [empty, other], range(1, 4))
    assert other.isfinite().all()
    assert not torch.equal(other, torch.ones(3, 3))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@each_configuration
def test_strides_do_not_matter(name: str, arguments: dict[str, Any], memory_format: torch.memory_format) -> None:
    a = [nn.Parameter(torch.arange(72.0).view(2, 4, 3, 3) / 72)]
    b = [nn.Parameter(a[0].detach().clone(memory_format=memory_format))]
    first, second = build(name, a, **arguments), build(name, b, **arguments)
    for t in range(1, 6):
        a[0].grad = gradients(a, t)[0]
        b[0].grad = a[0].grad.to(memory_format=memory_format)
        first.step()
        second.step()
    # Sums may be taken in another order.
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-6)


@each_configuration
def test_bfloat16_follows_float32(name: str, arguments: dict[str, Any]) -> None:
    """The arithmetic is float32, so one step from equal values differs by the rounding of the parameter only."""
    narrow = parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    a, b = build(name, wide, **arguments), build(name, narrow, **arguments)
    for t in range(1, 4):
        for p, q in zip(wide, narrow):
            p.data.copy_(q)
        for p, q, g in zip(wide, narrow, gradients(narrow, t)):
            p.grad, q.grad = g.float(), g
        a.step()
        b.step()
        for p, q in zip(wide, narrow):
            assert torch.equal(p.detach().to(torch.bfloat16), q.detach())


def wrong_values() -> Iterator[tuple[str, str, Any]]:
    """What a hyperparameter must not be, of each that its declaration constrains; of the fallback's, some."""
    for name in OURS:
        for key, field in RULES[name].fields.items():
            yield from ((name, key, value) for value in bad(field))
        if name in MATRIX:
            yield from ((name, "fallback", "Adam-ish"), (name, "fallback_lr", -1.0))
            yield (name, "fallback_betas", (0.9, 1.0))


def test_wrong_hyperparameters_name_argument_and_value() -> None:
    for name, argument, value in wrong_values():
        with pytest.raises(ValueError) as error:
            build(name, parameters(), **{argument: value})
        assert argument.removeprefix("fallback_") in str(error.value), (name, argument, value)
        assert repr(value) in str(error.value), (name, argument, value)


@each_optimizer
def test_a_rejected_group_leaves_the_optimizer_as_it_was(name: str) -> None:
    params = parameters()
    optimizer = build(name, params)
    groups = len(optimizer.param_groups)
    role = {"role": "matrix"} if OPTIMIZERS[name].kind == "matrix" else {}
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "lr": -1.0, **role})
    assert len(optimizer.param_groups) == groups
    run(optimizer, params, range(1, 3))


@each_optimizer
def test_sparse_gradients_are_refused(name: str) -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = build(name, [p])
    p.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


@each_optimizer
def test_a_checkpoint_of_another_optimizer_is_refused(name: str) -> None:
    params = [nn.Parameter(torch.ones(2, 2))]
    other = build("LaProp" if name != "LaProp" else "MVNGrad", params)
    with pytest.raises(ValueError, match=type(other).__name__):
        build(name, params).load_state_dict(other.state_dict())


@pytest.mark.parametrize("schedule", ["OneCycleLR", "ReduceLROnPlateau", "CosineAnnealingWarmRestarts"])
@each_optimizer
def test_schedulers_drive_every_group(name: str, schedule: str) -> None:
    params = parameters()
    optimizer = build(name, params)
    if schedule == "OneCycleLR":
        scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=1e-2,
            total_steps=20,
            cycle_momentum=not {"betas", "momentum"}.isdisjoint(optimizer.defaults),
        )
    elif schedule == "ReduceLROnPlateau":
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, eps=0)
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=20)
    seen = set()
    for t in range(1, 10):
        run(optimizer, params, range(t, t + 1))
        seen.add(tuple(group["lr"] for group in optimizer.param_groups))
        scheduler.step(1.0) if schedule == "ReduceLROnPlateau" else scheduler.step()
    assert len(seen) > 5
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize(
    ("name", "arguments"), [(n, a) for n in OURS for a in CONFIGURATIONS[n] if OPTIMIZERS[n].kind == "element-wise"]
)
def test_scalars_may_be_tensors(name: str, arguments: dict[str, Any]) -> None:
    """A compiled kernel gets them as 0-d tensors; the rule's result does not depend on which they are."""
    params = parameters()
    optimizer = build(name, params, **arguments)
    run(optimizer, params, range(1, 13))
    rule = type(optimizer)
    assert issubclass(rule, ElementwiseRule)
    group = optimizer.param_groups[0]
    p, (g, *_) = params[0], gradients(params, 13)
    host = [{key: float(optimizer.state[p][key]) for key in rule.host_state}] if rule.host_state else []
    scalars = numbers_of(rule, 13, hyperparameters_of(rule, group), *host)
    as_tensors = {k: torch.tensor(v, dtype=p.dtype) if type(v) is float else v for k, v in scalars.items()}
    state = {k: v for k, v in optimizer.state[p].items() if k != "step" and k not in rule.host_state}
    results = []
    for given in (scalars, as_tensors):
        tensors = {key: x.clone() for key, x in state.items()}
        q = p.detach().clone()
        rule.update(g, SimpleNamespace(**tensors), SimpleNamespace(**given)).apply_(q, given["keep"])
        results.append([q, *tensors.values()])
    for x, y in zip(*results):
        # The scalars are rounded to float32 and multiplied in another order.
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_huge_gradients_are_scaled_as_a_whole() -> None:
    """Up to the bound nothing changes; above it the direction stays."""
    bound = torch.finfo(torch.float32).max ** 0.4
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    g = torch.tensor([1.0, -0.5, 0.25])
    for x, factor in ((p, 0.9 * bound), (q, 1e30)):
        optimizer = lo.DeVAVector([x])
        x.grad = g * factor
        optimizer.step()
        m = optimizer.state[x]["m"]
        torch.testing.assert_close(m / m[0], g)
        torch.testing.assert_close(m[0], torch.tensor(0.1 * min(factor, bound)), rtol=1e-5, atol=0)


def test_a_late_parameter_does_not_restart_the_hidden_vector() -> None:
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))]
    optimizer = lo.HVAdam(params)
    for t in range(1, 5):
        params[1].grad = gradients(params, t)[1]
        optimizer.step()
    count = optimizer.state[params[1]]["count"].clone()
    run(optimizer, params, range(5, 6))
    assert count == 3
    assert optimizer.state[params[1]]["count"] == optimizer.state[params[0]]["count"] == 4


def test_a_returning_parameter_does_not_bring_back_an_old_hidden_vector() -> None:
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))]
    optimizer = lo.HVAdam(params)
    for t in range(1, 12):
        for p, g, has in zip(params, gradients(params, t), (t < 7 or t == 11, t >= 5)):
            p.grad = g if has else None
        optimizer.step()
    for name in ("fresh", "cosine", "count"):
        assert optimizer.state[params[0]][name] == optimizer.state[params[1]][name]
    assert optimizer.state[params[1]]["count"] == 10


@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)])
@each_configuration
def test_state_takes_the_precision_of_the_parameters_it_is_loaded_for(
    name: str, arguments: dict[str, Any], saved: torch.dtype, loaded: torch.dtype
) -> None:
    params, others = parameters(saved), parameters(loaded)
    a, b = build(name, params, **arguments), build(name, others, **arguments)
    run(a, params, range(1, 4))
    run(b, others, range(1, 2))
    dtypes = [x.dtype for x in snapshot(b, others)]
    b.load_state_dict(through_a_file(a.state_dict()))
    run(b, others, range(4, 7))
    assert [x.dtype for x in snapshot(b, others)] == dtypes
    assert all(p.isfinite().all() for p in others)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="torch without gradients of another dtype")
@each_optimizer
def test_gradients_of_more_precision_than_the_parameter(name: str) -> None:
    """What the parameter's arithmetic cannot hold counts as infinite."""
    params = parameters()
    optimizer = build(name, params)
    for t, scale in enumerate((1.0, 1e60, 1.0), start=1):
        for p in params:
            p.grad = None
            p.grad_dtype = torch.float64
            p.grad = torch.full(p.shape, 0.1 * t * scale, dtype=torch.float64)
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(p.isfinite().all() for p in params)
