"""KL-Shampoo and KL-SOAP: Shampoo's factors by Kullback-Leibler divergence."""

from math import prod
from typing import Annotated

import torch

from .. import devices
from ..eigenbasis import BASIS_ERROR, Eigenbasis, axis_buffers, phases, step_numbers
from ..engine.arithmetic import ema_, ema_product_
from ..engine.decay import keep
from ..engine.hyperparameters import count, fraction, number
from ..engine.kinds import Matrix, Move
from ..engine.rule import LIKE_PARAMETER
from ..polar import symmetric_product

_LARGEST_ROOT = 4000  # Released: what the inverse roots of the eigenvalues of very long axes are clamped to.


def _matrix(shape):
    return shape[0], prod(shape[1:])


def _axes(shape, h):
    return tuple(i for i in (0, 1) if _matrix(shape)[i] <= h.max_precondition_dim)


def _buffers(shape, h):
    rows, columns = _matrix(shape)
    axes = _axes(shape, h)
    values = {"values0": (rows, 1), "values1": (1, columns)}
    return {**axis_buffers((rows, columns), axes), **{f"values{i}": values[f"values{i}"] for i in axes}}


def _scalars(t, h, shape, phase):
    return {
        **step_numbers(t, phase, h, keep(h), correct_bias=False),
        "axes": _axes(shape, h),
        "floors": tuple(max(10, min(length, _LARGEST_ROOT)) ** -2 for length in _matrix(shape)),
    }


def _start(g, basis, s, k):
    """Take the bases of the first gradient. Its eigenvalues are not taken: all begin with the same."""
    basis.accumulate(g, k.shampoo_beta)
    for axis in k.axes:
        getattr(s, f"gram{axis}").div_(g.shape[2 - axis])
        getattr(s, f"values{axis}").fill_(k.initial_eigenvalue)
    basis.start()


def _whitened(g, s, k, axis):
    """The gradient in the basis of an axis, over the roots of the eigenvalues there."""
    if axis not in k.axes:
        return g
    return (s.basis0.mT @ g) * s.values0.rsqrt() if axis == 0 else (g @ s.basis1) * s.values1.rsqrt()


def _estimate(g, rotated, s, k):
    """Follow both factors and their eigenvalues, with those of the step before on the other side."""
    rows, columns = g.shape[1:]
    beta, new = k.shampoo_beta, 1 - k.shampoo_beta
    with devices.full_precision(g):
        if 0 in k.axes:
            x = _whitened(g, s, k, 1)
            symmetric_product(x, x.mT, s.gram0, beta, new / columns, out=s.gram0)
        if 1 in k.axes:
            x = _whitened(g, s, k, 0)
            symmetric_product(x.mT, x, s.gram1, beta, new / rows, out=s.gram1)
    squares = rotated.square()
    means = {
        0: (squares / s.values1 if 1 in k.axes else squares).mean(-1, keepdim=True),
        1: (squares / s.values0 if 0 in k.axes else squares).mean(-2, keepdim=True),
    }
    for axis in k.axes:
        values = getattr(s, f"values{axis}")
        ema_(values, means[axis], beta)
        values.clamp_(min=k.floors[axis])


def _roots(s, k):
    """Roots of the eigenvalues of the Kronecker product."""
    values = [getattr(s, f"values{axis}").sqrt() for axis in k.axes]
    return values[0] * values[1] if len(values) == 2 else values[0] if values else 1.0


class KLShampoo(
    Matrix,
    paper="arXiv 2509.03378",
    idea="eigenbasis",
    about="Shampoo with factors of least KL divergence, without Adam",
):
    r"""KL-Shampoo, Shampoo as estimation by Kullback-Leibler divergence (`arXiv 2509.03378
    <https://arxiv.org/abs/2509.03378>`_).

    Shampoo's :math:`L \otimes R` is taken for the covariance of the gradient, and fitted by maximum likelihood as that
    of a matrix Gaussian. Each factor is then an average of outer products of the gradient that the other one has
    whitened. For a weight of m x n with gradient :math:`G`, bases :math:`Q_L, Q_R` and eigenvalues
    :math:`\lambda, \rho` of the factors:

    .. math::
        M &= \beta_1 M + (1-\beta_1) G \\
        W &\leftarrow (1-\eta\lambda_w)\Bigl(W - \eta\, Q_L
             \frac{Q_L^\top M Q_R}{\sqrt{\lambda\rho^\top} + \epsilon} Q_R^\top\Bigr) \\
        L &= \beta_2 L + \tfrac{1-\beta_2}{n}\, G Q_R\, \mathrm{diag}(\rho)^{-1} Q_R^\top G^\top, \quad
        R = \beta_2 R + \tfrac{1-\beta_2}{m}\, G^\top Q_L\, \mathrm{diag}(\lambda)^{-1} Q_L^\top G \\
        \lambda_i &= \beta_2 \lambda_i + \tfrac{1-\beta_2}{n} \textstyle\sum_j (Q_L^\top G Q_R)_{ij}^2 / \rho_j, \quad
        \rho_j = \beta_2 \rho_j + \tfrac{1-\beta_2}{m} \textstyle\sum_i (Q_L^\top G Q_R)_{ij}^2 / \lambda_i

    Every ``precondition_frequency`` steps :math:`Q_L, Q_R` make one step of orthogonal iteration on :math:`L, R`
    (multiply, QR). The eigenvalues are averages in bases that lag behind, which is why no second moment of Adam's is
    needed, and only half of :class:`SOAP`'s state of the parameter's shape.

    As in the released code: the very first call only takes the bases of its gradient and moves nothing; eigenvalues
    begin with ``initial_eigenvalue``, whatever the gradient; there is no correction of biases; inverse roots of
    eigenvalues are at most :math:`\max(10, \min(d, 4000))` for an axis of length d; columns of the bases are not
    sorted; and weight decay comes after the step. Other than released: state and products are float32 (released:
    bfloat16 by default); convolution kernels are matrices (out, rest) (released: at most three axes, each with a
    basis); axes that are too long for a basis are left as they are; and a tiny ramp makes the first bases unique where
    the gradient is rank-deficient.

    The authors trained NanoGPT (123M), NanoRWKV7 (162M), a Llama (134M) and NanoMoE (227M) and report the lowest losses
    with it, before KL-SOAP, SOAP and Shampoo, each tuned by 150 random trials. State: ``m`` of the parameter's shape;
    ``gram``, ``basis`` of d x d and ``values`` of d numbers for each axis of length d.

    Args:
        lr: Learning rate :math:`\eta`; the default is the released code's.
        betas: :math:`(\beta_1, \beta_2)`; as released.
        shampoo_beta: :math:`\beta_2` of the factors and eigenvalues, or ``None`` for that of ``betas``.
        eps: :math:`\epsilon`, in units of the gradient; as released.
        weight_decay: Decoupled weight decay :math:`\lambda_w`; as released.
        precondition_frequency: Steps between refreshes of the bases; as released.
        stagger: Spread the refreshes of different parameters evenly over these steps, so that none takes longer than
            the others; ``False`` makes them all in one step, as the released code does. Which step is a parameter's
            follows from its position in its group.
        max_precondition_dim: Axes longer than this have no factor (SOAP's default; released: no limit).
        initial_eigenvalue: What all eigenvalues begin with, as released; the first steps are the momentum over this, so
            that for gradients far larger than it they are large.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.KLShampoo(groups, lr=0.1, betas=(0.0, 0.5), weight_decay=0.0)
        >>> w.grad = torch.tensor([[0.2, 0.0], [0.0, -0.1]])
        >>> optimizer.step()  # takes the bases
        >>> optimizer.step()  # the gradient over the initial eigenvalues
        >>> w.data
        tensor([[-0.2000,  0.0000],
                [ 0.0000,  0.1000]])
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    shampoo_beta: Annotated[float | None, fraction()] = None
    eps: float = 1e-8
    weight_decay: float = 0.01
    precondition_frequency: Annotated[int, count()] = 10
    stagger: bool = True
    max_precondition_dim: Annotated[int, count()] = 10000
    initial_eigenvalue: Annotated[float, number(1e-7)] = 0.1

    capturable = False
    phases = staticmethod(phases)
    internals = {"basis_error": BASIS_ERROR}
    averages = ("m",)

    @staticmethod
    def buffers(shape, h):
        return {"m": LIKE_PARAMETER, **_buffers(shape, h)}

    @staticmethod
    def scalars(t, h, shape, phase):
        return _scalars(t, h, shape, phase)

    @staticmethod
    def update(g, s, k, observe):
        basis = Eigenbasis(k.axes, s)
        if k.start:
            _start(g, basis, s, k)
            basis.report(observe)
            return Move(torch.zeros_like(g), k.step)
        ema_(s.m, g, k.beta1)
        direction = basis.rotate_back(basis.rotate(s.m) / (_roots(s, k) + k.eps))
        _estimate(g, basis.rotate(g), s, k)
        if k.refresh:
            basis.refresh()
        basis.report(observe)
        return Move(direction, k.step)


class KLSOAP(
    Matrix, paper="arXiv 2509.03378", idea="eigenbasis", about="Adam in the eigenbasis of KL-Shampoo's factors"
):
    r"""KL-SOAP, Adam in the eigenbasis of KL-Shampoo's factors (`arXiv 2509.03378 <https://arxiv.org/abs/2509.03378>`_).

    The factors :math:`L, R`, their eigenvalues and their bases :math:`Q_L, Q_R` are those of :class:`KLShampoo`; the
    step is Adam's in these bases, without correction of biases:

    .. math::
        G' &= Q_L^\top G Q_R, \quad M = \beta_1 M + (1-\beta_1) G', \quad V = \beta_2 V + (1-\beta_2) G'^2 \\
        W &\leftarrow (1-\eta\lambda)\Bigl(W - \eta\, Q_L \frac{M}{\sqrt V + \epsilon} Q_R^\top\Bigr)

    When the bases are refreshed, :math:`M` is carried over and :math:`V` is not. As in the released code the very first
    call moves nothing, and without correction of biases the next ones are up to
    :math:`(1-\beta_1)/\sqrt{1-\beta_2}` times ``lr``. What else is as released, and what is not, is said at
    :class:`KLShampoo`, which the authors found better. State: ``m``, ``v`` of the parameter's shape; ``gram``,
    ``basis`` of d x d and ``values`` of d numbers for each axis of length d.

    Args:
        lr: Learning rate :math:`\eta`; the default is the released code's.
        betas: :math:`(\beta_1, \beta_2)`; as released.
        shampoo_beta: :math:`\beta_2` of the factors and eigenvalues, or ``None`` for that of ``betas``.
        eps: :math:`\epsilon`, in units of the rotated gradient; as released.
        weight_decay: Decoupled weight decay :math:`\lambda`; as released.
        precondition_frequency: Steps between refreshes of the bases; as released.
        stagger: Spread the refreshes of different parameters evenly over these steps, so that none takes longer than
            the others; ``False`` makes them all in one step, as the released code does. Which step is a parameter's
            follows from its position in its group.
        max_precondition_dim: Axes longer than this are left as they are (SOAP's default; released: no limit).
        initial_eigenvalue: What all eigenvalues begin with, as released.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.KLSOAP(groups, lr=0.1, betas=(0.0, 0.0), weight_decay=0.0)
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> optimizer.step()  # takes the bases
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.1000,  0.0000],
                [ 0.0000,  0.1000]])
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    shampoo_beta: Annotated[float | None, fraction()] = None
    eps: float = 1e-8
    weight_decay: float = 0.01
    precondition_frequency: Annotated[int, count()] = 10
    stagger: bool = True
    max_precondition_dim: Annotated[int, count()] = 10000
    initial_eigenvalue: Annotated[float, number(1e-7)] = 0.1

    capturable = False
    phases = staticmethod(phases)
    internals = {"basis_error": BASIS_ERROR}
    averages = ("m",)
    squares = ("v",)

    @staticmethod
    def buffers(shape, h):
        return {"m": LIKE_PARAMETER, "v": LIKE_PARAMETER, **_buffers(shape, h)}

    @staticmethod
    def scalars(t, h, shape, phase):
        return _scalars(t, h, shape, phase)

    @staticmethod
    def update(g, s, k, observe):
        basis = Eigenbasis(k.axes, s)
        if k.start:
            _start(g, basis, s, k)
            basis.report(observe)
            return Move(torch.zeros_like(g), k.step)
        rotated = basis.rotate(g)
        ema_(s.m, rotated, k.beta1)
        ema_product_(s.v, rotated, rotated, k.beta2)
        direction = basis.rotate_back(s.m / s.v.sqrt().add_(k.eps))
        _estimate(g, rotated, s, k)
        if k.refresh:
            raw = basis.rotate_back(s.m)
            basis.refresh()
            s.m.copy_(basis.rotate(raw))
        basis.report(observe)
        return Move(direction, k.step)
