"""Half of a symmetric product and its mirror image are the product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_optim.polar import products


@pytest.mark.parametrize("halved", [False, True])
@settings(max_examples=30, deadline=None)
@given(
    k=st.integers(1, 3),
    m=st.integers(1, 20),
    n=st.integers(1, 9),
    added=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 999),
)
def test_it_is_the_product(halved: bool, k: int, m: int, n: int, added: bool, in_place: bool, seed: int) -> None:
    x = torch.randn(k, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plus = x @ x.mT if added else None
    out = (plus if added else torch.empty(k, m, m, dtype=torch.float64)) if in_place else None
    expected = x @ x.mT if plus is None else 3.0 * plus + 0.5 * x @ x.mT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_halving_pays", lambda x: halved)
        result = products.symmetric_product(x, x.mT, plus, beta=3.0, alpha=0.5)
        again = products.symmetric_product(x, x.mT, plus, beta=3.0, alpha=0.5, out=out)
    for found in (result, again):  # float64, other orders of summation
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert out is None or again is out


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 4000), n=st.integers(1, 4000), k=st.integers(1, 100))
def test_small_products_and_other_devices_are_left_whole(m: int, n: int, k: int) -> None:
    x = torch.empty(k, m, n, device="meta")
    assert not products._halving_pays(x)
    assert m >= 192 or not products._halving_pays(torch.empty(1).expand(k, m, n))
