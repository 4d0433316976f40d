"""How orthogonal the updates of hidden matrices are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_optim.devices import able, full_precision, widest
from lightning_optim.diagnostics.charts import CHARTS
from lightning_optim.diagnostics.figures import spectra as spectra_figure
from lightning_optim.diagnostics.orthogonality import (
    factor_error,
    gram,
    orthogonality,
    orthogonality_of_gram,
    polar_error,
    scaled_gram,
)
from lightning_optim.diagnostics.parameter_change import Sums
from lightning_optim.engine.layout import layout_of, matrices_in, parts_of
from lightning_optim.processes import local_slices, sharded_dims
from lightning_optim.trainer import is_lightning

from .loop import steps_made
from .monitor import Monitor, Results, matches
from .recorder import Step, Watched

#: Equal matrices are measured together up to this many elements (64 MiB in float32).
_MOST_AT_ONCE = 1 << 24

_STATISTICS = ("error", "stable_rank", "spectral_norm")
#: From the reports of our matrix optimizers; the second only if asked for.
_REPORTED = ("factor_error", "polar_error")
_SPECTRUM = "spectrum/"


class OrthogonalityError(Monitor):
    r"""Orthogonality of the updates of hidden matrices, and of the factors that our matrix optimizers make.

    =================================== =============================================================================
    ``orthogonality/error``             relative distance of the change :math:`U` of a matrix in a step to the
                                        nearest multiple of an orthogonal matrix, in [0, 1)
    ``orthogonality/stable_rank``       :math:`\|U\|_F^2/\|U\|_2^2`
    ``orthogonality/spectral_norm``     :math:`\|U\|_2`, in units of the weights
    ``orthogonality/factor_error``      :math:`\|G-I\|_F/\sqrt r` of the orthogonal factor, which our matrix
                                        optimizers report before scaling and weight decay
    ``orthogonality/polar_error``       with ``polar``: relative distance of that factor from the true polar factor
    =================================== =============================================================================

    Each is the mean over hidden matrices. With ``layers``, the largest of each error is logged, too (``..._worst``,
    over all matrices), and each parameter's own values (``orthogonality_error/PARAMETER``, and ``PARAMETER/0``,
    ``PARAMETER/1``, ... where one holds several matrices). Definitions:
    :func:`lightning_optim.diagnostics.orthogonality`.

    Hidden matrices are those of :func:`lightning_optim.routing.route`, or of the parameter groups of a matrix
    optimizer of ours: convolutions are (out, in * k * k), a packed query, key and value projection three matrices.

    The change of a parameter includes weight decay, :math:`-\eta\lambda W`, so an optimizer with exactly orthogonal
    steps has an ``error`` above 0; so have NAMO-D and DeVA, whose steps are orthogonal before scaling only.
    ``factor_error`` does not see either. Five steps of Newton-Schulz are not meant to converge: with the
    coefficients of Muon, singular values between about 0.7 and 1.2, and a ``factor_error`` of 0.2 to 0.4, are
    normal.

    Sharded training adds up, in the one reduction, the smaller Gram matrix of each matrix where shards hold parts of
    the sum in it, and otherwise the matrix itself: at most as many float64 numbers as the matrices have elements.
    Choose few with ``parameters`` where that is too much. What our optimizers report is averaged over processes.

    Args:
        every_n_steps: As in :class:`.Monitor`.
        first_n_steps: As in :class:`.Monitor`.
        parameters: As in :class:`.Monitor`; hidden matrices only.
        layers: As in :class:`.Monitor`.
        polar: Compare factors with the polar factors of the same matrices by float64 singular value decompositions,
            which take long: for a look, not for every run. Only with our matrix optimizers.
        spectra: Send the singular values of each matrix's update to TensorBoard, as histograms
            (``orthogonality_spectrum/PARAMETER``) and, with matplotlib, as one figure (``orthogonality/spectra``); of
            the parameters in ``layers``, or of all if that is empty. Other loggers get nothing.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Deep(BoringModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 2))
        >>> monitor = OrthogonalityError(every_n_steps=2, layers=["*.weight"])
        >>> trainer = pl.Trainer(max_steps=2, callbacks=[monitor], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(Deep())
        >>> sorted(monitor.history)[:3]
        ['orthogonality/error', 'orthogonality/error_worst', 'orthogonality/spectral_norm']
        >>> "orthogonality_error/layer.0.weight" in monitor.history
        True
    """

    family = "orthogonality"
    charts: ClassVar = CHARTS["orthogonality"]
    needs_matrices = True
    needs_observations = True

    def __init__(
        self,
        every_n_steps: int | Callable[[int], bool] = 50,
        first_n_steps: int = 0,
        parameters: Sequence[str] = ("*",),
        layers: Sequence[str] = (),
        polar: bool = False,
        spectra: bool = False,
    ) -> None:
        super().__init__(every_n_steps, first_n_steps, parameters, layers)
        self.polar = polar
        self.spectra = spectra
        self._boards: list[Any] = []
        self._from_reports = _REPORTED if polar else _REPORTED[:1]
        #: For each part of a parameter, in order.
        self._reported: dict[tuple[str, Tensor], list[Tensor]] = defaultdict(list)
        self._orthogonalized: dict[Tensor, list[Tensor]] = defaultdict(list)
        self._informed = False

    # --- what our optimizers report -----------------------------------------------------------------------------

    def before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> bool:
        self._reported.clear()
        self._orthogonalized.clear()
        if self.spectra and trainer.is_global_zero:
            self._boards = [logger for logger in trainer.loggers if is_lightning(logger, "TensorBoardLogger")]
            self._x = steps_made(trainer)
        return bool(step.watched)

    def observe(self, parameter: Tensor, name: str, value: Tensor) -> None:
        if name == "momentum" and self.polar:
            self._orthogonalized[parameter].append(value.clone())
        if name == "orthogonal_factor":
            self._reported["factor_error", parameter].append(factor_error(value))
            if self._orthogonalized[parameter]:
                momentum = self._orthogonalized[parameter].pop(0)
                self._reported["polar_error", parameter].append(polar_error(value, momentum))

    # --- sums over processes ------------------------------------------------------------------------------------

    def sums(self, step: Step) -> dict[str, Tensor]:
        if self.polar and not self._reported and not self._informed:
            self._informed = True
            rank_zero_info(
                "OrthogonalityError: polar=True looks at factors that matrix optimizers of lightning_optim report, and "
                f"{type(step.optimizer).__name__} reports none."
            )
        sums: dict[str, Tensor] = {}
        for name in self._from_reports:
            reported = [self._reported.get((name, w.parameter)) for w in step.watched]
            zeros = [u.new_zeros(_blocks(w)) for w, u in zip(step.watched, step.change.updates)]
            sums[name] = _concatenated([torch.cat(x).to(zero) if x else zero for x, zero in zip(reported, zeros)])
            sums[f"{name}_count"] = _concatenated([zero + bool(x) for x, zero in zip(reported, zeros)])
        self._reported.clear()
        self._orthogonalized.clear()
        pairs = list(zip(step.watched, step.change.updates))
        if step.shards.groups:
            parts = [x for w, u in pairs for x in _parts(w, u)]
            return sums | {f"{_PART}{i}": part for i, part in enumerate(parts)}
        matrices = [x for w, u in pairs for x in matrices_in(u, _layout(w))]
        return sums | self._singular_values(map(_gram, matrices)) | _batched(orthogonality, matrices)

    def summed_from(self, step: Step, sums: Mapping[str, Tensor]) -> Sequence[Sequence[Tensor]]:
        parts = iter([[w.parameter] for w in step.watched for _ in _have_gram(w)])
        matrices = [w.parameter for w in step.watched for _ in range(_blocks(w))]
        return [next(parts) if name.startswith(_PART) else matrices for name in sums]

    def condense(self, step: Step, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = [x for name, x in sums.items() if name.startswith(_PART)]
        if not parts:
            return sums
        have_gram = [has_gram for w in step.watched for has_gram in _have_gram(w)]
        grams = [x if has_gram else gram(x) for has_gram, x in zip(have_gram, parts)]
        small = {name: x for name, x in sums.items() if not name.startswith(_PART)}
        return small | self._singular_values(grams) | _batched(orthogonality_of_gram, grams)

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        each = {name: sums[name] for name in _STATISTICS}
        for name in self._from_reports:
            each[name] = sums[name] / sums[f"{name}_count"]
        values = {name: float(x.nanmean()) for name, x in each.items()}
        for name in set(each) & {"error", *_REPORTED} if self.layers else ():
            values[f"{name}_worst"] = max([v for v in each[name].tolist() if v == v], default=math.nan)
        matrices = [name for w in step.watched for name in _names(w)]
        spectra = [row for name, x in sums.items() if name.startswith(_SPECTRUM) for row in x]
        self._show(step.label, dict(zip(matrices, spectra)))
        return Results(values, {name: dict(zip(matrices, x.tolist())) for name, x in each.items()})

    # --- spectra ------------------------------------------------------------------------------------------------

    def _singular_values(self, grams: Iterable[Tensor]) -> dict[str, Tensor]:
        """Of each matrix, largest first, from the Gram matrices of each parameter; nothing where no one asks."""
        if not self._boards:
            return {}
        spectra = {}
        for i, g in enumerate(grams):
            with full_precision(g):
                eigenvalues = torch.linalg.eigvalsh(able(g.nan_to_num(), torch.linalg.eigvalsh))
            spectra[f"{_SPECTRUM}{i}"] = eigenvalues.clamp(min=0).sqrt().flip(-1)
        return spectra

    def _show(self, label: str, spectra: dict[str, Tensor]) -> None:
        shown = {name: x for name, x in spectra.items() if not self.layers or matches(name, self.layers)}
        for board in self._boards:
            for name, values in shown.items():
                board.experiment.add_histogram(f"{label}orthogonality_spectrum/{name}", values.numpy(), self._x)
            if shown and find_spec("matplotlib"):
                figure = spectra_figure({name: x.tolist() for name, x in shown.items()}, "spectra of updates")
                board.experiment.add_figure(f"{label}orthogonality/spectra", figure, self._x)


# --- matrices in parameters ---------------------------------------------------------------------------------------


def _layout(w: Watched) -> dict[str, Any]:
    assert w.route is not None
    return layout_of(w.route.layout)


def _blocks(w: Watched) -> int:
    return sum(part.blocks for part in parts_of(w.parameter.shape, _layout(w)))


def _names(w: Watched) -> list[str]:
    return [w.name] if _blocks(w) == 1 else [f"{w.name}/{i}" for i in range(_blocks(w))]


def _gram(x: Tensor) -> Tensor:
    g, peak = scaled_gram(x)
    return g * peak[:, None, None] ** 2


def _concatenated(xs: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.to(xs[0].device) for x in xs])


def _batched(statistics: Callable[[Tensor], Sums], stacks: Sequence[Tensor]) -> Sums:
    """Statistics of each matrix of several stacks, in order; equal ones are measured together."""
    alike = defaultdict(list)
    for i, x in enumerate(stacks):
        alike[x.shape[1:], x.dtype, x.device].append(i)
    results: dict[int, Sums] = {}
    for (shape, *_), indices in alike.items():
        at_once = max(1, _MOST_AT_ONCE // (shape.numel() * max(len(stacks[i]) for i in indices)))
        for start in range(0, len(indices), at_once):
            chunk = indices[start : start + at_once]
            values = statistics(torch.cat([stacks[i] for i in chunk]))
            sizes = [len(stacks[i]) for i in chunk]
            columns = {name: x.split(sizes) for name, x in values.items()}
            results |= {i: {name: x[k] for name, x in columns.items()} for k, i in enumerate(chunk)}
    return {name: _concatenated([results[i][name] for i in range(len(stacks))]) for name in results[0]}


# --- sharded training ---------------------------------------------------------------------------------------------

_PART = "part/"


def _parts(w: Watched, u: Tensor) -> list[Tensor]:
    """What a rank adds for a parameter: Gram matrices if they are sums over ranks, otherwise the matrices.

    For each part, shape ``(blocks, r, r)`` or ``(blocks, m, n)``, in float64 where the device has it.
    """
    wide = widest(u.device)
    p = w.parameter
    whole = u.new_zeros(p.shape)
    whole[local_slices(p)] = u
    found = []
    for x, has_gram in zip(matrices_in(whole, _layout(w)), _have_gram(w)):
        if has_gram:
            peak = x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
            x = x / peak
            x = gram(x if _layout(w)["transposed"] else x.mT).to(wide) * peak.to(wide) ** 2
        found.append(x.to(wide))
    return found


def _have_gram(w: Watched) -> list[bool]:
    """Of each part, whether the smaller Gram matrix of each matrix is the sum of those of its shards.

    Its sums run over the longer dimension, which must be the only one that is sharded.
    """
    p, layout = w.parameter, _layout(w)
    sharded = {dim for dim, _ in sharded_dims(p)}
    parts = parts_of(p.shape, layout)
    if not sharded or (sharded == {0} and p.ndim > 2 and layout["blocks"] % p.shape[0] == 0):
        return [True] * len(parts)
    matrices = [part.matrix for part in parts]
    return [sharded == {0} and (n >= m if layout["transposed"] else m >= n) for m, n in matrices]
