"""The states of the generators of random numbers that belong to the process."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomNumbers:
    """The states of the global generators of Python, NumPy, torch and the accelerator that the process uses."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor
    accelerator: dict[str, Tensor]

    @classmethod
    def now(cls) -> RandomNumbers:
        return cls(
            random.getstate(),
            np.random.get_state(legacy=False),  # type: ignore[arg-type]  # noqa: NPY002 (the global one is the point)
            torch.get_rng_state(),
            {kind: device.get_rng_state() for kind, device in _accelerator()},
        )

    def set(self) -> None:
        """Continue from these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.torch)
        for kind, device in _accelerator():
            if self.accelerator.get(kind) is not None:
                device.set_rng_state(self.accelerator[kind])

    def state(self) -> dict[str, Any]:
        """As tensors and plain containers, which ``torch.load(weights_only=True)`` takes."""
        generator = self.numpy["state"]
        numpy = self.numpy | {"state": generator | {"key": torch.from_numpy(generator["key"].astype(np.int64))}}
        return {"python": self.python, "numpy": numpy, "torch": self.torch, "accelerator": self.accelerator}

    @classmethod
    def of(cls, state: dict[str, Any]) -> RandomNumbers:
        """The inverse of :meth:`state`."""
        generator = state["numpy"]["state"]
        numpy = state["numpy"] | {"state": generator | {"key": generator["key"].numpy().astype(np.uint32)}}
        accelerator = state.get("accelerator", {"cuda": state.get("cuda")})  # Version 0.1.0 knew CUDA only.
        return cls(state["python"], numpy, state["torch"], accelerator)


def _accelerator() -> list[tuple[str, Any]]:
    """Name and module of the accelerator (``"cuda"``, ``"mps"``, ``"xpu"``, ...), if this process uses one.

    The generator is that of the current device only. To ask an accelerator that is not in use would claim memory on it.
    """
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return []
    device = torch.get_device_module(kind)
    in_use = getattr(device, "is_initialized", device.is_available)()
    return [(kind.type, device)] if in_use and hasattr(device, "get_rng_state") else []
