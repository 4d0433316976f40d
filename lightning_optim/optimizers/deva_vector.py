"""DeVA, the vector (l-infinity) form."""

from ..engine.arithmetic import ema_, ema_product_, mix
from ..engine.kinds import Elementwise, Move
from ..engine.rule import Internal

_FLOOR = 1e-5  # The constant inside the square root of the released code.


def _variance_adaptation(g, s, t, h):
    gamma = s.m.abs() / (s.v + _FLOOR).sqrt_()
    return gamma.sum(), gamma.new_full((), float(gamma.numel()))


class DeVAVector(
    Elementwise, paper="arXiv 2602.06880", idea="variance-centred", about="decoupled variance adaptation, vector form"
):
    r"""DeVA in the :math:`\ell_\infty` geometry (`arXiv 2602.06880 <https://arxiv.org/abs/2602.06880>`_).

    .. math::
        M_t &= \beta_1 M_{t-1} + (1-\beta_1) g_t \\
        V_t &= \beta_2 V_{t-1} + (1-\beta_2) M_t^2 \\
        \Gamma_t &= \sqrt{M_t^2 / (V_t + 10^{-5})} \\
        \theta_t &= (1-\eta\lambda)\,\theta_{t-1} - \eta\, \Gamma_t \circ \mathrm{sign}(M_t)

    The sign is the scale-invariant direction, :math:`\Gamma` the variance adaptation. As in the released code
    (class ``DeVAEuclideanNorm``), the second moment is of the *momentum*, and nothing is bias-corrected: the first
    step is :math:`\eta/\sqrt{1-\beta_2}`, or 32 times the learning rate by default. As a fallback rule its defaults are
    those of the README's example, with which that is 10 times. State: ``m``, ``v``, each of the parameter's shape.

    Args:
        lr: Learning rate :math:`\eta`. The released class has 0.02, its README's example 1e-3.
        betas: :math:`(\beta_1, \beta_2)`. The README's example has (0.9, 0.99).
        weight_decay: Decoupled weight decay :math:`\lambda`.
        nesterov: Take the sign (and only the sign) of :math:`(1-\beta_1) g_t + \beta_1 M_t`, as released.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.DeVAVector([w], lr=0.01, betas=(0.9, 0.99))
        >>> w.grad = torch.tensor([0.5, -0.5])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9155, -1.9155])
    """

    lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    nesterov: bool = False

    buffers = ("m", "v")
    averages = ("m",)
    squares = ("v",)
    moments = {"m": ("g", "beta1")}
    as_fallback = {"lr": 1e-3, "betas": (0.9, 0.99)}
    internals = {"variance_adaptation": Internal("mean of the variance adaptation Gamma", _variance_adaptation)}

    @staticmethod
    def update(g, s, k):
        ema_(s.m, g, k.beta1)
        ema_product_(s.v, s.m, s.m, k.beta2)
        adapted = s.m / (s.v + _FLOOR).sqrt_()
        if k.nesterov:
            adapted = adapted.abs_() * mix(g, s.m, k.beta1).sign_()
        return Move(adapted, k.lr)
