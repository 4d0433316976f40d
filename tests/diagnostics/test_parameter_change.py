"""Sums over the elements of parameters."""

from __future__ import annotations

import pytest
import torch

from lightning_optim.diagnostics.parameter_change import inner_products, sum_of_squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(10_000, 1_000), (1_000, 100, 10, 10), (10_000_000,)])
def test_sums_of_large_tensors_are_right(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Equal elements are the worst case, since all roundings of a sum are to the same side: one sum over all of them
    # loses 1.5 %, and one over a block 1e-4.
    x = torch.full(shape, 0.1, dtype=dtype)
    y = x.float()
    for like in (x, x.transpose(0, -1)):
        assert sum_of_squares([like]).item() == pytest.approx(x.double().square().sum().item(), rel=1e-4)
        assert inner_products([y], [x]).item() == pytest.approx((y.double() * x).sum().item(), rel=1e-4)


def test_sums_are_at_least_float32_whatever_stands_beside() -> None:
    # 1 + 2^-9 is no bfloat16, and 1 + 2^-24 no float32.
    small, large = torch.ones(513, dtype=torch.bfloat16), torch.tensor([1.0, 2.0**-12], dtype=torch.float64)
    assert sum_of_squares([small]).tolist() == [513.0]
    # squares of norms, rounded twice
    assert sum_of_squares([small, large]).tolist() == pytest.approx([513.0, 1 + 2.0**-24], rel=1e-15)
