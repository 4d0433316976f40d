# Made by `python docs/generate.py` from the files of this folder.
from typing import Any

from ..engine.cuda_graphs import capture_step as capture_step
from ..engine.optimizer import NonFiniteGradientsError as NonFiniteGradientsError
from .adabelief import AdaBelief as AdaBelief
from .adadiag import AdaDiag as AdaDiag
from .adadiag import AdaDiagPP as AdaDiagPP
from .adago import AdaGO as AdaGO
from .adagram import AdaGram as AdaGram
from .adamuon import AdaMuon as AdaMuon
from .admeta import AdmetaR as AdmetaR
from .admeta import AdmetaS as AdmetaS
from .anon import Anon as Anon
from .deva import DeVA as DeVA
from .deva_vector import DeVAVector as DeVAVector
from .elra import ELRA as ELRA
from .hvadam import HVAdam as HVAdam
from .kl_shampoo import KLSOAP as KLSOAP
from .kl_shampoo import KLShampoo as KLShampoo
from .laprop import LaProp as LaProp
from .leon import Leon as Leon
from .madam import LaMAdam as LaMAdam
from .madam import MAdam as MAdam
from .mars import MARS as MARS
from .mars import MARSM as MARSM
from .muon import Muon as Muon
from .muon_vs import MuonNSR as MuonNSR
from .muon_vs import MuonVS as MuonVS
from .muown import Muown as Muown
from .mvn_grad import MVNGrad as MVNGrad
from .namo import NAMO as NAMO
from .namo import NAMOD as NAMOD
from .normuon import NorMuon as NorMuon
from .olion import OLion as OLion
from .pnm import AdaPNM as AdaPNM
from .pnm import PNM as PNM
from .soap import SOAP as SOAP
from .sso import SSO as SSO

ALGORITHMS: dict[str, Any]

__all__ = [
    "ELRA",
    "KLSOAP",
    "MARS",
    "MARSM",
    "NAMO",
    "NAMOD",
    "PNM",
    "SOAP",
    "SSO",
    "AdaBelief",
    "AdaDiag",
    "AdaDiagPP",
    "AdaGO",
    "AdaGram",
    "AdaMuon",
    "AdaPNM",
    "AdmetaR",
    "AdmetaS",
    "Anon",
    "DeVA",
    "DeVAVector",
    "HVAdam",
    "KLShampoo",
    "LaMAdam",
    "LaProp",
    "Leon",
    "MAdam",
    "MVNGrad",
    "Muon",
    "MuonNSR",
    "MuonVS",
    "Muown",
    "NonFiniteGradientsError",
    "NorMuon",
    "OLion",
    "capture_step",
]
