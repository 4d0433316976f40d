"""What is seen of parameters in one step, what differs from their routes, and that routing by it is right."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim import Grouping, build_optimizer
from lightning_optim.callbacks import RoutingCheck
from lightning_optim.engine.layout import matrices_in
from lightning_optim.seen import Use, differences, grouping_line, mended, record_uses


class Case(nn.Module):
    """A layer with a weight ``w`` whose use routing cannot know, and a head."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape) / 4)
        self.use = use
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(x, self.w))


def grouped(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = F.linear(x, w).split((8, 4, 4), -1)
    return q + torch.cat([k, v], -1)


def sliced(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return y[..., :8] * y[..., 8:12].mean() + y[..., 12:].mean()


def gated(x: Tensor, w: Tensor) -> Tensor:
    gate, up = F.linear(x, w).chunk(2, -1)
    return F.silu(gate) * up


def alternating(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return F.silu(y[..., ::2]) * y[..., 1::2]


def viewed(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = F.linear(x, w).view(*x.shape[:-1], 3, 2, 4).permute(1, 0, 2, 3).unbind(0)
    return (q + k + v).flatten(-2)


def loop_over_experts(x: Tensor, w: Tensor) -> Tensor:
    return sum(F.linear(x, w[i]) for i in range(len(w)))  # type: ignore[return-value]


def batched_experts(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(x.expand(len(w), *x.shape), w).sum(0)


def gated_experts(x: Tensor, w: Tensor) -> Tensor:
    gate, up = torch.bmm(x.expand(len(w), *x.shape), w).chunk(2, -1)
    return (F.silu(gate) * up).sum(0)


def by_einsum(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bi,hio->bho", x, w).sum(1)


CASES: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "matrix": ((8, 8), F.linear, {"blocks": 1, "transposed": False}),
    "stored (in, out)": ((8, 8), lambda x, w: x @ w, {"blocks": 1, "transposed": True}),
    "queries, keys and values": ((16, 8), grouped, {"blocks": 1, "transposed": False, "split": (8, 4, 4)}),
    "slices": ((8, 16), sliced, {"blocks": 1, "transposed": True, "split": (8, 4, 4)}),
    "gate and up": ((16, 8), gated, {"blocks": 2, "transposed": False}),
    "views": ((24, 8), viewed, {"blocks": 3, "transposed": False}),
    "a loop over experts": ((3, 8, 8), loop_over_experts, {"blocks": 3, "transposed": False}),
    "a batch of experts": ((3, 8, 8), batched_experts, {"blocks": 3, "transposed": True}),
    "gated experts": ((3, 8, 16), gated_experts, {"blocks": 3, "transposed": True, "split": (8, 8)}),
    "einsum": ((3, 8, 8), by_einsum, {"blocks": 3, "transposed": True}),
}


def recorded(model: nn.Module, *inputs: Tensor) -> tuple[dict[str, Use], Tensor]:
    with record_uses(model) as uses:
        loss = F.cross_entropy(model(*inputs), torch.zeros(len(inputs[0]), dtype=torch.long))
    return uses, loss


@pytest.mark.parametrize("name", CASES)
def test_routing_by_what_was_seen(name: str) -> None:
    shape, use, layout = CASES[name]
    model = Case(shape, use)
    uses, _ = recorded(model, torch.randn(4, 8))
    found = differences(Grouping().route(model), uses)
    assert found[0].setting == "matrix"  # Nothing says what a bare parameter is.
    routes = mended(Grouping(), found).route(model)
    assert routes["w"].layout == layout
    assert routes["w"].role == "matrix"
    assert differences(routes, uses) == []
    assert sum(x.numel() for x in matrices_in(model.w, routes["w"].layout)) == model.w.numel()


def test_rows_that_alternate_are_said() -> None:
    model = Case((8, 16), alternating)
    uses, _ = recorded(model, torch.randn(4, 8))
    assert (uses["w"].parts, uses["w"].interleaved) == ((8, 8), True)


def test_rotary_embeddings_do_not_split_a_projection() -> None:
    def rotate(x: Tensor, w: Tensor) -> Tensor:
        q = F.linear(x, w).view(len(x), 2, 4)
        half = torch.cat([-q[..., 2:], q[..., :2]], -1)
        return (q * 0.6 + half * 0.8).flatten(1)

    uses, _ = recorded(Case((8, 8), rotate), torch.randn(4, 8))
    assert uses["w"].parts == ()


class Roles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 4)  # makes the output, and is not registered last
        self.gate = nn.Linear(8, 4)
        self.table = nn.Linear(8, 5)  # is looked up
        self.scale = nn.Linear(8, 8)  # scales
        self.hidden = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x) * self.scale.weight.sum(0) + F.embedding(
            torch.zeros(len(x), dtype=torch.long), self.table.weight
        )
        weights, _ = self.gate(x).softmax(-1).topk(2)
        return self.scores(x * weights.sum(-1, keepdim=True))


def test_roles_that_only_the_step_shows() -> None:
    model = Roles()
    uses, _ = recorded(model, torch.randn(4, 8))
    found = {x.name: (x.setting, x.what) for x in differences(Grouping().route(model), uses)}
    assert found == {
        "scores.weight": ("fallback", "makes the output"),
        "gate.weight": ("fallback", "ranks experts"),
        "table.weight": ("fallback", "is not multiplied with (look-up)"),
        "scale.weight": ("fallback", "is not multiplied with (other)"),
    }
    assert uses["unused.weight"].words == "not used"


def test_recording_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Dropout(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), Case((8, 8), F.linear)
    )
    x = torch.randn(4, 8)
    results = []
    for watch in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        if watch:
            _, loss = recorded(model, x)
        else:
            loss = F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long))
        loss.backward()
        results.append([loss.detach(), torch.get_rng_state(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


# --- in training ------------------------------------------------------------------------------------------------------


class Model(pl.LightningModule):
    def __init__(self, grouping: Grouping | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Case((16, 8), grouped) for _ in range(2))
        for layer in self.layers:
            layer.last = nn.Linear(8, 8)  # type: ignore[assignment]
        self.out = nn.Linear(8, 3)
        self.grouping = grouping

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return F.cross_entropy(self(batch), torch.zeros(len(batch), dtype=torch.long))

    def configure_optimizers(self) -> Any:
        return build_optimizer(self, "NAMO", self.grouping, lr=0.01)


def fit(model: Model) -> tuple[list[str], RoutingCheck]:
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader(torch.randn(12, 8), batch_size=4))
    (check,) = [x for x in trainer.callbacks if isinstance(x, RoutingCheck)]
    return [str(x.message) for x in caught if "otherwise than they are routed" in str(x.message)], check


def test_one_warning_in_the_first_step_names_the_grouping_that_mends_it() -> None:
    said, check = fit(Model())
    (message,) = said
    line = re.search(r"Grouping\(.*\)", message)
    assert line
    assert line[0] == grouping_line(check.differences)
    assert line[0] == "Grouping(matrix=['layers.*.w'], split={'layers.*.w': [8, 4, 4]})"
    mended_model = Model(eval(line[0]))
    said, check = fit(mended_model)
    assert (said, check.differences) == ([], [])


COMMAND = """
import torch
from torch import nn
from tests.test_seen import Case, grouped

class Net(Case):
    def __init__(self):
        super().__init__((16, 8), grouped)

def batch():
    return torch.randn(4, 8)
"""


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(COMMAND)
    script = Path(sys.executable).with_name("lightning-optim")
    run = [script, "route", "mine.Net", "--batch", "mine.batch"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        run, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": root, "PATH": "/usr/bin"}
    )
    assert done.returncode == 0, done.stderr
    assert "| `w`           | 16 x 8 | fallback | other | " in done.stdout
    assert "To route by what was seen: Grouping(matrix=['w'], split={'w': [8, 4, 4]})" in done.stdout
