"""The factory, in Lightning runs where Lightning matters."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import decimal
import enum
import functools
import io
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import timm.optim
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_optim.factory import (
    Grouping,
    OptimizerConfig,
    OptimizerMixin,
    SchedulerConfig,
    build_optimizer,
    configure_optimizers,
)
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.routing import route
from lightning_optim.schedules import WarmupConstant, WarmupCosine, WarmupLinear, WarmupStableDecay

BATCHES = 6
TORCH_OPTIMIZERS = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))


class Classifier(OptimizerMixin, pl.LightningModule):
    def __init__(self, optimizer: Any = "AdamW", lr_scheduler: Any = None, grouping: Grouping | None = None):
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.grouping = grouping
        self.net = make_net()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4 * BATCHES, 8, generator=generator)
        return DataLoader(TensorDataset(x, x.argmax(1) % 3), batch_size=4)


class LearningRates(pl.Callback):
    """The learning rates of the first group, at each batch."""

    def __init__(self) -> None:
        self.used: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.used.append(trainer.optimizers[0].param_groups[0]["lr"])


def make_trainer(**arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    files = {"enable_checkpointing": False}
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 2, **quiet, **files, **arguments})


def fit(module: pl.LightningModule, **arguments: Any) -> pl.Trainer:
    trainer = make_trainer(**arguments)
    trainer.fit(module)
    return trainer


def rates(lr_scheduler: Any, **arguments: Any) -> list[float]:
    recorder = LearningRates()
    module = Classifier({"name": "SGD", "args": {"lr": 1.0}}, lr_scheduler)
    fit(module, callbacks=[recorder], **arguments)
    return recorder.used


def by_parameter(optimizer: torch.optim.Optimizer, key: str) -> dict[str, Any]:
    return {name: group[key] for group in optimizer.param_groups for name in group["param_names"]}


# --- what is built ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_registered_optimizer_trains_in_lightning(name):
    pl.seed_everything(0, verbose=False)  # With some data, ELRA ends where it began: its last step is taken back.
    module = Classifier(name)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer = fit(module, gradient_clip_val=1.0)
    assert type(trainer.optimizers[0]) is OPTIMIZERS[name].cls
    assert all(not torch.equal(p, before[n]) for n, p in module.named_parameters())


class Blockwise(torch.optim.SGD):
    """Refuses to be without a large parameter."""

    def __init__(self, params, lr=0.1, weight_decay=0.02):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        if all(p.numel() < 50 for group in self.param_groups for p in group["params"]):
            raise ValueError("no parameter has 50 elements")


class Passing(torch.optim.AdamW):
    """Names no hyperparameter itself."""

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)


class Hooked(torch.optim.Adam):
    """Adds a hook to each of its parameters, as optimizers that step within the backward pass do."""

    def __init__(self, params, *, weight_decay=0.02, **kwargs):
        super().__init__(params, weight_decay=weight_decay, **kwargs)
        self.calls = []
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(self.calls.append)


class Counting(torch.optim.RMSprop):
    """Wants all parameters at once."""

    def __init__(self, params, weight_decay=0.02):
        super().__init__(params, lr=0.1, weight_decay=weight_decay)
        assert sum(len(group["params"]) for group in self.param_groups) > 3


@pytest.mark.parametrize("cls", [Blockwise, Passing, Hooked, Counting])
@pytest.mark.parametrize("grouping", [{}, {"lr_multipliers": {"*.bias": 0.5}}, {"no_decay": []}])
def test_an_optimizer_of_ones_own_is_built_once_from_all_parameters(cls, grouping, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_optimizers_of_a_project", sys.modules[__name__])
    net, built = make_net(), []
    original = torch.optim.Optimizer.__init__

    @functools.wraps(original)
    def counted(self, *args, **kwargs):
        built.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", counted)
    optimizer = build_optimizer(net, f"own_optimizers_of_a_project.{cls.__name__}", grouping)
    assert built == [optimizer]
    decay = 0.01 if cls is Passing else 0.02
    for group in optimizer.param_groups:
        exempt = "no_decay" in group["name"]
        assert group["weight_decay"] == (0.0 if exempt else decay)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert len(rates) == (2 if "lr_multipliers" in grouping else 1)
    assert any("no_decay" in group["name"] for group in optimizer.param_groups) is ("no_decay" not in grouping)


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_torchs_own_are_fused(name):
    optimizer = build_optimizer(make_net(), name)
    assert type(optimizer) is TORCH_OPTIMIZERS[name]
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("args", [{"fused": False}, {"foreach": True}, {"foreach": False}, {"differentiable": True}])
def test_the_users_kernel_choice_stays(args):
    group = build_optimizer(make_net(), {"name": "AdamW", "args": args}).param_groups[0]
    assert not group["fused"]
    assert {key: group[key] for key in args} == args


def test_empty_settings_are_none():
    schedule = {"name": "WarmupConstant", "args": None, "interval": None}
    configured = configure_optimizers(make_net(), {"class_path": "NAMO", "init_args": None}, schedule)
    assert type(configured["optimizer"]) is OPTIMIZERS["NAMO"].cls
    assert configured["lr_scheduler"]["interval"] == "step"
    with pytest.raises(ValueError, match="names no class"):
        build_optimizer(make_net(), {"name": None})


def test_undecided_arguments_of_a_command_line_are_no_choice():
    args = {"fused": None, "foreach": None, "capturable": False, "differentiable": False}
    optimizer = build_optimizer(make_net(), {"class_path": "torch.optim.AdamW", "init_args": args})
    assert optimizer.param_groups[0]["fused"]


def test_no_fused_kernel_for_parameters_it_cannot_take():
    group = build_optimizer(make_net().to("meta"), "AdamW").param_groups[0]
    assert group["fused"] is None
    assert group["foreach"] is None  # torch's choice


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize(
    ("memory", "fused"),
    [
        (lambda: torch.randn(6, 10)[:, ::2], None),
        (lambda: torch.randn(6, 7)[:, :5], None),
        (lambda: torch.randn(6, 10)[::2].t(), None),
        (lambda: torch.randn(5, 6).t(), True),
        (lambda: torch.randn(40)[4:34].view(6, 5), True),
        (lambda: torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last), True),
    ],
    ids=["every other column", "part of the columns", "every other row", "transposed", "part of a buffer", "channels"],
)
def test_no_fused_kernel_for_parameters_with_gaps_in_memory(name, memory, fused):
    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(memory())

    module, other = Weight(), Weight()
    optimizer = build_optimizer(module, name, lr=0.1)
    assert optimizer.param_groups[0]["fused"] is fused
    settings = {"lr": 0.1, "fused": False, "weight_decay": optimizer.param_groups[0]["weight_decay"]}
    settings |= {"momentum": optimizer.param_groups[0]["momentum"]} if name == "SGD" else {}
    expected = getattr(torch.optim, name)([other.weight], **settings)
    for step in range(3):
        for model, trained in ((module, optimizer), (other, expected)):
            model.zero_grad()
            torch.manual_seed(step)
            (model.weight * torch.randn(model.weight.shape)).sum().backward()
            trained.step()
    # The fused kernels round in another order.
    torch.testing.assert_close(module.weight, other.weight, rtol=1e-5, atol=1e-6)


def test_no_fused_kernel_under_a_loss_scaler_so_that_gradients_can_be_clipped():
    scaler = torch.amp.GradScaler("cpu")
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = fit(Classifier("AdamW"), plugins=[plugin], gradient_clip_val=1.0, max_steps=2)
    assert trainer.optimizers[0].param_groups[0]["fused"] is None


def test_no_fused_kernel_at_mixed_precision_so_that_gradients_can_be_clipped():
    trainer = fit(Classifier("AdamW"), precision="bf16-mixed", gradient_clip_val=1.0, max_steps=2)
    assert trainer.optimizers[0].param_groups[0]["fused"] is None


class ClipsItself(Classifier):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.5)


class StepsItself(Classifier):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5)
        optimizer.step()
        return loss


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize(
    ("cls", "clip", "fused"),
    [(Classifier, None, True), (Classifier, 0.5, None), (ClipsItself, None, None), (StepsItself, None, None)],
)
def test_fused_at_bf16_mixed_where_nothing_clips(cls, clip, fused, name):
    trainer = fit(cls(name), precision="bf16-mixed", gradient_clip_val=clip, max_steps=2)
    assert trainer.optimizers[0].param_groups[0]["fused"] is fused


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig("NAMO", {"lr": 0.02}),
        {"name": "NAMO", "args": {"lr": 0.02}},
        {"class_path": "NAMO", "init_args": {"lr": 0.02}},
        {"class_path": "lightning_optim.NAMO", "init_args": {"lr": 0.02}},
        {"class_path": "lightning_optim.optimizers.namo.NAMO", "init_args": {"lr": 0.02}},
    ],
)
def test_forms_of_the_configuration_are_equal(optimizer):
    built = build_optimizer(make_net(), optimizer)
    assert type(built) is OPTIMIZERS["NAMO"].cls
    assert {group["name"]: group["lr"] for group in built.param_groups} == {
        "matrix": 0.02,
        "fallback": 1e-3,
        "fallback/no_decay": 1e-3,
    }


def test_bare_names_are_ours_and_dotted_ones_anybodys():
    assert type(build_optimizer(make_net(), "Muon")) is OPTIMIZERS["Muon"].cls
    for path in ("torch.optim.NAdam", "timm.optim.Lion", "torch.optim.LBFGS"):
        optimizer = build_optimizer(make_net(), path)
        assert f"{type(optimizer).__module__}.{type(optimizer).__name__}".endswith(path.rpartition(".")[2])
        for group in optimizer.param_groups:
            assert group["name"]
            assert not group.keys() & {"role", "blocks", "transposed"}
    square = nn.Linear(4, 4, bias=False)
    assert type(build_optimizer(square, "torch.optim.Muon")) is torch.optim.Muon


def test_arguments_reach_both_rules():
    args = {"lr": 0.03, "fallback": "MVNGrad", "fallback_lr": 2e-3, "fallback_weight_decay": 0.3}
    optimizer = build_optimizer(make_net(), {"name": "NAMO", "args": args})
    rules = {group["name"]: (group["rule"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rules == {
        "matrix": ("NAMO", 0.03, 0.1),
        "fallback": ("MVNGrad", 2e-3, 0.3),
        "fallback/no_decay": ("MVNGrad", 2e-3, 0.0),
    }


def test_arguments_by_keyword():
    built = build_optimizer(make_net(), "NAMO", lr=0.02, fallback_lr=1e-4)
    also = configure_optimizers(make_net(), {"name": "NAMO", "args": {"fallback_lr": 1e-4}}, lr=0.02)["optimizer"]
    expected = build_optimizer(make_net(), {"name": "NAMO", "args": {"lr": 0.02, "fallback_lr": 1e-4}})
    for optimizer in (built, also):
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in expected.param_groups]
    with pytest.raises(ValueError, match=r"optimizer NAMO: lr is given twice, as 0\.1 and 0\.2"):
        build_optimizer(make_net(), {"name": "NAMO", "args": {"lr": 0.1}}, lr=0.2)
    with pytest.raises(ValueError, match=r"optimizer must be a name such as 'NAMO', .* got <class"):
        build_optimizer(make_net(), OPTIMIZERS["NAMO"].cls)


@pytest.mark.parametrize(
    "settings_",
    [
        {"lr": "2e-3", "betas": np.array([0.5, 0.75])},
        {"lr": np.float32(2e-3), "betas": [np.float64(0.5), "0.75"]},
        types.MappingProxyType({"lr": "0.002", "betas": (0.5, "75e-2")}),
    ],
)
@pytest.mark.parametrize("name", ["NAMO", "MVNGrad", "torch.optim.NAdam"])
def test_values_of_configuration_libraries_become_plain(name, settings_):
    grouping = types.MappingProxyType({"overrides": {"4.bias": {"betas": np.array([0.25, 0.5]), "lr": "1e-1"}}})
    optimizer = build_optimizer(make_net(), types.MappingProxyType({"name": name, "args": settings_}), grouping)
    group, special = optimizer.param_groups[0], optimizer.param_groups[-1]
    assert (type(group["lr"]), group["lr"]) == (float, pytest.approx(2e-3))
    assert [(type(beta), beta) for beta in group["betas"]] == [(float, 0.5), (float, 0.75)]
    assert (special["lr"], tuple(special["betas"])) == (0.1, (0.25, 0.5))


@dataclasses.dataclass
class Settings:
    lr: Any = 2e-3
    betas: Any = (0.5, 0.75)


@dataclasses.dataclass(slots=True)
class Choice:
    name: str = "NAMO"
    args: Settings = dataclasses.field(default_factory=Settings)


class Names(enum.Enum):
    NAMO = "NAMO"


def of_attrs():
    attrs = pytest.importorskip("attrs")
    return attrs.make_class("Choice", {"name": attrs.field(default="NAMO"), "args": attrs.field(factory=Settings)})()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Choice(),
        lambda: {"name": "NAMO", "args": Settings(betas=collections.UserList([0.5, 0.75]))},
        lambda: argparse.Namespace(name="NAMO", args=argparse.Namespace(lr="2e-3", betas=[0.5, 0.75])),
        lambda: vars(argparse.Namespace(name="NAMO", args=types.SimpleNamespace(lr=2e-3, betas=[0.5, 0.75]))),
        lambda: jsonargparse.Namespace(
            class_path="lightning_optim.NAMO", init_args=jsonargparse.Namespace(lr=2e-3, betas=[0.5, 0.75])
        ),
        lambda: collections.ChainMap(
            {"args": {"lr": decimal.Decimal("0.002"), "betas": (0.5, 0.75)}}, {"name": "NAMO"}
        ),
        lambda: OptimizerConfig("NAMO", collections.UserDict(lr=np.float64(2e-3), betas=np.array([0.5, 0.75]))),
        lambda: {"name": Names.NAMO, "args": {"lr": 2e-3, "betas": [0.5, 0.75]}},
        of_attrs,
    ],
)
def test_objects_that_hold_settings(make):
    group = build_optimizer(make_net(), make()).param_groups[0]
    assert (type(group["lr"]), group["lr"], group["betas"]) == (float, 2e-3, (0.5, 0.75))


def test_a_name_of_an_enumeration():
    assert build_optimizer(make_net(), Names.NAMO, lr=2e-3).param_groups[0]["lr"] == 2e-3


@pytest.mark.parametrize("name", ["NAMO", "MVNGrad"])
def test_values_that_are_written_into_groups_become_plain(name):
    module = make_net()
    optimizer = build_optimizer(module, name)
    for i, group in enumerate(optimizer.param_groups):
        group["lr"], group["weight_decay"] = np.float32(2.0**-i), np.float64(2.0 ** -(1 + i))
        group["betas"] = collections.UserList([np.float64(0.5), 0.75])
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for i, group in enumerate(optimizer.param_groups):
        assert [type(group[key]) for key in ("lr", "weight_decay", "betas")] == [float, float, tuple]
        assert (group["lr"], group["weight_decay"], group["betas"]) == (2.0**-i, 2.0 ** -(1 + i), (0.5, 0.75))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


def test_configurations_hold_plain_values_and_so_do_checkpoints():
    values = [
        OptimizerConfig("NAMO", collections.UserDict(betas=collections.UserList([0.5, 0.75]))),
        SchedulerConfig("MultiStepLR", {"milestones": collections.UserList([np.int64(3), 5])}, frequency=np.int64(2)),
        Grouping(no_decay=collections.UserList(["bias"]), split={"*.qkv": collections.UserList([np.int64(8)] * 3)}),
    ]
    file = io.BytesIO()
    torch.save(values, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == values
    assert values[2].split == {"*.qkv": [8, 8, 8]}


def test_parameters_whose_names_are_numbers_can_be_named():
    module = nn.ParameterList([nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))])
    optimizer = build_optimizer(module, "NAMO", Grouping(matrix=["0"], fallback=["1"], lr_multipliers={"1": 0.5}))
    assert {group["role"]: group["param_names"] for group in optimizer.param_groups} == {
        "matrix": ["0"],
        "fallback": ["1"],
    }


@pytest.mark.parametrize("schedule", ["WarmupCosine", "WarmupLinear", "WarmupStableDecay", "OneCycleLR"])
def test_lengths_may_be_numpys(schedule):
    args = {"max_lr": 0.1} if schedule == "OneCycleLR" else {"warmup": np.int64(3)}
    made = configure_optimizers(make_net(), "SGD", {"name": schedule, "args": args}, total_steps=np.int64(10), lr=0.1)
    scheduler = made["lr_scheduler"]["scheduler"]
    assert type(scheduler.total_steps) is int
    if schedule != "OneCycleLR":
        by_hand = type(scheduler)(made["optimizer"], total_steps=np.int64(10), warmup=np.int32(3))
        assert (by_hand.warmup, type(by_hand.warmup), type(by_hand.total_steps)) == (3, int, int)


# --- groups -----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


def make_layer(kind: str) -> nn.Module:
    return {
        "linear": lambda: nn.Linear(8, 8),
        "attention": lambda: Attention(8),
        "norm": lambda: nn.LayerNorm(8),
        "convolution": lambda: nn.Conv2d(4, 8, 3),
        "transposed": lambda: nn.ConvTranspose2d(4, 8, 3),
        "embedding": lambda: nn.Embedding(10, 8),
        "frozen": lambda: nn.Linear(8, 8).requires_grad_(False),
    }[kind]()


@settings(deadline=None, max_examples=40)
@given(
    layers=st.lists(
        st.sampled_from(["linear", "attention", "norm", "convolution", "transposed", "embedding", "frozen"]),
        min_size=1,
        max_size=6,
    ),
    name=st.sampled_from(["MVNGrad", "AdamW", "Muon", "NAMO", "SOAP", "torch.optim.NAdam"]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    multiplied=st.booleans(),
)
def test_groups_partition_the_trainable_parameters(layers, name, weight_decay, multiplied):
    net = nn.ModuleList([make_layer("linear"), *map(make_layer, layers)])
    if "linear" in layers:
        net[-1] = net[1]  # shared modules
    grouping = Grouping(lr_multipliers={"0.*": 0.5} if multiplied else {})
    config = OptimizerConfig(name, {"weight_decay": weight_decay})
    groups = build_optimizer(net, config, grouping).param_groups

    owned = [p for group in groups for p in group["params"]]
    trainable = [p for p in net.parameters() if p.requires_grad]
    assert len(owned) == len(trainable)
    assert set(owned) == set(trainable)
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    again = build_optimizer(net, config, grouping).param_groups
    assert [(g["name"], g["param_names"]) for g in again] == [(g["name"], g["param_names"]) for g in groups]
    routes = route(net)
    for group in groups:
        for parameter, p in zip(group["param_names"], group["params"]):
            assert dict(net.named_parameters())[parameter] is p
            if "role" in group:
                r = routes[parameter]
                assert (group["role"], group["blocks"], group["transposed"]) == (
                    r.role,
                    r.blocks,
                    r.transposed,
                )


def test_default_exclusions_from_weight_decay():
    vit = timm.create_model("test_vit", num_classes=3, init_values=1e-3)
    net = nn.ModuleDict({"vit": vit, "words": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    decays = by_parameter(build_optimizer(net, {"name": "MVNGrad", "args": {"weight_decay": 0.2}}), "weight_decay")
    decayed = {name for name, decay in decays.items() if decay == 0.2}
    assert decayed == {n for n, p in net.named_parameters() if p.ndim >= 2} - {
        "vit.pos_embed",
        "vit.cls_token",
        "vit.reg_token",
        "words.weight",
    }
    net["out"].weight = net["words"].weight
    tied = by_parameter(build_optimizer(net, {"name": "MVNGrad", "args": {"weight_decay": 0.2}}), "weight_decay")
    assert tied["words.weight"] == 0.0
    everything = build_optimizer(net, "AdamW", Grouping(no_decay=[]))
    assert {group["weight_decay"] for group in everything.param_groups} == {0.01}


@pytest.mark.filterwarnings("ignore:NAMO leaves .* to its fallback rule:UserWarning")
@pytest.mark.parametrize("name", ["MVNGrad", "NAMO", "AdamW"])
def test_parameters_and_models_that_declare_no_weight_decay(name):
    class Declaring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.ParameterDict({"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)})
            self.inner = nn.Linear(4, 4)
            self.state = nn.Parameter(torch.zeros(4, 4))

        def no_weight_decay(self) -> set[str]:
            return {"table.*", "missing"}

    net = nn.ModuleDict({"model": Declaring(), "out": nn.Linear(4, 4)})
    net["model"].state._no_weight_decay = True  # as S4 and Mamba mark theirs
    decays = by_parameter(build_optimizer(net, name, weight_decay=0.2), "weight_decay")
    declared = {"model.table.a", "model.table.b", "model.state"}
    assert {n for n, decay in decays.items() if decay == 0.0 and not n.endswith("bias")} == declared
    kept = by_parameter(build_optimizer(net, name, Grouping(no_decay=["bias"]), weight_decay=0.2), "weight_decay")
    assert {kept[n] for n in declared} == {0.2}


def test_matrices_that_modules_do_not_tell_are_named():
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_q = nn.Parameter(torch.zeros(4, 16, 16))
            self.out = nn.Linear(16, 16)

    net = nn.Sequential(Einsum(), nn.Linear(16, 2))
    with pytest.warns(UserWarning, match=r"NAMO leaves 77% .* rule, AdamW.* 1 tensors of kind 'other' \(0\.w_q"):
        build_optimizer(net, "NAMO")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_optimizer(net, "NAMO", Grouping(matrix=["*.w_q"]))
        build_optimizer(net, "NAMO", Grouping(fallback=["*.w_q"]))
        build_optimizer(net, "AdamW")


def test_one_group_when_nothing_differs():
    assert len(build_optimizer(make_net(), "MVNGrad").param_groups) == 1
    assert len(build_optimizer(make_net(), {"name": "AdamW", "args": {"weight_decay": 0}}).param_groups) == 1


def test_multipliers_multiply_the_learning_rate_of_the_rule():
    grouping = Grouping(lr_multipliers={"0.*": 0.5, "*.bias": 3.0})
    optimizer = build_optimizer(make_net(), {"name": "Muon", "args": {"lr": 0.2, "fallback_lr": 1e-2}}, grouping)
    assert by_parameter(optimizer, "lr") == pytest.approx(
        {
            "0.weight": 0.1,
            "0.bias": 5e-3,  # the first pattern wins
            "1.weight": 1e-2,
            "1.bias": 3e-2,
            "3.weight": 0.2,
            "3.bias": 3e-2,
            "4.weight": 1e-2,
            "4.bias": 3e-2,
        }
    )


def test_overrides_replace_hyperparameters_and_multipliers_apply_to_them():
    grouping = Grouping(
        overrides={
            "3.weight": {"lr": 0.5, "momentum": 0.5},
            "4.*": {"weight_decay": 0.7, "betas": (0.5, 0.6)},
        },
        lr_multipliers={"3.*": 0.1},
    )
    optimizer = build_optimizer(make_net(), "Muon", grouping)
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert groups["3.weight"]["lr"] == pytest.approx(0.05)
    assert groups["3.weight"]["momentum"] == 0.5
    assert groups["0.weight"]["momentum"] == 0.95
    for name in ("4.weight", "4.bias"):  # also where decay would have been off
        assert groups[name]["weight_decay"] == 0.7
        assert groups[name]["betas"] == (0.5, 0.6)


def test_routing_patterns_reach_the_routes():
    optimizer = build_optimizer(make_net(), "Muon", Grouping(matrix=["4.weight"], fallback=["0.*"]))
    roles = by_parameter(optimizer, "role")
    assert roles["4.weight"] == "matrix"
    assert roles["0.weight"] == "fallback"


def test_an_optimizer_for_matrices_says_when_it_gets_none():
    head = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    with pytest.warns(
        UserWarning, match=r"NAMO gets no matrix of Sequential.*fallback rule, LaProp, .*grouping\.matrix"
    ):
        build_optimizer(head, OptimizerConfig("NAMO", {"fallback": "LaProp"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_optimizer(make_net(), "NAMO")
        build_optimizer(head, "NAMO", Grouping(matrix=["0.weight"]))
        build_optimizer(head, "LaProp")


def test_compiled_modules_have_clean_names():
    plain = build_optimizer(make_net(), "Muon", Grouping(lr_multipliers={"4.*": 0.5}))
    compiled = build_optimizer(torch.compile(make_net()), "Muon", Grouping(lr_multipliers={"4.*": 0.5}))
    assert by_parameter(compiled, "lr") == by_parameter(plain, "lr")


@pytest.mark.parametrize("model", ["test_vit", "test_resnet", "test_convnext"])
@pytest.mark.parametrize("compiled", [False, True])
def test_layer_decay_equals_timms(model, compiled):
    net = timm.create_model(model, num_classes=3)
    expected = {}
    excluded = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
    for group in timm.optim.param_groups_layer_decay(
        net, weight_decay=0.3, no_weight_decay_list=excluded, layer_decay=0.6
    ):
        expected |= dict.fromkeys(group["params"], (group["lr_scale"], group["weight_decay"]))
    module = nn.ModuleDict({"backbone": torch.compile(net) if compiled else net, "extra": nn.Linear(3, 3)})
    config = {"name": "AdamW", "args": {"lr": 0.1, "weight_decay": 0.3}}
    optimizer = build_optimizer(module, config, Grouping(layer_decay=0.6))
    found = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == set(module.parameters())
    for p, (scale, weight_decay) in expected.items():
        assert found[p] == pytest.approx((0.1 * scale, weight_decay))
    assert found[module["extra"].weight] == (0.1, 0.3)


# --- inside Lightning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [WarmupConstant, WarmupCosine, WarmupLinear, WarmupStableDecay])
def test_schedules_follow_the_trainers_estimate(schedule):
    optimizer = torch.optim.SGD(make_net().parameters(), lr=1.0)
    expected = schedule(optimizer, total_steps=2 * BATCHES, warmup=0.25)
    assert rates(SchedulerConfig(schedule.__name__, {"warmup": 0.25})) == [
        expected.factor(step) for step in range(2 * BATCHES)
    ]


def test_the_estimate_counts_optimizer_steps():
    used = rates({"name": "WarmupLinear"}, accumulate_grad_batches=2)
    assert used == pytest.approx([1 - step // 2 / BATCHES for step in range(2 * BATCHES)])
    assert rates("WarmupLinear", max_steps=4, max_epochs=-1) == [1.0, 0.75, 0.5, 0.25]


def test_schedules_can_advance_every_epoch():
    used = rates({"name": "WarmupLinear", "interval": "epoch"}, max_epochs=4)
    assert used == pytest.approx([1 - step // BATCHES / 4 for step in range(4 * BATCHES)])


def test_any_torch_scheduler_by_class_path():
    by_step = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3, "gamma": 0.5}}
    assert rates(by_step) == [0.5 ** (step // 3) for step in range(2 * BATCHES)]
    by_epoch = {"name": "StepLR", "args": {"step_size": 1, "gamma": 0.5}, "interval": "epoch"}
    assert rates(by_epoch) == [1.0] * BATCHES + [0.5] * BATCHES


@pytest.mark.parametrize(
    ("args", "length"),
    [
        ({}, 2 * BATCHES),
        ({"total_steps": None, "epochs": None, "steps_per_epoch": None}, 2 * BATCHES),  # as from a command line
        ({"epochs": 3, "steps_per_epoch": BATCHES}, 3 * BATCHES),
        ({"total_steps": 50}, 50),
    ],
)
@pytest.mark.parametrize("optimizer", ["SGD", "Muon"])
def test_one_cycle_knows_the_length(optimizer, args, length):
    trainer = fit(Classifier(optimizer, {"name": "OneCycleLR", "args": {"max_lr": 2.0, **args}}))
    (config,) = trainer.lr_scheduler_configs
    assert (config.interval, config.scheduler.total_steps) == ("step", length)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"name": "ReduceLROnPlateau", "args": {"patience": 0, "threshold": 10.0}, "monitor": "loss"},
        {
            "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
            "init_args": {"monitor": "loss", "patience": 0, "threshold": 10.0},
        },
    ],
)
def test_reduce_on_plateau_watches_a_metric_every_epoch(scheduler):
    used = rates(scheduler, max_epochs=3)
    assert used == pytest.approx([1.0] * BATCHES + [0.1] * BATCHES + [0.01] * BATCHES)


def test_configure_model_and_resume(tmp_path):
    """Parameters created by configure_model train, and a resumed run ends where an uninterrupted one does."""

    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__({"name": "NAMO", "args": {"lr": 0.01}}, {"name": "WarmupCosine", "args": {"warmup": 0.3}})
            del self.net
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:
                pl.seed_everything(1, verbose=False)
                self.net = make_net()

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole = Late()
    fit(whole, callbacks=[Save()])
    resumed = Late()
    make_trainer().fit(resumed, ckpt_path=tmp_path / "0.ckpt")
    initial = Late()
    initial.configure_model()
    for name, p in resumed.named_parameters():
        assert torch.equal(p, dict(whole.named_parameters())[name])
        assert not torch.equal(p, dict(initial.named_parameters())[name])


class Replaced(nn.Linear):
    """What a precision plugin puts in place of a Linear."""


class ReplacingPrecision(Precision):
    def convert_module(self, module: nn.Module) -> nn.Module:
        for parent in list(module.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    replacement = Replaced(child.in_features, child.out_features)
                    replacement.load_state_dict(child.state_dict())
                    setattr(parent, name, replacement)
        return module


@pytest.mark.parametrize("name", ["MVNGrad", "Muon", "AdamW"])
def test_modules_replaced_by_the_precision_plugin_train(name):
    module = Classifier(name)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer = fit(module, plugins=[ReplacingPrecision()])
    assert isinstance(module.net[0], Replaced)
    owned = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert set(owned) == set(module.parameters())
    assert all(not torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_fast_dev_run_takes_the_first_step_of_a_long_warmup():
    trainer = fit(Classifier("MVNGrad", {"name": "WarmupCosine", "args": {"warmup": 1000}}), fast_dev_run=True)
    assert trainer.lr_scheduler_configs[0].scheduler.factor(0) == 1e-3


def test_routing_table_and_group_names_are_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    muon = {"name": "Muon", "args": {"weight_decay": 0.01}}
    fit(Classifier(muon), logger=logger, callbacks=[LearningRateMonitor()], log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    assert {"lr-Muon/matrix", "lr-Muon/fallback", "lr-Muon/fallback/no_decay"} <= set(events.Tags()["scalars"])
    text = events.Tensors("optimizer/routing/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "net.3.weight" in text
    assert "matrix" in text


def test_attributes_of_the_mixin_can_be_set_until_training_starts():
    module = Classifier("SGD")
    module.optimizer = {"name": "NAMO", "args": {"lr": 0.5}}
    module.lr_scheduler = "WarmupConstant"
    module.grouping = Grouping(lr_multipliers={"net.3.*": 0.5})
    trainer = fit(module, max_steps=1)
    assert by_parameter(trainer.optimizers[0], "lr")["net.3.weight"] == 0.25
    assert isinstance(trainer.lr_scheduler_configs[0].scheduler, WarmupConstant)


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("Namo", "Namo.*NAMO"),
        ("torch.optim.AdamWW", r"torch.optim has no AdamWW\. Did you mean AdamW"),
        ("torch.optimm.AdamW", "cannot import torch.optimm"),
        ("lightning_optim.SGD", r"lightning_optim has no SGD\. Known: AdaBelief, (\w+, )*\w+ and \d+ more\.$"),
        ("math.SGD", r"math has no SGD\.$"),
        ("torch.nn.Linear", "torch.nn.Linear is not a torch.optim.*Optimizer"),
        ({"name": "NAMO", "args": {"lrr": 1}}, r"NAMO has no argument 'lrr'\. Did you mean lr\?"),
        (
            {"name": "AdamW", "args": {"weight_deacy": 1}},
            "AdamW has no argument 'weight_deacy'.*weight_decay",
        ),
        ({"name": "AdamW", "args": {"lr": "fast"}}, "optimizer AdamW: .*str"),
        ({"name": "AdamW", "arg": {}}, "optimizer has no setting 'arg'.*args"),
        ({"args": {"lr": 1.0}}, "names no class"),
        ({"name": "NAMO", "args": {"fallback": "AdamWW"}}, "AdamWW.*AdamW"),
        ({"name": "NAMO", "args": {"lr": -1.0}}, "lr.*-1.0"),
    ],
)
def test_wrong_optimizer(optimizer, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(make_net(), optimizer)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (
            {"lr_multipliers": {"4.weigth": 0.1}},
            r"lr_multipliers: the pattern '4.weigth'.*Did you mean 4.weight",
        ),
        (
            {"lr_multipliers": {"*": 0.1, "4.*": 1}},
            r"'4.\*' gets no trainable parameter \(first match wins\)",
        ),
        ({"lr_multipliers": {"4.*": -0.1}}, r"lr_multipliers\['4.\*'\] must be a number >= 0, got -0.1"),
        ({"overrides": {"5.*": {"lr": 1.0}}}, r"overrides: the pattern '5.\*'"),
        (
            {"overrides": {"3.weight": {"betas2": 0.9}}},
            "'3.weight' has no hyperparameter 'betas2'. Known: lr",
        ),
        ({"overrides": {"3.*": {"momentum": 0.9}}}, "'3.bias' has no hyperparameter 'momentum'"),
        ({"overrides": {"3.*": {"role": "matrix"}}}, "no hyperparameter 'role'"),
        ({"matrix": ["9.*"]}, "9"),
        ({"layer_decay": 1.5}, r"layer_decay must be in \(0, 1\], got 1.5"),
        ({"layer_decay": 0.5}, "layer_decay needs a timm model, and Sequential has none.*lr_multipliers"),
        ({"no_decay": ["norms"]}, "no_decay: 'norms' is not one of norm"),
        ({"no_decya": []}, "grouping has no setting 'no_decya'.*no_decay"),
    ],
)
def test_wrong_grouping(settings_, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(make_net(), "Muon", settings_)


def test_a_grouping_can_be_a_mapping():
    settings_ = {"no_decay": ["bias"], "lr_multipliers": {"0.*": 0.5}, "layer_decay": None}
    made = [build_optimizer(make_net(), "Muon", grouping) for grouping in (settings_, Grouping(["bias"], {"0.*": 0.5}))]
    a, b = ([{k: v for k, v in group.items() if k != "params"} for group in built.param_groups] for built in made)
    assert a == b


@pytest.mark.parametrize("optimizer", ["MVNGrad", "HVAdam", "NAMO", "SOAP", "AdamW"])
def test_a_backbone_is_unfrozen_by_lightnings_callback(optimizer):
    class Transfer(Classifier):
        @property
        def backbone(self) -> nn.Module:
            return self.net[0]

    module = Transfer(optimizer)
    frozen = [p.clone() for p in module.backbone.parameters()]
    unfreeze = pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)
    fit(module, callbacks=[unfreeze], max_epochs=1)
    assert all(torch.equal(p, q) for p, q in zip(module.backbone.parameters(), frozen))
    module = Transfer(optimizer)
    frozen = [p.clone() for p in module.backbone.parameters()]
    fit(module, callbacks=[pl.callbacks.BackboneFinetuning(1, backbone_initial_lr=1e-3)])
    assert not any(torch.equal(p, q) for p, q in zip(module.backbone.parameters(), frozen))


@pytest.mark.parametrize("schedule", [None, "WarmupCosine"])
def test_parameters_added_later_are_routed_and_keep_ratios(schedule):
    class Transfer(Classifier):
        @property
        def backbone(self) -> nn.Module:
            return self.net[:4]

    module = Transfer({"name": "NAMO", "args": {"weight_decay": 0.2, "lr": 0.02, "fallback_lr": 1e-3}}, schedule)
    callback = pl.callbacks.BackboneFinetuning(1, lambda epoch: 2.0, backbone_initial_ratio_lr=0.1, should_align=False)
    groups = {g["name"]: g for g in fit(module, callbacks=[callback], max_epochs=3).optimizers[0].param_groups}
    matrix, rest = groups["added-1/matrix"], groups["added-1/fallback/no_decay"]
    assert matrix["param_names"] == ["net.0.weight", "net.3.weight"]
    assert rest["param_names"] == ["net.0.bias", "net.1.weight", "net.1.bias", "net.3.bias"]
    assert (matrix["rule"], rest["rule"]) == ("NAMO", "AdamW")
    assert (matrix["weight_decay"], rest["weight_decay"]) == (0.2, 0.0)
    if schedule is None:
        # A tenth of the head's rate, doubled once, and matrices have twenty times that of the rest.
        assert (rest["lr"], matrix["lr"]) == (pytest.approx(2e-4), pytest.approx(4e-3))


def test_parameters_added_later_are_there_again_after_a_restart(tmp_path):
    """The callback keeps the groups; that it leaves the parameters frozen at resume is Lightning's."""

    class Transfer(Classifier):
        @property
        def backbone(self) -> nn.Module:
            return self.net[:4]

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def run(*callbacks: pl.Callback, **arguments: Any) -> list[tuple[Any, ...]]:
        finetuning = pl.callbacks.BackboneFinetuning(1, should_align=False)
        trainer = make_trainer(max_epochs=4, callbacks=[finetuning, *callbacks])
        trainer.fit(Transfer("NAMO"), **arguments)
        keys = ("name", "role", "rule", "param_names", "lr")
        return [tuple(group[key] for key in keys) for group in trainer.optimizers[0].param_groups]

    assert run(Save()) == run(ckpt_path=tmp_path / "1.ckpt")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("WarmupCosin", "WarmupCosin.*Did you mean WarmupCosine"),
        ({"name": "WarmupCosine", "args": {"warmpu": 3}}, "has no argument 'warmpu'. Did you mean warmup"),
        ("WarmupCosine", r"needs the length of the run.*Sequential has no Trainer.*pass total_steps"),
        ({"name": "WarmupCosine", "interval": "steps"}, "interval must be 'step' or 'epoch', got 'steps'"),
        ("StepLR", "lr_scheduler StepLR: .*step_size"),
        ("ReduceLROnPlateau", r"needs lr_scheduler\.monitor"),
        ("torch.optim.AdamW", "not a torch.optim.lr_scheduler.LRScheduler"),
    ],
)
def test_wrong_scheduler(scheduler, message):
    with pytest.raises(ValueError, match=message):
        configure_optimizers(make_net(), "SGD", scheduler)


def test_training_without_end_has_no_length():
    with pytest.raises(ValueError, match=r"total_steps is None.*max_steps, or max_epochs"):
        fit(Classifier("SGD", "WarmupCosine"), max_epochs=-1)


def test_data_without_length_needs_max_steps():
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield torch.randn(8), 1

    stream = DataLoader(Stream(), batch_size=2)
    with pytest.raises(ValueError, match=r"total_steps is None.*max_steps"):
        make_trainer().fit(Classifier("SGD", "WarmupLinear"), stream)
    trainer = make_trainer(max_steps=3)
    trainer.fit(Classifier("SGD", "WarmupLinear"), stream)
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == 3


def test_nothing_to_train():
    with pytest.raises(ValueError, match="Sequential has no trainable parameter"):
        build_optimizer(make_net().requires_grad_(False), "AdamW")


@pytest.mark.parametrize("name", ["MVNGrad", "HVAdam"])
def test_state_of_flat_parameters_in_8_bits_is_refused_before_training(name: str) -> None:
    strategy: Any = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # its own constructor wants DeepSpeed installed
    strategy.config = {"zero_optimization": {"stage": 1}}
    trainer: Any = types.SimpleNamespace(strategy=strategy, num_devices=2, callbacks=[], precision_plugin=None)
    if dist.is_initialized():  # by a test before, in the same process
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ValueError, match=rf"{name}: state_dtype='8bit' stores blocks of a row.*use FSDP2, or"):
            build_optimizer(nn.Linear(3, 3), name, trainer=trainer, state_dtype="8bit")
        built = build_optimizer(nn.Linear(3, 3), name, trainer=trainer, state_dtype="bfloat16")
        assert built.shard_group is dist.group.WORLD
    finally:
        dist.destroy_process_group()
