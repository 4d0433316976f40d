"""SSO: orthogonalised momentum on the sphere of the spectral norm."""

from math import prod, sqrt
from typing import Annotated

import torch

from ..engine.arithmetic import ema_, mix
from ..engine.hyperparameters import SMALLEST, count, number
from ..engine.kinds import Matrix, Move
from ..engine.rule import LIKE_PARAMETER, Polar, mean_of
from ..engine.switches import NotCautious, Uncontrolled

#: First step from a multiplier in search of one on the other side of the root; doubled each time. As released.
_FIRST_STEP = 1e-3
#: A product on the other side of 0 has to be smaller by this to be taken, so that rounding does not break ties.
_OTHER_SIDE = 0.99
#: Of a momentum of norm 1, what is not along theta and is smaller than this is rounding errors.
_PARALLEL = 1e-5
#: Matrices with no larger entry count as zero.
_ZERO = 1e-30


def _unit(x):
    """Vectors ``(k, n, 1)`` over their norms; zero for zero."""
    return x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_(min=_ZERO)


def _scaled(x):
    """Matrices over their largest entries, and these; zero, over infinity, where they are zero."""
    size = x.abs().amax((-2, -1), keepdim=True)
    size = torch.where(size > _ZERO, size, torch.inf)
    return x / size, size


def _largest_singular(w, iterations):
    """The largest singular value of each matrix and its singular vectors, by power iteration from equal entries."""
    x, size = _scaled(w)
    v = _unit(torch.ones_like(w[:, :1, :].mT))
    for _ in range(iterations):
        u = _unit(x @ v)
        v = _unit(x.mT @ u)
    sigma = u.mT @ (x @ v)
    return torch.where(sigma > 0, size * sigma, 0.0), u, v


class SSO(
    Matrix,
    paper="arXiv 2601.08393",
    idea="orthogonalised",
    about="orthogonalised momentum on the sphere of the spectral norm",
):
    r"""SSO, the spectral sphere optimizer (`arXiv 2601.08393 <https://arxiv.org/abs/2601.08393>`_), and MuonSphere.

    Every weight matrix, m x n, stays at the spectral norm :math:`R = \rho\sqrt{m/n}`, and moves along the sphere of
    that radius:

    .. math::
        M_t &= \mu M_{t-1} + (1-\mu) G_t, \qquad \tilde M_t = (1-\mu) G_t + \mu M_t, \qquad
            \hat M_t = \tilde M_t / \|\tilde M_t\|_F \\
        (\sigma, u, v) &= \text{largest singular value and vectors of } W_{t-1}, \qquad \Theta = u v^\top \\
        \Phi_t &= \mathrm{polar}(\hat M_t + \lambda_t \Theta) \quad\text{with } \lambda_t \text{ such that}\quad
            \langle \Theta, \Phi_t \rangle = 0 \\
        W_t &= \frac{R}{\sigma} W_{t-1} - \eta R\, \Phi_t

    :math:`\Phi_t` is the steepest direction in the spectral norm among those that leave :math:`\sigma` as it is, up to
    second order in :math:`\eta`. The product :math:`\langle\Theta, \Phi\rangle` grows with :math:`\lambda`, so its root
    is found by bisection, one orthogonalisation per try. **MuonSphere** is ``tangent=False``: :math:`\lambda_t = 0`.
    The first step brings the weights to the sphere, from any initialisation. The step :math:`\eta R` is that of an
    update whose size follows the width of the layer, so that learning rates carry over between widths.

    As released, power iteration starts from a vector of equal entries in every step; the search for :math:`\lambda_t`
    starts from :math:`\lambda_{t-1}` with steps of 0.001, doubled until the sign changes, and takes the best that it
    met. At an exactly singular :math:`\hat M_t + \lambda\Theta` the product can jump over 0 (with
    ``orthogonalizer="exact"``, mostly of square matrices); then one of the sides is taken. A released weight decay is
    undone by the next retraction, so there is none here. A momentum along :math:`\Theta` moves nothing. The released
    code takes only matrices; convolutions are matrices (out, in * k * k) here. A matrix of zeros has no direction: it
    moves as in :class:`.muon.Muon` until it is none. State: ``m`` of the parameter's shape and, where ``tangent``,
    ``lam``, one number per matrix.

    Use it for wide models and where weights must not grow: it needs no weight decay, and its learning rate is the same
    for all widths. It costs the number of orthogonalisations that the search needs: the authors count 4 to 6 for
    ``tolerance=1e-3`` and 7 to 10 for 1e-4. Their final validation losses: dense, 1.7B parameters: AdamW 2.5933, Muon
    2.5585, MuonSphere 2.5506, SSO 2.5398; mixture of experts, 8B of which 1B are active: 2.5049, 2.4415, 2.4364,
    2.4216. Between widths of 256 and 2048 the best learning rate stays 1e-2.

    Args:
        lr: Learning rate :math:`\eta`, the step over the radius. That of the authors' runs; their sweeps over widths
            have their optimum at 1e-2.
        momentum: :math:`\mu`. As released.
        nesterov: ``False`` takes :math:`M_t` for :math:`\tilde M_t`.
        radius: :math:`\rho`. As released; in the authors' search 2 was best (loss 2.5887) and 1 gave 2.5970.
        tangent: Whether to search for :math:`\lambda_t`; ``False`` is MuonSphere.
        power_iterations: Iterations for :math:`\sigma, u, v`. That of paper and README; the released file has 5, whose
            estimate was too low by a few percent in tests.
        tolerance: The search ends where :math:`|\langle\Theta, \Phi\rangle|` is at most this. That of the released
            file; 1e-8 in paper and README. Single precision hardly reaches it: 1e-3 makes steps several times faster.
        max_tries: Most orthogonalisations per step. As released: the first, 10 to bracket the root, 20 of bisection.
        orthogonalizer: A name in :data:`lightning_optim.polar.METHODS`, or ``"exact"``. The search needs factors close
            to orthogonal, as released with eight steps.

    Example:
        >>> import torch, lightning_optim
        >>> w = torch.nn.Parameter(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> groups = [{"params": [w], "role": "matrix"}]
        >>> optimizer = lightning_optim.SSO(groups, lr=0.1, orthogonalizer="exact")
        >>> w.grad = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> optimizer.step()  # to spectral norm 1, and a turn
        >>> w.data
        tensor([[ 1.0000, -0.1000],
                [ 0.1000,  0.5000]])
    """

    lr: float = 5e-3
    momentum: float = 0.9
    nesterov: bool = True
    radius: Annotated[float, number(SMALLEST)] = 1.0
    tangent: bool = True
    power_iterations: Annotated[int, count()] = 20
    tolerance: Annotated[float, number(1e-12)] = 1e-6
    max_tries: Annotated[int, count()] = 31
    orthogonalizer: str = "pe8"
    cautious: NotCautious = False
    norm_control: Uncontrolled = "none"

    reads_parameter = True
    own_decay = True
    capturable = False  # How often it orthogonalises depends on the data.
    internals = {"spectral_norm": mean_of("spectral_norm", "mean over matrices of the spectral norm before the step")}
    averages = ("m",)
    moments = {"m": ("g", "momentum")}

    @staticmethod
    def buffers(shape, h):
        return {"m": LIKE_PARAMETER, "lam": (1, 1)} if h.tangent else {"m": LIKE_PARAMETER}

    @staticmethod
    def scalars(t, h, shape):
        r = h.radius * sqrt(shape[0] / max(1, prod(shape[1:])))
        return {"sphere": r, "step": h.lr * r}

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g, k.momentum)
        m = mix(g, s.m, k.momentum) if k.nesterov else s.m
        sigma, u, v = _largest_singular(s.parameter, k.power_iterations)
        observe("spectral_norm", sigma)
        keep = torch.where(sigma > 0, k.sphere / sigma, 1.0) if k.lr else torch.ones_like(sigma)
        if k.tangent:
            phi = yield from _tangent(m, u @ v.mT, s, k, observe)
        else:
            phi, _ = yield Polar(m, k.orthogonalizer)
        return Move(phi, k.step, keep=keep)


def _tangent(m, theta, s, k, observe):
    """The polar factor that has no part along theta; the multiplier is kept in the state."""
    m = _scaled(m)[0]  # Squares of tiny entries would vanish.
    m = m / torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True).clamp(min=_ZERO)
    rest = m - (m * theta).sum((-2, -1), keepdim=True) * theta
    moves = torch.linalg.vector_norm(rest, dim=(-2, -1), keepdim=True) > _PARALLEL
    m, lam = torch.where(moves, m, 0.0), torch.where(moves, s.lam, 0.0)
    low, high = torch.full_like(lam, -torch.inf), torch.full_like(lam, torch.inf)  # Where the product is < 0, >= 0.
    step = torch.full_like(lam, _FIRST_STEP)
    best, phi = high, torch.zeros_like(m)
    for _ in range(k.max_tries):
        o, _ = yield Polar(m + lam * theta, k.orthogonalizer, reported=False)
        product = (theta * o).sum((-2, -1), keepdim=True)
        margin = torch.where(product * best < 0, _OTHER_SIDE, 1.0)
        better = (product.abs() < margin * best.abs()) & (best.abs() > k.tolerance)
        best = torch.where(better, product, best)
        phi = torch.where(better, o, phi)
        s.lam.copy_(torch.where(better, lam, s.lam))
        low, high = torch.where(product < 0, lam, low), torch.where(product < 0, high, lam)
        bracketed = low.isfinite() & high.isfinite()
        middle = torch.lerp(low, high, 0.5)
        lam = torch.where(bracketed, middle, torch.where(high.isfinite(), high - step, low + step))
        step = torch.where(bracketed, step, 2 * step)
        if bool(((best.abs() <= k.tolerance) | (lam == low) | (lam == high)).all()):
            break
    observe("momentum", m + s.lam * theta)
    observe("orthogonal_factor", phi)
    return phi
