"""The LightningModule of image classifiers."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim.models import VisionClassifier

TINY = {
    "backbone": "resnet10t",
    "backbone_args": {"channels": [8, 8, 16, 16], "stem_width": 4},
    "stem_stride": 1,
}


def small_model(**arguments) -> VisionClassifier:
    torch.manual_seed(0)
    return VisionClassifier(**{"num_classes": 10, "in_chans": 1, "image_size": 8, **TINY, **arguments})


def images_and_labels(n: int = 10, in_chans: int = 1, num_classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(num_classes, (n,), generator=generator)
    return torch.randn(n, in_chans, 8, 8, generator=generator), labels


def loader(tensors: tuple[Tensor, Tensor] | None = None, batch_size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(*(tensors or images_and_labels())), batch_size=batch_size)


def quiet_trainer(tmp_path, **arguments) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **arguments,
    )


# --- backbones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        TINY,
        {"backbone": "resnet18", "backbone_args": {"channels": [8, 8, 8, 8]}},
        {"backbone": "convnext_atto", "backbone_args": {"patch_size": 1, "dims": [8, 8, 8, 8]}},
        {"backbone": "vit_tiny_patch16_224", "backbone_args": {"patch_size": 4, "depth": 1}},
        {
            "backbone": "swin_tiny_patch4_window7_224",
            "backbone_args": {"patch_size": 1, "window_size": 2, "embed_dim": 8, "num_heads": (1, 1, 2, 2)},
        },
    ],
    ids=lambda arguments: arguments["backbone"],
)
def test_any_family_takes_small_images(arguments: dict, in_chans: int) -> None:
    model = VisionClassifier(num_classes=7, in_chans=in_chans, image_size=16, **arguments)
    assert model(torch.randn(3, in_chans, 16, 16)).shape == (3, 7)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet18d"])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_stem_stride_is_what_the_stem_shrinks_by(backbone: str, stride: int) -> None:
    model = VisionClassifier(10, backbone=backbone, stem_stride=stride)
    resnet = model.backbone
    sizes: list[int] = []
    resnet.layer1.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-1]))
    model(torch.randn(2, 3, 32, 32))
    assert sizes == [32 // stride]


def test_resnet18_for_small_images_is_that_of_the_cifar_papers() -> None:
    with torch.device("meta"):
        model = VisionClassifier(10, backbone="resnet18", stem_stride=1)
    # He et al.'s ResNet-18 with a 3x3 stem and ten classes.
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


def test_unknown_backbone_gives_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"backbone='resnet5O' is no timm model.* resnet50\b"):
        VisionClassifier(10, backbone="resnet5O")


def test_unknown_pretrained_tag_gives_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"backbone='resnet50.a1_in2k'.* resnet50.a1_in1k\b"):
        VisionClassifier(10, backbone="resnet50.a1_in2k")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone_args": {"chanels": [8]}}, "backbone_args=.*chanels"),
        ({"backbone_args": {"num_classes": 3}}, "backbone_args=.*num_classes"),
        ({"backbone": "vit_tiny_patch16_224", "backbone_args": None, "stem_stride": 2}, "stem_stride=2 .*patch_size"),
        ({"stem_stride": 3}, "stem_stride=3"),
        ({"num_classes": 1}, "num_classes=1"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
        ({"mixup": -1.0}, "mixup=-1.0"),
        ({"cutmix": -1.0}, "cutmix=-1.0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**arguments)


# --- measures -------------------------------------------------------------------------------------------------------


def scores_as_images(model: VisionClassifier) -> VisionClassifier:
    """Images of shape (1, 1, num_classes) that are the logits themselves."""
    model.backbone = nn.Flatten()
    return model


@pytest.mark.parametrize("num_classes", [2, 4, 10])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 12))
def test_measures_are_over_all_images(num_classes: int, seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, num_classes, generator=generator)
    labels = torch.randint(num_classes, (n,), generator=generator)
    model = scores_as_images(small_model(num_classes=num_classes, label_smoothing=0.1))
    data = loader((logits.view(n, 1, 1, num_classes), labels), batch_size=5)
    (val,) = quiet_trainer(".").validate(model, data, verbose=False)

    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    expected = {
        "val/loss": F.cross_entropy(logits.double(), labels).item(),  # validation targets are not smoothed
        "val/accuracy": (rank < 1).double().mean().item(),
        "val/accuracy_top5": (rank < 5).double().mean().item(),
    }
    # Float32 means of a dozen numbers.
    assert val == pytest.approx(expected, rel=1e-5)


def test_top_1_and_top_5_stay_apart_after_a_batch_on_which_they_agree(tmp_path) -> None:
    labels = torch.zeros(4, dtype=torch.long)
    first_is_best = torch.linspace(1, 0, 10).expand(2, 10)
    second_is_best = first_is_best.roll(-1, 1)
    logits = torch.cat([first_is_best, second_is_best])
    model = scores_as_images(small_model())
    data = loader((logits.view(4, 1, 1, 10), labels), batch_size=2)
    (test,) = quiet_trainer(tmp_path).test(model, data, verbose=False)
    assert test["test/accuracy"] == 0.5
    assert test["test/accuracy_top5"] == 1.0


def test_a_loss_that_is_not_a_number_shows(tmp_path) -> None:
    model = scores_as_images(small_model())
    logits = torch.zeros(4, 1, 1, 10)
    logits[0] = math.nan
    data = loader((logits, torch.zeros(4, dtype=torch.long)))
    (val,) = quiet_trainer(tmp_path).validate(model, data, verbose=False)
    assert math.isnan(val["val/loss"])


# --- targets of training --------------------------------------------------------------------------------------------


def training_loss(model: VisionClassifier, batch: tuple[Tensor, Tensor]) -> float:
    model.log = lambda *args, **kwargs: None  # no Trainer
    return model.training_step(batch, 0).item()


def test_label_smoothing_moves_probability_to_all_classes() -> None:
    smoothing = 0.3
    logits, labels = torch.randn(6, 10), torch.arange(6)
    batch = logits.view(6, 1, 1, 10), labels
    targets = torch.full((6, 10), smoothing / 10)
    targets[torch.arange(6), labels] += 1 - smoothing
    expected = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    model = scores_as_images(small_model(label_smoothing=smoothing))
    assert training_loss(model, batch) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("arguments", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_images_have_mixed_labels(arguments: dict) -> None:
    model = small_model(**arguments)
    # Each image is filled with its label's number, so its mean tells how much of which image is in it.
    labels = torch.arange(6)
    images = labels.float().view(6, 1, 1, 1).expand(6, 1, 8, 8).contiguous()
    torch.manual_seed(3)
    for _ in range(10):
        mixed, targets = model.mix(images, labels)
        torch.testing.assert_close(targets.sum(-1), torch.ones(6))
        # Exact up to rounding.
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(10.0), rtol=1e-4, atol=1e-4)
    assert math.isfinite(training_loss(model, images_and_labels()))


def test_images_are_not_mixed_unless_asked_for() -> None:
    images, labels = images_and_labels()
    model = small_model()
    expected = F.cross_entropy(model.backbone(images), labels).item()
    assert training_loss(model, (images, labels)) == pytest.approx(expected)


# --- the Trainer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_the_summary_of_the_model_is_made_at_any_precision(precision: str, tmp_path) -> None:
    trainer = pl.Trainer(accelerator="cpu", precision=precision, fast_dev_run=1, default_root_dir=tmp_path)  # type: ignore[arg-type]
    trainer.fit(small_model(), loader())  # which summarises first
    assert small_model().double().example_input_array.dtype == torch.float64
    assert small_model(image_size=None).example_input_array is None


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_trains_validates_tests_and_predicts(precision: str, tmp_path) -> None:
    model = small_model(mixup=0.2, cutmix=0.2, label_smoothing=0.1)
    model.optimizer = "AdamW"
    before = [p.detach().clone() for p in model.parameters()]
    trainer = quiet_trainer(tmp_path, fast_dev_run=2, precision=precision)
    trainer.fit(model, loader(), loader())
    assert {"train/loss", "val/loss", "val/accuracy", "val/accuracy_top5"} <= trainer.callback_metrics.keys()
    assert all(v.isfinite() for v in trainer.callback_metrics.values())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before))
    trainer.test(model, loader(), verbose=False)
    for prediction in trainer.predict(model, loader()):
        assert prediction["probabilities"].shape == (4, 10)
        torch.testing.assert_close(prediction["probabilities"].sum(-1), torch.ones(4))
        assert torch.equal(prediction["classes"], prediction["probabilities"].argmax(-1))


def test_overfits_a_batch() -> None:
    model, (images, labels) = small_model(), images_and_labels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_every_parameter_gets_a_gradient() -> None:
    model = small_model()
    model(images_and_labels()[0]).logsumexp(-1).sum().backward()
    # Distributed training stops at a parameter without one.
    assert all(p.grad is not None for p in model.parameters())


def test_backbone_compiles_in_place() -> None:
    model = small_model().eval()
    images, _ = images_and_labels()
    names, expected = list(model.state_dict()), model(images)
    model.backbone.compile(backend="aot_eager", fullgraph=True)
    # The same operations, some of them decomposed: a few units in the last place.
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names


def test_a_checkpoint_holds_all_that_is_needed(tmp_path) -> None:
    model = small_model(label_smoothing=0.1, mixup=0.5)
    model.optimizer = "AdamW"
    trainer = quiet_trainer(tmp_path, fast_dev_run=1)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = VisionClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.hparams == model.hparams
    images, _ = images_and_labels()
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_model_summary_shows_shapes() -> None:
    summary = pl.utilities.model_summary.summarize(small_model())
    assert [1, 10] in summary.out_sizes
