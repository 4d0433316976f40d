"""How far parameters move in a step, and in which direction."""

from __future__ import annotations

from typing import ClassVar

import lightning.pytorch as pl  # noqa: F401 (for the example)
from torch import Tensor

from lightning_optim.diagnostics.change import inner_products, sample, sum_of_squares
from lightning_optim.diagnostics.update_size import update_size, update_size_sums

from .monitor import Monitor, Results, total_and_layers
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
                                   as when updates are below the resolution of bfloat16 weights
    ============================== ==================================================================================

    All parameters are taken together; with ``layers``, also each by itself (``update_rms/PARAMETER`` ...). The change
    includes weight decay.

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
    charts: ClassVar = {
        "update size (RMS)": ("Multiline", [r"update/rms$"]),
        "update to weight": ("Multiline", [r"update/to_weight$"]),
        "direction of updates": ("Multiline", [r"update/cosine_.*"]),
        "stalled elements": ("Multiline", [r"update/stalled$"]),
    }

    def sums(self, step: Step) -> dict[str, Tensor]:
        updates = [sample(u) for u in step.change.updates]
        previous = self.remembered(step, "update", updates)
        self.remember(step, "update", updates)
        return update_size_sums(step.change) | {
            "previous_sq": sum_of_squares(previous),
            "sampled_sq": sum_of_squares(updates),
            "with_previous": inner_products(updates, previous),
        }

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        return total_and_layers(_statistics, step, sums)


def _statistics(*, previous_sq: Tensor, sampled_sq: Tensor, with_previous: Tensor, **sums: Tensor) -> dict[str, Tensor]:
    return update_size(**sums) | {"cosine_to_previous": with_previous / (previous_sq * sampled_sq).sqrt()}
