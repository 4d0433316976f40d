"""Orthogonalisation: the polar factor ``U V^T`` of a matrix ``U S V^T``, exactly or by polynomial iteration."""

from .methods import METHODS, Iteration, exact_polar, find, iterate, orthogonalize

__all__ = ["METHODS", "Iteration", "exact_polar", "find", "iterate", "orthogonalize"]
