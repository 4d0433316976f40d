"""The base classes of algorithms: each is a kind of rule and the optimizer that runs it.

>>> import torch
>>> class Signs(Elementwise, about="a step of fixed length, with momentum"):
...     lr: float = 1e-3
...     momentum: float = 0.9
...     buffers = ("m",)
...
...     @staticmethod
...     def update(g, s, k):
...         s.m.lerp_(g, 1 - k.momentum)
...         return Move(s.m.sign(), k.lr)
>>> w = torch.nn.Parameter(torch.zeros(2))
>>> w.grad = torch.tensor([3.0, -0.1])
>>> Signs([w], lr=0.5).step()
>>> w.data
tensor([-0.5000,  0.5000])
"""

from __future__ import annotations

from .optimizer import RuleOptimizer
from .rule import ElementwiseRule, GroupRule, MatrixRule, ModelRule, Move
from .two_rules import MatrixOptimizer

__all__ = ["Elementwise", "Group", "Matrix", "Model", "Move"]


class Elementwise(RuleOptimizer, ElementwiseRule):
    """An optimizer whose update of one element depends on that element only; see :class:`.rule.ElementwiseRule`."""


class Group(RuleOptimizer, GroupRule):
    """An element-wise optimizer that needs sums over its parameter group; see :class:`.rule.GroupRule`."""


class Model(RuleOptimizer, ModelRule):
    """An optimizer of the whole model at once, which sees the loss; see :class:`.rule.ModelRule`."""


class Matrix(MatrixOptimizer, MatrixRule):
    """An optimizer of hidden matrices, with a fallback rule for everything else; see :class:`.rule.MatrixRule`."""
