"""What users and their checkpoints rely on, of every optimizer, as one readable file.

Signatures, defaults, state tensors and the names of internals stand in ``interface.json``, so that a change is seen in
a review. After a change that is meant::

    python -m tests.optimizers.interface

A new optimizer adds its part there.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch

from lightning_optim.registry import OPTIMIZERS

from .rows import CONFIGURATIONS, OURS, assume_losses, build, label, network, run

FILE = Path(__file__).with_name("interface.json")
HOW = "If it is meant, run `python -m tests.optimizers.interface` and commit tests/optimizers/interface.json."


def words(annotation: Any) -> str:
    """A type as one writes it, without the modules that it is from."""
    return annotation.__name__ if isinstance(annotation, type) else re.sub(r"\b(\w+\.)+", "", str(annotation))


def signature(name: str) -> list[str]:
    """One line for each argument: name, type, default, and where those begin that are given by name only."""
    lines = []
    for p in inspect.signature(OPTIMIZERS[name].cls).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in lines:
            lines.append("*")
        default = "" if p.default is p.empty else f" = {p.default!r}"
        lines.append(f"{p.name}: {words(p.annotation)}{default}")
    return lines


def state(name: str, arguments: dict[str, Any]) -> dict[str, str]:
    """State tensors of each parameter of a small model: names, dtypes and shapes."""
    torch.manual_seed(0)
    model = network()
    optimizer = build(name, list(model.parameters()), **arguments)
    run(optimizer, list(model.parameters()), range(1, 3))
    found = {}
    for key, p in model.named_parameters():
        entries = (f"{n} {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for n, x in optimizer.state[p].items())
        found[f"{key} {tuple(p.shape)}"] = "; ".join(entries)
    return found


def interface(name: str) -> dict[str, Any]:
    """Everything of one optimizer, in plain values."""
    info = OPTIMIZERS[name]
    return {
        "kind": info.kind,
        "paper": info.paper,
        "signature": signature(name),
        "defaults": ", ".join(f"{key}={x!r}" for key, x in info.defaults.items()),
        "internals": ", ".join(sorted(info.internals)),
        "state": {label(arguments): state(name, arguments) for arguments in CONFIGURATIONS[name]},
    }


def main() -> None:
    assume_losses(setattr)
    FILE.write_text(json.dumps({name: interface(name) for name in sorted(OURS)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
