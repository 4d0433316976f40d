r"""How much of an update is noise.

With :math:`d` an update of the parameters, seen as a random vector, its variance is

.. math:: V = \mathbb{E}\,\|d - \mathbb{E} d\|^2

and :math:`\|\mathbb{E} d\|^2` is what does not average out. There are two estimates of them, which mean different
things: *online*, over the steps of training, which move the weights meanwhile; and *conditional*, over mini-batches
of one step, given the weights and the state of the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .parameter_change import Sums, inner_products, sum_of_squares


def running_moments(
    xs: list[Tensor], means: list[Tensor], moments: Tensor, decay: float
) -> tuple[list[Tensor], Tensor]:
    r"""Add a value of each of n vectors to their exponentially weighted means and variances.

    The value that came :math:`i` values ago has the weight :math:`w_i \propto \beta^i`, and weights sum to 1.

    Args:
        xs: The values.
        means: :math:`m = \sum_i w_i x_i` up to now; zeros at first.
        moments: Shape ``(n, 3)``: the sum of weights before they are made to sum to 1, :math:`1 - \beta^t`;
            :math:`q = \sum_i w_i^2`; and :math:`\sum_i w_i \|x_i - m\|^2`. Zeros at first.
        decay: :math:`\beta`.

    Returns:
        The new ``means`` and ``moments``.

    Example:
        >>> means, moments = [torch.zeros(2)], torch.zeros(1, 3)
        >>> for x in ([1.0, 0.0], [3.0, 0.0]):
        ...     means, moments = running_moments([torch.tensor(x)], means, moments, decay=0.5)
        >>> means, moments  # weights 1/3 and 2/3
        ([tensor([2.3333, 0.0000])], tensor([[0.7500, 0.5556, 0.8889]]))
    """
    weight, overlap, spread = moments.unbind(-1)
    weight = decay * weight + (1 - decay)
    share = (1 - decay) / weight
    deltas = torch._foreach_sub(xs, means)
    steps = torch._foreach_mul(deltas, [s.to(d) for s, d in zip(share, deltas)])
    spread = (1 - share) * (spread + share * sum_of_squares(deltas))
    overlap = (1 - share) ** 2 * overlap + share**2
    return list(torch._foreach_add(means, steps)), torch.stack([weight, overlap, spread], -1)


def online_sums(means: Sequence[Tensor], moments: Tensor) -> Sums:
    r"""Variance and squared mean from what :func:`running_moments` keeps for each vector.

    Both are unbiased for uncorrelated values: the variance is :math:`\sum_i w_i \|x_i - m\|^2 / (1 - q)`, the squared
    mean :math:`\|m\|^2 - q V`. They are NaN after a single value.
    """
    _, overlap, spread = moments.unbind(-1)
    variance = spread / (1 - overlap)
    return {"variance": variance, "mean_sq": sum_of_squares(means) - overlap * variance}


def conditional_sums(updates: Sequence[Sequence[Tensor]]) -> Sums:
    """Sums over elements that :func:`conditional_variance` needs.

    Args:
        updates: For each of K mini-batches the updates of all parameters.
    """
    count = len(updates)
    means = [torch.stack(xs).mean(0) for xs in zip(*updates)]
    deviations = [sum_of_squares([x - m for x, m in zip(xs, means)]) for xs in updates]
    sums = {"variance": torch.stack(deviations).sum(0) / (count - 1), "biased_mean_sq": sum_of_squares(means)}
    for k, xs in enumerate(updates):
        sums |= {f"square_{k}": sum_of_squares(xs), f"product_{k}": inner_products(xs, means)}
    return sums


def conditional_variance(*, variance: Tensor, biased_mean_sq: Tensor, **sums: Tensor) -> dict[str, Tensor]:
    r"""Spread of the updates :math:`d_1, \dots, d_K` that K mini-batches lead to from one state of the optimizer.

    With their mean :math:`\bar d`:

    - ``conditional``: :math:`V = \frac{1}{K-1}\sum_k \|d_k - \bar d\|^2`;
    - ``conditional_ratio``: :math:`V / (\|\bar d\|^2 - V/K)`, the denominator being the unbiased estimate of
      :math:`\|\mathbb{E} d\|^2`; NaN where that is not positive;
    - ``conditional_share``: :math:`V / \mathbb{E}\,\|d\|^2`, 1 where that denominator is not positive;
    - ``cosine_spread``: :math:`1 - \frac1K \sum_k \cos(d_k, \bar d)`, from 0 (all in one direction) to about
      :math:`1 - 1/\sqrt K` (no common direction).

    Args:
        variance: :math:`V`.
        biased_mean_sq: :math:`\|\bar d\|^2`.
        **sums: ``square_k``, :math:`\|d_k\|^2`, and ``product_k``, :math:`\langle d_k, \bar d\rangle`, for each k.

    Example:
        >>> up, right = torch.tensor([0.0, 2.0]), torch.tensor([2.0, 0.0])
        >>> spread = conditional_variance(**conditional_sums([[up], [right]]))
        >>> {name: round(x.item(), 4) for name, x in spread.items()}  # mean (1, 1), both at 45 degrees to it
        {'conditional': 4.0, 'conditional_ratio': nan, 'conditional_share': 1.0, 'cosine_spread': 0.2929}
    """
    count = len(sums) // 2
    cosines = [sums[f"product_{k}"] / (sums[f"square_{k}"] * biased_mean_sq).sqrt() for k in range(count)]
    return {
        "conditional": variance,
        "conditional_ratio": noise_to_signal(variance, biased_mean_sq - variance / count),
        "conditional_share": noise_share(variance, biased_mean_sq - variance / count),
        "cosine_spread": 1 - torch.stack(cosines).mean(0),
    }


def noise_to_signal(variance: Tensor, mean_sq: Tensor) -> Tensor:
    r""":math:`V / \|\mathbb{E} d\|^2`, and NaN where noise hides the mean so far that its estimate is not positive."""
    return torch.where(mean_sq > 0, variance / mean_sq, torch.nan)


def noise_share(variance: Tensor, mean_sq: Tensor) -> Tensor:
    r""":math:`V / (V + \|\mathbb{E} d\|^2)`, from 0 to 1; 1 where the estimate of the mean is not positive.

    >>> noise_share(torch.tensor([3.0, 3.0, 0.0]), torch.tensor([1.0, -1.0, 0.0]))
    tensor([0.7500, 1.0000,    nan])
    """
    return variance / (variance + mean_sq.clamp(min=0))
