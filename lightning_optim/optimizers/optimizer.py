"""The engine: the only :class:`torch.optim.Optimizer` with a ``step``.

:class:`RuleOptimizer` owns parameter groups, state, step counts, the verdict on non-finite gradients and
checkpoints. :class:`~.hybrid.MatrixOptimizer` builds on it.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from . import execution
from .execution import ParameterObserver, Task
from .rule import MatrixRule, Rule

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


#: What hyperparameters that several rules share must be. A rule's own stand in its ``constraints``.
CONSTRAINTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda x: isinstance(x, Tensor) or (_number(x) and x >= 0), "a finite number >= 0"),
    "betas": (lambda x: all(_number(b) and 0 <= b < 1 for b in x), "numbers in [0, 1)"),
    "momentum": (lambda x: _number(x) and 0 <= x < 1, "a number in [0, 1)"),
    "eps": (lambda x: _number(x) and x >= 0, "a finite number >= 0"),
    "weight_decay": (lambda x: _number(x) and x >= 0, "a finite number >= 0"),
}


class RuleOptimizer(torch.optim.Optimizer, ABC):
    """Base of all optimizers here: runs the rule that each parameter group names.

    What holds for every one of them:

    - ``step(closure)`` works as PyTorch and Lightning call it; ``p.grad`` is never modified; parameters without a
      gradient are left alone.
    - State is float32 (float64 for float64 parameters), also after ``load_state_dict``, and consists of tensors.
    - A step whose gradients hold NaN or infinity changes nothing and is counted in :attr:`skipped_steps`, unless
      ``skip_nonfinite=False``. Gradients so large that their squares would overflow are scaled down first, per
      tensor, to ``finfo.max ** 0.4`` (about 2.6e15 in float32).

    Args:
        params: Parameters, named parameters or parameter groups.
        hyperparameters: Defaults of the first rule's hyperparameters.
        maximize: Ascend instead of descend.
        skip_nonfinite: Skip and count steps whose gradients hold NaN or infinity.
    """

    #: The rules that parameter groups may name; groups that name none get the first.
    rules: ClassVar[tuple[Rule, ...]]

    @abstractmethod
    def __init__(
        self, params: Params, hyperparameters: dict[str, Any], *, maximize: bool, skip_nonfinite: bool
    ) -> None:
        self.skipped_steps = 0
        self.observer: ParameterObserver | None = None
        self._unsettled: _Verdict | None = None
        defaults = hyperparameters | {"maximize": maximize, "skip_nonfinite": skip_nonfinite}
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__() | {
            "skipped_steps": self.skipped_steps,
            "observer": None,
            "_unsettled": None,
        }

    @classmethod
    def default_hyperparameters(cls) -> dict[str, Any]:
        """Hyperparameters and their defaults, from the signature.

        >>> from lightning_optim import DeVAVector
        >>> DeVAVector.default_hyperparameters()
        {'lr': 0.02, 'betas': (0.9, 0.999), 'weight_decay': 0.0, 'nesterov': False}
        """
        parameters = inspect.signature(cls).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "params"}

    # --- parameter groups ---------------------------------------------------------------------------------------

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """The rule that runs on a parameter group."""
        return next(rule for rule in self.rules if rule.name == group["rule"])

    def group_defaults(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Hyperparameters of a new group that does not set them itself."""
        return self.defaults | {"rule": self.rules[0].name}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its keys override the optimizer's defaults for its parameters."""
        # The defaults of a group depend on its rule, and torch fills in `self.defaults`.
        defaults = self.defaults
        self.defaults = self.group_defaults(param_group)
        try:
            super().add_param_group(param_group)
        finally:
            self.defaults = defaults
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        rule = self.rule(group)
        for name, (holds, what) in (CONSTRAINTS | dict(rule.constraints)).items():
            if name in group and not _holds(holds, group[name]):
                raise ValueError(f"{type(self).__name__}: {name} must be {what}, got {name}={group[name]!r}.")
        for p in group["params"]:
            if p.is_complex():
                raise ValueError(
                    f"{type(self).__name__} does not take complex parameters (shape {tuple(p.shape)}); "
                    "optimize torch.view_as_real(parameter) instead."
                )

    # --- the step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step.

        Args:
            closure: Reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            ValueError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settle()
        groups = [(g, [p for p in g["params"] if p.grad is not None and p.numel() > 0]) for g in self.param_groups]
        grads = [self._gradient(p) for p in chain.from_iterable(params for _, params in groups)]
        if not grads:
            return loss
        finite, grads = _inspect(grads)
        skip = self.defaults["skip_nonfinite"]
        known = _known_on_host(finite)
        if skip and known and not finite:
            self.skipped_steps += 1
            return loss
        verdict = _Verdict(finite if skip and not known else None)
        remaining = iter(grads)
        for group, params in groups:
            rule = self.rule(group)
            tasks = [self._task(rule, group, p, next(remaining), verdict) for p in params]
            execution.run(rule, group, tasks, verdict.finite, self.observer)
        self._unsettled = verdict
        if verdict.finite is None:
            self._settle()
        return loss

    def _gradient(self, p: Tensor) -> Tensor:
        g = p.grad
        assert g is not None
        if g.layout is not torch.strided:
            raise ValueError(
                f"{type(self).__name__} does not take sparse gradients (parameter of shape {tuple(p.shape)}); "
                "use sparse=False in the embedding, or torch.optim.SparseAdam for it."
            )
        return g.to(execution.compute_dtype(p))

    def _task(self, rule: Rule, group: dict[str, Any], p: Tensor, g: Tensor, verdict: _Verdict) -> Task:
        state = self.state[p]
        if not state:
            state.update(execution.new_state(rule, p, group))
        t = int(state["step"]) + 1
        host = {name: float(state[name]) for name in rule.host_state}
        extra: dict[str, Any] = {}
        if rule.host_state:
            extra["host"] = host
        if isinstance(rule, MatrixRule):
            extra["shape"] = execution.block_shape(p.shape, group)
            if rule.phases is not None:
                position = next(i for i, q in enumerate(group["params"]) if q is p)
                extra["phase"] = position % rule.phases(group)
        scalars = rule.scalars(t, group | {"lr": float(group["lr"])}, **extra)
        verdict.clocks.append((state, {"step": float(t), **host}))
        tensors = {name: x for name, x in state.items() if name != "step" and name not in rule.host_state}
        return Task(t, p, -g if group["maximize"] else g, tensors, scalars)

    def _settle(self) -> None:
        """Advance the step counts of the last step, or count it as skipped."""
        verdict, self._unsettled = self._unsettled, None
        if verdict is None:
            return
        if not verdict.read():
            self.skipped_steps += 1
            return
        for state, clock in verdict.clocks:
            for name, value in clock.items():
                # A new tensor: the old one may have been moved to the parameter's device by a checkpoint.
                state[name] = torch.tensor(value, dtype=state[name].dtype)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, of tensors and plain values only."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer with the same rules for the same parameters.

        Raises:
            ValueError: The checkpoint was written by another rule.
        """
        for i, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"])):
            if saved.get("rule") != group["rule"]:
                raise ValueError(
                    f"Parameter group {i} was saved by {saved.get('rule', 'another optimizer')!r} and cannot be "
                    f"loaded into {group['rule']!r}; build the optimizer that wrote the checkpoint."
                )
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype; the saved values are what continues the run exactly.
        ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = chain.from_iterable(g["params"] for g in self.param_groups)
        for key, p in zip(ids, params):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[p][name] = value.to(self.state[p][name].device, copy=True)


def _holds(predicate: Callable[[Any], bool], value: Any) -> bool:
    try:
        return predicate(value)
    except TypeError:
        return False


def _known_on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


class _Verdict:
    """Whether a step's gradients were finite, and the step counts that hold if so.

    On an accelerator the answer travels to the host behind the step's own work and is read at the next step, when
    it has long arrived, so that nothing waits.
    """

    def __init__(self, finite: Tensor | None) -> None:
        self.finite = finite
        self.clocks: list[tuple[dict[str, Any], dict[str, float]]] = []
        self._copy = None if finite is None else finite.to("cpu", non_blocking=True)
        self._event = None
        if finite is not None and finite.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return self._copy is None or bool(self._copy)


def _inspect(grads: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Whether all gradients are finite (0-d), and the gradients with squares that cannot overflow."""
    peaks = torch._foreach_norm(grads, math.inf)
    device = peaks[0].device
    finite = torch.stack([peak.to(device, torch.float64 if device.type != "mps" else None) for peak in peaks])
    finite = finite.isfinite().all()
    bounded = []
    for g, peak in zip(grads, peaks):
        limit = torch.finfo(g.dtype).max ** 0.4
        if _known_on_host(peak):
            bounded.append(g * (limit / peak) if peak > limit and peak.isfinite() else g)
        else:
            bounded.append(g * (limit / peak).clamp(max=1.0))
    return finite, bounded
