"""MAdam and LaMAdam: the second moment is averaged so that the variance that it sees is largest (MaxVA)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.arithmetic import add_, add_quotient_, decay_, ema_, weight_decay
from ..engine.hyperparameters import fraction
from ..engine.optimizer import EngineOptions, Params, RuleOptimizer
from ..engine.rounding import Rounding
from ..engine.rule import LIKE_PARAMETER, ElementwiseRule, Hyperparameters, Internal, Scalars, Shape, like
from ..engine.step import Backend

_TINY = 1e-16  # As released, in squared units of the gradient.
_CONSTRAINTS = {"beta_min": fraction()}


def _weights(t: int, hp: Hyperparameters) -> Scalars:
    """The least and the largest weight of a new gradient, 1 - beta: float32 does not tell betas near 1 apart."""
    least = 1 - hp["betas"][1]
    return {"least": least, "most": least if t == 1 else max(1 - hp["beta_min"], least)}


def _root_second_moment(g: Tensor, mean: Tensor, variance: Tensor, total: Tensor, least, most) -> Tensor:
    """Update the weighted mean and variance of the gradients in place; the root of their second moment."""
    deviation = g - mean
    squared = deviation * deviation
    gap = (squared - variance).mul_(total)
    weight = (gap + _TINY).div_((squared + variance).add_(gap).add_(_TINY)).clamp_(least, most)
    total.addcmul_(weight, 1 - total)
    share = weight.div_(total)  # 1 at the first step.
    mean.lerp_(g, share)  # Exact where they are equal, and where the share is 1 after a huge gradient.
    variance.addcmul_(share, squared).mul_(1 - share)
    return torch.addcmul(variance, mean, mean).sqrt_()


def _sums(g: Tensor, t: int, hp: Hyperparameters, *, mean: Tensor, variance: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
    return g.to(mean.dtype).square().sum(), variance.sum() + mean.square().sum()


_INTERNALS = {
    "gradient_to_variance": Internal("mean squared gradient over the mean second moment (bias-corrected)", _sums)
}


# --- MAdam ------------------------------------------------------------------------------------------------------


def _madam_state(shape: Shape, hp: Hyperparameters) -> dict[str, Shape | None]:
    names = ("m", "mean", "variance", "total")
    return dict.fromkeys((*names, "root_max") if hp["amsgrad"] else names, LIKE_PARAMETER)


def _madam_scalars(t: int, hp: Hyperparameters) -> Scalars:
    b1 = hp["betas"][0]
    return {"b1": b1, "step_size": hp["lr"] / (1 - b1**t), "eps": hp["eps"], **_weights(t, hp), **weight_decay(hp)}


def _madam_update(
    p: Tensor, g: Tensor, m: Tensor, mean: Tensor, variance: Tensor, total: Tensor, root_max: Tensor | None = None, *,
    b1, step_size, eps, least, most, keep, l2,
) -> None:  # fmt: skip
    g = decay_(p, g, keep, l2)
    ema_(m, g, b1)
    root = _root_second_moment(g, mean, variance, total, least, most).add_(eps)
    if root_max is not None:
        root = torch.maximum(root_max, root, out=root_max)
    add_quotient_(p, m, root, -step_size)


MADAM = ElementwiseRule(
    "MAdam",
    state=_madam_state,
    scalars=_madam_scalars,
    update=_madam_update,
    constraints=_CONSTRAINTS,
    internals=_INTERNALS,
)


class MAdam(RuleOptimizer):
    r"""MAdam, Adam with a second moment of maximum variance (MaxVA, `arXiv 2006.11918`_).

    Every coordinate averages its gradients and their squares with a decay :math:`\beta_t` of its own, the one in
    :math:`[\beta_{\min}, \beta_2]` that makes their variance largest:

    .. math::
        \beta_t &= \frac{d + s}{w_{t-1} (d - s) + d + s + \tau}, \qquad
            d = (g_t - u_{t-1}/w_{t-1})^2, \quad s = v_{t-1}/w_{t-1} - (u_{t-1}/w_{t-1})^2 \\
        (u, v, w)_t &= \beta_t\, (u, v, w)_{t-1} + (1-\beta_t)\, (g_t, g_t^2, 1) \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t \\
        \theta_t &= \theta_{t-1} - \frac{\eta}{1-\beta_1^t}\, m_t / (\sqrt{v_t/w_t} + \epsilon)

    with :math:`\beta_t` at its upper end at the first step. An outlier is about half of the new average at once.
    :math:`\tau = 10^{-16}` is the released code's and not the paper's: with deviations below about 1e-8 the decay is
    ``beta_min``. The state is the mean :math:`u/w` and the variance :math:`s` in place of :math:`u` and :math:`v`,
    whose difference cancels, in float64 for float64 parameters (the release: float32 for all). State: ``m``, ``mean``,
    ``variance``, ``total`` (and ``root_max``), each of the parameter's shape.

    .. _arXiv 2006.11918: https://arxiv.org/abs/2006.11918

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\eta` (default as released).
        betas: :math:`(\beta_1, \beta_2)`; the second is the upper end of the range of the decay.
        beta_min: Lower end of the range. Where it is above ``betas[1]``, the decay is ``betas[1]``.
        eps: Added to the root of the second moment, in units of the gradient.
        weight_decay: Weight decay coefficient.
        decoupled: ``True`` (as released) shrinks the parameters by ``1 - lr * weight_decay`` before the step;
            ``False`` adds ``weight_decay * p`` to the gradient.
        amsgrad: Divide by the running maximum of the denominator, ``eps`` included (as released).
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
        >>> optimizer = lightning_optim.MAdam([w], lr=0.1)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000])
    """

    rules = (MADAM,)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta_min: float = 0.5,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        max_consecutive_skips: int | None = 100,
        backend: Backend = "auto",
        rounding: Rounding = "nearest",
    ) -> None:
        hyperparameters = {
            "lr": lr, "betas": betas, "beta_min": beta_min, "eps": eps, "weight_decay": weight_decay,
            "decoupled": decoupled, "amsgrad": amsgrad,
        }  # fmt: skip
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, options)


# --- LaMAdam ----------------------------------------------------------------------------------------------------


def _lamadam_scalars(t: int, hp: Hyperparameters, host: dict[str, float]) -> Scalars:
    b1, lr = hp["betas"][0], hp["lr"]
    # A running average of lr, so that the correction stays right when lr or the betas change.
    host["lr_average"] = b1 * host["lr_average"] + (1 - b1) * lr
    return {
        "b1": b1,
        "lr": lr,
        "step_size": lr / host["lr_average"] if host["lr_average"] else 0.0,
        "eps": hp["eps"],
        **_weights(t, hp),
        **weight_decay(hp),
    }


def _lamadam_update(
    p: Tensor, g: Tensor, m: Tensor, mean: Tensor, variance: Tensor, total: Tensor, *,
    b1, lr, step_size, eps, least, most, keep, l2,
) -> None:  # fmt: skip
    g = decay_(p, g, keep, l2)
    root = _root_second_moment(g, mean, variance, total, least, most).add_(eps)
    add_quotient_(m.mul_(b1), g, root, (1 - b1) * lr)
    add_(p, m, -step_size)


LAMADAM = ElementwiseRule(
    "LaMAdam",
    state=like("m", "mean", "variance", "total"),
    scalars=_lamadam_scalars,
    update=_lamadam_update,
    host_state=("lr_average",),
    constraints=_CONSTRAINTS,
    internals=_INTERNALS,
)


class LaMAdam(RuleOptimizer):
    r"""LaMAdam, LaProp with a second moment of maximum variance (MaxVA, `arXiv 2006.11918`_).

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\,\eta_t\, g_t / (\sqrt{v_t/w_t} + \epsilon) \\
        \theta_t &= \theta_{t-1} - m_t\, \eta_t/\bar\eta_t

    with :math:`v_t/w_t` as in :class:`MAdam` and :math:`\bar\eta_t = \beta_1\bar\eta_{t-1} + (1-\beta_1)\eta_t`. As
    released, the learning rate is part of the momentum, as in :class:`.laprop.LaProp`, and weight decay is coupled by
    default; its flag ``amsgrad``, which never takes effect, is left out. Where the code divides by a learning rate of
    exactly 0, nothing moves here. State: ``m``, ``mean``, ``variance``, ``total`` of the parameter's shape,
    ``lr_average``.

    .. _arXiv 2006.11918: https://arxiv.org/abs/2006.11918

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\eta` (default as released).
        betas: :math:`(\beta_1, \beta_2)`, in the release ``momentum`` and ``beta``; the second is the upper end of
            the range of the decay.
        beta_min: Lower end of the range. Where it is above ``betas[1]``, the decay is ``betas[1]``.
        eps: Added to the root of the second moment, in units of the gradient.
        weight_decay: Weight decay coefficient.
        decoupled: ``True`` shrinks the parameters by ``1 - lr * weight_decay`` before the step; ``False`` (as
            released) adds ``weight_decay * p`` to the gradient.
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
        >>> optimizer = lightning_optim.LaMAdam([w], lr=0.1)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000])
    """

    rules = (LAMADAM,)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        beta_min: float = 0.5,
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        max_consecutive_skips: int | None = 100,
        backend: Backend = "auto",
        rounding: Rounding = "nearest",
    ) -> None:
        hyperparameters = {
            "lr": lr, "betas": betas, "beta_min": beta_min, "eps": eps, "weight_decay": weight_decay,
            "decoupled": decoupled,
        }  # fmt: skip
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, options)
