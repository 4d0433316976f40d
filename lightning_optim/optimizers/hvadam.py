"""HVAdam: Adam with a hidden vector."""

from math import sqrt
from typing import Annotated

import torch

from ..devices import widest
from ..engine.arithmetic import add_, add_quotient_, ema, ema_, squared_difference
from ..engine.decay import Decay
from ..engine.hyperparameters import number
from ..engine.kinds import Group, Move
from ..engine.rule import Internal

_RESTART_BELOW = 0.1  # The smoothed cosine below which the hidden vector starts anew.


def _alignment(g, s, t, h):
    known = (s.count > 0).to(s.count.dtype)
    return torch.where(s.count > 0, s.cosine / (1 - h.beta2**s.count), 0.0), known


def _lr_factor(g, s, t, h):
    return torch.where(s.count > 0, 10 ** (6 * s.cosine - 3), 0.0), (s.count > 0).to(s.count.dtype)


def _steps_since_restart(g, s, t, h):
    return s.count, torch.ones_like(s.count)


class HVAdam(Group, paper="arXiv 2511.20277", idea="variance-centred", about="Adam with a hidden vector"):
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
        lr: Learning rate :math:`\eta` of both steps.
        betas: :math:`(\beta_1, \beta_2)`; the second also smooths the cosine.
        eps: :math:`\epsilon`.
        gamma: :math:`\gamma`, bounds the influence of the hidden vector on the variance.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.HVAdam([w], lr=0.09)
        >>> w.grad = torch.tensor([1.0, 1.0])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9190, -2.0810])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    gamma: Annotated[float, number()] = 0.0
    weight_decay: float = 0.0
    decay: Decay = "coupled"
    decoupled: bool | None = None

    buffers = ("m", "s", "v")
    averages = ("m", "v")
    squares = ("s",)
    moments = {"m": ("g", "beta1")}
    group_state = {"fresh": 1.0, "cosine": 0.0, "count": 0.0}
    internals = {
        "alignment": Internal("smoothed cosine of hidden vector and momentum; below 0.1 it is restarted", _alignment),
        "lr_factor": Internal("factor 10^(6 d - 3) of the hidden vector's learning rate", _lr_factor),
        "steps_since_restart": Internal("hidden steps since the hidden vector was started", _steps_since_restart),
    }

    @staticmethod
    def scalars(t, h):
        return {"bc1": 1 - h.beta1**t, "root_bc2": sqrt(1 - h.beta2**t)}

    @staticmethod
    def sums(g, s, k):
        m = ema(s.m, g, k.beta1)  # as it will be
        # Products, too: the sums nearly cancel, and squares of what float32 can hold may be out of its range.
        m, v = (x.to(widest(x.device)).flatten() for x in (m, s.v))
        return m.dot(m), m.dot(v), v.dot(v)

    @staticmethod
    def combine(sums, s, k):
        mm, mv, vv = sums
        mm, mv = mm / (k.bc1 * k.bc1), mv / k.bc1
        spread = mm + vv - 2 * mv
        weight = torch.where(spread == 0, 0.0, (mm - mv) / spread)  # The paper's k.
        norm2 = (weight * weight * vv + (1 - weight) ** 2 * mm + 2 * weight * (1 - weight) * mv).abs()
        delta = (weight * mv + (1 - weight) * mm) / (norm2 * mm).sqrt()
        starts = s.fresh > 0
        # Rounding can carry a cosine past 1, and without any gradient it is NaN: no hidden step then.
        moves = ~starts & (delta.abs() <= 1)
        cosine = k.beta2 * s.cosine + (1 - k.beta2) * delta
        count = s.count + 1
        restarts = moves & (cosine / (1 - k.beta2**count) < _RESTART_BELOW)
        follows = moves & ~restarts
        zero, one = torch.zeros_like(weight), torch.ones_like(weight)
        group_state = {
            "fresh": torch.where(restarts, one, zero),
            "cosine": torch.where(starts, zero, torch.where(moves, cosine, s.cosine)),
            "count": torch.where(starts, zero, torch.where(moves, count, s.count)),
        }
        coefficients = {
            "old": torch.where(starts, zero, torch.where(follows, weight, one)),
            "new": torch.where(starts, one, torch.where(follows, 1 - weight, zero)) / k.bc1,
            "hidden": torch.where(follows, 10 ** (6 * cosine - 3), zero),
        }
        return group_state, coefficients

    @staticmethod
    def update(g, s, k):
        ema_(s.m, g, k.beta1)
        from_hidden = squared_difference(g, s.v)
        from_momentum = squared_difference(g, s.m)
        # from_hidden^2 / (...), in the order that cannot overflow where the result does not.
        target = (from_hidden / add_(from_momentum, from_hidden, k.gamma).add_(k.eps)).mul_(from_hidden)
        # Infinity would stay in the average, and become NaN with beta2 = 0.
        ema_(s.s, target.clamp_(max=torch.finfo(s.s.dtype).max / 4), k.beta2).add_(k.eps)
        add_(s.v.mul_(k.old), s.m, k.new)
        root = s.s.sqrt().add_(k.eps * k.root_bc2)
        return Move(add_quotient_(s.v * k.hidden, s.m, root, k.root_bc2 / k.bc1), k.lr)
