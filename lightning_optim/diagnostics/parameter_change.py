"""What one optimizer step did to parameters, and the sums over elements from which statistics are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import chain

import torch
from torch import Tensor

from ..devices import widest

#: Sums by name, each with one entry per parameter, or 0-d when added up over parameters.
Sums = dict[str, Tensor]


@dataclass
class Change:
    """The real change of some parameters in one optimizer step, measured and not derived from optimizer state.

    Every sum is a vector with one entry per parameter. Sums of shards of a parameter, or of several parameters, add
    up to the sum of the whole, so that one addition over processes is all that sharded training needs.

    Args:
        names: Names of the parameters.
        weights: The parameters after the step (on sharded training: the local parts).
        updates: After minus before, in float32 or float64.
        gradients: What the optimizer consumed: unscaled and clipped.
        lrs: Learning rate of the step, per parameter.

    Example:
        >>> change = Change(["w"], [torch.tensor([3.0, 4.0])], [torch.tensor([-0.1, 0.0])], [torch.ones(2)], [0.1])
        >>> change.update_sq, change.weight_sq, change.stalled
        (tensor([0.0100]), tensor([25.]), tensor([1.]))
    """

    names: Sequence[str]
    weights: Sequence[Tensor]
    updates: Sequence[Tensor]
    gradients: Sequence[Tensor]
    lrs: Sequence[float]

    @cached_property
    def numel(self) -> Tensor:
        """Number of elements."""
        return torch.tensor([w.numel() for w in self.weights], dtype=torch.float32, device=self._device)

    @cached_property
    def update_sq(self) -> Tensor:
        """Sum of squared updates."""
        return sum_of_squares(self.updates)

    @cached_property
    def update_abs(self) -> Tensor:
        """Sum of absolute updates."""
        return self._stack([u.abs().sum() for u in self.updates])

    @cached_property
    def driven(self) -> Tensor:
        """Number of elements whose gradient is not zero."""
        return self._stack([torch.count_nonzero(g) for g in self.gradients])

    @cached_property
    def stalled(self) -> Tensor:
        """Number of elements that did not change although their gradient is not zero."""
        moved = [torch.count_nonzero(torch.logical_and(u, g)) for u, g in zip(self.updates, self.gradients)]
        return self.driven - self._stack(moved)

    @cached_property
    def weight_sq(self) -> Tensor:
        """Sum of squared weights, after the step."""
        return sum_of_squares(self.weights)

    @cached_property
    def gradient_sq(self) -> Tensor:
        """Sum of squared gradients."""
        return squares_of_gradients(self.gradients)

    @cached_property
    def update_dot_gradient(self) -> Tensor:
        """Inner product of update and gradient."""
        return inner_products(self.updates, self.gradients)

    def _stack(self, values: Sequence[Tensor]) -> Tensor:
        dtype = torch.promote_types(values[0].dtype, torch.float32)
        return torch.stack([value.to(self._device, dtype) for value in values])

    @property
    def _device(self) -> torch.device:
        return self.weights[0].device


def sum_of_squares(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum of squares of each tensor, shape ``(len(tensors),)``, at least in ``dtype``.

    >>> sum_of_squares([torch.tensor([3.0, 4.0]), torch.zeros(0)])
    tensor([25.,  0.])
    """
    dtype = reduce(torch.promote_types, {x.dtype for x in tensors}, dtype)
    if max(x.numel() for x in tensors) <= _BLOCK:
        return _together(torch._foreach_norm(list(tensors), 2, dtype)).square()
    blocks = [_blocks(x, dtype) for x in tensors]
    squares = _together(torch._foreach_norm(list(chain.from_iterable(blocks)), 2, dtype)).square()
    return torch.stack([of_one.sum() for of_one in squares.split([len(of_one) for of_one in blocks])])


def _together(scalars: Sequence[Tensor]) -> Tensor:
    """0-d tensors as one vector, on the device of the first."""
    device = scalars[0].device
    return torch.stack([x if x.device == device else x.to(device) for x in scalars])


def squares_of_gradients(gradients: Sequence[Tensor]) -> Tensor:
    """:func:`sum_of_squares`, in float64 where their sum is beyond float32: the square of a norm above 1.8e19.

    Whether it is would have to be read, which a CPU can do at once and an accelerator has to be waited for. So there
    float64 is taken always (float32 where there is none). What that costs has not been measured on one.

    >>> squares_of_gradients([torch.full((4,), 1e20)])
    tensor([4.0000e+40], dtype=torch.float64)
    """
    device = gradients[0].device
    if device.type == "cpu" and math.isfinite((squares := sum_of_squares(gradients)).sum()):
        return squares
    return sum_of_squares(gradients, widest(device))


def inner_products(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Inner product of each pair of tensors, shape ``(len(xs),)``."""
    products = [torch.stack([_dot(a, b) for a, b in zip(_blocks(x), _blocks(y))]).sum() for x, y in zip(xs, ys)]
    return torch.stack([product.to(products[0].device) for product in products])


def _dot(x: Tensor, y: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.dot(x.reshape(-1).to(dtype), y.reshape(-1).to(x.device, dtype))


#: Elements that a CPU adds up at once. It does so one after another: of 5e7 in float32, squares lose 0.4 % to 6 %.
_BLOCK = 1 << 18
#: Elements that a GPU adds up at once in a wider dtype than their own, of which torch makes a copy.
_COPY = 1 << 24


def _blocks(x: Tensor, dtype: torch.dtype = torch.float32) -> Sequence[Tensor]:
    """A tensor in blocks small enough to be added up in ``dtype``: for precision on a CPU, for memory elsewhere."""
    most = _BLOCK if x.device.type == "cpu" else _COPY if dtype.itemsize > max(4, x.dtype.itemsize) else x.numel()
    if x.numel() <= most:
        return [x]
    longest = max(range(x.ndim), key=lambda axis: x.shape[axis])
    return x.split(max(1, most * x.shape[longest] // x.numel()), longest)


def sample(x: Tensor, most: int = 4096, start: int = 0, numel: int | None = None) -> Tensor:
    """At most ``most`` elements of a tensor, equally spaced and always the same, as a vector (a view or copy).

    What has to be remembered of updates from step to step is remembered of these only, so that it takes no memory to
    speak of. A shard that holds the elements from ``start`` on of a tensor of ``numel`` has its part of the whole's.

    >>> sample(torch.arange(10), most=4)
    tensor([0, 3, 6, 9])
    >>> sample(torch.arange(5, 10), most=4, start=5, numel=10)
    tensor([6, 9])
    """
    stride = max(1, -(-(numel or x.numel()) // most))
    return x.reshape(-1)[-start % stride :: stride]
