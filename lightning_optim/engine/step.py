"""How rules are run: first the engine decides which tensors run together, then it runs each rule on them.

:func:`run_rules` is the only entry point. It takes parameters whose gradients have been checked, and updates parameters
and state in place. Rules stay free of everything that depends on how they are run:

- :mod:`.state`: state tensors, and the matrices inside parameters;
- :mod:`.rounding`: how results are rounded into low-precision parameters;
- :mod:`.reference`: the reference, one parameter at a time;
- :mod:`.call`: one call of a rule's function;
- :mod:`.elementwise`: element-wise and group rules, on joined and chunked tensors;
- :mod:`.compile`: the same, compiled;
- :mod:`.matrices`: matrix rules on stacks, which are orthogonalised together;
- :mod:`.distributed_matrices`: matrix rules on several ranks;
- :mod:`.owned_state`: state of sharded parameters that one rank keeps;
- :mod:`lightning_optim.processes`: which rank has which shard of a parameter, and communication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..processes import ProcessGroup
from .batch import Batch
from .distributed_matrices import run_matrices
from .elementwise import run_elementwise
from .reference import run_reference
from .rule import MatrixRule

Backend = Literal["auto", "plain", "chunked", "compiled"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def run_rules(
    batches: Sequence[Batch],
    backend: str = "auto",
    finite: Tensor | None = None,
    observer: Callable[[Tensor, str, Tensor], None] | None = None,
    replicas: Sequence[ProcessGroup] = (),
    parts: Sequence[ProcessGroup] = (),
) -> None:
    """Update parameters and state in place.

    Args:
        batches: Rules and the parameters they run on.
        backend: One of :data:`BACKENDS`.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        observer: Called as ``observer(p, name, value)`` with what matrix rules report.
        replicas: Ranks that hold equal parameters and gradients and share orthogonalisation, if any do.
        parts: Ranks that hold other shards of the parameters, where these are not ``DTensor``.
    """
    others = [batch for batch in batches if not issubclass(batch.rule, MatrixRule)]
    with _without_autocast(batches):
        if backend == "plain" and finite is None and not (replicas or parts or any(map(_sharded, batches))):
            run_reference(batches, observer)
            return
        if len(others) == len(batches):
            run_elementwise(others, backend, finite, parts)
            return
        of_matrices = [batch for batch in batches if issubclass(batch.rule, MatrixRule)]
        matrices = run_matrices(of_matrices, backend, finite, observer, replicas)
        next(matrices, None)  # While the first matrices are being sent, the other rules run.
        run_elementwise(others, backend, finite, parts)
        for _ in matrices:
            pass


def _sharded(batch: Batch) -> bool:
    return any(task.p is not task.parameter for task in batch.tasks)


def _without_autocast(batches: Sequence[Batch]) -> AbstractContextManager[Any]:
    """Turn ``torch.autocast`` off for the step, which manual optimization may make inside its context."""
    kinds: set[str] = set()
    for batch in batches:
        if "devices" not in batch.cache:
            batch.cache["devices"] = {task.p.device.type for task in batch.tasks}
        kinds |= batch.cache["devices"]
    enabled = [k for k in kinds if torch.is_autocast_enabled(k) and torch.amp.is_autocast_available(k)]
    stack = ExitStack()
    for kind in enabled:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
