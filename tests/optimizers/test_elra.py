"""What is said of ELRA: the reference with losses, orthogonal gradients, rotations, and steps that are taken back."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

import lightning_optim as lo
from lightning_optim.engine.losses import RunningStatistics

from .rows.elra import ELRAReference

F64 = torch.float64
FORMS = ["p2min", "c2min"]
each_form = pytest.mark.parametrize("form", FORMS)
#: Rising, falling, far too large (taken back, twice in a row too), and not finite.
LOSSES = [3.0, 2.0, 2.5, 400.0, 1.5, 1e4, 1e5, 0.7, math.inf, 0.6, 0.55, 0.0, 0.5]


@pytest.mark.parametrize("backend", ["plain", "chunked", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("groups", [1, 2, 3])
@each_form
def test_the_reference_takes_the_same_steps_back(form: str, groups: int, backend: str) -> None:
    """Over any parameter groups, whose learning rates may differ and change."""
    rng = np.random.default_rng(groups)
    params = [nn.Parameter(torch.from_numpy(rng.normal(size=shape))) for shape in [(3, 4), (5,), (2, 2, 2), ()]]
    scale = [1.0, 0.3, 2.0]
    parts = [{"params": params[i::groups], "lr": 0.01 * scale[i]} for i in range(groups)]
    optimizer = lo.ELRA(parts, backend=backend, form=form)  # type: ignore[arg-type]
    order = [p for part in parts for p in part["params"]]  # type: ignore[attr-defined]
    reference = ELRAReference([p.detach().numpy().copy() for p in order], form=form)
    for t, loss in enumerate(LOSSES):
        grads = [rng.normal(size=tuple(p.shape)) + 0.5 for p in order]
        rates = []
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 * scale[i] * (1 + 0.5 * math.sin(t))
            rates += [group["lr"]] * len(group["params"])
        for p, g in zip(order, grads):
            p.grad = torch.from_numpy(np.asarray(g)) if loss < math.inf else torch.full_like(p, math.nan)
        optimizer.step(lambda loss=loss: torch.tensor(loss, dtype=F64))  # type: ignore[misc]
        reference.step(grads, lr=rates, loss=loss)
        for p, expected in zip(order, reference.params):
            # Float64, other orders of sums; ratios of products amplify them.
            np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-9, atol=1e-10)
    assert {int(optimizer.state[p]["retraces"]) for p in params} == {reference.taken_back}
    assert reference.taken_back >= 4


def quadratic(n: int, condition: float, seed: int = 0) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.logspace(0, math.log10(condition), n, dtype=F64)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64)).Q
    h = q @ torch.diag(values) @ q.T
    return torch.randn(n, generator=generator, dtype=F64) * 3, lambda x: 0.5 * x @ h @ x


def descend(start: Tensor, loss_of: Callable[[Tensor], Tensor], steps: int, **arguments: Any) -> list[list[Tensor]]:
    """Losses, points and gradients."""
    w = nn.Parameter(start.clone())
    optimizer = lo.ELRA([w], **arguments)
    found: list[list[Tensor]] = [[], [], []]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(w)
        loss.backward()
        assert w.grad is not None
        for known, x in zip(found, (loss, w, w.grad)):
            known.append(x.detach().clone())
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return found


@pytest.mark.parametrize("condition", [1.0, 3.0, 10.0])
def test_successive_gradients_of_a_quadratic_become_orthogonal(condition: float) -> None:
    losses, _, grads = descend(*quadratic(6, condition), steps=60, form="p2min")
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.pairwise(grads) if b.norm() > 1e-100]
    # The first steps are as short as 1e-5, whose gradients hardly differ.
    assert min(cosines[:4]) > 0.5
    late = cosines[8:]
    assert not late or sum(late) / len(late) < 0.2
    assert losses[-1] < 1e-6 * losses[0]


def test_along_one_axis_the_step_ends_at_the_minimum() -> None:
    """There orthogonal means zero: the parabola through two slopes is the loss itself."""
    # A large first loss, beside which the correction of the release vanishes: 1e-9 of the step.
    _, points, _ = descend(torch.tensor([1e6], dtype=F64), lambda x: (x * x).sum() * 2, steps=12, form="p2min")
    ratios = [float(b.abs() / a.abs()) for a, b in itertools.pairwise(points)]
    assert min(ratios) < 1e-6


@each_form
def test_a_rotated_model_takes_rotated_steps(form: str) -> None:
    start, loss_of = quadratic(8, 30.0)
    q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(5), dtype=F64)).Q
    plain = descend(start, loss_of, 40, form=form, lr=1e-3)
    rotated = descend(q @ start, lambda x: loss_of(q.T @ x), 40, form=form, lr=1e-3)
    for a, b in zip(plain[1], rotated[1]):
        # Rounding errors of other sums, which a feedback of forty steps amplifies.
        torch.testing.assert_close(q @ a, b, rtol=1e-6, atol=1e-6 * float(start.norm()))


@each_form
def test_it_needs_no_learning_rate(form: str) -> None:
    for lr in (1e-7, 1e-5, 1e-3):
        losses, *_ = descend(*quadratic(10, 20.0), steps=300, form=form, lr=lr)
        assert losses[-1] < 1e-3 * losses[0]


# --- the loss ---------------------------------------------------------------------------------------------------------


def made(**arguments: Any) -> tuple[nn.Parameter, lo.ELRA]:
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    return w, lo.ELRA([w], **arguments)


@pytest.mark.real_loss
@pytest.mark.parametrize(
    ("closure", "words"),
    [
        (None, ["step(lambda: loss)", "16-mixed", "bf16-mixed"]),
        (lambda: None, ["step(closure)", "returns it"]),
        (lambda: torch.ones(2), ["one number"]),
        (lambda: {"loss": 1.0}, ["one number"]),
        (lambda: torch.tensor(-0.5), ["must not be negative", "-0.5", "add a constant"]),
    ],
)
def test_a_step_without_a_loss_is_refused(closure: Any, words: list[str]) -> None:
    w, optimizer = made()
    with pytest.raises(ValueError, match="ELRA") as error:
        optimizer.step(closure)
    assert all(word in str(error.value) for word in words)
    assert torch.equal(w, torch.ones(3))
    assert not optimizer.state


@pytest.mark.real_loss
def test_maximize_takes_objectives_that_are_not_positive() -> None:
    w, optimizer = made(maximize=True, lr=0.1)
    optimizer.step(lambda: torch.tensor(-2.0))
    torch.testing.assert_close(w.detach(), torch.full((3,), 1.1))
    with pytest.raises(ValueError, match="maximize=True"):
        optimizer.step(lambda: torch.tensor(2.0))
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    optimizer.add_param_group({"params": [other], "maximize": False})
    with pytest.raises(ValueError, match="maximize must be the same"):
        optimizer.step(lambda: torch.tensor(-2.0))


@pytest.mark.real_loss
def test_without_known_processes_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.processes.world", lambda: object())
    w, optimizer = made()
    with pytest.raises(ValueError, match="process_group"):
        optimizer.step(lambda: torch.tensor(1.0))
    assert torch.equal(w, torch.ones(3))


@each_form
def test_a_loss_that_is_not_finite_takes_the_step_back(form: str) -> None:
    w, optimizer = made(form=form, lr=0.1)
    w.grad = torch.full((3,), math.nan)
    optimizer.step(lambda: torch.tensor(math.inf))  # There is nothing to take back yet.
    assert optimizer.skipped_steps == 1
    assert torch.equal(w, torch.ones(3))
    w.grad = torch.ones(3)
    optimizer.step(lambda: torch.tensor(1.0))
    assert float(w[0]) == pytest.approx(0.9)
    w.grad = torch.full((3,), math.nan)
    optimizer.step(lambda: torch.tensor(math.nan))
    assert float(optimizer.state[w]["retraces"]) == 1
    assert 0.9 < float(w[0]) <= 1.0
    before = w.detach().clone()
    optimizer.step(lambda: torch.tensor(1.0))  # A gradient that is not finite, at a loss that is: as everywhere.
    assert optimizer.skipped_steps == 2
    assert torch.equal(w, before)


# --- BatchNorm --------------------------------------------------------------------------------------------------------


@each_form
def test_running_statistics_go_back_with_the_step(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = lo.build_optimizer(model, "ELRA", form=form, lr=0.1)
    assert isinstance(optimizer, lo.ELRA)
    batch = torch.randn(8, 3)
    factor = 1.0

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean() * factor + 1
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    kept = {name: x.clone() for name, x in model.named_buffers()}
    assert int(kept["1.num_batches_tracked"]) == 2
    factor = 1e9
    optimizer.step(closure)
    w = next(model.parameters())
    assert float(optimizer.state[w]["taken_back"]) == 1
    for name, x in model.named_buffers():
        assert torch.equal(x, kept[name]), name
    factor = 1.0
    optimizer.step(closure)
    assert int(dict(model.named_buffers())["1.num_batches_tracked"]) == 3


def test_statistics_stay_out_of_copies_and_checkpoints() -> None:
    _, optimizer = made()
    optimizer.statistics = RunningStatistics(lambda: [torch.ones(1)])
    optimizer.step(lambda: torch.tensor(1.0))
    assert copy.deepcopy(optimizer).statistics is None
    assert optimizer.state_dict().keys() >= {"state", "param_groups"}
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.statistics.kept is None


# --- Lightning --------------------------------------------------------------------------------------------------------


class Small(LightningModule):
    """A regression; by hand, with and without the loss."""

    def __init__(self, by_hand: str = "") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.automatic_optimization = not by_hand
        self.by_hand = by_hand
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.losses.append(float(loss))
        if self.by_hand:
            optimizer = self.optimizers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            if self.by_hand == "with the loss":
                optimizer.step(lambda: loss)  # type: ignore[union-attr, call-arg]
            else:
                optimizer.step()  # type: ignore[union-attr, call-arg]
        return loss

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 4, generator=generator)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), 32)

    def configure_optimizers(self) -> Any:
        return lo.build_optimizer(self, "ELRA")


def fit(module: Small, tmp_path: Any, **arguments: Any) -> list[float]:
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=40, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **arguments,
    )  # fmt: skip
    trainer.fit(module)
    return module.losses


@pytest.mark.real_loss
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}], ids=str)
def test_automatic_optimization_brings_the_loss(arguments: dict[str, Any], tmp_path: Any) -> None:
    losses = fit(Small(), tmp_path, **arguments)
    assert losses[-1] < 0.5 * losses[0]
    assert all(map(math.isfinite, losses))


@pytest.mark.real_loss
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_manual_optimization_says_the_loss(tmp_path: Any) -> None:
    losses = fit(Small("with the loss"), tmp_path)
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ValueError, match=r"step\(lambda: loss\)"):
        fit(Small("without"), tmp_path)


def test_it_is_no_fallback() -> None:
    with pytest.raises(ValueError, match="fallback='ELRA' is not one of"):
        lo.Muon([nn.Parameter(torch.ones(2, 2))], fallback="ELRA")
