# Made by `python docs/generate.py` from the files of this folder.
from typing import Any

from ..engine.cuda_graphs import capture_step as capture_step
from ..engine.optimizer import NonFiniteGradientsError as NonFiniteGradientsError
from .adabelief import AdaBelief as AdaBelief
from .adadiag import AdaDiag as AdaDiag
from .adadiag import AdaDiagPP as AdaDiagPP
from .adagram import AdaGram as AdaGram
from .adamuon import AdaMuon as AdaMuon
from .anon import Anon as Anon
from .deva import DeVA as DeVA
from .deva_vector import DeVAVector as DeVAVector
from .elra import ELRA as ELRA
from .hvadam import HVAdam as HVAdam
from .laprop import LaProp as LaProp
from .leon import Leon as Leon
from .madam import LaMAdam as LaMAdam
from .madam import MAdam as MAdam
from .muon import Muon as Muon
from .muon_vs import MuonNSR as MuonNSR
from .muon_vs import MuonVS as MuonVS
from .mvn_grad import MVNGrad as MVNGrad
from .namo import NAMO as NAMO
from .namo import NAMOD as NAMOD
from .normuon import NorMuon as NorMuon
from .pnm import AdaPNM as AdaPNM
from .pnm import PNM as PNM
from .soap import SOAP as SOAP

ALGORITHMS: dict[str, Any]

__all__ = [
    "ELRA",
    "NAMO",
    "NAMOD",
    "PNM",
    "SOAP",
    "AdaBelief",
    "AdaDiag",
    "AdaDiagPP",
    "AdaGram",
    "AdaMuon",
    "AdaPNM",
    "Anon",
    "DeVA",
    "DeVAVector",
    "HVAdam",
    "LaMAdam",
    "LaProp",
    "Leon",
    "MAdam",
    "MVNGrad",
    "Muon",
    "MuonNSR",
    "MuonVS",
    "NonFiniteGradientsError",
    "NorMuon",
    "capture_step",
]
