"""Orthogonalisation: the polar factor ``U V^T`` of a matrix ``U S V^T``, exactly or by polynomial iteration."""

from .methods import exact_polar, iteration_dtype, orthogonalize
from .minimax import minimax
from .presets import METHODS, Iteration, find
from .products import symmetric_product

__all__ = [
    "METHODS",
    "Iteration",
    "exact_polar",
    "find",
    "iteration_dtype",
    "minimax",
    "orthogonalize",
    "symmetric_product",
]
