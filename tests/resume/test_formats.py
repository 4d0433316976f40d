"""Checkpoints of other formats: what earlier versions wrote loads and goes on, what later ones wrote is refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from packaging.version import Version
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.utils import vector_to_parameters

import lightning_optim as lo
from lightning_optim import build_optimizer
from lightning_optim.engine.checkpoint import CheckpointError
from lightning_optim.engine.formats import FORMAT, MIGRATIONS

from ..optimizers.rows import build, each_optimizer, network, run
from .files import write

FILES = Path(__file__).parent / "files"
FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True)


#: What is computed otherwise than by version 0.1.0, which changes last bits: decay that was part of the step is the
#: engine's, and HVAdam's two steps are one.
ROUNDED_OTHERWISE = ("LaProp", "HVAdam", "Muon float32 nearest {'fallback': 'HVAdam'}")


@pytest.mark.parametrize(
    ("file", "case"),
    [
        pytest.param(file, case, id=f"{file.parent.name}-{file.stem}-{case.replace(' ', '-')}")
        for file in sorted(FILES.glob("*/*.pt"))
        for case in torch.load(file, weights_only=True).get("cases", ())
    ],
)
def test_files_of_earlier_versions_go_on(file: Path, case: str) -> None:
    """With the bits that the earlier version went on with, on the machine that wrote them."""
    found = torch.load(file, weights_only=True)
    kept = found["cases"][case]
    dtype = getattr(torch, kept["dtype"])
    params = write.parameters(dtype)
    vector_to_parameters(kept["parameters"], params)
    optimizer = write.build(file.stem, params, rounding=kept["rounding"], backend="chunked", **kept["arguments"])
    optimizer.load_state_dict(kept["checkpoint"])
    write.run(optimizer, params, write.SAVED_AT + 1, write.UNTIL)
    now, then = write.values(params), kept["continued"]
    otherwise = f"{file.stem} {case}".startswith(ROUNDED_OTHERWISE)
    if found["machine"] == write.machine() and not otherwise:
        assert torch.equal(now, then)
    # Three steps on parameters of about 1, each computed within a few units in the last place. Rounded to a narrow
    # precision, a last bit of float32 can become one of the parameter's.
    torch.testing.assert_close(now, then, rtol=0, atol=max(1e-6, 1.01 * torch.finfo(dtype).eps))


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.15"),
    reason="torch reads no folder that a later torch has written, and this one is of 2.15",
)
def test_folders_of_shards_of_earlier_versions_go_on() -> None:
    """torch asks a folder for every key that the optimizer has now, so that no new one may be there."""
    found = torch.load(FILES / "0.1.0" / "shards.pt", weights_only=True)
    net = write.Net()
    optimizer = build_optimizer(net, "NAMO")
    state = {"net": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer, options=FLATTENED)}
    dcp.load(state, checkpoint_id=FILES / "0.1.0" / "shards")
    net.load_state_dict(state["net"])
    set_optimizer_state_dict(net, optimizer, state["optimizer"], options=FLATTENED)
    assert all(optimizer.state[p]["step"] == write.SAVED_AT for p in net.parameters())
    write.run(optimizer, list(net.parameters()), write.SAVED_AT + 1, write.UNTIL)
    # As above; the orthogonalisation of a 4 x 3 matrix adds a few roundings.
    torch.testing.assert_close(write.values(list(net.parameters())), found["continued"], rtol=0, atol=1e-6)


# --- the number -------------------------------------------------------------------------------------------------


def numbers(groups: Any) -> set[str]:
    return {group["rule"].rpartition(" (")[2] for group in groups}


@each_optimizer
def test_the_number_is_in_the_state_dict_only(name: str) -> None:
    params = list(network().parameters())
    optimizer = build(name, params)
    rules = [group["rule"] for group in optimizer.param_groups]
    saved = optimizer.state_dict()
    assert numbers(saved["param_groups"]) == {f"format {FORMAT})"}
    assert [group["rule"] for group in optimizer.param_groups] == rules
    optimizer.load_state_dict(saved)
    assert [group["rule"] for group in optimizer.param_groups] == rules


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return optimizer.state_dict()


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return get_optimizer_state_dict(model, optimizer)


def flattened(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return get_optimizer_state_dict(model, optimizer, options=FLATTENED)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, state: Any) -> None:
    if "param_groups" not in state:
        set_optimizer_state_dict(model, optimizer, state, options=FLATTENED)
    elif all(isinstance(key, int) for key in state["param_groups"][0]["params"]):
        optimizer.load_state_dict(state)
    else:
        set_optimizer_state_dict(model, optimizer, state)


def with_number(state: Any, number: int | None) -> Any:
    """A state dict of any form with another number."""
    if isinstance(state, dict):
        return {key: with_number(x, number) for key, x in state.items()}
    if isinstance(state, list):
        return [with_number(x, number) for x in state]
    new = "" if number is None else f" (format {number})"
    return state.replace(f" (format {FORMAT})", new) if isinstance(state, str) else state


@pytest.mark.parametrize("form", [plain, by_name, flattened])
@pytest.mark.parametrize("name", ["MVNGrad", "NAMO", "HVAdam"])
def test_later_formats_are_refused_in_every_form(name: str, form: Any) -> None:
    """Whatever torch makes of the state dict on its way: a number that got lost would be read as the first."""
    model = network()
    optimizer = build(name, list(model.parameters()))
    run(optimizer, list(model.parameters()), range(1, 3))
    state = form(model, optimizer)
    file = io.BytesIO()
    torch.save(with_number(state, FORMAT + 1), file)
    later = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=rf"format {FORMAT + 1}, .* reads formats 1 to {FORMAT}.*pip install -U"):
        load(model, optimizer, later)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    load(model, optimizer, state)


def test_later_formats_are_refused_from_a_folder_of_shards(tmp_path: Path) -> None:
    model = network()
    optimizer = build("NAMO", list(model.parameters()))
    run(optimizer, list(model.parameters()), range(1, 3))
    dcp.save({"optimizer": with_number(flattened(model, optimizer), FORMAT + 1)}, checkpoint_id=tmp_path)
    state = {"optimizer": flattened(model, optimizer)}
    dcp.load(state, checkpoint_id=tmp_path)
    with pytest.raises(CheckpointError, match=f"format {FORMAT + 1}"):
        load(model, optimizer, state["optimizer"])


@pytest.mark.parametrize("number", [0, 10**30])
def test_numbers_that_no_version_has_are_refused(number: int) -> None:
    optimizer = lo.MVNGrad(list(network().parameters()))
    with pytest.raises(CheckpointError, match=f"format {number}"):
        optimizer.load_state_dict(with_number(optimizer.state_dict(), number))


def test_every_format_leads_to_the_next_one() -> None:
    assert sorted(MIGRATIONS) == list(range(1, FORMAT))


@pytest.mark.parametrize("name", ["MVNGrad", "SOAP", "LaMAdam"])
def test_a_state_dict_without_a_number_is_brought_up_to_date_whatever_wrote_it(name: str) -> None:
    """DeepSpeed, for one, stores the parameter groups as they are, which have no number."""
    straight, resumed = list(network().parameters()), list(network().parameters())
    a, b = build(name, straight), build(name, resumed)
    run(a, straight, range(1, 6))
    run(b, resumed, range(1, 3))
    c = build(name, resumed)
    c.load_state_dict(with_number(b.state_dict(), None))
    run(c, resumed, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed))


# --- step counts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [torch.float32, torch.float64, torch.int64, torch.int32])
@pytest.mark.parametrize("backend", ["plain", "chunked"])
@pytest.mark.parametrize("name", ["PNM", "SOAP", "LaMAdam", "HVAdam", "NAMO"])
def test_steps_count_on_beyond_what_float32_can(name: str, backend: str, written: torch.dtype) -> None:
    """However the count was written."""
    start = 2**24
    params = list(network().parameters())
    optimizer = build(name, params, backend=backend)
    run(optimizer, params, range(1, 2))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = torch.tensor(start, dtype=written)
    optimizer.load_state_dict(saved)
    run(optimizer, params, range(2, 5))
    counts = {int(optimizer.state[p]["step"]) for p in params}
    assert counts == {start + 3}
    assert {int(x["step"]) for x in optimizer.state_dict()["state"].values()} == {start + 3}


@pytest.mark.parametrize("form", [plain, by_name, flattened])
def test_counts_beyond_float32_survive_a_checkpoint(form: Any) -> None:
    count = 2**40 + 1
    models = [network(), network()]
    first, second = (build("NAMO", list(model.parameters())) for model in models)
    run(first, list(models[0].parameters()), range(1, 2))
    for p in models[0].parameters():
        first.state[p]["step"].fill_(count)
    load(models[1], second, form(models[0], first))
    run(second, list(models[1].parameters()), range(1, 3))
    assert {int(second.state[p]["step"]) for p in models[1].parameters()} == {count + 2}


def test_a_count_that_a_wrapper_has_set_as_a_float_counts_on() -> None:
    params = list(network().parameters())
    optimizer = build("PNM", params)
    run(optimizer, params, range(1, 3))
    for p in params:
        optimizer.state[p]["step"] = torch.tensor(float(2**24))
    run(optimizer, params, range(3, 6))
    assert {int(optimizer.state[p]["step"]) for p in params} == {2**24 + 3}


@pytest.mark.parametrize("count", [2.5, float("nan"), float("inf"), -1.0])
def test_counts_that_are_no_counts_are_refused(count: float) -> None:
    params = list(network().parameters())
    optimizer = build("NAMO", params)
    run(optimizer, params, range(1, 3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.tensor(count)
    with pytest.raises(CheckpointError, match=f"step is {count} instead of a whole number"):
        optimizer.load_state_dict(saved)
