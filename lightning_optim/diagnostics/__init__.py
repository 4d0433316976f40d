"""What optimizers do, measured: pure functions of tensors, which know nothing of Lightning or loggers.

And what that means for a run: :func:`diagnose`.
"""

from .coverage import Coverage
from .diagnosis import diagnose
from .findings import Diagnosis, Finding
from .noise_scale import NoiseScale
from .orthogonality import factor_error, orthogonality, polar_error
from .parameter_change import Change
from .run import Run, read_runs
from .sign_collapse import sign_collapse
from .spike_response import spike_response
from .update_size import update_size
from .update_variance import conditional_variance
from .what_if import VirtualOptimizer

__all__ = [
    "Change",
    "Coverage",
    "Diagnosis",
    "Finding",
    "NoiseScale",
    "Run",
    "VirtualOptimizer",
    "conditional_variance",
    "diagnose",
    "factor_error",
    "orthogonality",
    "polar_error",
    "read_runs",
    "sign_collapse",
    "spike_response",
    "update_size",
]
