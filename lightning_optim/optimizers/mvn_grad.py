"""MVN-Grad: momentum on variance-normalised gradients."""

from __future__ import annotations

from math import sqrt

from torch import Tensor

from ..engine.arithmetic import add_, add_quotient_, decay_, ema_, ema_product_, weight_decay
from ..engine.hyperparameters import number
from ..engine.optimizer import EngineOptions, Params, RuleOptimizer
from ..engine.rounding import Rounding
from ..engine.rule import ElementwiseRule, Hyperparameters, Scalars, gradient_to_variance, like
from ..engine.step import Backend


def _scalars(t: int, hp: Hyperparameters) -> Scalars:
    b1, b2 = hp["betas"]
    return {
        "b1": b1,
        "b2": b2,
        "step_size": hp["lr"] / (1 - b1**t),
        "root_bc2": sqrt(1 - b2**t),
        "eps": hp["eps"],
        "eps_s": hp["eps_s"],
        **weight_decay(hp),
    }


def _update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    u: Tensor,
    *,
    b1,
    b2,
    step_size,
    root_bc2,
    eps,
    eps_s,
    keep,
    l2,
) -> None:
    g = decay_(p, g, keep, l2)
    ema_(m, g, b1)
    residual = g - m
    ema_product_(v, residual, residual, b2).add_(eps_s)
    add_quotient_(u.mul_(b1), g, v.sqrt().add_(eps * root_bc2), (1 - b1) * root_bc2)
    add_(p, u, -step_size)


MVN_GRAD = ElementwiseRule(
    "MVNGrad",
    state=like("m", "v", "u"),
    scalars=_scalars,
    update=_update,
    constraints={"eps_s": number()},
    internals={"gradient_to_variance": gradient_to_variance("v", "variance around the running mean")},
)


class MVNGrad(RuleOptimizer):
    r"""MVN-Grad, momentum on variance-normalised gradients (`arXiv 2602.10204 <https://arxiv.org/abs/2602.10204>`_).

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1-\beta_2)(g_t - m_t)^2 + \epsilon_s \\
        z_t &= g_t \,/\, \bigl(\sqrt{v_t/(1-\beta_2^t)} + \epsilon\bigr) \\
        u_t &= \beta_1 u_{t-1} + (1-\beta_1) z_t \\
        \theta_t &= \theta_{t-1} - \eta\, u_t/(1-\beta_1^t)

    The *current gradient* is normalised, by the variance around its running mean, and momentum is taken of the
    result. One outlier of any size therefore moves later updates by at most
    :math:`\beta_1^k(1-\beta_1)/(\beta_1\sqrt{1-\beta_2})`, and gradients without noise keep their magnitude
    instead of collapsing to their sign. State: ``m``, ``v``, ``u``, each of the parameter's shape.

    No code was released. Where weight decay enters is not stated line by line: the paper's experiments use the
    decoupled form (OpenWebText) and the coupled one (WikiText), and both are offered.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\eta`. The paper's default is not known; 1e-3 is Adam's.
        betas: :math:`(\beta_1, \beta_2)`, decay rates of both momenta and of the variance.
        eps: :math:`\epsilon`, added to the standard deviation, in units of the gradient.
        eps_s: :math:`\epsilon_s`, floor added to the variance *every step* (so about ``eps_s / (1 - betas[1])`` in
            the long run), in squared units of the gradient. The analysis sets it to 0, but with gradients that
            stop varying the variance then vanishes and steps grow up to ``lr * g / eps``.
        weight_decay: Weight decay coefficient.
        decoupled: ``True`` shrinks the parameters by ``1 - lr * weight_decay`` before the step; ``False`` adds
            ``weight_decay * p`` to the gradient, and so to all three buffers.
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
        >>> optimizer = lightning_optim.MVNGrad([w], lr=0.1)
        >>> w.grad = torch.tensor([0.5, 0.5])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.8889, -2.1111])
    """

    rules = (MVN_GRAD,)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_s: float = 1e-12,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        max_consecutive_skips: int | None = 100,
        backend: Backend = "auto",
        rounding: Rounding = "nearest",
    ) -> None:
        hyperparameters = {
            "lr": lr, "betas": betas, "eps": eps, "eps_s": eps_s, "weight_decay": weight_decay,
            "decoupled": decoupled,
        }  # fmt: skip
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, options)
