"""Hyperparameters given anew at resume: honoured when the user says so, reported when not."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import Grouping, build_optimizer
from lightning_optim.callbacks import Resume
from lightning_optim.cli import find_checkpoint, main

# The loader begins again, and its rows are all the same.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not continue exactly:UserWarning"),
    # Some of torch's schedules set one for all, which is what is resumed here.
    pytest.mark.filterwarnings("ignore:.*is one learning rate for all parameter groups:UserWarning"),
]

STOP, END = 4, 10


class Net(pl.LightningModule):
    """Built with a learning rate; which schedule, the test says."""

    def __init__(self, lr: float, schedule: Any = None, name: str = "NAMO", **args: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
        self.build = lambda: build_optimizer(
            self, {"name": name, "args": {"lr": lr} | args}, Grouping(lr_multipliers={"net.3.*": 0.5})
        )
        self.schedule = schedule
        self.seen: list[list[float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        loss = self.net(batch[0]).square().mean()
        # ReduceLROnPlateau reduces after the second to the fourth step. The checkpoint is written after the fourth,
        # before Lightning asks for that reduction.
        self.log("loss", 1.0 if self.global_step < STOP else -float(self.global_step))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.build()
        if self.schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step", "monitor": "loss"},
        }

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(END, 3)))


def fit(model: Net, folder: Path, *callbacks: pl.Callback, steps: int = END, resume: bool = False) -> pl.Trainer:
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=STOP, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[*callbacks, keep],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, ckpt_path=folder / f"step={STOP}.ckpt" if resume else None)
    return trainer


optim = torch.optim.lr_scheduler
SCHEDULES: dict[str, Any] = {
    "none": None,
    "lambda": lambda o: optim.LambdaLR(o, lambda t: 1 / (1 + t)),
    "cosine": lambda o: optim.CosineAnnealingLR(o, T_max=END),
    "step": lambda o: optim.StepLR(o, 2),
    "exponential": lambda o: optim.ExponentialLR(o, 0.9),
    "plateau": lambda o: optim.ReduceLROnPlateau(o, patience=0, factor=0.9),
    "one after the other": lambda o: optim.SequentialLR(
        o, [optim.LinearLR(o, 0.1, total_iters=3), optim.CosineAnnealingLR(o, T_max=8)], [3]
    ),
    "one cycle": lambda o: optim.OneCycleLR(o, max_lr=[30 * g["lr"] for g in o.param_groups], total_steps=END),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["NAMO", "AdamW"])
def test_the_schedule_goes_on_from_its_position_with_the_new_base(tmp_path: Path, schedule: str, name: str) -> None:
    """Learning rates after the resumption are those of a run that had the new ones from the start."""
    fallback = {"fallback_lr": 0.001} if name == "NAMO" else {}
    changed = {"fallback_lr": 0.004} if name == "NAMO" else {}
    fit(Net(0.01, SCHEDULES[schedule], name, **fallback), tmp_path, Resume(), steps=STOP)
    whole = Net(0.03, SCHEDULES[schedule], name, **changed)
    fit(whole, tmp_path / "whole")
    resumed = Net(0.03, SCHEDULES[schedule], name, **changed)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hyperparameters of its checkpoint")
        fit(resumed, tmp_path, Resume(["lr"]), resume=True)
    assert len(resumed.seen) == END - STOP
    # Products of a few factors, in another order.
    for found, expected in zip(resumed.seen, whole.seen[STOP:], strict=True):
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_it_the_checkpoint_holds_and_one_warning_says_so(tmp_path: Path, schedule: str) -> None:
    before = Net(0.01, SCHEDULES[schedule])
    fit(before, tmp_path, Resume())
    resumed = Net(0.03, SCHEDULES[schedule], weight_decay=0.25)
    with pytest.warns(UserWarning, match="hyperparameters of its checkpoint") as caught:
        fit(resumed, tmp_path, Resume(), resume=True)
    said = [str(w.message) for w in caught if "hyperparameters of its checkpoint" in str(w.message)]
    assert len(said) == 1
    if schedule != "one cycle":  # which replaces the optimizer's learning rates by its own
        assert "lr=0.03 now, 0.01 in the checkpoint (group 'matrix')" in said[0]
        assert "--resume.override '[lr,weight_decay]'" in said[0]
    assert "weight_decay=0.25 now, 0.1 in the checkpoint (group" in said[0]  # of both rules
    assert resumed.seen == before.seen[STOP:]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equal_settings_are_not_worth_a_word_and_change_nothing(tmp_path: Path, schedule: str) -> None:
    before = Net(0.01, SCHEDULES[schedule])
    trainer = fit(before, tmp_path, Resume())
    resumed = Net(0.01, SCHEDULES[schedule])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hyperparameters of its checkpoint")
        again = fit(resumed, tmp_path, Resume(["lr", "betas"]), resume=True)
    assert resumed.seen == before.seen[STOP:]
    for p, q in zip(before.parameters(), resumed.parameters()):
        assert torch.equal(p, q)
    for group, other in zip(trainer.optimizers[0].param_groups, again.optimizers[0].param_groups):
        assert {key: group[key] for key in group if key != "params"}.items() <= other.items()


def test_other_hyperparameters_are_taken_in_every_group_that_has_them(tmp_path: Path) -> None:
    fit(Net(0.01), tmp_path, steps=STOP)
    new = Net(0.02, betas=(0.8, 0.9), weight_decay=0.5, eps=1e-6, fallback_betas=(0.7, 0.9))
    with pytest.warns(UserWarning, match=r"lr=0\.02 now.*eps=1e-06 now"):
        trainer = fit(new, tmp_path, Resume(["betas", "weight_decay"]), resume=True, steps=STOP + 1)
    groups = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    assert groups["matrix"]["betas"] == (0.8, 0.9)
    assert groups["matrix"]["weight_decay"] == 0.5
    assert groups["fallback/net.3.*"]["betas"] == (0.7, 0.9)
    assert groups["matrix"]["lr"] == 0.01
    assert groups["matrix"]["eps"] == 1e-8


class Counting(torch.optim.SGD):
    """Counts in its groups, and has an argument that it hands to its base class."""

    def __init__(self, params: Any, lr: float = 0.1, warmup: int = 3, **others: Any) -> None:
        super().__init__(params, lr=lr, **others)
        counters = {"k": 0, "weight_sum": 0.0, "train_mode": False}
        self.defaults |= counters | {"warmup": warmup}
        for group in self.param_groups:
            group |= counters | {"warmup": warmup, "mine": 1.0 if lr == 0.1 else 2.0}

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group |= {"k": group["k"] + 1, "weight_sum": group["weight_sum"] + group["lr"], "train_mode": True}
        return super().step(closure)


@pytest.mark.parametrize(
    ("name", "before", "after", "reported"),
    [
        (f"{__name__}.Counting", {}, {}, []),
        (f"{__name__}.Counting", {}, {"warmup": 4}, ["warmup"]),
        (f"{__name__}.Counting", {}, {"momentum": 0.5}, ["momentum"]),
        (f"{__name__}.Counting", {}, {"lr": 0.2}, ["lr", "mine"]),
        ("schedulefree.AdamWScheduleFree", {}, {}, []),
        ("schedulefree.AdamWScheduleFree", {}, {"warmup_steps": 2, "betas": (0.8, 0.9)}, ["betas", "warmup_steps"]),
        ("schedulefree.SGDScheduleFree", {}, {"momentum": 0.8}, ["momentum"]),
    ],
    ids=["none", "own", "of the base class", "of a group", "AdamW", "AdamW's", "SGD"],
)
def test_what_optimizers_count_in_their_groups_is_no_hyperparameter(
    tmp_path: Path, name: str, before: dict[str, Any], after: dict[str, Any], reported: list[str]
) -> None:
    if name.startswith("schedulefree"):
        pytest.importorskip("schedulefree")
    fit(Net(**{"lr": 0.1, "name": name} | before), tmp_path, steps=STOP)
    resume = Resume()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Net(**{"lr": 0.1, "name": name} | after), tmp_path, resume, resume=True)
    assert sorted(resume.kept) == reported
    told = [str(w.message) for w in caught if "hyperparameters of its checkpoint" in str(w.message)]
    assert len(told) == bool(reported)
    with pytest.raises(MisconfigurationException, match=r"no parameter group has 'k'"):
        fit(Net(0.1, name=name), tmp_path, Resume(override="k"), resume=True)


def test_a_name_that_no_group_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"resume.override: no parameter group has 'beta', nor.*betas"):
        fit(Net(0.01), tmp_path, Resume(["beta"]))


ARGUMENTS: dict[str, tuple[Any, Any, list[str], str]] = {
    "cosine": (
        lambda o: optim.CosineAnnealingLR(o, T_max=END),
        lambda o: optim.CosineAnnealingLR(o, T_max=2 * END),
        ["T_max"],
        "T_max=20 now, 10 in the checkpoint (CosineAnnealingLR)",
    ),
    "step": (
        lambda o: optim.StepLR(o, 5),
        lambda o: optim.StepLR(o, 6, gamma=0.5),
        ["step_size", "gamma"],
        "step_size=6 now, 5 in the checkpoint (StepLR); gamma=0.5 now, 0.1 in the checkpoint (StepLR)",
    ),
    "milestones": (
        lambda o: optim.MultiStepLR(o, [6]),
        lambda o: optim.MultiStepLR(o, [7, 9]),
        ["milestones"],
        "milestones=[7, 9] now, [6] in the checkpoint (MultiStepLR)",
    ),
    "a part of another": (
        lambda o: optim.SequentialLR(o, [optim.ConstantLR(o, 1.0, 0), optim.StepLR(o, 2)], [3]),
        lambda o: optim.SequentialLR(o, [optim.ConstantLR(o, 1.0, 0), optim.StepLR(o, 3)], [3]),
        ["step_size"],
        "step_size=3 now, 2 in the checkpoint (StepLR)",
    ),
    "one cycle": (
        lambda o: optim.OneCycleLR(o, 0.3, END, pct_start=0.5),
        lambda o: optim.OneCycleLR(o, 0.3, END, pct_start=0.6),
        ["pct_start"],
        "pct_start=0.6 now, 0.5 in the checkpoint (OneCycleLR)",
    ),
    "a longer cycle": (
        lambda o: optim.OneCycleLR(o, 0.3, END),
        lambda o: optim.OneCycleLR(o, 0.3, 2 * END),
        ["total_steps"],
        "total_steps=20 now, 10 in the checkpoint (OneCycleLR)",
    ),
    "cyclic": (
        lambda o: optim.CyclicLR(o, 0.01, 0.1, step_size_up=5, cycle_momentum=False),
        lambda o: optim.CyclicLR(o, 0.01, 0.1, step_size_up=6, step_size_down=5, cycle_momentum=False),
        ["step_size_up"],
        "step_size_up=6 now, 5 in the checkpoint (CyclicLR)",
    ),
    "plateau": (
        lambda o: optim.ReduceLROnPlateau(o, patience=1),
        lambda o: optim.ReduceLROnPlateau(o, patience=3),
        ["patience"],
        "patience=3 now, 1 in the checkpoint (ReduceLROnPlateau)",
    ),
}


@pytest.mark.parametrize("which", ARGUMENTS)
def test_a_schedules_own_arguments(tmp_path: Path, which: str) -> None:
    """Those of the checkpoint hold, one warning says so, and the new ones are taken when asked for."""
    old, new, names, said = ARGUMENTS[which]
    before = Net(0.01, old)
    fit(before, tmp_path, Resume())
    resumed = Net(0.01, new)
    with pytest.warns(UserWarning, match="hyperparameters of its checkpoint") as caught:
        fit(resumed, tmp_path, Resume(), resume=True)
    [message] = [str(w.message) for w in caught if "hyperparameters of its checkpoint" in str(w.message)]
    assert said in message
    assert f"--resume.override '[{','.join(names)}]'" in message
    assert resumed.seen == before.seen[STOP:]
    taken = Net(0.01, new)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hyperparameters of its checkpoint")
        trainer = fit(taken, tmp_path, Resume(names), resume=True)
    whole = Net(0.01, new)
    other = fit(whole, tmp_path / "whole")
    if which in ("milestones", "one cycle", "a longer cycle", "cyclic"):  # Others go on from the old place.
        # That of the step after the resumption was computed before it, by the old ones.
        for a, b in zip(taken.seen[1:], whole.seen[STOP + 1 :], strict=True):
            assert a == pytest.approx(b, rel=1e-9)
    arguments = [vars(t.lr_scheduler_configs[0].scheduler) for t in (trainer, other)]
    for key in {*names, *(f"_{name}" for name in names), "_schedule_phases", "total_size"} & arguments[0].keys():
        assert arguments[0][key] == arguments[1][key]


def test_a_schedule_that_is_new_begins(tmp_path: Path) -> None:
    fit(Net(0.01), tmp_path, steps=STOP)
    resumed = Net(0.03, SCHEDULES["cosine"])
    fit(resumed, tmp_path, Resume("lr"), resume=True)
    assert resumed.seen[0][0] == 0.03


# --- the command line ---------------------------------------------------------------------------------------------

QUIET = [
    *("--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu", "--diagnostics.tier", "off"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--lr_scheduler", "null"),
]
TINY = [
    *("-c", "digits", "--model.backbone", "test_resnet", "--model.stem_stride", "2", "--model.backbone_args", "null"),
    *QUIET,
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two steps."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-optim"])
        main(["fit", *TINY, "--trainer.max_steps", "2", "--optimizer", "NAMO", "--optimizer.lr", "0.01"])
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That run, in the current folder."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-optim"])
    return Path("runs/digits/NAMO-lr0.01-s1")


def groups(folder: Path = Path("runs")) -> list[dict[str, Any]]:
    return torch.load(find_checkpoint("last", folder), weights_only=True)["optimizer_states"][0]["param_groups"]


def model_arguments() -> dict[str, Any]:
    return torch.load(find_checkpoint("last", Path("runs")), weights_only=True)["hyper_parameters"]


def test_from_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go_on = ["fit", "--ckpt_path", "last", "--optimizer.lr", "0.02", "--optimizer.fallback_lr", "0.005"]
    with pytest.warns(UserWarning, match=r"lr=0\.02 now, 0\.01 in the checkpoint.*--resume\.override '\[lr\]'"):
        main([*go_on, "--trainer.max_steps", "3"])
    recorded = [yaml.safe_load((run / name).read_text()) for name in ("config.yaml", "hparams.yaml")]
    assert recorded[0]["optimizer"]["init_args"]["lr"] == 0.01
    assert recorded[1]["optimizer/lr"] == 0.01
    assert [group["lr"] for group in groups()] == [0.01, *[0.001] * (len(groups()) - 1)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hyperparameters of its checkpoint")
        main([*go_on, "--trainer.max_steps", "4", "--resume.override", "lr"])
    assert [group["lr"] for group in groups()] == [0.02, *[0.005] * (len(groups()) - 1)]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["optimizer"]["init_args"]["lr"] == 0.02
    assert settings["resume"]["override"] is None, "it holds for one resumption"
    assert settings["ckpt_path"] is None, "a run with these settings begins anew"


def test_another_optimizer(run: Path) -> None:
    go_on = ["fit", "--ckpt_path", "last", "--optimizer", "AdamW", "--optimizer.lr", "0.002"]
    with pytest.raises(SystemExit):
        main([*go_on, "--trainer.max_steps", "3"])
    main([*go_on, "--trainer.max_steps", "3", "--resume.change_optimizer", "true"])
    assert {group["lr"] for group in groups()} == {0.002}
    assert not any("rule" in group for group in groups())
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["optimizer"]["class_path"].endswith("AdamW")
    assert settings["resume"]["change_optimizer"] is False, "it holds for one resumption"
    state = torch.load(find_checkpoint("last", Path("runs")), weights_only=True)["optimizer_states"][0]["state"]
    assert {int(x["step"]) for x in state.values()} == {1, 3}  # NAMO's matrices begin anew
    main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "4"])


def test_the_models_arguments_are_those_of_flags_then_of_the_checkpoint(run: Path) -> None:
    main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "3", "--model.label_smoothing", "0.25"])
    assert model_arguments()["label_smoothing"] == 0.25
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["label_smoothing"] == 0.25
    main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "4", "--model.init_args.label_smoothing=0.0"])
    assert model_arguments()["label_smoothing"] == 0.0, "also where it is the default"


@pytest.mark.skipif(RequirementCache("lightning<2.6"), reason="Lightning takes no arguments from checkpoints")
def test_a_checkpoint_without_its_folder_says_which_model(run: Path) -> None:
    before = model_arguments()
    shutil.copy(find_checkpoint("last", Path("runs")), "alone.ckpt")
    shutil.rmtree(run)
    main(["fit", *QUIET, "--ckpt_path", "alone.ckpt", "--optimizer", "NAMO", "--trainer.max_steps", "3"])
    assert model_arguments() == before


REFUSED = {
    "grouping": (["--grouping.lr_multipliers", '{"*.bias": 2.0}'], ["Grouped otherwise", "(group 'fallback"]),
    "another size": (
        ["--model.backbone", "resnet18"],
        ["another model", "backbone.conv1.weight", " more. Give --model"],
    ),
    "fallback": (["--optimizer.fallback", "LaProp"], ["Treated otherwise", "'LaProp' here"]),
    "no such hyperparameter": (["--resume.override", "[learning_rate]"], ["learning_rate", "lr"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_command_line_refuses(run: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, expected = REFUSED[what]
    before = {path: path.read_bytes() for pattern in ("*.ckpt", "*.yaml") for path in run.rglob(pattern)}
    assert len(before) >= 3
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "4", *args])
    assert stop.value.code == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("lightning-optim: error: ")
    for word in expected:
        assert word in shown
    assert len(shown) < 2000
    assert before == {path: path.read_bytes() for path in before}, "the run can go on as before"


@pytest.mark.skipif(RequirementCache("lightning<2.6"), reason="Lightning takes no arguments from checkpoints")
def test_a_checkpoint_of_another_task_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning would train the checkpoint's model on the data of the other task."""
    checkpoint = find_checkpoint("last", Path("runs"))
    with pytest.raises(SystemExit):
        main(["fit", "-c", "stdlib-text", "--ckpt_path", str(checkpoint), "--trainer.max_steps", "4"])
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert "another model: lightning_optim.models.VisionClassifier, not lightning_optim.models.LanguageModel" in shown


DAMAGED = {
    "another model": (lambda c: c["state_dict"].update(other=torch.zeros(3)), ["of another model", "other", "--model"]),
    "weights alone": (lambda c: c.pop("optimizer_states"), ["the model alone"]),
    "another optimizer": (
        lambda c: c["optimizer_states"][0]["param_groups"][0].update(rule="Muon"),
        ["Treated otherwise", "rule 'Muon' in the checkpoint, 'NAMO' here"],
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_checkpoints_that_the_command_line_refuses(run: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = DAMAGED[what]
    content = torch.load(find_checkpoint("last", Path("runs")), weights_only=True)
    change(content)
    torch.save(content, "changed.ckpt")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(run / "config.yaml"), "--ckpt_path", "changed.ckpt"])
    assert stop.value.code == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    for word in ["changed.ckpt", *expected]:
        assert word in shown
