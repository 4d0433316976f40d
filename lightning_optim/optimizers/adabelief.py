"""AdaBelief: Adam with the variance around the momentum in place of the second moment."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from ..engine.arithmetic import add_, add_quotient_, decay_, ema_, ema_product_, weight_decay
from ..engine.optimizer import EngineOptions, Params, RuleOptimizer
from ..engine.rounding import Rounding
from ..engine.rule import LIKE_PARAMETER, ElementwiseRule, Hyperparameters, Scalars, Shape, gradient_to_variance
from ..engine.step import Backend


def _state(shape: Shape, hp: Hyperparameters) -> dict[str, Shape | None]:
    names = ("m", "s", "s_max") if hp["amsgrad"] else ("m", "s")
    return dict.fromkeys(names, LIKE_PARAMETER)


def _scalars(t: int, hp: Hyperparameters) -> Scalars:
    b1, b2 = hp["betas"]
    scalars = {
        "b1": b1,
        "b2": b2,
        "eps": hp["eps"],
        "step_size": hp["lr"] / (1 - b1**t),
        "root_bc2": sqrt(1 - b2**t),
        "rectify": hp["rectify"],
        "tractable": True,
        **weight_decay(hp),
    }
    if hp["rectify"]:
        rho_inf = 2 / (1 - b2) - 1
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        scalars["tractable"] = rho >= 5
        if rho >= 5:
            r = (rho - 4) / (rho_inf - 4) * (rho - 2) / rho * rho_inf / (rho_inf - 2)
            scalars["step_size"] *= sqrt((1 - b2**t) * r)
    return scalars


def _update(
    p: Tensor, g: Tensor, m: Tensor, s: Tensor, s_max: Tensor | None = None, *,
    b1, b2, eps, step_size, root_bc2, rectify, tractable, keep, l2,
) -> None:  # fmt: skip
    g = decay_(p, g, keep, l2)
    ema_(m, g, b1)
    residual = g - m
    ema_product_(s, residual, residual, b2).add_(eps)
    if s_max is not None:
        torch.maximum(s_max, s, out=s_max)
    if not tractable:
        add_(p, m, -step_size)
    elif rectify:
        add_quotient_(p, m, s.sqrt().add_(eps), -step_size)
    else:
        root = (s if s_max is None else s_max).sqrt()
        add_quotient_(p, m, root.add_(eps * root_bc2), -step_size * root_bc2)


ADABELIEF = ElementwiseRule(
    "AdaBelief",
    state=_state,
    scalars=_scalars,
    update=_update,
    internals={"gradient_to_variance": gradient_to_variance("s", "variance around the momentum")},
)


class AdaBelief(RuleOptimizer):
    r"""AdaBelief (`arXiv 2010.07468 <https://arxiv.org/abs/2010.07468>`_).

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t \\
        s_t &= \beta_2 s_{t-1} + (1-\beta_2)(g_t - m_t)^2 + \epsilon \\
        \theta_t &= \theta_{t-1} - \eta\,\hat m_t / (\sqrt{\hat s_t} + \epsilon)

    with bias-corrected :math:`\hat m, \hat s`. With ``rectify``, RAdam's length of the variance estimate
    :math:`\rho_t = \rho_\infty - 2t\beta_2^t/(1-\beta_2^t)`, :math:`\rho_\infty = 2/(1-\beta_2)-1`, decides: below 5
    the step is plain bias-corrected momentum :math:`\eta\hat m_t`; from 5 on it is multiplied by RAdam's factor.
    As in the released code (0.2.1), eps is added to ``s`` *every step* and once more outside the root, the
    rectified branch adds the outer eps to the uncorrected root, and ``amsgrad`` has no effect there. State: ``m``,
    ``s`` (and ``s_max``), each of the parameter's shape.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\eta`.
        betas: :math:`(\beta_1, \beta_2)`.
        eps: :math:`\epsilon`, in squared units of the gradient inside the recursion and in units of the gradient
            outside of it. 1e-16 as released; the paper's CIFAR and LSTM runs have 1e-8 and 1e-12.
        weight_decay: Weight decay coefficient.
        decoupled: ``True`` shrinks the parameters by ``1 - lr * weight_decay`` before the step; ``False`` adds
            ``weight_decay * p`` to the gradient.
        rectify: Use RAdam's rectification (default as released; the paper's results are without).
        amsgrad: Divide by the running maximum of ``s``.
        maximize: Ascend instead of descend.
        skip_nonfinite: Skip and count steps whose gradients hold NaN or infinity.
        max_consecutive_skips: Steps skipped in a row after which ``step`` raises an error, or ``None``.
        backend: How the step is run; see :class:`.optimizer.RuleOptimizer`.
        rounding: How results are stored in bfloat16 and float16 parameters; see :class:`.optimizer.RuleOptimizer`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter is complex.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.AdaBelief([w], lr=0.09, rectify=False)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000])
    """

    rules = (ADABELIEF,)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        rectify: bool = True,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        max_consecutive_skips: int | None = 100,
        backend: Backend = "auto",
        rounding: Rounding = "nearest",
    ) -> None:
        hyperparameters = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled,
            "rectify": rectify, "amsgrad": amsgrad,
        }  # fmt: skip
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, options)
