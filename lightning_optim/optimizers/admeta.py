"""Admeta: double exponential averages of gradients, and a lookahead, for RAdam and SGD."""

from math import sqrt
from typing import Annotated

from ..engine.arithmetic import add_, ema_, ema_product_
from ..engine.decay import UniformDecay
from ..engine.hyperparameters import count, number
from ..engine.kinds import Elementwise, Move
from ..engine.switches import NotCautious, Uncontrolled


def _scalars(t, h):
    forward = 0.8 * (1 + 1 / (0.1 * sqrt(t) + 3.8))
    return {
        "of_gradient": 10 / h.lam - 9,
        "of_average": 25 - 10 * (h.lam + 1 / h.lam),
        "start": t == 1,
        "look": t % h.lookahead_steps == 0,
        "forward": forward,
        "behind": 1 - forward,  # Near 0, where float32 would not resolve it beside 1.
    }


def _double_average(g, s, k):
    """The gradient that the rule goes on with: of the gradient and a sum of those before."""
    s.inner.mul_(k.lam).add_(g)
    return add_(k.of_gradient * g, s.inner, k.of_average)


def _lookahead(move, s, k):
    """The move, and every few steps back from there towards the slow weights, which follow."""
    if k.start:
        s.slow.copy_(s.parameter)
    if not k.look:
        return move
    add_(s.slow.mul_(k.behind), move.apply_(s.parameter.clone(), k.keep), k.forward)
    return Move(s.parameter * k.keep - s.slow, 1.0)  # Weight decay is the engine's, here too.


class AdmetaR(
    Elementwise,
    paper="arXiv 2307.00631",
    idea="adaptive moments",
    about="RAdam of double exponential averages, with a lookahead",
):
    r"""AdmetaR, RAdam with two-sided momentum (`arXiv 2307.00631 <https://arxiv.org/abs/2307.00631>`_, ICML 2023).

    Backward-looking, a double exponential average takes the place of the gradient:

    .. math::
        I_t &= \lambda I_{t-1} + g_t, \qquad h_t = \kappa g_t + \nu I_t, \qquad
            \kappa = \tfrac{10}{\lambda} - 9, \quad \nu = 25 - 10\bigl(\lambda + \tfrac 1\lambda\bigr) \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) h_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) h_t^2

    RAdam's step follows: :math:`\theta_t = \theta_{t-1} - \eta\, r_t\, \hat m_t / (\sqrt{\hat v_t} + \epsilon)` where
    :math:`\rho_t = \rho_\infty - 2 t \beta_2^t/(1-\beta_2^t)` is above 4, and
    :math:`\theta_t = \theta_{t-1} - \eta\,\hat m_t` before. Here :math:`\hat m_t = m_t/(1-\beta_1^t)`,
    :math:`\hat v_t = v_t/(1-\beta_2^t)`, :math:`\rho_\infty = 2/(1-\beta_2) - 1`, and

    .. math::
        r_t = \sqrt{\frac{(\rho_t-4)(\rho_t-2)\,\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\,\rho_t}}

    Forward-looking, every k steps a lookahead whose weight falls slowly from 1 to 0.8:

    .. math::
        \phi_t = \zeta_t \theta_t + (1-\zeta_t)\,\phi_{t-k}, \qquad \theta_t \leftarrow \phi_t, \qquad
        \zeta_t = 0.8\,\Bigl(1 + \frac{1}{0.1\sqrt t + 3.8}\Bigr)

    This is the paper's algorithm, with the constants in :math:`\kappa, \nu, \zeta_t` from the released code. **The
    released code is another one**: it adds the number :math:`\nu` itself to every coordinate in the place of
    :math:`\nu I_t`. Where the paper's figure has two readings, the usual ones of RAdam and Lookahead are taken:
    :math:`v_t` is updated in every step, and :math:`\phi_0 = \theta_0`, not 0. State: ``inner`` (:math:`I`), ``m``,
    ``v``, ``slow`` (:math:`\phi`) of the parameter's shape.

    Use it for networks that RAdam trains. The authors train CIFAR-10 and CIFAR-100 (batches of 128, 160 epochs, lr
    divided by 10 after 80 and 120, weight decay 1e-4), language models and audio with it; their tables are not
    reproduced here.

    Args:
        lr: Learning rate :math:`\eta`. As released.
        betas: :math:`(\beta_1, \beta_2)`. As released.
        eps: :math:`\epsilon`, in units of the gradient times :math:`\kappa`. As released.
        lam: :math:`\lambda`, the decay of the inner average, from 0.01 to 0.99. As released; 0.1 for CIFAR-10.
        lookahead_steps: Steps k between lookaheads. As released.
        weight_decay: Weight decay coefficient. As released.
        decay: The form of weight decay, as in every optimizer but for ``"cautious"``, which the lookahead would undo:
            ``"decoupled"``, ``"coupled"``, ``"independent"`` or ``"corrected"``.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.AdmetaR([w], lr=0.01)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()  # h = 14 g, and no second moment yet
        >>> w.data
        tensor([ 0.9300, -2.0140])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    lam: Annotated[float, number(0.01, 0.99)] = 0.2
    lookahead_steps: Annotated[int, count()] = 6
    weight_decay: float = 0.0
    decay: UniformDecay = "decoupled"
    cautious: NotCautious = False
    norm_control: Uncontrolled = "none"
    decoupled: bool | None = None

    buffers = ("inner", "m", "v", "slow")
    averages = ("inner", "m")
    squares = ("v",)

    @staticmethod
    def scalars(t, h):
        bc1, bc2 = 1 - h.beta1**t, 1 - h.beta2**t
        most = 2 / (1 - h.beta2) - 1
        rho = most - 2 * t * h.beta2**t / bc2
        adaptive = rho > 4
        r = sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)) if adaptive else 1.0
        rate = h.lr / bc1 * (r * sqrt(bc2) if adaptive else 1.0)
        return {"rate": rate, "adaptive": adaptive, "floor": h.eps * sqrt(bc2), **_scalars(t, h)}

    @staticmethod
    def update(g, s, k):
        h = _double_average(g, s, k)
        ema_(s.m, h, k.beta1)
        ema_product_(s.v, h, h, k.beta2)
        over = s.v.sqrt().add_(k.floor) if k.adaptive else None
        return _lookahead(Move(s.m, k.rate, over), s, k)


class AdmetaS(
    Elementwise, paper="arXiv 2307.00631", idea="momentum", about="SGD of double exponential averages, with a lookahead"
):
    r"""AdmetaS, SGD with two-sided momentum (`arXiv 2307.00631 <https://arxiv.org/abs/2307.00631>`_, ICML 2023).

    With :math:`h_t` and the lookahead of :class:`AdmetaR`:

    .. math::
        m_t = \beta m_{t-1} + (1-\beta) h_t, \qquad \theta_t = \theta_{t-1} - \eta\, m_t

    This is the paper's algorithm and not the released code's, with the same readings of its figure as in
    :class:`AdmetaR`. State: ``inner``, ``m``, ``slow`` of the parameter's shape.

    Use it where SGD with momentum is used, at a lower learning rate: with the defaults, h is 7 g in the first step and
    51 g in the long run of constant gradients.

    Args:
        lr: Learning rate :math:`\eta`. As released.
        momentum: :math:`\beta`. As released.
        lam: :math:`\lambda`, the decay of the inner average, from 0.01 to 0.99. As released.
        lookahead_steps: Steps k between lookaheads. As released.
        weight_decay: Weight decay coefficient. As released; 1e-4 for CIFAR.
        decay: The form of weight decay, ``"coupled"`` as released; see :class:`AdmetaR`.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = lightning_optim.AdmetaS([w], lr=0.05)
        >>> w.grad = torch.tensor([0.5, 0.1])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.8600, -2.0280])
    """

    lr: float = 0.05
    momentum: float = 0.2
    lam: Annotated[float, number(0.01, 0.99)] = 0.9
    lookahead_steps: Annotated[int, count()] = 6
    weight_decay: float = 0.0
    decay: UniformDecay = "coupled"
    cautious: NotCautious = False
    norm_control: Uncontrolled = "none"
    decoupled: bool | None = None

    buffers = ("inner", "m", "slow")
    averages = ("inner", "m")
    scalars = staticmethod(_scalars)

    @staticmethod
    def update(g, s, k):
        ema_(s.m, _double_average(g, s, k), k.momentum)
        return _lookahead(Move(s.m, k.lr), s, k)
