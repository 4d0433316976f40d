"""AdaGram: full-matrix AdaGrad with factors of low rank."""

from typing import Annotated

import torch

from .. import devices
from ..engine.hyperparameters import count
from ..engine.kinds import Matrix, Move


def _rank(shape, h):
    n = torch.Size(shape).numel()
    return n if h.max_rank is None else min(h.max_rank, n)


def _projected(p, q, a, b):
    """One step of the projector-splitting integrator: factors of the rank of ``p q^T``, near ``p q^T + a b^T``.

    The order is K, S, L (Lubich and Oseledets, 2014). With an orthonormal basis V of the columns of ``q``, P Q^T is
    K_0 V^T; signs and bases that the decompositions choose cancel.
    """
    v, r = torch.linalg.qr(q)
    dv = a @ (b.mT @ v)
    u, s = torch.linalg.qr(p @ r.mT + dv)
    s = s - u.mT @ dv
    v, s = torch.linalg.qr(v @ s.mT + b @ (a.mT @ u))
    return u @ s.mT, v


class AdaGram(
    Matrix, paper="arXiv 2508.21106", idea="full-matrix", about="full-matrix AdaGrad with factors of low rank"
):
    r"""AdaGram, full-matrix AdaGrad with factors of low rank (`arXiv 2508.21106 <https://arxiv.org/abs/2508.21106>`_).

    Of each tensor, flattened to a vector of n entries with gradient :math:`g_t`, full-matrix AdaGrad's matrix
    :math:`\epsilon I + \sum_{s \le t} g_s g_s^\top = L_t L_t^\top` is kept as
    :math:`L_t^{-1} = (I - P_t Q_t^\top) / \sqrt\epsilon` with :math:`P, Q` of n x r:

    .. math::
        \bar g_t &= L_{t-1}^{-1} g_t, \qquad \sigma_t = \|\bar g_t\|^2, \qquad
        \beta_t = \frac{\sqrt{1+\sigma_t} - 1}{\sigma_t \sqrt{1+\sigma_t}} \\
        \theta_t &= \theta_{t-1} - \eta\, \bar g_t / \sqrt{1 + \sigma_t}
                 \qquad (= \theta_{t-1} - \eta L_t^{-1} g_t) \\
        P_t Q_t^\top &\approx P_{t-1} Q_{t-1}^\top + \beta_t\, \bar g_t (\bar g_t - Q_{t-1} P_{t-1}^\top \bar g_t)^\top

    The increment of rank one is another column of :math:`P` and :math:`Q` as long as they have fewer than r; then the
    sum is brought back to rank r by one step of a projector-splitting integrator. While nothing has been cut off the
    step is as long as full-matrix AdaGrad's, in another direction, since :math:`L_t` is not the symmetric root. It is
    always shorter than :math:`\eta`, and the method commutes with rotations of the parameters. With n = 1 it is
    AdaGrad. There is no momentum and no average.

    Follows the released ``AdagramPS``. The released ``AdaGramFR``, which cuts the rank by an SVD, loses every second
    gradient and is not followed; nor is the experimental ``alpha`` of ``AdagramPS``, whose ``weight_decay`` has no
    effect. Here weight decay is decoupled.

    The release treats every tensor, as the rule here does with those that it is given, of one axis or more. It is given
    hidden matrices and kernels; the fallback has the rest. For a linear model, whose only matrix is its head, say
    ``Grouping(matrix=["*weight"])``.

    Use it for convex and small models, whose gradients lie in few directions; the paper is about generalised linear
    models. Its tables are not known here. State: ``p`` and ``q``, each of n x r.

    Args:
        lr: Learning rate :math:`\eta`, the bound of a step's norm. 0.1 is the release's example; its class has 1, its
            experiments 0.01 to 1e-5 for classification and 0.05 to 0.1 for regression.
        eps: :math:`\epsilon`, in squared units of the gradient. It is a scale rather than a safeguard: the first step
            is :math:`\eta g / \sqrt{\epsilon + \|g\|^2}`. 0.01 is the release's example; its class has 1e-10, its
            experiments 1e-5 to 0.5.
        max_rank: Largest rank r, or ``None`` for n. The experiments have 1 to 5, the release's example 8 and its class
            ``None``, which takes :math:`2 n^2` numbers.
        weight_decay: Decoupled weight decay :math:`\lambda`.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(1, 2))
        >>> optimizer = lightning_optim.AdaGram([{"params": [w], "role": "matrix"}], lr=1.0, eps=11.0)
        >>> w.grad = torch.tensor([[3.0, 4.0]])
        >>> optimizer.step()
        >>> w.data  # -g / sqrt(11 + 25)
        tensor([[-0.5000, -0.6667]])
    """

    lr: float = 0.1
    eps: float = 1e-2
    max_rank: Annotated[int | None, count()] = 5
    weight_decay: float = 0.0

    flatten = False
    capturable = False

    @staticmethod
    def buffers(shape, h):
        factor = (torch.Size(shape).numel(), _rank(shape, h))
        return {"p": factor, "q": factor}

    @staticmethod
    def scalars(t, h, shape):
        return {"column": t - 1 if t <= _rank(shape, h) else None}

    @staticmethod
    def update(g, s, k, observe):
        # Float64: a root of eps divides a difference of nearly equal numbers, and norms may be out of float32's range.
        p, q, x = (devices.able(y, torch.linalg.qr, torch.float64) for y in (s.p, s.q, g.flatten(1).unsqueeze(-1)))
        x = (x - p @ (q.mT @ x)) / k.eps**0.5
        root = torch.hypot(torch.linalg.vector_norm(x, dim=1, keepdim=True), torch.ones_like(x[:, :1]))
        step = (x / root).view_as(g).to(g.dtype).to(g.device)
        a, b = x / (root * (root + 1)), x - q @ (p.mT @ x)
        if k.column is None:
            for factor, new in zip((s.p, s.q), _projected(p, q, a, b)):
                factor.copy_(new.to(g.dtype))
        else:
            for factor, new in zip((s.p, s.q), (a, b)):
                factor[..., k.column].copy_(new[..., 0].to(g.dtype))
        return Move(step, k.lr)
