"""LaProp: momentum of normalised gradients."""

from math import sqrt

from ..engine.arithmetic import add_quotient_, ema_, ema_product_
from ..engine.decay import Decay, keep
from ..engine.kinds import Elementwise, Move
from ..engine.rule import gradient_to_variance

_STEPS_BEFORE_CENTERING = 10


class LaProp(
    Elementwise, paper="arXiv 2002.04839", idea="normalise, then average", about="momentum of normalised gradients"
):
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
        lr: Learning rate :math:`\eta` (default as released).
        eps: Added to the root of the second moment, in units of the gradient.
        weight_decay: The fraction :math:`\lambda` of every parameter that is lost per step, where decay is
            ``"independent"``, as released.
        centered: From step 11 on subtract the squared running mean of the gradient (decay :math:`\beta_2`) from
            its second moment, which leaves its variance.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.LaProp([w], lr=0.1)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000])
    """

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    weight_decay: float = 0.0
    decay: Decay = "independent"
    centered: bool = False

    host_state = ("lr_average", "weight_sum")
    internals = {"gradient_to_variance": gradient_to_variance()}
    averages = ("m",)
    moments = {"v": ("g^2", "beta2")}

    @staticmethod
    def squares(h):
        return () if h.centered else ("v",)  # Centered, it is compared with the squared mean, which is nearly equal.

    @staticmethod
    def buffers(shape, h):
        return ("m", "v", "mean") if h.centered else ("m", "v")

    @staticmethod
    def scalars(t, h, host):
        # Running averages of lr and of 1, so that the corrections stay right when lr or the betas change.
        host["lr_average"] = h.beta1 * host["lr_average"] + (1 - h.beta1) * h.lr
        host["weight_sum"] = h.beta2 * host["weight_sum"] + (1 - h.beta2)
        correction = h.lr / host["lr_average"] if host["lr_average"] else 0.0
        return {
            "step": keep(h) * correction,  # Decay comes after the step.
            "root_bc2": sqrt(host["weight_sum"]),
            "center": h.centered and t > _STEPS_BEFORE_CENTERING,
        }

    @staticmethod
    def update(g, s, k):
        ema_product_(s.v, g, g, k.beta2)
        second = s.v
        if k.centered:
            ema_(s.mean, g, k.beta2)
        if k.center:
            second = (s.v - s.mean * s.mean).clamp_(min=0)  # Rounding can make it negative.
        root = second.sqrt().add_(k.eps * k.root_bc2)
        add_quotient_(s.m.mul_(k.beta1), g, root, (1 - k.beta1) * k.lr * k.root_bc2)
        return Move(s.m, k.step)
