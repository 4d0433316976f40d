"""Writes the pages of the reference from the package itself.

One page per optimizer of the registry and one per public module, which is each module with an ``__all__``. Nothing is
listed by hand: a new optimizer, callback or module has its page at the next build. The pages are written into
``docs/reference``, which git ignores.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from textwrap import indent
from types import ModuleType
from typing import Any

import torch
from references import MODULES
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

from lightning_optim.registry import OPTIMIZERS, OptimizerInfo

ROOT = Path(__file__).parents[2]
#: Packages without pages of their own. The classes in `optimizers` have theirs, as names of `lightning_optim`.
INTERNAL = ("lightning_optim.engine", "lightning_optim.optimizers", "lightning_optim.configs")
KINDS = {
    "element-wise": "Each element of a parameter moves by its own history. Takes parameters of any shape.",
    "matrix": "Hidden matrices move as a whole. All other parameters go to the fallback rule.",
    "group": "Needs sums over all parameters of a group before any of them moves. Takes parameters of any shape.",
}

#: Ideas by which the overview groups the optimizers, in its order. Those of another idea follow under its own name.
IDEAS = {
    "momentum": "Gradient descent along an average of gradients. Steps are proportional to the gradient, and learning "
    "rates to its inverse.",
    "adaptive moments": "An average of gradients over the root of an average of their squares, element by element, as "
    "in Adam.",
    "variance-centred": "As these, but with the squares of what a gradient differs by from what was expected: the step "
    "is large where gradients agree.",
    "normalise, then average": "Each gradient is divided by its scale before it enters the momentum, so that one "
    "outlier cannot fill it.",
    "orthogonalised": "The momentum of a matrix is replaced by its polar factor, which has the same directions with "
    "equal weights.",
    "eigenbasis": "Adam, or another rule, in coordinates in which the covariance of the gradient is nearly diagonal.",
    "full-matrix": "A preconditioner of the whole matrix, kept as factors of low rank.",
    "variance-reduced": "The gradient is corrected by what changed since the last one, before anything else is done.",
    "step-size-free": "The learning rate follows from the gradients and the loss.",
}


# --- Modules --------------------------------------------------------------------------------------------------


def public_modules() -> dict[str, ModuleType]:
    """Every module of the package that says by ``__all__`` what is public."""
    modules = {name: importlib.import_module(name) for name in MODULES if not name.startswith(INTERNAL)}
    return {name: module for name, module in modules.items() if hasattr(module, "__all__")}


def public_names() -> dict[str, list[str]]:
    """Public names by the module that documents them: of those that export one, the module with the shortest path."""
    seen: dict[int, str] = {}
    pages: dict[str, list[str]] = {}
    for path, module in sorted(public_modules().items(), key=lambda item: (item[0].count("."), item[0])):
        for name in sorted(module.__all__, key=str.lower):
            if seen.setdefault(id(getattr(module, name)), path) == path:
                pages.setdefault(path, []).append(name)
    return pages


def page_of_module(path: str, names: Iterable[str]) -> str:
    module = importlib.import_module(path)
    optimizers = registered()
    blocks = [title(path), f".. module:: {path}", inspect.getdoc(module) or ""]
    for name in names:
        thing = getattr(module, name)
        if inspect.isclass(thing) and issubclass(thing, BaseException):
            blocks.append(f".. autoexception:: {path}.{name}")
        elif inspect.isclass(thing):
            if thing not in optimizers:  # those have pages of their own
                blocks.append(f".. autoclass:: {path}.{name}")
        elif callable(thing):
            blocks.append(f".. autofunction:: {path}.{name}")
        else:
            blocks.append(f".. data:: {name}\n\n" + indent(comment_above(name), "   "))
    bases = bases_of(getattr(module, name) for name in names)
    if bases:
        blocks += [title("Base classes", "-"), *map(class_entry, bases)]
    return "\n\n".join(blocks) + "\n"


def bases_of(things: Iterable[Any]) -> list[type]:
    """This library's classes that public ones are made of and that no module exports."""
    public = {id(getattr(module, name)) for module in public_modules().values() for name in module.__all__}
    classes = [thing for thing in things if inspect.isclass(thing) and thing not in registered()]
    bases = dict.fromkeys(base for cls in classes for base in cls.__mro__ if is_ours(base))
    return [base for base in bases if id(base) not in public and not base.__name__.startswith("_")]


def class_entry(cls: type) -> str:
    return f".. autoclass:: {cls.__module__}.{cls.__name__}"


def comment_above(name: str) -> str:
    """What the ``#:`` comment above a module's variable says, whichever module defines it."""
    for path in MODULES:
        comments = ModuleAnalyzer.for_module(path).find_attr_docs()
        if ("", name) in comments:
            return "\n".join(comments["", name])
    return ""


# --- Optimizers -----------------------------------------------------------------------------------------------


def registered() -> set[type]:
    return {info.cls for info in OPTIMIZERS.values()}


def is_ours(cls: type) -> bool:
    return cls.__module__.startswith("lightning_optim")


def page_of_optimizers() -> str:
    """The overview: a table for each idea, and what the kinds are."""
    blocks = [
        title("Optimizers"),
        "Every optimizer of the registry, by its idea. :doc:`/optimizers` helps to choose one, and :doc:`shared` has "
        "the promises and the arguments that are the same for all of this library's.",
    ]
    for idea in dict.fromkeys([*IDEAS, *(info.idea for info in OPTIMIZERS.values())]):
        rows = [
            (
                f":doc:`{info.name} <{info.name}>`",
                info.kind,
                info.summary,
                bytes_per_element(info),
                with_links(info.paper),
            )
            for info in OPTIMIZERS.values()
            if info.idea == idea
        ]
        header = ("name", "kind", "what it is", "state", "paper")
        widths = (15, 12, 40, 8, 25)
        blocks += [title((idea or "others").capitalize(), "-"), IDEAS.get(idea, ""), table(header, rows, widths)]
    blocks.append(
        "*State* is in bytes per element of a float32 matrix of 64 × 128, with default arguments; each page has it by "
        "tensor. Parameters that go to a fallback rule have that rule's state."
    )
    blocks.append(title("Kinds", "-"))
    for kind, meaning in KINDS.items():
        blocks += [f".. _{kind}:", title(kind.capitalize(), "~"), meaning]
    blocks.append(toctree(["shared", *sorted(OPTIMIZERS, key=str.lower)]))
    return "\n\n".join(blocks) + "\n"


def page_of_shared() -> str:
    """The base classes of the optimizers: what every one of them promises and takes."""
    bases = {base for cls in registered() for base in cls.__mro__ if is_ours(base)} - registered()
    in_order = sorted(bases, key=lambda base: (len(base.__mro__), base.__name__))
    blocks = [title("What all optimizers share"), title("As optimizers", "-")]
    blocks += [class_entry(base) for base in in_order if issubclass(base, torch.optim.Optimizer)]
    blocks += [title("As declarations", "-"), "What a new algorithm declares; :doc:`/contributing` says how."]
    blocks += [class_entry(base) for base in in_order if not issubclass(base, torch.optim.Optimizer)]
    return "\n\n".join(blocks) + "\n"


def page_of_optimizer(info: OptimizerInfo) -> str:
    facts = {
        "Kind": f":ref:`{info.kind} <{info.kind}>`" + (f"; {info.idea}" if info.idea else ""),
        "Paper": with_links(info.paper),
        "Command line": f"``lightning-optim fit --optimizer {info.name}``",
    }
    blocks = [title(info.name), f"{info.summary[0].upper()}{info.summary[1:]}."]
    blocks.append("\n".join(f":{name}: {value}" for name, value in facts.items()))
    if is_ours(info.cls):
        # torch wraps `step` anew in each class.
        blocks.append(f".. autoclass:: lightning_optim.{info.name}\n   :exclude-members: step")
    else:
        path = f"{info.cls.__module__.rpartition('.')[0]}.{info.name}"
        link = f"https://docs.pytorch.org/docs/stable/generated/{path}.html"
        blocks.append(f"This is PyTorch's own class, `{path} <{link}>`__, under the same flags as the others.")
        blocks.append(table(("argument", "default"), [(f"``{k}``", f"``{v!r}``") for k, v in info.defaults.items()]))
    blocks += [title("State", "-"), state_of(info)]
    if info.internals:
        blocks += [title("What it reports", "-")]
        blocks += ["The callback :class:`~lightning_optim.callbacks.OptimizerInternals` logs these:"]
        rows = [(f"``{name}``", internal.description) for name, internal in info.internals.items()]
        blocks.append(table(("name", "meaning"), rows))
    for preset in presets_of(info):
        blocks += [title("Preset", "-"), f"``lightning-optim fit -c {preset.stem}`` sets:", listing(preset)]
    return "\n\n".join(blocks) + "\n"


def state_after_a_step(info: OptimizerInfo) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    parameter = torch.nn.Parameter(torch.zeros(64, 128))
    parameter.grad = torch.ones(64, 128)
    group: dict[str, Any] = {"params": [parameter]}
    if info.kind == "matrix":
        group["role"] = "matrix"
    make: Any = info.cls
    optimizer = make([group])
    optimizer.step(lambda: torch.ones(()))  # A loss, for rules that need one.
    return parameter, {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor)}


def bytes_per_element(info: OptimizerInfo) -> str:
    parameter, state = state_after_a_step(info)
    return f"{sum(tensor.nbytes for tensor in state.values()) / parameter.numel():.3g}"


def state_of(info: OptimizerInfo) -> str:
    _, state = state_after_a_step(info)
    if not state:
        return "None with default arguments."
    rows = [
        (f"``{name}``", " × ".join(map(str, tensor.shape)) or "a number", str(tensor.dtype).removeprefix("torch."))
        for name, tensor in state.items()
    ]
    what = "hidden matrix" if info.kind == "matrix" else "parameter"
    text = f"Of a float32 {what} of 64 × 128, with default arguments: {bytes_per_element(info)} bytes per element."
    return f"{text}\n\n{table(('tensor', 'shape', 'dtype'), rows)}"


def with_links(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"`arXiv \1 <https://arxiv.org/abs/\1>`__", paper)


# --- Presets --------------------------------------------------------------------------------------------------


def presets(kind: str) -> list[Path]:
    return sorted((ROOT / "configs" / kind).glob("*.yaml"))


def presets_of(info: OptimizerInfo) -> list[Path]:
    class_path = re.compile(rf"class_path: \S+\.{info.name}$", re.M)
    return [path for path in presets("optimizers") if class_path.search(path.read_text())]


def page_of_presets() -> str:
    blocks = [
        title("Presets"),
        "``lightning-optim fit -c NAME`` takes these files by name. ``-c`` may be repeated, and later files win: "
        "``lightning-optim fit -c stdlib-text -c namo``.",
    ]
    for kind in ("tasks", "optimizers"):
        blocks.append(title(kind.capitalize(), "-"))
        for path in presets(kind):
            blocks += [title(path.stem, "~"), listing(path)]
    return "\n\n".join(blocks) + "\n"


def listing(path: Path) -> str:
    return f".. literalinclude:: /../{path.relative_to(ROOT)}\n   :language: yaml"


# --- reStructuredText -----------------------------------------------------------------------------------------


def title(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]], widths: tuple[int, ...] = ()) -> str:
    lines = [".. list-table::", "   :header-rows: 1"]
    if widths:
        lines.append(f"   :widths: {' '.join(map(str, widths))}")
    lines.append("")
    for row in (header, *rows):
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return "\n".join(lines)


def toctree(pages: Iterable[str]) -> str:
    return "\n".join([".. toctree::", "   :hidden:", "", *(f"   {page}" for page in pages)])


# --- Sphinx ---------------------------------------------------------------------------------------------------


def write_pages(app: Sphinx) -> None:
    pages = {f"optimizers/{name}": page_of_optimizer(info) for name, info in OPTIMIZERS.items()}
    pages |= {"optimizers/index": page_of_optimizers(), "optimizers/shared": page_of_shared()}
    pages |= {path: page_of_module(path, names) for path, names in public_names().items()}
    pages["presets"] = page_of_presets()
    folder = Path(app.srcdir) / "reference"
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:  # Sphinx reads again what has been written.
            path.write_text(text)
    for path in folder.rglob("*.rst"):
        if path.relative_to(folder).with_suffix("").as_posix() not in pages:
            path.unlink()


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
