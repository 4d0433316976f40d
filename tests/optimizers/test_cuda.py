"""The path that a step takes on a GPU, followed on any machine: tensors without content that say they are there.

They refuse to have their values read, which waits for a GPU, and operations that mix devices. What waits inside of an
operation (decompositions) they do not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_optim.engine.optimizer import RuleOptimizer

from .rows import CONFIGURATIONS, OURS, build

# With a driver torch would make real tensors beside those without content; the tests marked `gpu` run there.
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]

SHAPES = [(5,), (6,), (64, 32), (32, 64), (300, 200), (4, 3, 2, 2)]
#: Steps at which rules work differently: the first, a refresh, and late.
STEPS = (1, 8, 12)


class Transfers(TorchDispatchMode):
    """Notes what goes from device to device, and counts launches."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[str] = []
        self.to_host: list[int] = []
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if len({x.device.type for x in tensors}) > 1:
            if not (kwargs or {}).get("non_blocking"):
                self.blocking.append(str(func))
            elif tensors[-1].is_cpu:
                self.to_host.append(tensors[-1].numel())
        self.launches += func.namespace == "aten" and not func.is_view
        return out


@pytest.fixture
def gpu() -> Iterator[FakeTensorMode]:
    """Tensors without content, and events that are never waited for."""
    with ExitStack() as stack:
        for patch in (
            mock.patch("torch.Event", mock.MagicMock()),
            mock.patch.object(RuleOptimizer, "settle"),
        ):
            stack.enter_context(patch)
        yield FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def at_step(t: int) -> Iterator[None]:
    """What the host knows of step counts, which have no content here either."""

    def read(states: list[Any], names: tuple[str, ...]) -> dict[str, np.ndarray]:
        return {name: np.array([t - 1 if name == "step" else 0.5] * len(states)) for name in names}

    with mock.patch("lightning_optim.engine.batch.counters_of", read):
        yield


def follow(gpu: FakeTensorMode, params: list[Tensor], optimizer: RuleOptimizer) -> Transfers:
    """What is transferred in steps after the first."""
    for t in STEPS:
        optimizer._batches.clear()  # They keep the counts that they began with.
        with gpu, at_step(t):
            for p in params:
                p.grad = torch.randn_like(p)
            with Transfers() as seen:
                optimizer.step()
        if t == 1:
            continue
        assert not seen.blocking, f"step {t}"
        assert seen.to_host == [1], "nothing but the verdict goes to the host"
    return seen


def parameters(gpu: FakeTensorMode, dtypes: tuple[torch.dtype, ...], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    with gpu:
        return [
            nn.Parameter(torch.randn(shape, device="cuda", dtype=dtypes[i % len(dtypes)]))
            for i, shape in enumerate(shapes)
        ]


@pytest.mark.parametrize(("name", "arguments"), [(n, a) for n in OURS for a in CONFIGURATIONS[n]])
def test_a_step_reads_nothing_and_mixes_no_devices(name: str, arguments: dict[str, Any], gpu: FakeTensorMode) -> None:
    if name == "SSO" and arguments.get("tangent", True):
        pytest.skip("how often it orthogonalises depends on the data")
    params = parameters(gpu, (torch.float32, torch.float64), SHAPES)
    follow(gpu, params, build(name, params, backend="chunked", **arguments))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "split"])
@pytest.mark.parametrize("name", ["LaProp", "HVAdam", "NAMO"])
def test_nor_does_one_in_low_precision(name: str, rounding: str, gpu: FakeTensorMode) -> None:
    params = parameters(gpu, (torch.float32, torch.bfloat16), SHAPES)
    follow(gpu, params, build(name, params, backend="chunked", rounding=rounding))


@pytest.mark.parametrize("name", ["LaProp", "HVAdam"])
def test_a_launch_is_worth_it(name: str, gpu: FakeTensorMode) -> None:
    """Tensors that a GPU is done with in less time than a launch takes are joined, and cut into long pieces only."""
    few, many, long = (
        follow(gpu, params, build(name, params, backend="chunked")).launches
        for params in (
            parameters(gpu, (torch.float32,), [(1000, 250)] * 4),
            parameters(gpu, (torch.float32,), [(1000, 250)] * 16),
            parameters(gpu, (torch.float32,), [(1000, 4000)]),
        )
    )
    assert few == many
    assert long < few  # One piece, of which no copies are made.


def test_a_value_that_is_read_would_be_found(gpu: FakeTensorMode) -> None:
    """The tests above can fail."""
    params = parameters(gpu, (torch.float32,), SHAPES)
    optimizer = build("NAMO", params)
    optimizer.observer = lambda p, name, value: float(value.sum())
    with pytest.raises(Exception, match="_local_scalar_dense"):
        follow(gpu, params, optimizer)
    optimizer.observer = lambda p, name, value: value.cpu()
    with pytest.raises(AssertionError, match="step 8"):
        follow(gpu, params, optimizer)
