"""MAdam and LaMAdam: the second moment is averaged so that the variance that it sees is largest (MaxVA)."""

from typing import Annotated

import torch

from ..engine.arithmetic import add_quotient_, ema_
from ..engine.decay import Decay
from ..engine.hyperparameters import fraction
from ..engine.kinds import Elementwise, Move
from ..engine.rule import Internal

_TINY = 1e-16  # As released, in squared units of the gradient.


def _weights(t, h):
    """The least and the largest weight of a new gradient, 1 - beta: float32 does not tell betas near 1 apart."""
    least = 1 - h.beta2
    return {"least": least, "most": least if t == 1 else max(1 - h.beta_min, least)}


def _root_second_moment(g, s, k):
    """Update the weighted mean and variance of the gradients in place; the root of their second moment."""
    deviation = g - s.mean
    squared = deviation * deviation
    gap = (squared - s.variance).mul_(s.total)
    weight = (gap + _TINY).div_((squared + s.variance).add_(gap).add_(_TINY)).clamp_(k.least, k.most)
    s.total.addcmul_(weight, 1 - s.total)
    share = weight.div_(s.total)  # 1 at the first step.
    s.mean.lerp_(g, share)  # Exact where they are equal, and where the share is 1 after a huge gradient.
    s.variance.addcmul_(share, squared).mul_(1 - share)
    return torch.addcmul(s.variance, s.mean, s.mean).sqrt_()


def _sums(g, s, t, h):
    return g.to(s.mean.dtype).square().sum(), s.variance.sum() + s.mean.square().sum()


_INTERNALS = {
    "gradient_to_variance": Internal("mean squared gradient over the mean second moment (bias-corrected)", _sums)
}


class MAdam(
    Elementwise,
    paper="arXiv 2006.11918",
    idea="adaptive moments",
    about="Adam with a second moment of maximum variance (MaxVA)",
):
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
        lr: Learning rate :math:`\eta` (default as released).
        betas: :math:`(\beta_1, \beta_2)`; the second is the upper end of the range of the decay.
        beta_min: Lower end of the range. Where it is above ``betas[1]``, the decay is ``betas[1]``.
        eps: Added to the root of the second moment, in units of the gradient.
        amsgrad: Divide by the running maximum of the denominator, ``eps`` included (as released).

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.MAdam([w], lr=0.1)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    beta_min: Annotated[float, fraction()] = 0.5
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: Decay = "decoupled"
    decoupled: bool | None = None
    amsgrad: bool = False

    internals = _INTERNALS
    averages = ("m", "mean")
    squares = ("variance", "root_max")
    moments = {"m": ("g", "beta1")}

    @staticmethod
    def buffers(shape, h):
        names = ("m", "mean", "variance", "total")
        return (*names, "root_max") if h.amsgrad else names

    @staticmethod
    def scalars(t, h):
        return {"step": h.lr / (1 - h.beta1**t), **_weights(t, h)}

    @staticmethod
    def update(g, s, k):
        ema_(s.m, g, k.beta1)
        root = _root_second_moment(g, s, k).add_(k.eps)
        if k.amsgrad:
            root = torch.maximum(s.root_max, root, out=s.root_max)
        return Move(s.m, k.step, over=root)


class LaMAdam(
    Elementwise,
    paper="arXiv 2006.11918",
    idea="normalise, then average",
    about="LaProp with a second moment of maximum variance (MaxVA)",
):
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
        lr: Learning rate :math:`\eta` (default as released).
        betas: :math:`(\beta_1, \beta_2)`, in the release ``momentum`` and ``beta``; the second is the upper end of
            the range of the decay.
        beta_min: Lower end of the range. Where it is above ``betas[1]``, the decay is ``betas[1]``.
        eps: Added to the root of the second moment, in units of the gradient.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.LaMAdam([w], lr=0.1)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    beta_min: Annotated[float, fraction()] = 0.5
    eps: float = 1e-15
    weight_decay: float = 0.0
    decay: Decay = "coupled"
    decoupled: bool | None = None

    buffers = ("m", "mean", "variance", "total")
    averages = ("m", "mean")
    squares = ("variance",)
    host_state = ("lr_average",)
    internals = _INTERNALS

    @staticmethod
    def scalars(t, h, host):
        # A running average of lr, so that the correction stays right when lr or the betas change.
        host["lr_average"] = h.beta1 * host["lr_average"] + (1 - h.beta1) * h.lr
        return {"step": h.lr / host["lr_average"] if host["lr_average"] else 0.0, **_weights(t, h)}

    @staticmethod
    def update(g, s, k):
        root = _root_second_moment(g, s, k).add_(k.eps)
        add_quotient_(s.m.mul_(k.beta1), g, root, (1 - k.beta1) * k.lr)
        return Move(s.m, k.step)
