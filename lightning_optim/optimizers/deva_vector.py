"""DeVA, the vector (l-infinity) form."""

from __future__ import annotations

from torch import Tensor

from ..engine.arithmetic import add_, ema_, ema_product_, mix, shrink_
from ..engine.optimizer import EngineOptions, Params, RuleOptimizer
from ..engine.rounding import Rounding
from ..engine.rule import ElementwiseRule, Hyperparameters, Internal, Scalars, like
from ..engine.step import Backend

_FLOOR = 1e-5  # The constant inside the square root of the released code.


def _scalars(t: int, hp: Hyperparameters) -> Scalars:
    b1, b2 = hp["betas"]
    return {
        "b1": b1,
        "b2": b2,
        "lr": hp["lr"],
        "keep": 1 - hp["lr"] * hp["weight_decay"],
        "nesterov": hp["nesterov"],
    }


def _update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, b1, b2, lr, keep, nesterov) -> None:
    shrink_(p, keep)
    ema_(m, g, b1)
    ema_product_(v, m, m, b2)
    adapted = m / (v + _FLOOR).sqrt_()
    if nesterov:
        adapted = adapted.abs_() * mix(g, m, b1).sign_()
    add_(p, adapted, -lr)


def _variance_adaptation(g: Tensor, t: int, hp: Hyperparameters, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    gamma = m.abs() / (v + _FLOOR).sqrt_()
    return gamma.sum(), gamma.new_tensor(float(gamma.numel()))


DEVA_VECTOR = ElementwiseRule(
    "DeVAVector",
    state=like("m", "v"),
    scalars=_scalars,
    update=_update,
    internals={"variance_adaptation": Internal("mean of the variance adaptation Gamma", _variance_adaptation)},
)


class DeVAVector(RuleOptimizer):
    r"""DeVA in the :math:`\ell_\infty` geometry (`arXiv 2602.06880 <https://arxiv.org/abs/2602.06880>`_).

    .. math::
        M_t &= \beta_1 M_{t-1} + (1-\beta_1) g_t \\
        V_t &= \beta_2 V_{t-1} + (1-\beta_2) M_t^2 \\
        \Gamma_t &= \sqrt{M_t^2 / (V_t + 10^{-5})} \\
        \theta_t &= (1-\eta\lambda)\,\theta_{t-1} - \eta\, \Gamma_t \circ \mathrm{sign}(M_t)

    The sign is the scale-invariant direction, :math:`\Gamma` the variance adaptation. As in the released code
    (class ``DeVAEuclideanNorm``), the second moment is of the *momentum*, and nothing is bias-corrected: the first
    step is :math:`\eta/\sqrt{1-\beta_2}`. State: ``m``, ``v``, each of the parameter's shape.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\eta`. The released class has 0.02, its README's example 1e-3.
        betas: :math:`(\beta_1, \beta_2)`. The README's example has (0.9, 0.99).
        weight_decay: Decoupled weight decay :math:`\lambda`.
        nesterov: Take the sign (and only the sign) of :math:`(1-\beta_1) g_t + \beta_1 M_t`, as released.
        maximize: Ascend instead of descend.
        skip_nonfinite: Skip and count steps whose gradients hold NaN or infinity.
        max_consecutive_skips: Steps skipped in a row after which ``step`` raises an error, or ``None``.
        backend: How the step is run; see :class:`.optimizer.RuleOptimizer`.
        rounding: How results are stored in bfloat16 and float16 parameters; see :class:`.optimizer.RuleOptimizer`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter is complex.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.DeVAVector([w], lr=0.01, betas=(0.9, 0.99))
        >>> w.grad = torch.tensor([0.5, -0.5])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9155, -1.9155])
    """

    rules = (DEVA_VECTOR,)

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        max_consecutive_skips: int | None = 100,
        backend: Backend = "auto",
        rounding: Rounding = "nearest",
    ) -> None:
        hyperparameters = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "nesterov": nesterov}
        options = EngineOptions(maximize, skip_nonfinite, max_consecutive_skips, backend, rounding)
        super().__init__(params, hyperparameters, options)
