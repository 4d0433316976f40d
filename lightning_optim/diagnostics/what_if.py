"""Optimizer steps that are tried on a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..processes import placements


class VirtualOptimizer:
    """A copy of an optimizer and its parameters, in the state that they are in.

    Steps made on it leave the optimizer, its parameters, their gradients, hooks, schedulers and all random numbers as
    they were. It takes as much memory as the parameters and the optimizer's state, and during a step that of a copy of
    the gradients and of the changes. Parameters are named by the real ones throughout. An optimizer that draws random
    numbers draws the same ones in each virtual step.

    Args:
        optimizer: Any optimizer that can be deep-copied and whose step needs no closure.
        prepare: Called with the copy between setting the gradients and the step, for instance to clip them.

    Raises:
        RuntimeError: The optimizer cannot be copied, or its copy makes no step.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> virtual = VirtualOptimizer(torch.optim.SGD([w], lr=0.1, momentum=0.9))
        >>> [virtual.step({w: torch.ones(2)})[w] for _ in range(2)]
        [tensor([-0.1000, -0.1000]), tensor([-0.1900, -0.1900])]
        >>> w.data, w.grad
        (tensor([1., 2.]), None)
    """

    def __init__(self, optimizer: Optimizer, prepare: Callable[[Optimizer], None] | None = None) -> None:
        self._name = type(optimizer).__name__
        self._prepare = prepare
        try:
            self._optimizer = copy.deepcopy(optimizer, _copies_of_shards(optimizer))
        except Exception as error:
            raise self._error(error) from error
        self._copies = dict(zip(parameters_of(optimizer), parameters_of(self._optimizer)))
        if any(copied is real for real, copied in self._copies.items()):
            raise self._error("a deep copy of it still holds the same parameters")

    @torch.no_grad()
    def step(self, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Make a step.

        Args:
            gradients: Of the real parameters. Parameters that are left out have none.

        Returns:
            Change of every parameter, by the real ones; at least in float32.
        """
        for p, copied in self._copies.items():
            g = gradients.get(p)
            copied.grad = None if g is None else g.detach().clone()
        if self._prepare is not None:
            self._prepare(self._optimizer)
        # Turned into the changes in place: probes are to hold as few copies as possible.
        changes = {p: _float_copy(copied) for p, copied in self._copies.items()}
        with fork_rng(next(iter(self._copies)).device):
            try:
                self._optimizer.step()
            except Exception as error:
                raise self._error(error) from error
        for p, copied in self._copies.items():
            copied.grad = None
            changes[p].neg_().add_(copied.detach())
        return changes

    def _error(self, reason: object) -> RuntimeError:
        return RuntimeError(
            f"{self._name} makes no steps on a copy, which probes need: {reason}. Use another optimizer, or leave "
            "probe_every_n_steps out."
        )


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer."""
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def gradients_of(optimizer: Optimizer, scale: float = 1.0) -> dict[Tensor, Tensor]:
    """Gradients by parameters, of those that have one, divided by the loss scale that they are still multiplied by."""
    gradients = {p: p.grad for p in parameters_of(optimizer) if p.grad is not None}
    return gradients if scale == 1 else {p: g / scale for p, g in gradients.items()}


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Puts torch's random numbers, on the CPU and on a device, back at its end."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def _copies_of_shards(optimizer: Optimizer) -> dict[int, Tensor]:
    """Copies of sharded parameters and state by their ids, as ``copy.deepcopy`` wants them; it cannot make its own."""
    copies: dict[int, Tensor] = {}
    for p in parameters_of(optimizer):
        if placements(p) is not None:
            copies[id(p)] = nn.Parameter(p.detach().clone(), p.requires_grad)
        copies |= {id(x): x.clone() for x in optimizer.state.get(p, {}).values() if placements(x) is not None}
    return copies


def _float_copy(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)
