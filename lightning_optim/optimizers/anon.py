"""Anon: tunable adaptivity with an incremental delay update."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..engine.arithmetic import add_quotient_, decay_, ema_, ema_product_, weight_decay
from ..engine.hyperparameters import fraction, number, one_of
from ..engine.optimizer import EngineOptions, Params, RuleOptimizer
from ..engine.rounding import Rounding
from ..engine.rule import ElementwiseRule, Hyperparameters, Internal, Scalars, like
from ..engine.step import Backend

_REFRESHES = ("powers_of_two", "every_step")


def _scalars(t: int, hp: Hyperparameters) -> Scalars:
    b1, b2 = hp["betas"]
    every_step = hp["refresh"] == "every_step"
    since_refresh = 1 if every_step or t == 1 else t // 2
    return {
        "b1": b1,
        "b2": b2,
        # The first refresh has nothing to average with.
        "b3": hp["beta3"] if t > 1 else 0.0,
        "step_size": hp["lr"] / (1 - b1**t),
        "bc2": 1 - b2**since_refresh,
        "eps": hp["eps"],
        "gamma": hp["gamma"],
        "refresh": every_step or (t & (t - 1)) == 0,
        **weight_decay(hp),
    }


def _update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    s: Tensor,
    w: Tensor,
    *,
    b1,
    b2,
    b3,
    step_size,
    bc2,
    eps,
    gamma,
    refresh,
    keep,
    l2,
) -> None:
    g = decay_(p, g, keep, l2)
    ema_(m, g, b1)
    ema_product_(s, g, g, b2)
    if refresh:
        ema_(w, (s / bc2).add_(eps).pow_(gamma), b3)
        s.zero_()
    add_quotient_(p, m, w.sqrt(), -step_size)


def _number(x: int) -> Tensor:
    return torch.tensor(x, dtype=torch.float32)


def _refreshes(g: Tensor, t: int, hp: Hyperparameters, **_: Tensor) -> tuple[Tensor, ...]:
    every_step = hp["refresh"] == "every_step"
    return _number(t if every_step else t.bit_length()), _number(1)


def _steps_since_refresh(g: Tensor, t: int, hp: Hyperparameters, **_: Tensor) -> tuple[Tensor, ...]:
    every_step = hp["refresh"] == "every_step"
    return _number(0 if every_step else t - 2 ** (t.bit_length() - 1)), _number(1)


ANON = ElementwiseRule(
    "Anon",
    state=like("m", "s", "w"),
    scalars=_scalars,
    update=_update,
    constraints={
        "gamma": number(-10, 10),
        "beta3": fraction(),
        "refresh": one_of(*_REFRESHES),
    },
    fixed=("refresh",),  # The number of gradients that s averages follows from it.
    internals={
        "refreshes": Internal("number of refreshes of the scale so far", _refreshes),
        "steps_since_refresh": Internal("steps since the last refresh of the scale", _steps_since_refresh),
    },
)


class Anon(RuleOptimizer):
    r"""Anon, adaptivity as a real number, with incremental delay update (`arXiv 2605.02317`_).

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad s_t = \beta_2 s_{t-1} + (1-\beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\eta}{1-\beta_1^t}\, m_t \circ v

    The scale :math:`v` is refreshed only at :math:`t = 1, 2, 4, 8, \dots`, from the average of the squared gradients
    *since the last refresh*, after which :math:`s := 0` (:math:`n` is the number of steps it saw):

    .. math::
        v^{-2} \leftarrow \beta_3 v^{-2} + (1-\beta_3)\bigl(s/(1-\beta_2^{n}) + \epsilon\bigr)^\gamma

    with :math:`\beta_3` taken as 0 at the first refresh. :math:`\gamma = 1` is Adam-like, 0 is momentum SGD (so
    ``lr`` must be of SGD's size), negative values make larger steps where gradients are large. The readable copy
    of the released code refreshes at every step with :math:`\beta_3=\beta_2`, an experiment; the default here is the
    published rule, and ``refresh="every_step", beta3=betas[1]`` is that code. State: ``m``, ``s`` and
    ``w`` (:math:`v^{-2}`), each of the parameter's shape.

    .. _arXiv 2605.02317: https://arxiv.org/abs/2605.02317

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\eta`.
        betas: :math:`(\beta_1, \beta_2)`.
        eps: :math:`\epsilon`, in squared units of the gradient.
        gamma: Adaptivity :math:`\gamma`. The released default is 0; its examples use 1.1, 1, 0 and -0.1.
        beta3: Weight :math:`\beta_3` of the old scale at a refresh.
        refresh: ``"powers_of_two"`` or ``"every_step"``.
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
        >>> optimizer = lightning_optim.Anon([w], lr=0.1, gamma=1.0)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000])
    """

    rules = (ANON,)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        gamma: float = 0.0,
        beta3: float = 0.5,
        refresh: Literal["powers_of_two", "every_step"] = "powers_of_two",
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
            "lr": lr, "betas": betas, "eps": eps, "gamma": gamma, "beta3": beta3, "refresh": refresh,
            "weight_decay": weight_decay, "decoupled": decoupled,
        }  # fmt: skip
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, options)
