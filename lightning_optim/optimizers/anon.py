"""Anon: tunable adaptivity with an incremental delay update."""

from typing import Annotated, Literal

import torch

from ..engine.arithmetic import ema_, ema_product_
from ..engine.decay import Decay
from ..engine.hyperparameters import fraction, number
from ..engine.kinds import Elementwise, Move
from ..engine.rule import Internal


def _refreshes(g, s, t, h):
    return torch.tensor(float(t if h.refresh == "every_step" else t.bit_length())), torch.tensor(1.0)


def _steps_since_refresh(g, s, t, h):
    return torch.tensor(float(0 if h.refresh == "every_step" else t - 2 ** (t.bit_length() - 1))), torch.tensor(1.0)


class Anon(
    Elementwise,
    paper="arXiv 2605.02317",
    idea="adaptive moments",
    about="tunable adaptivity with incremental delay update",
):
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
        eps: :math:`\epsilon`, in squared units of the gradient.
        gamma: Adaptivity :math:`\gamma`. The released default is 0; its examples use 1.1, 1, 0 and -0.1.
        beta3: Weight :math:`\beta_3` of the old scale at a refresh.
        refresh: ``"powers_of_two"`` or ``"every_step"``.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.Anon([w], lr=0.1, gamma=1.0)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    gamma: Annotated[float, number(-10, 10)] = 0.0
    beta3: Annotated[float, fraction()] = 0.5
    refresh: Literal["powers_of_two", "every_step"] = "powers_of_two"
    weight_decay: float = 0.0
    decay: Decay = "coupled"
    decoupled: bool | None = None

    buffers = ("m", "s", "w")
    averages = ("m",)
    squares = ("s", "w")
    moments = {"m": ("g", "beta1")}
    fixed = ("refresh",)  # The number of gradients that s averages follows from it.
    internals = {
        "refreshes": Internal("number of refreshes of the scale so far", _refreshes),
        "steps_since_refresh": Internal("steps since the last refresh of the scale", _steps_since_refresh),
    }

    @staticmethod
    def scalars(t, h):
        every_step = h.refresh == "every_step"
        since_refresh = 1 if every_step or t == 1 else t // 2
        return {
            "step": h.lr / (1 - h.beta1**t),
            "bc2": 1 - h.beta2**since_refresh,
            "beta3": h.beta3 if t > 1 else 0.0,  # The first refresh has nothing to average with.
            "refreshes": every_step or (t & (t - 1)) == 0,
        }

    @staticmethod
    def update(g, s, k):
        ema_(s.m, g, k.beta1)
        ema_product_(s.s, g, g, k.beta2)
        if k.refreshes:
            ema_(s.w, (s.s / k.bc2).add_(k.eps).pow_(k.gamma), k.beta3)
            s.s.zero_()
        return Move(s.m, k.step, over=s.w.sqrt())
