"""torch's global settings are after a step what they were before, and none of them reaches what has to be exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from lightning_optim.devices import full_precision

from ..optimizers.drive import settings
from ..optimizers.rows import OURS, build, network, run


def new(backend: str, precision: str) -> Callable[[], None]:
    return lambda: setattr(getattr(torch.backends, backend).matmul, "fp32_precision", precision)


#: Ways in which users ask for faster products; the newer interface can say what the older cannot.
WAYS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "cuda.matmul = tf32": new("cuda", "tf32"),
    "mkldnn.matmul = bf16": new("mkldnn", "bf16"),
}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = [(m, m.fp32_precision) for m in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]
    yield
    torch.set_float32_matmul_precision("highest")
    for matmul, precision in before:
        matmul.fp32_precision = precision


@pytest.mark.parametrize("way", WAYS)
def test_full_precision_is_consistent_inside_and_gone_afterwards(way: str) -> None:
    WAYS[way]()
    before = settings()
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(torch.zeros(1)):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert settings() == before


@pytest.mark.parametrize("way", ["nothing", "medium", "mkldnn.matmul = bf16"])
@pytest.mark.parametrize("name", OURS)
def test_a_step_leaves_the_settings_alone(name: str, way: str) -> None:
    params = list(network().parameters())
    optimizer = build(name, params)
    WAYS[way]()
    before = settings()
    run(optimizer, params, range(2))
    assert settings() == before


@pytest.mark.parametrize("name", ["SOAP", "DeVA"])
def test_faster_products_do_not_reach_eigenbases(name: str) -> None:
    def trained() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(64, 64, generator=generator))]
        arguments = {} if name == "SOAP" else {"orthogonalizer": "exact"}
        optimizer = build(name, params, **arguments)
        run(optimizer, params, range(3))
        return [p.detach() for p in params]

    expected = trained()
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = trained()
    assert all(map(torch.equal, expected, found))
