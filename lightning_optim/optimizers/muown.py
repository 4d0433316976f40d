"""Muown: Muon on the directions of rows, Adam on their norms."""

from math import prod, sqrt
from typing import Annotated

import torch

from ..engine.arithmetic import ema_, ema_product_, mix
from ..engine.decay import UniformDecay, rate
from ..engine.hyperparameters import fraction
from ..engine.kinds import Matrix, Move
from ..engine.rule import LIKE_PARAMETER, Polar, mean_of
from ..engine.switches import NotCautious, Uncontrolled

#: Rows with no larger norm count as zero.
_ZERO = 1e-30
#: Of a row's gradient, what is across the row and is smaller than this is rounding errors.
_ALONG = 1e-5


def _row_norms(x):
    """Norms of rows; the largest entry is taken out first, since squares of tiny or huge ones leave the range."""
    size = x.abs().amax(-1, keepdim=True).clamp_(min=_ZERO)
    return torch.linalg.vector_norm(x / size, dim=-1, keepdim=True).mul_(size)


class Muown(
    Matrix,
    paper="arXiv 2605.10797",
    idea="orthogonalised",
    about="orthogonalised momentum of row directions, Adam on row norms",
):
    r"""Muown, Muon with control of row norms (`arXiv 2605.10797 <https://arxiv.org/abs/2605.10797>`_).

    Each row of a weight matrix (m x n) is its norm times a direction, :math:`w_i = \gamma_i v_i / \|v_i\|`. With the
    gradients of both, row by row, where :math:`u_i = v_i/\|v_i\|` and :math:`\langle\cdot,\cdot\rangle` is over the
    row:

    .. math::
        G^\gamma_i = \langle G_i, u_i\rangle, \qquad
        G^v_i = \frac{\gamma_i}{\|v_i\|}\,\bigl(G_i - G^\gamma_i u_i\bigr)

    directions take the step of Muon and norms that of Adam:

    .. math::
        M_t &= \mu M_{t-1} + (1-\mu) G^v_t, \qquad
        V_t = V_{t-1} - 0.2\,\eta\sqrt{\max(m, n)}\ \mathrm{polar}\bigl((1-\mu) G^v_t + \mu M_t\bigr) \\
        \gamma_t &= \gamma_{t-1} - \eta\,\frac{a_t/(1-\beta_1^t)}{\sqrt{b_t/(1-\beta_2^t)} + \epsilon}, \qquad
        W_t = \mathrm{diag}(\gamma_t/\|V_t\|)\, V_t - \eta\lambda W_{t-1}

    with :math:`a_t, b_t` the averages of :math:`G^\gamma` and its square; :math:`V_0 = W_0`. With weight decay,
    :math:`\gamma_t` is then set to the norms of the rows of :math:`W_t`. Follows the released code
    (github.com/kcc-lion/muown), whose single-process class this is; its data-parallel class shrinks :math:`\gamma`,
    too. It splits a weight of three times as many rows as columns into three matrices; here packed projections are
    known by their module. A row of zeros, which has no direction and becomes NaN in the released code, takes a step of
    Muon first. Convolutions are matrices (out, in * k * k). State: ``m`` of the parameter's shape; ``norm``
    (:math:`\gamma`), ``length`` (:math:`\|v\|`), ``a``, ``b``, one number per row.

    Use it in the place of Muon where the spectral norm of weights drifts upward, or where weight decay is hard to
    choose. Without weight decay, only Adam's steps change the norms of rows. The authors report lower perplexities
    than Muon, SOAP, AdamW and Lion for GPT-like models of 124M to 2.7B parameters on FineWeb-Edu, and a wider range of
    good learning rates.

    Args:
        lr: Learning rate :math:`\eta` of both. As released; 1e-3 in the README's run of 160M parameters.
        momentum: :math:`\mu`. As released.
        beta1: :math:`\beta_1`, of the norms. As released.
        beta2: :math:`\beta_2`, of the norms. As released.
        eps: :math:`\epsilon`, in units of the gradient of a norm. As released.
        nesterov: ``False`` orthogonalises :math:`M_t` itself.
        weight_decay: Weight decay :math:`\lambda`. As released.
        decay: The form of weight decay, as in every optimizer but for ``"cautious"``, with which rows would get
            another direction: ``"decoupled"``, ``"coupled"``, ``"independent"`` or ``"corrected"``.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.Muown(groups, lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[1.0, 0.0], [0.0, -1.0]])  # along the rows: only their norms change
        >>> optimizer.step()
        >>> w.data
        tensor([[0.9000, 0.0000],
                [0.0000, 2.1000]])
    """

    lr: float = 3e-4
    momentum: float = 0.95
    beta1: Annotated[float, fraction()] = 0.9
    beta2: Annotated[float, fraction()] = 0.95
    eps: float = 1e-8
    nesterov: bool = True
    weight_decay: float = 0.0
    decay: UniformDecay = "decoupled"
    orthogonalizer: str = "kj5"
    cautious: NotCautious = False
    norm_control: Uncontrolled = "none"

    reads_parameter = True
    own_decay = True
    capturable = False  # It goes by the values of its numbers.
    internals = {"row_norm": mean_of("row_norm", "mean norm of the rows")}
    averages = ("m",)

    @staticmethod
    def buffers(shape, h):
        return {"m": LIKE_PARAMETER} | dict.fromkeys(("norm", "length", "a", "b"), (shape[0], 1))

    @staticmethod
    def scalars(t, h, shape):
        root_bc2 = sqrt(1 - h.beta2**t)
        return {
            "start": t == 1,
            "turns": prod(shape[1:]) > 1,
            "turn": h.lr * 0.2 * sqrt(max(shape[:2])),
            "rate": h.lr * root_bc2 / (1 - h.beta1**t),
            "floor": h.eps * root_bc2,
            "decay": rate(h),
        }

    @staticmethod
    def update(g, s, k, observe):
        w = s.parameter
        if k.start:
            s.norm.copy_(_row_norms(w))
            s.length.copy_(s.norm)
        there = s.norm.abs() > _ZERO
        norm, length = torch.where(there, s.norm, 1.0), torch.where(there, s.length, 1.0)
        u = torch.where(there, w / norm, 0.0)
        of_norm = (g * u).sum(-1, keepdim=True)
        across = g - of_norm * u
        turns = _row_norms(across) > (_ALONG * _row_norms(g) if k.turns else torch.inf)
        of_direction = torch.where(turns | ~there, (norm / length) * across, 0.0)
        ema_(s.m, of_direction, k.momentum)
        o, _ = yield Polar(mix(of_direction, s.m, k.momentum) if k.nesterov else s.m, k.orthogonalizer)
        ema_(s.a, of_norm, k.beta1)
        ema_product_(s.b, of_norm, of_norm, k.beta2)
        new_length = _row_norms(u * length - k.turn * o)
        new_norm = torch.where(there, s.norm - k.rate * s.a / s.b.sqrt().add_(k.floor), new_length)
        scale = new_norm / new_length.clamp(min=_ZERO)
        keep, step = scale * length / norm, scale * k.turn
        still = (new_norm == s.norm) & ((k.turn * o) == 0).all(-1, keepdim=True)
        keep = torch.where(still, 1.0, keep) - k.decay  # Bit for bit, as the norm of a row is one up to rounding.
        s.length.copy_(new_length)
        s.norm.copy_(_row_norms(keep * w - step * o) if k.decay else new_norm)
        observe("row_norm", s.norm.abs())
        return Move(o, step, keep=keep)
