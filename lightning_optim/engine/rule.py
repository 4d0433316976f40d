"""What an optimizer rule is.

A rule is a small immutable object: the names and shapes of its state tensors, the scalars it needs at step
``t``, and one function that updates its state **in place** from a gradient, and the parameter with it. It knows
nothing of parameter groups, precision, checkpoints or devices: the engine (:mod:`.optimizer`, :mod:`.step`) owns
those and may hand the function a whole tensor, a slice of one, or a stack of several.

Three kinds exist, by what the function has to see:

- :class:`ElementwiseRule`: any slice of any tensor;
- :class:`MatrixRule`: a stack ``(k, *shape)`` of equal-shape tensors. It says how the parameters are to move
  (:class:`Move`), so that these can be elsewhere. Where its update needs a polar factor it yields the matrices, so that
  the engine can orthogonalise those of many stacks at once;
- :class:`GroupRule`: every tensor, plus a few inner products summed over all tensors of the parameter group.

``scalars`` runs on the host in double precision, once per step and not per element, so that the update functions
hold no powers of ``t``; what it returns may also reach ``update`` as 0-d tensors (a compiled kernel must not
depend on their values), which is why updates use the helpers below instead of ``alpha=`` and ``value=``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .arithmetic import add_, shrink_
from .hyperparameters import Constraint

Shape = tuple[int, ...]
Hyperparameters = Mapping[str, Any]
Scalars = dict[str, Any]
Observer = Callable[[str, Tensor], None]
#: A state tensor of the parameter's own shape.
LIKE_PARAMETER = None


def like(*names: str) -> Callable[[Shape, Hyperparameters], dict[str, Shape | None]]:
    """State made of tensors of the parameter's own shape.

    >>> like("m", "v")((3, 2), {})
    {'m': None, 'v': None}
    """
    return lambda shape, hp: dict.fromkeys(names, LIKE_PARAMETER)


def ignore(name: str, value: Tensor) -> None:
    """The observer of a step that nobody watches."""


class Move(NamedTuple):
    """How a stack of parameters moves: ``p = keep * p - step * direction``.

    Args:
        direction: A tensor of the stack's shape.
        step: A number, or a tensor that broadcasts against the stack.
        keep: Likewise, the factor of weight decay.

    Example:
        >>> p = torch.ones(1, 2, 2)
        >>> Move(torch.eye(2)[None], step=0.5, keep=0.9).apply_(p)
        tensor([[[0.4000, 0.9000],
                 [0.9000, 0.4000]]])
    """

    direction: Tensor
    step: float | Tensor
    keep: float | Tensor

    def apply_(self, p: Tensor) -> Tensor:
        """Move parameters in place."""
        p = shrink_(p, self.keep)
        if isinstance(self.step, Tensor):
            return p.addcmul_(self.direction, self.step, value=-1)  # Without the temporary of add_.
        return add_(p, self.direction, -self.step)


#: What an update that orthogonalises is; see :class:`MatrixRule`.
Orthogonalizing = Generator[tuple[Any, ...], Any, Move]


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The first divided by the second."""
    return numerator / denominator


@dataclass(frozen=True)
class Internal:
    """A scalar of a rule's own that is worth watching.

    It is made of sums over elements, so that it is right for shards of a tensor and for several tensors together. Two
    rules that give the same name to one must mean the same by it.

    Args:
        description: One line.
        sums: What has to be added up, a tuple of 0-d tensors: from the reported value, ``sums(value)``, or from the
            state after the step, ``sums(g, t, hyperparameters, **state)``.
        reported: The name under which ``update`` reports the value; ``None`` for one made of the state.
        value: The scalar, from the added sums, element by element.
    """

    description: str
    sums: Callable[..., tuple[Tensor, ...]]
    reported: str | None = None
    value: Callable[..., Tensor] = ratio


def mean_of(reported: str, description: str) -> Internal:
    """The mean over all entries of a reported value."""
    return Internal(description, lambda x: (x.sum(), x.new_tensor(float(x.numel()))), reported)


def gradient_to_variance(v: str = "v", what: str = "second moment") -> Internal:
    """Squared gradients over their running average.

    Far above 1 the average lags behind a growing gradient, from which loss spikes come (arXiv 2506.04805).

    Args:
        v: Name of the state tensor, an average with ``betas[1]`` that starts at zero.
        what: What it is an average of.
    """

    def sums(g: Tensor, t: int, hp: Hyperparameters, **state: Tensor) -> tuple[Tensor, ...]:
        average = state[v].sum() / (1 - hp["betas"][1] ** t)
        return g.to(average.dtype).square().sum(), average

    return Internal(f"mean squared gradient over the mean {what} (bias-corrected)", sums)


@dataclass(frozen=True)
class Rule:
    """What all kinds of rule have in common.

    Args:
        name: Name under which parameter groups and checkpoints refer to the rule.
        state: ``(shape, hyperparameters) -> {name: shape}``, the state tensors for one tensor of the given shape;
            ``None`` stands for the parameter's own shape. All start at zero.
        scalars: ``(t, hyperparameters) -> {name: scalar}``, with ``t`` counting the parameter's steps from 1.
            Matrix rules also get ``shape=``; rules with ``host_state`` also get ``host=``.
        update: ``(p, g, **state, **scalars)``, in place on ``p`` and the state; ``g`` is read only. Matrix rules do
            without ``p``; see there.
        host_state: Names of scalar state that ``scalars`` reads and writes in its ``host`` dictionary.
        constraints: What hyperparameters must be that are this rule's alone; see :mod:`.hyperparameters`.
        fixed: Hyperparameters, beside those that decide on the state, that cannot change after the first step.
        capturable: Whether the update takes its numbers as tensors, too, and decomposes no matrices, so that a CUDA
            graph can hold it.
        internals: Scalars of its own that are worth watching, by name.
    """

    name: str
    state: Callable[[Shape, Hyperparameters], dict[str, Shape | None]]
    scalars: Callable[..., Scalars]
    update: Callable[..., Any]
    host_state: tuple[str, ...] = ()
    constraints: Mapping[str, Constraint] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    capturable: bool = True
    internals: Mapping[str, Internal] = field(default_factory=dict)

    kind = "abstract"


@dataclass(frozen=True)
class ElementwiseRule(Rule):
    """A rule whose update of one element depends on that element only."""

    kind: Literal["element-wise"] = field(default="element-wise", init=False)


@dataclass(frozen=True)
class MatrixRule(Rule):
    """A rule that sees whole tensors, ``k`` equal ones at a time, and may report what it computed on the way.

    ``update(g, **state, **scalars)`` changes the state and returns the :class:`Move` of the parameters, which it does
    not see. They may be on other processes than it runs on, and these know the scalars: a ``step`` or ``keep`` of the
    move that is a number has to be the scalar of that name. What is a tensor is sent to them.

    It gets one more keyword, ``observe(name, value)``, to call with intermediate results worth watching. It may be a
    generator: ``factor = yield matrices, method`` orthogonalises a stack of matrices by a method of
    :func:`lightning_optim.polar.orthogonalize`. The factor is read only. The engine reports both, as ``"momentum"`` and
    ``"orthogonal_factor"``.

    Where processes hold some rows each of a matrix, a rule that is ``by_rows`` runs on those. What it needs to know of
    all rows it adds up over its own and yields, too: ``factor, norm = yield matrices, method, squared_norm(g)`` returns
    the sum over all processes.

    Args:
        by_rows: Whether the update needs whole matrices for the polar factor and for such sums only. Its state that is
            not of the parameter's shape has to come of such sums.
        flatten: Whether tensors with more than two axes arrive as matrices ``(k, shape[0], rest)``; otherwise as
            they are, ``(k, *shape)``.
        phases: ``None``, or ``hyperparameters -> n``: parameters are dealt to ``n`` schedules, and ``scalars`` also
            gets ``phase=``, the parameter's position in its group modulo ``n``.
    """

    by_rows: bool = False
    flatten: bool = True
    phases: Callable[[Hyperparameters], int] | None = None
    kind: Literal["matrix"] = field(default="matrix", init=False)


@dataclass(frozen=True)
class GroupRule(Rule):
    """An element-wise rule that needs a few sums over the whole parameter group first.

    Per step: ``sums(p, g, **state, **scalars) -> tuple`` of 0-d tensors on every tensor, which changes nothing, added
    up over the group; ``combine(*sums, **group_state, **scalars)`` once, which returns the new group state and
    coefficients; ``update(p, g, **state, **scalars, **coefficients)`` on every tensor.

    Args:
        group_state: Initial values of the scalars that belong to the group. Each tensor of the group keeps a copy,
            so that checkpoints need no place of their own for them.
    """

    group_state: Mapping[str, float] = field(default_factory=dict)
    sums: Callable[..., tuple[Tensor, ...]] = field(kw_only=True)
    combine: Callable[..., tuple[dict[str, Tensor], Scalars]] = field(kw_only=True)
    kind: Literal["group"] = field(default="group", init=False)
