"""Optimizers over bare parameters, with gradients that depend on the step alone; needs nothing but torch.

``python -m benchmarks.gpu`` uses it, too, on machines without the packages of the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.engine.two_rules import MatrixOptimizer
from lightning_optim.registry import OPTIMIZERS


def build(name: str, params: list[Tensor], **arguments: Any) -> RuleOptimizer:
    """An optimizer over bare parameters; those with two axes or more are matrices."""
    cls: Any = OPTIMIZERS[name].cls
    if not issubclass(cls, MatrixOptimizer):
        return cls(params, **arguments)
    roles = {"matrix": [p for p in params if p.ndim >= 2], "fallback": [p for p in params if p.ndim < 2]}
    return cls([{"params": ps, "role": role} for role, ps in roles.items() if ps], **arguments)


def gradients(params: list[Tensor], t: int) -> list[Tensor]:
    """Gradients of step ``t`` on the CPU: a drifting mean and noise, the same whatever the parameters."""
    generator = torch.Generator().manual_seed(1000 + t)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).add_(0.5).to(p.dtype) for p in params]


def settings() -> dict[str, object]:
    """torch's global settings, which a step leaves alone."""
    mkldnn: Any = torch.backends.mkldnn
    found: dict[str, object] = {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "grad": torch.is_grad_enabled(),
        "cuda.matmul": torch.backends.cuda.matmul.fp32_precision,
        "mkldnn.matmul": mkldnn.matmul.fp32_precision,
        "cudnn": torch.backends.cudnn.allow_tf32,
    }
    try:
        found["older interface"] = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        found["older interface"] = "disagrees with the newer one"
    return found
