"""Switches that every optimizer takes and that change its steps, whatever the rule: ``cautious``, ``norm_control``.

With the gradient :math:`g`, a rule's step :math:`u` (:math:`\\theta \\leftarrow \\theta - u`) and :math:`n` elements:

- ``cautious`` (arXiv 2411.16085): elements of the step whose sign is not the gradient's are zero, the others grow,
  :math:`u \\leftarrow \\frac{n}{\\|m\\|_0 + 1}\\, m \\odot u` with :math:`m = [u \\odot g > 0]`. Weight decay is not
  masked.
- ``norm_control="hyperball"`` (arXiv 2606.16899): with :math:`R = \\|\\theta\\|_F` and
  :math:`v = \\theta - \\eta R\\,u/\\|u\\|_F`, :math:`\\theta \\leftarrow R\\,v/\\|v\\|_F`. It takes the place of weight
  decay.
- ``norm_control="radial"``, the radial brake: with :math:`v = \\theta - u`, after weight decay,
  :math:`\\theta \\leftarrow (\\|\\theta\\| + s\\,(\\|v\\| - \\|\\theta\\|))\\,v/\\|v\\|`, where :math:`s` is 1/2 if the
  norm grows, and 1 otherwise.

Sums are over each matrix of a matrix rule, and over each parameter of other rules. The norms of vectors are not
controlled: many begin at zero, which hyperball could not leave. What is declared is here; :mod:`.displacement` does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from .hyperparameters import Field

NormControl = Literal["none", "hyperball", "radial"]
_REASON = "since this optimizer relies on steps that are made as its rule makes them"
#: The switches of rules whose steps have to be made as they are.
NotCautious = Annotated[Literal[False], (lambda x: x is False, f"False, {_REASON}")]
Uncontrolled = Annotated[Literal["none"], (lambda x: x == "none", f"'none', {_REASON}")]

#: What a rule has if it declares nothing else.
FIELDS: dict[str, Field] = {
    "cautious": Field.declared("cautious", bool, False),
    "norm_control": Field.declared("norm_control", NormControl, "none"),
}


def numbers(h: Any) -> dict[str, Any]:
    """What a step has to know of them: nothing where all are off, so that it is the step without them."""
    off = not h.cautious and h.norm_control == "none"
    return {} if off else {"cautious": h.cautious, "norm_control": h.norm_control}


def is_adjusted(scalars: Mapping[str, Any]) -> bool:
    """Whether steps with these numbers are others than those of the rule."""
    return "cautious" in scalars


def adjusting(scalars: Mapping[str, Any], axes: int) -> dict[str, Any] | None:
    """The numbers of steps that are others than those of the rule; ``None`` where they are not.

    Args:
        scalars: The numbers of a step.
        axes: How many axes the tensors have.
    """
    if not is_adjusted(scalars):
        return None
    if axes < 2:
        return {**scalars, "norm_control": "none"} if scalars["cautious"] else None
    if scalars["norm_control"] == "hyperball":
        return {**scalars, "keep": 1.0, "aligned": None}
    return dict(scalars)
