"""VisionData: every source, the splits, the augmentation, and what is said when something is wrong."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets

from lightning_optim.data import DataError, VisionData
from lightning_optim.data.vision import shift_and_flip

Batch = tuple[Tensor, Tensor]


def ready(*args: Any, **kwargs: Any) -> VisionData:
    data = VisionData(*args, **kwargs)
    data.prepare_data()
    data.setup()
    return data


def write_npz(path: Path, n_train: int = 40, n_test: int = 10, shape: tuple[int, ...] = (8, 8, 3)) -> str:
    """Images that are constant, each with a value of its own; the label is the value modulo 4."""
    values = np.arange(n_train + n_test, dtype=np.uint8)
    images = np.ones((len(values), *shape), np.uint8) * values.reshape(-1, *[1] * len(shape))
    labels = values.astype(np.int32) % 4
    train, test = slice(n_train), slice(n_train, None)
    np.savez(path, x_train=images[train], y_train=labels[train], x_test=images[test], y_test=labels[test])
    return str(path)


def write_mnist(folder: Path, n_train: int = 20, n_test: int = 5) -> None:
    """Files as of MNIST and Fashion-MNIST, few and random."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, n in (("train", n_train), ("t10k", n_test)):
        images = rng.integers(256, size=(n, 28, 28), dtype=np.uint8)
        header = struct.pack(">iiii", 2051, n, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.arange(n, dtype=np.uint8) % 10
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, n) + labels.tobytes())


def write_image_folder(root: Path, splits: tuple[str, ...] = ("train", "val")) -> None:
    rng = np.random.default_rng(0)
    for split in splits:
        for label in ("cat", "dog", "owl"):
            (root / split / label).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(256, size=(40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")


def pixel_values(data: VisionData, images: Tensor) -> list[int]:
    """The constant values of images written by `write_npz`."""
    middle = images[:, 0, images.shape[2] // 2, images.shape[3] // 2]
    return ((middle * data.recipe.std[0] + data.recipe.mean[0]) * 255).round().int().tolist()


# ---------------------------------------------------------------------------------------------------- the sources


def test_digits_are_split_into_all_of_scikit_learn() -> None:
    data = ready(augment=False)
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    loaders[0] = torch.utils.data.DataLoader(data.train_set, batch_size=100, collate_fn=lambda batch: batch)
    images, labels = (torch.cat(parts) for parts in zip(*(batch for loader in loaders for batch in loader)))
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [1293, 144, 360]
    levels = (images * data.recipe.std[0] + data.recipe.mean[0]) * 16
    found = sorted(zip(labels.tolist(), levels.round().int().flatten(1).tolist()))
    digits = load_digits()
    assert found == sorted(zip(digits.target.tolist(), digits.images.reshape(1797, 64).astype(int).tolist()))


def test_every_test_digit_is_the_same_for_every_seed() -> None:
    first, second = (next(iter(ready(seed=seed).test_dataloader()))[0] for seed in (0, 1))
    assert torch.equal(first, second)


def test_training_digits_are_normalised() -> None:
    images = torch.cat([images for images, _ in ready(augment=False).train_dataloader()])
    # The statistics are those of all 1,797 images, of which these are a sample of 70 %.
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01


@pytest.mark.parametrize(("dataset", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_a_folder_prepared_by_hand_needs_no_network(
    tmp_path: Path, no_network: None, dataset: Any, folder: str
) -> None:
    write_mnist(tmp_path / folder / "raw")
    data = ready(dataset, root=str(tmp_path), batch_size=6)
    batches = list(data.train_dataloader())
    assert [images.shape for images, _ in batches] == [(6, 1, 28, 28)] * 3
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (18, 2, 5)


@pytest.mark.parametrize(("dataset", "kind"), [("cifar-10", datasets.CIFAR10), ("cifar-100", datasets.CIFAR100)])
def test_cifar_in_the_format_of_its_authors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Any, kind: Any
) -> None:
    def write(name: str, content: dict[str, Any]) -> list[str]:
        (tmp_path / kind.base_folder).mkdir(exist_ok=True)
        (tmp_path / kind.base_folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(pickle.dumps(content)).hexdigest()]

    label = "labels" if dataset == "cifar-10" else "fine_labels"
    pixels = np.arange(4 * 3072).astype(np.uint8).reshape(4, 3072)
    monkeypatch.setattr(kind, "train_list", [write("a", {"data": pixels, label: [3, 1, 4, 1]})])
    monkeypatch.setattr(kind, "test_list", [write("b", {"data": pixels, label: [2, 7, 1, 8]})])
    name, md5 = write("meta", {kind.meta["key"]: ["apple"]})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": kind.meta["key"], "md5": md5})
    data = ready(dataset, root=str(tmp_path), batch_size=4)
    ((images, labels),) = data.test_dataloader()
    assert labels.tolist() == [2, 7, 1, 8]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.recipe.mean, data.recipe.std))
    # CIFAR's files have the channels first. The normalised values are float32 of order 1.
    torch.testing.assert_close(
        (images * std + mean) * 255, torch.from_numpy(pixels).view(4, 3, 32, 32).float(), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (12, 12, 3)])
def test_npz(tmp_path: Path, shape: tuple[int, ...]) -> None:
    data = VisionData("npz", root=write_npz(tmp_path / "x.npz", shape=shape), batch_size=5)
    channels = shape[2] if len(shape) == 3 else 1
    assert (data.in_chans, data.num_classes, data.image_size) == (channels, 4, shape[0])
    data.setup()
    for images, labels in data.test_dataloader():
        assert images.shape == (5, channels, shape[0], shape[1])
        assert [value % 4 for value in pixel_values(data, images)] == labels.tolist()


def test_npz_is_normalised_by_its_training_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = (rng.random((200, 8, 8, 3)) * [40, 100, 250] + [200, 0, 5]).astype(np.uint8)
    np.savez(tmp_path / "x.npz", x_train=images, y_train=np.arange(200), x_test=images, y_test=np.arange(200))
    data = ready("npz", root=str(tmp_path / "x.npz"), augment=False, validation_fraction=0, batch_size=200)
    ((pixels, _),) = data.train_dataloader()
    # float32 sums of 12,800 values of order 1
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_image_folder(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    data = VisionData("imagefolder", root=str(tmp_path), batch_size=4, image_size=24)
    assert (data.in_chans, data.num_classes, data.image_size) == (3, 3, 24)
    data.setup()
    assert [images.shape for images, _ in data.train_dataloader()] == [(4, 3, 24, 24)] * 2
    labels = torch.cat([labels for _, labels in data.test_dataloader()])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2], "without root/test, testing uses root/val"
    assert VisionData("imagefolder", root=str(tmp_path)).image_size == 224


def test_image_folder_with_its_own_test_split(tmp_path: Path) -> None:
    write_image_folder(tmp_path, ("train", "val", "test"))
    (tmp_path / "test" / "owl" / "0.png").unlink()
    data = ready("imagefolder", root=str(tmp_path), image_size=8)
    assert (len(data.val_set), len(data.test_set)) == (9, 8)


def test_fashion_mnist(shared_data: Path, no_network: None) -> None:
    data = ready("fashion-mnist", root=str(shared_data), augment=False, batch_size=6000)
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (54000, 6000, 10000)
    images, labels = next(iter(data.train_dataloader()))
    assert labels.unique().tolist() == list(range(10))
    # The means of single images scatter by 0.5: that of 6,000 images by 0.006.
    assert abs(images.mean()) < 0.03
    assert abs(images.std() - 1) < 0.03


def test_cifar_100_sample(shared_data: Path) -> None:
    data = ready("npz", root=str(shared_data / "cifar100" / "cifar100-10k-2k.npz"))
    assert (data.in_chans, data.num_classes, data.image_size) == (3, 100, 32)
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (9000, 1000, 2000)
    # A sample of a fifth of the set, whose published statistics it should nearly have.
    cifar_100 = VisionData("cifar-100").recipe
    assert data.recipe.mean == pytest.approx(cifar_100.mean, abs=0.01)
    assert data.recipe.std == pytest.approx(cifar_100.std, abs=0.01)


# ----------------------------------------------------------------------------------------------------- the splits


@given(st.integers(0, 2**40), st.sampled_from([0.05, 0.25, 0.6]))
def test_train_and_validation_images_are_disjoint_and_complete(
    tmp_path_factory: pytest.TempPathFactory, seed: int, fraction: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "split.npz"
    if not path.exists():
        write_npz(path)
    data = ready("npz", root=str(path), batch_size=1, seed=seed, validation_fraction=fraction)
    train = [value for images, _ in data.train_dataloader() for value in pixel_values(data, images)]
    validation = [value for images, _ in data.val_dataloader() for value in pixel_values(data, images)]
    assert len(validation) == round(40 * fraction)
    assert sorted(train + validation) == list(range(40))


def test_the_split_depends_on_the_seed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_npz(tmp_path / "x.npz")

    def validation(seed: int) -> list[int]:
        data = ready("npz", root=path, seed=seed)
        return [value for images, _ in data.val_dataloader() for value in pixel_values(data, images)]

    first = validation(0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")  # what seed_everything(7) does
    torch.manual_seed(7)
    assert validation(0) == first
    assert validation(1) != first


def test_without_a_validation_fraction_the_test_images_validate(tmp_path: Path) -> None:
    data = ready("npz", root=write_npz(tmp_path / "x.npz"), validation_fraction=0, batch_size=50)
    ((images, _),) = data.val_dataloader()
    assert pixel_values(data, images) == list(range(40, 50))
    assert len(data.train_set) == 40


def test_prediction_gives_the_test_images(tmp_path: Path) -> None:
    data = ready("npz", root=write_npz(tmp_path / "x.npz"))
    ((images, _),) = data.predict_dataloader()
    assert pixel_values(data, images) == list(range(40, 50))


# ----------------------------------------------------------------------------------------------- the augmentation


@given(st.integers(0, 3), st.booleans(), st.integers(1, 3), st.integers(0, 2**32))
def test_every_image_is_moved_and_mirrored_as_a_whole(shift: int, flip: bool, channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 256, size=(5, channels, 6, 7), dtype=np.uint8)
    for image, moved in zip(images, shift_and_flip(images, shift, flip, rng)):
        padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)))
        corners = range(2 * shift + 1)
        crops = [padded[:, top : top + 6, left : left + 7] for top in corners for left in corners]
        crops += [crop[:, :, ::-1] for crop in crops] if flip else []
        assert any((moved == crop).all() for crop in crops)


def test_every_image_has_its_own_move() -> None:
    image = np.arange(1, 26, dtype=np.uint8).reshape(1, 1, 5, 5)
    n = 1800
    moved = shift_and_flip(np.repeat(image, n, 0), 1, True, np.random.default_rng(0))
    outcomes, counts = np.unique(moved.reshape(n, -1), axis=0, return_counts=True)
    assert len(outcomes) == 9 * 2, "3 x 3 moves, mirrored or not"
    # Each count is binomial with mean 100 and standard deviation 9.7.
    assert (abs(counts - 100) < 50).all()


def test_the_original_images_stay_as_they_are() -> None:
    images = np.arange(50, dtype=np.uint8).reshape(2, 1, 5, 5)
    before = images.copy()
    shift_and_flip(images, 2, True, np.random.default_rng(0))
    assert (images == before).all()


@pytest.mark.parametrize("augment", [True, False])
def test_augmentation_can_be_switched_off(augment: bool) -> None:
    loader = ready(augment=augment).train_dataloader()
    first, second = ({image.numpy().tobytes() for image in torch.cat([x for x, _ in loader])} for _ in range(2))
    assert first == second, "the same epoch"
    loader.sampler.set_epoch(1)
    later = {image.numpy().tobytes() for image in torch.cat([x for x, _ in loader])}
    # An image that stays in place stays the same (1 of 9); batches leave out a few images of an epoch.
    share = len(first & later) / len(first)
    assert share < 0.3 if augment else share > 0.9


def test_evaluation_images_are_never_augmented() -> None:
    data = ready(augment=True)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(loader, loader, strict=True))
    plain = ready(augment=False)
    assert torch.equal(next(iter(data.val_dataloader()))[0], next(iter(plain.val_dataloader()))[0])


def test_images_are_resized(tmp_path: Path) -> None:
    data = ready("npz", root=write_npz(tmp_path / "x.npz"), image_size=20, augment=False)
    assert data.image_size == 20
    ((images, _),) = data.test_dataloader()
    assert images.shape == (10, 3, 20, 20)
    assert pixel_values(data, images) == list(range(40, 50))


def test_image_folder_augmentation_depends_on_the_epoch_not_on_the_workers(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    alone, helped = (
        ready("imagefolder", root=str(tmp_path), batch_size=3, image_size=16, num_workers=n) for n in (0, 2)
    )

    def epoch(data: VisionData, number: int) -> list[Batch]:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return list(loader)

    expected = epoch(alone, 1)
    torch.rand(5)  # whatever happens to the global generator
    assert all(torch.equal(a[0], b[0]) for a, b in zip(expected, epoch(helped, 1), strict=True))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(expected, epoch(alone, 2), strict=True))


# --------------------------------------------------------------------------------------------------- the messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "cifar10"}, r"dataset='cifar10': expected one of digits, .*cifar-10"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"num_workers": -1}, "num_workers=-1: expected 0"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0: expected 0 to less than 1"),
        ({"image_size": 0}, "image_size=0: expected None"),
        ({"seed": -1}, "seed=-1: expected 0 or more"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionData(**arguments)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist", "cifar-10", "cifar-100"])
def test_no_network(tmp_path: Path, dataset: Any) -> None:
    with pytest.raises(DataError, match=rf"Could not load {dataset} from root=.*not known.*put them there by hand"):
        VisionData(dataset, root=str(tmp_path)).prepare_data()


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("size", [0, 3, 1000])
def test_a_truncated_download_is_explained(tmp_path: Path, size: int) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DataError, match=r"Could not load mnist from root=.*delete them to download them again"):
        VisionData("mnist", root=str(tmp_path)).prepare_data()


def test_npz_files_are_checked(tmp_path: Path) -> None:
    def message(**changes: Any) -> str:
        arrays = {"x_train": np.zeros((4, 8, 8), np.uint8), "y_train": np.arange(4)}
        arrays |= {"x_test": np.zeros((2, 8, 8), np.uint8), "y_test": np.arange(2)} | changes
        np.savez(tmp_path / "x.npz", **{name: array for name, array in arrays.items() if array is not None})
        with pytest.raises(DataError) as error:
            _ = VisionData("npz", root=str(tmp_path / "x.npz")).num_classes
        return str(error.value)

    assert "y_test" in message(y_test=None)
    assert "float64 (4, 8, 8): expected square uint8" in message(x_train=np.zeros((4, 8, 8)))
    assert "expected square uint8" in message(x_train=np.zeros((4, 8, 9), np.uint8))
    assert "an integer from 0 for each of the 4" in message(y_train=np.arange(3))
    assert "y_train" in message(y_train=np.array([0, 1, 2, -1]))
    assert "y_test" in message(y_test=np.array([0.0, 1.0]))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"root='.*none.npz' is not a file"):
        ready("npz", root=str(tmp_path / "none.npz"))
    path = Path(write_npz(tmp_path / "x.npz"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"Could not read x_train, .*x\.npz"):
        ready("npz", root=str(path))


def test_image_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Expected .*/train/<class>/\*\.jpg"):
        _ = VisionData("imagefolder", root=str(tmp_path)).num_classes
    write_image_folder(tmp_path, ("train",))
    with pytest.raises(DataError, match=r"No such file.*val.*Expected .*/val/<class>"):
        ready("imagefolder", root=str(tmp_path))
    write_image_folder(tmp_path, ("val",))
    (tmp_path / "val" / "owl").rename(tmp_path / "val" / "eagle")
    with pytest.raises(DataError, match=r"different classes.*'owl'"):
        ready("imagefolder", root=str(tmp_path))


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    image = tmp_path / "val" / "dog" / "1.png"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(DataError, match=r"val/dog/1\.png cannot be read"):
        list(ready("imagefolder", root=str(tmp_path), image_size=8).val_dataloader())
