"""A run that goes on with another optimizer keeps state of the same meaning, and says which."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import Grouping, build_optimizer, carry_over
from lightning_optim.callbacks import Resume
from lightning_optim.engine.checkpoint import CheckpointError
from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.engine.rule import LIKE_PARAMETER, RULES

from ..optimizers.by_hand import Held, on_all
from ..optimizers.rows import OURS, network, run
from .test_override import END, SCHEDULES, STOP, Net, fit, pytestmark

# The loader begins again, and its rows are all the same.
__all__ = ["pytestmark"]

TORCH = ["AdamW", "SGD", "torch.optim.Adam"]
DECLARED = [name for name, rule in RULES.items() if rule.moments]


# --- what is declared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECLARED)
def test_moments_are_what_their_declaration_says(name: str) -> None:
    rule = RULES[name]
    held = Held(rule, {}, (5, 4), slice(None))
    assert set(rule.moments) <= set(held.buffers)
    generator = torch.Generator().manual_seed(0)
    averages: dict[str, Tensor] = {}
    for t in range(1, 6):
        g = torch.randn(1, 5, 4, generator=generator, dtype=torch.float64) + 0.5
        on_all([held], [g.clone()], held.numbers(t))
        mean = averages.get("m", torch.zeros_like(g))
        for buffer, (meaning, decay) in sorted(rule.moments.items()):  # "m" before what is centred by it
            rate = getattr(held.h, decay)
            if meaning == "(g - m)^2":
                mean = averages["m"]
            value = {"g": g, "g^2": g * g, "(g - m)^2": (g - mean).square()}[meaning]
            averages[buffer] = rate * averages.get(buffer, torch.zeros_like(g)) + (1 - rate) * value
    for buffer, average in averages.items():
        found = getattr(held.s, buffer)
        if (shape := held.buffers[buffer]) is not LIKE_PARAMETER:
            axes = [i for i, n in enumerate(shape, 1) if n == 1]
            average = average.sum(axes, keepdim=True)
        # Some add their eps to the average, at most 1e-6 in all.
        torch.testing.assert_close(found, average, rtol=1e-12, atol=1e-6)


# --- any to any -------------------------------------------------------------------------------------------------------


@cache
def _saved(name: str) -> Any:
    optimizer = build_optimizer(network(), name)
    run(optimizer, parameters(optimizer), range(1, 4))
    return optimizer.state_dict()


def saved(name: str) -> Any:
    return deepcopy(_saved(name))  # torch's optimizers go on with the tensors that they load


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def goes_on(before: str, after: str) -> None:
    model = network()
    optimizer = build_optimizer(model, after)
    own = [{key: x for key, x in group.items() if key != "params"} for group in optimizer.param_groups]
    said = carry_over(optimizer, saved(before), model)
    assert bool(said) is (before != after)
    if before != after:
        assert [{key: x for key, x in group.items() if key != "params"} for group in optimizer.param_groups] == own
    run(optimizer, parameters(optimizer), range(4, 6))
    assert all(p.isfinite().all() for p in model.parameters())
    optimizer.state_dict()


CYCLE = [*OURS, *TORCH]
PAIRS = [
    *((name, CYCLE[(i + shift) % len(CYCLE)]) for i, name in enumerate(CYCLE) for shift in (0, 1, 5)),
    *((name, other) for name in OURS for other in ("AdamW",)),
    *((other, name) for name in OURS for other in ("AdamW",)),
]


def test_a_choice_of_pairs_goes_on() -> None:
    for before, after in PAIRS:
        goes_on(before, after)


@pytest.mark.slow
def test_any_goes_on_with_any() -> None:
    for before, after in product(CYCLE, CYCLE):
        goes_on(before, after)


@pytest.mark.parametrize("name", CYCLE)
def test_the_same_optimizer_goes_on_exactly(name: str) -> None:
    """With the checkpoint's hyperparameters, too: it is loaded as ever."""
    ends = []
    for load in (lambda o: o.load_state_dict(saved(name)), lambda o: carry_over(o, saved(name))):
        model = network()
        optimizer = build_optimizer(model, name)
        load(optimizer)
        run(optimizer, parameters(optimizer), range(4, 7))
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


# --- what is kept -----------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = {"embed": nn.Embedding(5, 6), "a": nn.Linear(6, 8), "b": nn.Linear(8, 6), "head": nn.Linear(6, 5)}
    return nn.ModuleDict(layers)


def trained(name: str, steps: int = 4, **args: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer = build_optimizer(model, {"name": name, "args": args})
    run(optimizer, parameters(optimizer), range(1, steps + 1))
    return model, optimizer


def state(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    return dict(optimizer.state[p])


def test_adamw_goes_on_with_namo() -> None:
    model, before = trained("AdamW", betas=(0.95, 0.99))  # NAMO's
    old = {name: state(before, p) for name, p in model.named_parameters()}
    after = build_optimizer(model, {"name": "NAMO", "args": {"fallback_betas": (0.95, 0.99)}})
    said = carry_over(after, before.state_dict())
    assert "NAMO takes over from torch's Adam." in said
    assert "torch's Adam to NAMO, 2 parameters: m and v are kept." in said
    assert "torch's Adam to AdamW, 5 parameters: m and v are kept." in said
    for name, p in model.named_parameters():
        new = state(after, p)
        assert int(new["step"]) == 4
        assert torch.equal(new["m"].view_as(p), old[name]["exp_avg"])
        second = old[name]["exp_avg_sq"]
        if name in ("a.weight", "b.weight"):
            # The sum over all entries; float32, in another order.
            torch.testing.assert_close(new["v"].reshape(()), second.sum(), rtol=1e-6, atol=0)
        else:
            assert torch.equal(new["v"], second)
    assert {group["role"]: group["lr"] for group in after.param_groups} == {"matrix": 0.01, "fallback": 0.001}


def test_and_back() -> None:
    """NAMO knows the sum of the squared gradients only: AdamW begins anew there, and goes on everywhere else."""
    model, before = trained("NAMO")
    after = build_optimizer(model, "AdamW")
    said = carry_over(after, before.state_dict())
    assert "NAMO to AdamW, 2 parameters: begins anew." in said
    assert "AdamW to AdamW, 5 parameters: exp_avg and exp_avg_sq are kept." in said
    for name, p in model.named_parameters():
        if name in ("a.weight", "b.weight"):
            assert not after.state[p]
        else:
            assert torch.equal(after.state[p]["exp_avg"], before.state[p]["m"])
            assert float(after.state[p]["step"]) == 4


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ("NAMOD", "NAMO", "m and v are kept"),
        ("NAMO", "NAMOD", "begins anew"),
        ("MVNGrad", "AdaBelief", "m and s are kept"),
        ("AdaBelief", "MVNGrad", "begins anew"),  # which has a momentum of normalised gradients besides
        ("AdamW", "Muon", "m is kept"),
        ("AdamW", "NorMuon", "m is kept, v begins anew"),
        ("MVNGrad", "AdamW", "begins anew"),
        ("NAMO", "SOAP", "begins anew"),
        ("Muon", "NAMO", "begins anew"),
    ],
)
def test_what_is_kept_is_said(before: str, after: str, kept: str) -> None:
    model, old = trained(before)
    new = build_optimizer(model, after)
    said = carry_over(new, old.state_dict())
    ends = tuple(f" to {after}, {n} parameters: {kept}." for n in (2, 7))
    assert any(line.endswith(ends) for line in said.splitlines()), said


def test_another_fallback_leaves_the_matrices_alone() -> None:
    model, before = trained("SOAP")
    old = state(before, model.a.weight)  # type: ignore[union-attr, arg-type]
    after = build_optimizer(model, {"name": "SOAP", "args": {"fallback": "MVNGrad"}})
    said = carry_over(after, before.state_dict())
    assert "SOAP to SOAP, 2 parameters: all state is kept." in said
    new = state(after, model.a.weight)  # type: ignore[union-attr, arg-type]
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(new[key])) for key, x in old.items())


@pytest.mark.parametrize(("steps", "betas"), [(2, (0.8, 0.9)), (5, (0.9, 0.999)), (3, (0.95, 0.95))])
def test_corrected_averages_stay_the_same_with_other_decays(steps: int, betas: tuple[float, float]) -> None:
    model, before = trained("AdamW", steps, betas=betas)
    after = build_optimizer(model, {"name": "NAMO", "args": {"fallback_betas": (0.7, 0.98)}})
    carry_over(after, before.state_dict())
    for group in after.param_groups:
        for p in group["params"]:
            for i, (new, old) in enumerate((("m", "exp_avg"), ("v", "exp_avg_sq"))):
                now = after.state[p][new] / (1 - group["betas"][i] ** steps)
                then = before.state[p][old] / (1 - betas[i] ** steps)
                then = then.sum() if now.numel() == 1 < then.numel() else then
                # float32, a few roundings
                torch.testing.assert_close(now.reshape_as(then), then, rtol=1e-5, atol=0)


def test_blocks_of_a_fused_projection() -> None:
    """NAMO's one number per matrix is the sum over each of them."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)})
    before = build_optimizer(model, {"name": "AdamW", "args": {"betas": (0.95, 0.99)}})
    run(before, parameters(before), range(1, 4))
    after = build_optimizer(model, "NAMO")
    carry_over(after, before.state_dict())
    p = model.attention.in_proj_weight  # type: ignore[union-attr]
    sums = before.state[p]["exp_avg_sq"].view(3, -1).sum(1)
    torch.testing.assert_close(after.state[p]["v"].reshape(3), sums, rtol=1e-6, atol=0)  # float32, in another order


def test_a_checkpoint_without_names_needs_the_module() -> None:
    model = net()
    before = torch.optim.AdamW(model.parameters())
    run(before, parameters(before), range(1, 3))
    after = build_optimizer(model, "NAMO")
    with pytest.raises(CheckpointError, match=r"7 parameters in 1 group.* have no names"):
        carry_over(after, before.state_dict())
    carry_over(after, before.state_dict(), model)
    p = model.a.weight  # type: ignore[union-attr]
    torch.testing.assert_close(
        after.state[p]["m"] / (1 - 0.95**2), before.state[p]["exp_avg"] / (1 - 0.9**2), rtol=1e-5, atol=0
    )
    several = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    with pytest.raises(CheckpointError, match="7 parameters in 7 group"):
        carry_over(after, several.state_dict(), model)
    with pytest.raises(CheckpointError, match="of this SGD have no names"):
        carry_over(torch.optim.SGD(model.parameters()), after.state_dict())
    with pytest.raises(CheckpointError, match="not an optimizer's checkpoint"):
        carry_over(after, {"weights": 1})


def test_parameters_that_are_new_and_gone_are_named() -> None:
    _, before = trained("AdamW")
    model = net()
    model["b"], model["c"] = nn.Linear(8, 6, bias=False), nn.Linear(3, 3, bias=False)  # type: ignore[operator, index]
    said = carry_over(build_optimizer(model, "NAMO"), before.state_dict())
    assert "Only in the checkpoint: b.bias." in said
    assert "Not in the checkpoint, begin anew: c.weight." in said


def test_a_parameter_of_another_shape_begins_anew() -> None:
    _, before = trained("AdamW")
    model = net()
    model["b"] = nn.Linear(8, 7)  # type: ignore[operator, index]
    after = build_optimizer(model, "NAMO")
    said = carry_over(after, before.state_dict())
    assert "torch's Adam to NAMO, 1 parameter: begins anew." in said
    assert not after.state[model.b.weight]  # type: ignore[union-attr, index]
    run(after, parameters(after), range(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    args = {"rounding": "kahan"} if dtype == torch.bfloat16 else {}
    before = build_optimizer(model, {"name": "MVNGrad", "args": args})
    run(before, parameters(before), range(1, 4))
    exact = [before.exact(p) for p in model.parameters()] if isinstance(before, RuleOptimizer) else []
    after = build_optimizer(model, {"name": "NAMO", "args": args})
    carry_over(after, before.state_dict())
    assert isinstance(after, RuleOptimizer)
    assert all(torch.equal(a, after.exact(p)) for a, p in zip(exact, model.parameters()))
    run(after, parameters(after), range(4, 5))
    assert all(p.isfinite().all() for p in model.parameters())


# --- with Lightning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("before", "after"), [("AdamW", "NAMO"), ("NAMO", "AdamW")])
def test_the_schedule_goes_on_at_its_position_with_the_new_rates(
    tmp_path: Path, schedule: str, before: str, after: str
) -> None:
    fit(Net(0.001, SCHEDULES[schedule], before), tmp_path, Resume(), steps=STOP)
    whole = Net(0.02, SCHEDULES[schedule], after)
    fit(whole, tmp_path / "whole", Resume())
    resumed = Net(0.02, SCHEDULES[schedule], after)
    trainer = fit(resumed, tmp_path, Resume(change_optimizer=True), resume=True)
    assert len(resumed.seen) == END - STOP
    # Products of a few factors, in another order.
    for found, expected in zip(resumed.seen, whole.seen[STOP:], strict=True):
        assert found == pytest.approx(expected, rel=1e-12)
    for state in trainer.optimizers[0].state.values():
        assert int(state["step"]) in (END, END - STOP)


def test_it_is_refused_without_being_asked_for(tmp_path: Path) -> None:
    fit(Net(0.001, None, "AdamW"), tmp_path, Resume(), steps=STOP)
    with pytest.raises(CheckpointError, match=r"--resume\.change_optimizer true"):
        fit(Net(0.02), tmp_path, Resume(), resume=True)


def test_the_same_optimizer_with_the_flag_is_an_ordinary_resumption(tmp_path: Path) -> None:
    before = Net(0.01, SCHEDULES["cosine"])
    fit(before, tmp_path, Resume())
    resumed = Net(0.01, SCHEDULES["cosine"])
    fit(resumed, tmp_path, Resume(change_optimizer=True), resume=True)
    assert resumed.seen == before.seen[STOP:]
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), resumed.parameters()))


def test_grouping_may_change_too(tmp_path: Path) -> None:
    _, before = trained("NAMO")
    model = net()
    after = build_optimizer(model, "NAMO", Grouping(lr_multipliers={"a.*": 0.5}))
    said = carry_over(after, before.state_dict())
    assert "NAMO to NAMO, 2 parameters: all state is kept." in said
