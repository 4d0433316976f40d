"""AdamW as a fallback rule; on its own, :class:`torch.optim.AdamW` is used."""

from math import sqrt

from ..engine.arithmetic import ema_, ema_product_
from ..engine.rule import ElementwiseRule, Move, gradient_to_variance


class AdamWRule(
    ElementwiseRule,
    name="AdamW",
    idea="adaptive moments",
    about="Adam with decoupled weight decay",
    paper="arXiv 1711.05101",
):
    """``theta <- (1 - lr * wd) * theta - lr * m_hat / (sqrt(v_hat) + eps)``, with torch's defaults."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    buffers = ("m", "v")
    averages = ("m",)
    squares = ("v",)
    moments = {"m": ("g", "beta1"), "v": ("g^2", "beta2")}
    internals = {"gradient_to_variance": gradient_to_variance()}

    @staticmethod
    def scalars(t, h):
        root_bc2 = sqrt(1 - h.beta2**t)
        return {"step": h.lr / (1 - h.beta1**t) * root_bc2, "root_bc2": root_bc2}

    @staticmethod
    def update(g, s, k):
        ema_(s.m, g, k.beta1)
        ema_product_(s.v, g, g, k.beta2)
        return Move(s.m, k.step, over=s.v.sqrt().add_(k.eps * k.root_bc2))
