"""Which parameters an optimizer trains, and by which rule."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

#: Share of a matrix optimizer's parameters, in tensors of two axes or more that go to its fallback, from which to warn.
#: Embeddings and heads do not count: they belong there.
MOST_IN_FALLBACK = 0.05
_BELONG_TO_FALLBACK = ("embedding", "tied embedding", "head", "positional", "token", "norm", "bias", "vector")


@dataclass(frozen=True)
class Parameter:
    """What became of one parameter.

    Args:
        name: Its name in the module.
        shape: Its shape, that of the whole one where it is sharded.
        dtype: Its precision, as ``"float32"``.
        kind: What it is, as the router says (:func:`lightning_optim.routing.route`); empty where it does not say.
        rule: The rule that was called for it; empty where it is in no optimizer.
        frozen: Whether it asks for no gradient.
        driven: Whether it had a gradient at any measured step.
        moved: Whether it moved at any measured step.
        blocks: How many matrices the rule sees in it.
        suspected_blocks: How many it may hold, where that is another number; otherwise 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    kind: str = ""
    rule: str = ""
    frozen: bool = False
    driven: bool = True
    moved: bool = True
    blocks: int = 1
    suspected_blocks: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def state(self) -> str:
        """One of ``trained``, ``frozen``, ``in no optimizer``, ``no gradient``, ``never moved``."""
        if self.frozen:
            return "frozen"
        if not self.rule:
            return "in no optimizer"
        if not self.driven:
            return "no gradient"
        return "trained" if self.moved else "never moved"


@dataclass(frozen=True)
class Coverage:
    """Every parameter of a module, and what became of it.

    Args:
        parameters: All of them.
        matrix_rule: Name of the rule for hidden matrices, where the optimizer has one.

    Example:
        >>> coverage = Coverage((
        ...     Parameter("embed.weight", (100, 8), kind="embedding", rule="AdamW"),
        ...     Parameter("fc.weight", (16, 8), kind="linear", rule="NAMO"),
        ...     Parameter("experts.0.up", (4, 8, 8), kind="other", rule="AdamW"),
        ... ), matrix_rule="NAMO")
        >>> print(coverage.summary())
        NAMO: 11 % of the parameters in 1 matrix; AdamW: 68 % embeddings, 22 % other: experts.*.up
        >>> [warning.partition(",")[0] for warning in coverage.warnings()]
        ['22 % of the parameters are tensors of two axes or more that go to the fallback rule']
    """

    parameters: tuple[Parameter, ...]
    matrix_rule: str = ""

    @property
    def numel(self) -> int:
        """Number of elements of all parameters."""
        return sum(p.numel for p in self.parameters)

    def share(self, parameters: Iterable[Parameter]) -> float:
        """The part of all elements that some parameters hold."""
        return sum(p.numel for p in parameters) / max(1, self.numel)

    def untrained(self) -> dict[str, list[Parameter]]:
        """Parameters that should be trained and are not, by what is the matter."""
        found: dict[str, list[Parameter]] = defaultdict(list)
        for p in self.parameters:
            if p.state not in ("trained", "frozen"):
                found[p.state].append(p)
        return dict(found)

    def left_to_fallback(self) -> list[Parameter]:
        """Tensors of two axes or more that a matrix optimizer leaves to its fallback without an obvious reason."""
        return [
            p
            for p in self.parameters
            if self.matrix_rule
            and p.rule not in ("", self.matrix_rule)
            and sum(n > 1 for n in p.shape) >= 2
            and p.kind not in _BELONG_TO_FALLBACK
        ]

    def summary(self) -> str:
        """One line: which rule trains which part of the parameters."""
        by_rule: dict[str, list[Parameter]] = defaultdict(list)
        for p in self.parameters:
            by_rule[p.rule if p.state == "trained" else p.state].append(p)
        rules = sorted((r for r in by_rule if r not in _STATES), key=lambda r: r != self.matrix_rule)
        return "; ".join(
            [
                *(f"{rule}: {self._part(rule, by_rule[rule])}" for rule in rules),
                *(f"{state}: {self._named(by_rule[state])}" for state in _STATES if state in by_rule),
            ]
        )

    def _part(self, rule: str, parameters: list[Parameter]) -> str:
        if rule == self.matrix_rule:
            count = sum(p.blocks for p in parameters)
            matrices = "matrix" if count == 1 else "matrices"
            return f"{_percent(self.share(parameters))} of the parameters in {count} {matrices}"
        if not self.matrix_rule:
            return f"{_percent(self.share(parameters))} of the parameters"
        plain = [p for p in parameters if p.kind in _PLURALS]
        vectors = [p for p in parameters if p.kind not in _PLURALS and sum(n > 1 for n in p.shape) < 2]
        other = [p for p in parameters if p not in plain and p not in vectors]
        words = []
        if plain:
            kinds = dict.fromkeys(_PLURALS[p.kind] for p in plain)
            words.append(f"{_percent(self.share(plain))} {' and '.join(kinds)}")
        if vectors:
            words.append(f"{_percent(self.share(vectors))} vectors")
        if other:
            words.append(f"{_percent(self.share(other))} other: {patterns(p.name for p in other)}")
        return ", ".join(words)

    def _named(self, parameters: list[Parameter]) -> str:
        return f"{_percent(self.share(parameters))}: {patterns(p.name for p in parameters)}"

    def warnings(self) -> list[str]:
        """What a person should know: a sentence each."""
        found = []
        left = self.left_to_fallback()
        if self.share(left) > MOST_IN_FALLBACK:
            found.append(
                f"{_percent(self.share(left))} of the parameters are tensors of two axes or more that go to the "
                f"fallback rule, not to {self.matrix_rule}: {patterns(p.name for p in left)}. Name those that hold "
                "hidden matrices in the matrix patterns."
            )
        for state, parameters in self.untrained().items():
            found.append(f"{_SENTENCES[state]}: {patterns(p.name for p in parameters)}.")
        for p in self.parameters:
            if p.suspected_blocks:
                found.append(
                    f"{p.name} {tuple(p.shape)} is treated as {p.blocks} matri{'x' if p.blocks == 1 else 'ces'} and "
                    f"may hold {p.suspected_blocks}: give it blocks if so."
                )
        return found

    def as_dict(self) -> dict[str, Any]:
        """The coverage as plain values; see :meth:`from_dict`."""
        parameters = [{**asdict(p), "shape": list(p.shape)} for p in self.parameters]
        return {"parameters": parameters, "matrix_rule": self.matrix_rule}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Coverage:
        """The coverage that :meth:`as_dict` wrote."""
        parameters = tuple(Parameter(**{**p, "shape": tuple(p["shape"])}) for p in values["parameters"])
        return cls(parameters, values.get("matrix_rule", ""))


_STATES = ("frozen", "in no optimizer", "no gradient", "never moved")
_SENTENCES = {
    "in no optimizer": "Parameters that ask for a gradient are in no optimizer and stay as they are",
    "no gradient": "Parameters had no gradient at any measured step, so nothing in the loss depends on them",
    "never moved": "Parameters had a gradient and did not move at any measured step",
}
_PLURALS = {
    "embedding": "embeddings",
    "tied embedding": "embeddings",
    "positional": "positions",
    "token": "tokens",
    "head": "head",
    "norm": "norms",
    "bias": "biases",
    "vector": "vectors",
}


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if 0 < share < 0.01 else f"{round(100 * share)} %"


def patterns(names: Iterable[str], most: int = 3) -> str:
    """Names of parameters in few words: numbers become ``*``, and what follows is cut where it differs.

    >>> patterns(["layers.0.fc.weight", "layers.1.fc.weight", "head.bias"])
    'layers.*.fc.weight, head.bias'
    >>> patterns(["experts.0.up", "experts.0.down"])
    'experts.*'
    """
    short = list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in names))
    groups: dict[str, list[str]] = defaultdict(list)
    for name in short:
        groups[name.partition(".*")[0]].append(name)
    words = [members[0] if len(members) == 1 else f"{stem}.*" for stem, members in groups.items()]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


#: Words in the names of weights in which several matrices are often stacked, and how many.
_STACKED = (("qkv", 3), ("c_attn", 3), ("in_proj", 3), ("kv_proj", 2), ("gate_up", 2), ("w12", 2), ("w13", 2))


def suspected_blocks(name: str, shape: tuple[int, ...], blocks: int) -> int:
    """How many matrices a parameter may hold by its name, where its rule sees another number; otherwise 0.

    >>> suspected_blocks("attn.qkv_mix.weight", (24, 8), 1), suspected_blocks("attn.qkv.weight", (24, 8), 3)
    (3, 0)
    """
    if len(shape) != 2 or blocks != 1:
        return 0
    return next((n for word, n in _STACKED if word in name.lower() and shape[0] % n == 0), 0)
