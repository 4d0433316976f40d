"""ELRA: one learning rate for the whole model that makes successive gradients orthogonal."""

from math import inf
from typing import Literal

import torch

from ..devices import widest
from ..engine.arithmetic import add_
from ..engine.kinds import Model, Move
from ..engine.rule import LIKE_PARAMETER, Internal
from ..engine.switches import NotCautious, Uncontrolled

_GUESS = 2.35  # About ln 10, the loss of a guess among ten classes.
_SLOWEST, _FASTEST = 1e-3, 1e11  # Bounds of the factor: 1e-8 and 1e6 at the default learning rate.
_GROWTH = 855_000.0  # Larger numbers allow less growth of the rate.
_PATIENCE = 500_000.0


def _one(name):
    return lambda g, s, t, h: (getattr(s, name), torch.ones_like(getattr(s, name)))


def _fraction(x, y):
    """``x / y``, and zero where that is not defined."""
    return torch.where(y == 0, 0.0, x / y)


def _c2min(products, s, k):
    """Whether the loss is accepted, the factor of the learning rate, and what else changes."""
    gg, gy, yy = products
    accepted = k.loss < 25 * s.best
    cosine = _fraction(gy, gg.sqrt() * yy.sqrt())
    longer = s.factor * (1 + 0.5 * cosine + 0.1 * cosine.clamp(min=0))
    smooth = 0.9 * s.smooth + 0.1 * (k.loss if k.loss < inf else 0.0)
    deviation = s.first / _GUESS * 1.5 * _fraction(k.loss - smooth, smooth).abs()
    noise = (0.9 * s.noise + 0.1 * deviation.clamp(max=1.06)).clamp(0.065, 1.06)
    changes = {
        "smooth": torch.where(accepted, smooth, s.smooth),
        "noise": torch.where(accepted, noise, s.noise),
        "mix": torch.where(accepted, 0.85 - 0.8 * noise, s.mix),
    }
    return accepted, torch.where(accepted, longer, s.factor / 3), changes


def _p2min(products, s, k):
    """Whether the loss is accepted, the factor of the learning rate, and what else changes."""
    _, gy, yy = products
    bound = s.best * (25 + (2500 + 71 * s.best.sqrt()) / (1 + s.patience.sqrt()))
    accepted = (k.loss < 1.1 * s.first) & (k.loss < 1.1 * bound)
    growth = s.growth / 3.9
    most = 1e6 / (1 + growth)
    bend = 1 - _fraction(gy, yy)  # Slope of the gradient along the last step: at 0 the parabola has no minimum.
    shortening = 1 - 0.14 * (_fraction(_GUESS, s.first) ** 2 * s.best).pow(0.8).clamp(0, 0.7)
    longer = s.factor * torch.where(most * bend < 1, most, 1 / (shortening * bend))
    descent = s.factor * yy  # Of the loss along the last step, if it were a straight line.
    shorter = s.factor * 0.5 * _fraction(descent, k.loss - s.last + descent)
    raised, rising = s.growth, accepted & (k.loss > s.last)
    slower = torch.where(raised <= 1, raised + 16, torch.where(raised < 62_500, 16 * raised, _GROWTH))
    lost = torch.where(s.patience < 1, s.patience + 16, torch.where(s.patience < 5e5, 16 * s.patience, _PATIENCE))
    changes = {
        "growth": torch.where(accepted, growth, slower),
        "patience": torch.where(rising, lost, s.patience / 1.69),
        "last": torch.where(accepted, k.loss, s.last),
    }
    return accepted, torch.where(accepted, longer, shorter).clamp(min=_SLOWEST), changes


class ELRA(
    Model,
    paper="arXiv 2309.06274",
    idea="step-size-free",
    about="one learning rate for the model, by orthogonal gradients",
):
    r"""ELRA, a learning rate that makes successive gradients orthogonal (`arXiv 2309.06274`_).

    Gradient descent with one learning rate :math:`\alpha_t` for **the whole model**, which every step adapts to the
    angle between its gradient :math:`g_t` and the one before. Norms and products are over all parameters, so a rotation
    of the parameters changes nothing. A step that has raised the loss too far is taken back and made shorter. Follows
    the released code of January 2024, the last that holds both forms; the papers' equations could not be compared.

    ``form="p2min"`` takes the minimum of the parabola through both slopes (:math:`y` is the last accepted gradient):

    .. math::
        h_t = 1 - \frac{\langle g_t, y\rangle}{\|y\|^2}, \qquad
        \alpha_t = \begin{cases} r_t\, \alpha_{t-1} & r_t h_t < 1 \\
                   \alpha_{t-1} / (c_t h_t) & \text{else}\end{cases},
        \qquad \theta_t = \theta_{t-1} - \alpha_t g_t

    with a growth of at most :math:`r_t = 10^6 / (1 + G_t)`, where :math:`G` starts at 855000 and is divided by 3.9 at
    each accepted step (so :math:`r = 4.6, 18, 69, \dots`), and
    :math:`c_t = 1 - 0.14 \min(0.7, ((2.35/f_1)^2 f_\text{best})^{0.8})`. Without :math:`c`, which is near 1 where the
    loss is small, the last step would have ended where the slope along it vanishes: on a quadratic successive gradients
    become orthogonal. The loss :math:`f_t` is accepted below :math:`1.1 f_1` and below
    :math:`1.1 f_\text{best} (25 + (2500 + 71 \sqrt{f_\text{best}}) / (1 + \sqrt{E}))`; :math:`E` falls by 1.69 per step
    and grows when an accepted loss is above the one before. Otherwise the last step is taken back and made again with
    :math:`\alpha \leftarrow \alpha \cdot \tfrac12 \alpha\|y\|^2 / (f_t - f_{t-1} + \alpha\|y\|^2)`, and :math:`G`
    grows.

    ``form="c2min"`` goes by the cosine :math:`c` of :math:`g_t` and :math:`y`, and averages gradients:

    .. math::
        m = 0.8\, m + 0.2\, y, \qquad \alpha_t = \alpha_{t-1} (1 + 0.6\, c) \text{ if } c > 0, \text{ else }
        \alpha_{t-1} (1 + 0.5\, c), \qquad
        \theta_t = \theta_{t-1} - \alpha_t ((1-b) g_t + b\, m)

    where :math:`b` falls from 0.8 to 0 with the noise of the loss. A loss above :math:`25 f_\text{best}` takes the last
    step back and makes a third of it.

    After each step :math:`f_\text{best}` is the loss, if that is lower, or grows by a tenth.

    What it needs, and does:

    - **The loss of every step**, not negative. ``step(closure)`` has it from the closure, as in Lightning's automatic
      optimization; in manual optimization say ``step(lambda: loss)``. With accumulated gradients it is the loss of the
      last batch. ``step()`` alone is refused; so Lightning's ``16-mixed`` cannot be used. ``step`` waits for the loss,
      which is a number on the host.
    - **Several processes** (DDP, FSDP2, hybrid sharding) use the mean of their losses, and take the same steps. Without
      :func:`lightning_optim.build_optimizer` set ``process_group``.
    - **BatchNorm**: the running statistics of the model, which a forward pass at rejected parameters has changed, are
      taken back with the step. :func:`lightning_optim.build_optimizer` sets ``statistics``; without it they stay.
    - **A loss that is not finite** takes the last step back. Gradients that are not finite while the loss is are a step
      that is skipped, as in every optimizer here.
    - A parameter without a gradient at a step is left alone by it, also by its being taken back.

    The release's averaging of gradients over micro-batches is Lightning's ``accumulate_grad_batches``. There is no
    weight decay; a later version of the release has one, off by default. Use ELRA where no learning rate is known and
    batches are large enough for their loss to mean something. The authors train MNIST, CIFAR-10 (ResNet-18, ResNet-34,
    WideResNet-28-10), CIFAR-100 (ResNet-18), TinyImageNet and ImageNet (ResNet-50) at batches of 8 to 256 without a
    schedule; their tables are not known here. State: ``y``, and for ``c2min`` ``m``, of the parameter's shape, and a
    few numbers of the model.

    .. _arXiv 2309.06274: https://arxiv.org/abs/2309.06274

    Args:
        lr: Learning rate of the first step, and the unit of :math:`\alpha`: a schedule multiplies it, parameter groups
            may have different ones, and then inner products are weighted by them. 1e-5 as released; the method does the
            rest.
        form: ``"p2min"``, the form that the authors went on with, or ``"c2min"``.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
        >>> optimizer = lightning_optim.ELRA([w])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square() @ torch.tensor([1.0, 10.0])
        ...     loss.backward()
        ...     return loss
        >>> losses = [optimizer.step(closure).item() for _ in range(40)]
        >>> losses[0], losses[-1] < 0.01
        (19.0, True)
    """

    lr: float = 1e-5
    form: Literal["p2min", "c2min"] = "p2min"
    cautious: NotCautious = False
    norm_control: Uncontrolled = "none"

    group_state = {
        "fresh": 1.0, "taken_back": 0.0, "factor": 1.0, "first": 0.0, "best": 0.0, "smooth": 0.0, "noise": 0.0,
        "mix": 0.0, "last": 0.0, "growth": _GROWTH, "patience": _PATIENCE, "retraces": 0.0,
    }  # fmt: skip
    host_state = ("last_lr",)
    capturable = False
    internals = {
        "rate": Internal("learning rate of the model, in units of lr", _one("factor")),
        "retraces": Internal("steps taken back so far", _one("retraces")),
    }

    @staticmethod
    def buffers(shape, h):
        return {"y": LIKE_PARAMETER, **({"m": LIKE_PARAMETER} if h.form == "c2min" else {})}

    @staticmethod
    def scalars(t, h, host):
        before, host["last_lr"] = host["last_lr"], h.lr
        return {"lr_before": before}

    @staticmethod
    def sums(g, s, k):
        g, y = (x.to(widest(x.device)).flatten() for x in (g, s.y))
        return k.lr * g.dot(g), k.lr * g.dot(y), k.lr * y.dot(y)

    @staticmethod
    def combine(sums, s, k):
        fresh = s.fresh > 0
        accepted, factor, changes = (_c2min if k.form == "c2min" else _p2min)(sums, s, k)
        accepted = accepted | fresh
        loss = torch.full_like(s.best, k.loss)
        first = {"factor": s.factor, "first": loss, "best": loss, "smooth": loss, "last": loss}
        later = {
            "factor": factor.clamp(max=_FASTEST),
            "first": s.first,
            "best": torch.where(loss < s.best, loss, 1.1 * s.best),
            "smooth": s.smooth,
            "last": s.last,
        } | changes
        state = {name: torch.where(fresh, first.get(name, getattr(s, name)), x) for name, x in later.items()}
        back = (~accepted).to(s.factor.dtype)
        averages = accepted & ~fresh
        coefficients = {
            "factor_now": state["factor"],
            "undone": back * s.factor,
            "kept": back,
            "mix_now": state.get("mix", s.mix),
            "m_kept": 0.8 * averages.to(back.dtype) + back,
            "m_last": 0.2 * averages.to(back.dtype),
            "m_new": fresh.to(back.dtype),
        }
        count = {"taken_back": back, "retraces": s.retraces + back, "fresh": torch.zeros_like(s.fresh)}
        return state | count, coefficients

    @staticmethod
    def update(g, s, k):
        if k.form == "c2min":
            add_(add_(s.m.mul_(k.m_kept), s.y, k.m_last), g, k.m_new)
        add_(s.y.mul_(k.kept), g, 1 - k.kept)
        direction = s.y
        if k.form == "c2min":
            direction = add_(s.y * (1 - k.mix_now), s.m, k.mix_now)
        # A step that is taken back and made again with another rate is one by the difference of the rates.
        return Move(direction, k.lr * k.factor_now - k.lr_before * k.undone)
