"""How rules are run: rule -> plan (which tensors run together) -> run.

:func:`run_rules` is the only entry. It receives the parameters whose gradients are fit to be used and updates
parameters and state in place. Rules stay free of everything that changes with the way of running:

- :mod:`.state`: state tensors, and the matrices inside parameters;
- :mod:`.rounding`: how results are rounded into low-precision parameters;
- :mod:`.call`: one call of a rule's function;
- :mod:`.elementwise`: element-wise and group rules, joined and chunked;
- :mod:`.compile`: the same, compiled;
- :mod:`.matrices`: matrix rules on stacks, and the orthogonalisation that stacks share;
- :mod:`.distributed_matrices`: matrix rules on several ranks;
- :mod:`.owned_state`: state that one rank keeps for all;
- :mod:`lightning_optim.processes`: which rank has which shard of a parameter, and communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from ..processes import Group
from . import distributed_matrices, elementwise
from .matrices import ParameterObserver
from .rule import MatrixRule
from .state import Batch

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
    kinds = {"cpu" if task.p.is_cpu else task.p.device.type for batch in batches for task in batch.tasks}
    with _without_autocast(kinds):
        matrices = distributed_matrices.run(
            [batch for batch in batches if issubclass(batch.rule, MatrixRule)], backend, finite, observer, replicas
        )
        next(matrices, None)  # While the first matrices travel, the other rules run.
        elementwise.run([batch for batch in batches if not issubclass(batch.rule, MatrixRule)], backend, finite, parts)
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
