"""AdamW as a fallback rule; on its own, :class:`torch.optim.AdamW` is used."""

from __future__ import annotations

from math import sqrt

from torch import Tensor

from ..engine.arithmetic import add_quotient_, ema_, ema_product_, shrink_
from ..engine.rule import ElementwiseRule, Hyperparameters, Scalars, gradient_to_variance, like


def _scalars(t: int, hp: Hyperparameters) -> Scalars:
    b1, b2 = hp["betas"]
    return {
        "b1": b1,
        "b2": b2,
        "step_size": hp["lr"] / (1 - b1**t),
        "root_bc2": sqrt(1 - b2**t),
        "eps": hp["eps"],
        "keep": 1 - hp["lr"] * hp["weight_decay"],
    }


def _update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, b1, b2, step_size, root_bc2, eps, keep) -> None:
    shrink_(p, keep)
    ema_(m, g, b1)
    ema_product_(v, g, g, b2)
    add_quotient_(p, m, v.sqrt().add_(eps * root_bc2), -step_size * root_bc2)


#: ``theta <- (1 - lr * wd) * theta - lr * m_hat / (sqrt(v_hat) + eps)``, with torch's defaults.
ADAMW = ElementwiseRule(
    "AdamW",
    state=like("m", "v"),
    scalars=_scalars,
    update=_update,
    internals={"gradient_to_variance": gradient_to_variance()},
)
ADAMW_DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
