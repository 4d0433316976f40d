"""Captured steps: on a GPU by CUDA graphs, here by a tape that obeys the same rules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_optim as lo
from lightning_optim.engine import gradients
from lightning_optim.engine.rule import MatrixRule, ModelRule
from lightning_optim.registry import OPTIMIZERS

from .rows import CONFIGURATIONS, OURS, build
from .rows import gradients as some_gradients

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def is_refused(name: str, arguments: dict[str, Any]) -> bool:
    cls: Any = OPTIMIZERS[name].cls
    return not cls.capturable or arguments.get("orthogonalizer") == "exact"


CAPTURED = [(name, arguments) for name in OURS for arguments in CONFIGURATIONS[name] if not is_refused(name, arguments)]
REFUSED = [(name, arguments) for name in OURS for arguments in CONFIGURATIONS[name] if is_refused(name, arguments)]
SHAPES = [(5,), (7,), (6, 4), (4, 6), (6, 4), (130, 130)]


class Tape(TorchDispatchMode):
    """Records operations, as a graph does: on which memory, and with which numbers. Nothing may read a value."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, content in self.before.values():  # What is captured is not run.
            storage.copy_(content)

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            if func.is_view:
                continue
            given = {id(x) for x in tree_leaves((args, kwargs))}
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, Tensor) and id(old) not in given:
                    old.copy_(new)


class Recorder:
    """Stands in for :func:`.graphs.record`; counts what is recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, work: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        with Tape() as tape:
            result = work()

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, result


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The CPU taken for an accelerator whose graphs are tapes."""
    found = Recorder()
    monkeypatch.setattr("lightning_optim.engine.cuda_graphs.record", found)
    monkeypatch.setattr("lightning_optim.engine.cuda_graphs.is_one_gpu", lambda devices: len(devices) == 1)
    monkeypatch.setattr(gradients, "_known_on_host", lambda grads: False)
    return found


def twins(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in SHAPES]
    made = tuple([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    for p in (*made[0], *made[1]):
        p.grad = torch.zeros_like(p)
    return made


def put(params: list[Tensor], grads: list[Tensor]) -> None:
    """Gradients as ``zero_grad(set_to_none=False)`` and a backward pass leave them: in the same place."""
    for p, g in zip(params, grads):
        p.grad.copy_(g)


#: Coefficients that are tensors are multiplied in another order, as in compiled kernels; the update's powers and
#: differences amplify the roundings of 19 steps. Products of an iteration on a GPU are float16.
TOLERANCE = {"cpu": {"rtol": 2e-3, "atol": 2e-4}, "cuda": {"rtol": 1e-2, "atol": 2e-3}}


def same_steps(name: str, arguments: dict[str, Any], ps: list[Tensor], qs: list[Tensor], **engine: Any) -> None:
    """Steps with and without graphs, whose gradients, learning rates, betas and decay change, and one is not finite."""
    a, b = (build(name, params, **arguments, **engine) for params in (ps, qs))
    lo.capture_step(b)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40) for optimizer in (a, b)]
    for t in range(1, 21):
        grads = some_gradients(ps, t)
        if t == 13:
            grads[2][0, 0] = float("nan")
        if t == 15:
            grads[3] *= 1e25  # Needs a factor to keep its square finite.
        for params, optimizer in ((ps, a), (qs, b)):
            put(params, grads)
            for group in optimizer.param_groups if t == 9 else ():
                group["weight_decay"] = 0.05
                if "betas" in group:
                    group["betas"] = (0.7, 0.95)
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert a.state_dict()["state"].keys() == b.state_dict()["state"].keys()
    assert a.skipped_steps == b.skipped_steps == 1
    for p, q in zip(ps, qs):
        assert a.state[p]["step"] == b.state[q]["step"] == 19
        torch.testing.assert_close(p, q, **TOLERANCE[p.device.type])


@pytest.mark.parametrize(("name", "arguments"), CAPTURED)
def test_captured_steps_are_steps(name: str, arguments: dict[str, Any], recorder: Recorder) -> None:
    backend = "plain" if arguments else "chunked"  # each in some way
    same_steps(name, arguments, *twins(), backend=backend)
    assert recorder.replayed >= 10
    assert recorder.recorded <= 8
    assert recorder.replayed + recorder.recorded == 19  # all but the first


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "split"])
def test_captured_steps_in_low_precision(rounding: str, recorder: Recorder) -> None:
    ps, qs = twins(torch.bfloat16)
    same_steps("LaProp", {}, ps, qs, rounding=rounding)
    assert recorder.replayed >= 10


def test_replayed_steps_compute_nothing_per_parameter(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    _, params = twins()
    optimizer = lo.LaProp(params)
    lo.capture_step(optimizer)
    for t in range(1, 15):
        put(params, some_gradients(params, t))
        if t > 2:
            monkeypatch.setattr(optimizer, "_run", None)
        optimizer.step()
    assert (recorder.recorded, recorder.replayed) == (1, 12)


def step_with(optimizer: torch.optim.Optimizer, params: list[Tensor], t: int) -> None:
    put(params, some_gradients(params, t))
    optimizer.step()


@pytest.mark.parametrize(
    "change", ["gradients", "all state", "a state", "a parameter", "maximize", "backend", "a group"]
)
def test_what_moves_is_recorded_anew(change: str, recorder: Recorder) -> None:
    ps, qs = twins()
    a, b = build("MVNGrad", ps[:-1]), build("MVNGrad", qs[:-1])
    lo.capture_step(b)
    for t in range(1, 12):
        if t == 6:
            for optimizer, params in ((a, ps), (b, qs)):
                if change == "gradients":
                    params[0].grad = torch.zeros_like(params[0])
                elif change == "a state":
                    optimizer.settle()
                    del optimizer.state[params[0]]
                elif change == "all state":
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                elif change == "a parameter":
                    params[0].data = params[0].data.clone()
                elif change == "maximize":
                    optimizer.param_groups[0]["maximize"] = True
                elif change == "backend":
                    optimizer.backend = "plain"
                else:
                    optimizer.add_param_group({"params": params[-1:], "lr": 0.01})
        step_with(a, ps, t)
        step_with(b, qs, t)
    assert recorder.recorded == 2
    assert recorder.replayed == 11 - 2 * 2  # Each time one step finds the tensors, and the next records.
    for p, q in zip(ps, qs):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # A few roundings a step.


def test_a_parameter_that_misses_a_gradient(recorder: Recorder) -> None:
    ps, qs = twins()
    optimizers = a, b = lo.AdaBelief(ps), lo.AdaBelief(qs)
    lo.capture_step(b)
    for t in range(1, 16):
        for optimizer, params in zip(optimizers, (ps, qs)):
            put(params, some_gradients(params, t))
            kept = params[1].grad
            params[1].grad = None if t == 8 else kept
            optimizer.step()
            params[1].grad = kept
    assert recorder.replayed > 0
    for optimizer in optimizers:
        optimizer.settle()
    for p, q in zip(ps, qs):
        assert a.state[p]["step"] == b.state[q]["step"] == 15 - (p is ps[1])
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)  # Roundings, amplified by differences of squares.


def test_gradients_may_take_turns(recorder: Recorder) -> None:
    ps, qs = twins()
    a, b = lo.MVNGrad(ps), lo.MVNGrad(qs)
    lo.capture_step(b)
    places = [[torch.zeros_like(q) for q in qs] for _ in range(2)]
    for t in range(1, 15):
        for q, g in zip(qs, places[t % 2]):
            q.grad = g
        step_with(a, ps, t)
        step_with(b, qs, t)
    # At each place one step finds it, and one records.
    assert (recorder.recorded, recorder.replayed) == (2, 14 - 2 * 2)
    for p, q in zip(ps, qs):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # A few roundings a step.


def test_an_observer_sees_every_value(recorder: Recorder) -> None:
    _, params = twins()
    optimizer = build("NAMO", params)
    lo.capture_step(optimizer)
    seen = []
    for t in range(1, 9):
        optimizer.observer = (lambda p, name, value: seen.append(name)) if t % 4 == 0 else None
        step_with(optimizer, params, t)
    assert seen.count("adaptive_scale") == 2 * sum(p.ndim == 2 for p in params)
    assert (recorder.recorded, recorder.replayed) == (1, 4)  # Watching costs no graph.
    optimizer.settle()
    assert all(optimizer.state[p]["step"] == 8 for p in params)


def test_gradients_that_never_stay_are_said_so(recorder: Recorder) -> None:
    _, params = twins()
    optimizer = lo.LaProp(params)
    lo.capture_step(optimizer)
    kept = [some_gradients(params, t) for t in range(1, 25)]

    def train() -> None:
        for grads in kept:
            for p, g in zip(params, grads):
                p.grad = g
            optimizer.step()

    with pytest.warns(UserWarning, match=r"no step of LaProp was captured.*zero_grad\(set_to_none=False\)") as caught:
        train()
    assert len(caught) == 1
    assert recorder.recorded == 0


def test_hooks_closures_and_copies(recorder: Recorder) -> None:
    _, params = twins()
    optimizer = lo.LaProp(params)
    lo.capture_step(optimizer)
    after = []
    optimizer.register_step_post_hook(lambda *_: after.append(1))
    put(params, some_gradients(params, 1))
    assert [optimizer.step(lambda: 3.0) for _ in range(5)] == [3.0] * 5
    assert len(after) == 5
    assert recorder.replayed == 3
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    twin.step()
    twin.step()
    assert recorder.recorded == 1  # The copy is an ordinary optimizer.


@pytest.mark.parametrize(("name", "arguments"), REFUSED)
def test_decompositions_are_refused(name: str, arguments: dict[str, Any], recorder: Recorder) -> None:
    _, params = twins()
    with pytest.raises(
        ValueError, match=rf"{name}: the rule '{name}' (decomposes matrices|takes the loss to the host), which"
    ):
        lo.capture_step(build(name, params, **arguments))


def test_other_refusals() -> None:
    _, params = twins()
    with pytest.raises(ValueError, match=r"LaProp: a graph runs on one CUDA device, and parameters are on cpu"):
        lo.capture_step(lo.LaProp(params))


def test_random_rounding_is_refused(recorder: Recorder) -> None:
    _, params = twins(torch.bfloat16)
    with pytest.raises(ValueError, match=r"rounding='stochastic' draws new random numbers .* use 'kahan' or 'split'"):
        lo.capture_step(lo.LaProp(params, rounding="stochastic"))


def test_every_rule_says_truly_whether_it_can_be_captured() -> None:
    for name in OURS:
        cls: Any = OPTIMIZERS[name].cls
        assert cls.capturable or issubclass(cls, (MatrixRule, ModelRule)), "fallbacks and element-wise rules are"


# --- on a GPU ---------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["plain", "chunked", "compiled"])
@pytest.mark.parametrize(("name", "arguments"), CAPTURED)
def test_captured_steps_on_a_gpu(name: str, arguments: dict[str, Any], backend: str) -> None:
    same_steps(name, arguments, *twins(device="cuda"), backend=backend)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LaProp", "HVAdam", "NAMO"])
def test_replayed_steps_wait_for_nothing(name: str) -> None:
    _, params = twins(device="cuda")
    optimizer = build(name, params)
    lo.capture_step(optimizer)
    for t in range(1, 9):
        put(params, some_gradients(params, t))
        torch.cuda.set_sync_debug_mode("error" if t > 4 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    optimizer.settle()
    assert all(optimizer.state[p]["step"] == 8 for p in params)
    assert any(recording.graphs for recording in optimizer._graphs._recordings.values())  # It was captured.
