"""What optimizers do, measured: pure functions of tensors, which know nothing of Lightning or loggers."""

from .change import Change
from .noise_scale import NoiseScale
from .orthogonality import factor_error, orthogonality, polar_error
from .sign_collapse import sign_collapse
from .update_size import update_size

__all__ = ["Change", "NoiseScale", "factor_error", "orthogonality", "polar_error", "sign_collapse", "update_size"]
