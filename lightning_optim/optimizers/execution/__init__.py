"""How rules are run: rule -> plan (which tensors run together) -> run.

:func:`run` is the only entry. It receives the parameters whose gradients are fit to be used and updates parameters and
state in place. Rules stay free of everything that changes with the way of running:

- :mod:`.tensors`: precision, state, matrices inside parameters;
- :mod:`.storage`: how results are rounded into narrow parameters;
- :mod:`.call`: one call of a rule's function;
- :mod:`.flat`: element-wise and group rules, joined and cut;
- :mod:`.kernels`: the same, compiled;
- :mod:`.stacks`: matrix rules, stacked, and the orthogonalisation they share;
- :mod:`.spread`: matrix rules on many processes;
- :mod:`.homes`: state that lives with one of them;
- :mod:`.sharding`: which process has which part of a parameter, and communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from ..rule import MatrixRule
from . import flat, homes, sharding, spread
from .flat import largest
from .sharding import Group
from .stacks import ParameterObserver
from .storage import RESIDUAL, ROUNDINGS, Rounding, first_number, is_narrow, load, prepare_residual, residual_dtype
from .tensors import (
    Batch,
    State,
    Task,
    accumulation_dtype,
    block_shape,
    compute_dtype,
    follow,
    lives_with_owner,
    new_state,
    number_names,
    state_shapes,
    to_blocks,
)

__all__ = [
    "BACKENDS",
    "RESIDUAL",
    "ROUNDINGS",
    "Backend",
    "Batch",
    "Group",
    "ParameterObserver",
    "Rounding",
    "State",
    "Task",
    "accumulation_dtype",
    "block_shape",
    "compute_dtype",
    "first_number",
    "follow",
    "homes",
    "is_narrow",
    "largest",
    "lives_with_owner",
    "load",
    "new_state",
    "number_names",
    "prepare_residual",
    "residual_dtype",
    "run",
    "sharding",
    "state_shapes",
    "to_blocks",
]

Backend = Literal["auto", "plain", "chunked", "compiled"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def run(
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
    kinds = {"cpu" if task.p.is_cpu else task.p.device.type for batch in batches for task in batch.tasks}
    with _without_autocast(kinds):
        matrices = spread.run(
            [batch for batch in batches if isinstance(batch.rule, MatrixRule)], backend, finite, observer, replicas
        )
        next(matrices, None)  # While the first matrices travel, the other rules run.
        flat.run([batch for batch in batches if not isinstance(batch.rule, MatrixRule)], backend, finite, parts)
        for _ in matrices:
            pass


@contextmanager
def _without_autocast(device_types: set[str]) -> Iterator[None]:
    """Keep the precision of products when a step is made under ``torch.autocast``, as in manual optimization."""
    with ExitStack() as stack:
        for kind in device_types:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
