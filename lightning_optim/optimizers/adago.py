"""AdaGO: orthogonalised momentum with AdaGrad's step."""

from typing import Annotated

from ..engine.arithmetic import ema_, squared_norm
from ..engine.hyperparameters import SMALLEST, number
from ..engine.kinds import Matrix, Move
from ..engine.rule import LIKE_PARAMETER, Polar, mean_of


class AdaGO(
    Matrix,
    paper="arXiv 2509.02981",
    about="orthogonalised momentum with AdaGrad's step",
    experimental="the authors' defaults and code could not be had; ``lr``, ``gamma``, ``v0`` and ``eps`` are derived.",
):
    r"""AdaGO, Muon with AdaGrad's step of the gradient's norm (`arXiv 2509.02981 <https://arxiv.org/abs/2509.02981>`_).

    .. math::
        M_t &= \mu M_{t-1} + (1-\mu) G_t, \qquad
        v_t^2 = v_{t-1}^2 + \min(\|G_t\|_F, \gamma)^2 \\
        \alpha_t &= \max\Bigl(\epsilon,\ \eta\,\frac{\min(\|G_t\|_F, \gamma)}{v_t}\Bigr), \qquad
        W_t = (1-\eta\lambda) W_{t-1} - \alpha_t\, \mathrm{polar}(M_t)

    for each weight matrix. The sum :math:`v_t^2` never forgets, so steps shrink as :math:`1/\sqrt t` while gradients
    keep their size, and faster gradients than :math:`\gamma` count as :math:`\gamma`. Equations are the paper's; it has
    no weight decay, no Nesterov momentum, no bias correction and no factor for the shape of a matrix. (Two public ports
    add some of these, and one of them divides by :math:`v_t^2`, which is not the algorithm.)

    How the defaults follow from the equations: with :math:`v_0 = \gamma`, steps begin below :math:`\eta/\sqrt 2`
    and, if all gradients are clipped, the t-th is :math:`\eta/\sqrt{t+1}`, so that ``lr`` alone says how long they are;
    the floor :math:`\epsilon` is low enough never to matter in a short run. The learning rate is that which
    makes the first hundred steps about as long as Muon's. Convolutions are matrices (out, in * k * k). State: ``m`` of
    the parameter's shape, ``v``, one number per matrix: :math:`v_t^2 - v_0^2`.

    Use it where no schedule is known: the step decays by itself, so that a constant ``lr`` does for short runs. The
    authors report that it outperforms Muon and Adam on CIFAR-10 and in function regression, at small scale.

    Args:
        lr: Learning rate :math:`\eta` (derived).
        momentum: :math:`\mu`, as in Muon.
        gamma: Bound :math:`\gamma` of the gradient's Frobenius norm, in units of the gradient (derived).
        v0: Initial value :math:`v_0` of the accumulated norm, in units of the gradient (derived).
        eps: Lower bound :math:`\epsilon` of the step :math:`\alpha_t` (derived). Schedules do not change it; at a
            learning rate of exactly 0 nothing moves.
        weight_decay: Decoupled weight decay :math:`\lambda`; the paper has none.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.AdaGO(groups, lr=0.1, v0=0.75**0.5, gamma=0.5, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.0500,  0.0000],
                [ 0.0000,  0.0500]])
    """

    lr: float = 0.05
    momentum: float = 0.95
    gamma: Annotated[float, number(SMALLEST)] = 1.0
    v0: Annotated[float, number(SMALLEST)] = 1.0
    eps: float = 1e-6
    weight_decay: float = 0.0
    orthogonalizer: str = "kj5"

    by_rows = True
    internals = {"step": mean_of("step", "mean over matrices of the step alpha")}
    averages = ("m",)
    moments = {"m": ("g", "momentum")}

    @staticmethod
    def buffers(shape, h):
        return {"m": LIKE_PARAMETER, "v": (1, 1)}

    @staticmethod
    def scalars(t, h, shape):
        return {"most": h.gamma**2, "start": h.v0**2, "floor": h.eps if h.lr else 0.0}

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g, k.momentum)
        o, (gg,) = yield Polar(s.m, k.orthogonalizer, (squared_norm(g),))
        clipped = gg.clamp(max=k.most)
        s.v.add_(clipped)
        alpha = (k.lr * (clipped / (s.v + k.start)).sqrt_()).clamp_(min=k.floor)
        observe("step", alpha)
        return Move(o, alpha)
