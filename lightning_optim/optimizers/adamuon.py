"""AdaMuon: orthogonalised signs of momentum, normalised element by element."""

from math import prod, sqrt

from ..engine.arithmetic import ema_, ema_product_, mix, squared_norm
from ..engine.kinds import Matrix, Move
from ..engine.rule import Polar


class AdaMuon(
    Matrix,
    paper="arXiv 2507.11005",
    idea="orthogonalised",
    about="orthogonalised signs of momentum with second moments",
):
    r"""AdaMuon, Muon with element-wise second moments (`arXiv 2507.11005 <https://arxiv.org/abs/2507.11005>`_).

    .. math::
        M_t &= \mu M_{t-1} + (1-\mu) G_t, \quad
        O_t = \mathrm{polar}\bigl(\mathrm{sign}((1-\mu) G_t + \mu M_t)\bigr), \quad
        V_t = \mu V_{t-1} + (1-\mu)\,O_t^2 \\
        \hat O_t &= \frac{O_t}{\sqrt{V_t} + \epsilon}, \qquad
        W_t = (1-\eta\lambda) W_{t-1} - \eta\,\frac{0.2\sqrt{mn}}{\|\hat O_t\|_F + \epsilon}\,\hat O_t

    for an (m, n) matrix; convolutions are matrices (out, in * k * k). Every update has an RMS of :math:`0.2\,\eta`,
    about that of AdamW's, so that its learning rates carry over; there is no bias correction, as the norm cancels it.
    Of matrices this is the released code; **the paper's algorithm** is ``nesterov=False`` (its momentum is a sum of
    gradients, :math:`M_t = \mu M_{t-1} + G_t`, which has the same sign). Of a convolution kernel the released
    code makes the norm :math:`0.2\sqrt{\text{shortest}\cdot\text{longest axis}}`, which is 13.9 times smaller for
    64 x 64 x 3 x 3; here kernels have the RMS of all others. A kernel of three axes is orthogonalised there as a stack
    of (in, k) matrices. State: ``m`` and ``v``, of the parameter's shape.

    Args:
        lr: Learning rate :math:`\eta`. As released; for GPT-2 the authors take 6e-4 and 1e-3.
        momentum: :math:`\mu`, of both averages.
        eps: :math:`\epsilon`.
        nesterov: Take the sign of the look-ahead :math:`(1-\mu)G_t+\mu M_t` instead of that of :math:`M_t`.
        weight_decay: Decoupled weight decay :math:`\lambda`. As released; 0.1 for GPT-2.

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

    lr: float = 0.02
    momentum: float = 0.95
    eps: float = 1e-8
    nesterov: bool = True
    weight_decay: float = 0.01
    orthogonalizer: str = "kj5"

    buffers = ("m", "v")
    averages = ("m",)
    squares = ("v",)
    moments = {"m": ("g", "momentum")}

    @staticmethod
    def scalars(t, h, shape):
        return {"norm": h.lr * 0.2 * sqrt(prod(shape))}

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g, k.momentum)
        n = mix(g, s.m, k.momentum) if k.nesterov else s.m
        o, _ = yield Polar(n.sign(), k.orthogonalizer)
        ema_product_(s.v, o, o, k.momentum)
        direction = o / s.v.sqrt().add_(k.eps)
        return Move(direction, k.norm / squared_norm(direction).sqrt_().add_(k.eps))
