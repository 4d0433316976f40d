"""What diagnostics hold in memory, by the allocator's own account."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim.callbacks import Diagnostics, SpikeResponse, UpdateVariance, orthogonality_error

from .probed import fit, normal

WIDTH = 512
LAYER = 4 * WIDTH**2  # bytes of one parameter in float32
SAMPLE = 4 * 4096  # bytes of what is remembered of one
STEP, MICRO_BATCHES = 6, 2  # The step under test is a measured one, but not the first.


class Deep(pl.LightningModule):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth)])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(normal(2 * STEP * MICRO_BATCHES, WIDTH)), batch_size=2)


class Memory(pl.Callback):
    """Bytes that are allocated and freed between the first forward pass of a step and its end."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == (STEP - 1) * MICRO_BATCHES:
            pl_module.zero_grad()  # as Lightning does in a moment
            self.profile.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == STEP * MICRO_BATCHES - 1:
            self.profile.stop()

    @property
    def peak_and_rest(self) -> tuple[int, int]:
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak, held


def measured(depth: int, *callbacks: pl.Callback, **options: Any) -> tuple[int, int]:
    memory = Memory()
    fit(Deep(depth), [memory, *callbacks], steps=STEP, accumulate_grad_batches=MICRO_BATCHES, **options)
    return memory.peak_and_rest


def copies(make: Any, **options: Any) -> float:
    """How many float32 copies of the parameters are held at most, beyond a run without, by how that grows with them."""
    peaks = [measured(depth, make(), **options)[0] - measured(depth, **options)[0] for depth in (4, 8)]
    return (peaks[1] - peaks[0]) / (4 * LAYER)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("tier", ["light", "standard"])
def test_one_copy_of_the_parameters_is_held(tier: Any, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is worked with at once is a constant, if larger than this model.
    monkeypatch.setattr(orthogonality_error, "_MOST_AT_ONCE", WIDTH**2)
    held = copies(lambda: Diagnostics(tier, every_n_steps=2), precision=precision)
    samples = 8 * SAMPLE / LAYER  # of updates and of what is remembered of them, until they are replaced
    assert 0.9 < held < 1 + samples


def test_nothing_but_samples_is_held_between_measured_steps() -> None:
    depth = 4
    rest = measured(depth, Diagnostics(every_n_steps=2))[1] - measured(depth)[1]
    assert rest < 2 * depth * SAMPLE * 1.1  # of UpdateSize and UpdateVariance, and a few numbers


@pytest.mark.parametrize(
    "probe",
    [
        # The copied optimizer's state, parameters, gradients and changes, the spike, and the gradients with it.
        lambda: SpikeResponse(probe_every_n_steps=2, probe_scales=[1e3], probe_steps=1),
        # The first four, and the copied module with its gradients.
        lambda: UpdateVariance(probe_every_n_steps=2, batches=2),
        # The first four, the gradients accumulated before the last micro-batch, and its own.
        lambda: UpdateVariance(probe_every_n_steps=2, source="accumulation"),
    ],
    ids=["spike", "batches", "accumulation"],
)
def test_probes_hold_what_they_say_and_free_it(probe: Any) -> None:
    assert copies(probe) < 6 + 8 * SAMPLE / LAYER
    assert measured(4, probe())[1] - measured(4)[1] < 4 * SAMPLE * 1.3
