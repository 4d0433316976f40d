"""NAMO and NAMO-D: orthogonalised momentum with Adam-type scaling."""

from math import inf, prod, sqrt
from typing import Annotated

import torch

from ..engine.arithmetic import ema_, is_exactly, mix, squared_norm
from ..engine.decay import AdaptiveDecay
from ..engine.hyperparameters import SMALLEST, number
from ..engine.kinds import Matrix, Move
from ..engine.rule import LIKE_PARAMETER, Polar, mean_of


def _scalars(t, h, shape):
    return {
        "bias": sqrt(1 - h.beta2**t) / (1 - h.beta1**t),
        "factor": 1.0 if h.scale is None else h.scale * sqrt(max(shape[:2])),
        "max_step": inf if h.max_step is None else h.max_step,
    }


class NAMO(
    Matrix,
    paper="arXiv 2602.17080",
    idea="orthogonalised",
    about="orthogonalised momentum with a norm-based adaptive scale",
):
    r"""NAMO, norm-based adaptive orthogonalised momentum (`arXiv 2602.17080 <https://arxiv.org/abs/2602.17080>`_).

    .. math::
        M_t &= \mu_1 M_{t-1} + (1-\mu_1) G_t, \qquad v_t = \mu_2 v_{t-1} + (1-\mu_2)\|G_t\|_F^2 \\
        a_t &= \frac{\sqrt{1-\mu_2^t}}{1-\mu_1^t}\,\frac{\|M_t\|_F}{\sqrt{v_t}+\epsilon}, \qquad
        W_t = W_{t-1} - \eta\, a_t\,(\mathrm{polar}(M_t) + \lambda W_{t-1})

    for each weight matrix. The released code, whose behaviour is the default, adds three things, each an argument:
    ``nesterov`` replaces :math:`M_t` by :math:`(1-\mu_1)G_t+\mu_1 M_t` in both the polar factor and the
    norm; ``scale`` multiplies the orthogonal part by :math:`0.2\sqrt{\max(m, n)}` (not the decay); ``max_step`` bounds
    the product of learning rate, adaptive scale and that factor, and :math:`\eta a_t` in the decay, by 1. **The
    paper's algorithm** is ``nesterov=False, scale=None, max_step=None``, with ``weight_decay=0.01``. (The code's
    1e-12 in the denominator of the bias correction is left out: it is below float32's resolution.) State: ``m`` of
    the parameter's shape, ``v`` one number per matrix.

    Args:
        lr: Learning rate :math:`\eta`. As released; the paper tunes 0.012 (GPT-2 124M) and 0.007 (355M).
        betas: :math:`(\mu_1, \mu_2)`.
        eps: :math:`\epsilon`, in units of the gradient's Frobenius norm.
        weight_decay: :math:`\lambda`; 0.1 in the released code, 0.01 in the paper.
        decay: The form of weight decay. ``"adaptive"``, the paper's, multiplies it by the adaptive scale, too;
            ``"decoupled"`` is AdamW's plain decay, which users of the released code report to be better. The others are
            those of every optimizer: ``"coupled"``, ``"independent"``, ``"cautious"`` and ``"corrected"``.
        nesterov: Use the look-ahead momentum.
        scale: Coefficient of :math:`\sqrt{\max(m, n)}` (the weight's first two axes), or ``None`` for the factor 1.
        max_step: Upper bound of the scaled step and of the decay's, or ``None``.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.NAMO(groups, lr=0.1, nesterov=False, scale=None, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.1000,  0.0000],
                [ 0.0000,  0.1000]])
    """

    lr: float = 0.01
    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: AdaptiveDecay = "adaptive"
    nesterov: bool = True
    scale: Annotated[float | None, number(SMALLEST)] = 0.2
    max_step: Annotated[float | None, number(SMALLEST)] = 1.0
    orthogonalizer: str = "kj5"

    by_rows = True
    own_decay = "adaptive"
    scalars = staticmethod(_scalars)
    internals = {"adaptive_scale": mean_of("adaptive_scale", "mean over matrices of the adaptive scale a")}
    averages = ("m",)
    moments = {"m": ("g", "beta1"), "v": ("g^2", "beta2")}

    @staticmethod
    def buffers(shape, h):
        return {"m": LIKE_PARAMETER, "v": (1, 1)}

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g, k.beta1)
        n = mix(g, s.m, k.beta1) if k.nesterov else s.m
        o, (gg, nn) = yield Polar(n, k.orthogonalizer, (squared_norm(g), squared_norm(n)))
        ema_(s.v, gg, k.beta2)
        a = k.bias * nn.sqrt_() / s.v.sqrt().add_(k.eps)
        observe("adaptive_scale", a)
        keep = None if k.weight_decay is None else 1 - k.weight_decay * (k.lr * a).clamp_(max=k.max_step)
        return Move(o, (k.lr * k.factor * a).clamp_(max=k.max_step), keep=keep)


class NAMOD(
    Matrix,
    paper="arXiv 2602.17080",
    idea="orthogonalised",
    about="orthogonalised momentum with column-wise adaptive scales",
):
    r"""NAMO-D, NAMO with one adaptive scale per column (`arXiv 2602.17080 <https://arxiv.org/abs/2602.17080>`_).

    With :math:`\mathcal N(X)_j = \|X_{:,j}\|_2`, the norms of the columns (input features of a linear layer):

    .. math::
        v_t &= \mu_2 v_{t-1} + (1-\mu_2)\,\mathcal N(G_t)^2, \qquad
        d_t = \frac{\sqrt{1-\mu_2^t}}{1-\mu_1^t}\,\frac{\mathcal N(M_t)}{\sqrt{v_t}+\epsilon} \\
        D_t &= \mathrm{diag}\bigl(\min(\max(d_t, c\,\bar d_t), \bar d_t/c)\bigr), \qquad
        W_t = W_{t-1} - \eta\,(\mathrm{polar}(M_t) + \lambda W_{t-1})\, D_t

    with :math:`\bar d_t` the mean of :math:`d_t`. The additions of the released code are those of :class:`NAMO`
    (``max_step`` bounds every column's step, and :math:`\eta d_t` in the decay, whose factor then stays at or above
    0). **The paper's algorithm** is
    ``nesterov=False, scale=None, max_step=None``. State: ``m`` of the parameter's shape, ``v`` one number per
    column.

    Args:
        lr: Learning rate :math:`\eta`. As released; the paper tunes 0.009 (GPT-2 124M and 355M).
        betas: :math:`(\mu_1, \mu_2)`.
        eps: :math:`\epsilon`, in units of the norm of a gradient's column.
        weight_decay: :math:`\lambda`; 0.1 in the released code, 0.01 in the paper.
        decay: The form of weight decay. ``"adaptive"``, the paper's, multiplies it by the adaptive scale, too;
            ``"decoupled"`` is AdamW's plain decay, which users of the released code report to be better. The others are
            those of every optimizer: ``"coupled"``, ``"independent"``, ``"cautious"`` and ``"corrected"``.
        clamp: :math:`c` in (0, 1], or ``None`` for no clamp. 0.75 is the released class's default; its GPT-2
            configuration has 0.01, the paper 0.1 (124M) and 0.9 (355M).
        nesterov: Use the look-ahead momentum.
        scale: Coefficient of :math:`\sqrt{\max(m, n)}` (the weight's first two axes), or ``None`` for the factor 1.
        max_step: Upper bound of the scaled step, or ``None``.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.NAMOD(groups, lr=0.1, nesterov=False, scale=None, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.1000,  0.0000],
                [ 0.0000,  0.1000]])
    """

    lr: float = 0.01
    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: AdaptiveDecay = "adaptive"
    clamp: Annotated[float | None, number(SMALLEST, 1)] = 0.75
    nesterov: bool = True
    scale: Annotated[float | None, number(SMALLEST)] = 0.2
    max_step: Annotated[float | None, number(SMALLEST)] = 1.0
    orthogonalizer: str = "kj5"

    by_rows = True
    own_decay = "adaptive"
    scalars = staticmethod(_scalars)
    internals = {
        "adaptive_scale": mean_of("adaptive_scale", "mean over columns of the adaptive scale d, after the clamp"),
        "clamp_rate": mean_of("clamp_rate", "share of columns whose adaptive scale was clamped"),
    }
    averages = ("m",)
    moments = {"m": ("g", "beta1"), "v": ("g^2", "beta2")}

    @staticmethod
    def buffers(shape, h):
        return {"m": LIKE_PARAMETER, "v": (1, prod(shape[1:]))}

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g, k.beta1)
        n = mix(g, s.m, k.beta1) if k.nesterov else s.m
        columns = (squared_norm(g, axes=(-2,)), squared_norm(n, axes=(-2,)))
        o, (gg, nn) = yield Polar(n, k.orthogonalizer, columns)
        ema_(s.v, gg, k.beta2)
        d = k.bias * nn.sqrt_() / s.v.sqrt().add_(k.eps)
        if k.clamp is not None:
            mean = d.mean(-1, keepdim=True)
            free = d
            d = torch.minimum(torch.maximum(d, k.clamp * mean), mean / k.clamp)
            observe("clamp_rate", (d != free).to(d.dtype).mean(-1))
        observe("adaptive_scale", d)
        keep = None
        if k.weight_decay is not None:
            keep = 1 - k.weight_decay * (k.lr * d).clamp_(max=k.max_step)
            keep = keep if is_exactly(k.max_step, inf) else keep.clamp_(min=0)
        return Move(o, (k.lr * k.factor * d).clamp_(max=k.max_step), keep=keep)
