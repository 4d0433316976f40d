"""How far parameters move in a step, and in which direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import lightning.pytorch as pl
from torch import Tensor

from lightning_optim.diagnostics.charts import CHARTS, Chart
from lightning_optim.diagnostics.parameter_change import inner_products, sum_of_squares
from lightning_optim.diagnostics.update_size import cosine, update_size

from .monitor import Monitor, Results, layers_of
from .recorder import Step


class UpdateSize(Monitor):
    r"""Size and direction of the real change of the parameters in a step.

    ============================== ==================================================================================
    ``update/rms``                 root mean square of the change, in units of the weights
    ``update/to_weight``           norm of the change over norm of the weights; 1e-3 is a common guide
    ``update/cosine_to_descent``   cosine between the change and the negative gradient; 1 for plain gradient descent
    ``update/cosine_to_previous``  cosine to the change at the step measured before (the previous step if
                                   ``every_n_steps=1``), from at most 4,096 elements of each parameter
    ``update/stalled``             fraction of the elements with a gradient other than zero whose value did not change,
                                   as when updates are below the resolution of bfloat16 weights; with
                                   ``rounding="stochastic"`` those that chance left where they were
    ============================== ==================================================================================

    All parameters are taken together; with ``layers``, also each by itself (``update_rms/PARAMETER`` ...). The change
    includes weight decay, and what our optimizers keep of parameters in bfloat16 or float16 (``rounding="kahan"`` and
    ``"split"``).

    Args:
        **settings: Those of :class:`.Monitor`: ``every_n_steps``, ``first_n_steps``, ``parameters``, ``layers``.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> size = UpdateSize(every_n_steps=2)
        >>> trainer = pl.Trainer(max_steps=4, callbacks=[size], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> len(size.history["update/rms"])
        2
    """

    family = "update"
    charts: ClassVar = CHARTS["update"]

    def __init__(
        self,
        every_n_steps: int | Callable[[int], bool] = 50,
        first_n_steps: int = 0,
        parameters: Sequence[str] = ("*",),
        layers: Sequence[str] = (),
        norms_only: bool = False,
    ) -> None:
        super().__init__(every_n_steps, first_n_steps, parameters, layers)
        self.norms_only = norms_only

    def charts_of(self, trainer: pl.Trainer) -> Mapping[str, Chart]:
        norms = ("update size (RMS)", "update to weight")
        return {title: chart for title, chart in self.charts.items() if title in norms or not self.norms_only}

    def sums(self, step: Step) -> dict[str, Tensor]:
        change = step.change
        norms = {"numel": change.numel, "update_sq": change.update_sq, "weight_sq": change.weight_sq}
        if self.norms_only:
            return norms
        updates = step.sampled(change.updates)
        previous = self.remembered(step, "update", updates)
        self.remember(step, "update", updates)
        return norms | {
            "gradient_sq": change.gradient_sq,
            "update_dot_gradient": change.update_dot_gradient,
            "driven": change.driven,
            "stalled": change.stalled,
            "previous_sq": sum_of_squares(previous),
            "sampled_sq": sum_of_squares(updates),
            "with_previous": inner_products(updates, previous),
        }

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        together = _statistics(**{name: x.sum() for name, x in sums.items()})
        return Results({name: float(x) for name, x in together.items()}, layers_of(step, _statistics(**sums)))


def _statistics(*, numel: Tensor, update_sq: Tensor, weight_sq: Tensor, **details: Tensor) -> dict[str, Tensor]:
    size = update_size(numel=numel, update_sq=update_sq, weight_sq=weight_sq)
    return size | (_details(update_sq, **details) if details else {})


def _details(
    update_sq: Tensor,
    gradient_sq: Tensor,
    update_dot_gradient: Tensor,
    driven: Tensor,
    stalled: Tensor,
    previous_sq: Tensor,
    sampled_sq: Tensor,
    with_previous: Tensor,
) -> dict[str, Tensor]:
    return {
        "cosine_to_descent": cosine(-update_dot_gradient, update_sq, gradient_sq),
        "cosine_to_previous": cosine(with_previous, sampled_sq, previous_sq),
        "stalled": stalled / driven,
    }
