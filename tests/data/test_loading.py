"""The loaders inside Lightning: order, several processes, resuming, and the command line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lightning_optim.data import TextData, VisionData
from lightning_optim.data.loading import EpochSampler, run_seed

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended"),
    pytest.mark.filterwarnings("ignore:You requested to overfit"),
]


class Classifier(pl.LightningModule):
    """A linear classifier of images that keeps the batches it has seen."""

    def __init__(self, in_chans: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(in_chans * 64, num_classes)
        self.seen: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen.append(images)
        return nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pass

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0].flatten(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trainer(**kwargs: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", **({"enable_checkpointing": False} | quiet | kwargs))


def digits(**kwargs: Any) -> VisionData:
    return VisionData(**({"batch_size": 200} | kwargs))  # 6 batches an epoch


def fit(data: pl.LightningDataModule, ckpt_path: str | None = None, **kwargs: Any) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    trainer(**({"max_epochs": 3} | kwargs)).fit(model, data, ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("options", "steps_per_epoch"),
    [
        ({}, 6),
        ({"limit_train_batches": 4}, 4),
        ({"val_check_interval": 2}, 6),
        ({"accumulate_grad_batches": 2}, 3),
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(
    tmp_path: Path, num_workers: int, options: dict[str, Any], steps_per_epoch: int
) -> None:
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(digits(num_workers=num_workers), callbacks=[every_step], enable_checkpointing=True, **options)
    assert len(list(tmp_path.iterdir())) == 3 * steps_per_epoch
    # In the middle and at the end of the first and of the second epoch.
    for step in (2, steps_per_epoch, steps_per_epoch + 1, 2 * steps_per_epoch):
        torch.rand(step)  # the global generator is elsewhere than in the uninterrupted run
        resumed = fit(digits(num_workers=num_workers), ckpt_path=str(tmp_path / f"step={step}.ckpt"), **options)
        assert torch.equal(resumed.layer.weight, whole.layer.weight), step
        left = len(resumed.seen)
        assert all(torch.equal(a, b) for a, b in zip(resumed.seen, whole.seen[-left:], strict=True))


def test_a_run_resumed_after_its_last_epoch_trains_on(tmp_path: Path) -> None:
    last = ModelCheckpoint(tmp_path, save_last=True)
    fit(digits(), max_epochs=2, callbacks=[last], enable_checkpointing=True)
    resumed = fit(digits(), ckpt_path=str(tmp_path / "last.ckpt"), max_epochs=3)
    whole = fit(digits(), max_epochs=3)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_text_windows_are_resumed_too(tmp_path: Path) -> None:
    data = TextData(root=str(tmp_path), max_bytes=60_000, sequence_length=64)
    data.prepare_data()
    data.setup()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(3)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    expected = list(batches)
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.sampler.set_epoch(3)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, expected, strict=True))
    assert len(list(resumed)) == len(expected) + 1, "the next epoch is whole again"


def test_the_order_depends_on_seed_and_on_seed_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_batch(seed: int, global_seed: str | None) -> Tensor:
        if global_seed is None:
            monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        else:
            monkeypatch.setenv("PL_GLOBAL_SEED", global_seed)
        data = digits(seed=seed)
        data.setup()
        return next(iter(data.train_dataloader()))[1]

    assert torch.equal(first_batch(0, None), first_batch(0, None))
    seen = {tuple(first_batch(seed, other).tolist()) for seed in (0, 1) for other in ("1", "2")}
    assert len(seen) == 4
    assert run_seed(1) != run_seed(0)


@given(
    n=st.integers(1, 50),
    processes=st.integers(1, 4),
    epoch=st.integers(0, 5),
    start=st.integers(0, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_processes_share_an_epoch(n: int, processes: int, epoch: int, start: int, seed: int) -> None:
    samplers = [EpochSampler(range(n), num_replicas=processes, rank=rank, seed=seed) for rank in range(processes)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    shares = [list(sampler) for sampler in samplers]
    assert len({len(share) for share in shares}) == 1
    assert {key for share in shares for key in share} == set(range(epoch * n, epoch * n + n))
    samplers[0].start = start
    assert list(samplers[0]) == shares[0][start:]
    assert list(samplers[0]) == shares[0], "only once"


def test_the_trainer_tells_the_processes_apart() -> None:
    batches = []
    for rank in range(2):
        data = digits()
        data.setup()
        data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank})  # type: ignore[assignment]
        batches.append([x for x, _ in data.train_dataloader()])
    assert [len(share) for share in batches] == [3, 3]
    assert not torch.equal(batches[0][0], batches[1][0])


def test_fewer_images_than_a_batch_are_still_trained_on() -> None:
    data = VisionData(batch_size=5000)
    data.setup()
    assert [len(images) for images, _ in data.train_dataloader()] == [1293]
    data.batch_size = 1000
    assert [len(images) for images, _ in data.train_dataloader()] == [1000]


def test_overfitting_repeats_its_batches() -> None:
    model = fit(digits(augment=False), overfit_batches=1)
    assert len(model.seen) == 3
    assert all(torch.equal(batch, model.seen[0]) for batch in model.seen)


def test_prediction_through_the_trainer() -> None:
    predictions = trainer().predict(Classifier(), digits())
    assert predictions is not None
    assert [len(batch) for batch in predictions] == [200, 160]


def test_hyperparameters_are_saved(tmp_path: Path) -> None:
    data = digits(image_size=8)
    fit(data, max_epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True)
    assert VisionData.load_from_checkpoint(tmp_path / "last.ckpt").hparams == data.hparams
    text = TextData(tokenizer="word", sequence_length=9)
    assert TextData(**text.hparams).hparams == text.hparams


class LinkedCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: Any) -> None:
        for name in ("in_chans", "num_classes"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")


def run_cli(kind: Any, *args: str) -> Any:
    cli = LinkedCLI if kind is VisionData else LightningCLI
    return cli(Classifier, kind, args=list(args), run=False, save_config_callback=None, seed_everything_default=False)


def test_the_command_line_links_the_data_to_the_model() -> None:
    cli = run_cli(VisionData, "--data.dataset=cifar-100", "--data.batch_size=3", "--data.image_size=8")
    assert (cli.model.layer.in_features, cli.model.layer.out_features) == (3 * 64, 100)
    assert cli.datamodule.batch_size == 3


def test_the_command_line_reads_every_type() -> None:
    options = ("--data.dataset=files", "--data.files=[a.txt, b.txt]", "--data.max_bytes=1000", "--data.root=there")
    cli = run_cli(TextData, *options, "--data.validation_fraction=0.2", "--data.tokenizer=word")
    assert cli.datamodule.files == ["a.txt", "b.txt"]
    assert (cli.datamodule.max_bytes, cli.datamodule.validation_fraction) == (1000, 0.2)


def test_the_command_line_names_a_wrong_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli(VisionData, "--data.dataset=cifar")
    assert "cifar-10" in capsys.readouterr().err
