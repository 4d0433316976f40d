"""How far the parameters move, and in which direction."""

from __future__ import annotations

from torch import Tensor


def update_size(*, numel: Tensor, update_sq: Tensor, weight_sq: Tensor) -> dict[str, Tensor]:
    r"""Size of updates :math:`u`, for one parameter or several taken together.

    An update of a thousandth of the weight per step is a common guide for hidden weights during most of a run
    (A. Karpathy, "Building makemore 3"); far above it training is unstable, far below it slow.

    Args:
        numel: Number :math:`d` of elements.
        update_sq: Sum of squared updates.
        weight_sq: Sum of squared weights :math:`\theta`.

    Returns:
        - ``rms``: :math:`\|u\| / \sqrt{d}`, in units of the weights;
        - ``to_weight``: :math:`\|u\| / \|\theta\|`.

        Ratios of zero to zero are NaN.

    Example:
        >>> import torch
        >>> from lightning_optim.diagnostics import Change
        >>> u, weights = torch.tensor([-0.03, 0.0, -0.04, 0.0]), torch.full((4,), 5.0)
        >>> change = Change(["w"], [weights], [u], [u], [0.01])
        >>> update_size(numel=change.numel, update_sq=change.update_sq, weight_sq=change.weight_sq)
        {'rms': tensor([0.0250]), 'to_weight': tensor([0.0050])}
    """
    return {"rms": (update_sq / numel).sqrt(), "to_weight": (update_sq / weight_sq).sqrt()}


def cosine(product: Tensor, x_sq: Tensor, y_sq: Tensor) -> Tensor:
    """Cosine of the angle between two vectors from their inner product and squared norms; NaN if one is zero."""
    return product / (x_sq * y_sq).sqrt()
