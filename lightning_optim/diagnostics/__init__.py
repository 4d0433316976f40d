"""What optimizers do, measured: pure functions of tensors, which know nothing of Lightning or loggers."""

from .change import Change
from .noise_scale import NoiseScale
from .sign_collapse import sign_collapse
from .update_size import update_size

__all__ = ["Change", "NoiseScale", "sign_collapse", "update_size"]
