"""AdaDiag and AdaDiag++: Adam in the singular vectors of a gradient."""

from math import sqrt
from typing import Annotated

import torch

from .. import devices
from ..eigenbasis import phases, refreshes
from ..engine.arithmetic import ema_, ema_product_
from ..engine.hyperparameters import count
from ..engine.kinds import Matrix, Move
from ..engine.rule import LIKE_PARAMETER

_REASON = (
    "no code was released, and the paper's refresh period, learning rates and treatment of tall matrices are not "
    "known for certain"
)


def _decomposed(g):
    """Singular vectors as columns, singular values, and which of these are not zero up to rounding.

    An SVD returns each pair of vectors with either sign. Here the entry of largest magnitude in every left vector is
    positive, so that the result does not depend on the machine.
    """
    g = devices.able(g, torch.linalg.svd, torch.float64)
    finite = g.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    u, sigma, vh = torch.linalg.svd(torch.where(finite, g, 0.0), full_matrices=False)  # It raises an error on NaN.
    sigma = torch.where(finite[..., 0], sigma, torch.nan)
    nonzero = sigma > max(g.shape[-2:]) * torch.finfo(torch.float64).eps * sigma[..., :1]
    signs = _signs(u)
    return u * signs, sigma * nonzero, vh.mT * signs, nonzero


def _signs(x):
    """Signs of the entries of largest magnitude, of each column."""
    return torch.where(x.gather(-2, x.abs().argmax(-2, keepdim=True)) < 0, -1.0, 1.0)


def _completed(x, nonzero):
    """An orthogonal matrix whose first columns are those columns of ``x`` that belong to nonzero singular values.

    The others span what is left, in any basis as far as the algorithm goes. A diagonal ramp, restricted to that space,
    has eigenvectors that make it unique.
    """
    d, r = x.shape[-2:]
    if d == r and x.is_cpu and nonzero.all():  # An accelerator would have to be waited for.
        return x
    known = x * nonzero.unsqueeze(-2)
    projector = known @ known.mT
    rest = torch.eye(d, dtype=x.dtype, device=x.device) - projector
    ramp = torch.linspace(0.5, 0.25, d, dtype=x.dtype, device=x.device)
    q = torch.linalg.eigh(projector + (rest * ramp) @ rest).eigenvectors.flip(-1)
    q = q * _signs(q)
    return torch.cat([torch.where(nonzero.unsqueeze(-2), x, q[..., :r]), q[..., r:]], -1)


def _rotate(g, s, sides):
    """Coordinates of ``g`` in the bases of its ``sides``: 0 for rows, 1 for columns."""
    with devices.full_precision(g):
        if 0 in sides:
            g = s.basis0.mT @ g
        return g @ s.basis1 if 1 in sides else g


def _rotate_back(x, s, sides):
    with devices.full_precision(x):
        if 0 in sides:
            x = s.basis0 @ x
        return x @ s.basis1.mT if 1 in sides else x


def _refresh(g, s, sides):
    """Set the bases; returns the gradient in them, in which entries that are zero in exact arithmetic are zero."""
    u, sigma, v, nonzero = _decomposed(g)
    if 0 in sides:
        s.basis0.copy_(_completed(u, nonzero).to(g.dtype))
    if 1 in sides:
        s.basis1.copy_(_completed(v, nonzero).to(g.dtype))
    if sides == (0,):
        return (sigma.unsqueeze(-1) * v.mT).to(g.dtype).to(g.device)
    if sides == (1,):
        return (u * sigma.unsqueeze(-2)).to(g.dtype).to(g.device)
    rotated = torch.zeros_like(g)
    rotated.diagonal(dim1=-2, dim2=-1).copy_(sigma.to(g.dtype))
    return rotated


def _shorter(shape):
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    return (0,) if rows <= columns else (1,)


def _buffers(shape, sides):
    lengths = shape[0], torch.Size(shape[1:]).numel()
    return {"m": LIKE_PARAMETER, "v": LIKE_PARAMETER, **{f"basis{i}": (lengths[i], lengths[i]) for i in sides}}


def _scalars(t, h, phase, sides):
    root_bc2 = sqrt(1 - h.beta2**t)
    return {
        "step": h.lr * root_bc2 / (1 - h.beta1**t),
        "floor": h.eps * root_bc2,
        "refresh": t == 1 or refreshes(t - 1, phase, h),
        "sides": sides,
    }


def _update(g, s, k):
    rotated = _refresh(g, s, k.sides) if k.refresh else _rotate(g, s, k.sides)
    ema_(s.m, rotated, k.beta1)
    ema_product_(s.v, rotated, rotated, k.beta2)
    return Move(_rotate_back(s.m / s.v.sqrt().add_(k.floor), s, k.sides), k.step)


class AdaDiag(
    Matrix, paper="arXiv 2502.07488", about="Adam in the singular vectors of a gradient", experimental=_REASON
):
    r"""AdaDiag, Adam in the singular vectors of a gradient (`arXiv 2502.07488 <https://arxiv.org/abs/2502.07488>`_).

    For a weight :math:`W` of m x n with :math:`m \le n` and gradient :math:`G_t`:

    .. math::
        G' &= P^\top G_t, \qquad P \Sigma Q^\top = \mathrm{SVD}(G_t) \text{ every } T \text{ steps, from the first} \\
        M_t &= \beta_1 M_{t-1} + (1-\beta_1) G', \qquad V_t = \beta_2 V_{t-1} + (1-\beta_2) G'^2 \\
        W_t &= (1-\eta\lambda) W_{t-1}
               - \eta\, P \frac{M_t / (1-\beta_1^t)}{\sqrt{V_t / (1-\beta_2^t)} + \epsilon}

    :math:`M` and :math:`V` are carried over from one basis to the next as they are, without a rotation. It is SOAP with
    one basis, of one gradient instead of an average, and GaLore at full rank.

    No code was released, and this follows the equations as others restate them. Choices of this library, which the
    sources leave open:

    - Of a tall matrix, m > n, the right singular vectors are taken, :math:`G' = G Q`: the shorter side, as in GaLore.
    - The sign of a pair of singular vectors is not defined, but after a refresh the moments depend on it. Here the
      entry of largest magnitude of each left vector is positive. Vectors of a null space are eigenvectors of a ramp
      restricted to it. So the result is the same on every machine.
    - At a refresh, entries of :math:`G'` that vanish in exact arithmetic are set to zero: divided by their own size,
      rounding errors would be full steps.
    - Convolution kernels are matrices (out, rest).

    The authors report that training LLaMA takes 1.8 to 2 times fewer samples than with Adam; their tables are not known
    here. Use it where SOAP's averages and its refreshes every ten steps cost too much. State: ``m``, ``v`` of the
    parameter's shape, and ``basis0`` of m x m or ``basis1`` of n x n.

    Args:
        lr: Learning rate :math:`\eta`, Adam's; the paper's is not known.
        betas: :math:`(\beta_1, \beta_2)`, Adam's.
        eps: :math:`\epsilon`, in units of the rotated gradient; Adam's.
        weight_decay: Decoupled weight decay :math:`\lambda`.
        precondition_frequency: Steps :math:`T` between decompositions; GaLore's default, the paper's is not known.
        stagger: Whether different parameters are decomposed at different steps, so that none takes longer than the
            others; the first step decomposes all. Which step is a parameter's follows from its position in its group.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = lightning_optim.AdaDiag([{"params": [w], "role": "matrix"}], lr=0.1)
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.1000,  0.0000],
                [ 0.0000,  0.1000]])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    precondition_frequency: Annotated[int, count()] = 200
    stagger: bool = True

    capturable = False
    phases = staticmethod(phases)
    averages = ("m",)
    squares = ("v",)

    @staticmethod
    def buffers(shape, h):
        return _buffers(shape, _shorter(shape))

    @staticmethod
    def scalars(t, h, shape, phase):
        return _scalars(t, h, phase, _shorter(shape))

    @staticmethod
    def update(g, s, k, observe):
        return _update(g, s, k)


class AdaDiagPP(
    Matrix, paper="arXiv 2502.07488", about="Adam in both singular bases of a gradient", experimental=_REASON
):
    r"""AdaDiag++, Adam in both bases of singular vectors of a gradient.

    As :class:`AdaDiag` (`arXiv 2502.07488 <https://arxiv.org/abs/2502.07488>`_), with both sides:

    .. math::
        G' &= P^\top G_t Q, \qquad P \Sigma Q^\top = \mathrm{SVD}(G_t) \text{ every } T \text{ steps, from the first} \\
        M_t &= \beta_1 M_{t-1} + (1-\beta_1) G', \qquad V_t = \beta_2 V_{t-1} + (1-\beta_2) G'^2 \\
        W_t &= (1-\eta\lambda) W_{t-1}
               - \eta\, P \frac{M_t / (1-\beta_1^t)}{\sqrt{V_t / (1-\beta_2^t)} + \epsilon} Q^\top

    In its own bases a gradient is diagonal, so the first step is that of Muon with an exact polar factor. The longer
    side of a matrix that is not square has more basis vectors than the gradient has singular vectors; they are
    completed as :class:`AdaDiag` says, whose other choices hold here too. State: ``m``, ``v`` of the parameter's shape,
    ``basis0`` of m x m and ``basis1`` of n x n.

    Args:
        lr: Learning rate :math:`\eta`, Adam's; the paper's is not known.
        betas: :math:`(\beta_1, \beta_2)`, Adam's.
        eps: :math:`\epsilon`, in units of the rotated gradient; Adam's.
        weight_decay: Decoupled weight decay :math:`\lambda`.
        precondition_frequency: Steps :math:`T` between decompositions; GaLore's default, the paper's is not known.
        stagger: Whether different parameters are decomposed at different steps, so that none takes longer than the
            others; the first step decomposes all. Which step is a parameter's follows from its position in its group.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = lightning_optim.AdaDiagPP([{"params": [w], "role": "matrix"}], lr=0.1)
        >>> w.grad = torch.tensor([[3.0, 4.0], [4.0, -3.0]])  # five times an orthogonal matrix
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.0600, -0.0800],
                [-0.0800,  0.0600]])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    precondition_frequency: Annotated[int, count()] = 200
    stagger: bool = True

    capturable = False
    phases = staticmethod(phases)
    averages = ("m",)
    squares = ("v",)

    @staticmethod
    def buffers(shape, h):
        return _buffers(shape, (0, 1))

    @staticmethod
    def scalars(t, h, shape, phase):
        return _scalars(t, h, phase, (0, 1))

    @staticmethod
    def update(g, s, k, observe):
        return _update(g, s, k)
