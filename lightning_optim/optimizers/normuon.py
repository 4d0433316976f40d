"""NorMuon: orthogonalised momentum with normalised rows."""

from math import prod, sqrt
from typing import Annotated, Literal

from ..engine.arithmetic import ema_, mix, squared_norm
from ..engine.hyperparameters import fraction
from ..engine.kinds import Matrix, Move
from ..engine.rule import LIKE_PARAMETER, Polar

_EPS = 1e-10  # As released.


class NorMuon(
    Matrix, paper="arXiv 2510.05491", idea="orthogonalised", about="orthogonalised momentum with normalised rows"
):
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

    Convolutions are matrices (out, in * k * k), with one :math:`v` per output channel and the original factor from the
    kernel's own axes, as in :class:`Muon`. The released code has one :math:`v` for each row of each k x k slice of a
    kernel and keeps the norm of each slice, and orthogonalises kernels of three axes as stacks of (in, k) matrices.
    State: ``m`` of
    the parameter's shape, ``v`` one number per row.

    Args:
        momentum: :math:`\mu`.
        beta2: :math:`\beta_2`.
        nesterov: Orthogonalise the look-ahead :math:`(1-\mu)G_t+\mu M_t` instead of :math:`M_t`.
        weight_decay: Decoupled weight decay :math:`\lambda`.
        scale: ``"original"`` or ``"rms"``.

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

    lr: float = 0.02
    momentum: float = 0.95
    beta2: Annotated[float, fraction()] = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    scale: Literal["original", "rms"] = "original"
    orthogonalizer: str = "kj5"
    averages = ("m",)
    moments = {"m": ("g", "momentum")}

    @staticmethod
    def buffers(shape, h):
        return {"m": LIKE_PARAMETER, "v": (shape[0], 1)}

    @staticmethod
    def scalars(t, h, shape):
        original = h.scale == "original"
        factor = sqrt(max(1.0, shape[-2] / shape[-1])) if original else 0.2 * sqrt(prod(shape))
        return {"norm": h.lr * factor}

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g, k.momentum)
        o, _ = yield Polar(mix(g, s.m, k.momentum) if k.nesterov else s.m, k.orthogonalizer)
        rows = squared_norm(o, axes=(-1,))
        ema_(s.v, rows / o.shape[-1], k.beta2)
        divisor = s.v.sqrt().add_(_EPS)
        norm = k.norm * rows.sum(-2, keepdim=True).sqrt_() if k.scale == "original" else k.norm
        normalised = (rows / divisor.square()).sum(-2, keepdim=True).sqrt_()
        return Move(o, norm / normalised.add_(_EPS) / divisor)
