"""Which parameters get other hyperparameters than the rest, and the parameter groups that come of it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor, nn

from .engine.plain_values import plain
from .names import spellings
from .routing import Route, clean_name, route
from .safe_classes import safe_in_checkpoints

__all__ = ["Grouping", "Kind", "ParameterSettings", "parameter_groups", "suggestion"]

#: What can go without weight decay: kinds of parameter in :func:`lightning_optim.routing.route`, and ``marked``.
Kind: TypeAlias = Literal["norm", "bias", "vector", "embedding", "positional", "token", "head", "marked"]


@safe_in_checkpoints("lightning_optim.factory.Grouping")
@dataclass
class Grouping:
    """Which parameters get other hyperparameters than the rest.

    Patterns are shell-style and match whole parameter names, such as `model.blocks.0.*` or `*.bias`. Where
    several patterns of one setting match a name, the first wins. A pattern that applies to nothing is an
    error.
    """

    no_decay: list[Kind] = field(
        default_factory=lambda: ["norm", "bias", "vector", "embedding", "positional", "token", "marked"]
    )
    """Kinds of parameter, as in the routing table, without weight decay. ``embedding`` includes tied ones; ``marked``
    are those that say so themselves, by an attribute ``_no_weight_decay``, and those that the ``no_weight_decay()`` or
    ``no_weight_decay_keywords()`` of a model names, as in timm."""

    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """For each pattern, a factor of the learning rate."""

    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For each pattern, hyperparameters that replace the optimizer's, as in ``{"*.scale": {"weight_decay": 0.0}}``."""

    layer_decay: float | None = None
    """Factor of the learning rate from each layer of a timm model to the layer below it, in (0, 1]."""

    matrix: list[str] = field(default_factory=list)
    """Patterns of parameters that an optimizer with a matrix rule must treat as hidden matrices."""

    fallback: list[str] = field(default_factory=list)
    """Patterns of parameters that an optimizer with a matrix rule must leave to its fallback rule."""

    split: dict[str, list[int]] = field(default_factory=dict)
    """For each pattern of weights or of their modules, the rows of the matrices that a weight stacks along its output
    axis, as in ``{"*.qkv_proj": [q, k, v]}``; once, or several times over as in ``[64]`` for heads of 64 rows. Those
    of common fused projections are found without."""

    heads: list[str] = field(default_factory=list)
    """Patterns of projections whose attention heads are matrices of their own, of as many rows as their module says
    that a head has."""

    transposed: list[str] = field(default_factory=list)
    """Patterns of weights, or of their modules, that are stored (in, out), where their modules do not say so."""

    def __post_init__(self) -> None:
        for f in fields(self):
            setattr(self, f.name, plain(getattr(self, f.name)))
        for name in ("matrix", "fallback", "heads", "transposed"):  # A name may be a number.
            if isinstance(patterns := getattr(self, name), (list, tuple)):
                setattr(self, name, [str(pattern) for pattern in patterns])
        if isinstance(self.heads, Mapping):
            raise ValueError(
                f"grouping.heads={self.heads!r} must be a list of patterns; to give the rows of a head, use "
                "grouping.split, as in {'*.q_proj': [64]}"
            )
        for pattern, rows in self.split.items():
            sizes = list(rows) if isinstance(rows, (list, tuple)) else [rows]
            if not sizes or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
                raise ValueError(f"grouping.split[{pattern!r}] must be whole numbers of rows >= 1, got {rows!r}")
            self.split = {**self.split, pattern: sizes}
        for kind in self.no_decay:
            if kind not in get_args(Kind):
                raise ValueError(f"grouping.no_decay: {kind!r} is not one of {', '.join(get_args(Kind))}")
        for pattern, factor in self.lr_multipliers.items():
            if not 0.0 <= factor < math.inf:
                raise ValueError(f"grouping.lr_multipliers[{pattern!r}] must be a number >= 0, got {factor}")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"grouping.layer_decay must be in (0, 1], got {self.layer_decay}")

    def route(
        self,
        module: nn.Module,
        parameters: Collection[Tensor] | None = None,
        *,
        trained: Collection[Tensor] | None = None,
    ) -> dict[str, Route]:
        """:func:`lightning_optim.routing.route` with this grouping's patterns."""
        return route(
            module,
            self.matrix,
            self.fallback,
            parameters,
            split=self.split,
            heads=self.heads,
            transposed=self.transposed,
            trained=trained,
        )


class ParameterSettings(NamedTuple):
    """What a module's own optimizer says of one parameter, in proportion to the optimizer's defaults.

    Args:
        label: Name of its group.
        lr_factor: Learning rate over that of the optimizer.
        decay_factor: Weight decay likewise; ``None`` where the optimizer says nothing of weight decay.
    """

    label: str
    lr_factor: float
    decay_factor: float | None


def parameter_groups(
    module: nn.Module,
    routes: Mapping[str, Route],
    grouping: Grouping,
    routed: bool,
    defaults_of: Callable[[list[dict[str, Any]]], Sequence[Mapping[str, Any]]],
    own: Mapping[nn.Parameter, ParameterSettings] | None = None,
    entry: str | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups, in the order in which the module holds the first parameter of each.

    Args:
        module: The module.
        routes: The parameters to train.
        grouping: Hyperparameters by kind, name and layer.
        routed: Whether the optimizer has a matrix rule and a fallback rule.
        defaults_of: Says which hyperparameters the optimizer gives to groups that set none.
        own: What the module's own optimizer says of the parameters.
        entry: The entry of groups by which another library's optimizer tells hidden matrices from the rest, if it does.
    """
    own = own or {}
    multipliers = _first_match("lr_multipliers", grouping.lr_multipliers, routes)
    overrides = _first_match("overrides", grouping.overrides, routes)
    layer_decay = grouping.layer_decay or 1.0
    depths = _layers_below_the_top(module) if grouping.layer_decay else {}
    # As the module tree names them: CheckpointWrapper overrides the method and cleans names itself.
    parameters = dict(nn.Module.named_parameters(module))
    marked = marked_parameters(module) if "marked" in grouping.no_decay else set()

    def role_of(r: Route) -> str:
        return r.role if routed or entry else "params"

    def structure(r: Route) -> dict[str, Any]:
        if entry:
            return {entry: (r.role == "matrix") is (entry == "use_muon")}
        return {"role": r.role, **r.layout} if routed else {}

    def named(r: Route) -> tuple[str, nn.Parameter]:
        return clean_name(r.name), parameters[r.name]

    # One parameter of each role stands for the hyperparameters that the role starts from.
    samples: dict[str, dict[str, Any]] = {}
    for r in routes.values():
        samples.setdefault(role_of(r), {"params": [named(r)], **structure(r)})
    defaults = dict(zip(samples, defaults_of(list(samples.values()))))

    groups: dict[str, dict[str, Any]] = {}
    for r in routes.values():
        base = defaults[role_of(r)]
        settings: dict[str, Any] = {}
        factor = 1.0
        labels = [role_of(r)]
        if routed and r.blocks > 1:
            labels.append(f"blocks{r.blocks}")
        if routed and r.split:
            labels.append("split" + "-".join(map(str, r.split)))
        if routed and r.transposed:
            labels.append("transposed")
        if said := own.get(parameters[r.name]):
            labels += [said.label] if said.label else []
            factor *= said.lr_factor
            if said.decay_factor not in (None, 1.0) and base.get("weight_decay"):
                settings["weight_decay"] = base["weight_decay"] * said.decay_factor
        if depth := depths.get(r.name):
            labels.append(f"layer-{depth}")
            factor *= layer_decay**depth
        if pattern := multipliers.get(r.name):
            labels.append(pattern)
            factor *= grouping.lr_multipliers[pattern]
        if pattern := overrides.get(r.name):
            labels.append(pattern)
            _check_override(pattern, grouping.overrides[pattern], r, base)
            settings |= grouping.overrides[pattern]
        decays = base.get("weight_decay") and "weight_decay" not in settings
        if decays and is_exempt(r, parameters[r.name], grouping, marked):
            labels.append("no_decay")
            settings["weight_decay"] = 0.0
        if factor != 1.0:
            if settings.get("lr", base.get("lr")) is None:
                raise ValueError(f"The optimizer has no learning rate to scale for {clean_name(r.name)!r}: add lr.")
            settings["lr"] = settings.get("lr", base["lr"]) * factor
        name = "/".join(dict.fromkeys(labels))
        group = groups.setdefault(name, {"params": [], "name": name, **structure(r), **settings})
        group["params"].append(named(r))
    return list(groups.values())


def suggestion(name: str, known: Iterable[str]) -> str:
    """The known names that are nearest to an unknown one, as a sentence."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {', '.join(near)}?"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"Known: {', '.join(known[:20])}{more}."


def _check_override(pattern: str, override: Iterable[str], r: Route, base: Mapping[str, Any]) -> None:
    known = base.keys() - {"params", "param_names", "name", "rule", "role", *r.layout}
    for key in override:
        if key not in known:
            raise ValueError(
                f"grouping.overrides[{pattern!r}]: {clean_name(r.name)!r} has no hyperparameter {key!r}. "
                + suggestion(key, known)
            )


def _first_match(flag: str, patterns: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """The first pattern that matches each name, where one does."""
    matches = {}
    for name in names:
        pattern = next((p for p in patterns if any(fnmatchcase(s, p) for s in spellings(name))), None)
        if pattern is not None:
            matches[name] = pattern
    for pattern in patterns:
        if pattern not in matches.values():
            raise ValueError(
                f"grouping.{flag}: the pattern {pattern!r} gets no trainable parameter (first match wins). "
                f"{suggestion(pattern, map(clean_name, names))}"
            )
    return matches


def is_exempt(r: Route, p: Tensor, grouping: Grouping, marked: Collection[Tensor]) -> bool:
    """Whether a parameter goes without weight decay."""
    return r.kind.removeprefix("tied ") in grouping.no_decay or p in marked


def marked_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Parameters that are to have no weight decay, as they or their model say."""
    marked = {p for p in module.parameters() if getattr(p, "_no_weight_decay", False)}
    for model in module.modules():
        # By type: a compiled model passes on the attributes of the model in it but renames its parameters.
        patterns: list[str] = []
        if callable(getattr(type(model), "no_weight_decay", None)):
            patterns += model.no_weight_decay()  # type: ignore[operator]
        if callable(getattr(type(model), "no_weight_decay_keywords", None)):
            patterns += [f"*{part}*" for part in model.no_weight_decay_keywords()]  # type: ignore[operator]
        for name, p in model.named_parameters() if patterns else ():
            if any(fnmatchcase(clean_name(name), pattern) for pattern in patterns):
                marked.add(p)
    return marked


def _layers_below_the_top(module: nn.Module) -> dict[str, int]:
    """For each parameter of a timm model, how many of the model's layers lie above it."""
    from timm.models import group_parameters  # here, because it imports every model of timm

    depths: dict[str, int] = {}
    for prefix, model in module.named_modules():
        # By type: a compiled model passes on the attributes of the model in it but renames its parameters.
        if hasattr(type(model), "group_matcher"):
            layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
            for name, layer in layers.items():
                depths.setdefault(f"{prefix}.{name}".removeprefix("."), max(layers.values()) - layer)
    if not depths:
        raise ValueError(
            f"grouping.layer_decay needs a timm model, and {type(module).__name__} has none: leave it out or "
            "set grouping.lr_multipliers by name."
        )
    return depths
