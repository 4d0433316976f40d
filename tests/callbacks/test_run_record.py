"""What a diagnosis needs to know is recorded from the first step on, in every kind of run."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_optim import build_optimizer, cli
from lightning_optim.callbacks import Diagnostics, RunRecord
from lightning_optim.diagnostics.run import read_runs


def trainer(**kwargs) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **(quiet | {"max_steps": 6} | kwargs))


class Net(BoringModel):
    optimizer = "AdamW"
    lr = 1e-2

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(RandomDataset(32, 256), batch_size=4)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return build_optimizer(self, self.optimizer, lr=self.lr)


def recorded(diagnostics: Diagnostics) -> list:
    return [record for _, record in diagnostics.run().records]


@pytest.mark.parametrize("tier", ["light", "standard"])
@pytest.mark.parametrize("steps", [1, 3, 32])
def test_a_run_shorter_than_the_interval_is_measured(tier, steps):
    diagnostics = Diagnostics(tier, quiet=True)
    trainer(callbacks=[diagnostics], max_steps=steps).fit(Net())
    scalars = diagnostics.run().scalars
    for tag in ("training/loss", "training/lr", "training/growth", "update/to_weight", "gradient/norm"):
        assert scalars[tag][0][0] == 0, tag
    course = [record["course"] for record in recorded(diagnostics) if "course" in record]
    at = [step for part in course for step in part[0]]
    assert at == list(range(steps))


def test_the_loss_is_that_of_the_module_whatever_the_accumulation():
    losses = []

    class Known(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            losses.append(float(loss))
            return loss

    diagnostics = Diagnostics(every_n_steps=1, quiet=True)
    trainer(callbacks=[diagnostics], accumulate_grad_batches=3, max_steps=4).fit(Known())
    steps, values = diagnostics.run().scalars["training/loss"]
    assert len(steps) == 4
    for i, value in enumerate(values):
        # Sums of three float32 numbers.
        assert value == pytest.approx(sum(losses[3 * i : 3 * i + 3]) / 3, rel=1e-5)


@pytest.mark.parametrize("monitor", ["training/loss", "training/growth", "update/rms", "gradient/norm", "spike/score"])
def test_early_stopping_can_watch_a_value_from_the_first_validation_on(monitor):
    stopping = EarlyStopping(monitor, patience=100)
    t = trainer(callbacks=[Diagnostics(quiet=True), stopping], max_steps=4, val_check_interval=1, limit_val_batches=1)
    t.fit(Net())
    assert t.global_step == 4


def test_event_files_hold_what_is_in_memory(tmp_path):
    diagnostics = Diagnostics(every_n_steps=2, quiet=True)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(callbacks=[diagnostics], logger=logger, max_steps=9, val_check_interval=4, limit_val_batches=1).fit(Net())
    (read,) = read_runs([tmp_path])
    here = diagnostics.run()
    assert list(read.records) == list(here.records)
    kinds = {kind for _, record in read.records for kind in record}
    assert {"run", "layers", "course", "lr", "validation", "coverage", "end"} <= kinds


def test_growth_and_layers_have_the_right_values():
    class Fixed(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    diagnostics, net = Diagnostics(every_n_steps=1, quiet=True), Fixed()
    start = [p.detach().clone() for p in net.parameters()]
    trainer(callbacks=[diagnostics], max_steps=3).fit(net)
    last = [r["layers"] for r in recorded(diagnostics) if "layers" in r][-1]
    for i, (p, before) in enumerate(zip(net.parameters(), start)):
        # Records have four digits.
        assert last["start"][i] == pytest.approx(float(before.square().mean().sqrt()), rel=1e-3)
        assert last["weight"][i] == pytest.approx(float(p.detach().square().mean().sqrt()), rel=1e-3)
    total = sum(float(p.detach().square().sum()) for p in net.parameters()) / sum(
        float(p.square().sum()) for p in start
    )
    # float32 sums
    assert diagnostics.run().scalars["training/growth"][1][-1] == pytest.approx(total**0.5, rel=1e-5)


# --- coverage -------------------------------------------------------------------------------------------------------


class Gaps(Net):
    """Something of everything: frozen, without a gradient, in no optimizer."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(8, 8)
        self.forgotten = nn.Linear(2, 2)
        self.layer[0].bias.requires_grad_(False)

    def forward(self, x):
        return self.forgotten(self.layer(x))

    def configure_optimizers(self):
        chosen = [p for name, p in self.named_parameters() if not name.startswith("forgotten") and p.requires_grad]
        return torch.optim.AdamW(chosen, lr=self.lr)


def test_coverage_says_what_became_of_each_parameter():
    diagnostics = Diagnostics(quiet=True)
    trainer(callbacks=[diagnostics]).fit(Gaps())
    coverage = diagnostics.diagnosis().coverage
    states = {p.name: p.state for p in coverage.parameters}
    assert states.pop("layer.0.bias") == "frozen"
    assert {states.pop(f"unused.{name}") for name in ("weight", "bias")} == {"no gradient"}
    assert {states.pop(f"forgotten.{name}") for name in ("weight", "bias")} == {"in no optimizer"}
    assert set(states.values()) == {"trained"}
    assert diagnostics.diagnosis().findings[0].cause == "not_trained"


def test_parameters_that_never_move():
    class Still(Net):
        def configure_optimizers(self):
            groups = [{"params": self.layer[0].parameters(), "lr": 0.0}, {"params": self.layer[2:].parameters()}]
            return torch.optim.SGD(groups, lr=0.1)

    diagnostics = Diagnostics(quiet=True)
    trainer(callbacks=[diagnostics]).fit(Still())
    states = {p.name: p.state for p in diagnostics.diagnosis().coverage.parameters}
    assert states["layer.0.weight"] == "never moved"
    assert states["layer.2.weight"] == "trained"


@pytest.mark.parametrize("optimizer", ["NAMO", "Muon", "SOAP"])
def test_a_matrix_optimizer_says_what_goes_to_the_fallback(optimizer):
    class Left(Net):
        def __init__(self):
            super().__init__()
            self.mixing = nn.Parameter(torch.eye(2))  # of no module type that the router knows
            self.layer[2].weight.data *= 1

        def forward(self, x):
            return self.layer(x) @ self.mixing

        def configure_optimizers(self):
            return build_optimizer(self, optimizer)

    diagnostics = Diagnostics(quiet=True)
    trainer(callbacks=[diagnostics], max_steps=2).fit(Left())
    coverage = diagnostics.diagnosis().coverage
    assert coverage.summary().startswith(f"{optimizer}: ")
    assert "in 2 matrices; AdamW: " in coverage.summary()
    assert [p.name for p in coverage.left_to_fallback()] == ["mixing"]
    assert not coverage.warnings()  # far below a twentieth


# --- the console ----------------------------------------------------------------------------------------------------


class Sick(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        return loss * float("nan") if self.global_step == 4 else loss


@pytest.mark.parametrize("is_quiet", [False, True])
def test_the_console_says_what_is_broken_and_the_verdict(caplog, is_quiet):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer(callbacks=[Diagnostics(quiet=is_quiet)], max_steps=8).fit(Sick())
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Diagnostics")]
    if is_quiet:
        assert said == []
        return
    assert said[0].startswith("Diagnostics, step 4: the loss is nan")
    assert said[-1].startswith("Diagnostics: broken: nonfinite loss (since step 4)")
    assert len(said) == 2


def test_a_run_that_ends_with_an_error_has_its_verdict(caplog):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if self.global_step == 5:
                raise RuntimeError("the user's own")
            return super().training_step(batch, batch_idx)

    diagnostics = Diagnostics(every_n_steps=100)
    with pytest.raises(RuntimeError, match="the user's own"), caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer(callbacks=[diagnostics], max_steps=8).fit(Fails())
    assert any(r.getMessage().startswith("Diagnostics: ") for r in caplog.records)
    assert recorded(diagnostics)[-2]["end"] == "RuntimeError"


def test_the_callback_by_itself():
    record = RunRecord(every_n_steps=4)
    trainer(callbacks=[record], max_steps=10).fit(Net())
    assert [step for step, r in record.records if "layers" in r] == [0, 1, 3, 7]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_checks_and_prints_json(tmp_path, capsys):
    import json

    for module, name in ((Net, "well"), (Gaps, "gaps")):
        logger = TensorBoardLogger(tmp_path, name=name, version="")
        trainer(callbacks=[Diagnostics(quiet=True)], logger=logger).fit(module())
    cli.main(["diagnostics", str(tmp_path / "well"), "--check"])
    assert "healthy" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        cli.main(["diagnostics", str(tmp_path), "--check", "--json"])
    assert exit_.value.code == 1
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["name"], run["optimizer"], run["verdict"]) for run in runs] == [
        ("gaps", "AdamW", "wasteful"),
        ("well", "AdamW", "healthy"),
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("spike_at", [13, 37, 61])
def test_light_sees_a_spike_of_the_loss_between_measured_steps(spike_at, accumulate):
    class Spiking(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"] + (300 if self.global_step == spike_at else 0)

    diagnostics = Diagnostics("light", every_n_steps=30, quiet=True)
    trainer(callbacks=[diagnostics], max_steps=70, max_epochs=-1, accumulate_grad_batches=accumulate).fit(Spiking())
    course = [list(zip(*record["course"])) for record in recorded(diagnostics) if "course" in record]
    rows = [row for part in course for row in part]
    assert [row[0] for row in rows] == list(range(70))
    losses = [row[1] for row in rows]
    assert losses.index(max(losses)) == spike_at
    assert diagnostics.run().scalars["update/rms"][0] == [0, 1, 29, 59]


def test_light_does_not_wait_for_the_device_between_measured_steps(monkeypatch):
    """Losses stay where they are, as on an accelerator: nothing is fetched but at measured steps and at the end."""
    fetched = []
    monkeypatch.setattr("lightning_optim.callbacks.run_record._is_on_host", lambda loss: False)
    fetch = RunRecord._fetch

    def counted(self):
        fetched.append([step for step, *_ in self._pending])
        fetch(self)

    monkeypatch.setattr(RunRecord, "_fetch", counted)
    diagnostics = Diagnostics("light", every_n_steps=30, first_n_steps=1, quiet=True)
    trainer(callbacks=[diagnostics], max_steps=64, max_epochs=-1).fit(Net())
    # Steps 1, 2, 4, 8, 16, 30 and 60 are measured.
    assert [part[-1] for part in fetched] == [0, 1, 3, 7, 15, 29, 59, 63]
    assert [step for part in fetched for step in part] == list(range(64))
