"""LaProp: momentum of normalised gradients."""

from __future__ import annotations

from math import sqrt

from torch import Tensor

from ..engine.arithmetic import add_, add_quotient_, ema_, ema_product_, shrink_
from ..engine.optimizer import EngineOptions, Params, RuleOptimizer
from ..engine.rounding import Rounding
from ..engine.rule import LIKE_PARAMETER, ElementwiseRule, Hyperparameters, Scalars, Shape, gradient_to_variance
from ..engine.step import Backend

_STEPS_BEFORE_CENTERING = 10


def _state(shape: Shape, hp: Hyperparameters) -> dict[str, Shape | None]:
    names = ("m", "v", "mean") if hp["centered"] else ("m", "v")
    return dict.fromkeys(names, LIKE_PARAMETER)


def _scalars(t: int, hp: Hyperparameters, host: dict[str, float]) -> Scalars:
    b1, b2 = hp["betas"]
    lr = hp["lr"]
    # Running averages of lr and of 1, so that the corrections stay right when lr or the betas change.
    host["lr_average"] = b1 * host["lr_average"] + (1 - b1) * lr
    host["weight_sum"] = b2 * host["weight_sum"] + (1 - b2)
    return {
        "b1": b1,
        "b2": b2,
        "lr": lr,
        "step_size": lr / host["lr_average"] if host["lr_average"] else 0.0,
        "root_bc2": sqrt(host["weight_sum"]),
        "eps": hp["eps"],
        "keep": 1 - hp["weight_decay"] if lr else 1.0,
        "center": hp["centered"] and t > _STEPS_BEFORE_CENTERING,
    }


def _update(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, mean: Tensor | None = None, *,
    b1, b2, lr, step_size, root_bc2, eps, keep, center,
) -> None:  # fmt: skip
    ema_product_(v, g, g, b2)
    second = v
    if mean is not None:
        ema_(mean, g, b2)
        if center:
            second = (v - mean * mean).clamp_(min=0)  # Rounding can make it negative.
    add_quotient_(m.mul_(b1), g, second.sqrt().add_(eps * root_bc2), (1 - b1) * lr * root_bc2)
    add_(p, m, -step_size)
    shrink_(p, keep)


LAPROP = ElementwiseRule(
    "LaProp",
    state=_state,
    scalars=_scalars,
    update=_update,
    host_state=("lr_average", "weight_sum"),
    internals={"gradient_to_variance": gradient_to_variance()},
)


class LaProp(RuleOptimizer):
    r"""LaProp, Adam with normalisation before momentum (`arXiv 2002.04839 <https://arxiv.org/abs/2002.04839>`_).

    .. math::
        v_t &= \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\,\eta_t\, g_t / (\sqrt{v_t/c_{2,t}} + \epsilon) \\
        \theta_t &= (1-\lambda)\bigl(\theta_{t-1} - m_t\, \eta_t/\bar\eta_t\bigr)

    with :math:`\bar\eta_t = \beta_1\bar\eta_{t-1} + (1-\beta_1)\eta_t` and :math:`c_{2,t}` the same average of 1.
    Follows the released code, in which the learning rate is part of the momentum and **weight decay is not
    multiplied by the learning rate** and comes after the step. Where the code divides by a learning rate of
    exactly 0 and moves by the whole momentum, nothing moves or decays here. State: ``m``, ``v`` (and ``mean``) of the
    parameter's shape, ``lr_average``, ``weight_sum``.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\eta` (default as released).
        betas: :math:`(\beta_1, \beta_2)`.
        eps: Added to the root of the second moment, in units of the gradient.
        weight_decay: The fraction :math:`\lambda` of every parameter that is lost per step.
        centered: From step 11 on subtract the squared running mean of the gradient (decay :math:`\beta_2`) from
            its second moment, which leaves its variance.
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
        >>> optimizer = lightning_optim.LaProp([w], lr=0.1)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000])
    """

    rules = (LAPROP,)

    def __init__(
        self,
        params: Params,
        lr: float = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        max_consecutive_skips: int | None = 100,
        backend: Backend = "auto",
        rounding: Rounding = "nearest",
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "centered": centered,
        }
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, options)
