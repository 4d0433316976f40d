"""Where the host does not know yet whether gradients are finite, results are chosen in place, by one pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim.engine import gradients

from .drive import build

SHAPE = (60, 50)


class Passes(TorchDispatchMode):
    """Counts copies and selections of tensors of the matrix's size."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if isinstance(out, Tensor) and out.numel() == SHAPE[0] * SHAPE[1]:
            self.counts[name] += 1
        return out


@pytest.mark.parametrize(
    ("name", "dtype", "rounding"),
    [
        ("Muon", torch.float32, "nearest"),
        ("NAMO", torch.float32, "nearest"),
        ("Muon", torch.bfloat16, "nearest"),
        ("NorMuon", torch.bfloat16, "split"),
        ("SOAP", torch.float32, "nearest"),
    ],
)
def test_nothing_is_selected_and_then_copied(
    name: str, dtype: torch.dtype, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(known: bool) -> tuple[Counter[str], list[Tensor]]:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(SHAPE).to(dtype))
        optimizer = build(name, [p], rounding=rounding)
        monkeypatch.setattr(gradients, "_known_on_host", lambda grads: known)
        for _ in range(3):
            p.grad = torch.randn(SHAPE).to(dtype)
            with Passes() as passes:
                optimizer.step()
        optimizer.settle()
        state = [x for key, x in optimizer.state[p].items() if key != "step"]
        return passes.counts, [p.detach(), *state]

    known, expected = step(True)
    unknown, found = step(False)
    assert all(map(torch.equal, expected, found))
    assert unknown["copy_"] <= known["copy_"]  # No more of these than where the host knows.
    assert unknown["where"] > known["where"]
