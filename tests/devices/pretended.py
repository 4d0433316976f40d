"""A device that this machine does not have, pretended: tensors say that they are there and are computed on the CPU.

What such a device lacks (float64, decompositions) it refuses, as it does operations that mix devices, and every wait of
the host for the device is counted. Unlike fake tensors these have values, so that whole runs can be made and compared.

torch knows one such device per process, and takes it for the accelerator from then on: use it in a process of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "pretended"
#: Operations that may take tensors of two devices.
_BETWEEN = ("copy_", "_to_copy", "_foreach_copy_")
#: Operations whose result the host reads, or whose shape depends on values.
_READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2")


@dataclass(frozen=True)
class Kind:
    """What a kind of device lacks: dtypes, and operations by the start of their names."""

    dtypes: tuple[torch.dtype, ...] = ()
    operations: tuple[str, ...] = ()


_DOUBLE = (torch.float64, torch.complex128)
KINDS = {
    # Apple's GPUs; which decompositions they have differs between versions of torch.
    "mps": Kind(_DOUBLE, ("_linalg_eigh", "linalg_eig", "_linalg_eigvals", "_linalg_svd", "linalg_qr", "geqrf")),
    # Intel's GPUs without units for float64.
    "xpu": Kind(_DOUBLE),
    "cuda": Kind(),
}


class PretendedTensor(Tensor):
    """A tensor that says it is on the pretended device. ``held`` has its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE, 0),
            requires_grad=held.requires_grad,
        )
        tensor.held = held
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"{self.device}: {self.held}"

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendedTensor:
        return memo.setdefault(id(self), PretendedTensor(self.held.clone()))

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} after the device has gone")


class PretendedDevice(TorchDispatchMode):
    """While it is active the device exists. ``waits`` counts what made the host wait for it, by operation.

    Args:
        kind: What it lacks.
        accelerator_groups: Whether process groups move its tensors only, as NCCL's do, and refuse those on the CPU.
    """

    def __init__(self, kind: Kind, accelerator_groups: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.accelerator_groups = accelerator_groups
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split("::")[1].split(".")[0]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, PretendedTensor) for x in inputs)
        goes_there = there
        if kwargs.get("device") is not None:
            goes_there = torch.device(kwargs["device"]).type == DEVICE
            if goes_there:
                kwargs = kwargs | {"device": torch.device("cpu")}
        if func.namespace == "c10d" and self.accelerator_groups and not there:
            raise RuntimeError(f"c10d::{name}: no backend for tensors on the CPU")
        if there or goes_there:
            self._check(name, inputs, goes_there, bool(kwargs.get("non_blocking")))
        wrappers = {id(x.held): x for x in inputs if isinstance(x, PretendedTensor)}
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, PretendedTensor) else x, (args, kwargs))
        out = func(*args, **kwargs)
        if not goes_there:
            return out
        return tree_map(lambda x: self._wrapped(x, wrappers, name) if isinstance(x, Tensor) else x, out)

    def _check(self, name: str, inputs: list[Tensor], goes_there: bool, non_blocking: bool) -> None:
        if name.startswith(self.kind.operations):
            raise NotImplementedError(f"The operator 'aten::{name}' is not implemented for this device.")
        where = {isinstance(x, PretendedTensor) for x in inputs}
        mixed = where == {True, False} and any(x.ndim and not isinstance(x, PretendedTensor) for x in inputs)
        crosses = bool(where) and where != {goes_there}
        if name in _READS:
            self.waits[name] += 1
        elif name in _BETWEEN:
            if crosses and not non_blocking:
                self.waits[name] += 1
        elif name in ("index", "index_put_"):
            if mixed:
                self.waits[f"{name} by indices on the host"] += 1
        elif mixed:
            raise RuntimeError(f"aten::{name}: expected all tensors to be on the same device")

    def _wrapped(self, x: Tensor, wrappers: dict[int, PretendedTensor], name: str) -> Tensor:
        if isinstance(x, PretendedTensor):
            return x
        if x.dtype in self.kind.dtypes:
            raise TypeError(f"This device has no {x.dtype} (aten::{name}).")
        wrapper = wrappers.get(id(x))
        return PretendedTensor(x) if wrapper is None else wrapper


class Event:
    """One on the pretended device, which has done everything at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Event) -> float:
        return 1.0


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of ``torch.pretended``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor) -> None:
        assert state.is_cpu


def register() -> None:
    """Make torch accept the device in this process."""
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=_Module())
    torch.Event = Event  # type: ignore[assignment,misc]
    torch.tensor, torch.as_tensor = _made(torch.tensor), _made(torch.as_tensor)
    Tensor.new_tensor = lambda like, data: torch.tensor(data, dtype=like.dtype, device=like.device)  # type: ignore[method-assign]


def _made(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` makes its tensors behind the back of a dispatch mode."""

    @wraps(function)
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != DEVICE or isinstance(data, Tensor):
            return function(data, *args, device=device, **kwargs)
        return function(data, *args, device="cpu", **kwargs).to(torch.device(DEVICE, 0))

    return made
