"""Parameters whose blocks are several matrices of their own sizes: each runs as if it were a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lightning_optim as lo
from lightning_optim.engine.checkpoint import CheckpointError
from lightning_optim.engine.layout import matrices_in
from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.engine.rule import RULES
from lightning_optim.registry import OPTIMIZERS

from .rows import MATRIX, gradients


class Case(NamedTuple):
    shape: tuple[int, ...]
    group: dict[str, Any]

    def matrices(self, x: Tensor) -> list[Tensor]:
        """Every matrix of a parameter, as views; written without the engine."""
        blocks = self.group.get("blocks", 1)
        if x.ndim == 3:
            each = list(x.reshape(blocks, -1, x.shape[-1])) if blocks > len(x) else list(x)
        else:
            each = list(x.unflatten(0, (blocks, -1))) if x.ndim == 2 else [x]
        if self.group.get("transposed"):
            each = [block.transpose(0, 1) for block in each]
        split = self.group.get("split") or (each[0].shape[0],)
        if self.group.get("interleaved"):
            return [block[j :: len(split)] for block in each for j in range(len(split))]
        return [part for block in each for part in block.split(split)]


CASES = {
    "grouped queries": Case((16, 5), {"split": (8, 4, 4)}),
    "latent keys and values": Case((15, 4), {"blocks": 3, "split": (3, 2)}),
    "Linear stored transposed": Case((5, 12), {"transposed": True, "split": (6, 4, 2)}),
    "convolution": Case((9, 4, 1, 1), {"split": (5, 2, 2)}),
    "experts": Case((3, 10, 4), {"blocks": 3, "split": (6, 4)}),
    "experts of equal halves": Case((3, 10, 4), {"blocks": 6}),
    "experts stored transposed": Case((3, 4, 10), {"blocks": 3, "transposed": True, "split": (5, 5)}),
    "gate and up in turn": Case((3, 4, 10), {"blocks": 3, "transposed": True, "split": (5, 5), "interleaved": True}),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
#: Rules with state of the matrices' shape, of their rows, columns and axes, and with phases.
SOME = ("NAMO", "NAMOD", "NorMuon", "SOAP", "DeVA")


def whole(case: Case, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return nn.Parameter(x.to(dtype))


def build(name: str, params: Sequence[Tensor], group: dict[str, Any], **arguments: Any) -> RuleOptimizer:
    # Which step refreshes a parameter's bases follows from its position, which parts have not in common.
    if "precondition_frequency" in OPTIMIZERS[name].defaults:
        arguments = {"precondition_frequency": 2, "stagger": False} | arguments
    cls: Any = OPTIMIZERS[name].cls
    return cls([{"params": list(params), "role": "matrix", **group}], **arguments)


def train(optimizer: RuleOptimizer, p: nn.Parameter, steps: Sequence[int]) -> None:
    for t in steps:
        p.grad = gradients([p], t)[0]
        optimizer.step()


def apart(name: str, case: Case, p: nn.Parameter, steps: Sequence[int], **arguments: Any) -> list[nn.Parameter]:
    """The same matrices, trained as parameters of their own."""
    parts = [nn.Parameter(x.detach().clone()) for x in case.matrices(p)]
    optimizer = build(name, parts, {}, **arguments)
    for t in steps:
        for part, g in zip(parts, case.matrices(gradients([p], t)[0])):
            part.grad = g.clone()
        optimizer.step()
    return parts


@each_case
@pytest.mark.parametrize("backend", ["plain", "chunked"])
@pytest.mark.parametrize("name", MATRIX)
def test_each_matrix_moves_as_a_parameter_of_its_own(name: str, backend: str, case: Case) -> None:
    p = whole(case)
    decay = {"weight_decay": 0.1} if "weight_decay" in OPTIMIZERS[name].defaults else {}
    parts = apart(name, case, p, range(1, 5), **decay)
    optimizer = build(name, [p], case.group, backend=backend, **decay)
    train(optimizer, p, range(1, 5))
    for x, part in zip(case.matrices(p), parts):
        # Matrix products of a stack sum in another order, 1e-16 each; Newton-Schulz and bases amplify that.
        torch.testing.assert_close(x, part, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", [Case((16, 5), {"split": (8, 5, 3)})])
def test_two_parameters_of_one_group(case: Case) -> None:
    ps, alone = [whole(case), whole(case)], whole(case)
    optimizer, single = build("NAMO", ps, case.group), build("NAMO", [alone], case.group)
    for t in (1, 2, 3, 4):
        for p in (*ps, alone):
            p.grad = gradients([alone], t)[0]
        if t == 2:
            ps[1].grad = None  # Its count is another from here on.
        optimizer.step()
        single.step()
    assert [int(optimizer.state[p]["step"]) for p in ps] == [4, 3]
    torch.testing.assert_close(ps[0], alone, rtol=1e-12, atol=1e-12)  # float64; stacks of other sizes


@each_case
@pytest.mark.parametrize("name", SOME)
def test_a_resumed_run_goes_on_bit_for_bit(name: str, case: Case) -> None:
    p = whole(case, torch.float32)
    optimizer = build(name, [p], case.group)
    train(optimizer, p, (1, 2, 3))
    q = nn.Parameter(p.detach().clone())
    resumed = build(name, [q], case.group)
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, p, (4, 5))
    train(resumed, q, (4, 5))
    assert torch.equal(p, q)


@each_case
@pytest.mark.parametrize("rounding", ["split", "stochastic", "kahan"])
def test_bfloat16_is_rounded_alike_whole_and_in_pieces(rounding: str, case: Case) -> None:
    found = []
    for backend in ("plain", "chunked"):
        p = whole(case, torch.bfloat16)
        optimizer = build("NAMO", [p], case.group, backend=backend, rounding=rounding)
        train(optimizer, p, range(1, 6))
        found.append(p.detach())
    # One unit of bfloat16 where the float32 results, 1e-6 apart, lie on two sides of a boundary, which is rare; with
    # other random numbers half of the entries would differ.
    torch.testing.assert_close(*found, rtol=2**-7, atol=0)
    assert (found[0] != found[1]).float().mean() < 0.05


@each_case
def test_observers_are_told_part_by_part(case: Case) -> None:
    for backend in ("plain", "chunked"):
        p, seen = whole(case), []
        optimizer = build("NAMO", [p], case.group, backend=backend)
        optimizer.observer = lambda p, name, x: seen.append(x) if name == "orthogonal_factor" else None  # noqa: B023
        train(optimizer, p, [1])
        expected = matrices_in(p, optimizer.param_groups[0])
        assert [x.shape for x in seen] == [x.shape for x in expected]


@pytest.mark.parametrize("name", [name for name in MATRIX if RULES[name].flatten])
def test_matrices_in_a_parameter(name: str) -> None:
    for case in CASES.values():
        group = {"blocks": 1, "transposed": False} | case.group
        found = [x.flatten() for part in matrices_in(whole(case), group) for x in part]
        key = lambda x: x.tolist()  # noqa: E731
        assert sorted(map(key, found)) == sorted(x.flatten().tolist() for x in case.matrices(whole(case)))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"split": (8, 4)}, r"split=\(8, 4\) adds up to 12, and a matrix of \(16, 5\) has 16 rows"),
        ({"blocks": 2, "split": (8, 4, 4)}, "has 8 rows"),
        ({"split": (8, 8, 0)}, "split must be several whole numbers >= 1"),
        ({"split": (12, 4), "interleaved": True}, "parts are not equal"),
        ({"blocks": 3, "split": (8, 8)}, "blocks=3 does not divide"),
    ],
)
def test_what_does_not_fit_is_refused(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("NAMO", [nn.Parameter(torch.ones(16, 5))], group)


def test_a_checkpoint_of_another_split_is_refused() -> None:
    p = whole(CASES["grouped queries"])
    optimizer = build("NAMO", [p], {"split": (8, 4, 4)})
    train(optimizer, p, [1])
    other = lo.NAMO([{"params": [p], "role": "matrix", "split": (12, 2, 2)}])
    with pytest.raises(CheckpointError, match=r"split \(8, 4, 4\) in the checkpoint, \(12, 2, 2\) here"):
        other.load_state_dict(optimizer.state_dict())
