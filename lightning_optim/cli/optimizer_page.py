"""What ``lightning-optim list NAME`` and ``--optimizer.help NAME`` show of an optimizer."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import textwrap

from ..registry import OptimizerInfo
from .plain_text import plain
from .presets import presets


def page(info: OptimizerInfo, width: int | None = None) -> str:
    """An optimizer's equations, what code and paper say, its arguments and the settings of its paper, as plain text.

    Args:
        info: The optimizer.
        width: Where lines are wrapped. Default: the terminal's width, at most 110.
    """
    width = width or min(shutil.get_terminal_size().columns, 110)
    head, entries = _parts(inspect.cleandoc(info.cls.__doc__ or ""))
    if info.cls.__module__.startswith("torch."):
        link = f"https://docs.pytorch.org/docs/stable/generated/torch.optim.{info.name}.html"
        head = f"{info.name}, {info.description}. {info.paper}. Its equations: {link}"
    return "\n\n".join([plain(head, width), _arguments(info, entries, width), *_settings(info, width)])


def _parts(docstring: str) -> tuple[str, dict[str, str]]:
    """The text of a docstring before its sections, and the entries of its section ``Args``."""
    parts = re.split(r"^ *(Args|Raises|Attributes|Examples?|Note):+ *\n", docstring, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2]))
    entries = re.split(r"^(?=\w+(?: \([^)]*\))?:)", textwrap.dedent(sections.get("Args", "")), flags=re.MULTILINE)
    named = (re.match(r"(\w+)(?: \([^)]*\))?:(.*)", entry, re.DOTALL) for entry in entries)
    return parts[0], {found[1]: found[2] for found in named if found}


def _arguments(info: OptimizerInfo, entries: dict[str, str], width: int) -> str:
    lines = ["Arguments, each given as --optimizer.ARGUMENT VALUE, with their defaults:"]
    for name, parameter in inspect.signature(info.cls).parameters.items():
        if name == "params" or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        lines.append(f"  {name} = {default if isinstance(default, str) else json.dumps(default)}")
        lines.append(textwrap.indent(plain(entries.get(name, ""), width - 6), "      "))
    return "\n".join(line for line in lines if line.strip())


def _settings(info: OptimizerInfo, width: int) -> list[str]:
    """The preset file: what its comments say, and its settings."""
    path = presets("optimizers").get(info.name.lower())
    if path is None:
        return []
    lines = path.read_text().splitlines()
    comments = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    settings = "\n".join(line for line in lines if not line.startswith("#"))
    about = textwrap.fill(
        f"Settings of the paper, as `lightning-optim fit -c {path.stem}` takes them: {comments}", width
    )
    return [about + "\n" + textwrap.indent(settings.strip(), "  ")]
