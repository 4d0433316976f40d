"""The fallbacks for private interfaces of torch do what these do."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_optim import private

TENSORS = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 1, 2), torch.randn(())]


def test_joining_and_splitting() -> None:
    vector = private.flatten_fallback(TENSORS)
    torch.testing.assert_close(vector, private.flatten(TENSORS), rtol=0, atol=0)
    parts = private.unflatten_fallback(vector, TENSORS)
    for part, expected, x in zip(parts, private.unflatten(vector, TENSORS), TENSORS):
        assert torch.equal(part, expected)
        assert torch.equal(part, x)
    assert all(part.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr() for part in parts)


@pytest.mark.parametrize("order", [2, math.inf])
def test_norms(order: float) -> None:
    found, expected = (f(TENSORS, order, torch.float64) for f in (private.norms_fallback, private.norms))
    # Sums of a few float64 squares, added up in another order at most.
    torch.testing.assert_close(list(found), list(expected), rtol=1e-14, atol=0)


def test_copies() -> None:
    targets = [torch.zeros_like(x) for x in TENSORS]
    private.copy_fallback(targets, TENSORS)
    assert all(map(torch.equal, targets, TENSORS))


def test_views() -> None:
    vector = torch.arange(6.0)
    parts = [vector[:2], vector[2:]]
    assert private.are_views(parts, [0, 2], vector)
    assert not private.are_views(parts, [0, 3], vector)
    assert not private.are_views([torch.zeros(2)], [0], vector)
    assert private.base(vector) is None
