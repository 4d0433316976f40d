"""Runs that are saved, loaded by fresh objects and continued, beside runs that are not interrupted.

Used by the tests in their own process, and run as a program by several: ``python -m torch.distributed.run ...``.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_optim import build_optimizer, configure_optimizers
from lightning_optim.callbacks import RNGState
from lightning_optim.checkpoint_io import SafeCheckpointIO
from lightning_optim.data.loading import BatchDataset, EpochSampler, ResumableLoader
from lightning_optim.registry import OPTIMIZERS
from tests.optimizers.rows import CONFIGURATIONS, OURS, assume_losses

STOP, END = 3, 8
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "64": torch.float64}
WAYS = ("torch.save", "flattened", "lightning")
CASES = [(name, precision, way) for name in OPTIMIZERS for precision in ("32", "bf16") for way in WAYS]


class Net(nn.Module):
    """Rows that two and four processes do not share evenly, one row, a convolution, dropout, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.conv = nn.Conv1d(6, 5, 2, bias=False)
        self.gate = nn.Linear(5, 1)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        h = h + F.dropout(self.down(F.gelu(self.up(h))), 0.1, self.training)
        gate = self.gate(F.gelu(self.conv(h.transpose(1, 2))).mean(-1)).sigmoid()
        return self.head(self.norm(h.mean(1) * gate))


def shard(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in (net.up, net.down, net.conv):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def settings(name: str) -> dict[str, Any]:
    return {"name": name, "args": {"lr": 0.01} | CONFIGURATIONS.get(name, [{}])[0]}


def tokens(n: int) -> Tensor:
    return torch.randint(0, 11, (n, 5), generator=torch.Generator().manual_seed(1))


def local(x: Any) -> Any:
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def everything(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and state of this process, by name."""
    found = {name: local(p.detach()) for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        found |= {f"{name}/{key}": local(x) for key, x in optimizer.state[p].items() if isinstance(x, Tensor)}
    return {name: x.clone() for name, x in found.items()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor], optimizer: str) -> str:
    """What is not equal bit for bit; or state of an optimizer of ours that is not float32."""
    if a.keys() != b.keys():
        return f"names: {sorted(a.keys() ^ b.keys())}"
    for name, x in a.items():
        if x.dtype != b[name].dtype or not torch.equal(x, b[name]):
            return f"{name}: {x} {b[name]}"
        if optimizer in OURS and "/" in name and x.dtype == torch.bfloat16:
            return f"{name} is {x.dtype}"
    return ""


# --- plain loops ----------------------------------------------------------------------------------------------------


class Loop:
    """A module and an optimizer, alone or on several processes."""

    def __init__(self, name: str, dtype: torch.dtype, kind: str) -> None:
        self.net: nn.Module = Net().to(dtype)
        if kind == "fsdp2":
            shard(self.net, init_device_mesh("cpu", (dist.get_world_size(),)))
        self.forward = nn.parallel.DistributedDataParallel(self.net) if kind == "ddp" else self.net
        self.optimizer = build_optimizer(self.net, settings(name))

    def run(self, steps: range) -> Loop:
        for t in steps:
            torch.manual_seed(t)
            x = tokens(END * 8)[8 * t : 8 * (t + 1)]
            if dist.is_initialized():
                x = x.chunk(dist.get_world_size())[dist.get_rank()]
            self.net.eval()  # Dropout would draw other numbers for other shares of a batch.
            self.optimizer.zero_grad()
            F.cross_entropy(self.forward(x).float(), x[:, 0]).backward()
            self.optimizer.step()
        return self

    def flattened(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        model, optimizer = get_state_dict(self.net, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

    def load_flattened(self, folder: Path) -> Loop:
        state = self.flattened()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a single process
            dcp.load(state, checkpoint_id=folder)
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        set_state_dict(
            self.net, self.optimizer,
            model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options,
        )  # fmt: skip
        return self


def through_torch_save(loop: Loop, folder: Path, new: Callable[[], Loop]) -> Iterator[Loop]:
    file = folder / f"{dist.get_rank() if dist.is_initialized() else 0}.pt"
    torch.save({"net": loop.net.state_dict(), "optimizer": loop.optimizer.state_dict()}, file)
    yield loop
    saved = torch.load(file, weights_only=True)
    resumed = new()
    resumed.net.load_state_dict(saved["net"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    yield resumed


def through_flattened(loop: Loop, folder: Path, new: Callable[[], Loop]) -> Iterator[Loop]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process
        dcp.save(loop.flattened(), checkpoint_id=folder)
    yield loop
    yield new().load_flattened(folder)


def through_loops(name: str, precision: str, way: str, kind: str, folder: Path) -> str:
    dtype = DTYPES[precision]
    through = {"torch.save": through_torch_save, "flattened": through_flattened}[way]
    loops = through(Loop(name, dtype, kind).run(range(STOP)), folder, lambda: Loop(name, dtype, kind))
    a, b = (everything(loop.net, loop.optimizer) for loop in (loop.run(range(STOP, END)) for loop in loops))
    return difference(a, b, name)


# --- Lightning ------------------------------------------------------------------------------------------------------


class Tokens(BatchDataset):
    def __len__(self) -> int:
        return 40

    def __getitems__(self, keys: list[int]) -> tuple[Tensor, Tensor]:
        x = tokens(40)[[key % 40 for key in keys]]
        return x, x[:, 0]


class Module(pl.LightningModule):
    """With dropout, a loader that shuffles, and a schedule that asks for the length of the run."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.name, self.kind = name, kind
        self.net = Net()

    def configure_model(self) -> None:
        if self.kind == "fsdp2" and not isinstance(next(self.net.parameters()), DTensor):
            shard(self.net, self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, settings(self.name), {"name": "WarmupCosine", "args": {"warmup": 0.3}})

    def train_dataloader(self) -> ResumableLoader:
        processes = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = EpochSampler(Tokens(), seed=3, **processes)
        # Without a generator of its own, a loader advances torch's.
        options = {"batch_size": 4, "collate_fn": lambda batch: batch, "generator": torch.Generator()}
        return ResumableLoader(Tokens(), sampler=sampler, **options)


class SaveAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(
    name: str, precision: str, kind: str, *callbacks: pl.Callback, ckpt_path: Path | None = None
) -> dict[str, Tensor]:
    """Two epochs of ten steps on one process, of five on two: the last begins in the middle of the run."""
    strategy: Any = "auto"
    if kind == "ddp":
        strategy = DDPStrategy()
    if kind == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    # Another seed than that of the first: everything random must come from the checkpoint.
    pl.seed_everything(2 if ckpt_path else 1, verbose=False)
    module = Module(name, kind)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1 if kind == "single" else dist.get_world_size(), strategy=strategy,
        precision=f"{precision}-true", max_steps=END, max_epochs=-1, callbacks=[RNGState(), *callbacks],
        plugins=[SafeCheckpointIO()], use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=None if kind == "fsdp2" else 0.5,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    return everything(module, trainer.optimizers[0])


def through_lightning(name: str, precision: str, way: str, kind: str, folder: Path) -> str:
    straight = fit(name, precision, kind, SaveAt(STOP, folder / "a.ckpt"))
    return difference(straight, fit(name, precision, kind, ckpt_path=folder / "a.ckpt"), name)


# --- all of it ------------------------------------------------------------------------------------------------------


def resume(name: str, precision: str, way: str, kind: str, folder: Path) -> str:
    """How a resumed run differs from one that was not interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    through = through_lightning if way == "lightning" else through_loops
    return through(name, precision, way, kind, folder)


def across(name: str, kind: str, folder: Path) -> dict[str, Tensor]:
    """The end of a run in float64 that two processes have begun."""
    if not folder.exists():
        loop = Loop(name, torch.float64, kind).run(range(STOP))
        dcp.save(loop.flattened(), checkpoint_id=folder)
    else:
        loop = Loop(name, torch.float64, kind).load_flattened(folder)
    loop.run(range(STOP, END))
    return {key: whole(p.detach()) for key, p in loop.net.named_parameters()}


def main(out: Path) -> None:
    """What each process does; the first writes what came of it."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    kinds = ("ddp", "fsdp2") if size == 2 else ()
    results: dict[str, str] = {}
    for kind, (name, precision, way) in itertools.product(kinds, CASES):
        case = f"{kind}-{name}-{precision}-{way}"
        try:
            results[case] = resume(name, precision, way, kind, out / case)
        except Exception:
            results[case] = traceback.format_exc()
    (out / f"{size}-{rank}.json").write_text(json.dumps(results))
    for name in OPTIMIZERS:
        torch.save(across(name, "fsdp2", out / f"across-{name}"), out / f"{size}-{rank}-{name}.pt")
    dist.barrier()  # One that leaves early takes down connections that others may still use.
    dist.destroy_process_group()


if __name__ == "__main__":
    assume_losses(setattr)
    main(Path(sys.argv[1]))
