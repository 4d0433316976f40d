"""The measuring primitive: every step as it really was, at every precision, and training as it would have been."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import MVNGrad, OptimizerConfig, build_optimizer
from lightning_optim.callbacks import Diagnostics, OptimizerInternals, OrthogonalityError, SignCollapse, UpdateSize
from lightning_optim.callbacks.monitor import Monitor, Results
from lightning_optim.callbacks.recorder import Step, StepRecorder


class Model(pl.LightningModule):
    """Regression with a scheduler that halves the learning rate after every step."""

    def __init__(self, optimizer: Any = torch.optim.SGD, spoil: float | None = None, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        self.make, self.settings = optimizer, {"lr": 0.1} | settings
        self.spoil = spoil

    def loss(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].to(next(self.parameters()).dtype)
        factor = self.spoil if self.spoil is not None and batch_idx == 1 else 1.0
        return (self.net(x) - 1).square().mean() * factor

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters(), **self.settings)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x), batch_size=4)


class Probe(Monitor):
    """Keeps what the primitive says of each step."""

    family = "probe"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.steps: list[int] = []
        self.names: list[list[str]] = []
        self.off: list[float] = []
        self.gradient_norms: list[float] = []
        self.seen_before: list[float] = []
        self.lrs: list[float] = []

    def before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        self.seen_before.append(math.sqrt(float(step.unclipped_sq.double().sum())))

    def sums(self, step: Step) -> dict[str, Tensor]:
        change = step.change
        self.steps.append(step.index)
        self.names.append(step.names)
        self.lrs.append(change.lrs[0])
        pairs = list(zip(change.updates, change.lrs, change.gradients))
        self.off.append(max(float((u + lr * g).abs().max()) for u, lr, g in pairs))
        self.gradient_norms.append(math.sqrt(sum(float(g.double().square().sum()) for _, _, g in pairs)))
        return {"one": change.updates[0].new_ones(1)}

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        return Results({"index": float(step.index)})


def fit(
    model: pl.LightningModule, *callbacks: pl.Callback, ckpt_path: Path | None = None, **options: Any
) -> pl.Trainer:
    trainer = trainer_with(*callbacks, **options)
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


def trainer_with(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"max_steps": 5, "logger": False, "enable_checkpointing": False}
    return pl.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **defaults | options,
    )


def half(scale: float = 1024.0) -> dict[str, Any]:
    """16-mixed on a CPU, which Lightning offers on GPUs only."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]}


def all_monitors(**settings: Any) -> list[Monitor]:
    classes = (UpdateSize, SignCollapse, OrthogonalityError, OptimizerInternals)
    return [cls(**{"every_n_steps": 2, "layers": ["*"]} | settings) for cls in classes]


# --- right values -------------------------------------------------------------------------------------------------

# A parameter of magnitude 1 is rounded to 6e-8 in float32 and, in bfloat16, to 2e-3; products in float64 to 1e-16.
PRECISIONS = {
    "32-true": ({"precision": "32-true"}, 1e-7),
    "bf16-mixed": ({"precision": "bf16-mixed"}, 1e-7),
    "bf16-true": ({"precision": "bf16-true"}, 3e-3),
    "64-true": ({"precision": "64-true"}, 1e-15),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", [*PRECISIONS, "16-mixed", "16-mixed fused"])
def test_the_change_is_that_of_the_step(precision: str, accumulate: int) -> None:
    options, close = PRECISIONS.get(precision) or (half(), 1e-7)
    fused = precision.endswith("fused")
    clip = {} if fused else {"gradient_clip_val": 0.05}  # Lightning does not clip with fused optimizers in 16-mixed
    probe = Probe(1)
    fit(Model(fused=fused), probe, accumulate_grad_batches=accumulate, **options, **clip)
    assert probe.steps == [1, 2, 3, 4, 5]
    assert max(probe.off) <= close
    assert probe.lrs == [0.1 * 0.5**t for t in range(5)]
    for consumed, before in zip(probe.gradient_norms, probe.seen_before):
        # Gradients are unscaled in both places; torch's clipping divides by the norm plus 1e-6, and bfloat16 rounds.
        close = 1e-2 if "bf16" in precision else 1e-4
        assert consumed == pytest.approx(before if fused else min(before, 0.05), rel=close)
        assert before > 0.05


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_counted_and_not_measured(fused: bool) -> None:
    probe = Probe(1)
    fit(Model(fused=fused, spoil=float("inf")), probe, **half())
    assert probe.state_dict()["skips"] == {"": 1}
    assert probe.steps == [1, 3, 4, 5]
    assert [step for step, _ in probe.history["probe/index"]] == [0, 2, 3, 4]


def test_a_step_that_our_optimizer_skips_is_not_measured() -> None:
    probe = Probe(1)
    fit(Model(MVNGrad, spoil=float("nan")), probe)
    assert probe.steps == [1, 3, 4, 5]


class Manual(Model):
    """Two optimizers; the second makes two steps in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()  # type: ignore[misc]
        for optimizer in (first, second, second):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.AdamW(self.net[2:].parameters(), 1e-3)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_several_optimizers_are_told_apart(precision: Any) -> None:
    size, orthogonality = UpdateSize(2), OrthogonalityError(2, layers=["net.2.*"])
    fit(Manual(), size, orthogonality, max_steps=12, precision=precision)
    assert len(size.history["SGD0/update/rms"]) == 2
    assert len(size.history["AdamW1/update/rms"]) == 4
    assert {tag.split("/")[0] for tag in size.history} == {"SGD0", "AdamW1"}
    assert "AdamW1/orthogonality_error/net.2.weight" in orthogonality.history


def test_autocast_and_reduced_precision_do_not_reach_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """In manual optimization the step runs inside of autocast, where products of matrices would be bfloat16's."""
    precisions = []
    measured = OrthogonalityError.sums

    def sums(self: OrthogonalityError, step: Step) -> dict[str, Tensor]:
        precisions.append(torch.is_autocast_enabled("cpu"))
        inside = measured(self, step)
        with torch.autocast("cpu", enabled=False):
            outside = measured(self, step)
        assert torch.equal(inside["error"], outside["error"])
        return inside

    monkeypatch.setattr(OrthogonalityError, "sums", sums)
    fit(Manual(), OrthogonalityError(1), max_steps=3, precision="bf16-mixed")
    assert precisions
    assert all(precisions)


def test_a_step_that_calls_its_closure_several_times_is_one() -> None:
    model, size = Model(torch.optim.LBFGS, max_iter=4), UpdateSize(1)
    start = [p.detach().clone() for p in model.parameters()]
    trainer = fit(model, size, max_steps=1)
    change = [p.detach() - before for p, before in zip(model.parameters(), start)]
    assert trainer.optimizers[0].state_dict()["state"][0]["func_evals"] > 1
    assert size.state_dict()["counts"] == {"": 1}
    assert size.state_dict()["skips"] == {}
    [(_, rms)] = size.history["update/rms"]
    # Float32 sums of a hundred elements.
    assert rms == pytest.approx(float(torch.cat([c.flatten() for c in change]).square().mean().sqrt()), rel=1e-5)


class TwoOfTheSame(Manual):
    """Two optimizers of one parameter."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.net[0].weight], 0.1), torch.optim.AdamW([self.net[0].weight], 1e-3)]


def test_what_is_remembered_of_one_optimizer_is_not_told_of_another() -> None:
    size = UpdateSize(1)
    fit(TwoOfTheSame(), size, max_steps=3)  # SGD, AdamW, AdamW
    assert "SGD0/update/cosine_to_previous" not in size.history
    assert len(size.history["AdamW1/update/cosine_to_previous"]) == 1


def test_what_was_remembered_of_other_shards_is_forgotten() -> None:
    size = UpdateSize(1)
    size.load_state_dict({"counts": {}, "skips": {}, "memory": {"update/net.0.weight": torch.ones(3)}})
    fit(Model(), size, max_steps=2)
    assert [step for step, _ in size.history["update/cosine_to_previous"]] == [1]


class Odd(Model):
    """With a parameter that is never used, and two that are one."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.tied = nn.Linear(6, 8)
        self.tied.weight = self.net[0].weight


def test_parameters_without_gradient_and_tied_ones() -> None:
    probe = Probe(1)
    fit(Odd(), probe, *all_monitors())
    assert probe.names[0] == [f"net.{i}.{leaf}" for i in (0, 2, 4) for leaf in ("weight", "bias")]


def test_compiled_modules_have_clean_names() -> None:
    model = Model()
    model.net = torch.compile(model.net, backend="eager")  # type: ignore[assignment]
    orthogonality = OrthogonalityError(1, layers=["net.2.weight"])
    fit(model, orthogonality, max_steps=2)
    assert "orthogonality_error/net.2.weight" in orthogonality.history


class Rebuild(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == 2:
            trainer.strategy.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.01)]


def test_an_optimizer_that_is_replaced_in_a_run_is_measured() -> None:
    probe = Probe(1)
    fit(Model(), probe, Rebuild())
    assert probe.steps == [1, 2, 3, 4, 5]
    assert probe.lrs[2] == 0.01
    assert max(probe.off) <= 1e-7  # rounding of float32


def test_fit_called_again_goes_on() -> None:
    model, probe = Model(), Probe(2)
    trainer = fit(model, probe, max_steps=3)
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(model)
    fit(model, probe, max_steps=2)
    assert probe.steps == [2, 4, 6, 8]
    assert max(probe.off) <= 1e-7


# --- which steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"every_n_steps": 3}, [3, 6, 9]),
        ({"every_n_steps": 4, "first_n_steps": 2}, [1, 2, 4, 8]),
        ({"every_n_steps": lambda step: step in (2, 7)}, [2, 7]),
    ],
)
def test_sampling(settings: dict[str, Any], steps: list[int]) -> None:
    probe, every = Probe(**settings), UpdateSize(1)
    fit(Model(), probe, every, max_steps=9)
    assert probe.steps == steps
    assert probe.history["probe/index"] == type(probe.history["probe/index"])((s - 1, float(s)) for s in steps)
    assert [step for step, _ in every.history["update/rms"]] == list(range(9))


def test_two_instances_do_not_mix() -> None:
    often, seldom = UpdateSize(1, layers=["net.0.*"]), UpdateSize(3)
    assert often.state_key != seldom.state_key
    fit(Model(), often, seldom, max_steps=6)
    assert len(often.history["update/rms"]) == 6
    assert len(seldom.history["update/rms"]) == 2
    assert not any("net.0" in tag for tag in seldom.history)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (UpdateSize(2), UpdateSize(2)),
        lambda: (UpdateSize(lambda step: step % 2 == 0), UpdateSize(lambda step: step % 3 == 0)),
        lambda: (Diagnostics("light", every_n_steps=2), Diagnostics("light", every_n_steps=2)),
    ],
    ids=["equal", "functions", "Diagnostics"],
)
def test_instances_with_equal_settings_keep_their_own_state(make: Any, tmp_path: Path) -> None:
    def state(callback: Any) -> Any:
        sets = [callback] if isinstance(callback, Monitor) else callback.monitors
        return [{name: x.tolist() for name, x in monitor.memory.items()} for monitor in sets]

    first, second = make()
    trainer = fit(Model(), first, second, max_steps=3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = make()
    fit(Model(), *resumed, max_steps=3, ckpt_path=tmp_path / "last.ckpt")  # which has come to its end
    assert [state(callback) for callback in resumed] == [state(first), state(second)]
    assert resumed[0].state_key != resumed[1].state_key
    assert (first.state_key, second.state_key) == (resumed[0].state_key, resumed[1].state_key)


def test_monitors_that_count_differently_see_their_own_steps() -> None:
    """As where one was added to a run that is resumed."""
    old, new = Probe(1), Probe(1, layers=["*"])
    old.load_state_dict({"counts": {"": 10}, "skips": {}, "memory": {}})
    fit(Odd(), old, new, max_steps=2)
    assert (old.steps, new.steps) == ([11, 12], [1, 2])


# --- training is left alone -----------------------------------------------------------------------------------------


class WithNAMO(Model):
    def configure_optimizers(self) -> Any:
        return build_optimizer(self, OptimizerConfig("NAMO"))


@pytest.mark.parametrize("model", [Model, lambda: Model(torch.optim.AdamW), lambda: Model(MVNGrad), WithNAMO])
def test_weights_are_those_without_callbacks(model: Any) -> None:
    watched, alone = model(), model()
    random = torch.get_rng_state()
    fit(watched, *all_monitors(every_n_steps=1), OrthogonalityError(2, polar=True))
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    fit(alone)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters()))
    assert torch.equal(torch.get_rng_state(), after)


def hooks(trainer: pl.Trainer) -> int:
    found = [hook for optimizer in trainer.optimizers for hook in optimizer._optimizer_step_post_hooks.values()]
    return sum(isinstance(getattr(hook, "__self__", None), StepRecorder) for hook in found)


def test_nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = fit(WithNAMO(), *all_monitors())
    assert hooks(trainer) == 0
    assert trainer.optimizers[0].observer is None

    class Fails(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                assert hooks(trainer) == 1
                raise RuntimeError("on purpose")

    trainer = trainer_with(*all_monitors(), Fails())
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Model())
    assert hooks(trainer) == 0
    assert not StepRecorder.of(trainer).monitors


def test_an_observer_of_ones_own_stays() -> None:
    names = []

    class Observe(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.optimizers[0].observer = lambda p, name, value: names.append(name)

    trainer = fit(WithNAMO(), Observe(), *all_monitors(every_n_steps=4))
    assert trainer.optimizers[0].observer is not None
    assert "adaptive_scale" in names


# --- state and loggers ----------------------------------------------------------------------------------------------


def test_state_is_resumed(tmp_path: Path) -> None:
    """After three steps, so that counts have to be known for the same steps to be measured."""
    straight = UpdateSize(2)
    options: dict[str, Any] = {"limit_train_batches": 1}
    fit(Model(), straight, max_steps=8, **options)
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1)
    fit(Model(), UpdateSize(2), checkpoint, max_steps=3, enable_checkpointing=True, **options)
    path = tmp_path / "epoch=2-step=3.ckpt"
    assert any("UpdateSize" in key for key in torch.load(path, weights_only=True)["callbacks"])
    resumed = UpdateSize(2)
    trainer_with(resumed, max_steps=8, **options).fit(Model(), ckpt_path=path, weights_only=True)
    for tag in ("update/rms", "update/cosine_to_previous"):
        assert list(resumed.history[tag]) == [pair for pair in straight.history[tag] if pair[0] >= 3]


def test_other_callbacks_can_watch_a_diagnostic(tmp_path: Path) -> None:
    """The learning rate, and so the update, halves in each step."""
    stop = EarlyStopping("update/rms", stopping_threshold=1e-3, check_on_train_epoch_end=True)
    keep = ModelCheckpoint(tmp_path, monitor="update/rms", filename="{epoch}")
    trainer = fit(Model(), UpdateSize(1), stop, keep, max_steps=-1, max_epochs=50, enable_checkpointing=True)
    assert trainer.current_epoch < 5
    assert float(keep.best_model_score) == float(trainer.callback_metrics["update/rms"]) < 1e-3


class Remembering(Logger):
    """Like W&B's: one call, one row."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = version = "remembering"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, metrics))


def test_every_logger_gets_each_value_once(tmp_path: Path) -> None:
    loggers: list[Any] = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path, flush_logs_every_n_steps=1), Remembering()]
    monitors = all_monitors(every_n_steps=3)
    fit(Model(torch.optim.AdamW), *monitors, max_steps=7, logger=loggers, log_every_n_steps=1)
    expected = {tag: list(pairs) for monitor in monitors for tag, pairs in monitor.history.items()}
    assert [step for step, _ in expected["update/rms"]] == [2, 5]

    events = EventAccumulator(loggers[0].log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    with (Path(loggers[1].log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = [(step, row) for step, row in loggers[2].rows if "update/rms" in row]
    assert [step for step, _ in measured] == [2, 5]  # one call per measured step
    for tag, pairs in expected.items():
        # TensorBoard keeps float32.
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(s, pytest.approx(v, rel=1e-6)) for s, v in pairs]
        assert [(int(row["step"]), float(row[tag])) for row in rows if row[tag]] == pairs
        assert [(step, row[tag]) for step, row in loggers[2].rows if tag in row] == pairs
    assert "custom_scalars__config__" in events.Tags()["tensors"]
