"""Lightning callbacks."""

from .optimizer_swap import OptimizerSwap
from .rng_state import RNGState

__all__ = ["OptimizerSwap", "RNGState"]
