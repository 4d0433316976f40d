"""What optimizers do, measured: pure functions of tensors, which know nothing of Lightning or loggers."""

from .noise_scale import NoiseScale
from .orthogonality import factor_error, orthogonality, polar_error
from .parameter_change import Change
from .sign_collapse import sign_collapse
from .spike_response import spike_response
from .update_size import update_size
from .update_variance import conditional_variance
from .what_if import VirtualOptimizer

__all__ = [
    "Change",
    "NoiseScale",
    "VirtualOptimizer",
    "conditional_variance",
    "factor_error",
    "orthogonality",
    "polar_error",
    "sign_collapse",
    "spike_response",
    "update_size",
]
