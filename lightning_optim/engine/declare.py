"""From a declaration to a class: constructor, signature and documentation.

An algorithm declares its fields and its docstring. The engine adds what all optimizers share: its own arguments, and
the documentation of arguments that mean the same everywhere.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .plain_values import plain_hyperparameters

if TYPE_CHECKING:
    from .rule import Rule

#: Documentation of arguments that mean the same in every optimizer. A docstring's own entry takes precedence.
SHARED_ARGUMENTS = {
    "params": "Parameters, named parameters or parameter groups.",
    "lr": r"Learning rate :math:`\eta`.",
    "betas": r":math:`(\beta_1, \beta_2)`.",
    "weight_decay": "Weight decay coefficient.",
    "decay": 'The form of weight decay, here as in every optimizer: ``"decoupled"`` shrinks parameters by '
    '``1 - lr * weight_decay``; ``"coupled"`` adds ``weight_decay * p`` to the gradient, and so to every statistic; '
    '``"independent"`` shrinks by ``1 - weight_decay`` at any learning rate but 0; ``"cautious"`` (arXiv 2510.12402) '
    'is decoupled, only where the step does not move an element away from zero; ``"corrected"`` (AdamC, arXiv '
    "2506.02285) shrinks by ``1 - lr * weight_decay * lr / lr_max``, with the schedule's highest rate. The default is "
    "the paper's.",
    "decoupled": 'Older name: ``True`` for ``decay="decoupled"``, ``False`` for ``decay="coupled"``.',
    "cautious": "Mask steps (arXiv 2411.16085): elements whose sign is not the gradient's stay where they are, and the "
    "others of a matrix, or of any other parameter, move further, by the number of elements over that of the moving "
    "ones plus one. Weight decay is not masked.",
    "norm_control": 'What happens to the norms of matrices: ``"none"``, nothing; ``"hyperball"`` (arXiv 2606.16899) '
    'keeps each at what it is and makes steps of ``lr`` times that, in the place of weight decay; ``"radial"``, the '
    "radial brake, halves their growth. Vectors, and what the fallback rule has, are not controlled.",
    "orthogonalizer": 'A name in :data:`lightning_optim.polar.METHODS`, or ``"exact"``.',
    "fallback": "Rule for everything that is not a hidden matrix: any element-wise or group optimizer by name, or "
    '``"AdamW"``.',
    "fallback_lr": "Its learning rate. If ``None``, this and the next two are the fallback's own defaults: ``lr`` and "
    "``betas`` are those of matrices only.",
    "fallback_betas": "Its betas.",
    "fallback_eps": "Its eps.",
    "fallback_weight_decay": "Its weight decay. If ``None``, that of matrices, or the fallback's own default where its "
    "weight decay is another thing, a part of the gradient or independent of the learning rate.",
    "fallback_decay": "The form of its weight decay. If ``None``, that of matrices where it is not their default, else "
    "the fallback's own.",
    "maximize": "Ascend instead of descend.",
    "skip_nonfinite": "Skip and count steps whose gradients hold NaN or infinity.",
    "max_consecutive_skips": "Steps skipped in a row after which ``step`` raises an error, or ``None``.",
    "backend": "How the step is run; see :class:`~lightning_optim.engine.optimizer.RuleOptimizer`.",
    "state_dtype": "How running averages are stored; see :class:`~lightning_optim.engine.optimizer.RuleOptimizer`.",
    "rounding": "How results are stored in bfloat16 and float16 parameters; see "
    ":class:`~lightning_optim.engine.optimizer.RuleOptimizer`.",
}
_RAISES = {
    "matrix": "ValueError: A hyperparameter is out of range, or a parameter does not fit its role.",
    "others": "ValueError: A hyperparameter is out of range, or a parameter cannot be updated in place.",
}
_WIDTH = 120


def constructor(cls: type[Rule], params: Any) -> Callable[..., None]:
    """``__init__`` with the declared fields, then the engine's arguments, as an explicit signature.

    Args:
        cls: The declaration.
        params: Type of the first argument.
    """
    fields = [*cls.fields.values(), *cls.arguments.values()]
    defaults = {f"_{field.name}": field.default for field in fields}
    positional, named = ([f"{x.name}=_{x.name}" for x in fields if x.kw_only is kind] for kind in (False, True))
    text = ", ".join(["self", "params", *positional, "*", *named])
    given = ", ".join(f"{field.name!r}: {field.name}" for field in fields)
    namespace: dict[str, Any] = {"plain": plain_hyperparameters, **defaults}
    exec(f"def __init__({text}):\n    self._construct(params, plain({{{given}}}))", namespace)  # As dataclasses does.
    function = namespace["__init__"]
    function.__annotations__ = {"params": params, **{field.name: field.annotation for field in fields}, "return": None}
    function.__qualname__ = f"{cls.__qualname__}.__init__"
    function.__module__ = cls.__module__
    return function


def documentation(cls: type[Rule]) -> str | None:
    """The docstring of a declaration, completed.

    It says what is experimental, documents every argument in the order of the signature, and lists the errors.
    """
    if cls.__doc__ is None:
        return None  # python -OO
    text = inspect.cleandoc(cls.__doc__)
    sections = _sections(text)
    own = _entries(sections.get("Args", ""))
    names = ["params", *cls.fields, *cls.arguments]
    entries = [own.get(name) or _wrapped_entry(name, SHARED_ARGUMENTS.get(name, "")) for name in names]
    sections["Args"] = "\n".join(entries)
    sections.setdefault("Raises", _RAISES["matrix" if cls.kind == "matrix" else "others"])
    order = [name for name in sections if name not in ("", "Args", "Raises", "Example")]
    parts = [sections[""].rstrip()]
    if cls.experimental:
        summary, _, rest = parts[0].partition("\n\n")
        note = textwrap.fill(f"**Experimental**: {cls.experimental}", _WIDTH - 4, break_long_words=False)
        parts = [summary, note, *([rest] if rest else [])]
    for name in ("Args", "Raises", *order, "Example"):
        if name in sections:
            parts.append(f"{name}:\n{textwrap.indent(sections[name].strip(chr(10)), '    ')}")
    return "\n\n".join(parts) + "\n"


def _sections(text: str) -> dict[str, str]:
    """The sections of a docstring by heading, without indentation; the heading of the text before them is empty."""
    pieces = re.split(r"^(Args|Raises|Attributes|Example):\n", text, flags=re.MULTILINE)
    return {"": pieces[0]} | {name: textwrap.dedent(body) for name, body in zip(pieces[1::2], pieces[2::2])}


def _entries(section: str) -> dict[str, str]:
    """The whole entries of a section ``Args``, by name."""
    found = re.split(r"^(?=\w+:)", section, flags=re.MULTILINE)
    return {entry.partition(":")[0]: entry.strip("\n") for entry in found if entry.strip()}


def _wrapped_entry(name: str, text: str) -> str:
    return "\n".join(textwrap.wrap(f"{name}: {text}", _WIDTH - 8, subsequent_indent="    ", break_long_words=False))
