"""Optimizers: one file per algorithm; see :mod:`.rule` for what a rule is and :mod:`.registry` for all of them."""

from .adabelief import AdaBelief
from .anon import Anon
from .deva import DeVA
from .deva_vector import DeVAVector
from .graphs import capture_step
from .hvadam import HVAdam
from .laprop import LaProp
from .madam import LaMAdam, MAdam
from .muon import Muon
from .mvn_grad import MVNGrad
from .namo import NAMO, NAMOD
from .optimizer import NonFiniteGradientsError
from .pnm import PNM, AdaPNM
from .soap import SOAP

__all__ = [
    "NAMO",
    "NAMOD",
    "PNM",
    "SOAP",
    "AdaBelief",
    "AdaPNM",
    "Anon",
    "DeVA",
    "DeVAVector",
    "HVAdam",
    "LaMAdam",
    "LaProp",
    "MAdam",
    "MVNGrad",
    "Muon",
    "NonFiniteGradientsError",
    "capture_step",
]
