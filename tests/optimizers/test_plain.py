"""Values of configuration libraries, as constructors and parameter groups take them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightning_optim as lo


class ListLike(Sequence[Any]):
    """A sequence that is neither a list nor a tuple, as OmegaConf's and ml_collections' are."""

    def __init__(self, *values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, i: Any) -> Any:
        return self._values[i]


def omegaconf(*values: float) -> Any:
    return pytest.importorskip("omegaconf").OmegaConf.create({"x": list(values)}).x


BETAS: dict[str, Callable[[], Any]] = {
    "a list": lambda: [0.5, 0.75],
    "a sequence of another class": lambda: ListLike(0.5, 0.75),
    "an array": lambda: np.array([0.5, 0.75]),
    "NumPy's numbers": lambda: (np.float32(0.5), np.float64(0.75)),
    "strings, as YAML reads 5e-1": lambda: ["5e-1", "75e-2"],
    "OmegaConf's list": lambda: omegaconf(0.5, 0.75),
}


@pytest.mark.parametrize("what", BETAS)
@pytest.mark.parametrize("door", ["constructor", "group", "add_param_group"])
def test_betas_become_two_plain_numbers(door: str, what: str) -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    betas = BETAS[what]()
    if door == "constructor":
        optimizer = lo.MVNGrad([p], betas=betas, lr=np.float64(0.25))
    elif door == "group":
        optimizer = lo.MVNGrad([{"params": [p], "betas": betas, "lr": np.float64(0.25)}])
    else:
        optimizer = lo.MVNGrad([q])
        optimizer.add_param_group({"params": [p], "betas": betas, "lr": np.float64(0.25)})
    group = optimizer.param_groups[-1]
    assert group["betas"] == (0.5, 0.75)
    assert [type(x) for x in (group["betas"], *group["betas"], group["lr"])] == [tuple, float, float, float]
    p.grad = torch.ones(3)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][-1]["betas"] == (0.5, 0.75)


@pytest.mark.parametrize("values", [ListLike(0.5), ListLike(0.5, 1.5), ListLike("a", "b"), np.array([0.5, 0.5, 0.5])])
def test_what_is_not_two_numbers_is_refused_whatever_holds_it(values: Any) -> None:
    with pytest.raises(ValueError, match="betas must be two numbers"):
        lo.MVNGrad([nn.Parameter(torch.ones(3))], betas=values)
