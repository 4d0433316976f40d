"""Steps as CUDA graphs: the kernels of a step, recorded once and replayed by one launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from .. import processes
from .batch import SharedStep
from .hyperparameters import is_number
from .layout import layout_of
from .optimizer import RuleOptimizer
from .rule import ModelRule, hyperparameters_of, lasting_numbers

#: Numbers that a graph depends on, like switches: rules skip operations that have no effect with them.
_PLAIN = (0.0, 1.0, inf)
#: Sets of tensor addresses for which graphs are kept (gradients may alternate between several).
_PLACES = 4
#: Steps in a row without a graph after which to warn.
_PATIENCE = 10


def capture_step(optimizer: RuleOptimizer) -> None:
    """Make ``optimizer.step()`` replay a CUDA graph where it can.

    The host then launches one graph instead of many short kernels. Numbers that change from step to step (learning
    rates, bias corrections) are still computed on the host, in float64, and copied to the device at once before the
    graph runs; schedules and edits of ``param_groups`` work as before.

    A graph is bound to the addresses of its tensors. If parameters, gradients or state are at addresses that the last
    few steps did not have, the step runs without a graph and records one; a step with an observer runs without a graph.
    So **gradients have to keep their memory**: call ``zero_grad(set_to_none=False)``. A rule whose steps differ
    (Anon's refreshes, PNM's odd steps, AdaBelief's first five) gets a graph for each form.

    Copies of an optimizer, also pickled ones, start without graphs. Graphs keep the memory of their temporaries.

    Args:
        optimizer: An optimizer of this library whose parameters are all on one CUDA device, in a run of one process.

    Raises:
        ValueError: The optimizer's step cannot be captured; the message says why.

    Example:
        .. code-block:: python

            optimizer = lightning_optim.NAMO(groups, backend="compiled")
            lightning_optim.capture_step(optimizer)
            for x, y in batches:
                loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
    """
    graphs = StepGraphs(optimizer)
    graphs.check()
    optimizer._graphs = graphs


@dataclass
class _Recording:
    """Steps with tensors at the same addresses.

    Args:
        steps: The shared steps of the first one.
        graphs: For each form, a function that replays its graph with the numbers of a step and returns whether
            gradients were finite.
    """

    steps: list[SharedStep]
    graphs: dict[Any, Callable[[Tensor], bool | Tensor]] = field(default_factory=dict)


class StepGraphs:
    """The graphs of an optimizer's steps. Called by the optimizer to make a step."""

    def __init__(self, optimizer: RuleOptimizer) -> None:
        self.optimizer = optimizer
        self._recordings: dict[Any, _Recording] = {}
        self._moves = 0

    def check(self) -> None:
        """Raise an error if the optimizer's step cannot be captured."""
        optimizer, name = self.optimizer, type(self.optimizer).__name__
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not is_one_gpu({p.device for p in params}):
            raise ValueError(
                f"{name}: a graph runs on one CUDA device, and parameters are on "
                f"{', '.join(sorted({str(p.device) for p in params}))}; move the model first, or step without graphs."
            )
        groups = (optimizer.process_group, optimizer.shard_group)
        if processes.mesh_groups(params) or any(map(processes.nontrivial, groups)):
            raise ValueError(f"{name}: a step in which several processes communicate cannot be captured.")
        if optimizer.rounding == "stochastic":
            raise ValueError(
                f"{name}: rounding='stochastic' draws new random numbers on the host in every step and cannot "
                "be captured; use 'kahan' or 'split'."
            )
        if optimizer.state_dtype != "float32":
            raise ValueError(
                f"{name}: state_dtype={optimizer.state_dtype!r} draws new random numbers on the host in every step "
                "and cannot be captured; use state_dtype='float32'."
            )
        for group in optimizer.param_groups:
            rule = optimizer.rule(group)
            if not rule.capturable or group.get("orthogonalizer") == "exact":
                remedy = "choose an iteration for the orthogonalizer" if rule.capturable else "step without graphs"
                what = "takes the loss to the host" if issubclass(rule, ModelRule) else "decomposes matrices"
                raise ValueError(f"{name}: the rule {rule.name!r} {what}, which cannot be captured; {remedy}.")

    def __call__(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> tuple[bool | Tensor, list[SharedStep]]:
        """Make a step, as :meth:`.optimizer.RuleOptimizer._run` does."""
        optimizer = self.optimizer
        recording = self._recordings.get(self._find_layout(work))
        if recording is None:
            return self._start(work)
        self._moves = 0
        if optimizer.observer is not None:
            return optimizer._run(work)
        steps = recording.steps
        for step in steps:
            h = hyperparameters_of(step.rule, step.group)
            step.begin(h, lasting_numbers(step.rule, h))
        numbers = [_varying(step.scalars) for step in steps]
        forms = tuple(_form(step.scalars) for step in steps)
        host = torch.tensor([x for each in numbers for x in each.values()], dtype=torch.float64, device="cpu")
        if forms in recording.graphs:
            return recording.graphs[forms](host), steps
        # Made once without a graph, so that kernels are compiled and libraries loaded. Recording does not run it again.
        device = work[0][1][0].device
        values = torch.empty_like(host, device=device)
        _copy_to(values, host)
        rest = iter(values.unbind())
        given = [step.scalars | {name: next(rest) for name in each} for step, each in zip(steps, numbers)]
        finite, _ = optimizer._run(work, iter(given))
        replay, recorded = record(lambda: optimizer._run(work, iter(given))[0], device)

        def replayed(host: Tensor) -> bool | Tensor:
            _copy_to(values, host)
            replay()
            return recorded

        recording.graphs[forms] = replayed
        return finite, steps

    def _start(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> tuple[bool | Tensor, list[SharedStep]]:
        """Make the first step with these tensors, whose state may not exist yet."""
        self.check()
        self._moves += 1
        if self._moves == _PATIENCE:
            warnings.warn(
                f"capture_step: no step of {type(self.optimizer).__name__} was captured, since parameters, gradients "
                f"or state had new addresses in each of {_PATIENCE} steps. Keep the gradients' memory by "
                "zero_grad(set_to_none=False), and give the same parameters a gradient at every step.",
                stacklevel=2,
            )
        finite, steps = self.optimizer._run(work)
        while len(self._recordings) >= _PLACES:
            del self._recordings[next(iter(self._recordings))]
        self._recordings[self._find_layout(work)] = _Recording(steps)
        return finite, steps

    def _find_layout(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> Any:
        """What a graph is bound to, besides the form of the step: addresses of tensors, and settings."""
        optimizer = self.optimizer
        settings = (optimizer.backend, optimizer.skip_nonfinite, optimizer.rounding)
        groups = tuple((id(g), g["maximize"], str(layout_of(g))) for g, _ in work)
        params = [p for _, params in work for p in params]
        tensors = [*params, *(p.grad for p in params if p.grad is not None)]
        states = [x for p in params for x in optimizer.state.get(p, {}).values() if isinstance(x, Tensor)]
        places = tuple((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors)
        return settings, groups, places, tuple((id(x), x.data_ptr()) for x in states)


def record(work: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Capture the kernels of ``work`` without running them; returns a function that runs them, and its result."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as those that load data, may allocate memory at the same time.
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
    ):
        result = work()
    return graph.replay, result


def is_one_gpu(devices: Iterable[torch.device]) -> bool:
    """Whether there is exactly one device, and it supports graphs."""
    return [device.type for device in devices] == ["cuda"]


def _copy_to(values: Tensor, host: Tensor) -> None:
    # Pinned memory is not reused before the copy has read it, so the host need not wait.
    values.copy_(host.pin_memory() if values.is_cuda else host, non_blocking=True)


def _varying(scalars: dict[str, Any]) -> dict[str, float]:
    """The numbers that a graph reads."""
    return {name: float(x) for name, x in scalars.items() if is_number(x) and x not in _PLAIN}


def _form(scalars: dict[str, Any]) -> Sequence[Any]:
    """The form of a step: all of its scalars but the values of numbers."""
    return tuple((name, float if is_number(x) and x not in _PLAIN else x) for name, x in scalars.items())
