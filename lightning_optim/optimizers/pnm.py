"""PNM and AdaPNM: positive-negative momentum."""

from math import hypot, sqrt
from typing import Annotated

import torch

from ..engine.arithmetic import ema_, ema_product_, plus
from ..engine.decay import Decay
from ..engine.hyperparameters import number
from ..engine.kinds import Elementwise, Move
from ..engine.rule import gradient_to_variance


def _weights(t, beta1, beta0):
    """Of the two momenta at step ``t``."""
    norm = hypot(1 + beta0, beta0)
    return {
        "beta1_squared": beta1**2,
        "positive": (1 + beta0) / norm,
        "negative": beta0 / norm,
        "odd_step": t % 2 == 1,
    }


def _direction(g, s, k):
    """The normalised difference of the two momenta, after the one whose turn it is has taken the gradient."""
    turn, other = (s.odd, s.even) if k.odd_step else (s.even, s.odd)
    ema_(turn, g, k.beta1_squared)
    return plus(turn * k.positive, other, -k.negative)


class PNM(
    Elementwise, paper="arXiv 2103.17182", idea="momentum", about="gradient descent with positive-negative momentum"
):
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
        lr: Learning rate :math:`\eta`. The released class has no default: 1.0 is that of the authors'
            CIFAR-10 example, beside 0.1 for SGD with momentum 0.9, whose steps add up to ten times the gradient.
        momentum: :math:`\beta_1`, the decay per step; a momentum decays by its square every second step.
        beta0: :math:`\beta_0`, how much of the other momentum is subtracted. 0 subtracts nothing.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.PNM([w], lr=0.1, momentum=0.0, beta0=0.0)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9500, -2.0100])
    """

    lr: float = 1.0
    momentum: float = 0.9
    beta0: Annotated[float, number()] = 1.0
    weight_decay: float = 0.0
    decay: Decay = "decoupled"
    decoupled: bool | None = None

    buffers = ("odd", "even")
    averages = ("odd", "even")

    @staticmethod
    def scalars(t, h):
        return _weights(t, h.momentum, h.beta0)

    @staticmethod
    def update(g, s, k):
        return Move(_direction(g, s, k), k.lr)


class AdaPNM(
    Elementwise, paper="arXiv 2103.17182", idea="adaptive moments", about="Adam with positive-negative momentum"
):
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
        lr: Learning rate :math:`\eta` (default as released).
        betas: :math:`(\beta_1, \beta_2)`; a momentum decays by the square of the first every second step.
        beta0: :math:`\beta_0`, how much of the other momentum is subtracted. 0 subtracts nothing.
        eps: Added to the root of the second moment, in units of the gradient.
        amsgrad: Divide by the running maximum of ``v`` (default as released).

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.AdaPNM([w], lr=0.1, betas=(0.0, 0.999), beta0=0.0)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    beta0: Annotated[float, number()] = 1.0
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: Decay = "decoupled"
    decoupled: bool | None = None
    amsgrad: bool = True

    internals = {"gradient_to_variance": gradient_to_variance()}
    averages = ("odd", "even")
    squares = ("v", "v_max")
    moments = {"v": ("g^2", "beta2")}

    @staticmethod
    def buffers(shape, h):
        return ("odd", "even", "v", "v_max") if h.amsgrad else ("odd", "even", "v")

    @staticmethod
    def scalars(t, h):
        root_bc2 = sqrt(1 - h.beta2**t)
        return {
            "step": h.lr / (1 - h.beta1**t) * root_bc2,
            "root_bc2": root_bc2,
            **_weights(t, h.beta1, h.beta0),
        }

    @staticmethod
    def update(g, s, k):
        direction = _direction(g, s, k)
        ema_product_(s.v, g, g, k.beta2)
        second = torch.maximum(s.v_max, s.v, out=s.v_max) if k.amsgrad else s.v
        return Move(direction, k.step, over=second.sqrt().add_(k.eps * k.root_bc2))
