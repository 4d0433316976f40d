"""How rules are run: the engine decides which tensors run together, then runs each rule on them.

:func:`run_rules` is the only entry point. It takes parameters whose gradients have been checked, and updates parameters
and state in place. Rules stay free of everything that depends on how they are run:

- :mod:`.batch`: the parameters of a group that take part, prepared once and used for many steps;
- :mod:`.state`: state tensors, and the matrices inside parameters;
- :mod:`.rounding`: how results are rounded into low-precision parameters;
- :mod:`.reference`: the reference, one parameter at a time;
- :mod:`.call`: one call of a rule's function;
- :mod:`.displacement`: steps that depend on sums over whole matrices;
- :mod:`.elementwise`: element-wise and group rules, on joined and chunked tensors;
- :mod:`.compile`: the same, compiled;
- :mod:`.matrices`: matrix rules on stacks, which are orthogonalised together;
- :mod:`.distributed_matrices`: matrix rules on several ranks;
- :mod:`.owned_state`: state of sharded parameters that one rank keeps;
- :mod:`lightning_optim.processes`: which rank has which shard of a parameter, and communication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..processes import ProcessGroup
from .batch import Batch
from .distributed_matrices import run_matrices
from .elementwise import run_elementwise
from .reference import run_reference

Backend = Literal["auto", "plain", "chunked", "compiled"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def run_rules(
    batches: Sequence[Batch],
    backend: str = "auto",
    finite: Tensor | None = None,
    observer: Callable[[Tensor, str, Tensor], None] | None = None,
    replicas: Sequence[ProcessGroup] = (),
    parts: Sequence[ProcessGroup] = (),
    loss: float | None = None,
) -> None:
    """Update parameters and state in place.

    Args:
        batches: Rules and the parameters they run on.
        backend: One of :data:`BACKENDS`.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        observer: Called as ``observer(p, name, value)`` with what matrix rules report.
        replicas: Ranks that hold equal parameters and gradients and share orthogonalisation, if any do.
        parts: Ranks that hold other shards of the parameters, where these are not ``DTensor``.
        loss: The loss of the step, for a rule that needs it.
    """
    if autocasting := _autocasting(batches):  # Manual optimization may make a step inside its context.
        with torch.autocast(autocasting, enabled=False):
            return run_rules(batches, backend, finite, observer, replicas, parts, loss)
    if backend == "plain" and finite is None and not (replicas or parts or any(map(_sharded, batches))):
        return run_reference(batches, observer, loss)
    of_matrices = [batch for batch in batches if batch.rule.kind == "matrix"]
    if not of_matrices:
        return run_elementwise(batches, backend, finite, parts, loss)
    matrices = run_matrices(of_matrices, backend, finite, observer, replicas)
    next(matrices, None)  # While the first matrices are being sent, the other rules run.
    run_elementwise([batch for batch in batches if batch.rule.kind != "matrix"], backend, finite, parts)
    for _ in matrices:
        pass


def _sharded(batch: Batch) -> bool:
    return any(task.p is not task.parameter for task in batch.tasks)


def _autocasting(batches: Sequence[Batch]) -> str | None:
    """A type of device on which a step would run in low precision, if there is one."""
    for batch in batches:
        if "devices" not in batch.cache:
            kinds = {task.p.device.type for task in batch.tasks}
            batch.cache["devices"] = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]
        for kind in batch.cache["devices"]:
            if torch.is_autocast_enabled(kind):
                return kind
    return None
