"""Imports point down, and the map of folders in CONTRIBUTING is what is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Layers from top to bottom. A package or module of ``lightning_optim`` imports from its own room and from rooms below.
LAYERS: list[set[str]] = [
    {"cli"},
    {"compare"},
    {"callbacks", "models"},
    {"factory"},
    {"checkpoint_io", "data", "diagnostics", "configs", "registry"},
    {"optimizers"},
    {"engine", "routing", "schedules"},
    {"processes", "polar"},
    {"fused", "devices", "names", "page", "private", "trainer"},
]
#: Modules that a room consists of, where it is no folder of its own name.
ROOMS = {
    "factory": {
        "factory",
        "added_groups",
        "grouping",
        "group_rates",
        "modes",
        "own_optimizers",
        "peers",
        "safe_classes",
        "seen",
    },
    "optimizers": {"optimizers", "eigenbasis"},
}
#: What these rooms may never import, however indirectly it is written.
WITHOUT = {
    "optimizers": ("lightning", "pytorch_lightning"),
    "engine": ("lightning", "pytorch_lightning", "lightning_optim.optimizers", "lightning_optim.registry"),
    "polar": ("lightning", "pytorch_lightning"),
    "processes": ("lightning", "pytorch_lightning", "lightning_optim.engine"),
    "diagnostics": ("lightning.pytorch.loggers", "pytorch_lightning.loggers", "lightning.pytorch.callbacks"),
}


def room(module: str) -> str:
    """The room of the first part of a module's name below ``lightning_optim``."""
    for name, modules in ROOMS.items():
        if module in modules:
            return name
    return module


def layer(name: str) -> int:
    for i, names in enumerate(LAYERS):
        if name in names:
            return i
    raise LookupError(
        f"lightning_optim.{name} is new: say in LAYERS or ROOMS of tests/test_structure.py where it stands, and in the "
        "map of CONTRIBUTING what it is for."
    )


def module_name(path: Path) -> list[str]:
    """The parts of a module's name as it is installed; a package keeps its ``__init__``."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts if parts[0] == "lightning_optim" else ["lightning_optim", *parts]


def imports(source: str, module: list[str]) -> Iterator[str]:
    """Absolute names of what a module imports, anywhere in it; of ``from a import b`` that is ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            yield node.args[0].value if isinstance(node.args[0], ast.Constant) else ""


def modules() -> Iterator[tuple[list[str], list[str]]]:
    """Every installed module's name and imports."""
    for folder in ("lightning_optim", "callbacks", "models", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = module_name(path)
            yield name, list(imports(path.read_text(), name))


def is_upward(importer: str, imported: str) -> bool:
    """Whether a room imports from one that is not below."""
    return importer != imported and layer(imported) <= layer(importer)


def test_imports_point_down() -> None:
    found = []
    for name, imported in modules():
        if len(name) == 2 and name[1] == "__init__":
            continue  # What the package itself offers.
        for target in imported:
            parts = target.split(".")
            if parts[0] != "lightning_optim" or parts[-1] == "__version__":
                continue
            edge = (room(name[1]), room(parts[1]))
            if is_upward(*edge):
                found.append(f"{'.'.join(name)} imports {target}")
    assert found == []


@pytest.mark.parametrize("name", WITHOUT)
def test_what_a_room_never_imports(name: str) -> None:
    found = [
        f"{'.'.join(module)} imports {target}"
        for module, imported in modules()
        if room(module[1]) == name
        for target in imported
        if any(target == other or target.startswith(f"{other}.") for other in WITHOUT[name])
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "from ..optimizers.namo import NAMO",
        "from .. import optimizers",
        "def f():\n    from ..optimizers import NAMO",
        "import lightning_optim.optimizers.namo as x",
        "from lightning_optim import optimizers",
        "import importlib\nimportlib.import_module('lightning_optim.optimizers')",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..optimizers import NAMO",
    ],
)
def test_the_check_sees_every_way_to_import(source: str) -> None:
    found = list(imports(source, ["lightning_optim", "engine", "step"]))
    assert any(target.startswith("lightning_optim.optimizers") for target in found)
    assert is_upward("engine", "optimizers")
    assert not is_upward("optimizers", "engine")


def test_engine_names_no_algorithm() -> None:
    """Neither as an import nor in code: the fallback that is used unless told otherwise is its only name of a rule."""
    algorithms = {path.stem for path in (ROOT / "lightning_optim" / "optimizers").glob("*.py")} - {"__init__"}
    for path in (ROOT / "lightning_optim" / "engine").glob("*.py"):
        names = {part for x in imports(path.read_text(), module_name(path)) for part in x.split(".")}
        assert not names & algorithms, path.name


# --- the map ----------------------------------------------------------------------------------------------------------


def mapped(heading: str) -> dict[str, str]:
    """Paths in a table of CONTRIBUTING, and what it says of them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|$", section, re.M)
    return {path: words for paths, words in rows for path in re.findall(r"`([^`]+)`", paths)}


def test_the_map_is_the_folder_listing() -> None:
    """Every folder at the top, and everything in ``lightning_optim``, stands in the table, and nothing else does."""
    top = {"lightning_optim", "callbacks", "models", "configs", "tests", "benchmarks", "docs"}
    tracked = {path for path in ROOT.iterdir() if path.name in top}
    assert {path.name for path in tracked} == top
    inside = {path for path in (ROOT / "lightning_optim").iterdir() if path.suffix in ("", ".py")}
    hidden = {"__init__.py", "__pycache__"}
    expected = top - {"lightning_optim"} | {f"lightning_optim/{p.name}" for p in inside if p.name not in hidden}
    found = mapped("Where things are")
    assert set(found) == expected
    assert all(found.values())


def test_the_map_of_the_engine_is_the_folder_listing() -> None:
    found = mapped("The files of the engine")
    assert set(found) == {path.name for path in (ROOT / "lightning_optim" / "engine").glob("*.py")} - {"__init__.py"}
    assert all(found.values())
