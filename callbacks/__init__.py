"""Lightning callbacks."""

from lightning_optim.modes import OptimizerModes
from lightning_optim.seen import RoutingCheck

from .diagnostics import Diagnostics
from .gradient_health import GradientHealth
from .optimizer_internals import OptimizerInternals
from .optimizer_swap import OptimizerSwap
from .orthogonality_error import OrthogonalityError
from .pictures import Pictures
from .rescue_checkpoint import RescueCheckpoint
from .resume import Resume
from .rng_state import RNGState
from .run_record import RunRecord
from .sign_collapse import SignCollapse
from .skip_spikes import SkipSpikes
from .spike_response import SpikeResponse
from .update_size import UpdateSize
from .update_variance import UpdateVariance

__all__ = [
    "Diagnostics",
    "GradientHealth",
    "OptimizerInternals",
    "OptimizerModes",
    "OptimizerSwap",
    "OrthogonalityError",
    "Pictures",
    "RNGState",
    "RescueCheckpoint",
    "Resume",
    "RoutingCheck",
    "RunRecord",
    "SignCollapse",
    "SkipSpikes",
    "SpikeResponse",
    "UpdateSize",
    "UpdateVariance",
]
