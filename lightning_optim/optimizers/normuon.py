"""NorMuon: orthogonalised momentum with normalised rows."""

from __future__ import annotations

from math import prod, sqrt
from typing import Literal

from torch import Tensor

from ..engine.arithmetic import ema_, mix, squared_norm
from ..engine.hyperparameters import ORTHOGONALIZER, fraction, one_of
from ..engine.optimizer import EngineOptions, Params
from ..engine.rounding import Rounding
from ..engine.rule import (
    LIKE_PARAMETER,
    Hyperparameters,
    MatrixRule,
    Move,
    Observer,
    Orthogonalizing,
    Scalars,
    Shape,
    ignore,
)
from ..engine.step import Backend
from ..engine.two_rules import Fallback, MatrixOptimizer

_SCALES = ("original", "rms")
_EPS = 1e-10  # As released.


def _scalars(t: int, hp: Hyperparameters, shape: Shape) -> Scalars:
    original = hp["scale"] == "original"
    factor = sqrt(max(1.0, shape[-2] / shape[-1])) if original else 0.2 * sqrt(prod(shape))
    return {
        "mu": hp["momentum"],
        "beta2": hp["beta2"],
        "norm": hp["lr"] * factor,
        "keep": 1 - hp["lr"] * hp["weight_decay"],
        "nesterov": hp["nesterov"],
        "keeps_norm": original,
        "method": hp["orthogonalizer"],
    }


def _update(
    g: Tensor, m: Tensor, v: Tensor, *, mu, beta2, norm, keep, nesterov, keeps_norm, method, observe: Observer = ignore
) -> Orthogonalizing:
    ema_(m, g, mu)
    n = mix(g, m, mu) if nesterov else m
    o = yield n, method
    rows = squared_norm(o, axes=(-1,))
    ema_(v, rows / o.shape[-1], beta2)
    divisor = v.sqrt().add_(_EPS)
    if keeps_norm:
        norm = norm * rows.sum(-2, keepdim=True).sqrt_()
    normalised = (rows / divisor.square()).sum(-2, keepdim=True).sqrt_()
    return Move(o, norm / normalised.add_(_EPS) / divisor, keep)


NORMUON = MatrixRule(
    "NorMuon",
    state=lambda shape, hp: {"m": LIKE_PARAMETER, "v": (shape[0], 1)},
    scalars=_scalars,
    update=_update,
    constraints={"beta2": fraction(), "scale": one_of(*_SCALES), **ORTHOGONALIZER},
)


class NorMuon(MatrixOptimizer):
    r"""NorMuon, Muon with neuron-wise normalisation (`arXiv 2510.05491 <https://arxiv.org/abs/2510.05491>`_).

    With :math:`\overline{O^2}` the mean squares of the rows (output features of a linear layer):

    .. math::
        M_t &= \mu M_{t-1} + (1-\mu) G_t, \quad
        O_t = \mathrm{polar}\bigl((1-\mu) G_t + \mu M_t\bigr), \quad
        v_t = \beta_2 v_{t-1} + (1-\beta_2)\,\overline{O_t^2} \\
        \hat O_t &= \mathrm{diag}(\sqrt{v_t} + 10^{-10})^{-1}\, O_t, \qquad
        W_t = (1-\eta\lambda) W_{t-1} - \eta\, s_t\, \hat O_t

    with :math:`s_t = \sqrt{\max(1, m/n)}\,\|O_t\|_F / \|\hat O_t\|_F`, which gives the update the norm of
    :class:`Muon`'s (``scale="original"``, as in the released code), or :math:`0.2\sqrt{mn}/\|\hat O_t\|_F`, which gives
    it the RMS of AdamW's (``"rms"``). **The paper's algorithm** is ``nesterov=False, scale="rms"``. There is no bias
    correction, as :math:`s_t` cancels it.

    Convolutions are matrices (out, in * k * k), with one :math:`v` per output channel (the released code has one for
    each row of each kernel) and the original factor from the kernel's own axes, as in :class:`Muon`. State: ``m`` of
    the parameter's shape, ``v`` one number per row.

    Args:
        params: Parameters, named parameters or parameter groups; see :class:`.two_rules.MatrixOptimizer`.
        lr: Learning rate :math:`\eta`.
        momentum: :math:`\mu`.
        beta2: :math:`\beta_2`.
        nesterov: Orthogonalise the look-ahead :math:`(1-\mu)G_t+\mu M_t` instead of :math:`M_t`.
        weight_decay: Decoupled weight decay :math:`\lambda`.
        scale: ``"original"`` or ``"rms"``.
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
        >>> optimizer = lightning_optim.NorMuon([{"params": [w], "role": "matrix"}], lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.1000,  0.0000],
                [ 0.0000,  0.1000]])
    """

    rules = (NORMUON,)

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: Literal["original", "rms"] = "original",
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
            "lr": lr, "momentum": momentum, "beta2": beta2, "nesterov": nesterov, "weight_decay": weight_decay,
            "scale": scale, "orthogonalizer": orthogonalizer,
        }  # fmt: skip
        others = Fallback(fallback, fallback_lr, fallback_betas, fallback_eps, fallback_weight_decay)
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, others, options)
