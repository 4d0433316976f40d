"""How parameters are really used, recorded while a model runs once, and where that differs from their routes.

Routing guesses from names, classes and sizes. :func:`record_uses` watches the operations of one training step: which
parameters are multiplied with, looked up, or only added; which axis of a weight is its output; into which parts that
output is split; what goes into the loss. It changes nothing. :func:`differences` compares, and :func:`mended` is the
:class:`.Grouping` that routes by what was seen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .engine.layout import layout_of
from .engine.two_rules import MatrixOptimizer
from .grouping import Grouping
from .names import clean_name
from .processes import placements
from .routing import Route, matrix_rows, route

__all__ = ["Difference", "RoutingCheck", "Use", "differences", "grouping_line", "mended", "record_uses"]


@dataclass
class Use:
    """What was seen of one parameter."""

    how: set[str] = field(default_factory=set)
    """Kinds of operations: product, convolution, look-up, other."""

    stacked: int = 1
    """How many matrices are stacked along its first axis."""

    transposed: bool = False
    """Whether its output axis comes after its input axis."""

    parts: tuple[int, ...] = ()
    """Rows of the parts that the output of each of these is split into; empty if it is not."""

    interleaved: bool = False
    """Whether these rows alternate."""

    head: bool = False
    """Whether what it makes goes into the loss as it is."""

    by_head: bool = False
    """Whether the output is split within each of several heads."""

    router: bool = False
    """Whether what it makes is ranked, as experts are."""

    @property
    def words(self) -> str:
        """The same for a table."""
        words = sorted(self.how) or ["not used"]
        words += ["head"] * self.head + ["router"] * self.router
        return ", ".join(words)


@contextmanager
def record_uses(module: nn.Module) -> Iterator[dict[str, Use]]:
    """Record how parameters are used by what runs inside the context.

    Args:
        module: The module whose parameters are watched. Sharded and compiled ones show nothing.

    Yields:
        A dictionary that is filled when the context ends: parameters by name, those of ``named_parameters()``.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9))
        >>> with record_uses(net) as uses:
        ...     loss = nn.functional.cross_entropy(net(torch.arange(4)), torch.arange(4))
        >>> {name: use.words for name, use in uses.items() if "weight" in name}
        {'0.weight': 'look-up', '1.weight': 'product', '2.weight': 'product, head'}
    """
    uses: dict[str, Use] = {}
    names = {p: name for name, p in nn.Module.named_parameters(module)}
    with _Recorder(names) as recorder:
        yield uses
    if not recorder.failed:
        uses |= {name: recorder.use(p) for p, name in names.items()}


# --- recording ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """A view of a parameter: for each of its axes, the axes of the parameter that are in it."""

    parameter: nn.Parameter
    axes: tuple[tuple[int, ...], ...]


@dataclass
class _Made:
    """What a product made of a parameter: the axes that its output axis became, outermost first, with their lengths."""

    parameter: nn.Parameter
    axes: tuple[tuple[int, int], ...]
    scores: bool = False
    """Whether it went through a softmax or a sigmoid."""
    slices: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Its parts: axis, start, stop and step of each."""
    whole: bool = False
    """Whether it was used as a whole, too."""


_SAME = ("detach", "alias", "clone", "_to_copy", "lift_fresh", "contiguous", "to", "native_dropout", "dropout")
_LOSSES = (
    *("_log_softmax", "nll_loss_forward", "nll_loss2d_forward", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
    *("binary_cross_entropy_with_logits", "soft_margin_loss", "nll_loss_nd", "cross_entropy_loss", "_ctc_loss"),
)
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "mv": (0, 1), "_grouped_mm": (0, 1)}


class _Recorder(TorchDispatchMode):
    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        super().__init__()
        self._names = names
        self._uses: dict[nn.Parameter, Use] = {}
        self._made: list[_Made] = []
        self._known: Any = WeakIdKeyDictionary()
        self.failed = False

    def use(self, p: nn.Parameter) -> Use:
        """What was seen of a parameter."""
        use = self._uses.get(p, Use())
        split = {x for made in self._made if made.parameter is p and (x := _parts(made))}
        if len(split) != 1:
            return use
        (found,) = split
        return replace(use, parts=found.rows, interleaved=found.interleaved, by_head=found.by_head)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.failed:
            try:
                self._look(func, args, out)
            except Exception:  # What is measured may not end what is measured.
                self.failed = True
        return out

    def _look(self, func: Any, args: Any, out: Any) -> None:
        name = func.overloadpacket.__name__.removesuffix("_") if hasattr(func, "overloadpacket") else str(func)
        for x in args[0] if args and isinstance(args[0], (list, tuple)) else args:
            if isinstance(x, nn.Parameter) and x in self._names and x not in self._known:
                self._known[x] = _Weight(x, tuple((i,) for i in range(x.ndim)))
        self._note(name, args, out)

    def _get(self, x: Any) -> _Weight | _Made | None:
        return self._known.get(x) if isinstance(x, Tensor) else None

    def _note(self, name: str, args: Sequence[Any], out: Any) -> None:
        if name in _PRODUCTS and self._product(name, args, out):
            return
        if name == "convolution" and isinstance(weight := self._get(args[1]), _Weight):
            self._seen(weight, "convolution")
            rows = out.shape[1]
            self._known[out] = self._keep(_Made(weight.parameter, ((1, rows),)))
            return
        if name in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"):
            if isinstance(weight := self._get(args[0]), _Weight):
                self._seen(weight, "look-up")
            return
        for x in args[0] if args and isinstance(args[0], (list, tuple)) else args:
            known = self._get(x)
            if isinstance(known, _Weight):
                self._weight(name, x, known, args, out)
            elif isinstance(known, _Made):
                self._follow(name, x, known, args, out)

    def _seen(self, weight: _Weight, how: str) -> Use:
        use = self._uses.setdefault(weight.parameter, Use())
        use.how.add(how)
        return use

    def _keep(self, made: _Made) -> _Made:
        self._made.append(made)
        return made

    def _product(self, name: str, args: Sequence[Any], out: Tensor) -> bool:
        """Note a product with a weight; false if there is none in it."""
        left, right = (args[i] for i in _PRODUCTS[name])
        found = False
        for x, axis_in, axis_out, made_axis in ((right, -2, -1, out.ndim - 1), (left, -1, -2, max(out.ndim - 2, 0))):
            weight = self._get(x)
            if not isinstance(weight, _Weight) or x.ndim < 2:
                continue
            found = True
            use = self._seen(weight, "product")
            p, taken, given = weight.parameter, weight.axes[axis_in], weight.axes[axis_out]
            if not taken or not given:
                continue
            if p.ndim == 2:
                use.transposed = max(given) > max(taken)
                rows = p.shape[max(given)]
            elif 0 in given and len(given) == 1:  # (out, in, ...), as a convolution
                rows = p.shape[0]
            else:
                use.stacked, use.transposed = p.shape[0], max(given) > max(taken)
                rows = p.shape[max(given)]
            # Stacks whose first axis is in the output, too, are not followed.
            if out.shape[made_axis] == rows:
                self._known[out] = self._keep(_Made(p, ((made_axis, rows),)))
        if not found:
            for x in (left, right):
                if isinstance(made := self._get(x), _Made):
                    made.whole = True
        return found

    def _weight(self, name: str, x: Tensor, weight: _Weight, args: Sequence[Any], out: Any) -> None:
        """A view of a weight; anything else is another use of it."""
        axes = _moved(name, args, x, weight.axes, out)
        if axes is not None and isinstance(out, Tensor):
            self._known[out] = _Weight(weight.parameter, axes)
        elif name in ("unbind", "split", "split_with_sizes"):
            dim = (args[2] if len(args) > 2 else 0) if name != "unbind" else (args[1] if len(args) > 1 else 0)
            rest = weight.axes
            if name == "unbind":
                rest = rest[: dim % x.ndim] + rest[dim % x.ndim + 1 :]
            for part in out:
                self._known[part] = _Weight(weight.parameter, rest)
        elif name in _SAME and isinstance(out, Tensor):
            self._known[out] = weight
        else:
            self._seen(weight, "other")

    def _follow(self, name: str, x: Tensor, made: _Made, args: Sequence[Any], out: Any) -> None:
        """Follow what a product has made, as long as it is only moved, and note into what it is split."""
        if name in _LOSSES:
            self._uses[made.parameter].head |= not made.scores
            made.whole = True
        elif name == "topk":
            self._uses[made.parameter].router = True
        elif name in ("_softmax", "sigmoid", "div", "mul") and isinstance(out, Tensor) and out.shape == x.shape:
            made.whole = True
            self._known[out] = _Made(made.parameter, made.axes, scores=True)
        elif made.scores and name not in _SAME:
            return
        elif (name in _SAME or (name == "add" and _is_bias(args, x))) and isinstance(out, Tensor):
            self._known[out] = made
        elif name == "glu":
            axis = (args[1] if len(args) > 1 else -1) % x.ndim
            for start in (0, x.shape[axis] // 2):
                made.slices.append((axis, start, start + x.shape[axis] // 2, 1))
        elif name in ("slice", "select", "split", "split_with_sizes", "unbind"):
            self._split(name, x, made, args, out)
        elif isinstance(out, Tensor) and (axes := _followed(name, args, x, made.axes, out)) is not None:
            if axes != made.axes or made.slices:
                # Another arrangement of the same; what is seen of it counts as seen of this.
                self._known[out] = self._keep(_Made(made.parameter, axes))
            else:
                self._known[out] = made
        else:
            made.whole = True

    def _split(self, name: str, x: Tensor, made: _Made, args: Sequence[Any], out: Any) -> None:
        dim = (
            (args[1] if len(args) > 1 else 0)
            if name in ("slice", "select", "unbind")
            else (args[2] if len(args) > 2 else 0)
        )
        dim %= x.ndim
        length = x.shape[dim]
        if dim not in [axis for axis, _ in made.axes]:
            if isinstance(out, Tensor):
                shift = [(axis - (name == "select" and axis > dim), n) for axis, n in made.axes]
                self._known[out] = self._keep(_Made(made.parameter, tuple(shift)))
            return
        if name == "slice":
            start, stop = (args[2] if len(args) > 2 else None) or 0, args[3] if len(args) > 3 else None
            step = args[4] if len(args) > 4 else 1
            start = start + length if start < 0 else start
            stop = length if stop is None else min(stop + length if stop < 0 else stop, length)
            if (start, stop, step) == (0, length, 1):
                self._known[out] = made
            else:
                made.slices.append((dim, start, stop, step))
        elif name == "select":
            index = args[2] % length
            made.slices.append((dim, index, index + 1, 1))
        elif name == "unbind":
            made.slices += [(dim, i, i + 1, 1) for i in range(length)]
        else:
            start = 0
            for part in out:
                made.slices.append((dim, start, start + part.shape[dim], 1))
                start += part.shape[dim]


def _is_bias(args: Sequence[Any], x: Tensor) -> bool:
    return all(not isinstance(other, Tensor) or other is x or other.ndim <= 1 for other in args)


def _moved(
    name: str, args: Sequence[Any], x: Tensor, axes: tuple[tuple[int, ...], ...], out: Any
) -> tuple[tuple[int, ...], ...] | None:
    """The axes of a view of a weight; ``None`` if it is none."""
    if not isinstance(out, Tensor):
        return None
    if name == "t":
        return axes[::-1]
    if name == "transpose":
        order = list(range(x.ndim))
        a, b = args[1] % x.ndim, args[2] % x.ndim
        order[a], order[b] = order[b], order[a]
        return tuple(axes[i] for i in order)
    if name == "permute":
        return tuple(axes[i % x.ndim] for i in args[1])
    if name == "select":
        dim = args[1] % x.ndim
        return axes[:dim] + axes[dim + 1 :]
    if name in ("slice", "narrow"):
        return axes
    if name == "unsqueeze":
        dim = args[1] % out.ndim
        return (*axes[:dim], (), *axes[dim:])
    if name in ("squeeze", "view", "_unsafe_view", "reshape", "expand", "_reshape_alias"):
        if name == "expand":
            return ((),) * (out.ndim - x.ndim) + axes
        return _regrouped(tuple(x.shape), axes, tuple(out.shape))
    return None


def _regrouped(
    shape: tuple[int, ...], axes: tuple[tuple[int, ...], ...], new: tuple[int, ...]
) -> tuple[tuple[int, ...], ...] | None:
    """What is in each axis after a tensor of one shape was viewed in another."""
    if math.prod(shape) != math.prod(new):
        return None
    found: list[tuple[int, ...]] = []
    ends = [math.prod(shape[: i + 1]) for i in range(len(shape))]
    begin = 1
    for n in new:
        end = begin * n
        inside: tuple[int, ...] = ()
        for i, stop in enumerate(ends):
            start = stop // shape[i] if shape[i] else 0
            if shape[i] > 1 and n > 1 and start < end and begin < stop:
                inside += axes[i]
        found.append(tuple(dict.fromkeys(inside)))
        begin = end
    return tuple(found)


def _followed(
    name: str, args: Sequence[Any], x: Tensor, axes: tuple[tuple[int, int], ...], out: Tensor
) -> tuple[tuple[int, int], ...] | None:
    """Where the axes of an output are after a view; ``None`` if it is none, or cuts across them."""
    if name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
        first, last = axes[0][0], axes[-1][0]
        if [axis for axis, _ in axes] != list(range(first, last + 1)):
            return None
        before, length = math.prod(x.shape[:first]), math.prod(n for _, n in axes)
        begin = 1
        found: list[tuple[int, int]] = []
        for i, n in enumerate(out.shape):
            if begin >= before and begin * n <= before * length and (n > 1 or found) and (begin > before or n > 1):
                found.append((i, n))
            begin *= n
        return tuple(found) if math.prod(n for _, n in found) == length else None
    position = {axis: (0, i) for i, (axis, _) in enumerate(axes)}
    labels = tuple((axis,) if axis in position else () for axis in range(x.ndim))
    moved = (
        _moved(name, args, x, labels, out) if name in ("t", "transpose", "permute", "unsqueeze", "squeeze") else None
    )
    if moved is None:
        return None
    places = {label[0]: i for i, label in enumerate(moved) if label}
    return tuple((places[axis], n) for axis, n in axes) if len(places) == len(axes) else None


class _Parts(NamedTuple):
    """Rows of the parts of an output, whether they alternate, and whether they are those of heads."""

    rows: tuple[int, ...]
    interleaved: bool = False
    by_head: bool = False


def _parts(made: _Made) -> _Parts | None:
    """The parts of an output; ``None`` where it is not split, or used as a whole, too."""
    cuts = sorted(set(made.slices))
    if not cuts or made.whole or len({axis for axis, *_ in cuts}) > 1:
        return None
    axis, _, _, step = cuts[0]
    index = [a for a, _ in made.axes].index(axis)
    sizes = [n for _, n in made.axes]
    length, outer, inner = sizes[index], math.prod(sizes[:index]), math.prod(sizes[index + 1 :])
    if step > 1:
        whole = [(start, s) for _, start, _, s in cuts] == [(i, step) for i in range(step)] and inner == outer == 1
        return _Parts((length // step,) * step, interleaved=True) if whole else None
    starts = [start for _, start, _, _ in cuts]
    stops = [stop for _, _, stop, _ in cuts]
    if starts != [0, *stops[:-1]] or stops[-1] != length or len(cuts) < 2:
        return None
    rows = tuple((stop - start) * inner for start, stop in zip(starts, stops))
    return _Parts(rows * outer, by_head=outer > 1)


# --- in training ----------------------------------------------------------------------------------------------------


class RoutingCheck(Callback):
    """Watches the first training step, and warns once where parameters are used otherwise than they are routed.

    The warning names the :class:`.Grouping` that mends it. :func:`lightning_optim.build_optimizer` adds one to the
    Trainer of an optimizer with a matrix rule. Weights, gradients and random numbers are not touched; later steps cost
    nothing. Sharded (FSDP2) and compiled modules are not watched.

    Attributes:
        uses: What was seen, by the name of the parameter, after the first step.
        differences: Where that is otherwise than routed.
    """

    def __init__(self) -> None:
        self.uses: dict[str, Use] = {}
        self.differences: list[Difference] = []
        self._recording: ExitStack | None = None
        self._done = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._done or self._recording is not None:
            return
        self._done = not any(isinstance(optimizer, MatrixOptimizer) for optimizer in trainer.optimizers)
        compiled = any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl for m in pl_module.modules())
        sharded = any(placements(p) is not None for p in pl_module.parameters())
        if self._done or compiled or sharded:
            self._done = True
            return
        self._recording = ExitStack()
        self.uses = self._recording.enter_context(record_uses(pl_module))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._stop(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._stop(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            self._done = True
            recording.close()

    def _stop(self, trainer: Any, pl_module: Any) -> None:
        if self._recording is None:
            return
        self._close()
        routes = route(pl_module)
        names = {p: name for name, p in nn.Module.named_parameters(pl_module)}
        routed: dict[str, Route] = {}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups if isinstance(optimizer, MatrixOptimizer) else ():
                layout: dict[str, Any] = {"blocks": 1, "transposed": False, "split": (), "interleaved": False}
                layout |= layout_of(group)
                for name in (names[p] for p in group["params"] if p in names):
                    # Where the role is another than routing finds, somebody has said so.
                    if name in routes and routes[name].role == group["role"]:
                        routed[name] = replace(routes[name], **layout)
        self.differences = differences(routed, self.uses)
        if self.differences:
            lines = dict.fromkeys(f"{x.pattern} {x.what}" for x in self.differences)
            rank_zero_warn(
                "The first training step uses parameters otherwise than they are routed: "
                + "; ".join(list(lines)[:5])
                + ("; ..." if len(lines) > 5 else "")
                + f". To route by what was seen: {grouping_line(self.differences)}."
            )


def attach_check(optimizer: Any, trainer: Any | None) -> None:
    """Add :class:`RoutingCheck` to the Trainer of an optimizer with a matrix rule."""
    if trainer is None or not isinstance(optimizer, MatrixOptimizer):
        return
    if not any(isinstance(callback, RoutingCheck) for callback in trainer.callbacks):
        trainer.callbacks = [RoutingCheck(), *trainer.callbacks]  # A new list: the old one may be iterated over.


# --- comparison -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A parameter that is used otherwise than it is routed."""

    name: str
    """Its name."""

    what: str
    """What was seen."""

    setting: str
    """The field of :class:`.Grouping` that mends it."""

    value: tuple[int, ...] = ()
    """For ``split``, the rows."""

    @property
    def pattern(self) -> str:
        """A pattern of its name in all layers."""
        return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.\d)", "*", clean_name(self.name))


def differences(routes: Mapping[str, Route], uses: Mapping[str, Use]) -> list[Difference]:
    """Where parameters are used otherwise than they are routed.

    Args:
        routes: Routes by name.
        uses: What :func:`record_uses` has seen.

    Example:
        >>> import torch
        >>> class Scores(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Parameter(torch.zeros(8, 4))
        ...         self.last = nn.Linear(4, 2)
        ...     def forward(self, x):
        ...         return self.last(x @ self.table)
        >>> from lightning_optim.routing import route
        >>> net = Scores()
        >>> with record_uses(net) as uses:
        ...     out = net(torch.ones(1, 8))
        >>> for difference in differences(route(net), uses):
        ...     print(difference.pattern, difference.setting, difference.what)
        table matrix is multiplied with
        table transposed is stored (in, out)
    """
    found: list[Difference] = []
    for name, r in routes.items():
        use = uses.get(name)
        if use is None or not use.how:
            continue
        product = bool(use.how & {"product", "convolution"})
        if r.role == "matrix" and (use.head or use.router):
            found.append(Difference(name, "makes the output" if use.head else "ranks experts", "fallback"))
            continue
        if r.role == "matrix" and not product:
            found.append(Difference(name, f"is not multiplied with ({use.words})", "fallback"))
            continue
        unknown = r.kind == "other" and len(r.shape) > 1
        if r.role == "fallback" and not (unknown and product and not use.head and not use.router):
            continue
        if r.role == "fallback":
            found.append(Difference(name, "is multiplied with", "matrix"))
            r = replace(r, role="matrix", blocks=r.shape[0] if len(r.shape) == 3 else 1)
        if "convolution" in use.how or "product" not in use.how:
            continue
        if use.transposed and not r.transposed and len(r.shape) in (2, 3):
            found.append(Difference(name, "is stored (in, out)", "transposed"))
            r = replace(r, transposed=True)
        # Rotary embeddings and the like split heads of what is one matrix.
        if use.parts and (not use.by_head or r.kind.startswith("fused")):
            seen = use.parts * use.stacked
            # Parts that are split further are as they should be: heads, or what is split again later.
            if not _ends(seen) <= _ends(matrix_rows(r)) or use.interleaved is not r.interleaved:
                words = " + ".join(map(str, use.parts[:4])) + " + ..." * (len(use.parts) > 4)
                found.append(Difference(name, f"makes parts of {words} rows", "split", use.parts))
    return found


def _ends(rows: Iterable[int]) -> set[int]:
    return set(accumulate(rows))


def mended(grouping: Grouping, found: Iterable[Difference]) -> Grouping:
    """A grouping that routes by what was seen, where it says nothing else.

    >>> mended(Grouping(), [Difference("layers.0.attn.qkv.weight", "", "split", (8, 4, 4))]).split
    {'layers.*.attn.qkv.weight': [8, 4, 4]}
    """
    lists: dict[str, list[str]] = {key: list(getattr(grouping, key)) for key in ("matrix", "fallback", "transposed")}
    split = dict(grouping.split)
    for x in found:
        if x.setting == "split":
            split.setdefault(x.pattern, list(x.value))
        elif x.pattern not in lists[x.setting]:
            lists[x.setting].append(x.pattern)
    new = replace(grouping, split=split)
    new.matrix, new.fallback, new.transposed = lists["matrix"], lists["fallback"], lists["transposed"]
    return new


def grouping_line(found: Iterable[Difference]) -> str:
    """The Grouping that mends differences, as it is written.

    >>> grouping_line([Difference("head.weight", "makes the output", "fallback")])
    "Grouping(fallback=['head.weight'])"
    """
    new = mended(Grouping(), found)
    fields = {key: getattr(new, key) for key in ("matrix", "fallback", "transposed", "split")}
    return "Grouping(" + ", ".join(f"{key}={value!r}" for key, value in fields.items() if value) + ")"
