"""Other libraries' optimizers for matrices, by dotted path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import build_optimizer
from lightning_optim.peers import entry_of_role


def net() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 9))


class Hybrid(torch.optim.SGD):
    """Asks its groups for `use_muon`, as the optimizers of several libraries do."""

    def step(self, closure: Any = None) -> Any:
        assert all(isinstance(group["use_muon"], bool) for group in self.param_groups)
        return super().step(closure)


PATHS = [
    (f"{__name__}.Hybrid", "use_muon"),
    ("timm.optim.muon.Muon", "use_fallback"),
    ("pytorch_optimizer.Muon", "use_muon"),
    ("pytorch_optimizer.AdaMuon", "use_muon"),
    ("pytorch_optimizer.AdaGO", "use_muon"),
]


@pytest.mark.parametrize(("path", "entry"), PATHS)
def test_groups_say_what_is_a_hidden_matrix(path: str, entry: str) -> None:
    pytest.importorskip(path.partition(".")[0])
    model = net()
    optimizer = build_optimizer(model, path, lr=0.01)
    assert entry_of_role(type(optimizer)) == entry
    names = {p: name for name, p in model.named_parameters()}
    matrices = [names[p] for g in optimizer.param_groups if g[entry] is (entry == "use_muon") for p in g["params"]]
    assert matrices == ["1.weight"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_torchs_muon_is_pointed_to_ours() -> None:
    with pytest.raises(ValueError, match=r"matrices only, and '1\.bias' has shape \(8,\).*Use optimizer 'Muon'"):
        build_optimizer(net(), "torch.optim.Muon", lr=0.01)
    matrices = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    assert len(build_optimizer(matrices, "torch.optim.Muon", lr=0.01).param_groups) == 1


def test_others_have_no_such_entry() -> None:
    assert entry_of_role(torch.optim.AdamW) is None
