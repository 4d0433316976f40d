"""Weight decay: the forms that every optimizer takes, and the numbers of a step that each of them sets.

With the learning rate :math:`\\eta`, weight decay :math:`\\lambda` and the step :math:`u` that a rule makes:

- decoupled: :math:`\\theta \\leftarrow (1 - \\eta\\lambda)\\,\\theta - u`;
- coupled: :math:`\\lambda\\theta` is added to the gradient, and so enters every statistic of the rule;
- independent: :math:`\\theta \\leftarrow (1 - \\lambda)\\,\\theta - u`, whatever the learning rate, unless it is 0;
- cautious (arXiv 2510.12402): decoupled, of those elements only that :math:`u` does not move away from zero,
  :math:`\\theta u \\ge 0`;
- corrected (AdamC, arXiv 2506.02285):
  :math:`\\theta \\leftarrow (1 - \\eta\\lambda\\,\\eta/\\eta_{\\max})\\,\\theta - u`.

Rules whose decay comes after the step (SOAP, DeVA, LaProp) apply the factor to :math:`\\theta - u`; the cautious form
compares with :math:`\\theta` before the step everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from .hyperparameters import Field

Decay = Literal["decoupled", "coupled", "independent", "cautious", "corrected"]
#: Without the form in which the result of a rule cannot be corrected element by element.
UniformDecay = Literal["decoupled", "coupled", "independent", "corrected"]
#: With the form of a rule whose decay follows the size of its own step.
AdaptiveDecay = Literal["adaptive", "decoupled", "coupled", "independent", "cautious", "corrected"]
#: Forms in which the same value of ``weight_decay`` means about the same: they multiply it by the learning rate.
BY_LR = {"adaptive", "decoupled", "cautious", "corrected"}

#: What a rule with weight decay has if it declares no other form.
FIELD = Field.declared("decay", Decay, "decoupled")


def rate(h: Any) -> float:
    """The fraction of every parameter that is lost in a step; 0 for the forms that act otherwise."""
    if h.decay == "independent":
        return h.weight_decay if h.lr else 0.0  # A step with lr = 0 changes nothing: it may be there to create state.
    if h.decay == "corrected":
        return h.lr * h.weight_decay * (h.lr / highest if (highest := getattr(h, "lr_max", h.lr)) else 1.0)
    return 0.0 if h.decay in ("coupled", "cautious") else h.lr * h.weight_decay


def keep(h: Any) -> float:
    """What a parameter is multiplied by: ``1 - rate(h)``."""
    return 1 - rate(h)


def numbers(h: Any) -> dict[str, Any]:
    """The numbers of a step: ``keep``; ``l2``, the coefficient of coupled decay; ``aligned``, that of cautious decay.

    The last two are ``None`` where there is none.
    """
    return {
        "keep": keep(h),
        "l2": float(h.weight_decay) or None if h.decay == "coupled" else None,
        "aligned": h.lr * h.weight_decay if h.decay == "cautious" and h.weight_decay else None,
    }


#: The same without weight decay.
NONE: dict[str, Any] = {"keep": 1.0, "l2": None, "aligned": None}


def highest_rate(group: Mapping[str, Any]) -> float:
    """The highest learning rate of a schedule, as far as a parameter group shows it.

    Schedulers of torch write the rate that they multiply to ``"initial_lr"``, and OneCycleLR its peak to ``"max_lr"``.
    """
    return max(float(group[name]) for name in ("lr", "initial_lr", "max_lr") if name in group)


def renamed(settings: dict[str, Any], default: str, where: str) -> dict[str, Any]:
    """Settings with ``decay`` in the place of ``decoupled``, its older name in some optimizers.

    >>> renamed({"decoupled": False, "lr": 0.1}, "decoupled", "MVNGrad")
    {'lr': 0.1, 'decay': 'coupled'}

    Args:
        settings: Arguments of an optimizer or entries of a parameter group.
        default: The form that the optimizer has by default.
        where: The optimizer, for messages.

    Raises:
        ValueError: ``decoupled`` is no switch, or says something else than ``decay``.
    """
    settings = dict(settings)
    decoupled = settings.pop("decoupled", None)
    if decoupled is None:
        return settings
    if not isinstance(decoupled, bool):
        raise ValueError(f"{where}: decoupled must be None or True or False, got decoupled={decoupled!r}.")
    form = "decoupled" if decoupled else "coupled"
    if (given := settings.get("decay", default)) not in (default, form):
        raise ValueError(
            f"{where}: decoupled={decoupled} and decay={given!r} contradict each other; give decay alone "
            f"({', '.join(get_args(Decay))})."
        )
    return {**settings, "decay": form}
