"""PNM and AdaPNM: positive-negative momentum."""

from __future__ import annotations

from math import hypot, sqrt

import torch
from torch import Tensor

from ..engine.arithmetic import add_, add_quotient_, decay_, ema_, ema_product_, plus, weight_decay
from ..engine.hyperparameters import number
from ..engine.optimizer import EngineOptions, Params, RuleOptimizer
from ..engine.rounding import Rounding
from ..engine.rule import LIKE_PARAMETER, ElementwiseRule, Hyperparameters, Scalars, Shape, gradient_to_variance, like
from ..engine.step import Backend

_CONSTRAINTS = {"beta0": number()}


def _momenta(t: int, beta1: float, beta0: float) -> Scalars:
    norm = hypot(1 + beta0, beta0)
    return {
        "beta1_squared": beta1**2,
        "positive": (1 + beta0) / norm,
        "negative": beta0 / norm,
        "odd_step": t % 2 == 1,
    }


def _direction(g: Tensor, odd: Tensor, even: Tensor, beta1_squared, positive, negative, odd_step) -> Tensor:
    """The normalised difference of the two momenta, after the one whose turn it is has taken the gradient."""
    turn, other = (odd, even) if odd_step else (even, odd)
    ema_(turn, g, beta1_squared)
    return plus(turn * positive, other, -negative)


# --- PNM --------------------------------------------------------------------------------------------------------


def _pnm_scalars(t: int, hp: Hyperparameters) -> Scalars:
    return {"lr": hp["lr"], **_momenta(t, hp["momentum"], hp["beta0"]), **weight_decay(hp)}


def _pnm_update(
    p: Tensor, g: Tensor, odd: Tensor, even: Tensor, *,
    lr, beta1_squared, positive, negative, odd_step, keep, l2,
) -> None:  # fmt: skip
    g = decay_(p, g, keep, l2)
    add_(p, _direction(g, odd, even, beta1_squared, positive, negative, odd_step), -lr)


PNM_RULE = ElementwiseRule(
    "PNM", state=like("odd", "even"), scalars=_pnm_scalars, update=_pnm_update, constraints=_CONSTRAINTS
)


class PNM(RuleOptimizer):
    r"""PNM, stochastic gradient descent with positive-negative momentum (`arXiv 2103.17182`_).

    .. math::
        m_t &= \beta_1^2 m_{t-2} + (1-\beta_1^2) g_t \\
        \theta_t &= \theta_{t-1} - \eta\,
            \frac{(1+\beta_0)\,m_t - \beta_0\,m_{t-1}}{\sqrt{(1+\beta_0)^2 + \beta_0^2}}

    with :math:`m_0 = m_{-1} = 0` and without bias correction. Odd and even steps have a momentum each, which the other
    steps leave as it is: their difference has the mean of the gradients and more of their noise, the more the larger
    :math:`\beta_0`. As released, the difference is divided by a norm that keeps the noise of *independent* momenta as
    it is, so that the mean step is :math:`\eta/\sqrt{(1+\beta_0)^2+\beta_0^2}` times the mean gradient. The release
    writes ``betas=(momentum, beta0)``. State: ``odd``, ``even``, each of the parameter's shape.

    .. _arXiv 2103.17182: https://arxiv.org/abs/2103.17182

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\eta`. The released class has no default: 1.0 is that of the authors'
            CIFAR-10 example, beside 0.1 for SGD with momentum 0.9, whose steps add up to ten times the gradient.
        momentum: :math:`\beta_1`, the decay per step; a momentum decays by its square every second step.
        beta0: :math:`\beta_0`, how much of the other momentum is subtracted. 0 subtracts nothing.
        weight_decay: Weight decay coefficient.
        decoupled: ``True`` (as released) shrinks the parameters by ``1 - lr * weight_decay`` before the step;
            ``False`` adds ``weight_decay * p`` to the gradient.
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
        >>> optimizer = lightning_optim.PNM([w], lr=0.1, momentum=0.0, beta0=0.0)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9500, -2.0100])
    """

    rules = (PNM_RULE,)

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        momentum: float = 0.9,
        beta0: float = 1.0,
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
            "lr": lr, "momentum": momentum, "beta0": beta0, "weight_decay": weight_decay, "decoupled": decoupled,
        }  # fmt: skip
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, options)


# --- AdaPNM -----------------------------------------------------------------------------------------------------


def _adapnm_state(shape: Shape, hp: Hyperparameters) -> dict[str, Shape | None]:
    names = ("odd", "even", "v", "v_max") if hp["amsgrad"] else ("odd", "even", "v")
    return dict.fromkeys(names, LIKE_PARAMETER)


def _adapnm_scalars(t: int, hp: Hyperparameters) -> Scalars:
    b1, b2 = hp["betas"]
    return {
        "b2": b2,
        "step_size": hp["lr"] / (1 - b1**t),
        "root_bc2": sqrt(1 - b2**t),
        "eps": hp["eps"],
        **_momenta(t, b1, hp["beta0"]),
        **weight_decay(hp),
    }


def _adapnm_update(
    p: Tensor, g: Tensor, odd: Tensor, even: Tensor, v: Tensor, v_max: Tensor | None = None, *,
    b2, step_size, root_bc2, eps, beta1_squared, positive, negative, odd_step, keep, l2,
) -> None:  # fmt: skip
    g = decay_(p, g, keep, l2)
    direction = _direction(g, odd, even, beta1_squared, positive, negative, odd_step)
    ema_product_(v, g, g, b2)
    if v_max is not None:
        torch.maximum(v_max, v, out=v_max)
    root = (v if v_max is None else v_max).sqrt()
    add_quotient_(p, direction, root.add_(eps * root_bc2), -step_size * root_bc2)


ADAPNM_RULE = ElementwiseRule(
    "AdaPNM",
    state=_adapnm_state,
    scalars=_adapnm_scalars,
    update=_adapnm_update,
    constraints=_CONSTRAINTS,
    internals={"gradient_to_variance": gradient_to_variance()},
)


class AdaPNM(RuleOptimizer):
    r"""AdaPNM, Adam with positive-negative momentum (`arXiv 2103.17182`_).

    .. math::
        m_t &= \beta_1^2 m_{t-2} + (1-\beta_1^2) g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\eta}{1-\beta_1^t}\,
            \frac{(1+\beta_0)\,m_t - \beta_0\,m_{t-1}}{\sqrt{(1+\beta_0)^2 + \beta_0^2}} \Big/
            \Bigl(\sqrt{\max_{s \le t} v_s/(1-\beta_2^t)} + \epsilon\Bigr)

    with the momenta of odd and even steps as in :class:`PNM`. As released, the bias correction of a momentum is
    :math:`1-\beta_1^t`, although it decays by :math:`\beta_1^2` every second step, ``amsgrad`` is the default, and its
    maximum is that of the uncorrected second moment. The release writes ``betas=(*betas, beta0)``. State: ``odd``,
    ``even``, ``v`` (and ``v_max``), each of the parameter's shape.

    .. _arXiv 2103.17182: https://arxiv.org/abs/2103.17182

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\eta` (default as released).
        betas: :math:`(\beta_1, \beta_2)`; a momentum decays by the square of the first every second step.
        beta0: :math:`\beta_0`, how much of the other momentum is subtracted. 0 subtracts nothing.
        eps: Added to the root of the second moment, in units of the gradient.
        weight_decay: Weight decay coefficient.
        decoupled: ``True`` (as released) shrinks the parameters by ``1 - lr * weight_decay`` before the step;
            ``False`` adds ``weight_decay * p`` to the gradient.
        amsgrad: Divide by the running maximum of ``v`` (default as released).
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
        >>> optimizer = lightning_optim.AdaPNM([w], lr=0.1, betas=(0.0, 0.999), beta0=0.0)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000])
    """

    rules = (ADAPNM_RULE,)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta0: float = 1.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        amsgrad: bool = True,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        max_consecutive_skips: int | None = 100,
        backend: Backend = "auto",
        rounding: Rounding = "nearest",
    ) -> None:
        hyperparameters = {
            "lr": lr, "betas": betas, "beta0": beta0, "eps": eps, "weight_decay": weight_decay,
            "decoupled": decoupled, "amsgrad": amsgrad,
        }  # fmt: skip
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, options)
