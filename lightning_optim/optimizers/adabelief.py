"""AdaBelief: Adam with the variance around the momentum in place of the second moment."""

from math import sqrt

import torch

from ..engine.arithmetic import ema_, ema_product_
from ..engine.decay import Decay
from ..engine.kinds import Elementwise, Move
from ..engine.rule import gradient_to_variance


class AdaBelief(
    Elementwise,
    paper="arXiv 2010.07468",
    about="variance around the momentum in place of the second moment",
):
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
        eps: :math:`\epsilon`, in squared units of the gradient inside the recursion and in units of the gradient
            outside of it. 1e-16 as released; the paper's CIFAR and LSTM runs have 1e-8 and 1e-12.
        rectify: Use RAdam's rectification (default as released; the paper's results are without). Its first five steps
            or so are proportional to the gradients, so a fallback rule has none.
        amsgrad: Divide by the running maximum of ``s``.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.AdaBelief([w], lr=0.09, rectify=False)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    weight_decay: float = 0.0
    decay: Decay = "decoupled"
    decoupled: bool | None = None
    rectify: bool = True
    amsgrad: bool = False

    as_fallback = {"rectify": False}
    internals = {"gradient_to_variance": gradient_to_variance("s", "variance around the momentum")}
    averages = ("m",)
    squares = ("s", "s_max")
    moments = {"m": ("g", "beta1"), "s": ("(g - m)^2", "beta2")}

    @staticmethod
    def buffers(shape, h):
        return ("m", "s", "s_max") if h.amsgrad else ("m", "s")

    @staticmethod
    def scalars(t, h):
        step, root_bc2 = h.lr / (1 - h.beta1**t), sqrt(1 - h.beta2**t)
        if not h.rectify:
            return {"step": step * root_bc2, "root_bc2": root_bc2, "tractable": True}
        rho_inf = 2 / (1 - h.beta2) - 1
        rho = rho_inf - 2 * t * h.beta2**t / (1 - h.beta2**t)
        if rho >= 5:
            r = (rho - 4) / (rho_inf - 4) * (rho - 2) / rho * rho_inf / (rho_inf - 2)
            step *= sqrt((1 - h.beta2**t) * r)
        return {"step": step, "root_bc2": 1.0, "tractable": rho >= 5}

    @staticmethod
    def update(g, s, k):
        ema_(s.m, g, k.beta1)
        deviation = g - s.m
        ema_product_(s.s, deviation, deviation, k.beta2).add_(k.eps)
        if k.amsgrad:
            torch.maximum(s.s_max, s.s, out=s.s_max)
        if not k.tractable:
            return Move(s.m, k.step)
        variance = s.s_max if k.amsgrad and not k.rectify else s.s
        return Move(s.m, k.step, over=variance.sqrt().add_(k.eps * k.root_bc2))
