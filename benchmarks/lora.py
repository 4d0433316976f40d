"""Which factors of LoRA to orthogonalise: a small fine-tuning.

    python -m benchmarks.lora --json benchmarks/results/lora.json

A small transformer learns bytes of the source of Python's standard library with AdamW. Then its weights are frozen, and
LoRA of rank 8 on all of its linear layers learns Python's manual (the module ``pydoc_data.topics``: prose, where the
source is code), from the same weights for every way and seed: with AdamW on both factors, or with Muon on B only, on A
only or on both, and AdamW on the rest, each with several learning rates. The rows are ``{"way", "lr", "seed",
"loss"}``, the loss on the last tenth of the text; what is in the file already is not run again.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics as manual
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from lightning_optim import Grouping, OptimizerConfig, build_optimizer
from lightning_optim.data import TextData
from lightning_optim.models.networks import GPT, GPTConfig

from .machine import describe

LENGTH, BATCH, WIDTH, RANK = 64, 16, 64, 8
#: Patterns of the names of factors that AdamW trains.
WAYS: dict[str, list[str]] = {"neither": ["*lora_*"], "B": ["*lora_A*"], "A": ["*lora_B*"], "both": []}
#: Learning rates: AdamW's, which with Muon is the best one of AdamW alone, and Muon's.
ADAMW, BESIDE, MUON = (1e-3, 3e-3, 1e-2, 3e-2), 1e-2, (3e-3, 1e-2, 3e-2, 1e-1)


class LoRA(nn.Module):
    """A linear layer with a frozen weight and a pair of factors: ``W x + 2 B A x``, with B zero at first."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.base.weight, self.base.bias) + 2 * self.lora_B(self.lora_A(x))


def with_lora(model: GPT) -> GPT:
    """The model with LoRA on all linear layers but the head; everything else is frozen."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "head" and not isinstance(module, LoRA):
                setattr(module, name, LoRA(child))
    return model


def new_model() -> GPT:
    return GPT(256, LENGTH, GPTConfig(layers=2, heads=2, width=WIDTH))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, steps: int, seed: int) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / 20, 1 - t / steps))
    batches = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_on(model, text, BATCH, batches).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()


def loss_on(model: nn.Module, text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - LENGTH, (count,), generator=generator)
    tokens = text[starts[:, None] + torch.arange(LENGTH + 1)]
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def validation_loss(model: nn.Module, text: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return statistics.mean(float(loss_on(model, text, 64, generator)) for _ in range(20))


def fine_tune(weights: dict[str, Tensor], text: Tensor, way: str, lr: float, seed: int, steps: int) -> float:
    """The loss on the last tenth of a text after training on the rest."""
    torch.manual_seed(seed)
    model = new_model()
    model.load_state_dict(weights)
    with_lora(model)
    adamw = lr if way == "neither" else BESIDE
    optimizer: Any
    if way == "neither":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], adamw, weight_decay=0.0)
    else:
        config = OptimizerConfig("Muon", {"lr": lr, "fallback_lr": adamw, "weight_decay": 0.0})
        optimizer = build_optimizer(model, config, grouping=Grouping(fallback=WAYS[way]))
    train(model, optimizer, text[: -len(text) // 10], steps, seed)
    return validation_loss(model, text[-len(text) // 10 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of a fine-tuning")
    parser.add_argument("--base-steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the figures are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    with tempfile.TemporaryDirectory() as folder:
        data = TextData("stdlib", folder, sequence_length=LENGTH)
        data.prepare_data()
        data.setup()
        windows: Any = data.train_set
        source = torch.tensor(windows.tokens, dtype=torch.int64)
    prose = torch.frombuffer(bytearray("\n".join(manual.topics.values()).encode()), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = new_model()
    train(model, torch.optim.AdamW(model.parameters(), 3e-3), source, options.base_steps, 0)
    before = validation_loss(model, prose[-len(prose) // 10 :])
    print(f"before: {before:.4f}", flush=True)
    done = {(row["way"], row["lr"], row["seed"]) for row in rows}
    runs = [
        (seed, way, lr)
        for seed in range(options.seeds)
        for way in WAYS
        for lr in (ADAMW if way == "neither" else MUON)
        if (way, lr, seed) not in done
    ]
    for seed, way, lr in runs:
        loss = fine_tune(model.state_dict(), prose, way, lr, seed, options.steps)
        rows.append({"way": way, "lr": lr, "seed": seed, "loss": loss})
        print(rows[-1], flush=True)
        if options.json:
            settings = {"steps": options.steps, "base_steps": options.base_steps, "rank": RANK, "width": WIDTH}
            content = {
                "machine": describe(torch.device("cpu")),
                "settings": settings | {"beside": BESIDE, "before": before},
                "rows": rows,
            }
            options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
