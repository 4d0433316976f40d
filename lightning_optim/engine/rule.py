"""What a rule is: how one step updates state and moves parameters.

A rule is a class that is never instantiated. Annotated fields are its hyperparameters, a few class attributes name its
state, and two functions are the algorithm: ``scalars`` computes numbers on the host, once per step, and ``update``
changes the state **in place** and returns a :class:`Move`. It is independent of parameter groups, precision,
checkpoints, devices and ranks: the engine handles those and may pass ``update`` a whole tensor, a slice of one, or a
stack of several. *A rule returns a direction and a step; the engine moves the parameters*: it applies ``maximize``,
weight decay, the sign of the step and rounding, once for all rules.

There are four kinds, by what ``update`` needs:

- :class:`ElementwiseRule`: any slice of any tensor;
- :class:`MatrixRule`: a stack ``(k, *shape)`` of equal-shape tensors. Where it needs a polar factor it yields a
  :class:`Polar`, so that the engine can orthogonalise the matrices of many stacks at once;
- :class:`GroupRule`: every tensor, plus a few inner products summed over all tensors of the parameter group;
- :class:`ModelRule`: the same over all parameter groups, and the loss.

Arguments have the same names everywhere:

- ``t``: the parameter's step, from 1; ``h``: hyperparameters as attributes (``h.lr``; ``betas`` also as ``h.beta1`` and
  ``h.beta2``); ``shape``: shape of one tensor of the stack.
- ``g``: the gradient in float32 or float64, read only; ``s``: state tensors as attributes, and the parameter before
  the step, of the gradient's dtype and read only, as ``s.parameter`` (see :attr:`MatrixRule.reads_parameter`); ``k``:
  numbers as attributes: all hyperparameters, and what ``scalars`` returned. In compiled steps they are 0-d tensors,
  which is why updates use the functions of :mod:`.arithmetic`.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, TypeAlias

from torch import Tensor
from typing_extensions import dataclass_transform

from . import decay, switches
from .arithmetic import add_, add_quotient_, shrink_, shrink_aligned_
from .hyperparameters import GROUP_ENTRIES, Constraint, Field

Shape: TypeAlias = tuple[int, ...]
Observer: TypeAlias = Callable[[str, Tensor], None]
#: The shape of a state tensor that has the parameter's own.
LIKE_PARAMETER = None


# --- moves ------------------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """How parameters move: ``p <- keep * p - step * direction / over``.

    Args:
        direction: A tensor of the parameters' shape.
        step: A number, or a tensor that broadcasts to the parameters' shape.
        over: A positive tensor that divides the direction, in one operation with the step; ``None`` for 1.
        keep: The factor of weight decay, from a rule with a decay of its own (:attr:`Rule.own_decay`); ``None`` from
            all others, whose decay is the engine's (see :mod:`.decay`).

    Example:
        >>> import torch
        >>> p = torch.ones(1, 2, 2)
        >>> Move(torch.eye(2)[None], step=0.5).apply_(p, keep=0.9)
        tensor([[[0.4000, 0.9000],
                 [0.9000, 0.4000]]])
    """

    direction: Tensor
    step: float | Tensor
    over: Tensor | None = None
    keep: float | Tensor | None = None

    def apply_(self, p: Tensor, keep: float | Tensor, aligned: float | Tensor | None = None) -> Tensor:
        """Move parameters in place; ``keep`` and ``aligned`` are numbers of the step (see :func:`.decay.numbers`)."""
        if aligned is not None:
            shrink_aligned_(p, self.direction, self.step, aligned)
        p = shrink_(p, keep if self.keep is None else self.keep)
        if self.over is not None:
            return add_quotient_(p, self.direction, self.over, -self.step)
        if isinstance(self.step, Tensor) and self.step.ndim:
            return p.addcmul_(self.direction, self.step, value=-1)  # Needs no temporary, as add_ would.
        return add_(p, self.direction, -self.step)


class Polar(NamedTuple):
    """A request of a matrix rule: matrices to orthogonalise.

    ``factor, sums = yield Polar(matrices, method)`` returns the polar factors, read only, and ``sums`` over all rows of
    the matrices: where several ranks hold some rows each, the engine adds up the sums that they yield.

    Args:
        matrices: A stack ``(k, m, n)``.
        method: A method of :func:`lightning_optim.polar.orthogonalize`.
        sums: Sums over rows of this stack that the rule needs over all rows, such as ``squared_norm(g)``.
        reported: Whether the engine reports matrices and factor to observers. A rule that searches tries several, and
            reports the one that it takes.
    """

    matrices: Tensor
    method: str
    sums: tuple[Tensor, ...] = ()
    reported: bool = True


# --- internals --------------------------------------------------------------------------------------------------


def ignore(name: str, value: Tensor) -> None:
    """The observer of a step without one."""


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The first divided by the second."""
    return numerator / denominator


@dataclass(frozen=True)
class Internal:
    """A scalar that a rule offers to diagnostics.

    It is computed from sums over elements, so that it is right for shards of a tensor and for several tensors together.
    If two rules use one name, it has to mean the same in both.

    Args:
        description: One line.
        sums: The sums, a tuple of 0-d tensors: ``sums(value)`` of a reported value, or ``sums(g, s, t, h)`` of the
            state after the step.
        reported: The name under which ``update`` reports the value; ``None`` for a scalar of the state.
        value: Computes the scalar from the total sums, element by element.
    """

    description: str
    sums: Callable[..., tuple[Tensor, ...]]
    reported: str | None = None
    value: Callable[..., Tensor] = ratio


def mean_of(reported: str, description: str) -> Internal:
    """The mean over all entries of a reported value."""
    return Internal(description, lambda x: (x.sum(), x.new_full((), float(x.numel()))), reported)


def gradient_to_variance(v: str = "v", what: str = "second moment") -> Internal:
    """Squared gradients over their running average.

    Far above 1, the average lags behind a growing gradient, which causes loss spikes (arXiv 2506.04805).

    Args:
        v: Name of the state tensor, an average with ``betas[1]`` that starts at zero.
        what: The quantity that it averages.
    """

    def sums(g: Tensor, s: Any, t: int, h: Any) -> tuple[Tensor, ...]:
        average = getattr(s, v).sum() / (1 - h.beta2**t)
        return g.to(average.dtype).square().sum(), average

    return Internal(f"mean squared gradient over the mean {what} (bias-corrected)", sums)


# --- rules ------------------------------------------------------------------------------------------------------


def _own_fields(cls: type[Rule]) -> dict[str, Field]:
    """The fields that a class body declares; their defaults are removed, since groups hold the values."""
    annotations = inspect.get_annotations(cls)
    hints = typing.get_type_hints(cls, include_extras=True) if annotations else {}
    found = {}
    for name in annotations:
        hint = hints[name]
        if typing.get_origin(hint) is ClassVar or hint is ClassVar:
            continue
        if name == "params":
            continue
        if name not in cls.__dict__:
            raise TypeError(f"{cls.__name__}.{name}: a hyperparameter needs a default.")
        found[name] = Field.declared(name, hint, cls.__dict__[name], (cls.fields | cls.arguments).get(name))
        delattr(cls, name)
    return found


#: Older names of arguments, which are no hyperparameters of their own.
_OLDER_NAMES = ("decoupled",)
#: Every rule that is offered by name, in the order of declaration.
RULES: dict[str, type[Rule]] = {}


@dataclass_transform(field_specifiers=(dataclasses.field,))
class Rule:
    """A rule. Class keywords: ``about``, a one-line description; ``paper``, where it was published; and ``idea``, a few
    words by which the docs group the optimizers.

    A rule with ``about`` is offered by name: it is listed in :data:`RULES`. A rule whose sources leave something open
    that had to be derived also has ``experimental``, one sentence that says what; registry, help and docs show it.

    Attributes:
        name: Its name in parameter groups and checkpoints, that of the class.
        fields: Its hyperparameters, from the annotated fields; see :class:`.hyperparameters.Field`.
        constraints: Constraints on the entries of its parameter groups, by name.
        arguments: Other arguments of its constructor, where it has one: the engine's.
        buffers: Names of its state tensors, each of the parameter's shape and zero at first. Or a function
            ``buffers(shape, h)`` that returns names, or a mapping from names to shapes (``None``: the parameter's own).
        averages: Names of those state tensors of the parameter's shape that may be stored in low precision
            (``state_dtype``): running averages, and whatever else forgets a rounding error. Not what must be exact,
            such as copies of parameters, or what is compared with a nearly equal value. Or a function ``averages(h)``.
        squares: The same of state tensors that are never negative: second moments, variances.
        moments: What state tensors mean to other rules, which take them over when a run goes on with another optimizer
            (:mod:`.carry_over`): by name, what is averaged from zero, and the hyperparameter of its decay, as in
            ``{"m": ("g", "beta1")}``. A tensor with one entry along an axis averages the sums along that axis.
        host_state: Names of numbers that ``scalars`` keeps from step to step in its third argument, a dictionary.
        as_fallback: Defaults that differ where it is the fallback rule of an optimizer for matrices.
        fixed: Hyperparameters that cannot change after the first step, besides those that determine the state's shapes.
        own_decay: Whether ``update`` returns ``keep`` itself: always (``True``), or where the argument ``decay`` has
            this value. Otherwise weight decay is the engine's; see :mod:`.decay`.
        capturable: Whether a CUDA graph can record the update: it accepts its numbers as tensors, and decomposes no
            matrices.
        internals: Numbers that it offers to diagnostics, by name.
    """

    kind: ClassVar[str] = "abstract"
    name: ClassVar[str]
    about: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    idea: ClassVar[str] = ""
    experimental: ClassVar[str] = ""
    fields: ClassVar[dict[str, Field]] = {}
    constraints: ClassVar[dict[str, Constraint]] = {}
    arguments: ClassVar[dict[str, Field]] = {}
    buffers: ClassVar[Any] = ()
    averages: ClassVar[Any] = ()
    squares: ClassVar[Any] = ()
    moments: ClassVar[Mapping[str, tuple[str, str]]] = {}
    host_state: ClassVar[tuple[str, ...]] = ()
    as_fallback: ClassVar[Mapping[str, Any]] = {}
    fixed: ClassVar[tuple[str, ...]] = ()
    own_decay: ClassVar[bool | str] = False
    capturable: ClassVar[bool] = True
    internals: ClassVar[Mapping[str, Internal]] = {}
    #: Whether the fields that this class body declares, not its subclasses', are the engine's arguments.
    _of_the_engine: ClassVar[bool] = False

    def __init_subclass__(
        cls,
        about: str = "",
        paper: str = "",
        idea: str = "",
        experimental: str = "",
        name: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        own = _own_fields(cls)
        engine = own.keys() if cls.__dict__.get("_of_the_engine") else own.keys() & {*cls.arguments, *_OLDER_NAMES}
        cls.fields = cls.fields | {name: field for name, field in own.items() if name not in engine}
        if "weight_decay" in cls.fields:
            form = cls.fields.get("decay", decay.FIELD)
            cls.fields = cls.fields | {"decay": dataclasses.replace(form, kw_only=True)}
        if cls.fields:
            declared = {name: cls.fields.get(name, field) for name, field in switches.FIELDS.items()}
            cls.fields |= {name: dataclasses.replace(field, kw_only=True) for name, field in declared.items()}
        cls.constraints = GROUP_ENTRIES | {name: field.constraint for name, field in cls.fields.items()}
        arguments = {name: field for name, field in own.items() if name in engine}
        cls.arguments = arguments | {name: field for name, field in cls.arguments.items() if name not in arguments}
        if about or name or not hasattr(cls, "name"):
            cls.name = name or cls.__name__
        if about:
            cls.about, cls.paper, cls.idea, cls.experimental = about, paper, idea, experimental
            RULES[cls.name] = cls

    @staticmethod
    def scalars(t: int, h: Any, *details: Any) -> dict[str, Any]:
        """Numbers of step ``t`` that are the same for all elements, computed in float64.

        Matrix rules get the shape of a tensor as a third argument, rules with ``host_state`` that dictionary.
        """
        return {}

    @classmethod
    def hyperparameters(cls) -> dict[str, Any]:
        """Its hyperparameters and their defaults."""
        return {name: field.default for name, field in cls.fields.items()}


class ElementwiseRule(Rule):
    """A rule whose update of one element depends on that element only."""

    kind: ClassVar[str] = "element-wise"

    @staticmethod
    def update(g: Tensor, s: Any, k: Any) -> Move:
        """Update the state in place and return how the parameters move."""
        raise NotImplementedError


class MatrixRule(Rule):
    """A rule that works on whole tensors, ``k`` of equal shape at a time, and may report intermediate results.

    Shards of the parameter may be on ranks other than the one that runs the rule. These know ``k``, and are sent only
    tensors: if the ``step`` of a move is a number and there is a ``k.step``, the two must be equal.

    Where ranks hold some rows each of a matrix, a rule with ``by_rows`` runs on these rows: ``g``, state of the
    parameter's shape and the factor are rows, and sums over all rows have to be taken by :attr:`Polar.sums`. A rule
    without it runs on whole tensors, on one rank.

    Attributes:
        by_rows: Whether the update needs whole matrices only for the polar factor and for sums. State of another shape
            than the parameter's must then follow from such sums.
        flatten: Whether tensors with more than two axes are passed as matrices ``(k, shape[0], rest)``; otherwise as
            ``(k, *shape)``.
        reads_parameter: Whether the update reads ``s.parameter``, which has to be joined, converted or sent for it.
    """

    kind: ClassVar[str] = "matrix"
    by_rows: ClassVar[bool] = False
    flatten: ClassVar[bool] = True
    reads_parameter: ClassVar[bool] = False

    @staticmethod
    def phases(h: Any) -> int:
        """Over how many phases parameters are distributed; 0 for none.

        If there are phases, ``scalars`` takes a parameter's phase as a fourth argument: its position in the group,
        modulo their number.
        """
        return 0

    @staticmethod
    def update(
        g: Tensor, s: Any, k: Any, observe: Observer
    ) -> Move | Generator[Polar, tuple[Tensor, tuple[Tensor, ...]], Move]:
        """Update the state in place and return how the parameters move.

        It may be a generator that yields a :class:`Polar` for matrices to orthogonalise. It reports intermediate
        results by ``observe(name, value)``. The engine reports the matrices as ``"momentum"``, and their polar factors
        as ``"orthogonal_factor"``.
        """
        raise NotImplementedError


class GroupRule(Rule):
    """An element-wise rule that needs a few sums over the whole parameter group first.

    Attributes:
        group_state: Initial values of the numbers that belong to the group. The state of each of its parameters keeps
            a copy, so that checkpoints hold them like any other state.
    """

    kind: ClassVar[str] = "group"
    group_state: ClassVar[Mapping[str, float]] = {}

    @staticmethod
    def sums(g: Tensor, s: Any, k: Any) -> tuple[Tensor, ...]:
        """0-d tensors, to be added up over all tensors of the group; changes nothing."""
        raise NotImplementedError

    @staticmethod
    def combine(sums: tuple[Tensor, ...], s: Any, k: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The group's new state, and coefficients, which ``update`` finds in ``k``; called once per step."""
        raise NotImplementedError

    @staticmethod
    def update(g: Tensor, s: Any, k: Any) -> Move:
        """Update the state in place and return how the parameters move."""
        raise NotImplementedError


class ModelRule(GroupRule):
    """A group rule over the whole model that sees the loss of each step and may take the last step back.

    Its sums are taken over all parameter groups, which have one group state. ``combine`` also finds the loss in
    ``k.loss``, a number that is not negative, or infinity where the loss was not finite: gradients are zero then. The
    group state has an entry ``"taken_back"``, 1 after a step that took the last one back, and 0 otherwise: running
    statistics of the model then go back, too.
    """


# --- the arguments of a rule ------------------------------------------------------------------------------------


def hyperparameters_of(rule: type[Rule], group: Mapping[str, Any]) -> SimpleNamespace:
    """The hyperparameters of a parameter group as attributes, all of them plain numbers."""
    values = {name: group[name] if name not in OPTIONAL else entry(rule, group, name) for name in rule.fields}
    if values.get("decay") == "corrected":
        values["lr_max"] = decay.highest_rate(group)
    if "betas" in values and "momentum" in group:
        # A schedule that cycles Muon's momentum also sets it in the groups of the fallback rule.
        values["betas"] = (group["momentum"], values["betas"][1])
    return as_attributes(values)


def as_attributes(values: Mapping[str, Any]) -> SimpleNamespace:
    """Hyperparameters as attributes, with ``beta1`` and ``beta2`` of ``betas`` and a plain number for ``lr``."""
    found = dict(values)
    if "lr" in found:
        found["lr"] = float(found["lr"])
    if "betas" in found:
        found["beta1"], found["beta2"] = found["betas"]
    return SimpleNamespace(**found)


def numbers_of(rule: type[Rule], t: int, h: SimpleNamespace, *details: Any) -> dict[str, Any]:
    """The numbers of a step: hyperparameters, the numbers of weight decay, and the rule's scalars."""
    return lasting_numbers(rule, h) | rule.scalars(t, h, *details)


def lasting_numbers(rule: type[Rule], h: SimpleNamespace) -> dict[str, Any]:
    """The numbers that change only with the hyperparameters, including :func:`.decay.numbers`.

    Rules with a decay of their own also get ``weight_decay``: ``None`` where another form of decay is in use.
    """
    numbers = {name: x for name, x in vars(h).items() if name not in _NOT_NUMBERS}
    numbers |= decay.numbers(h) if "weight_decay" in rule.fields else decay.NONE
    numbers |= switches.numbers(h) if "cautious" in rule.fields else {}
    if rule.own_decay:
        own = gives_keep(rule, getattr(h, "decay", None))
        numbers["weight_decay"] = getattr(h, "weight_decay", 0.0) if own else None
        numbers["keep"] = 1.0 if own else numbers["keep"]
    return numbers


#: Hyperparameters that a parameter group has no entry for where they have the rule's default:
#: :mod:`torch.distributed.checkpoint` could not read folders of shards from before there were such entries.
OPTIONAL = ("decay", *switches.FIELDS)


def entry(rule: type[Rule], group: Mapping[str, Any], name: str) -> Any:
    """The value in a parameter group of one of the hyperparameters :data:`OPTIONAL`, ``None`` if the rule has none."""
    return group.get(name, rule.fields[name].default) if name in rule.fields else None


def decay_of(rule: type[Rule], group: Mapping[str, Any]) -> str | None:
    """The form of weight decay of a parameter group; ``None`` if the rule has no weight decay."""
    return entry(rule, group, "decay")


def gives_keep(rule: type[Rule], form: str | None) -> bool:
    """Whether the moves of a rule say ``keep`` with that form of weight decay."""
    return rule.own_decay is True or (rule.own_decay is not False and rule.own_decay == form)


#: Hyperparameters that the numbers of a step hold in another form.
_NOT_NUMBERS = ("betas", "weight_decay", "decay", "lr_max", *switches.FIELDS)


def buffers_of(rule: type[Rule], shape: Shape, h: Any) -> dict[str, Shape | None]:
    """The rule's state tensors for a tensor of a shape."""
    buffers: Any = rule.buffers
    if callable(buffers):
        buffers = buffers(shape, h)
    return dict(buffers) if isinstance(buffers, Mapping) else dict.fromkeys(_names(buffers), LIKE_PARAMETER)


def averages_of(rule: type[Rule], h: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the state tensors that may be stored in low precision: of any sign, and never negative."""
    averages, squares = (names(h) if callable(names) else names for names in (rule.averages, rule.squares))
    return tuple(_names(averages)), tuple(_names(squares))


def _names(names: Iterable[str]) -> Iterable[str]:
    if isinstance(names, str):
        raise TypeError(f"{names!r} is one string: write a tuple of names, ({names!r},).")
    return names
