"""What is compared, and on which terms: contenders, their hyperparameters, the design of a study."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import yaml
from torch.optim import Optimizer

from ..engine.decay import renamed
from ..engine.optimizer import RuleOptimizer
from ..engine.two_rules import MatrixOptimizer, fallback_hyperparameters
from ..registry import get
from .statistics import LEVEL

__all__ = ["BASELINE", "Contender", "Design", "Rates", "Run", "contenders", "digest"]

#: What every other optimizer is compared with.
BASELINE = "AdamW"

#: Learning rates to start from, for optimizers whose declaration holds none that is used in practice.
_STARTS: dict[type[Optimizer], float] = {torch.optim.SGD: 0.1}

#: Arguments of our optimizers, and of torch's, that say the form of weight decay, and the value for decoupled decay.
_FORMS: dict[str, Any] = {"decay": "decoupled", "decoupled_weight_decay": True}

Decay = Literal["decoupled", "own"]


@dataclass(frozen=True)
class Rates:
    """Learning rates that are evenly spaced on a logarithmic axis.

    >>> Rates.parse("1e-3:1e-2:x2").values
    (0.001, 0.002, 0.004, 0.008)
    """

    low: float
    high: float
    factor: float = 2.0

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.high and self.factor > 1):
            raise ValueError(
                f"lr={self.low:g}:{self.high:g}:x{self.factor:g}: the range must be positive, from low to high, and "
                "its factor above 1."
            )

    @classmethod
    def parse(cls, text: str) -> Rates:
        """A range written as ``LOW:HIGH`` or ``LOW:HIGH:xFACTOR``.

        Raises:
            ValueError: It is written otherwise.
        """
        low, high, factor = [*text.split(":"), "x2", "", ""][:3] if text.count(":") in (1, 2) else ("", "", "")
        try:
            return cls(float(low), float(high), float(factor.removeprefix("x")))
        except ValueError as error:
            if "range must be" in str(error):
                raise
            raise ValueError(
                f"lr={text!r} must be LOW:HIGH or LOW:HIGH:xFACTOR, such as 1e-4:1e-1:x2, with which each rate is "
                "twice the one before."
            ) from error

    @property
    def values(self) -> tuple[float, ...]:
        """The rates, rounded to three digits."""
        rates = [self.low]
        while rates[-1] * self.factor <= self.high * (1 + 1e-9):
            rates.append(rates[-1] * self.factor)
        return tuple(rounded(rate) for rate in rates)


def rounded(value: float) -> float:
    """A searched value, with three digits: the number that is printed is the one that is used."""
    return float(f"{value:.3g}")


@dataclass(frozen=True)
class Contender:
    """An optimizer that takes part.

    Args:
        name: What it is called.
        optimizer: Name of an optimizer of this library, or the dotted path of any torch optimizer.
        args: Its arguments that are not searched for.
        start: The learning rate from which the search begins.
        fallback_ratio: Learning rate of the fallback rule over that of the matrices; ``None`` if there is no such rule.
        decay: In words, how its weight decay acts.
    """

    name: str
    optimizer: str
    args: Mapping[str, Any]
    start: float
    fallback_ratio: float | None = None
    decay: str = ""

    @classmethod
    def of(cls, text: str, weight_decay: float | None, decay: Decay) -> Contender:
        """A contender written as ``OPTIMIZER`` or ``OPTIMIZER:ARGUMENT=VALUE,...``.

        Args:
            text: The name of an optimizer, or a dotted path, and perhaps arguments.
            weight_decay: Weight decay of all contenders; ``None`` for each one's own default.
            decay: ``decoupled`` wherever an optimizer can, or ``own`` for what each does by default.

        Raises:
            ValueError: There is no such optimizer, or it is no optimizer of torch.
        """
        name, _, rest = text.partition(":")
        given = {}
        for pair in filter(None, re.split(r",(?=\w+=)", rest)):
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"--optimizers {text}: write arguments as {name}:ARGUMENT=VALUE,ARGUMENT=VALUE.")
            given[key.strip()] = yaml.safe_load(value)
        optimizer = _class(name)
        known = _arguments(optimizer)
        args = {key: value for key, value in given.items() if key != "fallback_ratio"}
        form = ""
        if "weight_decay" in known:
            if weight_decay is not None:
                args.setdefault("weight_decay", weight_decay)
            flag = next((flag for flag in _FORMS if flag in known), None)
            if flag and decay == "decoupled" and "decoupled" not in args:  # The older name says it, too.
                args.setdefault(flag, _FORMS[flag])
            form = _form(optimizer, flag, args, known)
        start = args.pop("lr", None) or _STARTS.get(optimizer) or known.get("lr") or 1e-3
        ratio = None
        if issubclass(optimizer, MatrixOptimizer) and "fallback_lr" not in args:
            fallback = args.get("fallback", known["fallback"])
            rate = fallback_hyperparameters(fallback, args)["lr"]
            ratio = given.get("fallback_ratio") or rounded(rate / known["lr"])
        return cls(text, name, args, float(start), ratio, form)

    @property
    def searchable(self) -> set[str]:
        """Hyperparameters that can be searched for."""
        names = set(_arguments(_class(self.optimizer)))
        return names | ({"fallback_ratio"} if self.fallback_ratio is not None else set())

    def arguments(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments, with those that the search has chosen."""
        args = {**self.args, **chosen}
        ratio = args.pop("fallback_ratio", self.fallback_ratio)
        if ratio is not None:
            args["fallback_lr"] = rounded(args["lr"] * ratio)
        return args


def _class(name: str) -> type[Optimizer]:
    if "." not in name:
        return get(name).cls
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--optimizers {name}: cannot be imported ({error}).") from error
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise ValueError(f"--optimizers {name} is not a torch.optim.Optimizer.")
    return cls


def _arguments(cls: type[Optimizer]) -> Mapping[str, Any]:
    """The arguments of an optimizer and their defaults."""
    if issubclass(cls, RuleOptimizer):
        return cls.default_hyperparameters()
    parameters = inspect.signature(cls).parameters
    return {name: None if p.default is p.empty else p.default for name, p in parameters.items() if name != "params"}


def _form(cls: type[Optimizer], flag: str | None, args: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """What is printed of an optimizer's weight decay."""
    amount = args.get("weight_decay", known["weight_decay"])
    if not amount:
        return "none"
    if flag == "decay":
        how = renamed(dict(args), known[flag], cls.__name__).get(flag, known[flag])
        how = "coupled (L2)" if how == "coupled" else how
    elif flag:
        how = "decoupled" if args.get(flag, known[flag]) else "coupled (L2)"
    elif cls is torch.optim.AdamW:
        how = "decoupled"
    elif cls.__module__.startswith("torch.optim"):
        how = "coupled (L2)"
    else:
        how = "in its own form"
    return f"{amount:g} {how}"


def contenders(names: Sequence[str], weight_decay: float | None, decay: Decay) -> list[Contender]:
    """The contenders of a study, the baseline first, which is always among them.

    Raises:
        ValueError: A name is unknown or given twice.
    """
    paths = {BASELINE, f"torch.optim.{BASELINE}"}
    base = next((name for name in names if name in paths), None)
    base = base or next((name for name in names if name.partition(":")[0] in paths), BASELINE)
    ordered = [base, *(name for name in names if name != base)]
    if len({*ordered}) < len([*names]) or (twice := {name for name in names if [*names].count(name) > 1}):
        twice = {name for name in names if [*names].count(name) > 1}
        raise ValueError(f"--optimizers names {', '.join(sorted(twice))} twice.")
    return [Contender.of(name, weight_decay, decay) for name in ordered]


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        contender: Name of the contender.
        optimizer: Name or dotted path of the optimizer.
        args: All its arguments.
        seed: Seed of the initial weights and of the order of the data.
        steps: Length in optimizer steps; ``None`` for the task's own.
        phase: ``tuning`` or ``reporting``.
        metric: Name of the metric; ``None`` to find one.
        mode: Whether it is to be small or large.
    """

    contender: str
    optimizer: str
    args: Mapping[str, Any]
    seed: int
    steps: int | None
    phase: Literal["tuning", "reporting"]
    metric: str | None = None
    mode: Literal["min", "max"] = "min"

    def key(self, task: str) -> str:
        """What the run is found by: all that its result depends on.

        Args:
            task: Fingerprint of the task's configuration and of the code.
        """
        return digest(task, self.optimizer, self.args, self.seed, self.steps, self.metric, self.mode)

    @property
    def interval(self) -> int:
        """Steps between measurements of diagnostics: ten or more of them in a run."""
        return min(max((self.steps or 250) // 10, 1), 50)

    @property
    def label(self) -> str:
        """Its name among all runs: what differs between them."""
        return f"{self.contender},lr={self.args['lr']:g},seed={self.seed}"


def digest(*values: Any) -> str:
    """A hash of plain values.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Design:
    """The terms of a study, equal for all contenders.

    Args:
        contenders: Who takes part, the baseline first.
        trials: Settings that are tried of each contender at first.
        most_trials: Bound of what is tried when the best stays on the edge of the range.
        seeds: Reporting runs of each contender, at its best setting.
        tuning_seeds: Runs of each of the three best settings; the others have one.
        steps: Length of a run; ``None`` for the task's own.
        rates: Learning rates of all contenders. ``None``: ``trials`` rates around each one's start.
        factor: Ratio of neighbouring rates.
        search: ``grid`` over the learning rate, or ``tpe`` over it and ``also``.
        also: Ranges of further hyperparameters.
        metric: What is compared; ``None`` for the validation loss.
        mode: Whether it is to be small or large.
        level: Confidence level.
    """

    contenders: tuple[Contender, ...]
    trials: int = 7
    most_trials: int = 14
    seeds: int = 5
    tuning_seeds: int = 3
    steps: int | None = None
    rates: Rates | None = None
    factor: float = 2.0
    search: Literal["grid", "tpe"] = "grid"
    also: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    level: float = LEVEL

    def __post_init__(self) -> None:
        for name, least in (("trials", 3), ("seeds", 1), ("tuning_seeds", 1), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {self.mode!r}.")
        if self.search not in ("grid", "tpe"):
            raise ValueError(f"search must be 'grid' or 'tpe', got {self.search!r}.")
        if self.also and self.search == "grid":
            raise ValueError("search='grid' tries learning rates alone: add search='tpe' (--search tpe) for `also`.")
        for name, (low, high) in self.also.items():
            if not any(name in contender.searchable for contender in self.contenders):
                raise ValueError(f"also {name}: no contender has such a hyperparameter.")
            if not 0 < low < high:
                raise ValueError(f"also {name}={low:g}:{high:g}: the range must be positive, from low to high.")

    @property
    def baseline(self) -> Contender:
        return self.contenders[0]

    def first_rates(self, contender: Contender) -> tuple[float, ...]:
        """The learning rates that are tried of a contender at first."""
        if self.rates is not None:
            return self.rates.values
        low = -((self.trials - 1) // 2)
        return tuple(rounded(contender.start * self.factor ** (low + i)) for i in range(self.trials))

    @property
    def report_seeds(self) -> tuple[int, ...]:
        return tuple(range(1, self.seeds + 1))

    @property
    def tune_seeds(self) -> tuple[int, ...]:
        """Seeds of the tuning, none of which is a reporting seed."""
        return tuple(range(1001, 1001 + self.tuning_seeds))

    def count(self, contender: Contender) -> int:
        """How many runs a contender has if its range is not extended."""
        return len(self.first_rates(contender)) + 3 * (self.tuning_seeds - 1) + self.seeds

    def cost(self, score: float | None) -> float:
        """What is to be small; infinity for a run that diverged."""
        if score is None:
            return float("inf")
        return score if self.mode == "min" else -score

    def first(self, contender: Contender, chosen: Mapping[str, Any]) -> Run:
        """The run by which a setting is judged at first."""
        return self.runs(contender, chosen, "tuning")[0]

    def runs(self, contender: Contender, chosen: Mapping[str, Any], phase: Literal["tuning", "reporting"]) -> list[Run]:
        """The runs of one setting, one per seed."""
        seeds = self.tune_seeds if phase == "tuning" else self.report_seeds
        args = contender.arguments(chosen)
        return [
            Run(contender.name, contender.optimizer, args, seed, self.steps, phase, self.metric, self.mode)
            for seed in seeds
        ]

    def smaller(self) -> list[Design]:
        """Smaller designs, the largest first."""
        designs = []
        for seeds in range(min(self.seeds, 5), 2, -1) if self.seeds > 3 else [self.seeds]:
            for trials in range(self.trials, 2, -2):
                designs.append(replace(self, trials=trials, most_trials=2 * trials, seeds=seeds))
        designs = [d for d in designs if (d.trials, d.seeds) != (self.trials, self.seeds)]
        return sorted(designs, key=lambda d: (d.trials + d.seeds, d.seeds), reverse=True)
