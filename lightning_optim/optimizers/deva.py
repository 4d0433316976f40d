"""DeVA, the spectral (S-infinity) form: decoupled variance adaptation of orthogonalised momentum."""

from dataclasses import field
from math import prod, sqrt
from typing import Annotated, Literal

import torch

from ..eigenbasis import BASIS_ERROR, Eigenbasis, axis_buffers, permute_, phases, step_numbers
from ..engine.arithmetic import ema_, mix, squared_norm
from ..engine.decay import keep
from ..engine.hyperparameters import count, fraction
from ..engine.kinds import Matrix, Move
from ..engine.rule import LIKE_PARAMETER, Internal, Polar, mean_of


def _matrix(shape):
    return shape[0], prod(shape[1:])


def _axes(shape, h):
    return tuple(i for i in (0, 1) if _matrix(shape)[i] <= h.max_precondition_dim)


def _spread_sums(gamma):
    return gamma.sum(), gamma.square().sum(), gamma.new_full((), float(gamma.numel()))


def _spread(total, squares, count):
    return (squares / count - (total / count) ** 2).clamp(min=0).sqrt() / (total / count)


class DeVA(Matrix, paper="arXiv 2602.06880", idea="eigenbasis", about="decoupled variance adaptation, spectral form"):
    r"""DeVA in the spectral :math:`S_\infty` geometry (`arXiv 2602.06880 <https://arxiv.org/abs/2602.06880>`_).

    In the eigenbasis of Shampoo's preconditioner, kept as in :class:`SOAP`:

    .. math::
        G' &= Q_L^\top G Q_R, \qquad M = \beta_1 M + (1-\beta_1) G' \\
        r_i &= \|M_{i,:}\|_2, \quad c_j = \|M_{:,j}\|_2, \quad V_{ij} = \beta_2 V_{ij} + (1-\beta_2)\, r_i c_j \\
        O &= \mathrm{polar}\bigl((1-\beta_1)G' + \beta_1 M\bigr), \qquad
        \Gamma_{ij} = \sqrt{r_i c_j/(V_{ij}+\epsilon)} \\
        W &\leftarrow (1-\eta\lambda)\Bigl(W - \eta\tfrac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
             0.2\sqrt{\max(m,n)}\; Q_L (O\circ\Gamma) Q_R^\top\Bigr)

    Four forms, as released: ``"momentum"`` is the above; ``"sign"`` orthogonalises the sign of the momentum (more
    stable); ``"instantaneous"`` takes :math:`r, c` from :math:`G'`; ``"efficient"`` keeps only averages of the squared
    row and column norms of :math:`G'` instead of :math:`V`, with
    :math:`\Gamma_{ij} = (r_i^2/(s_i+\epsilon))^{1/4}(c_j^2/(s'_j+\epsilon))^{1/4}`, and orthogonalises the sign. (As
    released that class calls a function it does not define; its evident meaning is used. The paper's Algorithm 2
    leaves out the rotation back, the code has it.) The very first call only starts the bases and moves nothing.
    Convolutions, which the released code does not take, are matrices (out, in * k * k). State: ``m`` and ``v`` of
    the parameter's shape (``"efficient"``: ``row_v`` and ``column_v`` in place of ``v``), and two d x d matrices per
    preconditioned axis.

    Args:
        shampoo_beta: Decay of the averages of outer products, or ``None`` for :math:`\beta_2`.
        eps: :math:`\epsilon`, in squared units of the gradient's norm.
        weight_decay: Decoupled weight decay :math:`\lambda`, after the step.
        precondition_frequency: Steps between refreshes of the bases.
        stagger: Spread the refreshes of different parameters evenly over these steps, so that none takes longer than
            the others; ``False`` makes them all in one step, as the released code does. Which step is a parameter's
            follows from its position in its group.
        max_precondition_dim: Axes longer than this are not rotated.
        correct_bias: Correct the bias of the moments.
        nesterov: Orthogonalise the look-ahead momentum.
        form: ``"momentum"``, ``"sign"``, ``"instantaneous"`` or ``"efficient"``.
        orthogonalizer: A name in :data:`lightning_optim.polar.METHODS`, or ``"exact"``. The default is the released
            code's own.
        fallback: Rule for everything that is not a hidden matrix: any element-wise or group optimizer by name, or
            ``"AdamW"``. The vector form of the same method by default.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.DeVA(groups, lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -3.0]])
        >>> optimizer.step()  # starts the bases
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.5651,  0.0000],
                [ 0.0000,  0.5651]])
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: Annotated[float | None, fraction()] = None
    eps: float = 1e-8
    weight_decay: float = 0.01
    precondition_frequency: Annotated[int, count()] = 10
    stagger: bool = True
    max_precondition_dim: Annotated[int, count()] = 10000
    correct_bias: bool = True
    nesterov: bool = True
    form: Literal["momentum", "sign", "instantaneous", "efficient"] = "momentum"
    orthogonalizer: str = "kj5-schatten"
    fallback: str = field(default="DeVAVector", kw_only=True)

    capturable = False
    phases = staticmethod(phases)
    internals = {
        "variance_adaptation": mean_of("variance_adaptation", "mean of the variance adaptation Gamma"),
        "variance_adaptation_spread": Internal(
            "standard deviation of Gamma over its mean", _spread_sums, "variance_adaptation", _spread
        ),
        "basis_error": BASIS_ERROR,
    }
    averages = ("m",)
    squares = ("v",)

    @staticmethod
    def buffers(shape, h):
        rows, columns = _matrix(shape)
        variance = {"row_v": (rows, 1), "column_v": (1, columns)} if h.form == "efficient" else {"v": LIKE_PARAMETER}
        return {"m": LIKE_PARAMETER, **variance, **axis_buffers((rows, columns), _axes(shape, h))}

    @staticmethod
    def scalars(t, h, shape, phase):
        numbers = step_numbers(t, phase, h, keep(h), h.correct_bias)
        return {**numbers, "step": numbers["step"] * 0.2 * sqrt(max(_matrix(shape))), "axes": _axes(shape, h)}

    @staticmethod
    def update(g, s, k, observe):
        basis = Eigenbasis(k.axes, s)
        if k.start:
            basis.accumulate(g, k.shampoo_beta)
            basis.start()
            basis.report(observe)
            return Move(torch.zeros_like(g), k.step)
        rotated = basis.rotate(g)
        ema_(s.m, rotated, k.beta1)
        if k.form == "efficient":
            ema_(s.row_v, squared_norm(rotated, (-1,)), k.beta2)
            ema_(s.column_v, squared_norm(rotated, (-2,)), k.beta2)
            rows = (squared_norm(s.m, (-1,)) / (s.row_v + k.eps)).pow_(0.25)
            gamma = rows * (squared_norm(s.m, (-2,)) / (s.column_v + k.eps)).pow_(0.25)
        else:
            measured = rotated if k.form == "instantaneous" else s.m
            norms = squared_norm(measured, (-1,)).sqrt_() * squared_norm(measured, (-2,)).sqrt_()
            ema_(s.v, norms, k.beta2)
            gamma = (norms / (s.v + k.eps)).sqrt_()
        n = mix(rotated, s.m, k.beta1) if k.nesterov else s.m
        o, _ = yield Polar(n.sign() if k.form in ("sign", "efficient") else n, k.orthogonalizer)
        observe("variance_adaptation", gamma)
        direction = basis.rotate_back(gamma * o)
        basis.accumulate(g, k.shampoo_beta)
        if k.refresh:
            raw = basis.rotate_back(s.m)
            statistics = (s.row_v, s.column_v) if k.form == "efficient" else (s.v, s.v)
            basis.refresh(lambda axis, order: permute_(statistics[axis], axis, order))
            s.m.copy_(basis.rotate(raw))
        basis.report(observe)
        return Move(direction, k.step)
