"""State in low precision: what it promises for every optimizer."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import lightning_optim as lo
from lightning_optim.engine import storage
from lightning_optim.engine.checkpoint import CheckpointError
from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.engine.rounding import random_bits, stream_positions, stream_start
from lightning_optim.engine.rule import LIKE_PARAMETER, as_attributes, averages_of, buffers_of
from lightning_optim.engine.two_rules import MatrixOptimizer
from lightning_optim.registry import OPTIMIZERS

from .rows import CONFIGURATIONS, OURS, each_configuration


def is_able(name: str) -> bool:
    """Whether some state of an optimizer may be stored in low precision."""
    cls: Any = OPTIMIZERS[name].cls
    return any(averages_of(cls, as_attributes(cls.hyperparameters())))


ABLE = [name for name in OURS if is_able(name)]
LOW = ("bfloat16", "8bit")
#: Of two dtypes that take the same way through the engine, the one with more to it, and some with the other.
each_run = pytest.mark.parametrize(
    ("name", "state_dtype"),
    [
        pytest.param(name, kind, marks=() if kind == "8bit" or name in ("MVNGrad", "NAMO") else pytest.mark.slow)
        for name in ABLE
        for kind in LOW
    ],
)
each_low = pytest.mark.parametrize("state_dtype", LOW)

#: Shape, blocks, transposed, split. All but the last two have 4096 elements or more.
SHAPES: dict[str, tuple[Any, ...]] = {
    "long rows": ((8, 520), 1, False),  # two full blocks and one of eight elements
    "tall": ((65, 64), 1, False),
    "conv": ((40, 12, 3, 3), 1, False),
    "qkv": ((96, 64), 3, False),
    "grouped queries": ((64, 70), 1, False, (32, 16, 16)),
    "experts": ((3, 20, 72), 3, False),
    "gate and up": ((3, 20, 72), 6, False),
    "transposed": ((64, 5, 4, 4), 1, True),
    "experts of columns": ((3, 24, 64), 3, True),
    "split columns": ((64, 65), 1, True, (40, 25)),
    "short rows": ((512, 8), 1, False),
    "small": ((30, 40), 1, False),
    "vector": ((4100,), 0, False),
}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter((torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype))
        for name, (shape, *_) in SHAPES.items()
    }


def build(name: str, ps: dict[str, nn.Parameter], **arguments: Any) -> RuleOptimizer:
    cls: Any = OPTIMIZERS[name].cls
    if not issubclass(cls, MatrixOptimizer):
        return cls(list(ps.items()), **arguments)
    groups = []
    for key, p in ps.items():
        _, blocks, transposed, *split = SHAPES[key]
        layout = {
            "role": "matrix",
            "blocks": blocks,
            "transposed": transposed,
            **({"split": split[0]} if split else {}),
        }
        groups.append({"params": [(key, p)], **(layout if blocks else {"role": "fallback"})})
    return cls(groups, **arguments)


def set_gradients(ps: dict[str, nn.Parameter], t: int) -> None:
    """Gradients with entries of very different size, as embeddings and deep networks have them."""
    generator = torch.Generator().manual_seed(100 + t)
    for p in ps.values():
        size = torch.logspace(-4, 0, p.shape[-1])
        p.grad = (torch.randn(p.shape, generator=generator) * size + 0.1 * p.detach().float()).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, ps: dict[str, nn.Parameter], steps: range) -> None:
    for t in steps:
        set_gradients(ps, t)
        optimizer.step()


def everything(optimizer: torch.optim.Optimizer, ps: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = {f"parameter {key}": p.detach().clone() for key, p in ps.items()}
    for key, p in ps.items():
        found |= {f"{name} of {key}": torch.as_tensor(x).clone() for name, x in optimizer.state[p].items()}
    return found


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])]
    assert not different


def through_a_file(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- codes ----------------------------------------------------------------------------------------------------------


def coded(value: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.zeros_like(value, dtype=dtype)
    scale = torch.zeros(storage.scale_shape(value.shape, 1))
    storage.write_(codes, scale, value, bits)
    return codes, scale, storage.read(codes, scale, torch.float32)


@settings(derandomize=True, deadline=None)
@given(exponent=st.integers(-30, 30), width=st.integers(1, 600), seed=st.integers(0, 99))
def test_codes_are_near(exponent: int, width: int, seed: int) -> None:
    """Two codes are at most 2/127 (4/255) of the scale apart, at its upper end, less below: a power of the code."""
    value = torch.randn(3, width, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    for dtype, x, most, power in ((torch.int8, value, 127, 2), (torch.uint8, value.square(), 255, 4)):
        _, scale, again = coded(x, dtype)
        each = scale.repeat_interleave(storage.BLOCK, 1)[:, :width]
        gap = power / most * (x.abs() / each).clamp(min=1 / most**power) ** (1 - 1 / power) * each
        # At its upper end a gap is larger by (1 + 1/c)^(power - 1): 8 between the first two codes of fourth powers.
        bound = gap * 2 ** (power - 1)
        assert bool(((again - x).abs() <= bound).all())
        assert torch.equal(again.abs().amax(1), x.abs().amax(1))  # The largest of a block is exact.


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16])
def test_rounding_is_right_in_the_mean(dtype: torch.dtype) -> None:
    """Over many draws; the error of the mean of 2000 evenly distributed ones is below a thousandth of the distance."""
    value = torch.linspace(0.001, 1.0, 256)[None]
    total = torch.zeros_like(value)
    for t in range(2000):
        bits = random_bits(stream_positions(stream_start(t, 3), 0, 256, value.device)).view(1, 256)
        stored, scale = torch.zeros_like(value, dtype=dtype), torch.zeros(1, 1)
        storage.write_(stored, scale, value, bits)
        total += storage.read(stored, scale, torch.float32)
    # The distance of two codes is below 4/255 at the upper end; draws of two blocks of 1024 steps.
    assert float((total / 2000 - value).abs().max()) < 2e-4


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_stay_where_nothing_changes(dtype: torch.dtype) -> None:
    """A state tensor that a step reads and does not change, as PNM's every other one."""
    value = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).abs()
    again = coded(value, dtype)[2]
    for t in range(1, 200):
        bits = random_bits(stream_positions(stream_start(t, 0), 0, 1200, value.device)).view(4, 300)
        again = coded(again, dtype, bits)[2]
    # A value on a code is moved with the odds of its float32 rounding error over the distance: about 1e-5.
    assert float((again != coded(value, dtype)[2]).float().mean()) < 0.02


def test_only_zero_is_stored_as_zero() -> None:
    value = torch.tensor([[1.0, 1e-30, 0.0, 1e-44]])
    codes, _, again = coded(value, torch.uint8)
    assert codes.tolist() == [[255, 1, 0, 1]]
    assert 0 < float(again[0, 1]) < 1e-9


def test_codes_of_extreme_values() -> None:
    for value in (torch.zeros(2, 5), torch.full((2, 5), 3e38), torch.full((2, 5), 1e-44)):
        for dtype in (torch.int8, torch.uint8):
            assert torch.equal(coded(value, dtype)[2], value)
    assert bool(coded(torch.tensor([[1.0, math.nan]]), torch.int8)[2].isnan().all())  # Seen, not hidden.


def test_a_shard_of_rows_is_stored_as_the_whole_is() -> None:
    value = torch.randn(6, 700)
    codes, scale, _ = coded(value, torch.int8)
    for rows in (slice(0, 2), slice(2, 6)):
        some, own, _ = coded(value[rows], torch.int8)
        assert torch.equal(some, codes[rows])
        assert torch.equal(own, scale[rows])


# --- every optimizer ------------------------------------------------------------------------------------------------


def test_which_optimizers_are_able() -> None:
    """All but those whose state must be exact, or has another shape."""
    assert not {"AdaGram", "ELRA"} & set(ABLE)
    assert {"MVNGrad", "NAMO", "HVAdam", "SOAP", "LaProp"} <= set(ABLE)
    for name in OURS:
        if name in ABLE:
            build(name, parameters(), state_dtype="8bit")
            continue
        with pytest.raises(ValueError, match="leave state_dtype out"):
            build(name, parameters(), state_dtype="8bit")


@each_configuration
def test_averages_have_the_shape_of_the_parameter(name: str, arguments: dict[str, Any]) -> None:
    cls: Any = OPTIMIZERS[name].cls
    h = as_attributes(cls.hyperparameters() | {k: v for k, v in arguments.items() if k in cls.fields})
    shapes = buffers_of(cls, (8, 12), h)
    for names in averages_of(cls, h):
        assert all(shapes.get(x, LIKE_PARAMETER) is LIKE_PARAMETER for x in names)


@pytest.mark.parametrize("name", ["MVNGrad", "NAMO", "HVAdam"])
@each_low
def test_bytes_of_state(name: str, state_dtype: str) -> None:
    """An average takes 2 bytes per element, or 1 and 4 per block of up to 256 elements of a row."""
    ps = parameters()
    optimizer = build(name, ps, state_dtype=state_dtype)
    run(optimizer, ps, range(1, 3))
    for key, p in ps.items():
        shape, blocks, *_ = SHAPES[key]
        rows = shape[0] * (shape[1] if "experts" in key or "gate" in key else 1)
        if OPTIMIZERS[name].kind != "matrix":
            rows = shape[0]
        blocks_of_rows = rows * math.ceil(p.numel() / rows / 256)
        averages = 3 if OPTIMIZERS[name].kind != "matrix" else 1 if blocks else 2
        stored_short = p.numel() < 4096 or (state_dtype == "8bit" and key in ("short rows", "vector"))
        if state_dtype == "8bit" and key == "split columns" and OPTIMIZERS[name].kind == "matrix":
            stored_short = True
        each = 4 * p.numel() if stored_short else 2 * p.numel()
        if state_dtype == "8bit" and not stored_short:
            each = p.numel() + 4 * blocks_of_rows
        state = {n: x for n, x in optimizer.state[p].items() if isinstance(x, Tensor) and x.numel() > 8}
        assert sum(x.numel() * x.element_size() for x in state.values()) == averages * each, key


def _differ(a: dict[str, nn.Parameter], b: dict[str, nn.Parameter], start: dict[str, nn.Parameter]) -> float:
    """The difference of two runs over how far one of them went, over all parameters."""
    a, b, start = ({key: p.detach() for key, p in ps.items()} for ps in (a, b, start))
    gap = sum(float((p - q).square().sum()) for p, q in zip(a.values(), b.values()))
    way = sum(float((p - q).square().sum()) for p, q in zip(b.values(), start.values()))
    return math.sqrt(gap / way)


#: How much more of a rounding error some rules make than an average of squares and its root.
SHARP = {"HVAdam": 5}  # It divides by the difference of nearly equal inner products.


@each_run
def test_runs_as_with_float32_states(name: str, state_dtype: str) -> None:
    """The rounding error of a step is about 1e-3 (bfloat16) or 2e-2 (8 bits) of an entry, and averages out."""
    ps, others = parameters(), parameters()
    run(build(name, ps, state_dtype=state_dtype), ps, range(1, 6))
    run(build(name, others), others, range(1, 6))
    assert _differ(ps, others, parameters()) < {"bfloat16": 0.04, "8bit": 0.1}[state_dtype] * SHARP.get(name, 1)


@each_run
def test_resumes_bit_for_bit(name: str, state_dtype: str) -> None:
    ps, others = parameters(), parameters()
    whole = build(name, ps, state_dtype=state_dtype)
    run(whole, ps, range(1, 3))
    saved = through_a_file({"optimizer": whole.state_dict(), "weights": {k: p.detach() for k, p in ps.items()}})
    run(whole, ps, range(3, 5))
    for key, p in others.items():
        p.data.copy_(saved["weights"][key])
    resumed = build(name, others, state_dtype=state_dtype)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, others, range(3, 5))
    assert_equal(everything(resumed, others), everything(whole, ps))


@each_run
def test_backends_agree(name: str, state_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float32 results differ in their last bits, an entry may be rounded to the other neighbour."""
    monkeypatch.setattr("lightning_optim.engine.elementwise.CHUNK", {"cpu": 1500, "cuda": 1500})
    ps, others = parameters(), parameters()
    run(build(name, ps, state_dtype=state_dtype, backend="plain"), ps, range(1, 4))
    run(build(name, others, state_dtype=state_dtype, backend="chunked"), others, range(1, 4))
    # A few entries in ten thousand.
    assert _differ(ps, others, parameters()) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ABLE if OPTIMIZERS[name].kind != "matrix"])
@each_low
def test_compiled_agrees(name: str, state_dtype: str) -> None:
    ps, others = parameters(), parameters()
    run(build(name, ps, state_dtype=state_dtype, backend="compiled"), ps, range(1, 4))
    run(build(name, others, state_dtype=state_dtype, backend="chunked"), others, range(1, 4))
    assert _differ(ps, others, parameters()) < 0.02


@pytest.mark.parametrize("name", ["MVNGrad", "NAMO", "SOAP", "AdaPNM", "HVAdam"])
@pytest.mark.parametrize("before", ["float32", *LOW])
@pytest.mark.parametrize("after", ["float32", *LOW])
def test_state_is_converted(name: str, before: str, after: str) -> None:
    """A checkpoint goes on with another ``state_dtype``: near the run that goes on with its own."""
    ps = parameters()
    optimizer = build(name, ps, state_dtype=before)
    run(optimizer, ps, range(1, 4))
    others = copy.deepcopy(ps)
    other = build(name, others, state_dtype=after)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    start = copy.deepcopy(ps)
    run(optimizer, ps, range(4, 6))
    run(other, others, range(4, 6))
    assert _differ(others, ps, start) < 0.1 * SHARP.get(name, 1)  # As in test_runs_as_with_float32_states.
    fresh = build(name, new := parameters(), state_dtype=after)
    run(fresh, new, range(1, 2))
    kinds = [{n: torch.as_tensor(x).dtype for n, x in fresh.state[p].items()} for p in new.values()]
    assert [{n: torch.as_tensor(x).dtype for n, x in other.state[p].items()} for p in others.values()] == kinds


@pytest.mark.parametrize("name", ["MVNGrad", "NAMO"])
@each_low
def test_distributed_checkpoint_functions(name: str, state_dtype: str) -> None:
    model = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 70))
    ps = dict(model.named_parameters())
    cls: Any = OPTIMIZERS[name].cls
    roles = {"role": "matrix"} if OPTIMIZERS[name].kind == "matrix" else {}

    def made() -> RuleOptimizer:
        return cls(
            [
                {"params": [(n, p) for n, p in ps.items() if p.ndim == 2], **roles},
                {"params": [(n, p) for n, p in ps.items() if p.ndim == 1], **({"role": "fallback"} if roles else {})},
            ],
            state_dtype=state_dtype,
        )

    optimizer = made()
    run(optimizer, ps, range(1, 3))
    saved = get_optimizer_state_dict(model, optimizer)
    again = made()
    set_optimizer_state_dict(model, again, saved)
    assert_equal(everything(again, ps), everything(optimizer, ps))


@pytest.mark.parametrize("name", ["MVNGrad", "NAMO", "AdaBelief"])
@each_low
def test_a_skipped_step_changes_nothing(name: str, state_dtype: str) -> None:
    ps = parameters()
    optimizer = build(name, ps, state_dtype=state_dtype)
    run(optimizer, ps, range(1, 3))
    before = everything(optimizer, ps)
    set_gradients(ps, 3)
    ps["tall"].grad[3, 3] = math.nan  # type: ignore[index]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_equal(everything(optimizer, ps), before)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "split"])
@each_low
def test_with_every_rounding_of_parameters(rounding: Any, state_dtype: Any) -> None:
    for name in ("MVNGrad", "NAMO"):
        ps, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
        run(build(name, ps, rounding=rounding, state_dtype=state_dtype), ps, range(1, 5))
        run(build(name, others, rounding=rounding), others, range(1, 5))
        # A step is as small as the distance of two bfloat16 numbers, so a parameter goes a whole one more or less.
        assert _differ(ps, others, parameters(torch.bfloat16)) < 0.5
        plain = parameters(torch.bfloat16)
        run(build(name, plain, rounding=rounding, state_dtype=state_dtype, backend="plain"), plain, range(1, 5))
        assert _differ(plain, ps, parameters(torch.bfloat16)) < 0.1


@each_low
def test_double_precision_keeps_its_state(state_dtype: Any) -> None:
    ps = parameters(torch.float64)
    optimizer = build("MVNGrad", ps, state_dtype=state_dtype)
    run(optimizer, ps, range(1, 2))
    assert {x.dtype for p in ps.values() for n, x in optimizer.state[p].items() if n != "step"} == {torch.float64}


@each_low
def test_follows_a_cast(state_dtype: Any) -> None:
    """From float32 to bfloat16 and on to float64, in which state is never stored in low precision."""
    for name in ("MVNGrad", "NAMO"):
        ps = parameters()
        optimizer = build(name, ps, state_dtype=state_dtype)
        run(optimizer, ps, range(1, 2))
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            for p in ps.values():
                p.grad = None
                p.data = p.data.to(dtype)
            run(optimizer, ps, range(2, 3))
            low = [x for p in ps.values() for x in optimizer.state[p].values() if storage.is_low(x)]
            assert bool(low) is (dtype != torch.float64)


def test_refused() -> None:
    with pytest.raises(ValueError, match="state_dtype must be one of"):
        lo.MVNGrad([nn.Parameter(torch.ones(2))], state_dtype="4bit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state_dtype is one for all parameters"):
        lo.MVNGrad([{"params": [nn.Parameter(torch.ones(2))], "state_dtype": "8bit"}])


def test_damaged_codes_are_refused() -> None:
    ps = parameters()
    optimizer = build("MVNGrad", ps, state_dtype="8bit")
    run(optimizer, ps, range(1, 2))
    good = optimizer.state_dict()
    for change in ({"m_scale": torch.ones(3)}, {"m": torch.ones(2, dtype=torch.int8)}):
        bad = copy.deepcopy(good)
        bad["state"][0] |= change
        with pytest.raises(CheckpointError, match=r"m(_scale)? is of shape"):
            optimizer.load_state_dict(bad)
    bad = copy.deepcopy(good)
    del bad["state"][0]["m_scale"]
    with pytest.raises(CheckpointError, match="m_scale is missing"):
        optimizer.load_state_dict(bad)


def test_configurations_of_the_rows_run() -> None:
    """Every path through every rule, with a state in 8 bits."""
    for name in ABLE:
        for arguments in CONFIGURATIONS[name][1:]:
            ps = {key: p for key, p in parameters().items() if key in ("tall", "qkv", "small")}
            own = {k: v for k, v in arguments.items() if k != "state_dtype"}
            optimizer = build(name, ps, **own, state_dtype="8bit")
            run(optimizer, ps, range(1, 4))
            assert all(bool(p.isfinite().all()) for p in ps.values())
