"""In which precision bases start follows from what the device takes for float64, which is measured."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from lightning_optim import devices, eigenbasis


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    yield
    devices.multiplies_float64_slowly.cache_clear()


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(("times_as_long", "slow"), [(2, False), (8, False), (32, True), (64, True)])
def test_a_device_is_asked_once_how_fast_it_is(times_as_long: int, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def seconds(device: torch.device, dtype: torch.dtype) -> float:
        asked.append(dtype)
        return times_as_long * 1e-3 if dtype == torch.float64 else 1e-3

    monkeypatch.setattr(devices, "has", lambda *_: True)
    monkeypatch.setattr(devices, "_seconds_of_product", seconds)
    assert [devices.multiplies_float64_slowly(torch.device("cuda")) for _ in range(3)] == [slow] * 3
    assert asked == [torch.float64, torch.float32]
    assert not devices.multiplies_float64_slowly(torch.device("cpu"))


def test_a_product_is_timed() -> None:
    assert 0 < devices._seconds_of_product(torch.device("cpu"), torch.float32) < 60


@pytest.mark.parametrize(
    ("slow", "length", "expected"),
    [(False, 4, torch.float64), (True, 4, torch.float64), (True, 9, torch.float32), (False, 9, torch.float64)],
)
def test_bases_of_long_axes_start_in_float32_where_float64_is_slow(
    slow: bool, length: int, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, eigh = [], torch.linalg.eigh

    def spy(x: torch.Tensor) -> object:
        seen.append(x.dtype)
        return eigh(x)

    monkeypatch.setattr(eigenbasis, "_LONG", 8)
    monkeypatch.setattr(devices, "multiplies_float64_slowly", lambda device: slow)
    monkeypatch.setattr(devices, "able", lambda x, function, dtype: x.to(dtype))
    monkeypatch.setattr(torch.linalg, "eigh", spy)
    factor = torch.randn(1, length, length, generator=torch.Generator().manual_seed(0))
    gram, basis = factor @ factor.mT, torch.empty(1, length, length)
    eigenbasis.Eigenbasis((0,), SimpleNamespace(gram0=gram, basis0=basis)).start()
    assert seen == [expected]
    rotated = basis.mT @ gram @ basis
    off_diagonal = rotated - rotated.diagonal(dim1=-2, dim2=-1).diag_embed()
    assert off_diagonal.abs().max() < 1e-4 * gram.abs().max()  # Products of nine float32 numbers.
