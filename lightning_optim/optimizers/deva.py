"""DeVA, the spectral (S-infinity) form: decoupled variance adaptation of orthogonalised momentum."""

from __future__ import annotations

from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from ..eigenbasis import BASIS_ERROR, Eigenbasis, axis_state, permute_, phases, refreshes
from ..engine.arithmetic import ema_, mix, squared_norm
from ..engine.hyperparameters import EIGENBASIS, ORTHOGONALIZER, one_of
from ..engine.optimizer import EngineOptions, Params
from ..engine.rounding import Rounding
from ..engine.rule import (
    LIKE_PARAMETER,
    Hyperparameters,
    Internal,
    MatrixRule,
    Move,
    Observer,
    Orthogonalizing,
    Scalars,
    Shape,
    ignore,
    mean_of,
)
from ..engine.step import Backend
from ..engine.two_rules import Fallback, MatrixOptimizer

_FORMS = ("momentum", "sign", "instantaneous", "efficient")


def _axes(shape: Shape, hp: Hyperparameters) -> tuple[int, ...]:
    return tuple(i for i in (0, 1) if _matrix(shape)[i] <= hp["max_precondition_dim"])


def _matrix(shape: Shape) -> Shape:
    columns = 1
    for size in shape[1:]:
        columns *= size
    return (shape[0], columns)


def _state(shape: Shape, hp: Hyperparameters) -> dict[str, Shape | None]:
    rows, columns = _matrix(shape)
    variance: dict[str, Shape | None] = {"v": LIKE_PARAMETER}
    if hp["form"] == "efficient":
        variance = {"row_v": (rows, 1), "column_v": (1, columns)}
    return {"m": LIKE_PARAMETER, **variance, **axis_state((rows, columns), _axes(shape, hp))}


def _scalars(t: int, hp: Hyperparameters, shape: Shape, phase: int) -> Scalars:
    b1, b2 = hp["betas"]
    n = t - 1  # The first call only starts the bases.
    correction = sqrt(1 - b2**n) / (1 - b1**n) if hp["correct_bias"] and n else 1.0
    keep = 1 - hp["lr"] * hp["weight_decay"]
    step = keep * hp["lr"] * correction * 0.2 * sqrt(max(_matrix(shape)))  # Decay comes after the step.
    return {
        "b1": b1,
        "b2": b2,
        "shampoo_beta": b2 if hp["shampoo_beta"] is None else hp["shampoo_beta"],
        "step": step if n else 0.0,
        "keep": keep if n else 1.0,
        "eps": hp["eps"],
        "start": n == 0,
        "refresh": refreshes(n, phase, hp),
        "axes": _axes(shape, hp),
        "form": hp["form"],
        "nesterov": hp["nesterov"],
        "method": hp["orthogonalizer"],
    }


def _update(
    g: Tensor, m: Tensor, v: Any = None, row_v: Any = None, column_v: Any = None, *,
    b1, b2, shampoo_beta, step, eps, keep, start, refresh, axes, form, nesterov, method,
    observe: Observer = ignore, **bases: Tensor,
) -> Orthogonalizing:  # fmt: skip
    basis = Eigenbasis(axes, bases)
    if start:
        basis.accumulate(g, shampoo_beta)
        basis.start()
        basis.report(observe)
        return Move(torch.zeros_like(g), step, keep)
    rotated = basis.rotate(g)
    ema_(m, rotated, b1)
    if form == "efficient":
        ema_(row_v, squared_norm(rotated, (-1,)), b2)
        ema_(column_v, squared_norm(rotated, (-2,)), b2)
        rows = (squared_norm(m, (-1,)) / (row_v + eps)).pow_(0.25)
        gamma = rows * (squared_norm(m, (-2,)) / (column_v + eps)).pow_(0.25)
    else:
        measured = rotated if form == "instantaneous" else m
        norms = squared_norm(measured, (-1,)).sqrt_() * squared_norm(measured, (-2,)).sqrt_()
        ema_(v, norms, b2)
        gamma = (norms / (v + eps)).sqrt_()
    n = mix(rotated, m, b1) if nesterov else m
    if form in ("sign", "efficient"):
        n = n.sign()
    o = yield n, method
    observe("variance_adaptation", gamma)
    direction = basis.rotate_back(gamma * o)
    basis.accumulate(g, shampoo_beta)
    if refresh:
        raw = basis.rotate_back(m)
        statistics = (row_v, column_v) if form == "efficient" else (v, v)
        basis.refresh(lambda axis, order: permute_(statistics[axis], axis, order))
        m.copy_(basis.rotate(raw))
    basis.report(observe)
    return Move(direction, step, keep)


def _spread_sums(gamma: Tensor) -> tuple[Tensor, ...]:
    return gamma.sum(), gamma.square().sum(), gamma.new_tensor(float(gamma.numel()))


def _spread(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    return (squares / count - (total / count) ** 2).clamp(min=0).sqrt() / (total / count)


DEVA_RULE = MatrixRule(
    "DeVA",
    state=_state,
    scalars=_scalars,
    update=_update,
    constraints={"form": one_of(*_FORMS), **EIGENBASIS, **ORTHOGONALIZER},
    phases=phases,
    capturable=False,
    internals={
        "variance_adaptation": mean_of("variance_adaptation", "mean of the variance adaptation Gamma"),
        "variance_adaptation_spread": Internal(
            "standard deviation of Gamma over its mean", _spread_sums, "variance_adaptation", _spread
        ),
        "basis_error": BASIS_ERROR,
    },
)


class DeVA(MatrixOptimizer):
    r"""DeVA in the spectral :math:`S_\infty` geometry (`arXiv 2602.06880 <https://arxiv.org/abs/2602.06880>`_).

    In the eigenbasis of Shampoo's preconditioner, kept as in :class:`SOAP`:

    .. math::
        G' &= Q_L^\top G Q_R, \qquad M = \beta_1 M + (1-\beta_1) G' \\
        r_i &= \|M_{i,:}\|_2, \quad c_j = \|M_{:,j}\|_2, \quad V_{ij} = \beta_2 V_{ij} + (1-\beta_2)\, r_i c_j \\
        O &= \mathrm{polar}\bigl((1-\beta_1)G' + \beta_1 M\bigr), \qquad
        \Gamma_{ij} = \sqrt{r_i c_j/(V_{ij}+\epsilon)} \\
        W &\leftarrow (1-\eta\lambda)\Bigl(W - \eta\tfrac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
             0.2\sqrt{\max(m,n)}\; Q_L (O\circ\Gamma) Q_R^\top\Bigr)

    Four forms, as released: ``"momentum"`` is the above; ``"sign"`` orthogonalises the sign of the momentum (more
    stable); ``"instantaneous"`` takes :math:`r, c` from :math:`G'`; ``"efficient"`` keeps only averages of the squared
    row and column norms of :math:`G'` in the place of :math:`V`, with
    :math:`\Gamma_{ij} = (r_i^2/(s_i+\epsilon))^{1/4}(c_j^2/(s'_j+\epsilon))^{1/4}`, and orthogonalises the sign. (As
    released that class calls a function it does not define; its evident meaning is used. The paper's Algorithm 2
    leaves out the rotation back, the code has it.) The very first call only starts the bases and moves nothing.
    Convolutions, which the released code does not take, are matrices (out, in * k * k). State: ``m`` and ``v`` of
    the parameter's shape (``"efficient"``: ``row_v`` and ``column_v`` in place of ``v``), and two d x d matrices per
    preconditioned axis.

    Args:
        params: Parameters, named parameters or parameter groups; see :class:`.two_rules.MatrixOptimizer`.
        lr: Learning rate :math:`\eta`.
        betas: :math:`(\beta_1, \beta_2)`.
        shampoo_beta: Decay of the averages of outer products, or ``None`` for :math:`\beta_2`.
        eps: :math:`\epsilon`, in squared units of the gradient's norm.
        weight_decay: Decoupled weight decay :math:`\lambda`, after the step.
        precondition_frequency: Steps between refreshes of the bases.
        stagger: Spread the refreshes of different parameters evenly over these steps, so that none takes longer than
            the others; ``False`` makes them all in one step, as the released code does. Which step is a parameter's
            follows from its position in its group.
        max_precondition_dim: Axes longer than this are not rotated.
        correct_bias: Correct the bias of the moments.
        nesterov: Orthogonalise the look-ahead momentum.
        form: ``"momentum"``, ``"sign"``, ``"instantaneous"`` or ``"efficient"``.
        orthogonalizer: A name in :data:`lightning_optim.polar.METHODS`, or ``"exact"``. The default is the released
            code's own.
        fallback: Rule for everything that is not a hidden matrix; a name in :data:`.two_rules.FALLBACKS`. The vector
            form of the same method by default.
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
        >>> optimizer = lightning_optim.DeVA(groups, lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -3.0]])
        >>> optimizer.step()  # starts the bases
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.5651,  0.0000],
                [ 0.0000,  0.5651]])
    """

    rules = (DEVA_RULE,)

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
        correct_bias: bool = True,
        nesterov: bool = True,
        form: Literal["momentum", "sign", "instantaneous", "efficient"] = "momentum",
        orthogonalizer: str = "kj5-schatten",
        fallback: str = "DeVAVector",
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
            "max_precondition_dim": max_precondition_dim, "correct_bias": correct_bias, "nesterov": nesterov,
            "form": form, "orthogonalizer": orthogonalizer,
        }  # fmt: skip
        others = Fallback(fallback, fallback_lr, fallback_betas, fallback_eps, fallback_weight_decay)
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, others, options)
