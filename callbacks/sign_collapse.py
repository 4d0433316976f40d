"""Whether updates have become sign vectors."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_optim.diagnostics.charts import CHARTS
from lightning_optim.diagnostics.sign_collapse import sign_collapse, sign_collapse_sums

from .monitor import Monitor, Results, layers_of
from .recorder import Step


class SignCollapse(Monitor):
    r"""How equal the magnitudes of the entries of the updates are, :math:`\|u\|_1^2 / (d\,\|u\|_2^2)`.

    ``sign_collapse/index`` is 1 for a sign vector, 0.64 for Gaussian updates, and near 0 if few entries carry the
    update; see :func:`lightning_optim.diagnostics.sign_collapse`. It is the mean over parameters, weighted by their
    sizes, since a common scale of all parameters means nothing; with ``layers``, also that of each. For the arguments
    see :class:`.Monitor`.

    Example:
        >>> SignCollapse(every_n_steps=10, layers=["*.weight"]).layers
        ('*.weight',)
    """

    family = "sign_collapse"
    charts: ClassVar = CHARTS["sign_collapse"]

    def sums(self, step: Step) -> dict[str, Tensor]:
        return sign_collapse_sums(step.change)

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        index = sign_collapse(**sums)["index"]
        numel = sums["numel"] * index.isfinite()
        mean = (index.nan_to_num() * numel).sum() / numel.sum()
        return Results({"index": float(mean)}, layers_of(step, {"index": index}))
