"""Muon-VS and Muon-NSR: orthogonalised momentum, adapted to the variance of the gradients before."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from ..engine.arithmetic import ema_, mix, squared_difference
from ..engine.hyperparameters import ORTHOGONALIZER, number
from ..engine.optimizer import EngineOptions, Params
from ..engine.rounding import Rounding
from ..engine.rule import Hyperparameters, MatrixRule, Move, Observer, Orthogonalizing, Scalars, Shape, ignore, like
from ..engine.step import Backend
from ..engine.two_rules import Fallback, MatrixOptimizer


def _scalars(t: int, hp: Hyperparameters, shape: Shape) -> Scalars:
    mu = hp["momentum"]
    return {
        "mu": mu,
        "correction": 1 / (1 - mu**t),
        "eps": hp["eps"],
        "step": hp["lr"] * 0.2 * sqrt(max(shape[:2])),
        "keep": 1 - hp["lr"] * hp["weight_decay"],
        "method": hp["orthogonalizer"],
    }


def _nsr_scalars(t: int, hp: Hyperparameters, shape: Shape) -> Scalars:
    # In units of (1 - mu) times the published momentum, in which nothing grows beyond the gradients.
    unit = 1 - hp["momentum"]
    return _scalars(t, hp, shape) | {"noise": sqrt(hp["gamma"]) * unit, "eps": hp["eps"] * unit}


def _moments(g: Tensor, m: Tensor, v: Tensor, mu, correction) -> tuple[Tensor, Tensor]:
    """Look-ahead momentum and standard deviation."""
    ema_(v, squared_difference(m, g).mul_(mu), mu)
    ema_(m, g, mu)
    return mix(g, m * correction, mu), v.mul(correction).sqrt_()


def _vs(
    g: Tensor, m: Tensor, v: Tensor, *, mu, correction, eps, step, keep, method, observe: Observer = ignore
) -> Orthogonalizing:
    n, deviation = _moments(g, m, v, mu, correction)
    o = yield n.div_(deviation.add_(eps)), method
    return Move(o, step, keep)


def _nsr(
    g: Tensor, m: Tensor, v: Tensor, *, mu, correction, noise, eps, step, keep, method, observe: Observer = ignore
) -> Orthogonalizing:
    n, deviation = _moments(g, m, v, mu, correction)
    o = yield n.div_(torch.hypot(n, deviation.mul_(noise)).add_(eps)), method
    return Move(o, step, keep)


MUON_VS = MatrixRule(
    "MuonVS", state=like("m", "v"), scalars=_scalars, update=_vs, by_rows=True, constraints=ORTHOGONALIZER
)
MUON_NSR = MatrixRule(
    "MuonNSR",
    state=like("m", "v"),
    scalars=_nsr_scalars,
    update=_nsr,
    by_rows=True,
    constraints={"gamma": number(), **ORTHOGONALIZER},
)


class MuonVS(MatrixOptimizer):
    r"""Muon-VS, variance-scaled Muon (`arXiv 2601.14603 <https://arxiv.org/abs/2601.14603>`_).

    .. math::
        V_t &= \mu V_{t-1} + \mu(1-\mu)(M_{t-1} - G_t)^2, \quad
        M_t = \mu M_{t-1} + (1-\mu) G_t, \quad
        \hat V_t = \tfrac{V_t}{1-\mu^t}, \quad \hat M_t = \tfrac{M_t}{1-\mu^t} \\
        \tilde M_t &= G_t + \tfrac{\mu}{1-\mu}\hat M_t, \quad
        O_t = \mathrm{polar}\Bigl(\frac{\tilde M_t}{\sqrt{\hat V_t} + \epsilon}\Bigr), \quad
        W_t = (1-\eta\lambda) W_{t-1} - 0.2\,\eta\sqrt{\max(m, n)}\;O_t

    with the variance and the division element by element, and m and n the first two axes of the weight. As in
    the released code, :math:`\epsilon` is outside of the root; the paper has it inside. Convolutions are matrices
    (out, in * k * k). State: ``m`` and ``v``, of the parameter's shape.

    Args:
        params: Parameters, named parameters or parameter groups; see :class:`.two_rules.MatrixOptimizer`.
        lr: Learning rate :math:`\eta`. As released; 6e-4 for GPT-2.
        momentum: :math:`\mu`, of both averages.
        eps: :math:`\epsilon`, in units of the gradient.
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
        The first step has no variance to go by but that around zero, which leaves the signs of the gradient.

        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.MuonVS(groups, lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 1.0], [1.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.0200, -0.0200],
                [-0.0200,  0.0200]])
    """

    rules = (MUON_VS,)

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        momentum: float = 0.95,
        eps: float = 1e-8,
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
            "lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay, "orthogonalizer": orthogonalizer,
        }  # fmt: skip
        others = Fallback(fallback, fallback_lr, fallback_betas, fallback_eps, fallback_weight_decay)
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, others, options)


class MuonNSR(MatrixOptimizer):
    r"""Muon-NSR, Muon modulated by the noise-to-signal ratio (`arXiv 2601.14603 <https://arxiv.org/abs/2601.14603>`_).

    :class:`MuonVS` with another divisor, element by element:

    .. math::
        O_t = \mathrm{polar}\Bigl(\frac{\tilde M_t}{\sqrt{\tilde M_t^2 + \gamma \hat V_t} + \epsilon}\Bigr)

    which is between the sign of the momentum (:math:`\gamma = 0`) and, up to scale, what :class:`MuonVS` has. As in the
    released code, :math:`\epsilon` is outside of the root; the paper has it inside. State: ``m`` and ``v``, of the
    parameter's shape.

    Args:
        params: Parameters, named parameters or parameter groups; see :class:`.two_rules.MatrixOptimizer`.
        lr: Learning rate :math:`\eta`. As released; 6e-4 for GPT-2.
        momentum: :math:`\mu`, of both averages.
        eps: :math:`\epsilon`, in units of the gradient.
        gamma: Weight :math:`\gamma` of the variance.
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
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.MuonNSR(groups, lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 1.0], [1.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.0200, -0.0200],
                [-0.0200,  0.0200]])
    """

    rules = (MUON_NSR,)

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        momentum: float = 0.95,
        eps: float = 1e-8,
        gamma: float = 10.0,
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
            "lr": lr, "momentum": momentum, "eps": eps, "gamma": gamma, "weight_decay": weight_decay,
            "orthogonalizer": orthogonalizer,
        }  # fmt: skip
        others = Fallback(fallback, fallback_lr, fallback_betas, fallback_eps, fallback_weight_decay)
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, others, options)
