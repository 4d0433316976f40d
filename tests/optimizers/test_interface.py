"""The interface of every optimizer is the one that is stored: see :mod:`.interface`."""

from __future__ import annotations

import json

from .interface import FILE, HOW, interface
from .rows import OURS, each_optimizer

STORED = json.loads(FILE.read_text())


@each_optimizer
def test_an_interface_is_the_stored_one(name: str) -> None:
    assert name in STORED, f"{name} is new. {HOW}"
    assert interface(name) == STORED[name], HOW


def test_no_optimizer_has_gone() -> None:
    assert STORED.keys() <= set(OURS), HOW
