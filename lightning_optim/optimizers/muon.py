"""Muon: orthogonalised momentum."""

from __future__ import annotations

from math import sqrt
from typing import Literal

from torch import Tensor

from ..engine.arithmetic import ema_, mix
from ..engine.hyperparameters import ORTHOGONALIZER, one_of
from ..engine.optimizer import EngineOptions, Params
from ..engine.rounding import Rounding
from ..engine.rule import Hyperparameters, MatrixRule, Move, Observer, Orthogonalizing, Scalars, Shape, ignore, like
from ..engine.step import Backend
from ..engine.two_rules import Fallback, MatrixOptimizer

_SCALES = ("original", "moonlight")


def _scalars(t: int, hp: Hyperparameters, shape: Shape) -> Scalars:
    if hp["scale"] == "original":
        factor = sqrt(max(1.0, shape[-2] / shape[-1]))
    else:
        factor = 0.2 * sqrt(max(shape[:2]))
    return {
        "mu": hp["momentum"],
        "step": hp["lr"] * factor,
        "keep": 1 - hp["lr"] * hp["weight_decay"],
        "nesterov": hp["nesterov"],
        "method": hp["orthogonalizer"],
    }


def _update(g: Tensor, m: Tensor, *, mu, step, keep, nesterov, method, observe: Observer = ignore) -> Orthogonalizing:
    ema_(m, g, mu)
    n = mix(g, m, mu) if nesterov else m
    o = yield n, method
    return Move(o, step, keep)


MUON = MatrixRule(
    "Muon",
    state=like("m"),
    scalars=_scalars,
    update=_update,
    by_rows=True,
    constraints={"scale": one_of(*_SCALES), **ORTHOGONALIZER},
)


class Muon(MatrixOptimizer):
    r"""Muon (`Keller Jordan, 2024 <https://kellerjordan.github.io/posts/muon/>`_), with a fallback rule.

    .. math::
        M_t = \mu M_{t-1} + (1-\mu) G_t, \quad
        O_t = \mathrm{polar}\bigl((1-\mu) G_t + \mu M_t\bigr), \quad
        W_t = (1-\eta\lambda) W_{t-1} - \eta\, s\, O_t

    with :math:`s = \sqrt{\max(1, m/n)}` of the last two axes of the weight (``scale="original"``) or
    :math:`0.2\sqrt{\max(m, n)}` of its first two (``"moonlight"``, which gives updates the RMS of AdamW's, so that
    its learning rates carry over; `arXiv 2502.16982 <https://arxiv.org/abs/2502.16982>`_). Convolutions are
    matrices (out, in * k * k) and, as in the released code, take the original factor from the kernel's own axes,
    which is 1 for square kernels. State: ``m``, of the parameter's shape.

    Args:
        params: Parameters, named parameters or parameter groups; see :class:`.two_rules.MatrixOptimizer`.
        lr: Learning rate :math:`\eta` (default: Keller Jordan's; Moonlight's is 1e-3).
        momentum: :math:`\mu`.
        nesterov: Orthogonalise the look-ahead :math:`(1-\mu)G_t+\mu M_t` instead of :math:`M_t`.
        weight_decay: Decoupled weight decay :math:`\lambda` (Moonlight: 0.1).
        scale: ``"original"`` or ``"moonlight"``.
        orthogonalizer: A name in :data:`lightning_optim.polar.METHODS`, or ``"exact"``.
        fallback: Rule for everything that is not a hidden matrix; a name in :data:`.two_rules.FALLBACKS`.
        fallback_lr: Its learning rate; this and the next three are the fallback's own defaults if ``None``.
        fallback_betas: Its betas.
        fallback_eps: Its eps.
        fallback_weight_decay: Its weight decay.
        maximize: Ascend instead of descend.
        skip_nonfinite: Skip and count steps whose gradients hold NaN or infinity.
        max_consecutive_skips: Steps skipped in a row after which ``step`` raises an error, or ``None``.
        backend: How the step is run; see :class:`.optimizer.RuleOptimizer`.
        rounding: How results are stored in bfloat16 and float16 parameters; see :class:`.optimizer.RuleOptimizer`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter does not fit its role.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = lightning_optim.Muon([{"params": [w], "role": "matrix"}], lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.1000,  0.0000],
                [ 0.0000,  0.1000]])
    """

    rules = (MUON,)

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: Literal["original", "moonlight"] = "original",
        orthogonalizer: str = "kj5",
        fallback: str = "AdamW",
        fallback_lr: float | None = None,
        fallback_betas: tuple[float, float] | None = None,
        fallback_eps: float | None = None,
        fallback_weight_decay: float | None = None,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        max_consecutive_skips: int | None = 100,
        backend: Backend = "auto",
        rounding: Rounding = "nearest",
    ) -> None:
        hyperparameters = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "scale": scale,
            "orthogonalizer": orthogonalizer,
        }  # fmt: skip
        others = Fallback(fallback, fallback_lr, fallback_betas, fallback_eps, fallback_weight_decay)
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, others, options)
