"""Image classifiers with any backbone of timm."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from timm.models import ResNet, get_pretrained_cfg_value
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from lightning_optim.factory import OptimizerMixin


class VisionClassifier(OptimizerMixin, pl.LightningModule):
    """Sorts images into classes with a network of timm.

    A batch is (images float32 (batch, in_chans, height, width), labels int64 (batch,)), as ``VisionData`` gives
    it. Logged are ``train/loss`` per step, and ``val/loss``, ``val/accuracy`` and ``val/accuracy_top5`` over all
    validation images, likewise ``test/...``. With fewer than five classes, top-5 accuracy counts a label among
    all of them. Label smoothing, mixup and cutmix act in training only.

    The network is ``self.backbone``; ``model.backbone.compile()`` compiles it in place.

    Args:
        num_classes: Number of classes, at least 2.
        in_chans: Channels of an image.
        image_size: Height and width of the images in pixels, for networks that are built for one size, such as
            ViT, Swin and MLP-Mixer. None: the size that timm has for them.
        backbone: Name of a timm model, perhaps with the tag of pretrained weights: ``resnet50.a1_in1k``.
        backbone_args: Further arguments of ``timm.create_model``, such as ``{"drop_path_rate": 0.1}``.
        pretrained: Whether to download and start from pretrained weights.
        stem_stride: Factor by which the stem of a ResNet shrinks the image. 4: as timm has it, for images of 128
            pixels or more. 2: without the max-pooling. 1: without that and with a first convolution of stride 1,
            which is 3x3 where it was 7x7: the ResNet of papers on CIFAR. Other families have arguments of their
            own for this, such as ``backbone_args={"patch_size": 2}`` for ViT and ConvNeXt.
        label_smoothing: Part of the probability that training targets spread over all classes, in [0, 1).
        mixup: Parameter of the beta distribution with which training blends pairs of images (arXiv 1710.09412).
            0: off.
        cutmix: The same for pasting a part of one image into another (arXiv 1905.04899). 0: off. With both, each
            batch gets one of the two at even odds.

    Raises:
        ValueError: An unknown backbone, arguments that do not fit it, or a value out of range.

    Example:
        >>> model = VisionClassifier(num_classes=10, in_chans=1, backbone="resnet10t", stem_stride=1)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_chans: int = 3,
        image_size: int | None = None,
        backbone: str = "resnet18",
        backbone_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        stem_stride: Literal[1, 2, 4] = 4,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} must be at least 2")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if alpha < 0:
                raise ValueError(f"{name}={alpha} must be 0 (off) or more")
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride={stem_stride} must be 1, 2 or 4")
        self.backbone = _backbone(backbone, pretrained, num_classes, in_chans, image_size, backbone_args or {})
        if stem_stride != 4:
            _set_stem_stride(self.backbone, stem_stride)
        mixes = [
            mix(alpha=alpha, num_classes=num_classes)
            for mix, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
            if alpha
        ]
        self.mix = v2.RandomChoice(mixes) if mixes else None
        self.label_smoothing = label_smoothing
        self.val_metrics = _metrics("val/", num_classes)
        self.test_metrics = _metrics("test/", num_classes)
        if image_size is not None:
            self.example_input_array = torch.zeros(1, in_chans, image_size, image_size)

    @pl.LightningModule.example_input_array.getter  # type: ignore[attr-defined]
    def example_input_array(self) -> Any:
        """One image in the precision of the weights, which a Trainer changes before it summarises the model."""
        example = self._example_input_array
        return example.to(next(self.parameters()).dtype) if isinstance(example, Tensor) else example

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_chans, height, width)."""
        return self.backbone(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch if self.mix is None else self.mix(*batch)
        loss = F.cross_entropy(self(images).float(), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._measure(batch, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._measure(batch, self.test_metrics)

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Classifies images, alone or with labels.

        Returns:
            ``probabilities``, float32 (batch, num_classes), and the most likely ``classes``, int64 (batch,).
        """
        images = batch if isinstance(batch, Tensor) else batch[0]
        probabilities = self(images).float().softmax(dim=-1)
        return {"probabilities": probabilities, "classes": probabilities.argmax(dim=-1)}

    def _measure(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection) -> None:
        images, labels = batch
        logits = self(images).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        metrics.update(value=losses, preds=logits, target=labels)
        self.log_dict(metrics, prog_bar=True)


def _metrics(prefix: str, num_classes: int) -> MetricCollection:
    def accuracy(top_k: int) -> MulticlassAccuracy:
        return MulticlassAccuracy(num_classes, top_k=top_k, average="micro", validate_args=False)

    return MetricCollection(
        {
            # A loss that is not a number must show: the default strategy would leave it out of the mean.
            "loss": MeanMetric(nan_strategy="disable"),
            "accuracy": accuracy(top_k=1),
            "accuracy_top5": accuracy(top_k=min(5, num_classes)),
        },
        prefix=prefix,
        # Metrics that agree on the first batch would be taken for the same one.
        compute_groups=False,
    )


def _backbone(
    name: str,
    pretrained: bool,
    num_classes: int,
    in_chans: int,
    image_size: int | None,
    args: dict[str, Any],
) -> nn.Module:
    # Names with a colon, such as `hf-hub:timm/...`, are not in timm's own lists.
    if ":" not in name:
        known = timm.list_models(pretrained="." in name)
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise ValueError(f"backbone={name!r} is no timm model; the nearest are {', '.join(nearest)}")
        if image_size is not None and get_pretrained_cfg_value(name, "fixed_input_size"):
            args = {"img_size": image_size, **args}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **args)
    except TypeError as error:
        raise ValueError(f"backbone_args={args} do not fit the timm model {name!r}: {error}") from error


def _set_stem_stride(backbone: nn.Module, stride: int) -> None:
    if not isinstance(backbone, ResNet):
        raise ValueError(
            f"stem_stride={stride} is for timm's ResNet family, not {type(backbone).__name__}: leave it out, "
            "and look in backbone_args for what the family offers, such as patch_size for ViT and ConvNeXt"
        )
    backbone.maxpool = nn.Identity()  # type: ignore[assignment]
    if stride == 2:
        return
    first = next(layer for layer in backbone.conv1.modules() if isinstance(layer, nn.Conv2d))
    if first.kernel_size == (7, 7):
        first = nn.Conv2d(first.in_channels, first.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
        backbone.conv1 = first  # type: ignore[assignment]
    first.stride = (1, 1)
