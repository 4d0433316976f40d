"""What diagnostics cost at the steps that they do not measure, counted and not timed, and what they say of it."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim import Watch
from lightning_optim.callbacks import Diagnostics, RunRecord

EVERY = 50
#: Measured are steps 1 and 2 (counted from 1), the powers of two, and by the tier `standard`, every tenth up to 100.
UNMEASURED = range(20, 29)


class Net(BoringModel):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layer: Any = nn.Sequential(*(nn.Linear(32, 32) for _ in range(depth)), nn.Linear(32, 2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3, foreach=False)


class Counted(TorchDispatchMode):
    """Counts calls of torch's operations, and of ``named_parameters``, at the unmeasured steps of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.counts = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += self.counts
        return func(*args, **(kwargs or {}))


class Marks(pl.Callback):
    def __init__(self, counted: Counted) -> None:
        self.counted = counted

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.counted.counts = batch_idx in UNMEASURED


def calls_per_step(depth: int, monkeypatch: pytest.MonkeyPatch, *callbacks: pl.Callback) -> Counter[str]:
    counted = Counted()
    named_parameters = nn.Module.named_parameters

    def walk(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        counted.calls["named_parameters"] += counted.counts
        return named_parameters(self, *args, **kwargs)

    quiet: Any = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_steps=UNMEASURED[-1] + 2, accelerator="cpu", logger=False, callbacks=[Marks(counted), *callbacks], **quiet
    )
    with monkeypatch.context() as patch, counted:
        patch.setattr(nn.Module, "named_parameters", walk)
        trainer.fit(Net(depth))
    return Counter({name: n / len(UNMEASURED) for name, n in counted.calls.items()})


@pytest.mark.parametrize(
    ("tier", "most"),
    [
        # The loss, without its graph, and as a number.
        ("light", {"detach": 1, "_local_scalar_dense": 1}),
        # Besides, the norm of all gradients: of each in one call, and together; whether their sum is finite.
        (
            "standard",
            {"detach": 1, "_foreach_norm": 1, "stack": 1, "pow": 1, "sum": 2, "sqrt": 1, "_local_scalar_dense": 4}
            | {"promote_types": 1},  # of each dtype
        ),
    ],
)
def test_an_unmeasured_step_costs_the_same_for_any_number_of_parameters(
    tier: Any, most: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for depth in (1, 12):
        without = calls_per_step(depth, monkeypatch)
        cost = calls_per_step(depth, monkeypatch, Diagnostics(tier, every_n_steps=EVERY, quiet=True))
        cost.subtract(without)
        assert {name: n for name, n in cost.items() if n} == most


def test_what_hooks_take_between_measured_steps_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, seconds = RunRecord._fetch, 0.05

    def slow(self: RunRecord) -> None:
        time.sleep(seconds)
        fetch(self)

    monkeypatch.setattr(RunRecord, "_fetch", slow)
    diagnostics = Diagnostics("light", every_n_steps=8, first_n_steps=1, quiet=True)
    quiet: Any = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=16, accelerator="cpu", logger=False, callbacks=[diagnostics], **quiet)
    trainer.fit(Net(1))
    # Losses are fetched at every step. Steps 1, 2, 4 and 8 are measured, and then step 16.
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert values["diagnostics/overhead_ms"] > 8 * 1e3 * seconds
    # Sleep is nearly all that a step does, so that counted twice it would be above 1.
    assert 0.6 < values["diagnostics/overhead_share"] < 1


def test_a_loop_of_ones_own_takes_the_same_steps() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    counted = Counted()

    def loss() -> Tensor:
        return model(torch.ones(8, 4)).square().mean()

    with Watch(model, optimizer, diagnostics=Diagnostics("light", EVERY, quiet=True)) as watch, counted:
        for step in range(30):
            value = loss()
            value.backward()
            counted.counts = step in UNMEASURED
            watch.loss(value)
            counted.counts = False
            optimizer.step()
    per_step = {name: n / len(UNMEASURED) for name, n in counted.calls.items() if n}
    assert per_step == {"detach": 2, "div": 1}
