"""``lightning-optim list``: the optimizers and the presets."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import explained
from ..presets import presets

if TYPE_CHECKING:
    from ...registry import OptimizerInfo

DESCRIPTION = "Show every optimizer, all about one, or every preset."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="show one optimizer: equations, arguments, settings")
    parser.add_argument("--json", action="store_true", help="as a JSON list of objects")
    parser.add_argument("--presets", action="store_true", help="show the presets for -c instead")


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UsageError: There is no optimizer of the name.
    """
    if options.name and not options.json:
        from ..optimizer_page import page  # here, because it imports torch

        print(page(_get(options.name)))
        return
    rows = _presets() if options.presets else _optimizers(options.name)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    columns = [key for key in rows[0] if key not in ("idea", "experimental", "defaults", "internals")]
    table = Table(*columns, box=box.SIMPLE)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    Console().print(table)
    if not options.presets:
        print("Arguments and their defaults: lightning-optim list NAME")


def _presets() -> list[dict[str, Any]]:
    return [
        {"name": name, "kind": kind.removesuffix("s"), "description": path.read_text().splitlines()[0].lstrip("# ")}
        for kind in ("tasks", "optimizers")
        for name, path in presets(kind).items()
    ]


def _get(name: str) -> OptimizerInfo:
    from ...registry import get

    with explained():
        return get(name)


def _optimizers(name: str | None) -> list[dict[str, Any]]:
    from ...registry import OPTIMIZERS

    return [
        {
            "name": info.name,
            "kind": info.kind,
            "description": info.summary,
            "paper": info.paper,
            "idea": info.idea,
            "experimental": info.experimental,
            "defaults": dict(info.defaults),
            "internals": {name: internal.description for name, internal in info.internals.items()},
        }
        for info in ([_get(name)] if name else OPTIMIZERS.values())
    ]
