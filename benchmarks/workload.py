"""The benchmark's models: parameters and random gradients. Only their shapes matter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.engine.two_rules import MatrixOptimizer
from lightning_optim.grouping import Grouping, parameter_groups
from lightning_optim.routing import route


class Layer(nn.Module):
    """The weights of a transformer layer: ten tensors, six of them matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)


def _layers(width: int, count: int = 6) -> nn.Sequential:
    return nn.Sequential(*(Layer(width) for _ in range(count)))


def _cnn_small() -> nn.Module:
    channels = (3, 32, 64, 96, 128, 192, 96)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(channels):
        layers += [nn.Conv2d(fan_in, fan_out, 3, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 100))


def _gpt2() -> nn.Module:
    # Here, because importing models imports Lightning, which `benchmarks.gpu` does without.
    from lightning_optim.models.networks import GPT, PRESETS, GPTConfig

    config = PRESETS["gpt"]["gpt2-124m"]
    assert isinstance(config, GPTConfig)
    return GPT(50257, 1024, config)


def _embedded(width: int, count: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(50257, width), nn.Embedding(1024, width), *_layers(width, count))


#: The models by name: no matrix shape twice (0.6M parameters), 60 tensors (2.7M), 60 tensors (18.9M), the GPT-2 of
#: this library, with its embedding of 38.6M among 148 tensors (124M), and the weights of GPT-2's two smaller sizes with
#: separate projections (124M in 122 tensors, 354M in 242).
MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn-small": _cnn_small,
    "vit-tiny": lambda: _layers(192),
    "d512": lambda: _layers(512),
    "gpt2-124m": _gpt2,
    "w768": lambda: _embedded(768, 12),
    "w1024": lambda: _embedded(1024, 24),
}


def _block(x: Tensor, i: int, blocks: int) -> Tensor:
    return x.unflatten(0, (blocks, -1))[i]


def _matrix(x: Tensor, i: int, blocks: int) -> Tensor:
    return _block(x, i, blocks).flatten(1)


class Workload:
    """The parameters of a module and two sets of random gradients, shared by everything that is timed on them.

    Gradients alternate between the sets: refilling them would take longer than a step, and with a constant gradient
    variances around the momentum would shrink until arithmetic on subnormal numbers is what is timed. A set that an
    optimizer has written to is refilled.

    Args:
        module: The module; it lies on the device already.
        matrix: Patterns of parameters to take for hidden matrices, as in :func:`lightning_optim.routing.route`.

    Attributes:
        blocks: Every hidden matrix as a leaf of its own, for optimizers without routing: packed projections block by
            block, convolutions with all their axes. They share the parameters' memory.
        matrices: The same as two-dimensional leaves, convolutions as (out, in * k * k).
        others: The remaining parameters.
    """

    def __init__(self, module: nn.Module, matrix: tuple[str, ...] = ()) -> None:
        self.module = module
        self.matrix = matrix
        self.parameters = list(module.parameters())
        self.device = self.parameters[0].device
        self.size = sum(p.numel() for p in self.parameters)
        self.blocks: list[Tensor] = []
        self.matrices: list[Tensor] = []
        self.others: list[Tensor] = []
        self._views: list[tuple[Tensor, int, Callable[[Tensor], Tensor]]] = []
        for index, (p, where) in enumerate(zip(self.parameters, route(module, matrix).values())):
            if where.role == "fallback":
                self.others.append(p)
                continue
            for i in range(where.blocks):
                self._add_view(self.blocks, index, partial(_block, i=i, blocks=where.blocks))
                self._add_view(self.matrices, index, partial(_matrix, i=i, blocks=where.blocks))
        self._sets = [[torch.randn_like(p) for p in self.parameters] for _ in range(2)]
        self._versions = [[g._version for g in gradients] for gradients in self._sets]

    def _add_view(self, leaves: list[Tensor], index: int, view: Callable[[Tensor], Tensor]) -> None:
        leaves.append(nn.Parameter(view(self.parameters[index].detach())))
        self._views.append((leaves[-1], index, view))

    def groups(self, optimizer: type[Optimizer]) -> list[dict[str, Any]]:
        """The parameters as one of our optimizers takes them: with matrix groups if it has a matrix rule."""
        routed = issubclass(optimizer, MatrixOptimizer)
        routes = route(self.module, self.matrix)
        return parameter_groups(self.module, routes, Grouping(no_decay=[]), routed, lambda groups: [{}] * len(groups))

    def load(self, step: int) -> None:
        """Give every parameter its gradient for a step."""
        gradients, versions = self._sets[step % 2], self._versions[step % 2]
        for i, g in enumerate(gradients):
            if g._version != versions[i]:
                g.normal_()
                versions[i] = g._version
        for p, g in zip(self.parameters, gradients):
            p.grad = g
        for leaf, index, view in self._views:
            leaf.grad = view(gradients[index])

    @property
    def iteration_flops(self) -> float:
        """Floating-point operations of five quintic Newton-Schulz steps on every hidden matrix."""
        sides = [sorted(x.shape) for x in self.matrices]
        return 5.0 * sum(4 * m * m * n + 2 * m**3 for m, n in sides)
