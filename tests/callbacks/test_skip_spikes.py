"""Outliers are skipped: with any optimizer, at any precision, and never for good."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_optim import build_optimizer
from lightning_optim.callbacks import Diagnostics, SkipSpikes


def trainer(**kwargs) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, max_epochs=-1, **(quiet | kwargs))


class Spiky(BoringModel):
    def __init__(self, optimizer: str = "AdamW", factors: dict[int, float] | None = None):
        super().__init__()
        self.choice, self.factors = optimizer, factors or {}
        self.seen: list[torch.Tensor] = []

    def train_dataloader(self):
        return torch.utils.data.DataLoader(RandomDataset(32, 256), batch_size=8)

    def training_step(self, batch, batch_idx):
        self.seen.append(self.layer.weight.detach().clone())
        return super().training_step(batch, batch_idx)["loss"] * self.factors.get(self.global_step, 1.0)

    def configure_optimizers(self):
        return build_optimizer(self, self.choice, lr=1e-3)


def moved(module: Spiky) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(module.seen, module.seen[1:])]


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "MVNGrad", "NAMO"])
@pytest.mark.parametrize("by", ["gradient", "loss"])
@pytest.mark.filterwarnings("ignore")
def test_a_spike_is_skipped_with_any_optimizer(optimizer, by):
    pl.seed_everything(0, verbose=False)
    skip, module = SkipSpikes(threshold=20, by=by), Spiky(optimizer, {40: 1e3, 45: 1e6})
    trainer(callbacks=[skip], max_steps=50).fit(module)
    assert [i for i, x in enumerate(moved(module)) if not x] == [40, 45]
    assert skip.skipped_steps == 2


@pytest.mark.filterwarnings("ignore")
def test_the_state_of_the_optimizer_does_not_see_the_spike():
    def state(factor, callbacks):
        pl.seed_everything(0, verbose=False)
        module = Spiky("AdamW", {39: factor})
        t = trainer(callbacks=callbacks, max_steps=40)
        t.fit(module)
        return t.optimizers[0].state[module.layer.weight]["exp_avg_sq"]

    big, bigger = (state(factor, [SkipSpikes(threshold=20)]) for factor in (1e3, 1e5))
    assert torch.equal(big, bigger)


@pytest.mark.filterwarnings("ignore")
def test_a_new_level_is_accepted():
    skip, module = SkipSpikes(threshold=20, max_in_a_row=2), Spiky("AdamW", dict.fromkeys(range(40, 200), 1000.0))
    trainer(callbacks=[skip], max_steps=140).fit(module)
    still = [i for i, x in enumerate(moved(module)) if not x]
    assert still[:4] == [40, 41, 43, 44]
    assert max(still) < 120


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_finite_is_skipped_from_the_start():
    skip, module = SkipSpikes(), Spiky("SGD", {2: float("nan"), 3: float("inf")})
    trainer(callbacks=[skip], max_steps=6).fit(module)
    assert skip.skipped_steps == 2
    assert module.layer.weight.isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_with_a_loss_scaler_and_diagnostics():
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    skip, diagnostics = SkipSpikes(threshold=20), Diagnostics(every_n_steps=1, quiet=True)
    module = Spiky("AdamW", {40: 100.0})
    t = trainer(callbacks=[diagnostics, skip], plugins=[plugin], max_steps=45)
    t.fit(module)
    assert skip.skipped_steps == 1
    assert t.callback_metrics["spike/skipped_steps"] == 1


@pytest.mark.filterwarnings("ignore")
def test_it_goes_on_after_a_restart(tmp_path):
    def make():
        return SkipSpikes(threshold=20), Spiky("AdamW", {40: 1e3})

    first, module = make()
    t = trainer(callbacks=[first], max_steps=38)
    t.fit(module)
    t.save_checkpoint(tmp_path / "a.ckpt")
    second, module = make()
    trainer(callbacks=[second], max_steps=45).fit(module, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert second.skipped_steps == 1


@pytest.mark.parametrize(
    ("argument", "value"), [("threshold", 0.0), ("by", "weights"), ("window", 4), ("max_in_a_row", 0)]
)
def test_mistakes(argument, value):
    with pytest.raises(ValueError, match=f"SkipSpikes: {argument}"):
        SkipSpikes(**{argument: value})
