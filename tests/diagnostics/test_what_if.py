"""Virtual steps are the steps that the optimizer would make, and leave no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

import lightning_optim as lo
from lightning_optim.diagnostics import VirtualOptimizer
from lightning_optim.diagnostics.what_if import gradients_of
from lightning_optim.engine.two_rules import MatrixOptimizer
from lightning_optim.registry import OPTIMIZERS

TORCH: dict[str, Any] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.1, foreach=True),
    "AdamW-fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1, momentum=0.5),
    "Muon-torch": lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2], lr=0.1),
}


def ours(name: str) -> Any:
    cls: Any = OPTIMIZERS[name].cls
    if not issubclass(cls, MatrixOptimizer):
        return cls
    return lambda ps: cls(
        [
            {"params": [p for p in ps if p.ndim >= 2], "role": "matrix"},
            {"params": [p for p in ps if p.ndim < 2], "role": "fallback"},
        ]
    )


BUILD = {name: ours(name) for name in OPTIMIZERS if name not in TORCH} | TORCH


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [x for p in params for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    return [x.detach() for x in (*params, *state, *(p.grad for p in params))]


@pytest.mark.parametrize("name", BUILD)
def test_virtual_steps_foretell_real_ones_and_leave_no_trace(name: str) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))]
    optimizer = BUILD[name](params)
    LinearLR(optimizer)  # which replaces optimizer.step
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for t in range(3):
        set_gradients(params, t)
        optimizer.step()
    set_gradients(params, 3)
    before, rng = [x.clone() for x in tensors(optimizer)], torch.get_rng_state()

    virtual = VirtualOptimizer(optimizer)
    foretold = [virtual.step(gradients_of(optimizer)) for _ in range(2)]

    assert all(torch.equal(x, y) for x, y in zip(tensors(optimizer), before, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert len(calls) == 3
    for updates in foretold:
        start = {p: p.detach().clone() for p in updates}
        optimizer.step()
        assert all(torch.equal(p.detach() - start[p], u) for p, u in updates.items())
        assert any(u.any() for u in updates.values())


class Noisy(torch.optim.SGD):
    """Draws random numbers, as Langevin dynamics does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn(p.shape))


def test_random_numbers_of_an_optimizer_are_put_back() -> None:
    w = nn.Parameter(torch.zeros(3))
    optimizer = Noisy([w], lr=0.1)
    torch.manual_seed(5)
    foretold = VirtualOptimizer(optimizer).step({w: torch.zeros(3)})[w]
    optimizer.step()
    assert torch.equal(w.detach(), foretold)


def test_low_precision_updates_are_those_of_the_rounded_weights() -> None:
    w = nn.Parameter(torch.full((2,), 256.0, dtype=torch.bfloat16))
    update = VirtualOptimizer(torch.optim.SGD([w], lr=1.0)).step({w: torch.tensor([0.25, 4.0], dtype=torch.bfloat16)})[
        w
    ]
    assert update.dtype == torch.float32
    assert update.tolist() == [0.0, -4.0]  # bfloat16 has steps of 2 above 256 and of 1 below


def test_parameters_without_a_gradient_stay() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    updates = VirtualOptimizer(lo.MVNGrad([a, b], lr=0.1)).step({a: torch.ones(2)})
    assert updates[a].all()
    assert not updates[b].any()


def test_gradients_are_prepared_on_the_copy() -> None:
    w = nn.Parameter(torch.zeros(2))
    clip = lambda optimizer: torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)  # noqa: E731
    gradient = torch.tensor([30.0, 40.0])
    update = VirtualOptimizer(torch.optim.SGD([w], lr=1.0), clip).step({w: gradient})[w]
    # clip_grad_norm_ divides by the norm plus 1e-6.
    torch.testing.assert_close(update, torch.tensor([-0.6, -0.8]), atol=1e-6, rtol=0)
    assert gradient.tolist() == [30.0, 40.0]


class Uncopyable(torch.optim.SGD):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle '_thread.lock' object")


class Shared(torch.optim.SGD):
    def __deepcopy__(self, memo: Any) -> Any:
        return copy.copy(self)


@pytest.mark.parametrize("cls", [Uncopyable, Shared, torch.optim.LBFGS])
def test_optimizers_that_make_no_virtual_steps_are_named(cls: Any) -> None:
    w = nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match=f"{cls.__name__} makes no steps on a copy"):
        VirtualOptimizer(cls([w])).step({w: torch.ones(2)})
    assert not w.any()
