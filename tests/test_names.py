"""Names of parameters do not depend on what modules are wrapped in: in optimizers, checkpoints and patterns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.optim import Optimizer

from lightning_optim import Grouping, MVNGrad, build_optimizer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def fabric() -> L.Fabric:
    return L.Fabric(accelerator="cpu", devices=1)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


class Module(nn.Module):
    """Calls what it wraps ``module``, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda module: module,
    "Fabric": lambda module: fabric().setup(module),
    "torch.compile": compiled,
    "module": Module,
    "activation checkpoints": checkpoint_wrapper,
    "Fabric of compiled": lambda module: fabric().setup(compiled(module)),
    "compiled of Fabric": lambda module: compiled(fabric().setup(module)),
    "Fabric of module of compiled": lambda module: fabric().setup(Module(compiled(module))),
    "compiled module of activation checkpoints": lambda module: compiled(Module(checkpoint_wrapper(module))),
}

EXPECTED = {f"{i}.{leaf}" for i in (0, 2, 4) for leaf in ("weight", "bias")}


def names(optimizer: Optimizer) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def step(module: nn.Module, optimizer: Optimizer) -> None:
    torch.manual_seed(1)
    module(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("optimizer", ["NAMO", "MVNGrad", "AdamW"])
def test_names_and_patterns(wrapper: str, optimizer: str) -> None:
    module = WRAPPERS[wrapper](net())
    built = build_optimizer(module, optimizer, Grouping(lr_multipliers={"0.*": 0.5}))
    assert set(names(built)) == EXPECTED


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("how", ["build_optimizer", "named_parameters"])
def test_state_goes_from_any_wrapper_to_any(wrapper: str, how: str) -> None:
    def build(module: nn.Module) -> Optimizer:
        return build_optimizer(module, "NAMO") if how == "build_optimizer" else MVNGrad(module.named_parameters())

    wrapped, plain = WRAPPERS[wrapper](net()), net()
    one, two = build(wrapped), build(plain)
    step(wrapped, one)
    step(plain, two)
    for source, target in ((one, two), (two, one)):
        kept = names(target)
        target.load_state_dict(source.state_dict())
        assert names(target) == kept
    step(wrapped, one)
    step(plain, two)
    assert all(torch.equal(p, q) for p, q in zip(wrapped.parameters(), plain.parameters()))


PARAMETRISATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", PARAMETRISATIONS)
@pytest.mark.parametrize("wrapper", ["nothing", "Fabric of module of compiled"])
def test_patterns_find_parametrised_weights_by_the_weights_name(name: str, wrapper: str) -> None:
    module = net()
    PARAMETRISATIONS[name](module[0])
    expected = {key for key, _ in module.named_parameters() if key.startswith("0.parametrizations.weight.")}
    grouping = Grouping(lr_multipliers={"0.weight": 0.5})
    built = build_optimizer(WRAPPERS[wrapper](module), "MVNGrad", grouping, lr=1.0)
    assert {key for group in built.param_groups if group["lr"] == 0.5 for key in group["param_names"]} == expected


def test_fabric_saves_and_loads(tmp_path: Path) -> None:
    """What is saved by an optimizer that is built before setup is loaded by one that is built after it."""
    lightning = fabric()
    module = net()
    optimizer: Any = build_optimizer(module, "NAMO")
    module, optimizer = lightning.setup(module, optimizer)
    step(module, optimizer)
    lightning.save(tmp_path / "a.ckpt", {"module": module, "optimizer": optimizer})

    after: Any = lightning.setup(net())
    built: Any = lightning.setup_optimizers(build_optimizer(after, "NAMO"))
    lightning.load(tmp_path / "a.ckpt", {"module": after, "optimizer": built})
    step(module, optimizer)
    step(after, built)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), after.parameters()))


def test_names_that_would_be_equal_stay() -> None:
    p, q = (nn.Parameter(torch.ones(2, 2)) for _ in "pq")
    saved = MVNGrad([("module.a", p), ("a", q)]).state_dict()
    again = MVNGrad([("a", q), ("module.a", p)])
    again.load_state_dict(saved)
    assert names(again) == ["a", "module.a"]
