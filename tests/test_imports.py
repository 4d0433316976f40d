"""What may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightning_optim", "callbacks", "models")


def imported(source: str) -> Iterator[str]:
    """Dotted names that a module imports, be it as ``import a.b``, ``from a import b`` or ``torch.distributed.x``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def knows_distributed(source: str) -> list[str]:
    """Names of ``torch.distributed``, of ``DTensor`` and of process groups that a module imports or uses."""
    return [
        name
        for name in imported(source)
        if name.startswith(("torch.distributed", "torch.nn.parallel.")) or name.rpartition(".")[2] == "DTensor"
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "import torch.distributed.checkpoint",
        "from torch import distributed",
        "from torch.distributed.tensor import DTensor as D",
        "def f():\n    from torch.distributed import fsdp",
        "import torch\ntorch.distributed.barrier()",
        "from lightning_optim.processes.sharding import DTensor",
    ],
)
def test_the_check_sees_every_way_to_import(source: str) -> None:
    assert knows_distributed(source)


def test_only_processes_knows_torch_distributed() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if (names := knows_distributed(path.read_text())) and "lightning_optim/processes" not in str(path)
    }
    assert found == {}
