"""How far matrices are from orthogonal ones."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim import devices
from lightning_optim.devices import full_precision
from lightning_optim.polar import exact_polar

from .parameter_change import Sums

#: Gram matrices up to this size are decomposed; of larger ones only the largest eigenvalue is sought. By timing on a
#: CPU; GPUs decompose one matrix after another.
_DECOMPOSED = {"cpu": 512}
#: Dimension of the subspace in which the largest singular value is sought.
_KRYLOV_STEPS = 32


def orthogonality(u: Tensor) -> Sums:
    r"""How orthogonal matrices are, whatever their scale.

    With :math:`\sigma` the :math:`r = \min(m, n)` singular values of a matrix and :math:`G` its :math:`r \times r`
    Gram matrix:

    - ``error``: :math:`\sqrt{1 - \mathrm{tr}(G)^2 / (r\,\mathrm{tr}(G^2))}` in [0, 1), which is the smallest
      relative distance :math:`\|G/c - I\|_F/\sqrt r` over all :math:`c`, and the standard deviation of
      :math:`\sigma^2` over its root mean square. 0 for a multiple of a matrix with orthonormal rows or columns,
      :math:`\sqrt{1 - 1/r}` for rank one, about :math:`\sqrt{1/2}` for a square Gaussian matrix;
    - ``stable_rank``: :math:`\|U\|_F^2/\|U\|_2^2` in [1, r], r for orthogonal matrices;
    - ``spectral_norm``: :math:`\|U\|_2`.

    In float32, ``error`` is accurate to about 1e-6, absolutely, also near 0. The spectral norm is exact up to rounding
    for r <= 512 on a CPU and r <= 32 elsewhere; beyond that it comes from 32 steps of the Lanczos iteration, is never
    too large, and mostly right to 0.1 %.
    A zero matrix has no error or stable rank (NaN), nor has one that is not finite.

    Args:
        u: Shape ``(k, m, n)``, float32 or float64.

    Returns:
        Tensors of shape ``(k,)``.

    Example:
        >>> u = torch.stack([torch.eye(4), torch.ones(4, 4)])
        >>> {name: [round(float(x), 4) for x in values] for name, values in orthogonality(u).items()}
        {'error': [0.0, 0.866], 'stable_rank': [4.0, 1.0], 'spectral_norm': [1.0, 4.0]}
    """
    g, peak = scaled_gram(u)
    values = orthogonality_of_gram(g)
    return values | {"spectral_norm": values["spectral_norm"] * peak}


def orthogonality_of_gram(g: Tensor) -> Sums:
    """What :func:`orthogonality` says of matrices, from their Gram matrices ``(k, r, r)``."""
    with full_precision(g):
        trace = g.diagonal(dim1=-2, dim2=-1).sum(-1)
        # tr(G^2) - tr(G)^2 / r as a sum of squares, since their difference cancels where U is nearly orthogonal.
        mean = (trace / g.shape[-1])[:, None, None] * torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
        # A row with an entry that is not finite has no finite length, and squared lengths are on the diagonal.
        finite = trace.isfinite()
        largest = torch.where(finite, _largest_eigenvalue(torch.where(finite[:, None, None], g, 0)), torch.nan)
        return {
            "error": torch.linalg.matrix_norm(g - mean) / torch.linalg.matrix_norm(g),
            "stable_rank": trace / largest,
            "spectral_norm": largest.sqrt(),
        }


def gram(u: Tensor) -> Tensor:
    """The smaller Gram matrix of each matrix: of its rows if it is wide, of its columns if it is tall.

    >>> gram(torch.ones(5, 2, 3)).shape, gram(torch.ones(5, 7, 3)).shape
    (torch.Size([5, 2, 2]), torch.Size([5, 3, 3]))
    """
    with full_precision(u):
        return u @ u.mT if u.shape[-2] <= u.shape[-1] else u.mT @ u


def scaled_gram(u: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`gram` of each matrix divided by its largest entry, and these, since squares of tiny ones underflow."""
    peak = u.abs().amax((-2, -1)).clamp(min=torch.finfo(u.dtype).tiny)
    return gram(u / peak[:, None, None]), peak


def factor_error(o: Tensor) -> Tensor:
    r"""Absolute error of an orthogonal factor, :math:`\|G - I\|_F/\sqrt r`, of shape ``(k,)`` for ``(k, m, n)``.

    >>> factor_error(torch.stack([torch.eye(2), 2 * torch.eye(2)]))
    tensor([0., 3.])
    """
    g = gram(o)
    identity = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    return torch.linalg.matrix_norm(g - identity) / g.shape[-1] ** 0.5


def polar_error(o: Tensor, x: Tensor) -> Tensor:
    r"""Relative distance of a factor from the true one, :math:`\|O - \mathrm{polar}(X)\|_F/\|\mathrm{polar}(X)\|_F`.

    The true factor is taken from a float64 singular value decomposition of ``x``, since singular values near 1 do not
    prove that the factor is the right one.

    Args:
        o: Factors, shape ``(k, m, n)``.
        x: The matrices that were orthogonalised, of the same shape.

    Returns:
        Shape ``(k,)``, NaN where ``x`` is zero or not finite.

    Example:
        >>> x = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
        >>> polar_error(torch.eye(2)[None], x), polar_error(-torch.eye(2)[None], x)
        (tensor([0.]), tensor([2.]))
    """
    finite = x.isfinite().all(-1).all(-1)
    wide = devices.widest(x.device)
    true = exact_polar(torch.where(finite[:, None, None], x, 0).to(wide))
    error = torch.linalg.matrix_norm(o.to(wide) - true) / torch.linalg.matrix_norm(true)
    return torch.where(finite, error, torch.nan).to(o.dtype)


def _largest_eigenvalue(g: Tensor) -> Tensor:
    """Largest eigenvalue of positive semidefinite matrices ``(k, r, r)``, shape ``(k,)``."""
    decomposed = g.shape[-1] <= _DECOMPOSED.get(g.device.type, _KRYLOV_STEPS)
    return _eigenvalues(g)[..., -1].clamp(min=0) if decomposed else _lanczos(g).clamp(min=0)


def _eigenvalues(g: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(devices.able(g, torch.linalg.eigvalsh)).to(g.device)


def _lanczos(g: Tensor) -> Tensor:
    r = g.shape[-1]
    # The same start every time, and training's random numbers untouched.
    q = torch.randn(r, 1, generator=torch.Generator().manual_seed(0)).to(g).expand(g.shape[0], -1, -1)
    q = q / torch.linalg.vector_norm(q, dim=-2, keepdim=True)
    basis = q
    for _ in range(min(r, _KRYLOV_STEPS) - 1):
        image = q = g @ q
        for _ in range(2):  # Once is not enough in floating point.
            q = q - basis @ (basis.mT @ q)
        length, rounding = (torch.linalg.vector_norm(x, dim=-2, keepdim=True) for x in (q, image))
        rounding = rounding * 16 * torch.finfo(g.dtype).eps
        # Where nothing but rounding errors is left, the space is complete.
        q = torch.where(length > rounding, q / length, 0)
        basis = torch.cat([basis, q], -1)
    return _eigenvalues(basis.mT @ g @ basis)[..., -1]
