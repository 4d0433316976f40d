"""How rules are run: rule -> plan (which tensors run together) -> run.

:func:`run_rules` is the only entry. It receives the parameters whose gradients are fit to be used and updates
parameters and state in place. Rules stay free of everything that changes with the way of running:

- :mod:`.state`: state tensors, and the matrices inside parameters;
- :mod:`.rounding`: how results are rounded into low-precision parameters;
- :mod:`.reference`: the reference, one parameter at a time;
- :mod:`.call`: one call of a rule's function;
- :mod:`.elementwise`: element-wise and group rules, joined and chunked;
- :mod:`.compile`: the same, compiled;
- :mod:`.matrices`: matrix rules on stacks, and the orthogonalisation that stacks share;
- :mod:`.distributed_matrices`: matrix rules on several ranks;
- :mod:`.owned_state`: state that one rank keeps for all;
- :mod:`lightning_optim.processes`: which rank has which shard of a parameter, and communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..processes import Group
from . import distributed_matrices, elementwise, reference
from .batch import Batch
from .matrices import ParameterObserver
from .rule import MatrixRule

Backend = Literal["auto", "plain", "chunked", "compiled"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def run_rules(
    batches: Sequence[Batch],
    backend: str = "auto",
    finite: Tensor | None = None,
    observer: ParameterObserver | None = None,
    replicas: Sequence[Group] = (),
    parts: Sequence[Group] = (),
) -> None:
    """Update parameters and state in place.

    Args:
        batches: Rules and the parameters they run on.
        backend: One of :data:`BACKENDS`.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        observer: Called as ``observer(p, name, value)`` with what matrix rules report.
        replicas: The processes that hold equal parameters and gradients and share orthogonalisation, if any do.
        parts: Processes that hold other parts of the parameters where those do not say so themselves.
    """
    flat = [batch for batch in batches if not issubclass(batch.rule, MatrixRule)]
    with _without_autocast(batches):
        if backend == "plain" and finite is None and not (replicas or parts or any(map(_sharded, batches))):
            reference.run(batches, observer)
            return
        if len(flat) == len(batches):
            elementwise.run(flat, backend, finite, parts)
            return
        whole = [batch for batch in batches if issubclass(batch.rule, MatrixRule)]
        matrices = distributed_matrices.run(whole, backend, finite, observer, replicas)
        next(matrices, None)  # While the first matrices travel, the other rules run.
        elementwise.run(flat, backend, finite, parts)
        for _ in matrices:
            pass


def _sharded(batch: Batch) -> bool:
    return any(task.p is not task.parameter for task in batch.tasks)


def _without_autocast(batches: Sequence[Batch]) -> AbstractContextManager[Any]:
    """Keep the precision of products when a step is made under ``torch.autocast``, as in manual optimization."""
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
