"""Muon: orthogonalised momentum."""

from math import sqrt
from typing import Literal

from ..engine.arithmetic import ema_, mix
from ..engine.kinds import Matrix, Move
from ..engine.rule import Polar


class Muon(
    Matrix, paper="Jordan et al. 2024; arXiv 2502.16982", idea="orthogonalised", about="orthogonalised momentum"
):
    r"""Muon (`Keller Jordan, 2024 <https://kellerjordan.github.io/posts/muon/>`_), with a fallback rule.

    .. math::
        M_t = \mu M_{t-1} + (1-\mu) G_t, \quad
        O_t = \mathrm{polar}\bigl((1-\mu) G_t + \mu M_t\bigr), \quad
        W_t = (1-\eta\lambda) W_{t-1} - \eta\, s\, O_t

    with :math:`s = \sqrt{\max(1, m/n)}` of the last two axes of the weight (``scale="original"``) or
    :math:`0.2\sqrt{\max(m, n)}` of its first two (``"moonlight"``, which gives updates the RMS of AdamW's, so that
    its learning rates carry over; `arXiv 2502.16982 <https://arxiv.org/abs/2502.16982>`_). Convolutions are
    matrices (out, in * k * k) and, as in the released code, take the original factor from the kernel's own axes,
    which is 1 for square kernels. A kernel of three axes is a matrix (out, in * k), too; the released code
    orthogonalises it as a stack of (in, k) matrices. State: ``m``, of the parameter's shape.

    Args:
        lr: Learning rate :math:`\eta` (default: Keller Jordan's; Moonlight's is 1e-3).
        momentum: :math:`\mu`.
        nesterov: Orthogonalise the look-ahead :math:`(1-\mu)G_t+\mu M_t` instead of :math:`M_t`.
        weight_decay: Decoupled weight decay :math:`\lambda` (Moonlight: 0.1).
        scale: ``"original"`` or ``"moonlight"``.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = lightning_optim.Muon([{"params": [w], "role": "matrix"}], lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.1000,  0.0000],
                [ 0.0000,  0.1000]])
    """

    lr: float = 0.02
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    scale: Literal["original", "moonlight"] = "original"
    orthogonalizer: str = "kj5"

    by_rows = True
    buffers = ("m",)
    averages = ("m",)
    moments = {"m": ("g", "momentum")}

    @staticmethod
    def scalars(t, h, shape):
        original = h.scale == "original"
        factor = sqrt(max(1.0, shape[-2] / shape[-1])) if original else 0.2 * sqrt(max(shape[:2]))
        return {"step": h.lr * factor}

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g, k.momentum)
        o, _ = yield Polar(mix(g, s.m, k.momentum) if k.nesterov else s.m, k.orthogonalizer)
        return Move(o, k.step)
