"""Diagnostics on two processes say what they say on one, and communicate as little as they promise.

The module is also the program that the processes run; all cases share one start, which takes longer than they do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_optim import OptimizerConfig, build_optimizer
from lightning_optim.callbacks import (
    GradientHealth,
    OptimizerInternals,
    OrthogonalityError,
    SignCollapse,
    SpikeResponse,
    UpdateSize,
    UpdateVariance,
)
from lightning_optim.callbacks.recorder import StepRecorder

STEPS = 5
MEASURED = [1, 3]  # every second step, counted from 0


class Net(nn.Module):
    """Everything that shards awkwardly: odd numbers of rows, one row, three matrices in one, convolutions, ties."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.qkv = nn.Linear(6, 18)  # two shards of nine rows cut the second of three matrices
        self.up = nn.Linear(6, 9)  # tall, five rows and four
        self.down = nn.Linear(9, 6)  # wide
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 6)  # for tensor parallelism, which wants it even
        self.wide = nn.Linear(6, 2053)  # more elements than are remembered from step to step
        self.gate = nn.Linear(6, 1)  # the second shard is empty
        self.transposed = nn.ConvTranspose2d(3, 4, 2)
        self.conv = nn.Conv2d(4, 3, 2)
        self.norm = nn.LayerNorm(6)
        self.unused = nn.Linear(6, 6) if unused else None
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens).mean(1)
        q, k, v = self.qkv(h).chunk(3, -1)
        h = h + q * k.sigmoid() + v
        h = h + self.down(F.gelu(self.up(h)))
        h = h + self.outer(F.gelu(self.inner(h)))
        h = h + self.wide(h).tanh().mean(-1, keepdim=True)
        h = h * self.gate(h).sigmoid()
        h = h + self.conv(F.gelu(self.transposed(h.view(-1, 3, 1, 2)))).flatten(1)
        return self.head(self.norm(h))


class Model(pl.LightningModule):
    def __init__(self, optimizer: str, unused: bool = False, shards: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        # In float64 the order of additions, which differs between one process and two, leaves room for no defect.
        self.net = Net(unused).double()
        self.optimizer, self.shards = optimizer, shards

    def configure_model(self) -> None:
        if self.shards == "fsdp2":
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net.qkv, self.net.up, self.net.down, self.net.conv):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        if "tensor" in self.shards:
            plan = {"inner": ColwiseParallel(), "outer": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if self.shards == "fsdp2 tensor":
            for module in (self.net.up, self.net.inner, self.net.outer, self.net.conv, self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        if self.optimizer == "NAMO":
            return build_optimizer(self, OptimizerConfig("NAMO"))
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, 11, (STEPS * 8, 5), generator=generator)
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if "tensor" in self.shards:  # Processes of a tensor-parallel group have the same batches.
            rank, processes = rank // 2, processes // 2
        tokens = tokens[rank::processes]
        return DataLoader(TensorDataset(tokens, tokens[:, 0]), batch_size=8 // processes)


class FSDP1OnCPU(FSDPStrategy):
    """Lightning refuses FSDPStrategy itself on a CPU, where it works."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=self.root_device, use_orig_params=True)


CASES: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "ddp AdamW": ({"optimizer": "AdamW"}, DDPStrategy),
    "ddp unused SGD": ({"optimizer": "SGD", "unused": True}, lambda: DDPStrategy(find_unused_parameters=True)),
    "ddp NAMO": ({"optimizer": "NAMO"}, DDPStrategy),
    "fsdp2 AdamW": ({"optimizer": "AdamW", "shards": "fsdp2"}, lambda: ModelParallelStrategy(2, 1)),
    "fsdp2 NAMO": ({"optimizer": "NAMO", "shards": "fsdp2"}, lambda: ModelParallelStrategy(2, 1)),
    "fsdp2 unused SGD": (
        {"optimizer": "SGD", "unused": True, "shards": "fsdp2"},
        lambda: ModelParallelStrategy(2, 1),
    ),
    "fsdp1 SGD": ({"optimizer": "SGD", "shards": "fsdp1"}, FSDP1OnCPU),
    "tensor AdamW": ({"optimizer": "AdamW", "shards": "tensor"}, lambda: ModelParallelStrategy(1, 2)),
}
#: On four processes.
TWO_DIMENSIONS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    f"fsdp2 tensor {name}": ({"optimizer": name, "shards": "fsdp2 tensor"}, lambda: ModelParallelStrategy(2, 2))
    for name in ("AdamW", "NAMO")
}
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier", "gather",
    "reduce", "reduce_scatter_tensor", "broadcast_object_list", "all_to_all_single",
)  # fmt: skip


def monitors(name: str) -> list[pl.Callback]:
    settings: dict[str, Any] = {"every_n_steps": 2, "layers": ["*"]}
    return [
        UpdateSize(**settings),
        UpdateVariance(**settings),
        SignCollapse(**settings),
        SignCollapse(**settings | {"parameters": ["*.weight"], "layers": []}),
        OptimizerInternals(**settings),
        GradientHealth(**settings),
        SpikeResponse(),  # looks at every step
    ] + [OrthogonalityError(**settings, polar=True)] * (not name.startswith("fsdp1"))


class CountCollectives(pl.Callback):
    """How many of each kind there have been after each batch."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.after: list[dict[str, int]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.after.append(dict(self.counts))

    def __enter__(self) -> CountCollectives:
        self.originals = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, function in self.originals.items():
            setattr(dist, name, self._counting(name, function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.originals.items():
            setattr(dist, name, function)

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return function(*args, **kwargs)

        return call


def fit(model: Model, callbacks: list[pl.Callback], **options: Any) -> dict[str, Any]:
    with CountCollectives() as collectives:
        pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=[*callbacks, collectives],
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        ).fit(model)
    history = [(i, tag, pairs) for i, m in enumerate(callbacks) for tag, pairs in m.history.items()]
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {
        "history": {f"{i} {tag}": list(pairs) for i, tag, pairs in history},
        "weights": {name: p.to_local() if isinstance(p, DTensor) else p for name, p in weights.items()},
        "collectives": collectives.after,
    }


def main(out: Path) -> None:
    """What each process does."""
    devices = int(os.environ["WORLD_SIZE"])
    for name, (settings, strategy) in (CASES if devices == 2 else TWO_DIMENSIONS).items():
        options = {"strategy": strategy(), "devices": devices}
        result = fit(Model(**settings), monitors(name), **options)
        result["without"] = fit(Model(**settings), [], **options | {"strategy": strategy()})
        torch.save(result, out / f"{name} {os.environ['RANK']}.pt")


# --- the tests ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("processes")
    for processes in (2, 4):
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*run, __file__, str(out)], capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return lambda name: [torch.load(file) for file in sorted(out.glob(f"{name} ?.pt"))]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", [*CASES, *TWO_DIMENSIONS])
def test_every_value_is_that_of_a_single_process(name: str, results: Callable[..., Any]) -> None:
    settings = (CASES | TWO_DIMENSIONS)[name][0] | {"shards": ""}
    expected = fit(Model(**settings), monitors(name))["history"]
    assert any("orthogonality_error/net.qkv.weight/2" in tag for tag in expected) is not name.startswith("fsdp1")
    assert any("internals/" in tag for tag in expected) is (settings["optimizer"] != "SGD")
    # Float64 weights agree to 1e-15 after five steps, statistics made of their differences to 1e-13. Lightning's FSDP1
    # computes in float32.
    close = 1e-5 if name.startswith("fsdp1") else 1e-11
    for result in results(name):
        # The noise scale needs several processes' gradients, or several batches per step.
        assert {tag for tag in result["history"] if "noise_scale" not in tag} == set(expected)
        for tag, pairs in expected.items():
            assert [step for step, _ in result["history"][tag]] == [step for step, _ in pairs], tag
            values = [value for _, value in pairs]
            # FSDP1 does not say which elements of a large parameter a process has, and so samples others.
            sampled = "cosine_to_previous" in tag or "variance" in tag
            near = 0.05 if name.startswith("fsdp1") and sampled else close
            assert [value for _, value in result["history"][tag]] == pytest.approx(values, rel=near, abs=near), tag
        # The spike response looks at every step, and says at the first one how large gradients are.
        measured = {step for tag, pairs in result["history"].items() if "spike/" not in tag for step, _ in pairs}
        assert measured == set(MEASURED)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_noise_scale_of_processes_is_that_of_micro_batches(results: Callable[..., Any]) -> None:
    class InTurn(Model):
        """The batches of two processes one after the other."""

        def train_dataloader(self) -> DataLoader[Any]:
            whole = super().train_dataloader().dataset
            order = [8 * step + 2 * i + rank for step in range(STEPS) for rank in (0, 1) for i in range(4)]
            return DataLoader(Subset(whole, order), batch_size=4)

    expected = fit(InTurn("AdamW"), monitors("ddp AdamW"), accumulate_grad_batches=2)["history"]
    [tag] = [tag for tag in expected if "noise_scale" in tag]
    for result in results("ddp AdamW"):
        values = [value for _, value in result["history"][tag]]
        # Float64, and differences of norms that are about as large.
        assert values == pytest.approx([value for _, value in expected[tag]], rel=1e-9)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", [*CASES, *TWO_DIMENSIONS])
def test_weights_are_those_without_callbacks(name: str, results: Callable[..., Any]) -> None:
    for result in results(name):
        without = result["without"]["weights"]
        assert all(torch.equal(p, without[key]) for key, p in result["weights"].items())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_one_reduction_per_measured_step_and_none_besides(name: str, results: Callable[..., Any]) -> None:
    more = []
    for result in results(name):
        counted = zip(result["collectives"], result["without"]["collectives"])
        more.append([Counter(a) - Counter(b) for a, b in counted])
    reductions = 0
    for step in range(STEPS):
        # With DDP for the noise scale only, from the processes' own gradients. Of shards the spike response has to know
        # the norm at every step.
        reductions += step in MEASURED or not name.startswith("ddp")
        expected = Counter(all_reduce=reductions) if reductions else Counter()
        assert more[0][step] == more[1][step] == expected


def attach(monitor: pl.Callback, strategy: Any) -> None:
    StepRecorder().attach(monitor, SimpleNamespace(strategy=strategy))  # type: ignore[arg-type]


def test_matrix_statistics_refuse_fsdp1() -> None:
    attach(UpdateSize(), FSDPStrategy())
    with pytest.raises(MisconfigurationException, match=r"OrthogonalityError needs whole matrices.*FSDP2"):
        attach(OrthogonalityError(), FSDPStrategy())


def test_deepspeed_is_refused() -> None:
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # its own constructor wants DeepSpeed installed
    for monitor in (UpdateSize(), OrthogonalityError()):
        with pytest.raises(MisconfigurationException, match=r"does not work with DeepSpeedStrategy.*use DDP or FSDP2"):
            attach(monitor, strategy)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
