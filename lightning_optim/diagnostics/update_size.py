"""How far the parameters move, and in which direction."""

from __future__ import annotations

from torch import Tensor

from .change import Change, Sums

#: An update of a thousandth of the weight per step is a common guide for hidden weights during most of a run
#: (A. Karpathy, "Building makemore 3"); far above it training is unstable, far below it slow.
UPDATE_TO_WEIGHT_GUIDE = 1e-3


def update_size_sums(change: Change) -> Sums:
    """The sums that :func:`update_size` needs."""
    return {
        "numel": change.numel,
        "update_sq": change.update_sq,
        "driven": change.driven,
        "stalled": change.stalled,
        "weight_sq": change.weight_sq,
        "gradient_sq": change.gradient_sq,
        "update_dot_gradient": change.update_dot_gradient,
    }


def update_size(
    *,
    numel: Tensor,
    update_sq: Tensor,
    driven: Tensor,
    stalled: Tensor,
    weight_sq: Tensor,
    gradient_sq: Tensor,
    update_dot_gradient: Tensor,
) -> dict[str, Tensor]:
    r"""Size and direction of updates :math:`u`, for one parameter or several taken together.

    Returns:
        - ``rms``: :math:`\|u\| / \sqrt{d}`, in units of the weights;
        - ``to_weight``: :math:`\|u\| / \|\theta\|`, :math:`\theta` being the weights after the step;
        - ``cosine_to_descent``: :math:`-\langle u, g\rangle / (\|u\|\,\|g\|)`, 1 for plain gradient descent;
        - ``stalled``: of the elements with a gradient other than zero, the fraction whose value did not change, as
          when updates are below the resolution of bfloat16 weights.

    Ratios of zero to zero are NaN.

    Example:
        >>> import torch
        >>> u, g = torch.tensor([-0.03, 0.0, -0.04, 0.0]), torch.tensor([3.0, 0.0, 4.0, 0.0])
        >>> change = Change(["w"], [torch.full((4,), 5.0)], [u], [g], [0.01])
        >>> {name: round(float(x), 4) for name, x in update_size(**update_size_sums(change)).items()}
        {'rms': 0.025, 'to_weight': 0.005, 'cosine_to_descent': 1.0, 'stalled': 0.0}
    """
    return {
        "rms": (update_sq / numel).sqrt(),
        "to_weight": (update_sq / weight_sq).sqrt(),
        "cosine_to_descent": -update_dot_gradient / (update_sq * gradient_sq).sqrt(),
        "stalled": stalled / driven,
    }
