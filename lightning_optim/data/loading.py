"""Loaders whose order and augmentation depend on the seed, the epoch and the position, and on nothing else.

No global random state is read or advanced. A run that is resumed, in the middle of an epoch too and with any
number of workers, gets exactly the batches that it would have got without the interruption.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class BatchDataset(Dataset[tuple[Tensor, Tensor]], ABC):
    """A dataset that makes a whole batch, (inputs, targets), at once.

    A key is ``epoch * len(self) + index``: from it a dataset, in whichever process it is, knows the epoch and
    can take its random numbers from that. A plain index is a key of epoch 0.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, keys: list[int]) -> tuple[Tensor, Tensor]: ...

    def __getitem__(self, key: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([key])
        return inputs[0], targets[0]


class EpochSampler(DistributedSampler[Any]):
    """Shuffled keys of a ``BatchDataset``, for one of several processes. The next pass skips ``start`` keys."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        first_key = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        start, self.start = self.start, 0
        return (first_key + index for index in islice(super().__iter__(), start, None))


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` over an ``EpochSampler`` that Lightning saves and resumes in the middle of an epoch."""

    _fetched = 0
    _resumed: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator on purpose: its body runs at the first `next`. A resuming Lightning asks for the
        # iterator before it tells the sampler the epoch, and workers would at once prefetch batches of the
        # wrong one.
        state, self._resumed = self._resumed, None
        self._fetched = state["fetched"] if state and state["epoch"] == self._epoch else 0
        numbers = torch.get_rng_state()
        skipped = 0
        if self._fetched and isinstance(self.sampler, EpochSampler):
            self.sampler.start = self._fetched * self.batch_size  # type: ignore[operator]
        else:  # With `overfit_batches`, Lightning replaces our sampler by a sequential one.
            skipped = self._fetched
        batches = islice(super().__iter__(), skipped, None)
        if self._fetched:
            # Without a generator of its own, a loader draws a seed for its workers from torch's. That was done when the
            # epoch began.
            torch.set_rng_state(numbers)
        for batch in batches:
            self._fetched += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return self._resumed or {"epoch": self._epoch, "fetched": self._fetched}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resumed = state

    def rewind(self, state: dict[str, int]) -> None:
        """Put a state one batch back."""
        state["fetched"] -= 1

    @property
    def _epoch(self) -> int:
        return getattr(self.sampler, "epoch", 0)


class BatchDataModule(pl.LightningDataModule):
    """The four loaders over the datasets that the ``setup`` of a subclass makes."""

    train_set: BatchDataset
    val_set: BatchDataset
    test_set: BatchDataset
    predict_set: Dataset[tuple[Tensor, Tensor]]

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        check("batch_size", batch_size, batch_size >= 1, "at least 1")
        check("num_workers", num_workers, num_workers >= 0, "0, to load in the training process, or more")
        check("seed", seed, seed >= 0, "0 or more")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Any]:
        alone = {"num_replicas": 1, "rank": 0}
        processes = (self.trainer and self.trainer.distributed_sampler_kwargs) or alone
        sampler = EpochSampler(self.train_set, seed=run_seed(self.seed), **processes)
        # Batches of one size, unless that would leave none.
        drop_last = len(sampler) >= self.batch_size
        return ResumableLoader(self.train_set, sampler=sampler, drop_last=drop_last, **self._options)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, **self._options)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test_set, **self._options)

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.predict_set, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": _as_it_is,
            # Without a generator of its own, a loader advances torch's global one.
            "generator": torch.Generator().manual_seed(run_seed(self.seed)),
        }


def run_seed(seed: int) -> int:
    """The seed of order and augmentation: ``seed`` mixed with that of Lightning's ``seed_everything``, else 0."""
    return int(np.random.SeedSequence((seed, int(os.environ.get("PL_GLOBAL_SEED", 0)))).generate_state(1)[0])


def check(argument: str, value: object, is_valid: bool, expected: str) -> None:
    """Raises a ValueError that names the argument, its value and what is expected, unless ``is_valid``."""
    if not is_valid:
        raise ValueError(f"{argument}={value!r}: expected {expected}.")


def _as_it_is(batch: Any) -> Any:
    return batch
