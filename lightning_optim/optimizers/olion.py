"""OLion: signs of orthogonalised momentum."""

from math import prod, sqrt
from typing import Literal

import torch

from ..engine.arithmetic import ema_, mix
from ..engine.kinds import Matrix, Move
from ..engine.rule import Polar

#: Entries of a polar factor below this are rounding errors, whose signs mean nothing.
_ZERO = 1e-6


class OLion(Matrix, paper="arXiv 2602.01105", idea="orthogonalised", about="signs of orthogonalised momentum"):
    r"""OLion, Lion's sign of Muon's orthogonalised momentum (`arXiv 2602.01105 <https://arxiv.org/abs/2602.01105>`_).

    .. math::
        M_t &= \beta_2 M_{t-1} + (1-\beta_2) G_t, \qquad
        O_t = \mathrm{polar}\bigl((1-\beta_1) G_t + \beta_1 M_t\bigr) \\
        S_t &= \mathrm{sign}(O_t), \qquad
        W_t = (1-\eta\lambda) W_{t-1} - \eta\, s\, S_t / \|S_t\|_F

    for an m x n weight matrix, with :math:`s = 0.2\sqrt{mn}`, which gives every update an RMS of 0.2, about that of
    AdamW's (``scale="rms"``), or :math:`s = \sqrt{\min(m, n)\max(1, m/n)}`, the norm of :class:`.muon.Muon`'s update
    (``"original"``). The sign makes all entries of an update equal in size, which the polar factor alone does not, and
    the polar factor gives all directions the same weight, which the sign alone does not.

    This is the paper's algorithm, as the released classes for Llama and SiT have it. **The released nanoGPT file is
    another one**: it defines the orthogonalisation and never calls it, so that it steps by plain signs. The released
    classes take only matrices; convolutions are matrices (out, in * k * k) here. Entries of :math:`O_t` below 1e-6 are
    rounding errors, and their sign is taken as 0, so that a row without gradients stays where it is. State: ``m``, of
    the parameter's shape.

    Use it where Lion is used, for hidden matrices, when Muon's updates are too uneven in size. The authors train
    Llama-2 7B on C4 (lr 3e-4, weight decay 0.1, sequences of 4096 tokens, 8192 steps) and SiT-B/2 on ImageNet latents
    (lr 1e-4, weight decay 0.1) with it; their tables are not reproduced here.

    Args:
        lr: Learning rate :math:`\eta`. As released; 3e-4 for Llama-2 7B and 1e-4 for SiT-B/2.
        betas: :math:`(\beta_1, \beta_2)`, the weight of the momentum in what is orthogonalised, and the decay of the
            momentum. As released, where they are called ``momentum`` and ``momentum_2``.
        nesterov: ``False`` orthogonalises :math:`M_t` itself.
        weight_decay: Decoupled weight decay :math:`\lambda`. As released; 0.1 in the authors' runs.
        scale: ``"rms"`` (as released) or ``"original"``, released as ``rms_scale=False``.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = lightning_optim.OLion([{"params": [w], "role": "matrix"}], lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 1.0], [1.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.0200, -0.0200],
                [-0.0200,  0.0200]])
    """

    lr: float = 0.02
    betas: tuple[float, float] = (0.95, 0.98)
    nesterov: bool = True
    weight_decay: float = 0.0
    scale: Literal["rms", "original"] = "rms"
    orthogonalizer: str = "kj5"

    buffers = ("m",)
    averages = ("m",)
    moments = {"m": ("g", "beta2")}

    @staticmethod
    def scalars(t, h, shape):
        m, n = shape[0], prod(shape[1:])
        return {"norm": h.lr * (0.2 * sqrt(m * n) if h.scale == "rms" else sqrt(min(m, n) * max(1.0, m / max(n, 1))))}

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g, k.beta2)
        o, _ = yield Polar(mix(g, s.m, k.beta1) if k.nesterov else s.m, k.orthogonalizer)
        signs = torch.where(o.abs() < _ZERO, 0.0, o.sign())
        norm = signs.abs().sum((-2, -1), keepdim=True).clamp_(min=1).sqrt_()
        return Move(signs, k.norm / norm)
