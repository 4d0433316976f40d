"""Muon-VS and Muon-NSR: orthogonalised momentum, adapted to the variance of the gradients before."""

from math import sqrt
from typing import Annotated

import torch

from ..engine.arithmetic import ema_, mix, squared_difference
from ..engine.hyperparameters import number
from ..engine.kinds import Matrix, Move
from ..engine.rule import Polar


def _scalars(t, h, shape):
    return {"correction": 1 / (1 - h.momentum**t), "step": h.lr * 0.2 * sqrt(max(shape[:2]))}


def _moments(g, s, k):
    """Look-ahead momentum and standard deviation."""
    ema_(s.v, squared_difference(s.m, g).mul_(k.momentum), k.momentum)
    ema_(s.m, g, k.momentum)
    return mix(g, s.m * k.correction, k.momentum), s.v.mul(k.correction).sqrt_()


class MuonVS(
    Matrix,
    paper="arXiv 2601.14603",
    idea="orthogonalised",
    about="orthogonalised momentum over the gradients' deviation",
):
    r"""Muon-VS, variance-scaled Muon (`arXiv 2601.14603 <https://arxiv.org/abs/2601.14603>`_).

    .. math::
        V_t &= \mu V_{t-1} + \mu(1-\mu)(M_{t-1} - G_t)^2, \quad
        M_t = \mu M_{t-1} + (1-\mu) G_t, \quad
        \hat V_t = \tfrac{V_t}{1-\mu^t}, \quad \hat M_t = \tfrac{M_t}{1-\mu^t} \\
        \tilde M_t &= G_t + \tfrac{\mu}{1-\mu}\hat M_t, \quad
        O_t = \mathrm{polar}\Bigl(\frac{\tilde M_t}{\sqrt{\hat V_t} + \epsilon}\Bigr), \quad
        W_t = (1-\eta\lambda) W_{t-1} - 0.2\,\eta\sqrt{\max(m, n)}\;O_t

    with the variance and the division element by element, and m and n the first two axes of the weight. As in
    the released code, :math:`\epsilon` is outside of the root; the paper has it inside. Convolutions are matrices
    (out, in * k * k). State: ``m`` and ``v``, of the parameter's shape.

    Args:
        lr: Learning rate :math:`\eta`. As released; 6e-4 for GPT-2.
        momentum: :math:`\mu`, of both averages.
        eps: :math:`\epsilon`, in units of the gradient.
        weight_decay: Decoupled weight decay :math:`\lambda`. As released; 0.1 for GPT-2.

    Example:
        The first step has no variance to go by but that around zero, which leaves the signs of the gradient.

        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.MuonVS(groups, lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 1.0], [1.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.0200, -0.0200],
                [-0.0200,  0.0200]])
    """

    lr: float = 0.02
    momentum: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    orthogonalizer: str = "kj5"

    by_rows = True
    buffers = ("m", "v")
    averages = ("m",)
    squares = ("v",)
    moments = {"m": ("g", "momentum")}
    scalars = staticmethod(_scalars)

    @staticmethod
    def update(g, s, k, observe):
        n, deviation = _moments(g, s, k)
        o, _ = yield Polar(n.div_(deviation.add_(k.eps)), k.orthogonalizer)
        return Move(o, k.step)


class MuonNSR(
    Matrix,
    paper="arXiv 2601.14603",
    idea="orthogonalised",
    about="orthogonalised momentum modulated by noise-to-signal ratios",
):
    r"""Muon-NSR, Muon modulated by the noise-to-signal ratio (`arXiv 2601.14603 <https://arxiv.org/abs/2601.14603>`_).

    :class:`MuonVS` with another divisor, element by element:

    .. math::
        O_t = \mathrm{polar}\Bigl(\frac{\tilde M_t}{\sqrt{\tilde M_t^2 + \gamma \hat V_t} + \epsilon}\Bigr)

    which is between the sign of the momentum (:math:`\gamma = 0`) and, up to scale, what :class:`MuonVS` has. As in the
    released code, :math:`\epsilon` is outside of the root; the paper has it inside. State: ``m`` and ``v``, of the
    parameter's shape.

    Args:
        lr: Learning rate :math:`\eta`. As released; 6e-4 for GPT-2.
        momentum: :math:`\mu`, of both averages.
        eps: :math:`\epsilon`, in units of the gradient.
        gamma: Weight :math:`\gamma` of the variance.
        weight_decay: Decoupled weight decay :math:`\lambda`. As released; 0.1 for GPT-2.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.MuonNSR(groups, lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 1.0], [1.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.0200, -0.0200],
                [-0.0200,  0.0200]])
    """

    lr: float = 0.02
    momentum: float = 0.95
    eps: float = 1e-8
    gamma: Annotated[float, number()] = 10.0
    weight_decay: float = 0.01
    orthogonalizer: str = "kj5"

    by_rows = True
    buffers = ("m", "v")
    averages = ("m",)
    squares = ("v",)
    moments = {"m": ("g", "momentum")}

    @staticmethod
    def scalars(t, h, shape):
        # In units of (1 - mu) times the published momentum, in which nothing grows beyond the gradients.
        unit = 1 - h.momentum
        return _scalars(t, h, shape) | {"noise": sqrt(h.gamma) * unit, "floor": h.eps * unit}

    @staticmethod
    def update(g, s, k, observe):
        n, deviation = _moments(g, s, k)
        o, _ = yield Polar(n.div_(torch.hypot(n, deviation.mul_(k.noise)).add_(k.floor)), k.orthogonalizer)
        return Move(o, k.step)
