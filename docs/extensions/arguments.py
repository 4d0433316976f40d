"""Puts the type and the default of each argument, from the signature, in front of what the docstring says of it."""

from __future__ import annotations

import inspect
import re
from typing import Any

from sphinx.application import Sphinx

ARGUMENT = re.compile(r"    (\w+): (.*)")
#: Stands for a colon in the docstring of a field, where Napoleon would take what comes before it for a type.
COLON = "\ue000"


def process_docstring(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    if what in ("attribute", "data", "property"):
        lines[:] = [line.replace(":", COLON) for line in lines]
    if not callable(thing):
        return
    try:
        parameters = inspect.signature(thing).parameters
    except (TypeError, ValueError):
        return
    in_arguments = False
    for i, line in enumerate(lines):
        if line and not line.startswith(" "):
            in_arguments = line == "Args:"
        elif in_arguments and (match := ARGUMENT.match(line)) and match[1] in parameters:
            lines[i] = f"    {match[1]}: {declaration(parameters[match[1]])}{match[2]}"


def declaration(parameter: inspect.Parameter) -> str:
    """The end of ``name: type = default``."""
    empty = inspect.Parameter.empty
    kind = parameter.annotation
    words = "" if kind is empty else kind if isinstance(kind, str) else inspect.formatannotation(kind)
    words = re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", words)  # Iterable instead of collections.abc.Iterable
    if parameter.default is not empty:
        words += f" = {parameter.default!r}"
    return f"``{words.strip()}`` -- " if words and "<" not in words else ""


def restore_colons(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(COLON, ":") for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process_docstring, priority=400)  # before Napoleon reads Google's sections
    app.connect("autodoc-process-docstring", restore_colons, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
