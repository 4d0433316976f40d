"""What the shared tests need to know of an optimizer: one :class:`Row` each, in a file of its own in ``rows``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import pytest
from hypothesis import strategies as st

from .references import Reference

Hyper: TypeAlias = dict[str, Any]
Strategies: TypeAlias = Mapping[str, st.SearchStrategy[Any]]
#: From the hyperparameters that a golden file names, and its variant, to our arguments. What it knows it takes out;
#: whatever is left over is a failure.
Adapter: TypeAlias = Callable[[Hyper, str], Hyper]
Amplifier: TypeAlias = Literal[
    "bases", "signs", "factor", "hidden vector", "powers", "cancellation", "cosine", "weights", "mixing"
]


@dataclass(frozen=True)
class Row:
    """One optimizer in the shared tests.

    Args:
        name: The optimizer.
        reference: Its float64 reference, with the same hyperparameters and defaults, written from the paper.
        configurations: Those that take different paths through its rule. Most tests run all of them, the slow ones the
            first, which has the defaults of what matters.
        golden: Adapters by the names of optimizers in golden files, or why there are no trajectories of released code.
        lr: A learning rate at which small models train.
        trajectory: Values of hyperparameters in comparisons with the reference over several steps, where those that
            :func:`.strategies.usual` derives from the declaration do not fit.
        fuzz: The same for fuzzing, where those of :func:`.strategies.extreme` do not fit.
        amplifies: What in it makes rounding errors large, of which tolerances depend. ``"bases"``: it rotates into
            eigenvectors. ``"signs"``: what it orthogonalises may consist of signs. ``"factor"``: it divides the polar
            factor by its own size. ``"hidden vector"``: it divides by the difference of nearly equal inner products,
            and has a variance of fourth powers. ``"powers"``: powers, whose vectorised form is not the scalar one.
            ``"cancellation"``: what is left of a large gradient in units of the root of eps is a small difference.
            ``"cosine"``: its step depends on one minus the ratio of nearly equal inner products. ``"weights"``: it
            multiplies weights by several rounded factors near one. ``"mixing"``: it adds multiples of large entries of
            a gradient to small ones.
        proportional: Whether its steps are proportional to the gradients, or to a power of them, as SGD's are.
    """

    name: str
    reference: type[Reference]
    configurations: Sequence[Hyper] = ({},)
    golden: Mapping[str, Adapter] | str = field(kw_only=True)
    lr: float = field(default=0.01, kw_only=True)
    trajectory: Strategies = field(default_factory=dict, kw_only=True)
    fuzz: Strategies = field(default_factory=dict, kw_only=True)
    amplifies: Collection[Amplifier] = field(default=(), kw_only=True)
    proportional: bool = field(default=False, kw_only=True)


# --- adapters of golden files -----------------------------------------------------------------------------------------


def take(hp: Hyper, *names: str, **renamed: str) -> Hyper:
    """Take the named entries out; ``renamed`` maps our name to the file's. Absent ones keep our default."""
    pairs = {name: name for name in names} | renamed
    return {ours: hp.pop(theirs) for ours, theirs in pairs.items() if theirs in hp}


def decay_form(hp: Hyper, switch: str) -> Hyper:
    """The form of weight decay that a switch of released code chooses."""
    return {"decay": "decoupled" if hp.pop(switch) else "coupled"} if switch in hp else {}


def leave_out(hp: Hyper, reason: str, **implemented: Any) -> None:
    """Take out switches of released code of which one value is implemented; cases with another are skipped."""
    for name, value in implemented.items():
        if hp.pop(name, value) != value:
            pytest.skip(f"only {name}={value} is implemented: {reason}")


def iterations(hp: Hyper) -> Hyper:
    """The orthogonaliser of so many of Keller Jordan's steps."""
    return {"orthogonalizer": f"kj{hp.pop('ns_steps', 5)}"}


# --- what SOAP and spectral DeVA share --------------------------------------------------------------------------------


def eigenbasis_golden(hp: Hyper) -> Hyper:
    beta = hp.pop("shampoo_beta")
    names = take(
        hp, "lr", "betas", "eps", "weight_decay", "precondition_frequency", "correct_bias",
        max_precondition_dim="max_precond_dim",
    )  # fmt: skip
    return names | {"shampoo_beta": None if beta < 0 else beta, "stagger": False}


#: Limits below and above the lengths of axes that are tried.
EIGENBASIS_TRAJECTORY: Strategies = {
    "shampoo_beta": st.sampled_from([None, 0.5, 0.9]),
    "max_precondition_dim": st.sampled_from([5, 10000]),
}
EIGENBASIS_FUZZ: Strategies = {
    "shampoo_beta": st.sampled_from([None, 0.0, 0.5, 0.99]),
    "max_precondition_dim": st.sampled_from([4, 10000]),
}
