"""What every rule promises the engine, seen in a few steps by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_optim.engine.rule import RULES, gives_keep

from .by_hand import Held, on_all
from .rows import each_configuration

STEPS = 8  # More than one refresh of eigenbases in the configurations of the rows.


@each_configuration
def test_a_rule_keeps_its_promises(name: str, arguments: dict[str, Any]) -> None:
    rule = RULES[name]
    held = Held(rule, arguments, (5, 4), slice(None))
    generator = torch.Generator().manual_seed(0)
    for t in range(1, STEPS + 1):
        g = torch.randn(1, 5, 4, generator=generator, dtype=torch.float64) + 0.5
        handed = g.clone()
        k = held.numbers(t)
        # They are computed on the host, in double precision, and become the 0-d tensors of compiled steps.
        plain = (bool, int, float, str, type(None), tuple)
        assert {key: x for key, x in k.items() if not isinstance(x, plain)} == {}, "scalars: numbers and switches only"
        (move,) = on_all([held], [handed], k)
        assert torch.equal(g, handed), "gradients are only read"
        own = gives_keep(rule, getattr(held.h, "decay", None))
        assert (move.keep is not None) is own, "only a rule with a decay of its own gives keep, and always"
        if not isinstance(move.step, Tensor) and "step" in k:
            assert move.step == k["step"], "ranks that do not run the update know its step by k.step"
        assert move.direction.shape == g.shape
        assert move.direction.isfinite().all()
        assert move.over is None or (move.over.shape == g.shape and bool((move.over > 0).all()))
        for x in (move.step, move.keep):
            assert not isinstance(x, Tensor) or torch.broadcast_shapes(x.shape, g.shape) == g.shape
