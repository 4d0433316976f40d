"""Trajectories of the authors' own released code (or of a published formula) must be ours too.

The folder is named by the environment variable ``GOLDEN_DIR``; its README explains the format. ``ADAPTERS``
translates the names of the files to our arguments: each adapter takes what it knows out of the case's
hyperparameters, and whatever is left over is a failure.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import lightning_optim as lo
from lightning_optim.engine.two_rules import MatrixOptimizer

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[3] / "shared" / "golden"))


def _cases() -> list[Any]:
    """Each case in float32, and in float64 if it was generated so."""
    cases = []
    for path in sorted(FOLDER.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            dtypes = {"float32", file.metadata()["dtype"]}
        cases += [pytest.param(path, getattr(torch, d), id=f"{path.stem}-{d}") for d in sorted(dtypes)]
    return cases


CASES = _cases()

#: Switches of released code that no paper uses and that are not implemented: (optimizer, name) -> the value that is
#: implemented, and why the others are not.
LEFT_OUT = {
    ("hvadam", "amsgrad"): (False, "inherited from AdaBelief's file, used by no experiment"),
    ("hvadam", "rectify"): (False, "inherited from AdaBelief's file, used by no experiment"),
    ("hvadam", "fixed_decay"): (False, "inherited from AdaBelief's file, used by no experiment"),
    ("hvadam", "degenerated_to_sgd"): (None, "only read by the rectified branch, which is left out"),
    ("anon", "fixed_decay"): (False, "inherited from AdaBelief's file, used by no experiment"),
    ("laprop", "amsgrad"): (False, "used by no experiment"),
    ("adabelief", "fixed_decay"): (False, "used by no experiment"),
    ("adabelief", "degenerated_to_sgd"): (
        True,
        "False makes no step at all while the variance is intractable",
    ),
    ("madam", "nesterov"): (False, "used by no experiment"),
    ("lamadam", "amsgrad"): (None, "never takes effect"),
    ("soap", "normalize_grads"): (False, "used by no experiment"),
    ("deva", "normalize_grads"): (False, "inherited from SOAP's file, used by no experiment"),
    ("deva", "merge_dims"): (False, "the released class takes matrices only, which have nothing to merge"),
    ("deva", "precondition_1d"): (None, "the released class takes matrices only"),
}

#: Tensors of cases (file, position) that are not compared: the sign of the first gradient has two null directions, and
#: the polar factor of the file is completed by the rotation that one LAPACK build returned, which later steps remember.
UNDETERMINED = {("adamuon__paper_form__svd", 1)}

#: Optimizers of the folder that do not exist here yet.
NOT_YET = {
    "adago", "sso", "mars", "mars_m", "admeta_r", "admeta_s", "olion", "adagram", "adadiag", "adadiag_pp", "elra",
}  # fmt: skip

Hyper = dict[str, Any]


def leave_out(optimizer: str, hp: Hyper) -> None:
    for (name, key), (implemented, reason) in LEFT_OUT.items():
        if name == optimizer and key in hp:
            value = hp.pop(key)
            if implemented is not None and value != implemented:
                pytest.skip(f"{key}={value} of {optimizer} is left out: {reason}")


def take(hp: Hyper, *names: str, **renamed: str) -> Hyper:
    """Take the named entries out; ``renamed`` maps our name to the file's. Absent ones keep our default."""
    pairs = {name: name for name in names} | renamed
    return {ours: hp.pop(theirs) for ours, theirs in pairs.items() if theirs in hp}


def mvn_grad(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "lr", "betas", "eps", "eps_s", "weight_decay", "decoupled")


def deva_vector(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "lr", "betas", "weight_decay", nesterov="nestrov")


def hvadam(hp: Hyper, variant: str) -> Hyper:
    leave_out("hvadam", hp)
    return take(hp, "lr", "betas", "eps", "gamma", "weight_decay", decoupled="weight_decouple")


def anon(hp: Hyper, variant: str) -> Hyper:
    leave_out("anon", hp)
    schedule = {"steps 1,2,4,8,...": "powers_of_two", "every step": "every_step"}[hp.pop("refresh")]
    return take(hp, "lr", "betas", "eps", "gamma", "beta3", "weight_decay", decoupled="weight_decouple") | {
        "refresh": schedule
    }


def adabelief(hp: Hyper, variant: str) -> Hyper:
    if not hp["rectify"]:
        hp.pop("degenerated_to_sgd", None)  # Read by the rectified branch only.
    leave_out("adabelief", hp)
    return take(hp, "lr", "betas", "eps", "weight_decay", "rectify", "amsgrad", decoupled="weight_decouple")


def laprop(hp: Hyper, variant: str) -> Hyper:
    leave_out("laprop", hp)
    return take(hp, "lr", "betas", "eps", "weight_decay", "centered")


def pnm(hp: Hyper, variant: str) -> Hyper:
    momentum, beta0 = hp.pop("betas")
    return {"momentum": momentum, "beta0": beta0} | take(hp, "lr", "weight_decay", "decoupled")


def adapnm(hp: Hyper, variant: str) -> Hyper:
    *betas, beta0 = hp.pop("betas")
    return {"betas": betas, "beta0": beta0} | take(hp, "lr", "eps", "weight_decay", "decoupled", "amsgrad")


def madam(hp: Hyper, variant: str) -> Hyper:
    leave_out("madam", hp)
    beta_min, beta_max = hp.pop("beta2_range")
    names = take(hp, "lr", "eps", "weight_decay", "amsgrad", decoupled="adamw")
    return names | {"betas": (hp.pop("beta1"), beta_max), "beta_min": beta_min}


def lamadam(hp: Hyper, variant: str) -> Hyper:
    leave_out("lamadam", hp)
    names = take(hp, "lr", "beta_min", "eps", "weight_decay", decoupled="use_adamw")
    return names | {"betas": (hp.pop("momentum"), hp.pop("beta"))}


def muon(hp: Hyper, variant: str) -> Hyper:
    scale = {"kellerjordan": "original", "moonlight": "moonlight"}[variant]
    decay = "wd" if "wd" in hp else "weight_decay"
    return take(hp, "lr", "momentum", "nesterov", weight_decay=decay) | {"scale": scale} | steps(hp)


def normuon(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "lr", "momentum", "beta2", "weight_decay")


def adamuon(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "lr", "momentum", "eps", "weight_decay", "nesterov") | steps(hp)


def muon_vs(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "lr", "momentum", "eps", "weight_decay", gamma="alpha") | steps(hp)


def namo(hp: Hyper, variant: str) -> Hyper:
    if variant == "formula":
        betas = (hp.pop("mu1"), hp.pop("mu2"))
        paper = {"nesterov": False, "scale": None, "max_step": None, "betas": betas}
        return paper | take(hp, "eps", lr="eta", weight_decay="lambda")
    betas = (hp.pop("momentum"), hp.pop("mu2"))
    names = take(hp, "lr", "nesterov", weight_decay="wd", eps="adamnorm_eps", scale="scale_coeff")
    return names | {"betas": betas} | steps(hp)


def namo_d(hp: Hyper, variant: str) -> Hyper:
    clamp = hp.pop("c") if variant == "formula" else hp.pop("col_state_clamp_c")
    return namo(hp, variant) | {"clamp": clamp if clamp is not None and 0 < clamp <= 1 else None}


def eigenbasis(hp: Hyper) -> Hyper:
    beta = hp.pop("shampoo_beta")
    names = take(
        hp, "lr", "betas", "eps", "weight_decay", "precondition_frequency", "correct_bias",
        max_precondition_dim="max_precond_dim",
    )  # fmt: skip
    return names | {"shampoo_beta": None if beta < 0 else beta, "stagger": False}


def soap(hp: Hyper, variant: str) -> Hyper:
    leave_out("soap", hp)
    return eigenbasis(hp) | take(hp, "merge_dims", "precondition_1d")


def deva(form: str) -> Callable[[Hyper, str], Hyper]:
    def adapter(hp: Hyper, variant: str) -> Hyper:
        leave_out("deva", hp)
        hp.pop("variance_adaption", None)  # Never read by the released class.
        return eigenbasis(hp) | take(hp, "nesterov") | {"form": form, "orthogonalizer": "kj5-schatten"}

    return adapter


def steps(hp: Hyper) -> Hyper:
    return {"orthogonalizer": f"kj{hp.pop('ns_steps', 5)}"}


ADAPTERS: dict[str, tuple[type[torch.optim.Optimizer], Callable[[Hyper, str], Hyper]]] = {
    "mvn_grad": (lo.MVNGrad, mvn_grad),
    "deva_linf": (lo.DeVAVector, deva_vector),
    "deva_sinf": (lo.DeVA, deva("momentum")),
    "deva_sinf_sign": (lo.DeVA, deva("sign")),
    "deva_sinf_efficient": (lo.DeVA, deva("efficient")),
    "hvadam": (lo.HVAdam, hvadam),
    "anon": (lo.Anon, anon),
    "adabelief": (lo.AdaBelief, adabelief),
    "laprop": (lo.LaProp, laprop),
    "pnm": (lo.PNM, pnm),
    "adapnm": (lo.AdaPNM, adapnm),
    "madam": (lo.MAdam, madam),
    "lamadam": (lo.LaMAdam, lamadam),
    "muon": (lo.Muon, muon),
    "normuon": (lo.NorMuon, normuon),
    "adamuon": (lo.AdaMuon, adamuon),
    "muon_vs": (lo.MuonVS, muon_vs),
    "muon_nsr": (lo.MuonNSR, muon_vs),
    "namo": (lo.NAMO, namo),
    "namo_d": (lo.NAMOD, namo_d),
    "soap": (lo.SOAP, soap),
}


def build(case: dict[str, str], params: list[Tensor], backend: str) -> torch.optim.Optimizer:
    name = case["optimizer"]
    if name in NOT_YET:
        pytest.skip(f"{name} is not implemented yet")
    if name not in ADAPTERS:
        pytest.fail(f"no adapter for the optimizer {name!r}")
    cls, adapter = ADAPTERS[name]
    left = json.loads(case["hyperparams"])
    arguments = adapter(left, case["variant"])
    if left:
        pytest.fail(f"hyperparameters of {name} that no argument honours: {left}")
    if case["orthogonalization"] == "exact-svd":
        arguments["orthogonalizer"] = "exact"
    if issubclass(cls, MatrixOptimizer):
        return cls([{"params": params, "role": "matrix"}], backend=backend, **arguments)
    return cls(params, backend=backend, **arguments)


class Completion:
    """Exact polar factors of singular matrices, completed by ``sign`` in the directions that are left open.

    The sign of a momentum is now and then an exactly singular matrix. What the files hold as its polar factor is
    ``U V^T`` with the null vectors that one LAPACK build returned, which are defined up to a sign; ours leaves them
    out. So a step that met such a matrix is made with both signs, and each tensor, with its state, takes the one that
    the file took.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sign = 1.0
        self.met_singular = False
        monkeypatch.setattr("lightning_optim.polar.methods.exact_polar", self.polar)

    def polar(self, x: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
        null = s <= max(x.shape[-2:]) * torch.finfo(torch.float64).eps * s[..., :1]
        self.met_singular |= bool(null.any())
        return ((u * torch.where(null, self.sign, 1.0).unsqueeze(-2)) @ vh).to(x.dtype)

    def step(self, optimizer: torch.optim.Optimizer, params: list[Tensor], expected: list[Tensor]) -> None:
        start, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
        self.met_singular = False
        optimizer.step()
        if not self.met_singular:
            return
        first = [p.detach().clone() for p in params]
        states = [{name: x.clone() for name, x in optimizer.state[p].items()} for p in params]
        for p, x in zip(params, start):
            p.data.copy_(x)
        optimizer.load_state_dict(state)
        self.sign = -1.0
        optimizer.step()
        self.sign = 1.0
        for p, x, state, target in zip(params, first, states, expected):
            if (x - target).norm() < (p - target).norm():
                p.data.copy_(x)
                optimizer.state[p].update(state)


@pytest.mark.skipif(not CASES, reason=f"no golden trajectories in {FOLDER}")
@pytest.mark.parametrize("backend", ["plain", "chunked", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("path", "dtype"), CASES)
def test_trajectory(path: Path, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with safe_open(path, "pt") as file:
        case = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    prefix = "float32_" if dtype == torch.float32 and case["dtype"] == "float64" else ""
    tolerance = {key: float(case[prefix + key]) for key in ("rtol", "atol", "rel_displacement_tol")}
    schedule = json.loads(case.get("lr_schedule", "null"))
    count = sum(key.startswith("init.") for key in tensors)
    init = [tensors[f"init.{i}"].double() for i in range(count)]
    params = [torch.nn.Parameter(x.to(dtype)) for x in init]
    optimizer = build(case, params, backend)
    completion = Completion(monkeypatch)
    trajectory: list[list[Tensor]] = [[] for _ in params]
    for t in range(int(case["steps"])):
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = schedule[t]
        for i, p in enumerate(params):
            p.grad = tensors[f"grads.{i}"][t].to(dtype)
        completion.step(optimizer, params, [tensors[f"params.{i}"][t] for i in range(count)])
        for i, p in enumerate(params):
            trajectory[i].append(p.detach().double().clone())
    for i, ours in enumerate(trajectory):
        if (path.stem, i) in UNDETERMINED:
            continue
        got, expected = torch.stack(ours), tensors[f"params.{i}"].double()
        allowed = tolerance["rel_displacement_tol"] * (expected - init[i]).norm()
        # Where a bfloat16 iteration was run, `rel_displacement_tol` is the criterion, as the metadata says.
        assert (got - expected).norm() <= allowed
        if case["orthogonalization"] != "ns5-bf16":
            torch.testing.assert_close(got, expected, rtol=tolerance["rtol"], atol=tolerance["atol"])
