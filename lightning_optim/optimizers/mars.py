"""MARS: variance-reduced gradients, for AdamW, Lion and Shampoo, and MARS-M: for Muon."""

from math import prod, sqrt
from typing import Annotated, Literal

import torch

from ..engine.arithmetic import add_, ema_, ema_product_
from ..engine.hyperparameters import number
from ..engine.kinds import Matrix, Move
from ..engine.rule import Polar


def _corrected(g, s, k, beta):
    """The corrected gradient, its norm bounded by 1; remembers the gradient.

    Everything is multiplied by 1 - beta until the division, so that nothing grows beyond the gradients.
    """
    c = torch.sub(g, s.last).mul_(k.gamma * beta)
    add_(c, g, 1 - beta)
    s.last.copy_(g)
    norm = torch.linalg.vector_norm(c.flatten(1), dim=1).view(-1, *(1 for _ in c.shape[1:]))
    return c.div_(norm.clamp_(min=1 - beta))


class MARS(
    Matrix,
    paper="arXiv 2411.10438",
    idea="variance-reduced",
    about="variance-reduced gradients for AdamW, Lion or Shampoo",
):
    r"""MARS, variance reduction for adaptive methods (`arXiv 2411.10438 <https://arxiv.org/abs/2411.10438>`_).

    For each weight matrix, the gradient is corrected by its change and its norm is bounded by 1:

    .. math::
        C_t = G_t + \gamma\,\tfrac{\beta_1}{1-\beta_1}(G_t - G_{t-1}), \quad
        \tilde C_t = C_t / \max(1, \|C_t\|_F), \quad
        M_t = \beta_1 M_{t-1} + (1-\beta_1) \tilde C_t

    and :math:`W_t = (1-\eta\lambda) W_{t-1} - \eta\, U_t` with, for the three values of ``form``,

    .. math::
        \mathrm{adamw}:\ & V_t = \beta_2 V_{t-1} + (1-\beta_2) \tilde C_t^2, \quad
            U_t = \frac{M_t/(1-\beta_1^t)}{\sqrt{V_t/(1-\beta_2^t)} + \epsilon} \\
        \mathrm{lion}:\ & U_t = \mathrm{sign}(M_t) \\
        \mathrm{shampoo}:\ & U_t = \sqrt{\max(1, m/n)}\ \mathrm{polar}(M_t)

    **This is the approximate form**, the authors' default: :math:`G_{t-1}` is the gradient of the step before, of other
    data. The exact form takes the gradient at the weights before with the data of this step, a second backward pass
    that a Trainer does not make; the authors measured 0.001 to 0.002 in the loss between the two (GPT-2 small).
    :math:`G_0 = 0`. Follows the released code, whose :math:`V_t` averages the squares of the corrected gradient; its
    README writes those of :math:`G_t`.

    The released code corrects every parameter of two axes, embeddings and output heads too, and gives all others, also
    convolution kernels, to AdamW (:math:`\beta` of 0.9 and 0.95, lr 3e-3, weight decay 0.1). Here hidden matrices and
    kernels are corrected, kernels as matrices (out, in * k * k) in the Shampoo form, and the rest has the fallback; the
    preset gives it the released values. Vectors in a group of role ``"matrix"`` are corrected, too, which is the
    released ``optimize_1d=True``. State: ``m``, ``last`` and, in the AdamW form, ``v`` of the parameter's shape.

    Use it for language models with AdamW's schedule and about ten times its learning rate. The authors' best validation
    losses of GPT-2 small, medium and large on OpenWebText, 50B tokens: AdamW 2.885, 2.691, 2.561; Muon 2.901, 2.688,
    2.573; MARS 2.849, 2.636, 2.518. Test accuracies on CIFAR-10 and CIFAR-100: AdamW 94.81, 73.7; Muon 95.08, 74.64;
    MARS 95.29, 76.97.

    Args:
        lr: Learning rate :math:`\eta`. As released; 6e-3, 3e-3, 2e-3 for GPT-2 small, medium, large.
        betas: :math:`(\beta_1, \beta_2)`; only the AdamW form has the second. As released.
        gamma: Weight :math:`\gamma` of the correction, from 0 to 1. As released.
        eps: :math:`\epsilon` of the AdamW form, in units of the corrected gradient. As released.
        weight_decay: Decoupled weight decay :math:`\lambda`. As released.
        form: ``"adamw"``, ``"lion"`` or ``"shampoo"``, released as ``mars_type``.
        orthogonalizer: Of the Shampoo form: a name in :data:`lightning_optim.polar.METHODS`, or ``"exact"``.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = lightning_optim.MARS([{"params": [w], "role": "matrix"}], lr=0.1)
        >>> w.grad = torch.tensor([[3.0, 1.0], [1.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.1000, -0.1000],
                [-0.1000,  0.1000]])
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.99)
    gamma: Annotated[float, number(0, 1)] = 0.025
    eps: float = 1e-8
    weight_decay: float = 0.0
    form: Literal["adamw", "lion", "shampoo"] = "adamw"
    orthogonalizer: str = "kj5"

    flatten = False
    averages = ("m", "last")
    squares = ("v",)

    @staticmethod
    def buffers(shape, h):
        return ("m", "last", "v") if h.form == "adamw" else ("m", "last")

    @staticmethod
    def scalars(t, h, shape):
        root_bc2 = sqrt(1 - h.beta2**t)
        ratio = shape[0] / max(1, prod(shape[1:]))
        factors = {"adamw": root_bc2 / (1 - h.beta1**t), "lion": 1.0, "shampoo": sqrt(max(1.0, ratio))}
        return {"step": h.lr * factors[h.form], "floor": h.eps * root_bc2}

    @staticmethod
    def update(g, s, k, observe):
        c = _corrected(g, s, k, k.beta1)
        ema_(s.m, c, k.beta1)
        if k.form == "adamw":
            ema_product_(s.v, c, c, k.beta2)
            return Move(s.m, k.step, over=s.v.sqrt().add_(k.floor))
        if k.form == "lion":
            return Move(s.m.sign(), k.step)
        o, _ = yield Polar(s.m.reshape(*s.m.shape[:2], -1), k.orthogonalizer)
        return Move(o.reshape(g.shape), k.step)


class MARSM(Matrix, paper="arXiv 2510.21800", idea="variance-reduced", about="variance-reduced gradients for Muon"):
    r"""MARS-M, variance reduction for Muon (`arXiv 2510.21800 <https://arxiv.org/abs/2510.21800>`_).

    .. math::
        C_t &= G_t + \gamma\,\tfrac{\beta}{1-\beta}(G_t - G_{t-1}), \qquad
        M_t = \beta M_{t-1} + (1-\beta)\, C_t / \max(1, \|C_t\|_F) \\
        W_t &= (1-\eta\lambda) W_{t-1} - 0.2\,\eta\sqrt{\max(m, n)}\ \mathrm{polar}(M_t)

    with m and n the first two axes of the weight and :math:`G_0 = 0`. This is the approximate form, the authors'
    default, as in :class:`MARS`. ``memory_efficient=True`` is their second class, the same without the bound of
    the norm, for which no gradient has to be remembered:

    .. math::
        S_t = \beta S_{t-1} + (1-\gamma)(1-\beta)\, G_t, \qquad M_t = S_t + \gamma\, G_t

    With :math:`\gamma = 1-\beta` this is the look-ahead of :class:`.muon.Muon`: Muon with Nesterov momentum is
    MARS-M, and the published :math:`\gamma` of 0.025 is half of it. Follows the released code, in which the norm is
    always bounded (an argument ``clip_c`` is never read). The released code orthogonalises each k x k slice of a
    convolution kernel; here kernels are matrices (out, in * k * k), and the factor is from the first two axes in both.
    State: ``m`` and ``last`` of the parameter's shape, or only ``m``, which then is :math:`S_t`.

    Use it where Muon is used. The authors compare it with Moonlight's Muon on GPT-2 small to XL (OpenWebText and
    FineWeb-Edu, 100k steps of 480 sequences) and report lower losses, as curves without numbers.

    Args:
        lr: Learning rate :math:`\eta`. As released; for GPT-2 small, medium, large on OpenWebText 6e-3, 5e-3, 5e-3.
        momentum: :math:`\beta`. As released.
        gamma: Weight :math:`\gamma` of the correction, from 0 to 1. As released.
        weight_decay: Decoupled weight decay :math:`\lambda`. As released; 0.01 in the authors' configurations for
            GPT-2, 0.1 in their README.
        memory_efficient: Whether to remember no gradient, and not to bound the norm.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.MARSM(groups, lr=0.5, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.1414,  0.0000],
                [ 0.0000,  0.1414]])
    """

    lr: float = 1e-3
    momentum: float = 0.95
    gamma: Annotated[float, number(0, 1)] = 0.025
    weight_decay: float = 0.1
    memory_efficient: bool = False
    orthogonalizer: str = "kj5"
    averages = ("m", "last")

    @staticmethod
    def buffers(shape, h):
        return ("m",) if h.memory_efficient else ("m", "last")

    @staticmethod
    def scalars(t, h, shape):
        return {"step": h.lr * 0.2 * sqrt(max(shape[:2]))}

    @staticmethod
    def update(g, s, k, observe):
        if k.memory_efficient:
            add_(s.m.mul_(k.momentum), g, (1 - k.gamma) * (1 - k.momentum))
            momentum = s.m + k.gamma * g
        else:
            momentum = ema_(s.m, _corrected(g, s, k, k.momentum), k.momentum)
        o, _ = yield Polar(momentum, k.orthogonalizer)
        return Move(o, k.step)
