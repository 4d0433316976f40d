"""AdaMuon: orthogonalised signs of momentum, normalised element by element."""

from __future__ import annotations

from math import prod, sqrt

from torch import Tensor

from ..engine.arithmetic import ema_, ema_product_, mix, squared_norm
from ..engine.hyperparameters import ORTHOGONALIZER
from ..engine.optimizer import EngineOptions, Params
from ..engine.rounding import Rounding
from ..engine.rule import Hyperparameters, MatrixRule, Move, Observer, Orthogonalizing, Scalars, Shape, ignore, like
from ..engine.step import Backend
from ..engine.two_rules import Fallback, MatrixOptimizer


def _scalars(t: int, hp: Hyperparameters, shape: Shape) -> Scalars:
    return {
        "mu": hp["momentum"],
        "norm": hp["lr"] * 0.2 * sqrt(prod(shape)),
        "eps": hp["eps"],
        "keep": 1 - hp["lr"] * hp["weight_decay"],
        "nesterov": hp["nesterov"],
        "method": hp["orthogonalizer"],
    }


def _update(
    g: Tensor, m: Tensor, v: Tensor, *, mu, norm, eps, keep, nesterov, method, observe: Observer = ignore
) -> Orthogonalizing:
    ema_(m, g, mu)
    n = mix(g, m, mu) if nesterov else m
    o = yield n.sign(), method
    ema_product_(v, o, o, mu)
    direction = o / v.sqrt().add_(eps)
    return Move(direction, norm / squared_norm(direction).sqrt_().add_(eps), keep)


ADAMUON = MatrixRule("AdaMuon", state=like("m", "v"), scalars=_scalars, update=_update, constraints=ORTHOGONALIZER)


class AdaMuon(MatrixOptimizer):
    r"""AdaMuon, Muon with element-wise second moments (`arXiv 2507.11005 <https://arxiv.org/abs/2507.11005>`_).

    .. math::
        M_t &= \mu M_{t-1} + (1-\mu) G_t, \quad
        O_t = \mathrm{polar}\bigl(\mathrm{sign}((1-\mu) G_t + \mu M_t)\bigr), \quad
        V_t = \mu V_{t-1} + (1-\mu)\,O_t^2 \\
        \hat O_t &= \frac{O_t}{\sqrt{V_t} + \epsilon}, \qquad
        W_t = (1-\eta\lambda) W_{t-1} - \eta\,\frac{0.2\sqrt{mn}}{\|\hat O_t\|_F + \epsilon}\,\hat O_t

    for an (m, n) matrix; convolutions are matrices (out, in * k * k). Every update has an RMS of :math:`0.2\,\eta`,
    about that of AdamW's, so that its learning rates carry over; there is no bias correction, as the norm cancels it.
    This is the released code; **the paper's algorithm** is ``nesterov=False`` (its momentum is a sum of gradients,
    :math:`M_t = \mu M_{t-1} + G_t`, of which the sign is the same). State: ``m`` and ``v``, of the parameter's shape.

    Args:
        params: Parameters, named parameters or parameter groups; see :class:`.two_rules.MatrixOptimizer`.
        lr: Learning rate :math:`\eta`. As released; for GPT-2 the authors take 6e-4 and 1e-3.
        momentum: :math:`\mu`, of both averages.
        eps: :math:`\epsilon`.
        nesterov: Take the sign of the look-ahead :math:`(1-\mu)G_t+\mu M_t` instead of that of :math:`M_t`.
        weight_decay: Decoupled weight decay :math:`\lambda`. As released; 0.1 for GPT-2.
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
        >>> optimizer = lightning_optim.AdaMuon([{"params": [w], "role": "matrix"}], lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 1.0], [1.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.0200, -0.0200],
                [-0.0200,  0.0200]])
    """

    rules = (ADAMUON,)

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        momentum: float = 0.95,
        eps: float = 1e-8,
        nesterov: bool = True,
        weight_decay: float = 0.01,
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
            "lr": lr, "momentum": momentum, "eps": eps, "nesterov": nesterov, "weight_decay": weight_decay,
            "orthogonalizer": orthogonalizer,
        }  # fmt: skip
        others = Fallback(fallback, fallback_lr, fallback_betas, fallback_eps, fallback_weight_decay)
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, others, options)
