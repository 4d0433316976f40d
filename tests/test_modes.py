"""Optimizers with modes: what is validated, tested, kept and resumed are the weights of evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import OptimizerMixin, build_optimizer
from lightning_optim.callbacks import OptimizerModes, OptimizerSwap
from lightning_optim.cli import OptimCLI
from lightning_optim.modes import has_modes


class Averaging(torch.optim.Optimizer):
    """Trains ``y``, and hands out the average ``x`` of the points ``z``: schedule-free SGD, with a reference below."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "train_mode": False, "k": 0})

    def _move(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train:
                weight = 1 - group["beta"] if train else 1 - 1 / group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = train

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("not in training mode")
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / group["beta"])
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["k"])
                p.copy_(x.lerp(z, 1 - group["beta"]))
        return loss


def data() -> DataLoader:
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=3)


class Model(pl.LightningModule):
    def __init__(self, make: Callable[[Any], Any] = Averaging) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)
        self.make = make
        self.validated: list[Tensor] = []
        self.trained: list[Tensor] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.trained.append(self.net.weight.detach().clone())
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(self.net.weight.detach().clone())

    def test_step(self, batch: Any, index: int) -> None:
        self.validated.append(self.net.weight.detach().clone())

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def trainer(path: Path, epochs: int = 2, **arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=path,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **arguments,
    )


def test_validation_changes_nothing(tmp_path: Path) -> None:
    with_it, without = Model(), Model()
    trainer(tmp_path, callbacks=[OptimizerModes()], enable_checkpointing=False).fit(with_it, data(), data())
    trainer(tmp_path, callbacks=[OptimizerModes()], enable_checkpointing=False).fit(without, data())
    assert torch.equal(torch.stack(with_it.trained), torch.stack(without.trained))


def by_hand(epochs: int) -> tuple[nn.Linear, Averaging]:
    """A plain loop that evaluates at its end."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    optimizer = Averaging(net.parameters())
    optimizer.train()
    for _ in range(epochs):
        for x, y in data():

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(net(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    optimizer.eval()
    return net, optimizer


def test_validation_and_tests_see_the_weights_of_evaluation(tmp_path: Path) -> None:
    model, run = Model(), trainer(tmp_path, callbacks=[OptimizerModes()], enable_checkpointing=False)
    run.fit(model, data(), data())
    expected, _ = by_hand(2)
    assert torch.equal(model.validated[-1], expected.weight)
    assert torch.equal(model.net.weight, expected.weight)  # after training, too
    assert not torch.equal(model.trained[-1], model.validated[-1])
    run.test(model, data(), verbose=False)
    assert torch.equal(model.validated[-1], expected.weight)


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_the_weights_of_evaluation(tmp_path: Path, weights_only: bool) -> None:
    """Also those within an epoch, and those of weights alone, of which callbacks are not told."""
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_weights_only=weights_only, save_top_k=-1)
    model = Model()
    trainer(tmp_path, callbacks=[OptimizerModes(), keep]).fit(model, data())
    saved = torch.load(keep.best_model_path or keep.last_model_path, weights_only=False)
    assert saved["global_step"] == 6
    averaged = saved["state_dict"]["net.weight"]
    next_point = model.trained[6]  # of training, after the same steps
    assert not torch.equal(averaged, next_point)
    if not weights_only:
        (state,) = saved["optimizer_states"]
        z = next(iter(state["state"].values()))["z"]
        torch.testing.assert_close(averaged.lerp(z, 0.1), next_point, rtol=1e-6, atol=1e-7)  # roundings of float32
        assert state["param_groups"][0]["train_mode"] is False


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    whole = Model()
    trainer(tmp_path, 3, callbacks=[OptimizerModes(), keep]).fit(whole, data(), data())
    resumed = Model()
    again = ModelCheckpoint(tmp_path / "again", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    run = trainer(tmp_path, 3, callbacks=[OptimizerModes(), again])
    run.fit(resumed, data(), data(), ckpt_path=tmp_path / "step=8.ckpt", weights_only=False)
    assert run.global_step == 12
    assert torch.equal(whole.net.weight, resumed.net.weight)


class Mixed(OptimizerMixin, Model):
    optimizer = f"{__name__}.Averaging"
    configure_optimizers = OptimizerMixin.configure_optimizers


class Line(Model):
    def configure_optimizers(self) -> Any:
        return build_optimizer(self, f"{__name__}.Averaging")


@pytest.mark.parametrize("how", ["mixin", "line", "swap"])
def test_it_is_added_where_the_optimizer_is_ours_to_build(tmp_path: Path, how: str) -> None:
    model = {"mixin": Mixed, "line": Line, "swap": Model}[how]()
    callbacks: list[Any] = [ModelCheckpoint(tmp_path)]
    if how == "swap":
        model.make = lambda params: torch.optim.SGD(params, lr=0.1)
        callbacks.append(OptimizerSwap(f"{__name__}.Averaging"))
    run = trainer(tmp_path, callbacks=callbacks)
    run.fit(model, data(), data())
    assert torch.equal(model.validated[-1], by_hand(2)[0].weight)
    assert sum(isinstance(x, OptimizerModes) for x in run.callbacks) == 1
    assert isinstance(run.callbacks[-1], ModelCheckpoint)


def test_batchnorm_is_said(tmp_path: Path) -> None:
    model = Model()
    model.net = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))  # type: ignore[assignment]
    model.training_step = lambda batch, batch_idx: model.net(batch[0]).sum()  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"running statistics of 1 BatchNorm layers \(net\.1, \.\.\.\)"):
        trainer(tmp_path, 1, callbacks=[OptimizerModes()], enable_checkpointing=False).fit(model, data())


def test_optimizers_without_modes_are_left_alone(tmp_path: Path) -> None:
    model = Model(lambda params: torch.optim.SGD(params, lr=0.1))
    trainer(tmp_path, callbacks=[OptimizerModes()], enable_checkpointing=False).fit(model, data(), data())
    assert not has_modes(torch.optim.SGD(model.parameters()))


PEERS = ["schedulefree.AdamWScheduleFree", "pytorch_optimizer.ScheduleFreeAdamW", "heavyball.SFAdamW"]


@pytest.mark.parametrize("path", PEERS)
def test_schedule_free_optimizers_of_other_libraries(tmp_path: Path, path: str) -> None:
    pytest.importorskip(path.partition(".")[0])

    class Peer(Model):
        def configure_optimizers(self) -> Any:
            return build_optimizer(self, path, lr=0.1)

    whole = Peer()
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer(tmp_path, 3, callbacks=[keep]).fit(whole, data(), data())
    assert not torch.equal(whole.trained[-1], whole.validated[-1])
    assert torch.equal(whole.validated[-1], whole.net.weight)
    resumed = Peer()
    again = ModelCheckpoint(tmp_path / "again", every_n_train_steps=4, save_top_k=-1)
    run = trainer(tmp_path, 3, callbacks=[again])
    run.fit(resumed, data(), data(), ckpt_path=tmp_path / "step=8.ckpt", weights_only=False)
    assert torch.equal(whole.net.weight, resumed.net.weight)


class ByCommand(Model):
    """Has no optimizer of its own, but its data."""

    configure_optimizers = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self) -> DataLoader:
        return data()

    def val_dataloader(self) -> DataLoader:
        return data()


def test_optim_cli_validates_and_saves_the_weights_of_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By dotted path on the command line."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.chdir(tmp_path)
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}

    cli = OptimCLI(
        ByCommand,
        args=["fit", f"--optimizer={__name__}.Averaging", "--optimizer.lr=0.1"],
        trainer_defaults=settings | {"max_epochs": 2, "num_sanity_val_steps": 0},
        save_config_callback=None,
    )
    model, run = cli.model, cli.trainer
    assert torch.equal(model.validated[-1], by_hand(2)[0].weight)
    path = run.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=True)
    assert torch.equal(saved["state_dict"]["net.weight"], model.validated[-1])
