"""Weight decay: one argument, with one meaning in every optimizer and on every path.

That its forms are right for every rule is tested with all other hyperparameters in ``test_against_references.py`` and
``test_fuzz.py``, on several processes in ``tests/distributed``. Here is what those do not see.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import lightning_optim as lo
from lightning_optim.engine import formats
from lightning_optim.engine.rule import RULES, decay_of
from lightning_optim.registry import OPTIMIZERS

from .rows import MATRIX, OURS, build

DECAYING = [name for name in OURS if "weight_decay" in RULES[name].fields]
FORMS = ["decoupled", "coupled", "independent", "cautious", "corrected"]
#: Those whose lookahead or row directions have no cautious form.
UNIFORM = ["AdmetaR", "AdmetaS", "Muown"]


def one_step(name: str, start: Tensor, g: Tensor, steps: int = 2, **arguments: Any) -> Tensor:
    """Where some steps lead; the first of SOAP and DeVA moves nothing."""
    p = nn.Parameter(start.clone())
    optimizer = build(name, [p], **arguments)
    for _ in range(steps):
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("name", DECAYING)
def test_every_optimizer_has_the_argument(name: str) -> None:
    assert "decay" in inspect.signature(OPTIMIZERS[name].cls).parameters
    assert "    decay: " in str(OPTIMIZERS[name].cls.__doc__)
    with pytest.raises(ValueError, match=r"decay must be one of .*, got decay='sometimes'"):
        build(name, [nn.Parameter(torch.ones(2, 2))], decay="sometimes")


@pytest.mark.parametrize("name", UNIFORM)
def test_forms_that_a_rule_cannot_have_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"decay must be one of .*'corrected'\), got decay='cautious'"):
        build(name, [nn.Parameter(torch.ones(2, 2))], decay="cautious")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DECAYING)
def test_without_a_learning_rate_or_weight_decay_no_form_does_anything(name: str, form: str) -> None:
    """torch.distributed.checkpoint makes a step with lr = 0 to create state."""
    if form == "cautious" and name in UNIFORM:
        pytest.skip("refused")
    start = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    still = one_step(name, start, torch.zeros(2, 2), lr=0.0, weight_decay=0.1, decay=form)
    # Muown multiplies rows by their norms and divides by them: roundings of 6e-8.
    torch.testing.assert_close(still, start, rtol=1e-6 if name == "Muown" else 0, atol=0)
    g = torch.tensor([[0.5, 0.1], [-0.3, 0.2]])
    assert torch.equal(
        *(one_step(name, start, g, weight_decay=0.0, decay=f) for f in (form, RULES[name].fields["decay"].default))
    )


@pytest.mark.parametrize(("step", "keeps"), [(-1.0, [1.0, 0.9, 1.0]), (1.0, [0.9, 1.0, 1.0])])
def test_cautious_decay_goes_with_the_step(step: float, keeps: list[float]) -> None:
    """By hand, with steps so small that products with weights would vanish."""
    start = torch.tensor([1.0, -2.0, 0.0])
    moved = one_step("AdmetaS", start, torch.zeros(3), weight_decay=0.0)  # Its state is zero: nothing moves.
    assert torch.equal(moved, start)
    p = nn.Parameter(start.clone())
    p.grad = torch.full((3,), step * 1e-30)
    lo.PNM([p], lr=0.1, momentum=0.0, beta0=0.0, weight_decay=1.0, decay="cautious").step()
    torch.testing.assert_close(p.detach(), start * torch.tensor(keeps), rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize("scheduler", ["lambda", "one cycle"])
@pytest.mark.parametrize("name", ["MVNGrad", "LaProp", "NAMO", "SOAP", "HVAdam"])
def test_corrected_decay_knows_the_highest_rate(name: str, scheduler: str) -> None:
    """Without gradients, weights shrink by exactly 1 - lr^2 / highest * weight_decay."""
    p = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    optimizer = build(name, [p], lr=0.2, weight_decay=0.1, decay="corrected")
    schedule: Any
    if scheduler == "lambda":
        schedule = LambdaLR(optimizer, lambda t: 1 / (1 + t))
    else:
        schedule = OneCycleLR(optimizer, max_lr=0.2, total_steps=8, cycle_momentum=False)
    expected = 1.0
    for t in range(6):
        lr = optimizer.param_groups[0]["lr"]
        if t or name != "SOAP":  # Its first step moves nothing.
            expected *= 1 - lr * 0.1 * lr / 0.2
        p.grad = torch.zeros_like(p)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, expected), rtol=1e-12, atol=0)


def test_the_older_name_sets_the_form() -> None:
    p = nn.Parameter(torch.ones(3))
    for name, default in (("MVNGrad", "decoupled"), ("HVAdam", "coupled"), ("AdmetaS", "coupled")):
        for decoupled, form in ((True, "decoupled"), (False, "coupled"), (None, default)):
            group = build(name, [p], decoupled=decoupled).param_groups[0]
            assert decay_of(RULES[name], group) == form
            assert ("decay" in group) is (form != default), "shards from before there was such an entry lack it"
            assert "decoupled" not in group
    assert lo.HVAdam([{"params": [p], "decoupled": True}]).param_groups[0]["decay"] == "decoupled"
    with pytest.raises(ValueError, match=r"MVNGrad: decoupled=True and decay='cautious' contradict"):
        lo.MVNGrad([p], decoupled=True, decay="cautious")
    with pytest.raises(ValueError, match="decoupled must be None or True or False, got decoupled='yes'"):
        lo.MVNGrad([p], decoupled="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "saved", "form"), [("MVNGrad", False, "coupled"), ("HVAdam", True, "decoupled")])
def test_checkpoints_with_the_older_name(name: str, saved: bool, form: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = build(name, [p], weight_decay=0.1)
    state = optimizer.state_dict()
    (group,) = state["param_groups"]
    group |= {"decoupled": saved, "rule": f"{name} (format 2)"}
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["decay"] == form
    assert "decoupled" not in optimizer.param_groups[0]
    assert formats.current(optimizer.state_dict())["param_groups"][0]["decay"] == form


@pytest.mark.parametrize(
    ("fallback", "given", "form", "amount"),
    [
        ("AdamW", {}, "decoupled", 0.3),
        ("HVAdam", {}, "coupled", 0.0),
        ("LaProp", {}, "independent", 0.0),  # A fraction per step: another unit.
        ("HVAdam", {"decay": "cautious"}, "cautious", 0.3),
        ("LaProp", {"decay": "independent"}, "independent", 0.3),
        ("AdmetaR", {"decay": "cautious"}, "decoupled", 0.3),  # It has no cautious form.
        ("AdamW", {"fallback_decay": "corrected"}, "corrected", 0.3),
        ("AdamW", {"fallback_decay": "coupled"}, "coupled", 0.01),
        ("AdamW", {"decay": "cautious", "fallback_decay": "decoupled", "fallback_weight_decay": 0.2}, "decoupled", 0.2),
    ],
)
def test_the_form_of_the_fallback(fallback: str, given: dict[str, Any], form: str, amount: float) -> None:
    for name in ("Muon", "NAMO"):
        cls: Any = OPTIMIZERS[name].cls
        groups = [{"params": [nn.Parameter(torch.ones(3))], "role": "fallback"}]
        (group,) = cls(groups, weight_decay=0.3, fallback=fallback, **given).param_groups
        assert (decay_of(RULES[fallback], group), group["weight_decay"]) == (form, amount)


@pytest.mark.parametrize("backend", ["plain", "chunked", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["coupled", "cautious"])
@pytest.mark.parametrize("rounding", ["split", "kahan"])
def test_low_precision_decays_what_the_parameter_stands_for(form: str, rounding: Any, backend: Any) -> None:
    """Weight decay of 1e-4 per step, far below the resolution of bfloat16, for an element-wise and a matrix rule."""
    for name in ("DeVAVector", "Muon"):
        cls: Any = OPTIMIZERS[name].cls
        found = []
        for dtype in (torch.bfloat16, torch.float32):
            p = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]).to(dtype))
            groups = [{"params": [p], "role": "matrix"}] if name in MATRIX else [p]
            optimizer = cls(groups, lr=1e-3, weight_decay=0.1, decay=form, rounding=rounding, backend=backend)
            for _ in range(20):
                p.grad = torch.tensor([[0.5, -0.25], [1.0, 0.5]]).to(dtype)
                optimizer.step()
            found.append(optimizer.exact(p))
        # "split" has the arithmetic of float32; "kahan" twice the eight bits of bfloat16, in each of 20 steps.
        atol = 1e-6 if rounding == "split" else 20 * 3 * 2**-17
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=atol)
