"""Pictures of layers: heat maps over the run, spectra of matrices, histograms."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_optim.devices import able, full_precision, widest
from lightning_optim.diagnostics import figures
from lightning_optim.diagnostics.layer_maps import Pictures as Drawn
from lightning_optim.engine.layout import layout_of, matrices_in
from lightning_optim.routing import clean_name
from lightning_optim.trainer import is_lightning

from .loop import steps_made
from .monitor import Layers, Monitor, Results
from .recorder import Step
from .tensorboard import is_board

#: Share of the time of training that drawing may take; what is due waits until it fits, and at the latest is drawn
#: when training has ended.
_SHARE = 0.003

#: Values of single parameters that become heat maps, with their titles; of the second part with ``details`` only.
_MAPS = {
    "update/to_weight": "update to weight",
    "gradient/norm": "gradient norm",
    "update_variance/online_share": "noise in updates",
    "update/stalled": "stalled elements",
}
_MORE_MAPS = {
    "update/rms": "update size (RMS)",
    "update/cosine_to_descent": "cosine of updates to descent",
    "sign_collapse/index": "sign collapse",
    "orthogonality/error": "orthogonality error",
}

#: Matrices whose spectra are drawn have at most so many elements, and at most so many singular values.
_MOST_ELEMENTS, _MOST_VALUES = 1 << 20, 1024


class Pictures(Monitor):
    """Pictures of layers for TensorBoard's pages Images and Histograms, and for reports.

    - *Heat maps*, a row per parameter and a column per measured step: update to weight, gradient norm, noise in
      updates, stalled elements; with ``details``, also size and direction of updates, sign collapse and orthogonality
      error. They show what the other monitors of the Trainer measure.
    - *Spectra*: the singular values of some hidden matrices and of their updates. A flat line is an orthogonal matrix.
    - *Histograms* of weights and of updates over their root mean square, from at most 4,096 elements of each parameter.

    They are drawn when training has ended, and now and then before, as long as drawing takes less than 0.3 % of the
    time. What they are drawn from is written to ``pictures.json`` in the folder of the run, where
    ``lightning-optim diagnostics --out report.html`` finds it: beside the logs of Lightning's ``TensorBoardLogger`` or
    ``CSVLogger``, and nowhere without one of them. Of sharded parameters there are heat maps only.

    Args:
        every_n_steps: As in :class:`.Monitor`.
        first_n_steps: As in :class:`.Monitor`.
        parameters: As in :class:`.Monitor`.
        details: Draw more: all heat maps, histograms of single parameters, and up to 32 spectra instead of 4.

    Attributes:
        drawn: What the pictures are drawn from.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Pictures(every_n_steps=10)], accelerator="cpu", logger=False)
    """

    family = "pictures"

    def __init__(
        self,
        every_n_steps: int | Callable[[int], bool] = 50,
        first_n_steps: int = 0,
        parameters: Sequence[str] = ("*",),
        details: bool = False,
    ) -> None:
        super().__init__(every_n_steps, first_n_steps, parameters)
        self.details = details
        self.drawn = Drawn()
        self._samples: dict[str, dict[str, Tensor]] = {}
        self._matrices: dict[str, dict[str, Tensor]] = {}
        self._boards: list[Any] = []
        self._folder: Path | None = None
        self._order: dict[str, int] = {}
        self._x = self._drawn_at = -1
        self._begun = self._spent = 0.0
        self._cost = 1.0  # seconds, a guess before the first time

    # --- what is kept of a measured step ------------------------------------------------------------------------

    def before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> bool:
        self._x = steps_made(trainer)
        return bool(step.watched) and trainer.is_global_zero

    def sums(self, step: Step) -> dict[str, Tensor]:
        change = step.change
        if self._folder is not None and not step.shards.groups:
            names = [f"{step.label}{name}" for name in step.names]
            self._samples = {
                kind: dict(zip(names, (x.detach().float().clone() for x in step.sampled(tensors))))
                for kind, tensors in (("updates", change.updates), ("weights", change.weights))
            }
            self._keep_matrices(step)
        return {}  # The other ranks draw nothing: what this one asks for must not be part of their reduction.

    def _keep_matrices(self, step: Step) -> None:
        fitting = [
            (w, x, y)
            for w, x, y in zip(step.watched, step.change.updates, step.change.weights)
            if w.is_matrix and x.numel() <= _MOST_ELEMENTS and _rank(w, x) <= _MOST_VALUES
        ]
        most = 32 if self.details else 4
        chosen = [fitting[round(i * (len(fitting) - 1) / max(1, most - 1))] for i in range(min(most, len(fitting)))]
        if len(fitting) <= most:
            chosen = fitting
        self._matrices = {
            kind: {f"{step.label}{w.name}": _matrix(w, xs[i]).detach().clone() for w, *xs in chosen}
            for i, kind in enumerate(("updates", "weights"))
        }

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        return Results({})

    def look(self, step: Step, layers: Mapping[str, Layers]) -> None:
        maps = _MAPS | _MORE_MAPS if self.details else _MAPS
        values = {
            # From the input to the output, as the module has them, and not by groups as the optimizer.
            name: {f"{step.label}{layer}": of[layer] for layer in sorted(of, key=self._position)}
            for name, of in layers.items()
            if name in maps
        }
        self.drawn.maps.add(self._x, values)
        elapsed = time.perf_counter() - self._begun
        if self._boards and self._spent + self._cost <= _SHARE * elapsed:
            self._draw()

    def _position(self, layer: str) -> int:
        return self._order.get(layer, self._order.get(layer.partition("/")[0], len(self._order)))

    # --- drawing ------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        if self._folder is None or self._drawn_at == self._x or not self.drawn.maps.steps:
            return
        begun = time.perf_counter()
        self._drawn_at = self.drawn.spectra_step = self._x
        self.drawn.spectra = {
            kind: {name: _singular_values(x) for name, x in of.items()} for kind, of in self._matrices.items()
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        self.drawn.write(self._folder)
        for board in self._boards:
            self._show(board.experiment)
        self._cost = time.perf_counter() - begun
        self._spent += self._cost

    def _show(self, writer: Any) -> None:
        for kind, samples in self._samples.items():
            scaled = {
                name: x / (x.square().mean().sqrt() or 1.0) if kind == "updates" else x for name, x in samples.items()
            }
            finite = {name: y for name, x in scaled.items() if (y := x[x.isfinite()].cpu()).numel()}
            title = "update over its RMS" if kind == "updates" else "weight"
            if finite:
                writer.add_histogram(f"all layers/{title}", torch.cat(list(finite.values())).numpy(), self._x)
            for name, x in finite.items() if self.details else ():
                writer.add_histogram(f"{title}/{name}", x.numpy(), self._x)
        if find_spec("matplotlib") is None:
            return
        for name, title in (_MAPS | _MORE_MAPS if self.details else _MAPS).items():
            if (figure := figures.heat_map(self.drawn.maps, name, title)) is not None:
                writer.add_figure(f"layers/{title}", figure, self._x)
        for kind, values in self.drawn.spectra.items():
            if values:
                writer.add_figure(f"spectra/{kind}", figures.spectra(values, f"spectra of {kind}"), self._x)

    def _finish(self) -> None:
        try:
            self._draw()
        except Exception as error:  # A picture must not end a run.
            rank_zero_warn(f"Pictures could not be drawn ({type(error).__name__}: {error}).")

    # --- hooks --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._order = {clean_name(name): i for i, (name, _) in enumerate(pl_module.named_parameters())}
        loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
        self._boards = [logger for logger in loggers if is_board(logger)]
        # Folders of other loggers are not those of one run.
        folders = [x.log_dir for x in loggers if is_board(x) or is_lightning(x, "CSVLogger")]
        self._folder = next((Path(folder) for folder in folders if "://" not in folder), None)
        self._begun, self._spent, self._drawn_at = time.perf_counter(), 0.0, -1
        if self._folder is not None and trainer.global_step and not self.drawn.maps.steps:
            self.drawn = Drawn.read(self._folder)
            self.drawn.maps.forget_after(trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._finish()
        super().on_exception(trainer, pl_module, exception)

    def forget(self) -> None:
        super().forget()
        self.drawn, self._samples, self._matrices = Drawn(), {}, {}

    def _detach(self, trainer: pl.Trainer) -> None:
        super()._detach(trainer)
        self._boards, self._folder, self._samples, self._matrices = [], None, {}, {}


def _matrix(w: Any, x: Tensor) -> Tensor:
    """The first matrix in a tensor like the whole parameter, as its rule sees it."""
    return matrices_in(x, layout_of(w.route.layout))[0][0]


def _rank(w: Any, x: Tensor) -> int:
    return min(_matrix(w, x).shape)


def _singular_values(x: Tensor) -> list[float]:
    x = x.nan_to_num().float()
    peak = float(x.abs().max()) if x.numel() else 0.0
    if not peak:
        return [0.0] * min(x.shape)
    x = x / peak
    with full_precision(x):
        gram = x @ x.mT if x.shape[0] <= x.shape[1] else x.mT @ x
        squares = torch.linalg.eigvalsh(able(gram, torch.linalg.eigvalsh, widest(gram.device)))
    return [float(f"{value:.4g}") for value in (squares.clamp(min=0).sqrt().flip(-1) * peak).tolist()]
