"""The polar factor of a matrix: by polynomial iteration, or exactly by singular value decomposition."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import devices, private
from .minimax import Coefficients
from .presets import METHODS, Iteration, find
from .products import symmetric_products

_SHORT_GRAM = 3  # Steps per Gram matrix; more lose small singular values, since the eigenvalues of A are their squares.
_LONG = 2  # Aspect ratio from which several steps on one Gram matrix pay.
_FEW = 2**12  # Elements of a matrix up to which one slow operation takes less time than four fast ones.
_TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}


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
    if method == "exact":  # A stack of one has the bits of its matrix, which is multiplied in another way.
        return exact_polar(x[0])[None] if x.ndim == 3 and x.shape[0] == 1 else exact_polar(x)
    iteration, shape = METHODS.get(method) or find(method), x.shape
    if 0 in shape:
        return x.clone()
    dtype = dtype or iteration_dtype(x)
    stack = x if x.ndim == 3 else x.reshape(-1, *shape[-2:])
    if (k := stack.shape[0]) > 1 and k > (size := _stack_size(x)):
        factor = torch.cat([_iterate(part, iteration, dtype) for part in stack.split(size)])
    else:
        factor = _iterate(stack, iteration, dtype)
    if dtype != x.dtype:
        factor = factor.to(x.dtype)
    return factor if x.ndim == 3 else factor.view(shape)


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
    if x.is_cuda:
        return torch.float16
    if x.is_cpu and min(x.shape[-2:]) >= 256 and private.has_matrix_tiles():
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
    _, m, n = x.shape
    tall, short, long = m > n, min(m, n), max(m, n)
    y = _normalize(x)
    if y.dtype != dtype:
        y = y.to(dtype)
    product, sum_of_products = symmetric_products(short)
    gram = product(y.mT, y) if tall else product(y, y.mT)
    if iteration.rescale is not None:
        y, gram = _rescale(y, gram, tall, iteration.rescale)
    wide_precision = dtype in (torch.float32, torch.float64)
    span = _SHORT_GRAM if wide_precision and long >= _LONG * short else 1
    spare: Tensor | None = None
    q: Tensor | None = None
    for i in range(0, len(iteration.coefficients), span):
        if i > 0:
            product(y.mT, y, out=gram) if tall else product(y, y.mT, out=gram)
        if span == 1:
            a, b, c = iteration.coefficients[i]
            q = sum_of_products(gram, gram, gram, beta=b, alpha=c, out=q)
            result = torch.baddbmm(y, y, q, beta=a, out=spare) if tall else torch.baddbmm(y, q, y, beta=a, out=spare)
        else:
            result = _advance(y, gram, tall, iteration.coefficients[i : i + span], sum_of_products, spare)
        y, spare = result, (y if y.is_contiguous() else None)
    return y


def _normalize(x: Tensor) -> Tensor:
    """Divide by the largest entry, since squares of tiny or huge ones leave the range, then by the Frobenius norm."""
    y = x if x.dtype in _TINY else x.to(torch.float32)
    tiny = _TINY[y.dtype]
    if y.is_cpu and y.shape[-2] * y.shape[-1] > _FEW:  # vector_norm(inf) is not vectorised there.
        largest = torch.maximum(y.amax(dim=(-2, -1), keepdim=True), -y.amin(dim=(-2, -1), keepdim=True))
    else:
        largest = torch.linalg.vector_norm(y, math.inf, dim=(-2, -1), keepdim=True)
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
    y: Tensor,
    gram: Tensor,
    tall: bool,
    steps: tuple[Coefficients, ...],
    product: Callable[..., Tensor],
    out: Tensor | None,
) -> Tensor:
    """Apply ``steps`` to ``y``, given its Gram matrix; all but the last need the Gram matrix alone.

    The Gram matrix is overwritten, and the result written to ``out``, if that is given.

    One step multiplies ``y`` by the symmetric ``F = a I + b A + c A^2``, where ``A`` is the Gram matrix, which becomes
    ``F A F``. All these matrices commute. Only the last multiplication takes ``m^2 n`` operations.
    """
    total: Tensor | None = None
    half: Tensor | None = None
    for a, b, c in steps[:-1]:
        q = product(gram, gram, gram, beta=b, alpha=c)
        half = product(gram, q, gram, beta=a, out=half)
        product(half, half, q, beta=a, out=gram)
        if total is None:
            total = q
            total.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            total = product(total, q, total, beta=a)
    a, b, c = steps[-1]
    q = product(gram, gram, gram, beta=b, alpha=c)
    if total is None:
        return torch.baddbmm(y, y, q, beta=a, out=out) if tall else torch.baddbmm(y, q, y, beta=a, out=out)
    total = product(total, q, total, beta=a)
    return torch.bmm(y, total, out=out) if tall else torch.bmm(total, y, out=out)
