"""Whether an update has become a sign vector."""

from __future__ import annotations

from torch import Tensor

from .parameter_change import Change, Sums


def sign_collapse_sums(change: Change) -> Sums:
    """The sums that :func:`sign_collapse` needs."""
    return {"numel": change.numel, "update_abs": change.update_abs, "update_sq": change.update_sq}


def sign_collapse(*, numel: Tensor, update_abs: Tensor, update_sq: Tensor) -> dict[str, Tensor]:
    r"""How equal the magnitudes of the entries of an update are.

    .. math:: \frac{\|u\|_1^2}{d\,\|u\|_2^2} \in [1/d, 1]

    It is 1 where all entries have the same magnitude (the update is a multiple of a sign vector, as in Adam with
    gradients that are all signal or with :math:`\beta_1 = \beta_2 = 0`), :math:`2/\pi \approx 0.64` for a Gaussian
    update and :math:`1/d` for an update of a single entry.

    Example:
        >>> import torch
        >>> u = torch.tensor([0.1, -0.1, 0.1, -0.1])
        >>> sign_collapse(**sign_collapse_sums(Change(["w"], [u], [u], [u], [0.1])))
        {'index': tensor([1.])}
    """
    return {"index": update_abs**2 / (numel * update_sq)}
