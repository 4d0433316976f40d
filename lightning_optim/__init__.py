"""Modern optimizers for PyTorch Lightning, and diagnostics that show what they do."""

from .optimizers import (
    NAMO,
    NAMOD,
    SOAP,
    AdaBelief,
    Anon,
    DeVA,
    DeVAVector,
    HVAdam,
    LaProp,
    Muon,
    MVNGrad,
)

__all__ = [
    "NAMO",
    "NAMOD",
    "SOAP",
    "AdaBelief",
    "Anon",
    "DeVA",
    "DeVAVector",
    "HVAdam",
    "LaProp",
    "MVNGrad",
    "Muon",
]
__version__ = "0.1.0"
