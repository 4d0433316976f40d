"""The slowly rotating eigenbasis that SOAP, spectral DeVA and KL-Shampoo work in.

Matrix products run in the precision of the state, regardless of autocast and settings such as TF32: ten bits are too
few for averages that change by a few percent per step or less.

Tensors come in stacks ``(k, *shape)`` of equal shape. Every axis ``i`` that is not too long has a running average
``gram{i}`` of the gradient's outer products, summed over the other axes, and a matrix ``basis{i}`` whose columns
approximate the average's eigenvectors. Both are ``(k, d, d)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from . import devices
from .engine.arithmetic import squared_norm
from .engine.rule import Internal, Observer, Shape, ignore
from .polar import symmetric_product

_KERNEL = 64  # The axes of a kernel with up to this many positions are treated as one, which saves transposing them.
_LONG = 1024  # Up to this length, float64 eigenvectors take a fraction of a second on any GPU.
_RIDGE = 1e-9  # Relative to the mean eigenvalue: float64 resolves it, float32 does not.


class Eigenbasis:
    """The bases of the axes of one stack of tensors; they are kept in state tensors.

    Args:
        axes: The preconditioned axes; axis 0 is the first one after that of the stack.
        state: State tensors as attributes, including those of :func:`axis_buffers`, which are updated in place.
    """

    def __init__(self, axes: tuple[int, ...], state: Any) -> None:
        self.axes = axes
        self.state: dict[str, Tensor] = {name: getattr(state, name) for i in axes for name in (f"gram{i}", f"basis{i}")}

    def rotate(self, x: Tensor) -> Tensor:
        """Coordinates of ``x`` in the bases."""
        with devices.full_precision(x):
            for axes in self._joined():
                x = _along(x, axes, self._basis(axes))
        return x

    def rotate_back(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`rotate`."""
        with devices.full_precision(x):
            for axes in self._joined():
                x = _along(x, axes, self._basis(axes).mT)
        return x

    def accumulate(self, g: Tensor, beta: float) -> None:
        """Average the outer products of the gradient ``g`` with weight ``1 - beta``."""
        with devices.full_precision(g):
            self._accumulate(g, beta)

    def _accumulate(self, g: Tensor, beta: float) -> None:
        for axes in self._joined():
            x = _join(g, axes)
            if _is_last(axes[0], x):
                columns = x.flatten(1, -2)
                rows = columns.mT
            else:
                rows = x.movedim(axes[0] + 1, 1).reshape(len(x), x.shape[axes[0] + 1], -1)
                columns = rows.mT
            if len(axes) == 1:
                gram = self.state[f"gram{axes[0]}"]
                symmetric_product(rows, columns, gram, beta, 1 - beta, out=gram)
                continue
            lengths = [g.shape[axis + 1] for axis in axes]
            product = torch.bmm(rows, columns).view(-1, *lengths, *lengths)
            labels = list(range(1, len(axes) + 1))
            for i, axis in enumerate(axes):  # The trace over the other axes.
                others = [*labels[:i], 0, *labels[i + 1 :]]
                part = torch.einsum(product, [..., *labels, *others], [..., labels[i], 0])
                self.state[f"gram{axis}"].mul_(beta).add_(part, alpha=1 - beta)

    def _joined(self) -> list[tuple[int, ...]]:
        """The axes to rotate along; the axes of a small kernel count as one."""
        kernel = tuple(axis for axis in self.axes if axis >= 2)
        lengths = [self.state[f"basis{axis}"].shape[-1] for axis in kernel]
        if kernel != tuple(range(2, 2 + len(kernel))) or prod(lengths) > _KERNEL or not kernel:
            return [(axis,) for axis in self.axes]
        return [*((axis,) for axis in self.axes if axis < 2), kernel]

    def _basis(self, axes: Sequence[int]) -> Tensor:
        """The basis of joined axes: the Kronecker product of their bases."""
        return reduce(_kronecker, (self.state[f"basis{axis}"] for axis in axes))

    def start(self) -> None:
        """Set the bases to the eigenvectors of the averages, largest eigenvalue first.

        Eigenvectors of a repeated eigenvalue (such as zero, for a gradient of low rank) can be any basis of the
        eigenspace and differ between LAPACK builds. A tiny ramp on the diagonal makes them unique. Where float64 is
        slow, long axes use float32, which does not resolve the ramp.
        """
        for axis in self.axes:
            gram = self.state[f"gram{axis}"]
            slow = gram.shape[-1] > _LONG and devices.multiplies_float64_slowly(gram.device)
            gram = devices.able(gram, torch.linalg.eigh, gram.dtype if slow else torch.float64)
            n = gram.shape[-1]
            trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
            ramp = torch.linspace(1, 0, n, dtype=gram.dtype, device=gram.device).diag()
            scale = torch.where(trace > 0, _RIDGE * trace / n, 1.0)
            self.state[f"basis{axis}"].copy_(torch.linalg.eigh(gram + scale * ramp).eigenvectors.flip(-1))

    def refresh(self, permute: Callable[[int, Tensor], None] | None = None) -> None:
        """Follow the averages by one step of orthogonal iteration.

        Args:
            permute: Called as ``permute(axis, order)``, with ``order`` of shape ``(k, d)``, when columns are sorted by
                their estimated eigenvalues, so that statistics in the rotated coordinates can be sorted with them.
                Without it, columns keep their order.
        """
        for axis in self.axes:
            gram, basis = self.state[f"gram{axis}"], self.state[f"basis{axis}"]
            with devices.full_precision(gram):
                image = gram @ basis
            if permute is not None:
                order = (basis * image).sum(-2).argsort(dim=-1, descending=True, stable=True)
                permute(axis, order)
                image = image.gather(-1, order.unsqueeze(-2).expand_as(image))
            basis.copy_(torch.linalg.qr(devices.able(image, torch.linalg.qr)).Q)

    def report(self, observe: Observer) -> None:
        """Report, for each tensor, the squares off the diagonals of the averages in the bases, and all squares."""
        if observe is ignore:
            return
        squares = [torch.zeros_like(next(iter(self.state.values()))[:, 0, 0])] * 2 if self.axes else []
        for axis in self.axes:
            gram, basis = self.state[f"gram{axis}"], self.state[f"basis{axis}"]
            with devices.full_precision(gram):
                rotated = basis.mT @ gram @ basis
            everything = squared_norm(rotated)[:, 0, 0]
            diagonal = rotated.diagonal(dim1=-2, dim2=-1).square().sum(-1)
            squares = [squares[0] + everything - diagonal, squares[1] + everything]
        if squares:
            observe("basis_squares", torch.stack(squares, -1))


def phases(h: Any) -> int:
    """Over how many steps the refreshes of different parameters are distributed."""
    return h.precondition_frequency if h.stagger else 1


def step_numbers(t: int, phase: int, h: Any, keep: float, correct_bias: bool) -> dict[str, Any]:
    """Numbers of step ``t``. The first step only starts the bases and moves nothing.

    Weight decay comes after the step, so the step is multiplied by its factor ``keep``, too.
    """
    n = t - 1
    correction = sqrt(1 - h.beta2**n) / (1 - h.beta1**n) if correct_bias and n else 1.0
    return {
        "step": keep * h.lr * correction if n else 0.0,
        "keep": keep if n else 1.0,
        **({} if n else {"aligned": None}),
        "shampoo_beta": h.beta2 if h.shampoo_beta is None else h.shampoo_beta,
        "start": n == 0,
        "refresh": refreshes(n, phase, h),
    }


def refreshes(n: int, phase: int, h: Any) -> bool:
    """Whether a parameter refreshes its bases after the ``n``-th step that moves it.

    >>> from types import SimpleNamespace
    >>> h = SimpleNamespace(precondition_frequency=3)
    >>> [n for n in range(8) if refreshes(n, 0, h)], [n for n in range(8) if refreshes(n, 1, h)]
    ([3, 6], [2, 5])
    """
    return n > 0 and (n + phase) % h.precondition_frequency == 0


def axis_buffers(shape: Shape, axes: tuple[int, ...]) -> dict[str, Shape | None]:
    """Shapes of the state of an :class:`Eigenbasis`."""
    return {f"{name}{i}": (shape[i], shape[i]) for i in axes for name in ("gram", "basis")}


def permute_(x: Tensor, axis: int, order: Tensor) -> None:
    """Reorder ``x`` of shape ``(k, *shape)`` in place along ``axis``; axis 0 is the first one after the stack's."""
    index = order.view(order.shape[0], *(-1 if i == axis else 1 for i in range(x.ndim - 1)))
    x.copy_(x.gather(axis + 1, index.expand_as(x)))


def _is_last(axis: int, x: Tensor) -> bool:
    return 1 < axis + 1 == x.ndim - 1


def _join(x: Tensor, axes: Sequence[int]) -> Tensor:
    return x.flatten(axes[0] + 1, axes[-1] + 1)


def _kronecker(a: Tensor, b: Tensor) -> Tensor:
    size = a.shape[-1] * b.shape[-1]
    return (a[:, :, None, :, None] * b[:, None, :, None, :]).reshape(-1, size, size)


def _along(x: Tensor, axes: Sequence[int], matrix: Tensor) -> Tensor:
    """Treat neighbouring axes of every tensor of the stack as one, and multiply it by the matrix from the right."""
    axis, shape = axes[0], x.shape
    x = _join(x, axes)
    if axis == 0:
        return (matrix.mT @ x.reshape(*x.shape[:2], -1)).view(shape)
    if _is_last(axis, x):
        return (x.flatten(1, -2) @ matrix).view(shape)
    y = x.movedim(axis + 1, -1)
    return (y.flatten(1, -2) @ matrix).view(y.shape).movedim(-1, axis + 1).reshape(shape)


#: Zero when the basis consists of eigenvectors; near 1 it is refreshed too rarely.
BASIS_ERROR = Internal(
    "share of the preconditioner's norm that is off the diagonal in the basis in use",
    lambda squares: squares.sum(0).unbind(),
    reported="basis_squares",
    value=lambda off_diagonal, everything: (off_diagonal.clamp(min=0) / everything).sqrt(),
)
