"""What optimizers say of themselves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_optim.devices import full_precision, widest
from lightning_optim.diagnostics.charts import CHARTS, Chart
from lightning_optim.engine.rounding import RESIDUAL
from lightning_optim.engine.rule import Internal, as_attributes
from lightning_optim.engine.storage import read_all
from lightning_optim.processes import local
from lightning_optim.registry import internals_of

from .monitor import Monitor, Results
from .recorder import Step, Watched


class OptimizerInternals(Monitor):
    """Each rule's own scalars, as its file declares them.

    NAMO's adaptive scale, NAMO-D's clamp rate, DeVA's variance adaptation, the alignment of HVAdam's hidden vector,
    the refreshes of Anon, ...: ``lightning_optim.OPTIMIZERS[NAME].internals`` names and describes them. Of torch's Adam
    and AdamW it is the mean squared gradient over the mean second moment. Optimizers that declare nothing get nothing
    but a message. A matrix optimizer's fallback rule has its own, too.

    Logged as ``internals/NAME``, over all parameters together, and with ``layers`` of single parameters as
    ``internals_NAME/PARAMETER``. For the arguments see :class:`.Monitor`.

    Example:
        >>> from lightning_optim import OPTIMIZERS
        >>> for name, internal in OPTIMIZERS["NAMOD"].internals.items():
        ...     print(f"{name}: {internal.description}")
        adaptive_scale: mean over columns of the adaptive scale d, after the clamp
        clamp_rate: share of columns whose adaptive scale was clamped
        >>> monitor = OptimizerInternals(every_n_steps=10)
    """

    family = "internals"
    charts: ClassVar = CHARTS["internals"]
    needs_observations = True

    _internals: dict[Tensor, Mapping[str, Internal]]
    _reported: dict[tuple[str, Tensor], tuple[Tensor, ...]]
    _informed = False

    def charts_of(self, trainer: pl.Trainer) -> Mapping[str, Chart]:
        declared = any(internals_of(o, group) for o in trainer.optimizers for group in o.param_groups)
        return self.charts if declared else {}

    def before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> bool:
        self._internals = {w.parameter: internals_of(step.optimizer, w.group) for w in step.watched}
        self._reported = {}
        if step.watched and not any(self._internals.values()) and not self._informed:
            self._informed = True
            rank_zero_info(f"OptimizerInternals: {type(step.optimizer).__name__} declares no scalars of its own.")
        return any(map(bool, self._internals.values()))

    def observe(self, parameter: Tensor, name: str, value: Tensor) -> None:
        for key, internal in self._internals.get(parameter, {}).items():
            if internal.reported == name:
                sums = internal.sums(value)
                before = self._reported.get((key, parameter))  # of other parts of the parameter
                self._reported[key, parameter] = sums if before is None else tuple(map(torch.add, before, sums))

    def sums(self, step: Step) -> dict[str, Tensor]:
        device = step.change.updates[0].device
        dtype = widest(device)
        sums = {}
        with full_precision(step.change.updates[0]):
            for name, internal in self._declared().items():
                rows = [self._sums(step, w, name) for w in step.watched]
                for i in range(_width(internal)):
                    entries = [torch.zeros((), device=device) if row is None else row[i] for row in rows]
                    sums[f"{name}/{i}"] = torch.stack([x.to(device, dtype) for x in entries])
        self._reported = {}
        return sums

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        values, layers = {}, {}
        for name, internal in self._declared().items():
            parts = [sums[f"{name}/{i}"] for i in range(_width(internal))]
            values[name] = float(internal.value(*(x.sum() for x in parts)))
            layers[name] = dict(zip(step.names, internal.value(*parts).tolist()))
        self._internals = {}  # A callback outlives the module.
        return Results(values, layers)

    def _declared(self) -> dict[str, Internal]:
        return {name: internal for internals in self._internals.values() for name, internal in internals.items()}

    def _sums(self, step: Step, w: Watched, name: str) -> tuple[Tensor, ...] | None:
        p = w.parameter
        internal = self._internals[p].get(name)
        if internal is None:
            return None
        if internal.reported is not None:
            return self._reported.get((name, p))
        state = read_all({key: local(x) for key, x in step.optimizer.state[p].items() if key != RESIDUAL})
        if p.grad is None or "step" not in state:
            return None
        t, hyperparameters = int(state.pop("step")), as_attributes(w.group)
        return internal.sums(local(p.grad), SimpleNamespace(**state), t, hyperparameters)


def _width(internal: Internal) -> int:
    return len(inspect.signature(internal.value).parameters)
