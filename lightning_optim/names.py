"""Names of parameters, whatever the modules are wrapped in."""

from __future__ import annotations

import re

#: What torch.compile, FSDP1, activation checkpointing and Lightning Fabric put between the parts of a name.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_original_module)\."
)


_PARAMETRISED = re.compile(r"\.?parametrizations\.(\w+)\.original\d*$")


def clean_name(name: str) -> str:
    """The name of a parameter without what wrappers put into it, in any order and however deep.

    Wrappers are torch.compile, DDP, FSDP1, activation checkpointing and ``Fabric.setup``. DDP's is an ordinary name,
    ``module``, and counts as one at the beginning only.

    >>> clean_name("module._orig_mod.blocks.0._checkpoint_wrapped_module.fc.weight")
    'blocks.0.fc.weight'
    >>> clean_name("_forward_module.module._orig_mod.0.weight"), clean_name("net.module.weight")
    ('0.weight', 'net.module.weight')
    """
    return _WRAPPERS.sub("", name).removeprefix("module.")


def spellings(name: str) -> set[str]:
    """The names by which a pattern may find a parameter: as its module has it, without wrappers, and, of a parametrised
    weight (``torch.nn.utils.parametrize``), that of the weight.

    >>> sorted(spellings("_orig_mod.fc.parametrizations.weight.original0"))[-2:]
    ['fc.parametrizations.weight.original0', 'fc.weight']
    """
    clean = clean_name(name)
    return {name, clean, _PARAMETRISED.sub(r".\1", clean).removeprefix(".")}
