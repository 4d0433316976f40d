"""Images for classification."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import datasets
from torchvision.transforms import v2

from lightning_optim.data.cache import DataError, locked
from lightning_optim.data.loading import BatchDataModule, BatchDataset, check, run_seed

ImageSet = Literal["digits", "mnist", "fashion-mnist", "cifar-10", "cifar-100", "imagefolder", "npz"]


@dataclass(frozen=True)
class Recipe:
    """What the images of a set are, and how they are prepared.

    ``mean`` and ``std`` are those of the training images, per channel, on a scale of 0 to 1. In training an image is
    moved by up to ``shift`` pixels in each direction and, where ``flip`` is true, mirrored half of the time.
    """

    in_chans: int
    num_classes: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int
    flip: bool


_RECIPES = {
    "digits": Recipe(1, 10, 8, (0.3053,), (0.3759,), shift=1, flip=False),
    "mnist": Recipe(1, 10, 28, (0.1307,), (0.3081,), shift=2, flip=False),
    "fashion-mnist": Recipe(1, 10, 28, (0.2860,), (0.3530,), shift=2, flip=True),
    "cifar-10": Recipe(3, 10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), shift=4, flip=True),
    "cifar-100": Recipe(3, 100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), shift=4, flip=True),
}
_TORCHVISION: dict[str, Callable[..., Any]] = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "cifar-10": datasets.CIFAR10,
    "cifar-100": datasets.CIFAR100,
}
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DIGITS_TEST = 360


class VisionData(BatchDataModule):
    """Image classification data. A batch is (images float32 (b, channels, size, size), labels int64 (b,)).

    Data sets, where they come from, and their licences:

    - ``digits``: 1,797 grey 8x8 digits inside scikit-learn, no network needed; 360 of them, always the same,
      are for testing. UCI Optical Recognition of Handwritten Digits, CC BY 4.0.
    - ``mnist``: 60,000 + 10,000 grey 28x28 digits, by torchvision. CC BY-SA 3.0.
    - ``fashion-mnist``: 60,000 + 10,000 grey 28x28 pieces of clothing in 10 classes, by torchvision. MIT.
    - ``cifar-10``, ``cifar-100``: 50,000 + 10,000 colour 32x32 photographs, by torchvision. No stated licence.
    - ``imagefolder``: your own ``root/train/<class>/*.jpg`` and ``root/val/<class>/*.jpg``; ``root/test`` is
      for testing where it exists, else ``root/val`` is.
    - ``npz``: your own; ``root`` is a file of the arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``:
      square uint8 images (n, size, size) or (n, size, size, channels), and integer labels from 0.

    What torchvision has is downloaded into ``root`` unless it is there: a folder ``root/FashionMNIST/raw``
    with the four ``*-ubyte`` files, put there by hand, needs no network.

    All but ``imagefolder`` are held in memory as uint8 and prepared a batch at a time, which is fast enough
    in the training process. Training images are moved by a few pixels with zeros outside (8x8: 1, 28x28: 2,
    32x32: 4; ``npz``: an eighth of the size), clothes and colour images also mirrored. ``imagefolder`` has
    the usual treatment of ImageNet: a random resized crop, mirrored or not; for evaluation the shorter side
    is resized to 256/224 of ``image_size`` and the middle cut out. Images are normalised with the mean and
    standard deviation of the training set (``imagefolder``: of ImageNet).

    The split depends on ``seed``; order and augmentation on it, Lightning's ``seed_everything`` and the epoch.

    Args:
        dataset: One of the above.
        root: The folder that holds the data or receives the download; for ``npz`` the file.
        batch_size: Images per batch and process.
        num_workers: Processes that load images; of use for ``imagefolder``.
        augment: Whether training images are moved, cropped and mirrored.
        validation_fraction: Part of the training images set aside for validation, 0 <= f < 1. With 0,
            training takes all of them and validation the test images, as most papers do. Not used by
            ``imagefolder``.
        image_size: Height and width, in pixels, of what is given out. None: as stored (``imagefolder``: 224).
        seed: See above.

    Attributes:
        in_chans: Channels. This, ``num_classes`` and ``image_size`` (pixels) are known before any download.
        num_classes: Classes.

    Raises:
        ValueError: For an argument out of its range.
        DataError: For files that are missing, corrupt or cannot be downloaded.

    Example:
        >>> data = VisionData("digits", batch_size=32)
        >>> data.in_chans, data.num_classes, data.image_size
        (1, 10, 8)
        >>> data.prepare_data(); data.setup()
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    def __init__(
        self,
        dataset: ImageSet = "digits",
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        augment: bool = True,
        validation_fraction: float = 0.1,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check("dataset", dataset, dataset in get_args(ImageSet), f"one of {', '.join(get_args(ImageSet))}")
        check("validation_fraction", validation_fraction, 0 <= validation_fraction < 1, "0 to less than 1")
        check("image_size", image_size, image_size is None or image_size >= 1, "None, or at least 1 pixel")
        self.save_hyperparameters(logger=False)  # the model logs what both have
        self.dataset = dataset
        self.root = Path(root).expanduser()
        self.augment = augment
        self.validation_fraction = validation_fraction
        self._image_size = image_size

    @property
    def in_chans(self) -> int:
        return self.recipe.in_chans

    @property
    def num_classes(self) -> int:
        return self.recipe.num_classes

    @property
    def image_size(self) -> int:
        return self._image_size or self.recipe.image_size

    @cached_property
    def recipe(self) -> Recipe:
        """What is known of the data set, by its name or from your own files."""
        if self.dataset == "npz":
            return _npz_recipe(*_read_npz(self.root))
        if self.dataset == "imagefolder":
            with self._explained():
                classes, _ = datasets.folder.find_classes(self.root / "train")
            return Recipe(3, len(classes), 224, _IMAGENET_MEAN, _IMAGENET_STD, shift=0, flip=True)
        return _RECIPES[self.dataset]

    def prepare_data(self) -> None:
        if self.dataset in _TORCHVISION:
            try:
                self._read_torchvision()
            except DataError:
                with locked(self.root / self.dataset):
                    self._read_torchvision(download=True)

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "train_set"):
            return
        if self.dataset == "imagefolder":
            self._setup_folders()
        else:
            self._setup_arrays()
        self.predict_set = self.test_set

    def _setup_arrays(self) -> None:
        if self.dataset == "digits":
            train, test = _read_digits()
        elif self.dataset == "npz":
            train, test = _read_npz(self.root)
        else:
            train, test = self._read_torchvision()
        rows = np.random.default_rng(self.seed).permutation(len(train.labels))
        n_validation = round(len(rows) * self.validation_fraction)
        self.train_set = self._array_set(train.take(rows[n_validation:]), self.augment)
        self.test_set = self._array_set(test)
        self.val_set = self._array_set(train.take(rows[:n_validation])) if n_validation else self.test_set

    def _array_set(self, arrays: Arrays, augment: bool = False) -> ArrayDataset:
        return ArrayDataset(arrays, self.recipe, self.image_size, augment, run_seed(self.seed))

    def _setup_folders(self) -> None:
        size = self.image_size
        middle = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
        random = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        self.train_set = self._folder_set("train", random if self.augment else middle)
        self.val_set = self._folder_set("val", middle)
        self.test_set = self._folder_set("test", middle) if (self.root / "test").is_dir() else self.val_set
        classes = self.train_set.folder.classes
        if not classes == self.val_set.folder.classes == self.test_set.folder.classes:
            raise DataError(f"The folders in {self.root} have different classes. Give each of them {classes}.")

    def _folder_set(self, split: str, steps: list[v2.Transform]) -> FolderDataset:
        to_floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        transform = v2.Compose([*steps, *to_floats, v2.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)])
        with self._explained():
            folder = datasets.ImageFolder(self.root / split, transform)
        return FolderDataset(folder, run_seed(self.seed))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            layout = f"{self.root}/train/<class>/*.jpg and {self.root}/val/<class>/*.jpg"
            raise DataError(f"{error}. Expected {layout}: correct `root` or the folders.") from error

    def _read_torchvision(self, download: bool = False) -> tuple[Arrays, Arrays]:
        make = _TORCHVISION[self.dataset]
        try:
            train, test = (make(self.root, train=train, download=download) for train in (True, False))
        except Exception as error:  # from URLError to a reshape of too few bytes, whatever it meets
            reason = " ".join(str(error).split())  # on one line
            raise DataError(
                f"Could not load {self.dataset} from root={str(self.root)!r}: {reason}. If its files are there, "
                "delete them to download them again. Without a network, put them there by hand."
            ) from error
        return Arrays.of(train.data, train.targets), Arrays.of(test.data, test.targets)


class Arrays(NamedTuple):
    """Images uint8 (n, channels, size, size) and labels int64 (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, images: ArrayLike, labels: ArrayLike) -> Arrays:
        """Takes images without a channel axis, or with it last."""
        images = np.asarray(images)
        images = images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return cls(images, np.asarray(labels, np.int64))

    def take(self, rows: NDArray[np.integer[Any]]) -> Arrays:
        return Arrays(self.images[rows], self.labels[rows])


class ArrayDataset(BatchDataset):
    """Images in memory; a batch of them is cut out, augmented and normalised at once.

    In numpy, on one thread: torch's threads, fighting for the cores of a busy machine, can be many times
    slower.
    """

    def __init__(self, arrays: Arrays, recipe: Recipe, image_size: int, augment: bool, seed: int) -> None:
        self.arrays = arrays
        self.shift = recipe.shift if augment else 0
        self.flip = recipe.flip and augment
        self.mean = np.array(recipe.mean, np.float32).reshape(-1, 1, 1) * 255
        self.std = np.array(recipe.std, np.float32).reshape(-1, 1, 1) * 255
        self.image_size = image_size
        self.seed = seed

    def __len__(self) -> int:
        return len(self.arrays.labels)

    def __getitems__(self, keys: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = self.arrays.take(np.asarray(keys) % len(self))
        if self.shift or self.flip:
            # The batches of a run begin with different keys.
            rng = np.random.default_rng((self.seed, keys[0]))
            images = shift_and_flip(images, self.shift, self.flip, rng)
        pixels = torch.from_numpy((images - self.mean) / self.std)
        if pixels.shape[-1] != self.image_size:
            pixels = v2.functional.resize(pixels, [self.image_size, self.image_size])
        return pixels, torch.from_numpy(labels)


def shift_and_flip(images: NDArray[np.uint8], shift: int, flip: bool, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Moves each image by its own random -shift ... shift pixels, down and right, and mirrors each or not.

    The same as padding with zeros, a random crop and a random flip, image by image.

    Args:
        images: (n, channels, height, width).
        shift: Largest move in pixels.
        flip: Whether to mirror, with probability 1/2 each.
        rng: Where the random numbers come from.

    Returns:
        New images of the same shape.
    """
    n, _, height, width = images.shape
    corners = rng.integers(2 * shift + 1, size=(n, 2)).tolist()
    mirrored = np.less(rng.random(n), 0.5 if flip else 0)
    padded = np.pad(images, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
    moved = np.empty_like(images)
    for i, (top, left) in enumerate(corners):
        crop = padded[i, :, top : top + height, left : left + width]
        moved[i] = crop[:, :, ::-1] if mirrored[i] else crop
    return moved


class FolderDataset(BatchDataset):
    """Images decoded one by one from their files, each transformed with random numbers of its own."""

    def __init__(self, folder: datasets.ImageFolder, seed: int) -> None:
        self.folder = folder
        self.seed = seed

    def __len__(self) -> int:
        return len(self.folder)

    def __getitems__(self, keys: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = default_collate([self._load(key) for key in keys])
        return images, labels

    def _load(self, key: int) -> tuple[Tensor, int]:
        seed = np.random.SeedSequence((self.seed, key)).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            try:
                return self.folder[key % len(self)]
            except OSError as error:
                path, _ = self.folder.samples[key % len(self)]
                raise DataError(f"The image {path} cannot be read: {error}. Replace or delete it.") from error


def _read_digits() -> tuple[Arrays, Arrays]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    arrays = Arrays.of(np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target)
    rows = np.random.default_rng(0).permutation(len(arrays.labels))
    return arrays.take(rows[_DIGITS_TEST:]), arrays.take(rows[:_DIGITS_TEST])


def _read_npz(path: Path) -> tuple[Arrays, Arrays]:
    if not path.is_file():
        raise DataError(f"root={str(path)!r} is not a file. For dataset='npz', `root` is the .npz file.")
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    except Exception as error:  # BadZipFile, zlib.error, EOFError, KeyError, ValueError, ...
        raise DataError(
            f"Could not read x_train, y_train, x_test, y_test from {path}: {error}. Write it anew."
        ) from error
    for split in ("train", "test"):
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[1] != images.shape[2]:
            raise DataError(
                f"x_{split} of {path} is {images.dtype} {images.shape}: expected square uint8 images, "
                "(n, size, size) or (n, size, size, channels)."
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or min(labels, default=-1) < 0:
            raise DataError(
                f"y_{split} of {path} is {labels.dtype} {labels.shape}: expected an integer from 0 for each "
                f"of the {len(images)} images."
            )
    return Arrays.of(arrays["x_train"], arrays["y_train"]), Arrays.of(arrays["x_test"], arrays["y_test"])


def _npz_recipe(train: Arrays, test: Arrays) -> Recipe:
    _, channels, _, size = train.images.shape
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(train.images[:, c].ravel(), minlength=256) for c in range(channels)])
    frequencies = counts / counts.sum(1, keepdims=True)
    mean = frequencies @ values
    std = np.sqrt(np.maximum(frequencies @ values**2 - mean**2, 1e-6))  # a constant channel stays finite
    return Recipe(
        in_chans=channels,
        num_classes=int(max(train.labels.max(), test.labels.max())) + 1,
        image_size=size,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        shift=size // 8,
        flip=channels == 3,
    )
