"""HVAdam: Adam with a hidden vector."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..engine.arithmetic import add_, add_quotient_, decay_, ema, ema_, regularize, squared_difference, weight_decay
from ..engine.hyperparameters import number
from ..engine.optimizer import EngineOptions, Params, RuleOptimizer
from ..engine.rounding import Rounding
from ..engine.rule import GroupRule, Hyperparameters, Internal, Scalars, like
from ..engine.state import accumulation_dtype
from ..engine.step import Backend

_RESTART_BELOW = 0.1  # The smoothed cosine below which the hidden vector starts anew.


def _scalars(t: int, hp: Hyperparameters) -> Scalars:
    b1, b2 = hp["betas"]
    return {
        "b1": b1,
        "b2": b2,
        "bc1": 1 - b1**t,
        "root_bc2": sqrt(1 - b2**t),
        "lr": hp["lr"],
        "eps": hp["eps"],
        "gamma": hp["gamma"],
        **weight_decay(hp),
    }


def _sums(p: Tensor, g: Tensor, m: Tensor, s: Tensor, v: Tensor, *, b1, l2, **_: Any) -> tuple[Tensor, ...]:
    m = ema(m, regularize(g, p, l2), b1)  # as it will be
    # Products, too: the sums nearly cancel, and squares of what float32 can hold may be out of its range.
    m, v = (x.to(accumulation_dtype(x.device)).flatten() for x in (m, v))
    return m.dot(m), m.dot(v), v.dot(v)


def _combine(
    mm: Tensor,
    mv: Tensor,
    vv: Tensor,
    fresh: Tensor,
    cosine: Tensor,
    count: Tensor,
    *,
    b2: Any,
    bc1: Any,
    lr: Any,
    **_: Any,
) -> tuple[dict[str, Tensor], Scalars]:
    """One decision for the whole group; see the class for the symbols."""
    mm, mv = mm / (bc1 * bc1), mv / bc1
    spread = mm + vv - 2 * mv
    k = torch.where(spread == 0, 0.0, (mm - mv) / spread)
    norm2 = (k * k * vv + (1 - k) ** 2 * mm + 2 * k * (1 - k) * mv).abs()
    delta = (k * mv + (1 - k) * mm) / (norm2 * mm).sqrt()
    starts = fresh > 0
    # Rounding can carry a cosine past 1, and without any gradient it is NaN: no hidden step then.
    moves = ~starts & (delta.abs() <= 1)
    new_cosine = b2 * cosine + (1 - b2) * delta
    new_count = count + 1
    restarts = moves & (new_cosine / (1 - b2**new_count) < _RESTART_BELOW)
    factor = 10 ** (6 * new_cosine - 3)
    follows = moves & ~restarts
    zero, one = torch.zeros_like(k), torch.ones_like(k)
    group_state = {
        "fresh": torch.where(restarts, one, zero),
        "cosine": torch.where(starts, zero, torch.where(moves, new_cosine, cosine)),
        "count": torch.where(starts, zero, torch.where(moves, new_count, count)),
    }
    coefficients = {
        "old": torch.where(starts, zero, torch.where(follows, k, one)),
        "new": torch.where(starts, one, torch.where(follows, 1 - k, zero)) / bc1,
        "hidden_lr": torch.where(follows, lr * factor, zero),
    }
    return group_state, coefficients


def _update(
    p: Tensor, g: Tensor, m: Tensor, s: Tensor, v: Tensor, *,
    b1, b2, bc1, root_bc2, lr, eps, gamma, keep, l2, old, new, hidden_lr,
) -> None:  # fmt: skip
    g = decay_(p, g, keep, l2)
    ema_(m, g, b1)
    from_hidden = squared_difference(g, v)
    from_momentum = squared_difference(g, m)
    # from_hidden^2 / (...), in the order that cannot overflow where the result does not.
    target = (from_hidden / add_(from_momentum, from_hidden, gamma).add_(eps)).mul_(from_hidden)
    # Infinity would stay in the average, and become NaN with b2 = 0.
    ema_(s, target.clamp_(max=torch.finfo(s.dtype).max / 4), b2).add_(eps)
    add_quotient_(p, m, s.sqrt().add_(eps * root_bc2), -lr / bc1 * root_bc2)
    add_(v.mul_(old), m, new)
    add_(p, v, -hidden_lr)


def _alignment(g: Tensor, t: int, hp: Hyperparameters, *, cosine: Tensor, count: Tensor, **_: Tensor):
    known = (count > 0).to(count.dtype)
    return torch.where(count > 0, cosine / (1 - hp["betas"][1] ** count), 0.0), known


def _lr_factor(g: Tensor, t: int, hp: Hyperparameters, *, cosine: Tensor, count: Tensor, **_: Tensor):
    return torch.where(count > 0, 10 ** (6 * cosine - 3), 0.0), (count > 0).to(count.dtype)


def _steps_since_restart(g: Tensor, t: int, hp: Hyperparameters, *, count: Tensor, **_: Tensor):
    return count, torch.ones_like(count)


HVADAM = GroupRule(
    "HVAdam",
    state=like("m", "s", "v"),
    scalars=_scalars,
    update=_update,
    group_state={"fresh": 1.0, "cosine": 0.0, "count": 0.0},
    sums=_sums,
    combine=_combine,
    constraints={"gamma": number()},
    internals={
        "alignment": Internal("smoothed cosine of hidden vector and momentum; below 0.1 it is restarted", _alignment),
        "lr_factor": Internal("factor 10^(6 d - 3) of the hidden vector's learning rate", _lr_factor),
        "steps_since_restart": Internal("hidden steps since the hidden vector was started", _steps_since_restart),
    },
)


class HVAdam(RuleOptimizer):
    r"""HVAdam, Adam with a hidden vector (`arXiv 2511.20277 <https://arxiv.org/abs/2511.20277>`_).

    The adaptive step, per element (:math:`v` is the hidden vector before the step):

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad p_t = (g_t - v_{t-1})^2 \\
        s_t &= \beta_2 s_{t-1} + (1-\beta_2)\, p_t^2 / \bigl((g_t-m_t)^2 + \gamma p_t + \epsilon\bigr) + \epsilon \\
        \theta_t &= \theta_{t-1} - \eta\,\hat m_t / (\sqrt{\hat s_t} + \epsilon)

    The hidden step, with inner products over **all tensors of the parameter group**: :math:`v_t` is the point
    nearest to the origin on the line through :math:`v_{t-1}` and :math:`\hat m_t`,

    .. math::
        v_t = k v_{t-1} + (1-k)\hat m_t, \quad
        k = \frac{\|\hat m\|^2 - \langle\hat m, v\rangle}{\|\hat m\|^2 + \|v\|^2 - 2\langle\hat m, v\rangle}, \quad
        d_t = \beta_2 d_{t-1} + (1-\beta_2)\cos(v_t, \hat m_t)

    and :math:`\theta \leftarrow \theta - \eta\,10^{6 d_t - 3}\, v_t`. On the first step, and on the one after a
    restart, :math:`v := \hat m_t` and nothing else happens. When the bias-corrected :math:`d_t` falls below 0.1 the
    vector is restarted. Follows the released code: eps accumulates in ``s``, and the learning-rate factor uses
    :math:`d_t` without bias correction. Its ``amsgrad``, ``rectify``, ``fixed_decay`` and ``degenerated_to_sgd``,
    inherited from AdaBelief's file and used by no experiment, are left out. State: ``m``, ``s``, ``v``, each of
    the parameter's shape, and the group's ``fresh``, ``cosine`` and ``count``.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\eta` of both steps.
        betas: :math:`(\beta_1, \beta_2)`; the second also smooths the cosine.
        eps: :math:`\epsilon`.
        gamma: :math:`\gamma`, bounds the influence of the hidden vector on the variance.
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
        >>> optimizer = lightning_optim.HVAdam([w], lr=0.09)
        >>> w.grad = torch.tensor([1.0, 1.0])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9190, -2.0810])
    """

    rules = (HVADAM,)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        gamma: float = 0.0,
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
            "lr": lr, "betas": betas, "eps": eps, "gamma": gamma, "weight_decay": weight_decay,
            "decoupled": decoupled,
        }  # fmt: skip
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, options)
