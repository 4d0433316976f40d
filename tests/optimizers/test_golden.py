"""Trajectories of the authors' own released code (or of a published formula) must be ours too.

The folder is named by the environment variable ``GOLDEN_DIR``; its README explains the format. Each optimizer's row
has the adapters that translate the names of the files to our arguments.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_optim.registry import OPTIMIZERS

from .released import Difference, difference
from .rows import MATRIX, ROWS

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

#: Tensors of cases (file, position) that are not compared: the sign of the first gradient has two null directions, and
#: the polar factor of the file is completed by the rotation that one LAPACK build returned, which later steps remember.
UNDETERMINED = {("adamuon__paper_form__svd", 1)}

#: Name in the files -> optimizer and adapter.
ADAPTERS = {
    known: (row.name, adapter)
    for row in ROWS.values()
    if not isinstance(row.golden, str)
    for known, adapter in row.golden.items()
}


def arguments_of(case: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The optimizer of a case, and its arguments."""
    name = case["optimizer"]
    if name not in ADAPTERS:
        pytest.fail(f"no row in tests/optimizers/rows has an adapter for the golden files of {name!r}")
    optimizer, adapter = ADAPTERS[name]
    left = json.loads(case["hyperparams"])
    arguments = adapter(left, case["variant"])
    if left:
        pytest.fail(f"hyperparameters of {name} that no argument honours: {left}")
    if case["orthogonalization"] == "exact-svd":
        arguments["orthogonalizer"] = "exact"
    return optimizer, arguments


def test_a_row_has_golden_trajectories_or_says_why_not() -> None:
    for row in ROWS.values():
        assert row.golden, f"{row.name}: give adapters of golden files, or a reason why there are none"


def build(case: Mapping[str, str], params: list[Tensor], backend: str) -> torch.optim.Optimizer:
    name, arguments = arguments_of(case)
    role = arguments.pop("role", lambda p: "matrix")
    groups: Any = [{"params": [p], "role": role(p)} for p in params] if name in MATRIX else params
    cls: Any = OPTIMIZERS[name].cls
    return cls(groups, backend=backend, **arguments)


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

    def step(
        self, optimizer: torch.optim.Optimizer, params: list[Tensor], expected: list[Tensor], loss: Tensor | None
    ) -> None:
        start, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
        self.met_singular = False
        optimizer.step(None if loss is None else lambda: loss)
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


def released_trajectory(
    entry: Difference, name: str, arguments: Mapping[str, Any], init: Tensor, grads: Tensor, schedule: Any
) -> list[Tensor]:
    """What the released formula makes of a tensor that is treated otherwise here."""
    assert entry.formulas is not None
    reference = entry.formulas[name]([init.numpy()], **arguments)
    found = []
    for t, g in enumerate(grads):
        reference.step([g.double().numpy()], None if schedule is None else schedule[t])
        found.append(torch.from_numpy(reference.params[0].copy()))
    return found


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
    rates = [group["lr"] for group in optimizer.param_groups]
    completion = Completion(monkeypatch)
    trajectory: list[list[Tensor]] = [[] for _ in params]
    for t in range(int(case["steps"])):
        if schedule is not None:
            for group, rate in zip(optimizer.param_groups, rates):  # Their ratio stays, as released.
                group["lr"] = rate * (schedule[t] / rates[0])
        for i, p in enumerate(params):
            p.grad = tensors[f"grads.{i}"][t].to(dtype)
        loss = tensors["losses"][t] if "losses" in tensors else None
        completion.step(optimizer, params, [tensors[f"params.{i}"][t] for i in range(count)], loss)
        for i, p in enumerate(params):
            trajectory[i].append(p.detach().double().clone())
    name, arguments = arguments_of(case)
    for i, ours in enumerate(trajectory):
        if (path.stem, i) in UNDETERMINED:
            continue
        if entry := difference(name, init[i].shape, arguments):
            ours = released_trajectory(entry, name, arguments, init[i], tensors[f"grads.{i}"], schedule)
        got, expected = torch.stack(ours), tensors[f"params.{i}"].double()
        allowed = tolerance["rel_displacement_tol"] * (expected - init[i]).norm()
        # Where a bfloat16 iteration was run, `rel_displacement_tol` is the criterion, as the metadata says.
        assert (got - expected).norm() <= allowed
        if case["orthogonalization"] != "ns5-bf16":
            torch.testing.assert_close(got, expected, rtol=tolerance["rtol"], atol=tolerance["atol"])
