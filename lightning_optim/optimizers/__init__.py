"""Optimizers: one file per algorithm; see :mod:`.rule` for what a rule is and :mod:`.registry` for all of them."""

from ..engine.cuda_graphs import capture_step
from ..engine.optimizer import NonFiniteGradientsError
from .adabelief import AdaBelief
from .adamuon import AdaMuon
from .anon import Anon
from .deva import DeVA
from .deva_vector import DeVAVector
from .hvadam import HVAdam
from .laprop import LaProp
from .madam import LaMAdam, MAdam
from .muon import Muon
from .muon_vs import MuonNSR, MuonVS
from .mvn_grad import MVNGrad
from .namo import NAMO, NAMOD
from .normuon import NorMuon
from .pnm import PNM, AdaPNM
from .soap import SOAP

__all__ = [
    "NAMO",
    "NAMOD",
    "PNM",
    "SOAP",
    "AdaBelief",
    "AdaMuon",
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
    "MuonNSR",
    "MuonVS",
    "NonFiniteGradientsError",
    "NorMuon",
    "capture_step",
]
