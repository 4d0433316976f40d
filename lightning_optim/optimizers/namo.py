"""NAMO and NAMO-D: orthogonalised momentum with Adam-type scaling."""

from __future__ import annotations

from math import inf, sqrt

import torch
from torch import Tensor

from ..engine.arithmetic import ema_, is_number, mix, squared_norm
from ..engine.hyperparameters import ORTHOGONALIZER, SMALLEST, number, optional
from ..engine.optimizer import EngineOptions, Params
from ..engine.rounding import Rounding
from ..engine.rule import (
    LIKE_PARAMETER,
    Hyperparameters,
    MatrixRule,
    Move,
    Observer,
    Orthogonalizing,
    Scalars,
    Shape,
    ignore,
    mean_of,
)
from ..engine.step import Backend
from ..engine.two_rules import Fallback, MatrixOptimizer


def _scalars(t: int, hp: Hyperparameters, shape: Shape) -> Scalars:
    mu1, mu2 = hp["betas"]
    return {
        "mu1": mu1,
        "mu2": mu2,
        "lr": hp["lr"],
        "bias": sqrt(1 - mu2**t) / (1 - mu1**t),
        "eps": hp["eps"],
        "wd": hp["weight_decay"],
        "factor": 1.0 if hp["scale"] is None else hp["scale"] * sqrt(max(shape[:2])),
        "max_step": inf if hp["max_step"] is None else hp["max_step"],
        "nesterov": hp["nesterov"],
        "method": hp["orthogonalizer"],
    }


def _namo(
    g: Tensor, m: Tensor, v: Tensor, *,
    mu1, mu2, lr, bias, eps, wd, factor, max_step, nesterov, method, observe: Observer = ignore,
) -> Orthogonalizing:  # fmt: skip
    ema_(m, g, mu1)
    n = mix(g, m, mu1) if nesterov else m
    o, gg, nn = yield n, method, squared_norm(g), squared_norm(n)
    ema_(v, gg, mu2)
    a = bias * nn.sqrt_() / v.sqrt().add_(eps)
    observe("adaptive_scale", a)
    return Move(o, (lr * factor * a).clamp_(max=max_step), 1 - wd * (lr * a).clamp_(max=max_step))


def _namo_d_scalars(t: int, hp: Hyperparameters, shape: Shape) -> Scalars:
    return _scalars(t, hp, shape) | {"clamp": hp["clamp"]}


def _namo_d(
    g: Tensor, m: Tensor, v: Tensor, *,
    mu1, mu2, lr, bias, eps, wd, factor, max_step, clamp, nesterov, method, observe: Observer = ignore,
) -> Orthogonalizing:  # fmt: skip
    ema_(m, g, mu1)
    n = mix(g, m, mu1) if nesterov else m
    o, gg, nn = yield n, method, squared_norm(g, axes=(-2,)), squared_norm(n, axes=(-2,))
    ema_(v, gg, mu2)
    d = bias * nn.sqrt_() / v.sqrt().add_(eps)
    if clamp is not None:
        mean = d.mean(-1, keepdim=True)
        free = d
        d = torch.minimum(torch.maximum(d, clamp * mean), mean / clamp)
        observe("clamp_rate", (d != free).to(d.dtype).mean(-1))
    observe("adaptive_scale", d)
    keep = 1 - wd * (lr * d).clamp_(max=max_step)
    keep = keep if is_number(max_step, inf) else keep.clamp_(min=0)
    return Move(o, (lr * factor * d).clamp_(max=max_step), keep)


_CONSTRAINTS = {
    "scale": optional(number(SMALLEST)),
    "max_step": optional(number(SMALLEST)),
    "clamp": optional(number(SMALLEST, 1)),
    **ORTHOGONALIZER,
}

NAMO_RULE = MatrixRule(
    "NAMO",
    state=lambda shape, hp: {"m": LIKE_PARAMETER, "v": (1, 1)},
    scalars=_scalars,
    update=_namo,
    by_rows=True,
    constraints=_CONSTRAINTS,
    internals={"adaptive_scale": mean_of("adaptive_scale", "mean over matrices of the adaptive scale a")},
)
NAMO_D_RULE = MatrixRule(
    "NAMOD",
    state=lambda shape, hp: {"m": LIKE_PARAMETER, "v": (1, torch.Size(shape[1:]).numel())},
    scalars=_namo_d_scalars,
    update=_namo_d,
    by_rows=True,
    constraints=_CONSTRAINTS,
    internals={
        "adaptive_scale": mean_of("adaptive_scale", "mean over columns of the adaptive scale d, after the clamp"),
        "clamp_rate": mean_of("clamp_rate", "share of columns whose adaptive scale was clamped"),
    },
)


class NAMO(MatrixOptimizer):
    r"""NAMO, norm-based adaptive orthogonalised momentum (`arXiv 2602.17080 <https://arxiv.org/abs/2602.17080>`_).

    .. math::
        M_t &= \mu_1 M_{t-1} + (1-\mu_1) G_t, \qquad v_t = \mu_2 v_{t-1} + (1-\mu_2)\|G_t\|_F^2 \\
        a_t &= \frac{\sqrt{1-\mu_2^t}}{1-\mu_1^t}\,\frac{\|M_t\|_F}{\sqrt{v_t}+\epsilon}, \qquad
        W_t = W_{t-1} - \eta\, a_t\,(\mathrm{polar}(M_t) + \lambda W_{t-1})

    for each weight matrix. The released code, whose behaviour is the default, adds three things, each an argument:
    ``nesterov`` puts :math:`(1-\mu_1)G_t+\mu_1 M_t` in the place of :math:`M_t` in both the polar factor and the
    norm; ``scale`` multiplies the orthogonal part by :math:`0.2\sqrt{\max(m, n)}` (not the decay); ``max_step`` bounds
    the product of learning rate, adaptive scale and that factor, and :math:`\eta a_t` in the decay, by 1. **The
    paper's algorithm** is ``nesterov=False, scale=None, max_step=None``, with ``weight_decay=0.01``. (The code's
    1e-12 in the denominator of the bias correction is left out: it is below float32's resolution.) State: ``m`` of
    the parameter's shape, ``v`` one number per matrix.

    Args:
        params: Parameters, named parameters or parameter groups; see :class:`.two_rules.MatrixOptimizer`.
        lr: Learning rate :math:`\eta`. As released; the paper tunes 0.012 (GPT-2 124M) and 0.007 (355M).
        betas: :math:`(\mu_1, \mu_2)`.
        eps: :math:`\epsilon`, in units of the gradient's Frobenius norm.
        weight_decay: :math:`\lambda`; 0.1 in the released code, 0.01 in the paper.
        nesterov: Use the look-ahead momentum.
        scale: Coefficient of :math:`\sqrt{\max(m, n)}` (the weight's first two axes), or ``None`` for the factor 1.
        max_step: Upper bound of the scaled step and of the decay's, or ``None``.
        orthogonalizer: A name in :data:`lightning_optim.polar.METHODS`, or ``"exact"``.
        fallback: Rule for everything that is not a hidden matrix; a name in :data:`.two_rules.FALLBACKS`.
        fallback_lr: Its learning rate; this and the next three are the fallback's own defaults if ``None``.
        fallback_betas: Its betas.
        fallback_eps: Its eps.
        fallback_weight_decay: Its weight decay.
        maximize: Ascend instead of descend.
        skip_nonfinite: Skip and count steps whose gradients hold NaN or infinity.
        max_consecutive_skips: Steps skipped in a row after which ``step`` raises an error, or ``None``.
        backend: How the step is run; see :class:`.optimizer.RuleOptimizer`.
        rounding: How results are stored in bfloat16 and float16 parameters; see :class:`.optimizer.RuleOptimizer`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter does not fit its role.

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

    rules = (NAMO_RULE,)

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        scale: float | None = 0.2,
        max_step: float | None = 1.0,
        orthogonalizer: str = "kj5",
        fallback: str = "AdamW",
        fallback_lr: float | None = None,
        fallback_betas: tuple[float, float] | None = None,
        fallback_eps: float | None = None,
        fallback_weight_decay: float | None = None,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        max_consecutive_skips: int | None = 100,
        backend: Backend = "auto",
        rounding: Rounding = "nearest",
    ) -> None:
        hyperparameters = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "nesterov": nesterov,
            "scale": scale, "max_step": max_step, "orthogonalizer": orthogonalizer,
        }  # fmt: skip
        others = Fallback(fallback, fallback_lr, fallback_betas, fallback_eps, fallback_weight_decay)
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, others, options)


class NAMOD(MatrixOptimizer):
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
        params: Parameters, named parameters or parameter groups; see :class:`.two_rules.MatrixOptimizer`.
        lr: Learning rate :math:`\eta`. As released; the paper tunes 0.009 (GPT-2 124M and 355M).
        betas: :math:`(\mu_1, \mu_2)`.
        eps: :math:`\epsilon`, in units of the norm of a gradient's column.
        weight_decay: :math:`\lambda`; 0.1 in the released code, 0.01 in the paper.
        clamp: :math:`c` in (0, 1], or ``None`` for no clamp. 0.75 is the released class's default; its GPT-2
            configuration has 0.01, the paper 0.1 (124M) and 0.9 (355M).
        nesterov: Use the look-ahead momentum.
        scale: Coefficient of :math:`\sqrt{\max(m, n)}` (the weight's first two axes), or ``None`` for the factor 1.
        max_step: Upper bound of the scaled step, or ``None``.
        orthogonalizer: A name in :data:`lightning_optim.polar.METHODS`, or ``"exact"``.
        fallback: Rule for everything that is not a hidden matrix; a name in :data:`.two_rules.FALLBACKS`.
        fallback_lr: Its learning rate; this and the next three are the fallback's own defaults if ``None``.
        fallback_betas: Its betas.
        fallback_eps: Its eps.
        fallback_weight_decay: Its weight decay.
        maximize: Ascend instead of descend.
        skip_nonfinite: Skip and count steps whose gradients hold NaN or infinity.
        max_consecutive_skips: Steps skipped in a row after which ``step`` raises an error, or ``None``.
        backend: How the step is run; see :class:`.optimizer.RuleOptimizer`.
        rounding: How results are stored in bfloat16 and float16 parameters; see :class:`.optimizer.RuleOptimizer`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter does not fit its role.

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

    rules = (NAMO_D_RULE,)

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clamp: float | None = 0.75,
        nesterov: bool = True,
        scale: float | None = 0.2,
        max_step: float | None = 1.0,
        orthogonalizer: str = "kj5",
        fallback: str = "AdamW",
        fallback_lr: float | None = None,
        fallback_betas: tuple[float, float] | None = None,
        fallback_eps: float | None = None,
        fallback_weight_decay: float | None = None,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        max_consecutive_skips: int | None = 100,
        backend: Backend = "auto",
        rounding: Rounding = "nearest",
    ) -> None:
        hyperparameters = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clamp": clamp,
            "nesterov": nesterov, "scale": scale, "max_step": max_step, "orthogonalizer": orthogonalizer,
        }  # fmt: skip
        others = Fallback(fallback, fallback_lr, fallback_betas, fallback_eps, fallback_weight_decay)
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, others, options)
