"""A deep model with grouped queries and experts trains under FSDP2 and tensor parallelism as on one process.

The module is also the program that the processes run. Attention is column-parallel and row-parallel, its fused
projection cut within a matrix; each rank of a tensor-parallel group has some of the experts. FSDP2 cuts what that
leaves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import Grouping, OptimizerConfig, build_optimizer, processes
from lightning_optim.checkpoint_io import SafeModelParallelStrategy

ROOT = Path(__file__).parents[2]
LAYERS, WIDTH, HEADS, KV_HEADS, EXPERTS, HIDDEN, TOKENS = 12, 16, 4, 2, 4, 6, 13
STEPS, BATCH, CLIP = 4, 8, 0.1
#: Sizes of the mesh, for data and for tensor parallelism.
MESHES = [(1, 2), (2, 1), (2, 2)]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.num_heads, self.num_key_value_heads, self.head_dim = HEADS, KV_HEADS, size
        self.qkv_proj = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * size, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        size = self.head_dim
        heads = self.qkv_proj(x).unflatten(-1, (-1, size)).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """All experts look at all tokens, weighted by the router; a rank has the experts of its shard."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.3 * torch.randn(EXPERTS, 2 * HIDDEN, WIDTH))
        self.down_proj = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        first, mesh = self.gate_up_proj, None
        ups, downs = self.gate_up_proj, self.down_proj
        if isinstance(first, DTensor):  # FSDP2 has gathered what it has cut; what is left is expert parallelism.
            mesh, rank = first.device_mesh, first.device_mesh.get_local_rank()
            ups, downs = first.to_local(), self.down_proj.to_local()
            x, weights = (
                DTensor.from_local(y, mesh, [Replicate()]).to_local(grad_placements=[Partial()]) for y in (x, weights)
            )
            weights = weights[..., rank * len(ups) : (rank + 1) * len(ups)]
        gate, up = torch.einsum("btd,ehd->bteh", x, ups).chunk(2, -1)
        y = torch.einsum("bteh,edh,bte->btd", F.silu(gate) * up, downs, weights)
        return (
            y if mesh is None else DTensor.from_local(y, mesh, [Partial()]).redistribute(mesh, [Replicate()]).to_local()
        )


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.post_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.experts = Attention(), Experts()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x))
        y = self.post_norm(x)
        return x + self.experts(y, self.router(y).softmax(-1))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Language().double()  # Float64, in which the order of additions leaves room for no defect.
        self.losses: list[float] = []
        self.norms: list[float] = []

    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(self.net.head.weight, DTensor):
            return
        tensor, data = self.device_mesh["tensor_parallel"], self.device_mesh["data_parallel"]
        plan = {
            "attention.qkv_proj": ColwiseParallel(output_layouts=Replicate()),
            "attention.o_proj": RowwiseParallel(input_layouts=Replicate()),
        }
        for layer in self.net.layers:
            assert isinstance(layer, Layer)
            if tensor.size() > 1:
                parallelize_module(layer, tensor, plan)
                for name, p in list(layer.experts.named_parameters()):
                    setattr(layer.experts, name, nn.Parameter(distribute_tensor(p.detach(), tensor, [Shard(0)])))
            fully_shard(layer, mesh=data)
        fully_shard(self.net, mesh=data)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (tokens,) = batch
        loss = F.cross_entropy(self.net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, OptimizerConfig("NAMO", {"lr": 0.02}), Grouping())

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """As in docs/many-gpus.md: torch does not add up norms of parameters on different meshes."""
        by_mesh = defaultdict(list)
        for p in self.parameters():
            if p.grad is not None:
                by_mesh[getattr(p, "device_mesh", None)].append(p.grad)
        norms = [nn.utils.get_total_norm(grads) for grads in by_mesh.values()]
        total = torch.stack([x.full_tensor() if isinstance(x, DTensor) else x for x in norms]).norm()
        self.norms.append(float(total))
        for grads in by_mesh.values():
            for g in grads:
                g.mul_(min(1.0, gradient_clip_val / float(total)))

    def train_dataloader(self) -> DataLoader[Any]:
        tokens = torch.randint(0, TOKENS, (BATCH, 9), generator=torch.Generator().manual_seed(1))
        data = self.device_mesh["data_parallel"] if self.device_mesh is not None else None
        rank, ranks = (data.get_local_rank(), data.size()) if data is not None else (0, 1)
        return DataLoader(TensorDataset(tokens[rank::ranks]), batch_size=BATCH // ranks)


def fit(
    mesh: tuple[int, int] | None = None, steps: int = STEPS, resume: Path | None = None, keep: Path | None = None
) -> dict[str, Any]:
    """Train, clipping the gradient; with a mesh under FSDP2 and tensor parallelism."""
    model = Model()
    strategy = SafeModelParallelStrategy(*mesh) if mesh else "auto"
    trainer = pl.Trainer(
        accelerator="cpu", devices=mesh[0] * mesh[1] if mesh else 1, strategy=strategy, max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, gradient_clip_val=CLIP,
    )  # fmt: skip
    trainer.fit(model, ckpt_path=resume)
    if keep is not None:
        trainer.save_checkpoint(keep)
    (optimizer,) = trainer.optimizers
    placed = {name: str(processes.placements(p)) for name, p in model.named_parameters()}
    roles = {p: group["role"] for group in optimizer.param_groups for p in group["params"]}
    return {
        "weights": {
            name: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone()
            for name, p in model.named_parameters()
        },
        "losses": model.losses,
        "norms": model.norms,
        "placed": placed,
        "matrices": [name for name, p in model.named_parameters() if roles[p] == "matrix"],
    }


def main(out: Path) -> None:
    """What each process does: train, and train again with a pause."""
    ranks = int(os.environ["WORLD_SIZE"])
    for mesh in (mesh for mesh in MESHES if mesh[0] * mesh[1] == ranks):
        pause = out / f"{mesh}.ckpt"
        whole = fit(mesh)
        fit(mesh, 2, keep=pause)
        results = {"whole": whole, "resumed": fit(mesh, resume=pause)}
        torch.save(results, out / f"{mesh} {os.environ['RANK']}.pt")


def start(ranks: int, out: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*run, __file__, str(out)], capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_training_is_that_of_a_single_process(ranks: int, tmp_path: Path) -> None:
    start(ranks, tmp_path)
    expected = fit()
    assert {name.split(".")[-1] for name in expected["matrices"]} == {"weight", "gate_up_proj", "down_proj"}
    assert len(expected["matrices"]) == 4 * LAYERS
    assert min(expected["norms"]) > CLIP
    for mesh in (mesh for mesh in MESHES if mesh[0] * mesh[1] == ranks):
        for rank in range(ranks):
            results = torch.load(tmp_path / f"{mesh} {rank}.pt")
            assert results["whole"]["matrices"] == expected["matrices"]
            for name, x in expected["weights"].items():
                # Sums in another order, 1e-16 each, through twelve layers and four times the Newton-Schulz iteration.
                torch.testing.assert_close(results["whole"]["weights"][name], x, rtol=1e-11, atol=1e-12, msg=name)
                assert torch.equal(results["resumed"]["weights"][name], results["whole"]["weights"][name]), name
            assert results["whole"]["norms"] == pytest.approx(expected["norms"], rel=1e-9)
            if mesh[0] == 1:
                assert results["whole"]["losses"] == pytest.approx(expected["losses"], rel=1e-9)
            placed = results["whole"]["placed"]
            if mesh == (2, 2):
                assert placed["net.layers.0.attention.qkv_proj.weight"] == "(_StridedShard(dim=0, sf=2), Shard(dim=0))"
                assert placed["net.layers.0.attention.o_proj.weight"] == "(Shard(dim=0), Shard(dim=1))"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
