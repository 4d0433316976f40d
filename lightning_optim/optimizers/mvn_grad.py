"""MVN-Grad: momentum on variance-normalised gradients."""

from math import sqrt
from typing import Annotated

from ..engine.arithmetic import add_quotient_, ema_, ema_product_
from ..engine.decay import Decay
from ..engine.hyperparameters import number
from ..engine.kinds import Elementwise, Move
from ..engine.rule import gradient_to_variance


class MVNGrad(
    Elementwise,
    paper="arXiv 2602.10204",
    idea="normalise, then average",
    about="momentum on variance-normalised gradients",
):
    r"""MVN-Grad, momentum on variance-normalised gradients (`arXiv 2602.10204 <https://arxiv.org/abs/2602.10204>`_).

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1-\beta_2)(g_t - m_t)^2 + \epsilon_s \\
        z_t &= g_t \,/\, \bigl(\sqrt{v_t/(1-\beta_2^t)} + \epsilon\bigr) \\
        u_t &= \beta_1 u_{t-1} + (1-\beta_1) z_t \\
        \theta_t &= \theta_{t-1} - \eta\, u_t/(1-\beta_1^t)

    The *current gradient* is normalised by the variance around its running mean, and the momentum averages the
    normalised gradients. One outlier of any size therefore moves later updates by at most
    :math:`\beta_1^k(1-\beta_1)/(\beta_1\sqrt{1-\beta_2})`, and gradients without noise keep their magnitude
    instead of collapsing to their sign. State: ``m``, ``v``, ``u``, each of the parameter's shape.

    No code was released. Where weight decay enters is not stated line by line: the paper's experiments use the
    decoupled form (OpenWebText) and the coupled one (WikiText), and both are offered.

    Args:
        lr: Learning rate :math:`\eta`. The paper's default is not known; 1e-3 is Adam's.
        betas: :math:`(\beta_1, \beta_2)`, decay rates of both momenta and of the variance.
        eps: :math:`\epsilon`, added to the standard deviation, in units of the gradient.
        eps_s: :math:`\epsilon_s`, floor added to the variance *every step* (so about ``eps_s / (1 - betas[1])`` in
            the long run), in squared units of the gradient. The analysis sets it to 0, but with gradients that
            stop varying the variance then vanishes and steps grow up to ``lr * g / eps``.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.MVNGrad([w], lr=0.1)
        >>> w.grad = torch.tensor([0.5, 0.5])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.8889, -2.1111])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_s: Annotated[float, number()] = 1e-12
    weight_decay: float = 0.0
    decay: Decay = "decoupled"
    decoupled: bool | None = None

    buffers = ("m", "v", "u")
    averages = ("m", "u")
    squares = ("v",)
    moments = {"m": ("g", "beta1"), "v": ("(g - m)^2", "beta2")}
    internals = {"gradient_to_variance": gradient_to_variance("v", "variance around the running mean")}

    @staticmethod
    def scalars(t, h):
        return {"step": h.lr / (1 - h.beta1**t), "root_bc2": sqrt(1 - h.beta2**t)}

    @staticmethod
    def update(g, s, k):
        ema_(s.m, g, k.beta1)
        deviation = g - s.m
        ema_product_(s.v, deviation, deviation, k.beta2).add_(k.eps_s)
        add_quotient_(s.u.mul_(k.beta1), g, s.v.sqrt().add_(k.eps * k.root_bc2), (1 - k.beta1) * k.root_bc2)
        return Move(s.u, k.step)
