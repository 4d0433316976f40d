"""Lightning callbacks."""

from .optimizer_swap import OptimizerSwap
from .rng_state import RNGState
from .sign_collapse import SignCollapse
from .update_size import UpdateSize

__all__ = ["OptimizerSwap", "RNGState", "SignCollapse", "UpdateSize"]
