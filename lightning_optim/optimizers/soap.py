"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from ..eigenbasis import BASIS_ERROR, Eigenbasis, axis_state, permute_, phases, refreshes
from ..engine.arithmetic import ema_, ema_product_
from ..engine.hyperparameters import EIGENBASIS
from ..engine.optimizer import EngineOptions, Params
from ..engine.rounding import Rounding
from ..engine.rule import LIKE_PARAMETER, Hyperparameters, MatrixRule, Move, Observer, Scalars, Shape, ignore
from ..engine.step import Backend
from ..engine.two_rules import Fallback, MatrixOptimizer


def _merged(shape: Shape, longest: int) -> Shape:
    """Merge neighbouring axes while their product stays within ``longest``."""
    merged: list[int] = []
    current = 1
    for size in shape:
        if current * size <= longest:
            current *= size
        elif current > 1:
            merged.append(current)
            current = size
        else:
            merged.append(size)
    if current > 1 or not merged:
        merged.append(current)
    return tuple(merged)


def _layout(shape: Shape, hp: Hyperparameters) -> tuple[Shape, tuple[int, ...]]:
    """The shape a tensor is worked on in, and its preconditioned axes."""
    longest = hp["max_precondition_dim"]
    if len(shape) == 1:
        axes = (0,) if hp["precondition_1d"] and shape[0] <= longest else ()
        return shape, axes
    if hp["merge_dims"]:
        shape = _merged(shape, longest)
    return shape, tuple(i for i, size in enumerate(shape) if size <= longest)


def _state(shape: Shape, hp: Hyperparameters) -> dict[str, Shape | None]:
    return {"m": LIKE_PARAMETER, "v": LIKE_PARAMETER, **axis_state(*_layout(shape, hp))}


def _scalars(t: int, hp: Hyperparameters, shape: Shape, phase: int) -> Scalars:
    b1, b2 = hp["betas"]
    n = t - 1  # The first call only starts the bases.
    correction = sqrt(1 - b2**n) / (1 - b1**n) if hp["correct_bias"] and n else 1.0
    keep = 1 - hp["lr"] * hp["weight_decay"]
    layout, axes = _layout(shape, hp)
    return {
        "b1": b1,
        "b2": b2,
        "shampoo_beta": b2 if hp["shampoo_beta"] is None else hp["shampoo_beta"],
        "step": keep * hp["lr"] * correction if n else 0.0,  # Decay comes after the step.
        "keep": keep if n else 1.0,
        "eps": hp["eps"],
        "start": n == 0,
        "refresh": refreshes(n, phase, hp),
        "layout": layout,
        "axes": axes,
    }


def _update(
    g: Tensor, m: Tensor, v: Tensor, *,
    b1, b2, shampoo_beta, step, eps, keep, start, refresh, layout, axes, observe: Observer = ignore,
    **bases: Tensor,
) -> Move:  # fmt: skip
    basis = Eigenbasis(axes, bases)
    full_shape = g.shape
    g, m, v = (x.view(-1, *layout) if x.is_contiguous() else x.reshape(-1, *layout) for x in (g, m, v))
    if start:
        basis.accumulate(g, shampoo_beta)
        basis.start()
        basis.report(observe)
        return Move(torch.zeros_like(g).view(full_shape), step, keep)
    rotated = basis.rotate(g)
    ema_(m, rotated, b1)
    ema_product_(v, rotated, rotated, b2)
    direction = basis.rotate_back(m / v.sqrt().add_(eps))
    basis.accumulate(g, shampoo_beta)
    if refresh:
        raw = basis.rotate_back(m)
        basis.refresh(lambda axis, order: permute_(v, axis, order))
        m.copy_(basis.rotate(raw))
    basis.report(observe)
    return Move(direction.reshape(full_shape), step, keep)


SOAP_RULE = MatrixRule(
    "SOAP",
    state=_state,
    scalars=_scalars,
    update=_update,
    constraints=EIGENBASIS,
    flatten=False,
    phases=phases,
    capturable=False,
    internals={"basis_error": BASIS_ERROR},
)


class SOAP(MatrixOptimizer):
    r"""SOAP, Adam in Shampoo's eigenbasis (`arXiv 2409.11321 <https://arxiv.org/abs/2409.11321>`_).

    For a weight with gradient :math:`G` (a matrix here; every axis of a convolution kernel has its own basis):

    .. math::
        G' &= Q_L^\top G Q_R, \quad M = \beta_1 M + (1-\beta_1) G', \quad V = \beta_2 V + (1-\beta_2) G'^2 \\
        W &\leftarrow (1-\eta\lambda)\Bigl(W - \eta\tfrac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
             Q_L \frac{M}{\sqrt V + \epsilon} Q_R^\top\Bigr) \\
        L &= \beta_s L + (1-\beta_s) G G^\top, \quad R = \beta_s R + (1-\beta_s) G^\top G

    and every ``precondition_frequency`` steps :math:`Q_L, Q_R` make one step of orthogonal iteration on
    :math:`L, R` (multiply, QR), columns sorted by estimated eigenvalue, :math:`V` permuted with them and :math:`M`
    carried over. As in the released code, the very first call only starts the bases and moves nothing, eps is added
    to the uncorrected root, and weight decay comes after the step. Where the first gradient is rank-deficient the
    released bases depend on the LAPACK build; a tiny ramp makes them unique here. State: ``m``, ``v`` of the
    parameter's shape, and two d x d matrices ``gram``, ``basis`` per preconditioned axis of length d.

    Args:
        params: Parameters, named parameters or parameter groups; see :class:`.two_rules.MatrixOptimizer`.
        lr: Learning rate :math:`\eta`.
        betas: :math:`(\beta_1, \beta_2)`.
        shampoo_beta: :math:`\beta_s`, or ``None`` for :math:`\beta_2`.
        eps: :math:`\epsilon`, in units of the rotated gradient.
        weight_decay: Decoupled weight decay :math:`\lambda`.
        precondition_frequency: Steps between refreshes of the bases.
        stagger: Spread the refreshes of different parameters evenly over these steps, so that none takes longer than
            the others; ``False`` makes them all in one step, as the released code does. Which step is a parameter's
            follows from its position in its group.
        max_precondition_dim: Axes longer than this are left as they are.
        merge_dims: Merge neighbouring axes as long as the product stays within ``max_precondition_dim``.
        precondition_1d: Precondition vectors too; otherwise they get Adam.
        correct_bias: Correct the bias of the moments.
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
        >>> optimizer = lightning_optim.SOAP(groups, lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> optimizer.step()  # starts the bases
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.1000,  0.0000],
                [ 0.0000,  0.1000]])
    """

    rules = (SOAP_RULE,)

    def __init__(
        self,
        params: Params,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        stagger: bool = True,
        max_precondition_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        correct_bias: bool = True,
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
            "lr": lr, "betas": betas, "shampoo_beta": shampoo_beta, "eps": eps, "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency, "stagger": stagger,
            "max_precondition_dim": max_precondition_dim, "merge_dims": merge_dims,
            "precondition_1d": precondition_1d, "correct_bias": correct_bias,
        }  # fmt: skip
        others = Fallback(fallback, fallback_lr, fallback_betas, fallback_eps, fallback_weight_decay)
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, others, options)
