"""Leon: adaptive matrix learning by hyperbolic smoothing."""

from functools import partial
from typing import Annotated

import torch

from .. import devices
from ..engine.hyperparameters import SMALLEST, number
from ..engine.kinds import Matrix, Move
from ..engine.rule import LIKE_PARAMETER


class Leon(
    Matrix,
    paper="arXiv 2602.08232",
    about="a smoothed polar factor of discounted gradients",
    experimental="the paper's discounting and constants are not known; here its map for linear losses sees discounted "
    "gradients",
):
    r"""Leon, adaptive matrix learning by smoothing (`arXiv 2602.08232 <https://arxiv.org/abs/2602.08232>`_).

    For a weight :math:`W` of m x n with :math:`m \le n` and gradients :math:`G_t`:

    .. math::
        S_t &= \sum_{s \le t} \beta^{t-s} G_s = \beta S_{t-1} + G_t \\
        A_t &= \sum_{s \le t} \beta^{2(t-s)} G_s G_s^\top = \beta^2 A_{t-1} + G_t G_t^\top \\
        W_t &= (1-\eta\lambda) W_{t-1} - \eta\, (S_t S_t^\top + A_t + \gamma^2 I)^{-1/2} S_t

    The paper minimises regret over linear losses by the gradient of a smoothed nuclear norm,
    :math:`\mathrm{tr}\,(S S^\top + L L^\top)^{1/2}` with
    :math:`L L^\top = \gamma^2 I + \sum G_s G_s^\top`, which matches the regret of one-sided Shampoo up to a constant.
    That map is the paper's. How it becomes an optimizer, by a discounted conversion from online to non-convex
    optimisation, is derived here: gradients are discounted by :math:`\beta`, and so their outer products by
    :math:`\beta^2`.

    Each singular value of the update lies between 0 and :math:`\eta`: near :math:`\eta` where gradients agree, as in
    Muon, and smaller where they cancel; for independent gradients :math:`A` is as large as :math:`S S^\top`. The scale
    of the gradients drops out, but for :math:`\gamma`. Of a tall matrix the other side is taken,
    :math:`S (S^\top S + A)^{-1/2}` with :math:`G^\top G`. Convolution kernels are matrices (out, rest).

    The authors report synthetic experiments only. Use it where Muon's step is too large for noisy gradients. State:
    ``s`` of the parameter's shape, and ``a`` of d x d for the shorter side d, which is decomposed at every step.

    Args:
        lr: Learning rate :math:`\eta`, the largest singular value of an update; Muon's, the paper's is not known.
        momentum: Discount :math:`\beta`; Muon's, the paper's is not known.
        gamma: :math:`\gamma`, in units of the gradient's spectral norm. In the paper it bounds the next gradient; here
            it only keeps the root away from zero.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(1, 2))
        >>> optimizer = lightning_optim.Leon([{"params": [w], "role": "matrix"}], lr=0.1)
        >>> w.grad = torch.tensor([[3.0, 4.0]])
        >>> optimizer.step()
        >>> w.data  # -0.1 g / sqrt(2 |g|^2)
        tensor([[-0.0424, -0.0566]])
    """

    lr: float = 0.02
    momentum: float = 0.95
    gamma: Annotated[float, number(SMALLEST)] = 1e-8
    weight_decay: float = 0.0

    capturable = False
    averages = ("s",)

    @staticmethod
    def buffers(shape, h):
        d = min(shape[0], torch.Size(shape[1:]).numel())
        return {"s": LIKE_PARAMETER, "a": (d, d)}

    @staticmethod
    def update(g, s, k, observe):
        able = partial(devices.able, function=torch.linalg.eigh, dtype=torch.float64)
        s.s.mul_(k.momentum).add_(g)
        tall = g.shape[-2] > g.shape[-1]
        # Wide from here on, and in float64: a matrix is decomposed whose eigenvalues are squares.
        wide_g, wide_s = (able(x.mT if tall else x) for x in (g, s.s))
        a = k.momentum**2 * able(s.a) + wide_g @ wide_g.mT
        s.a.copy_(a.to(g.dtype))
        square = wide_s @ wide_s.mT + a
        finite = square.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        values, vectors = torch.linalg.eigh(torch.where(finite, square, 0.0))  # It raises an error on NaN.
        # Rounding of the state, which no eigenvalue is known better than.
        known = torch.finfo(g.dtype).eps * values[..., -1:]
        roots = (values.maximum(known) + k.gamma**2).rsqrt().unsqueeze(-2)
        update = torch.where(finite, (vectors * roots) @ vectors.mT @ wide_s, torch.nan).to(g.dtype).to(g.device)
        return Move(update.mT if tall else update, k.lr)
