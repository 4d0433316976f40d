"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from typing import Annotated

import torch

from ..eigenbasis import BASIS_ERROR, Eigenbasis, axis_buffers, permute_, phases, step_numbers
from ..engine.arithmetic import ema_, ema_product_
from ..engine.decay import keep
from ..engine.hyperparameters import count, fraction
from ..engine.kinds import Matrix, Move
from ..engine.rule import LIKE_PARAMETER


def _merged(shape, longest):
    """Merge neighbouring axes while their product stays within ``longest``."""
    merged: list[int] = []
    current = 1
    for size in shape:
        if current * size <= longest:
            current *= size
        elif current > 1:
            merged.append(current)
            current = size
        else:
            merged.append(size)
    if current > 1 or not merged:
        merged.append(current)
    return tuple(merged)


def _layout(shape, h):
    """The shape a tensor is worked on in, and its preconditioned axes."""
    longest = h.max_precondition_dim
    if len(shape) == 1:
        return shape, (0,) if h.precondition_1d and shape[0] <= longest else ()
    if h.merge_dims:
        shape = _merged(shape, longest)
    return shape, tuple(i for i, size in enumerate(shape) if size <= longest)


class SOAP(
    Matrix, paper="arXiv 2409.11321", idea="eigenbasis", about="Adam in the eigenbasis of Shampoo's preconditioner"
):
    r"""SOAP, Adam in Shampoo's eigenbasis (`arXiv 2409.11321 <https://arxiv.org/abs/2409.11321>`_).

    For a weight with gradient :math:`G` (a matrix here; every axis of a convolution kernel has its own basis):

    .. math::
        G' &= Q_L^\top G Q_R, \quad M = \beta_1 M + (1-\beta_1) G', \quad V = \beta_2 V + (1-\beta_2) G'^2 \\
        W &\leftarrow (1-\eta\lambda)\Bigl(W - \eta\tfrac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
             Q_L \frac{M}{\sqrt V + \epsilon} Q_R^\top\Bigr) \\
        L &= \beta_s L + (1-\beta_s) G G^\top, \quad R = \beta_s R + (1-\beta_s) G^\top G

    and every ``precondition_frequency`` steps :math:`Q_L, Q_R` make one step of orthogonal iteration on
    :math:`L, R` (multiply, QR), columns sorted by estimated eigenvalue, :math:`V` permuted with them and :math:`M`
    carried over. As in the released code, the very first call only starts the bases and moves nothing, eps is added
    to the uncorrected root, and weight decay comes after the step. Where the first gradient is rank-deficient the
    released bases depend on the LAPACK build; a tiny ramp makes them unique here. State: ``m``, ``v`` of the
    parameter's shape, and two d x d matrices ``gram``, ``basis`` per preconditioned axis of length d.

    Args:
        shampoo_beta: :math:`\beta_s`, or ``None`` for :math:`\beta_2`.
        eps: :math:`\epsilon`, in units of the rotated gradient.
        weight_decay: Decoupled weight decay :math:`\lambda`.
        precondition_frequency: Steps between refreshes of the bases.
        stagger: Spread the refreshes of different parameters evenly over these steps, so that none takes longer than
            the others; ``False`` makes them all in one step, as the released code does. Which step is a parameter's
            follows from its position in its group.
        max_precondition_dim: Axes longer than this are left as they are.
        merge_dims: Merge neighbouring axes as long as the product stays within ``max_precondition_dim``.
        precondition_1d: Precondition vectors too; otherwise they get Adam.
        correct_bias: Correct the bias of the moments.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.SOAP(groups, lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> optimizer.step()  # starts the bases
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.1000,  0.0000],
                [ 0.0000,  0.1000]])
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: Annotated[float | None, fraction()] = None
    eps: float = 1e-8
    weight_decay: float = 0.01
    precondition_frequency: Annotated[int, count()] = 10
    stagger: bool = True
    max_precondition_dim: Annotated[int, count()] = 10000
    merge_dims: bool = False
    precondition_1d: bool = False
    correct_bias: bool = True

    flatten = False
    capturable = False
    phases = staticmethod(phases)
    internals = {"basis_error": BASIS_ERROR}
    averages = ("m",)
    squares = ("v",)

    @staticmethod
    def buffers(shape, h):
        return {"m": LIKE_PARAMETER, "v": LIKE_PARAMETER, **axis_buffers(*_layout(shape, h))}

    @staticmethod
    def scalars(t, h, shape, phase):
        layout, axes = _layout(shape, h)
        return {**step_numbers(t, phase, h, keep(h), h.correct_bias), "layout": layout, "axes": axes}

    @staticmethod
    def update(g, s, k, observe):
        basis = Eigenbasis(k.axes, s)
        full_shape = g.shape
        g, m, v = (x.view(-1, *k.layout) if x.is_contiguous() else x.reshape(-1, *k.layout) for x in (g, s.m, s.v))
        if k.start:
            basis.accumulate(g, k.shampoo_beta)
            basis.start()
            basis.report(observe)
            return Move(torch.zeros_like(g).view(full_shape), k.step)
        rotated = basis.rotate(g)
        ema_(m, rotated, k.beta1)
        ema_product_(v, rotated, rotated, k.beta2)
        direction = basis.rotate_back(m / v.sqrt().add_(k.eps))
        basis.accumulate(g, k.shampoo_beta)
        if k.refresh:
            raw = basis.rotate_back(m)
            basis.refresh(lambda axis, order: permute_(v, axis, order))
            m.copy_(basis.rotate(raw))
        basis.report(observe)
        return Move(direction.reshape(full_shape), k.step)
