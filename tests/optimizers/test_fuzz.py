"""Whatever is done to an optimizer: a right step or a clear error, never a silent wrong number.

Every example is a short run over tensors of any shape, precision and strides, with gradients from none to NaN, in any
way of rounding, whose parameter groups are edited, added and refused, and whose parameters are cast and replaced on the
way. Each step is compared with the float64 references, which share no code with the engine.

``FUZZ_EXAMPLES`` sets how many examples there are in all; any number but the default draws other ones in each run.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_optim.engine.hyperparameters import Field
from lightning_optim.engine.rounding import ROUNDINGS
from lightning_optim.engine.rule import RULES, ModelRule, decay_of
from lightning_optim.engine.switches import FIELDS
from lightning_optim.registry import OPTIMIZERS

from . import references
from .references import Array, Reference, orthogonalize
from .rows import FLAT, MATRIX, OURS, REFERENCES, ROWS, amplifies, kind_of
from .strategies import bad, choices, decides_on_state, extreme

DEFAULT_EXAMPLES = 3610
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", DEFAULT_EXAMPLES))

fuzzed = settings(
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    derandomize=EXAMPLES == DEFAULT_EXAMPLES,
    suppress_health_check=list(HealthCheck),
)

# --- what is drawn ------------------------------------------------------------------------------------------------

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

SHAPES = [(4, 4), (3, 5), (6, 2), (4, 2, 3, 3), (4, 1, 3), (1, 6), (6, 1), (1, 1), (2, 4, 2), (0, 3), (3, 0)]
VECTORS = [(), (1,), (5,), (0,), (33,)]
LAYOUTS = ["contiguous", "contiguous", "transposed", "sliced", "offset", "channels_last"]
KINDS = [
    *["normal"] * 8,
    *["none", "zero", "tiny", "subnormal", "huge", "largest", "one huge entry", "sparse", "constant", "large"],
]
BAD_KINDS = ["nan", "inf", "-inf"]

#: What parameter groups have beside hyperparameters, and what these must not be.
OF_GROUPS: dict[str, list[Any]] = {
    "maximize": [None, 1],
    "role": ["hidden", None],
    "rule": ["Adam", None],
    "blocks": [0, -1, 1.5, "2", True],
}


def hyperparameters(name: str) -> dict[str, Field]:
    """What is drawn for an optimizer: the hyperparameters that it declares, without the switches of all.

    Of a few elements, one whose sign rounding decides changes the cautious step of all, and a displacement that is
    rounding has a norm like any other: ``test_switches.py`` compares these in float64, and for extreme gradients.
    """
    return {key: field for key, field in RULES[name].fields.items() if key not in FIELDS}


def values(name: str, key: str) -> st.SearchStrategy[Any]:
    """Good values of a hyperparameter, from its declaration, or from the optimizer's row where that says otherwise."""
    special = ROWS[name].fuzz
    return special[key] if key in special else extreme(RULES[name].fields[key])


def bad_values(name: str) -> dict[str, list[Any]]:
    """What the entries of a parameter group must not be."""
    found = {key: bad(field) for key, field in hyperparameters(name).items()}
    keys = OF_GROUPS if name in MATRIX else ("maximize",)
    return {key: known for key, known in found.items() if known} | {key: OF_GROUPS[key] for key in keys}


@dataclass
class Plan:
    """One example, in values that a failure can print."""

    arguments: dict[str, Any]
    backend: str
    rounding: str
    specs: list[tuple[tuple[int, ...], torch.dtype, str, float, int]]
    structure: dict[str, Any]
    steps: list[tuple[list[str], str, tuple[Any, ...] | None]]
    seed: int


#: Of the backend "compiled", which compiles for each dtype, way of rounding and value of a switch, each optimizer has
#: one of these.
NARROWED = [
    (BF16, "stochastic"),
    (F64, "nearest"),
    (BF16, "split"),
    (BF16, "kahan"),
    (F16, "stochastic"),
    (F32, "nearest"),
]
#: All whose own rule is compiled, and one with a compiled fallback.
COMPILED = dict(zip([*FLAT, "NAMO"], itertools.cycle(NARROWED)))


@st.composite
def plans(draw: Any, name: str, compiled: bool = False) -> Plan:
    declared = hyperparameters(name)
    if compiled:
        declared = {key: field for key, field in declared.items() if choices(field) is None}
    chosen = draw(st.lists(st.sampled_from(sorted(declared)), max_size=4, unique=True))
    arguments = {key: draw(values(name, key)) for key in chosen}
    matrix = name in MATRIX
    if compiled:
        dtype, rounding = COMPILED[name]
        dtypes = [dtype]
    else:
        dtypes = draw(st.sampled_from([[F64], [F32], [F32], [F32, F64], [BF16], [F32, BF16], [F16, BF16, F32, F64]]))
        rounding = draw(st.sampled_from([way for way in ROUNDINGS if way != "split" or F16 not in dtypes]))
    of_model = issubclass(RULES[name], ModelRule)  # Its reference has all parameters, in one group.
    spec = st.tuples(
        st.sampled_from(SHAPES + VECTORS),
        st.sampled_from(dtypes),
        st.sampled_from(LAYOUTS),
        st.sampled_from([1.0, 1.0, 0.0, 1e-3, 1e3, 1e20]),
        st.integers(0, 0 if of_model else 1),  # The group.
    )
    specs = draw(st.lists(spec, min_size=1, max_size=3))
    structure = {}
    if matrix:
        structure = draw(
            st.sampled_from([{}, {}, {"blocks": 2}, {"transposed": True}, {"blocks": 2, "transposed": True}])
        )
    editable = {key: values(name, key) for key in declared if not decides_on_state(RULES[name], key)}
    if not compiled and not of_model:
        editable["maximize"] = st.booleans()
    breakable = bad_values(name)

    def events() -> st.SearchStrategy[Any]:
        index = st.integers(0, 3)
        return st.one_of(
            st.none(),
            st.none(),
            st.sampled_from(sorted(editable)).flatmap(
                lambda key: st.tuples(st.just("edit"), index, st.just(key), editable[key])
            ),
            st.sampled_from(sorted(breakable)).flatmap(
                lambda key: st.tuples(st.just("break"), index, st.just(key), st.sampled_from(breakable[key]))
            ),
            st.tuples(st.just("cast"), index, st.sampled_from(dtypes)),
            st.tuples(st.just("replace"), index),
            st.tuples(st.just("reshape"), index),
            st.none() if of_model else st.tuples(st.just("add"), spec),
            st.tuples(st.just("refuse"), st.sampled_from(["lr", "duplicate", "complex", "expanded", "twice"])),
        )

    kinds = st.lists(st.sampled_from(KINDS + draw(st.sampled_from([[], [], [], BAD_KINDS]))), max_size=3)
    layout = st.sampled_from([*LAYOUTS, "expanded"])
    steps = draw(st.lists(st.tuples(kinds, layout, events()), min_size=1, max_size=4))
    backend = "compiled" if compiled else draw(st.sampled_from(["plain", "chunked"]))
    return Plan(arguments, backend, rounding, specs, structure, steps, draw(st.integers(0, 2**16)))


# --- tensors --------------------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "transposed" and x.ndim >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and x.ndim >= 1:
        y = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))[..., ::2]
        return y.copy_(x)
    if layout == "offset":
        return x.new_full((x.numel() + 3,), float("nan"))[3:].view(x.shape).copy_(x)
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "expanded" and x.ndim >= 1 and x.shape[0] > 0:
        return x[:1].contiguous().expand(x.shape)
    return x.contiguous()


def gradient(p: Tensor, kind: str, rng: np.random.Generator) -> Tensor:
    """A gradient of the parameter's dtype."""
    x = rng.normal(size=tuple(p.shape)) + 0.3
    info = torch.finfo(p.dtype)
    if kind in ("zero", "none"):
        x = np.zeros_like(x)
    elif kind == "tiny":
        x = x * max(1e-25, info.smallest_normal)
    elif kind == "subnormal":
        x = x * info.smallest_normal * 0.01
    elif kind == "large":
        x = x * 1e4 if p.dtype == F16 else x * 1e10
    elif kind == "huge":
        x = np.sign(x) * min(1e30, info.max / 2)
    elif kind == "largest":
        x = np.sign(x) * info.max
    elif kind == "one huge entry" and x.size:
        x.reshape(-1)[-1] = min(1e30, info.max / 2)
    elif kind == "sparse":
        x = np.where(rng.random(x.shape) < 0.7, 0.0, x)
    elif kind == "constant":
        x = np.ones_like(x)
    elif kind in BAD_KINDS and x.size:
        x.reshape(-1)[-1] = float(kind)
    return torch.from_numpy(np.asarray(x)).to(p.dtype)


def bounded(g: Tensor) -> Array:
    """The gradient in float64, scaled down as the engine documents it."""
    x = g.detach().double().numpy()
    bound = torch.finfo(wide(g.dtype)).max ** 0.4
    largest = np.abs(x).max(initial=0.0)
    return x * (bound / largest) if largest > bound else x


# --- the reference --------------------------------------------------------------------------------------------------


def blocks(x: Array, group: dict[str, Any]) -> list[Array]:
    """The matrices that a parameter holds."""
    n = group.get("blocks", 1)
    parts = np.split(x, n) if n > 1 else [x]
    if n > 1 and parts[0].shape[0] == 1 and parts[0].ndim > 2:
        parts = [part[0] for part in parts]
    return [np.swapaxes(part, 0, 1) for part in parts] if group.get("transposed") else parts


def joined(parts: list[Array], shape: tuple[int, ...], group: dict[str, Any]) -> Array:
    if group.get("transposed"):
        parts = [np.swapaxes(part, 0, 1) for part in parts]
    return (np.concatenate([part.reshape(-1) for part in parts])).reshape(shape)


class Oracle:
    """The references of one optimizer: per parameter, or, for a rule over groups, per group.

    Three of each: fed the gradients as they are, and twice with relative noise of ``noise``. How far these come apart
    says how much rounding matters here, which may be beyond all bounds (the polar factor of a singular matrix).
    """

    def __init__(self, noise: float, seed: int) -> None:
        self.noise = noise
        self.rng = np.random.default_rng(seed)
        self.references: dict[Any, list[Reference]] = {}
        self.unknown: set[Any] = set()

    def step(self, group: dict[str, Any], params: list[Tensor], olds: list[Array], grads: list[Array]) -> list[Any]:
        """Pairs (new value, spread) for the parameters of a group that have a gradient; no spread for an unknown one,
        of which the value tells the size."""
        together = kind_of(group["rule"]) == "group"
        results: list[Any] = []
        for some in [range(len(params))] if together else [[i] for i in range(len(params))]:
            key = tuple(id(params[i]) for i in some) if not together else id(group["params"])
            old = [part for i in some for part in blocks(olds[i], group)]
            grad = [part for i in some for part in blocks(grads[i], group)]
            if key not in self.references:
                self.references[key] = [self._new(group, old) for _ in range(3)]
                if amplifies(group["rule"], "bases") and any(_is_degenerate(g) for g in grad):
                    self.unknown.add(key)  # Bases of a null space are arbitrary.
            if any(g.size and not 1e-70 < np.abs(g).max() < 1e70 and g.any() for g in grad):
                self.unknown.add(key)  # The reference's own fourth powers leave the range.
            hidden = self._flat(key, "v") if amplifies(group["rule"], "hidden vector") else None
            news = []
            for j, reference in enumerate(self.references[key]):
                for field in fields(reference):
                    if field.name in group and field.name not in ("params", "lr"):
                        setattr(reference, field.name, group[field.name])
                reference.params = [x.copy() for x in old]
                for state in reference.states:
                    state["position"] = next(i for i, p in enumerate(group["params"]) if p is params[some[0]])
                noise = self.noise if j else 0.0
                with mock.patch.object(references, "orthogonalize", self._orthogonalizer(noise, group["rule"])):
                    reference.step([self._disturbed(g, noise, group) for g in grad], lr=float(group["lr"]))
                news.append(self._per_parameter(reference.params, [olds[i].shape for i in some], group))
            if group.get("orthogonalizer") == "exact" and any(np.abs(g).max(initial=0) > 1e9 for g in grad):
                self.unknown.add(key)  # What else is in the momentum is at the cutoff of singular values.
            if amplifies(group["rule"], "cancellation"):
                # Noise of the gradient does not show how well the state resolves what it takes from it.
                scale = self.noise / math.sqrt(group["eps"])
                if any(np.abs(g).max(initial=0) * scale > 1e-4 for g in grad):
                    self.unknown.add(key)
            decay = group["weight_decay"] if decay_of(RULES[group["rule"]], group) == "coupled" else 0.0
            if decay and any(np.abs(g).max() + decay * np.abs(x).max() > 2.5e15 for g, x in zip(grad, old)):
                self.unknown.add(key)  # The sum is bounded as gradients are.
            if amplifies(group["rule"], "hidden vector") and _is_collinear(hidden, self._flat(key, "m")):
                self.unknown.add(key)  # The point nearest to the origin is the origin, up to rounding.
            for new, one, two in zip(*news):
                spread = np.maximum(np.abs(one - new), np.abs(two - new))
                results.append((new, None if key in self.unknown else spread))
        return results

    def _disturbed(self, g: Array, noise: float, group: dict[str, Any]) -> Array:
        """By relative noise, and where that is not what rounding does: small numbers of which float32 has few bits, and
        small entries that a rotation adds to large ones."""
        largest = np.abs(g).max(initial=0)
        mixes = amplifies(group["rule"], "bases") or amplifies(group["rule"], "mixing")
        added = 0.1 * noise * largest if mixes else 0.0
        if noise >= 1e-6 and 0 < largest < 1e-30:
            momentum = group["momentum"] if "momentum" in group else group.get("betas", (0.0,))[0]
            added = max(added, 1e-42, 2e-45 / (1 - momentum))  # What is left of it may be no number at all.
        return g + (noise * np.abs(g) + added) * self.rng.normal(size=g.shape)

    def _orthogonalizer(self, noise: float, rule: str) -> Callable[..., Array]:
        """With noise where that of the gradient does not show what rounding does: it leaves signs as they are."""

        def disturbed(x: Array, *args: Any, **kwargs: Any) -> Array:
            if amplifies(rule, "signs"):  # Rounded ones may be singular.
                x = x * (1 + noise * self.rng.normal(size=x.shape))
            o = orthogonalize(x, *args, **kwargs)
            if amplifies(rule, "factor"):  # Entries that vanish are rounding errors, which it divides by their size.
                o = o + noise * np.abs(o).max(initial=0) * self.rng.normal(size=o.shape)
            return o

        return disturbed

    def _flat(self, key: Any, name: str) -> Array:
        return np.concatenate([np.ravel(state[name]) for state in self.references[key][0].states])

    def _new(self, group: dict[str, Any], old: list[Array]) -> Reference:
        return REFERENCES[group["rule"]](old)

    def _per_parameter(self, parts: list[Array], shapes: list[tuple[int, ...]], group: dict[str, Any]) -> list[Array]:
        n = group.get("blocks", 1)
        return [joined(parts[i * n : (i + 1) * n], shape, group) for i, shape in enumerate(shapes)]


def _is_collinear(v: Array, m: Array) -> bool:
    """Whether two vectors, the first maybe zero yet, are within a hundredth of the same or the opposite direction."""
    return len(v) == len(m) and bool(v.any()) and (v @ m) ** 2 >= (1 - 1e-4) * (v @ v) * (m @ m)


def _is_degenerate(g: Array) -> bool:
    """Whether the outer products of some axis have a null space or equal eigenvalues, up to rounding, or vanish."""
    if 0 < np.abs(g).max(initial=0) < 1e-15:
        return True
    for axis in range(g.ndim):
        unfolded = np.moveaxis(g, axis, 0).reshape(g.shape[axis], -1)
        sigma = np.linalg.svd(unfolded, compute_uv=False)
        if len(sigma) < g.shape[axis] or sigma.min() <= 1e-3 * sigma.max():
            return True
        if len(sigma) > 1 and (np.diff(sigma[::-1]) <= 1e-2 * sigma.max()).any():
            return True
    return False


# --- the property -----------------------------------------------------------------------------------------------------


class Overflow(Exception):
    """The true result is beyond the parameter's range."""


class Example:
    """One run."""

    def __init__(self, name: str, plan: Plan) -> None:
        self.name, self.plan = name, plan
        self.rng = np.random.default_rng(plan.seed)
        self.matrix = name in MATRIX
        dtypes = {spec[1] for spec in plan.specs}
        # Gradients are rounded nowhere, but everything made of them is: some roundings of float32 or float64.
        self.double = dtypes == {F64} and all(
            step[2] is None or step[2][0] not in ("cast", "add") for step in plan.steps
        )
        self.oracle = Oracle(1e-13 if self.double else 1e-6, plan.seed + 1)
        params = [self.parameter(spec) for spec in plan.specs]
        groups = []
        for index in (0, 1):
            mine = [p for p, spec in zip(params, plan.specs) if spec[4] == index]
            for role in ("matrix", "fallback") if self.matrix else (None,):
                some = [p for p in mine if role is None or self.is_matrix(p) == (role == "matrix")]
                if some:
                    extra = dict(plan.structure) if role == "matrix" else {}
                    groups.append({"params": some, **({"role": role} if role else {}), **extra})
        cls: Any = OPTIMIZERS[name].cls
        self.optimizer = cls(groups, backend=plan.backend, rounding=plan.rounding, **plan.arguments)
        self.skipped = 0

    def parameter(self, spec: tuple[Any, ...]) -> nn.Parameter:
        shape, dtype, layout, magnitude, _ = spec
        magnitude = min(magnitude, 1e3) if dtype == F16 else magnitude
        values = torch.from_numpy(np.asarray(self.rng.normal(size=shape) * magnitude)).to(dtype)
        p = nn.Parameter(laid_out(values, layout))
        return p

    def is_matrix(self, p: Tensor) -> bool:
        return p.ndim >= 2 and p.shape[0] % self.plan.structure.get("blocks", 1) == 0

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def snapshot(self) -> dict[Any, Tensor]:
        values: dict[Any, Tensor] = {(id(p), None): p for p in self.params}
        values |= {(id(p), name): x for p in self.params for name, x in self.optimizer.state.get(p, {}).items()}
        return {key: x.detach().clone() for key, x in values.items()}

    def unchanged(self, before: dict[Any, Tensor]) -> None:
        after = self.snapshot()
        assert all(torch.equal(after[key], x) for key, x in before.items())

    def run(self) -> None:
        for kinds, layout, event in self.plan.steps:
            if event is not None:
                getattr(self, event[0])(*event[1:])
            self.step(kinds, layout)

    def refused(self, *words: str) -> None:
        """The step is refused with these words, and nothing has happened."""
        before = self.snapshot()
        with pytest.raises(ValueError) as error:
            self.optimizer.step()
        for word in words:
            assert word in str(error.value)
        self.unchanged(before)

    # Events

    def group(self, index: int) -> dict[str, Any]:
        return self.optimizer.param_groups[index % len(self.optimizer.param_groups)]

    def edit(self, index: int, key: str, value: Any) -> None:
        group = self.group(index)
        if key in group:
            group[key] = value

    def break_(self, index: int, key: str, value: Any) -> None:
        group = self.group(index)
        if key not in group:
            return
        if key == "role" and group[key] == "fallback":
            return  # Every role but "matrix" is the other.
        for p in self.params:
            p.grad = torch.ones_like(p)
        old = group[key]
        group[key] = value
        self.refused(key, repr(value) if key != "role" else "role")
        group[key] = old

    def cast(self, index: int, dtype: torch.dtype) -> None:
        p = self.params[index % len(self.params)]
        if not p.to(dtype).isfinite().all():
            return
        old, bound = p.data, torch.finfo(wide(dtype)).max ** 0.4
        p.data = old.to(dtype)
        p.grad = torch.ones_like(p)
        if (
            p.numel()
            and wide(dtype) != wide(old.dtype)
            and any(x.numel() and x.abs().max() > bound for x in self.optimizer.state.get(p, {}).values())
        ):
            self.refused("was cast", "too large")
            p.data = old

    def replace(self, index: int) -> None:
        p = self.params[index % len(self.params)]
        p.data = laid_out(torch.ones_like(p.data) * 0.5, "transposed")

    def reshape(self, index: int) -> None:
        """A parameter replaced by one of another shape: its gradient does not fit, nor its state."""
        p = self.params[index % len(self.params)]
        if p.numel() == 0 or p not in self.optimizer.state:
            return
        old = p.data
        for q in self.params:
            q.grad = torch.ones_like(q)
        p.data = torch.ones(*p.shape, 2, dtype=p.dtype)
        self.refused("gradient", str(tuple(p.shape)))
        p.grad = torch.ones_like(p)
        self.refused("replaced", str(tuple(p.shape)))
        p.grad = None
        p.data = old

    def add(self, spec: tuple[Any, ...]) -> None:
        if len(self.params) >= 4:
            return
        p = self.parameter(spec)
        role = {"role": "matrix" if p.ndim >= 2 else "fallback"} if self.matrix else {}
        self.optimizer.add_param_group({"params": [p], "lr": 0.05, **role})

    def refuse(self, what: str) -> None:
        before, groups = self.snapshot(), len(self.optimizer.param_groups)
        p = nn.Parameter(torch.ones(3, 4))
        role = {"role": "matrix"} if self.matrix else {}
        group, word = {
            "lr": ({"params": [p], "lr": -1.0}, "lr=-1.0"),
            "duplicate": ({"params": [p, p]}, "twice"),
            "complex": ({"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64).conj())]}, "complex"),
            "expanded": ({"params": [nn.Parameter(torch.ones(1, 4).expand(3, 4))]}, "expanded"),
            "twice": ({"params": [self.params[0]]}, "more than one parameter group"),
        }[what]
        if what == "twice" and self.matrix:
            role = {"role": "fallback"}
        with pytest.raises(ValueError, match=word):
            self.optimizer.add_param_group(group | role)
        assert len(self.optimizer.param_groups) == groups
        self.unchanged(before)

    # The step

    def step(self, kinds: list[str], layout: str) -> None:
        hidden = [group for group in self.optimizer.param_groups if kind_of(group["rule"]) == "group"]
        together = {id(p) for group in hidden for p in group["params"]}  # Their reference has one clock for all.
        for p, kind in zip_longest(self.params, kinds[: len(self.params)], fillvalue="normal"):
            if kind == "none" and id(p) not in together:
                p.grad = None
            else:
                p.grad = laid_out(gradient(p, kind, self.rng), layout)
        moving = [
            (group, [p for p in group["params"] if p.grad is not None and p.numel()])
            for group in self.optimizer.param_groups
        ]
        finite = all(p.grad.isfinite().all() for _, params in moving for p in params)
        before = self.snapshot()
        grads = {id(p): p.grad.clone() for _, params in moving for p in params}
        olds = {id(p): self.exact(p) for _, params in moving for p in params}
        self.optimizer.step()
        for _, params in moving:
            for p in params:
                assert torch.equal(p.grad, grads[id(p)]) or not finite, "the gradient was written to"
        if not finite:
            self.skipped += 1
            assert self.optimizer.skipped_steps == self.skipped
            self.unchanged(before)
            return
        for group, params in moving:
            if not params:
                continue
            signs = -1.0 if group["maximize"] else 1.0
            with np.errstate(all="ignore"), mock.patch.object(references, "NORM_FLOOR", 1e-300):
                expected = self.oracle.step(
                    group, params, [olds[id(p)] for p in params], [signs * bounded(p.grad) for p in params]
                )
            largest = max(float(np.abs(bounded(p.grad)).max()) for p in params)
            for p, result in zip(params, expected):
                self.compare(group, p, olds[id(p)], result, largest)

    def exact(self, p: Tensor) -> Array:
        return self.optimizer.exact(p).double().numpy().copy()

    def resolution(self, dtype: torch.dtype) -> tuple[float, float]:
        """The relative and the absolute error of what is stored."""
        info = torch.finfo(dtype)
        if dtype in (BF16, F16) and self.plan.rounding == "kahan":  # The rounding error, in units of eps, rounded.
            return max(info.eps**2 / 4, 2.0**-23), info.eps * info.smallest_normal
        if dtype == BF16 and self.plan.rounding == "split":
            info = torch.finfo(F32)
        return info.eps, info.smallest_normal * 2

    def compare(
        self, group: dict[str, Any], p: Tensor, old: Array, result: tuple[Array, Array | None], largest: float
    ) -> None:
        new = self.exact(p)
        assert not np.isnan(new).any(), f"NaN from finite input: {group['rule']}"
        expected, spread = result
        info = torch.finfo(p.dtype)
        if spread is None:
            if (np.abs(expected) < 1e-3 * info.max).all():
                assert np.isfinite(new).all()
            return
        if not (np.abs(expected) < 0.9 * info.max).all():
            raise Overflow
        if kind_of(group["rule"]) != "element-wise":
            spread = np.full_like(spread, spread.max(initial=0.0))
        # Squares of gradients vanish below a root of the smallest number, beside eps.
        beta2 = group.get("betas", (0, 0))[1]
        vanishing = math.sqrt(torch.finfo(wide(p.dtype)).smallest_normal) * math.sqrt(p.numel())
        floor = float(group["lr"]) * vanishing / group.get("eps", 1.0) / math.sqrt(1 - beta2)
        if amplifies(group["rule"], "hidden vector"):  # Its fourth powers end at a quarter of the largest number.
            floor += float(group["lr"]) * largest / math.sqrt(torch.finfo(wide(p.dtype)).max / 4 * (1 - beta2))
        # Rounding of the parameter, twice (decay and step, or arithmetic and storage); of the update, which sums and
        # powers amplify; and what the noise, tens of roundings large, tells of the rest.
        relative = 1e-10 if self.double and not amplifies(group["rule"], "bases") else 1e-5  # Bases: a ramp of 1e-9.
        resolution, smallest = self.resolution(p.dtype)
        tolerance = (6 if amplifies(group["rule"], "weights") else 2) * resolution * np.maximum(
            np.abs(old), np.abs(expected)
        ) + smallest
        tolerance += floor + relative * np.abs(expected - old) + 100 * spread
        wrong = ~(np.abs(new - expected) <= tolerance)
        assert not wrong.any(), (
            f"{group['rule']} {tuple(p.shape)} {p.dtype}: {new[wrong][:3]} in place of {expected[wrong][:3]}, "
            f"from {old[wrong][:3]}, tolerance {tolerance[wrong][:3]}"
        )


setattr(Example, "break", Example.break_)


def check(name: str, compiled: bool, examples: int) -> None:
    @settings(fuzzed, max_examples=examples)
    @given(plan=plans(name, compiled))
    def run(plan: Plan) -> None:
        try:
            Example(name, plan).run()
        except Overflow:
            return

    run()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("name", OURS)
def test_a_right_step_or_a_clear_error(name: str) -> None:
    check(name, False, math.ceil(EXAMPLES / len(OURS)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("name", COMPILED)
def test_a_right_compiled_step_or_a_clear_error(name: str) -> None:
    check(name, True, math.ceil(EXAMPLES / 5 / len(COMPILED)))
