"""Checks cross references to names that have no page: internal ones of this library, and those of other packages.

Sphinx links what has a page. Anything else has to be importable and is shown without a link; what is not is a warning
of the build. No other site's index of names is needed for it, so the build needs no network.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import lightning_optim
import lightning_optim.callbacks
import lightning_optim.models

# `callbacks` and `models` lie elsewhere in the repository, and an editable install does not list them.
PACKAGES = (lightning_optim, lightning_optim.callbacks, lightning_optim.models)
MODULES = [
    *(package.__name__ for package in PACKAGES),
    *(
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not module.name.endswith("__main__")
    ),
]


def resolve(app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.Node) -> nodes.Node | None:
    if node.get("refdomain") != "py":
        return None
    return content if any(exists(path) for path in candidates(node)) else None


def candidates(node: nodes.Element) -> Iterator[str]:
    """The full names that a reference may mean: as it stands, in its class, or in any module of this library."""
    target = node["reftarget"].lstrip(".")
    yield target
    yield f"builtins.{target}"
    here = node.get("py:class")
    for module in MODULES:
        yield f"{module}.{target}"
        if here:
            yield f"{module}.{here}.{target}"


def exists(path: str) -> bool:
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        return all((thing := getattr(thing, part, None)) is not None for part in parts[cut:])
    return False


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
