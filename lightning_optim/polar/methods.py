"""The polar factor of a matrix: by polynomial iteration, or exactly by singular value decomposition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import devices, private
from .minimax import Coefficients
from .presets import Iteration, find
from .products import symmetric_baddbmm, symmetric_product

_SHORT_GRAM = 3  # Steps per Gram matrix; more lose small singular values, since the eigenvalues of A are their squares.
_LONG = 2  # Aspect ratio from which several steps on one Gram matrix pay.


def orthogonalize(x: Tensor, method: str = "pe6", dtype: torch.dtype | None = None) -> Tensor:
    r"""The (approximate) polar factor :math:`U V^\top` of every matrix :math:`U S V^\top`.

    A zero matrix stays zero. With ``"exact"`` the null directions of a singular matrix stay zero, too; an iteration
    multiplies small singular values by its slope at zero. The scale of a matrix does not matter, from the smallest
    subnormal numbers to the largest finite ones. A matrix that holds NaN or infinity becomes NaN, and the others of
    the stack are unaffected.

    Args:
        x: Shape ``(..., m, n)``, any floating dtype.
        method: A name in :data:`METHODS`, ``"kjN"`` for N of Keller Jordan's steps, or ``"exact"``. The default is the
            one with the fewest steps whose error is limited by rounding, for singular values above a hundredth of the
            largest.
        dtype: Dtype of the matrix products; ``None`` for :func:`iteration_dtype`. Norms are at least in float32.

    Returns:
        A new tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: There is no such method.

    Example:
        >>> x = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
        >>> orthogonalize(x, "exact")
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
        >>> orthogonalize(x, "pe8")
        tensor([[1.0000, 0.0000, 0.0000],
                [0.0000, 1.0000, 0.0000]])
    """
    if method == "exact":
        return exact_polar(x)
    iteration = find(method)
    if x.numel() == 0:
        return x.clone()
    stack, size = x.reshape(-1, *x.shape[-2:]), _stack_size(x)
    parts = stack.split(size) if len(stack) > size else (stack,)
    factors = [_iterate(part, iteration, dtype or iteration_dtype(x)) for part in parts]
    return (factors[0] if len(factors) == 1 else torch.cat(factors)).to(x.dtype).view(x.shape)


def exact_polar(x: Tensor) -> Tensor:
    """``U V^T`` by a float64 singular value decomposition.

    Directions whose singular value is at most ``max(m, n) * eps`` times the largest one are dropped, so that the factor
    of a rank-deficient matrix is unique (a partial isometry) and that of zero is zero. A matrix that holds NaN or
    infinity has the factor NaN.
    """
    wide = devices.able(x, torch.linalg.svd, torch.float64)
    finite = wide.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    u, s, vh = torch.linalg.svd(torch.where(finite, wide, 0.0), full_matrices=False)
    cutoff = max(x.shape[-2:]) * torch.finfo(torch.float64).eps * s[..., :1]
    factor = (u * (s > cutoff).to(u.dtype).unsqueeze(-2)) @ vh
    return torch.where(finite, factor, torch.nan).to(x.dtype).to(x.device)


def iteration_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the matrix products of an iteration on ``x``.

    float64 stays float64. On CUDA it is float16, which is as fast as bfloat16, runs on older GPUs, and after the
    float32 normalisation is as accurate (five steps) or several times more accurate (six and more). On a CPU it is
    bfloat16 if the CPU has matrix units for it and the matrix is large enough to profit from them, else float32.
    """
    if x.dtype == torch.float64:
        return torch.float64
    if x.device.type == "cuda":
        return torch.float16
    if x.device.type == "cpu" and min(x.shape[-2:]) >= 256 and private.has_matrix_tiles():
        return torch.bfloat16
    return torch.float32


def _stack_size(x: Tensor) -> int:
    """How many matrices of the stack ``x`` to process at once: few enough for the cache, enough for all threads."""
    m, n = x.shape[-2:]
    if x.device.type != "cpu":
        return 1 if min(m, n) >= 2048 else max(1, 2**24 // (m * n))
    return torch.get_num_threads() * max(1, 2**20 // (m * n * x.element_size()))


def _iterate(x: Tensor, iteration: Iteration, dtype: torch.dtype) -> Tensor:
    """Run ``iteration`` on a stack ``(k, m, n)``."""
    tall = x.shape[-2] > x.shape[-1]
    y = _normalize(x).to(dtype)
    gram = symmetric_product(y.mT, y) if tall else symmetric_product(y, y.mT)
    if iteration.rescale is not None:
        y, gram = _rescale(y, gram, tall, iteration.rescale)
    short, long = sorted(y.shape[-2:])
    wide_precision = dtype in (torch.float32, torch.float64)
    span = _SHORT_GRAM if wide_precision and long >= _LONG * short else 1
    product = symmetric_baddbmm(short)
    for i in range(0, len(iteration.coefficients), span):
        if i > 0:
            gram = symmetric_product(y.mT, y) if tall else symmetric_product(y, y.mT)
        y = _advance(y, gram, tall, iteration.coefficients[i : i + span], product)
    return y


def _normalize(x: Tensor) -> Tensor:
    """Divide by the largest entry, since squares of tiny or huge ones leave the range, then by the Frobenius norm."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    tiny = torch.finfo(y.dtype).tiny
    # vector_norm(inf) is not vectorised on a CPU.
    largest = torch.maximum(y.amax(dim=(-2, -1), keepdim=True), -y.amin(dim=(-2, -1), keepdim=True))
    y = y / largest.clamp_(min=tiny)
    return y.div_(torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp_(min=tiny))


def _rescale(y: Tensor, gram: Tensor, tall: bool, rescale: str) -> tuple[Tensor, Tensor]:
    """Divide ``y`` as :class:`Iteration` says, and its Gram matrix accordingly, so that it need not be recomputed."""
    wide = gram.to(torch.promote_types(gram.dtype, torch.float32))
    tiny = torch.finfo(wide.dtype).tiny
    if rescale == "schatten8":
        norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp_(min=tiny)
        unit = (wide / norm).to(gram.dtype)  # Squares of the entries would underflow in float16.
        fourth = torch.linalg.vector_norm(torch.bmm(unit, unit), dim=(-2, -1), keepdim=True, dtype=wide.dtype)
        square = (norm * fourth.sqrt_()).clamp_(min=tiny)
        return (y / square.sqrt()).to(y.dtype), (wide / square).to(gram.dtype)
    rows = wide.abs().sum(-1, keepdim=True).clamp_(min=tiny).rsqrt_()
    return (y * (rows.mT if tall else rows)).to(y.dtype), (wide * rows * rows.mT).to(gram.dtype)


def _advance(
    y: Tensor, gram: Tensor, tall: bool, steps: tuple[Coefficients, ...], product: Callable[..., Tensor]
) -> Tensor:
    """Apply ``steps`` to ``y``, given its Gram matrix; all but the last need the Gram matrix alone.

    One step multiplies ``y`` by the symmetric ``F = a I + b A + c A^2``, where ``A`` is the Gram matrix, which becomes
    ``F A F``. All these matrices commute. Only the last multiplication takes ``m^2 n`` operations.
    """
    total: Tensor | None = None
    for a, b, c in steps[:-1]:
        q = product(gram, gram, gram, beta=b, alpha=c)
        half = product(gram, q, gram, beta=a)
        gram = product(half, half, q, beta=a)
        if total is None:
            total = q
            total.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            total = product(total, q, total, beta=a)
    a, b, c = steps[-1]
    q = product(gram, gram, gram, beta=b, alpha=c)
    if total is None:
        return torch.baddbmm(y, y, q, beta=a) if tall else torch.baddbmm(y, q, y, beta=a)
    total = product(total, q, total, beta=a)
    return torch.bmm(y, total) if tall else torch.bmm(total, y)
