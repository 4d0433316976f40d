"""torch's ``Join``, with which ranks under DDP may have unequal numbers of batches."""

from __future__ import annotations

import gc
from weakref import WeakKeyDictionary, ref

from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from . import private

_wrappers: WeakKeyDictionary[Optimizer, list[ref[DistributedDataParallel]]] = WeakKeyDictionary()


def is_joining(optimizer: Optimizer) -> bool:
    """Whether a ``Join`` context is, or was, active for a DDP module that holds parameters of an optimizer.

    A rank that has run out of batches makes no more steps. It takes part in DDP's collectives but not in those of an
    optimizer, which would wait for it forever. Nothing links a parameter to its DDP module, so the module is searched
    among all objects, once, at the first step. torch does not record the end of a context; by then the state of the
    optimizer differs between ranks, so that work should not be shared anyway.
    """
    if optimizer not in _wrappers:
        ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
        modules = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
        _wrappers[optimizer] = [ref(m) for m in modules if any(id(p) in ours for p in m.parameters())]
    return any(module is not None and private.joins(module) for module in (r() for r in _wrappers[optimizer]))
