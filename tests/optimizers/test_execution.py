"""The ways of running a rule agree, and cost what they promise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_optim as lo
from lightning_optim.engine import compile, elementwise, matrices
from lightning_optim.engine.rule import as_attributes, buffers_of
from lightning_optim.engine.step import BACKENDS
from lightning_optim.registry import OPTIMIZERS

from .rows import (
    CONFIGURATIONS,
    FLAT,
    MATRIX,
    OURS,
    amplifies,
    build,
    each_configuration,
    each_optimizer,
    gradients,
    run,
)

compiled = pytest.param("compiled", marks=pytest.mark.slow)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CHUNK = elementwise.CHUNK["cpu"]


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits at which tensors of some hundred elements are cut, joined, stacked and left alone."""
    monkeypatch.setattr("lightning_optim.engine.elementwise.SMALL", {"cpu": 16, "cuda": 16})
    monkeypatch.setattr("lightning_optim.engine.elementwise.SMALL_EAGER", {"cpu": 16, "cuda": 16})
    monkeypatch.setattr("lightning_optim.engine.elementwise.CHUNK", {"cpu": 40, "cuda": 40})
    monkeypatch.setattr("lightning_optim.engine.matrices.STACK", {"cpu": 170, "cuda": 170})
    monkeypatch.setattr("lightning_optim.engine.matrices.TOGETHER", {"cpu": 48, "cuda": 48})
    monkeypatch.setattr("lightning_optim.engine.matrices.BUCKET", 200)


def clone(params: list[Tensor]) -> list[Tensor]:
    """Copies with the same strides."""
    return [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]


def everything(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[Tensor]:
    return [x.detach() for p in params for x in (p, *optimizer.state[p].values())]


# --- agreement --------------------------------------------------------------------------------------------------

shapes = st.sampled_from([(), (1,), (3,), (17,), (97,), (4, 4), (6, 3), (3, 6), (9, 9), (7, 13), (2, 3, 2, 2)])


@st.composite
def parameters(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype]) -> list[Tensor]:
    """Tensors of many sizes, dtypes and strides."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    params = []
    for shape in draw(st.lists(shapes, min_size=1, max_size=7)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(draw(dtypes))
        if x.ndim == 1 and draw(st.booleans()):
            x = x.repeat_interleave(2)[::2]
        if x.ndim == 2 and draw(st.booleans()):
            x = x.t().contiguous().t()
        if x.ndim == 4 and draw(st.booleans()):
            x = x.to(memory_format=torch.channels_last)
        params.append(nn.Parameter(x))
    return params


#: Tolerances relative to the largest entry of a tensor.
TOLERANCE = {
    # The compiled and the eager form differ by a few roundings per step (fused multiply-adds, other association),
    # which the differences g - m and the powers of small numbers amplify.
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    # A parameter of which an update falls on the other side of a rounding boundary moves by 2^-8 of itself.
    torch.bfloat16: 2e-2,
}


def agree(name: str, arguments: dict[str, Any], backend: str, params: list[Tensor], data: st.DataObject) -> None:
    if OPTIMIZERS[name].kind == "group":
        # One number alone has a cosine of exactly 1 to any other, which rounding carries to either side of a decision.
        params = [nn.Parameter(torch.linspace(-1, 1, 97).to(params[0].dtype)), *params]
    copies = clone(params)
    half = len(params) // 2 if data.draw(st.booleans(), label="two groups") and OPTIMIZERS[name].kind != "group" else 0
    optimizers = [build(name, ps[half:], backend=b, **arguments) for ps, b in ((params, "plain"), (copies, backend))]
    if half:
        for optimizer, ps in zip(optimizers, (params, copies)):
            for p in ps[:half]:
                role = {} if name in FLAT else {"role": "matrix" if p.ndim >= 2 else "fallback"}
                optimizer.add_param_group({"params": [p], "lr": 0.02, **role})
    for t in range(1, 5):
        given_now = [data.draw(st.booleans(), label="has a gradient") or t == 4 or p is params[0] for p in params]
        for p, q, g, has in zip(params, copies, gradients(params, t), given_now):
            p.grad = g if has else None
            q.grad = g.clone() if has else None
        for optimizer in optimizers:
            optimizer.step()
    # The sums of a group rule carry the rounding errors of one tensor into all.
    loosest = max(TOLERANCE[p.dtype] for p in params)
    for p, q in zip(params, copies):
        tolerance = loosest if OPTIMIZERS[name].kind == "group" else TOLERANCE[p.dtype]
        for x, y in zip(everything(optimizers[0], [p]), everything(optimizers[1], [q])):
            assert x.dtype == y.dtype
            scale = max(1.0, float(x.abs().max()))
            if backend == "chunked" and OPTIMIZERS[name].kind == "element-wise" and not amplifies(name, "powers"):
                assert torch.equal(x, y)  # The same operations; sums and powers depend on the cuts.
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance * scale)


@pytest.mark.usefixtures("tiny_chunks")
@each_configuration
def test_chunked_is_plain(name: str, arguments: dict[str, Any]) -> None:
    if "precondition_frequency" in OPTIMIZERS[name].defaults:
        arguments = arguments | {"precondition_frequency": 3}

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        # Sums in another order turn signs and eigenvectors of rank-deficient first gradients around in low precision.
        narrow = [torch.float64] if name in MATRIX else list(TOLERANCE)
        agree(name, arguments, "chunked", data.draw(parameters(st.sampled_from(narrow))), data)

    check()


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize(("name", "arguments"), [(n, a) for n in FLAT for a in CONFIGURATIONS[n]])
def test_compiled_is_plain(name: str, arguments: dict[str, Any]) -> None:
    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        # The difference of two nearly equal numbers, squared, as a divisor: only float64 leaves digits.
        dtypes = [torch.float64] if amplifies(name, "hidden vector") else list(TOLERANCE)
        agree(name, arguments, "compiled", data.draw(parameters(st.sampled_from(dtypes))), data)

    check()


@pytest.mark.parametrize("backend", ["chunked", compiled])
def test_one_compiled_rule_agrees_at_full_size(backend: str) -> None:
    """With the real limits: joined, cut and whole tensors."""
    shapes = [(5,), (130, 130), (3, CHUNK // 2 + 1), (7, 11)]
    params = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3))) for shape in shapes]
    copies = clone(params)
    a, b = lo.AdaBelief(params, rectify=False, backend="plain"), lo.AdaBelief(copies, rectify=False, backend=backend)
    run(a, params, range(1, 4))
    run(b, copies, range(1, 4))
    for x, y in zip(everything(a, params), everything(b, copies)):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)  # A few units in the last place.


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("backend", ["chunked", compiled])
@pytest.mark.parametrize("name", FLAT)
def test_bad_steps_change_nothing_on_an_accelerator(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict is a tensor then, and so are the factors that bound huge gradients."""
    monkeypatch.setattr("lightning_optim.engine.gradients._known_on_host", lambda grads: False)
    params = [nn.Parameter(torch.ones(n)) for n in (3, 5, 60)]
    copies = clone(params)
    a, b = build(name, params, backend="plain"), build(name, copies, backend=backend)
    for t, bad in enumerate((1.0, float("nan"), 1e30, float("inf"), 1.0), start=1):
        for p, q, g in zip(params, copies, gradients(params, t)):
            p.grad = g
            q.grad = g.clone()
        params[1].grad[0] = copies[1].grad[0] = bad
        before = [x.clone() for x in everything(b, copies) if x.ndim]
        a.step()
        b.step()
        if bad != bad or bad == float("inf"):
            assert all(torch.equal(x, y) for x, y in zip(before, (x for x in everything(b, copies) if x.ndim)))
    a.state_dict()
    b.state_dict()
    assert a.skipped_steps == b.skipped_steps == 2
    for p, q in zip(params, copies):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("backend", ["chunked", compiled])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factors_on_an_accelerator_at_any_precision(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_optim.engine.gradients._known_on_host", lambda grads: False)
    params = [nn.Parameter(torch.ones(n, dtype=dtype)) for n in (3, 5, 60)]
    copies = clone(params)
    run(lo.MVNGrad(params, maximize=True, backend="plain"), params, range(1, 5))
    run(lo.MVNGrad(copies, maximize=True, backend=backend), copies, range(1, 5))
    for p, q in zip(params, copies):
        torch.testing.assert_close(p, q, rtol=TOLERANCE[dtype], atol=0)


# --- the caller's surroundings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LaProp", *MATRIX])
def test_autocast_does_not_reach_the_step(name: str) -> None:
    """Manual optimization steps inside the precision plugin's autocast."""
    params = [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(1))) for s in ((4,), (6, 6), (5, 6))]
    copies = clone(params)
    run(build(name, params), params, range(1, 5))
    optimizer = build(name, copies)
    seen = []
    for t in range(1, 5):
        for p, g in zip(copies, gradients(copies, t)):
            p.grad = g
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.step(lambda: seen.append((copies[1] @ copies[1]).dtype))
    assert all(torch.equal(p, q) for p, q in zip(params, copies))
    assert set(seen) == {torch.bfloat16}  # The closure is the model's.


@pytest.mark.parametrize("backend", ["chunked", compiled])
@each_optimizer
def test_the_default_device_does_not_reach_the_step(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.engine.compile._kernels", {})
    compile._as_tensors.cache_clear()
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 3))]
    optimizer = build(name, params, backend=backend)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    with torch.device("meta"):
        optimizer.step()
        optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 for p in params)


@pytest.mark.slow
def test_compiling_under_a_profiler_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the sizes of the vectors that are traced."""
    monkeypatch.setattr("lightning_optim.engine.compile._kernels", {})
    params = [nn.Parameter(torch.ones(n)) for n in (3, 20_000)]
    copies = clone(params)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True):
        run(lo.AdaBelief(params, backend="compiled"), params, range(1, 3))
    run(lo.AdaBelief(copies, backend="plain"), copies, range(1, 3))
    for p, q in zip(params, copies):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # A few units in the last place.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LaProp", "HVAdam"])
def test_without_the_private_interface_the_public_one_compiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: Any) -> Any:
        raise ImportError("cannot import name 'compile_fx_inner'")

    monkeypatch.setattr("lightning_optim.engine.compile._kernels", {})
    monkeypatch.setattr("lightning_optim.engine.compile._compile", gone)
    params = [nn.Parameter(torch.ones(n)) for n in (3, 20_000)]
    copies = clone(params)
    run(build(name, params, backend="compiled"), params, range(1, 6))
    run(build(name, copies, backend="plain"), copies, range(1, 6))
    assert compile.compilations() > 0
    for p, q in zip(params, copies):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # A few units in the last place.


# --- the argument, checkpoints ----------------------------------------------------------------------------------


@each_optimizer
def test_backend_is_an_attribute_and_wrong_ones_are_refused(name: str) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = build(name, [p], backend="plain")
    assert copy.deepcopy(optimizer).backend == "plain"
    assert not any("backend" in group for group in optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=r"backend must be one of .*'chunked'.*got backend='fast'"):
        build(name, [p], backend="fast")


@pytest.mark.parametrize("written", ["plain", "chunked", compiled])
@pytest.mark.parametrize("read", ["plain", "chunked", compiled])
@pytest.mark.parametrize("name", ["LaProp", "HVAdam", "NAMO"])
def test_checkpoints_cross_backends(name: str, written: str, read: str) -> None:
    """Within one backend they continue bit for bit."""
    params = [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(1))) for s in ((4,), (5, 6), (5, 6))]
    a = build(name, params, backend=written)
    run(a, params, range(1, 4))
    copies = clone(params)
    b = build(name, copies, backend=read)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    run(a, params, range(4, 7))
    run(b, copies, range(4, 7))
    for x, y in zip(everything(a, params), everything(b, copies)):
        assert torch.equal(x, y) if read == written else torch.allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("message", ["no C++ compiler found", ""])
def test_auto_falls_back_with_one_warning(
    message: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def no_compiler(*args: Any) -> Any:
        raise AssertionError(message)

    monkeypatch.setattr("lightning_optim.engine.elementwise.COMPILE_FROM", 1)
    monkeypatch.setattr("lightning_optim.engine.elementwise._warned", False)
    monkeypatch.setattr("lightning_optim.engine.compile.runner", no_compiler)
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(300, 100))]
    copies = clone(params)
    run(lo.LaProp(params), params, range(1, 4))
    run(lo.LaProp(copies, backend="plain"), copies, range(1, 4))
    assert all(torch.equal(p, q) for p, q in zip(params, copies))
    messages = [str(w.message) for w in recwarn]
    assert len(messages) == 1
    assert f"AssertionError: {message}" in messages[0]
    assert "backend='chunked'" in messages[0]
    with pytest.raises(RuntimeError, match=r"backend='compiled': compiling .* failed .*backend='chunked' needs none"):
        run(lo.LaProp(params, backend="compiled"), params, range(1, 2))


def test_a_kernel_that_does_not_run_is_found_out_before_anything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    def bound_to_the_example(*args: Any) -> compile.Kernel:
        def run_kernel(vectors: list[Any]) -> None:
            assert len(vectors[0]) == compile._EXAMPLE, "expected size 65536"

        return compile.Kernel(compile._as_tensors, run_kernel)

    monkeypatch.setattr("lightning_optim.engine.elementwise.COMPILE_FROM", 1)
    monkeypatch.setattr("lightning_optim.engine.elementwise._warned", False)
    monkeypatch.setattr("lightning_optim.engine.compile._kernels", {})
    monkeypatch.setattr("lightning_optim.engine.compile._compile", bound_to_the_example)
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(300, 100))]
    copies = clone(params)
    with pytest.warns(UserWarning, match="expected size 65536"):
        run(lo.LaProp(params), params, range(1, 4))
    run(lo.LaProp(copies, backend="plain"), copies, range(1, 4))
    assert all(torch.equal(p, q) for p, q in zip(params, copies))


# --- what a step costs ------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=30),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=101),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAT)
def test_nothing_is_compiled_twice(name: str) -> None:
    """At most two specialisations per function, whatever the model and the schedule, and none after the first steps."""
    functions = 2 if OPTIMIZERS[name].kind == "group" else 1
    start = compile.compilations()
    after_first = None
    for shapes in ([(4,), (200, 100)], [(7, 3), (1,), (130, 131), (20_000,)]):
        for schedule in SCHEDULES.values():
            params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
            optimizer = build(name, params, backend="compiled", weight_decay=0.01)
            scheduler = schedule(optimizer)
            for t in range(100):
                for p in params:
                    p.grad = torch.full_like(p, 0.1 * (t + 1))
                optimizer.step()
                scheduler.step(1.0) if schedule is SCHEDULES["plateau"] else scheduler.step()
                optimizer.param_groups[0]["weight_decay"] *= 0.99
            after_first = after_first or compile.compilations()
    assert after_first - start <= 2 * functions
    assert compile.compilations() == after_first


class Operations(TorchDispatchMode):
    """Counts what is dispatched, views apart: on an accelerator, the launches. Tracks the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += 1
            given = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves((args, kwargs)) if _is(x)}
            for x in torch.utils._pytree.tree_leaves(out):
                if _is(x) and x.untyped_storage().data_ptr() not in given:
                    self.largest = max(self.largest, x.numel())
        return out


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)


def operations(name: str, shapes: list[tuple[int, ...]], backend: str, **arguments: Any) -> Operations:
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = build(name, params, backend=backend, **arguments)
    run(optimizer, params, range(1, 4))  # Anon compiles for the first and for the third.
    for p, g in zip(params, gradients(params, 4)):
        p.grad = g
    with Operations() as counted:
        optimizer.step()
    return counted


@pytest.mark.parametrize("backend", ["chunked", compiled])
@pytest.mark.parametrize("name", FLAT)
def test_launches_do_not_grow_with_the_number_of_small_tensors(name: str, backend: str) -> None:
    few, many = (operations(name, [(n,)] * k, backend).count for k, n in ((20, 100), (200, 10)))
    assert few == many


@pytest.mark.parametrize("name", MATRIX)
def test_launches_do_not_grow_with_the_number_of_equal_matrices(name: str) -> None:
    if name == "SSO":
        pytest.skip("how often it orthogonalises depends on the matrices")
    # At least two of them refresh their bases in any step.
    often = {"precondition_frequency": 10} if "precondition_frequency" in OPTIMIZERS[name].defaults else {}
    few, many = (operations(name, [(8, 8)] * k, "chunked", **often).count for k in (20, 200))
    assert few == many


@pytest.mark.parametrize("name", MATRIX)
def test_no_value_is_read_per_parameter(name: str) -> None:
    """Reading a value waits for an accelerator."""
    if name == "SSO":
        pytest.skip("it reads whether its search is at an end, for all equal matrices at once")
    counts = []
    for k in (4, 40):
        params = [nn.Parameter(torch.randn(8, 8)) for _ in range(k)] + [nn.Parameter(torch.randn(8)) for _ in range(k)]
        optimizer = build(name, params)
        run(optimizer, params, range(1, 3))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            optimizer.step()
        counts.append(
            sum(e.count for e in profiler.key_averages() if e.key in ("aten::item", "aten::_local_scalar_dense"))
        )
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", FLAT)
def test_transients_are_at_most_a_chunk(name: str) -> None:
    assert operations(name, [(3, CHUNK), (50,), (1200, 1100)], "chunked").largest <= CHUNK


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAT)
def test_compiled_rules_have_no_transients(name: str) -> None:
    """But for the vector that small tensors are joined to."""
    assert operations(name, [(3, CHUNK), (50,), (1200, 1100), (20,)], "compiled").largest <= 70


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "compiled"])
@pytest.mark.parametrize("name", FLAT)
def test_state_is_the_algorithms_own(name: str, backend: str) -> None:
    params = [nn.Parameter(torch.randn(s)) for s in ((100, 300), (50,), (60,))]
    optimizer = build(name, params, backend=backend)
    run(optimizer, params, range(1, 3))
    # Small parameters and all their numbers share memory.
    tensors = [x for p in params for x in optimizer.state[p].values()]
    stored = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    elements, numbers = sum(p.numel() for p in params), sum(not x.ndim for x in tensors)
    declared = buffers_of(OPTIMIZERS[name].cls, (), as_attributes(OPTIMIZERS[name].defaults))
    assert sum(stored.values()) <= 4 * len(declared) * elements + 8 * numbers


def test_twins_are_orthogonalised_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tall and wide matrices of one shape, of any group, in one call; large ones alone."""
    seen = []
    original = matrices.orthogonalize

    def spy(x: Tensor, method: str) -> Tensor:
        seen.append((tuple(x.shape), method))
        return original(x, method)

    monkeypatch.setattr("lightning_optim.engine.matrices.orthogonalize", spy)
    params = [nn.Parameter(torch.randn(s)) for s in ((4, 6), (6, 4), (4, 6), (4, 6), (700, 400))]
    others = [{"params": params[3:4], "role": "matrix", "orthogonalizer": "exact"}]
    groups = [{"params": params[:2] + params[4:], "role": "matrix"}, {"params": params[2:3], "role": "matrix"}, *others]
    run(lo.Muon(groups), params, range(1, 2))
    assert sorted(seen) == sorted([((3, 4, 6), "kj5"), ((1, 4, 6), "exact"), ((1, 700, 400), "kj5")])


# --- on a GPU ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], None]]:
    """What makes an error of every wait of the host for the GPU, until the end of the test."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def steps_without_waiting(optimizer: torch.optim.Optimizer, params: list[Tensor], no_waiting: Any) -> None:
    for t in range(1, 15):
        for p in params:
            p.grad = torch.randn_like(p)
        if t == 12:  # Every form of every rule has been compiled by then.
            no_waiting()
        optimizer.step()


WITHOUT_SVD = [(name, a) for name in OURS for a in CONFIGURATIONS[name] if a.get("orthogonalizer") != "exact"]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["plain", "chunked", "compiled"])
@pytest.mark.parametrize(("name", "arguments"), WITHOUT_SVD)
def test_no_step_waits_for_the_gpu(name: str, arguments: dict[str, Any], backend: str, no_waiting: Any) -> None:
    kinds = (torch.float32, torch.float32, torch.float64, torch.bfloat16)
    shapes = ((5,), (64, 32), (32, 64), (300, 200))
    params = [nn.Parameter(torch.randn(s, device="cuda", dtype=dtype)) for s, dtype in zip(shapes, kinds)]
    steps_without_waiting(build(name, params, backend=backend, **arguments), params, no_waiting)
    assert all(p.isfinite().all() for p in params)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["plain", "chunked", "compiled"])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "split"])
@each_optimizer
def test_no_way_of_rounding_waits_for_the_gpu(name: str, rounding: str, backend: str, no_waiting: Any) -> None:
    shapes = ((5,), (6,), (64, 32), (32, 64), (300, 200))
    params = [nn.Parameter(torch.randn(s, device="cuda", dtype=torch.bfloat16)) for s in shapes]
    steps_without_waiting(build(name, params, backend=backend, rounding=rounding), params, no_waiting)
    assert all(p.isfinite().all() for p in params)


def launches(name: str, shapes: list[tuple[int, ...]], backend: str) -> int:
    """Kernels that a step launches on a GPU."""
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    optimizer = build(name, params, backend=backend)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
    return sum(e.count for e in profiler.key_averages() if e.key.startswith(("cudaLaunch", "cuLaunch")))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "compiled"])
# Bases are refreshed by QR decompositions, which torch makes one by one.
@pytest.mark.parametrize("name", [name for name in OURS if not amplifies(name, "bases")])
def test_launches_on_a_gpu_hardly_grow_with_the_number_of_tensors(name: str, backend: str) -> None:
    shape = (16, 16) if name in MATRIX else (256,)
    few, many = (launches(name, [shape] * k, backend) for k in (20, 200))
    assert few > 0
    # What takes a list of tensors launches once for some dozens of them, and there are a few such operations in a step.
    assert many - few < (200 - 20) / 3


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "compiled"])
@pytest.mark.parametrize("name", FLAT)
def test_gpu_agrees_with_cpu(name: str, backend: str) -> None:
    params = [nn.Parameter(torch.randn(s)) for s in ((5,), (64, 32), (300, 200))]
    copies = steps_here_and_there(name, params, backend)
    for p, q in zip(params, copies):
        torch.testing.assert_close(p.detach(), q.detach().cpu(), rtol=1e-3, atol=1e-4)  # Other roots and divisions.


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MATRIX)
def test_matrices_on_a_gpu_agree_with_a_cpu(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and amplifies(name, "bases"):
        pytest.skip("eigenvectors of close eigenvalues differ in float32")
    params = [nn.Parameter(torch.randn(s, dtype=dtype)) for s in ((32, 32), (32, 32), (5,))]
    before = clone(params)
    copies = steps_here_and_there(name, params, "chunked")
    # In float32 the GPU multiplies float16 within the iteration, whose 2^-11 a few steps amplify.
    tolerance = 1e-6 if dtype == torch.float64 else 2e-2
    for p, q, start in zip(params, copies, before):
        assert (p - q.cpu()).norm() <= tolerance * (p - start).norm()


def steps_here_and_there(name: str, params: list[Tensor], backend: str) -> list[Tensor]:
    """Four steps of the reference on the CPU, and of copies, which are returned, on the GPU."""
    copies = [nn.Parameter(p.detach().cuda()) for p in params]
    a, b = build(name, params, backend="plain"), build(name, copies, backend=backend)
    for t in range(1, 5):
        for p, q, g in zip(params, copies, gradients(params, t)):
            p.grad, q.grad = g, g.cuda()
        a.step()
        b.step()
    return copies


# --- the check of the gradients -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_compiled_look_sees_every_entry(dtype: torch.dtype) -> None:
    """Its parts overlap where the length is no multiple of their number; none is left out."""
    peak = compile.peak(dtype, torch.device("cpu"))
    start = compile.compilations()
    for n in (64, 65, 71, 1000, 4099):
        x = torch.linspace(-1, 1, n, dtype=torch.float64).to(dtype)
        assert peak(x) == 1
        for i in {0, 1, n // 8, n // 8 + 1, n // 2, n - 9, n - 8, n - 2, n - 1}:
            for value in (math.inf, -math.inf, -3.0, math.nan):
                y = x.clone()
                y[i] = value
                torch.testing.assert_close(
                    peak(y), torch.tensor(abs(value), dtype=dtype), rtol=0, atol=0, equal_nan=True
                )
    assert compile.compilations() == start


@pytest.mark.parametrize("backend", ["chunked", compiled])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_the_largest_entry_is_bounded(backend: str, data: st.DataObject) -> None:
    """At least the largest entry, at most the norm of all, and not finite if and only if an entry is not."""
    sizes = data.draw(
        st.lists(st.sampled_from([1, 7, 2000, elementwise.LONG, elementwise.LONG + 3]), min_size=1, max_size=4)
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    grads = [torch.randn(n, generator=generator) for n in sizes]
    if data.draw(st.booleans()):
        grads[0] = torch.randn(3, max(sizes), generator=generator).mT  # Not contiguous.
    bound = elementwise.largest_entry(grads, backend)
    # A norm in float32 is good to 1e-6.
    assert (
        max(g.abs().max() for g in grads) <= bound * (1 + 1e-6) <= sum(g.norm() ** 2 for g in grads) ** 0.5 * (1 + 1e-5)
    )
    i = data.draw(st.integers(0, len(grads) - 1))
    where = torch.tensor(data.draw(st.integers(0, grads[i].numel() - 1)))
    grads[i][torch.unravel_index(where, grads[i].shape)] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    assert not math.isfinite(elementwise.largest_entry(grads, backend))


@pytest.mark.parametrize("backend", ["plain", "chunked", compiled])
def test_the_hidden_vector_is_of_no_scale(backend: str) -> None:
    """HVAdam decides by ratios of sums of squares, and squares of what float32 can hold may be out of its range."""
    found = []
    for scale in (1.0, 1e-12, 1e-20, 1e-28):
        p = nn.Parameter(torch.zeros(20_000))
        optimizer = lo.HVAdam([p], backend=backend)
        for t in range(6):
            noise = torch.randn(len(p), generator=torch.Generator().manual_seed(t % 3))
            p.grad = scale * (1 + noise)
            optimizer.step()
        found.append(optimizer.state[p]["cosine"].item())
    # Momenta are in float32, whose rounding is not that of their multiples.
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)
    assert found[0] > 0
