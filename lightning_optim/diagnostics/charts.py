"""What a chart of a diagnostic shows, what is healthy, and what to do otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: The questions that charts answer, in the order in which a reader asks them. Charts stand below their question.
QUESTIONS = (
    "Does it learn?",
    "How far do the weights move?",
    "Are the gradients sound?",
    "How much of it is noise?",
    "What do gradient spikes do?",
    "Are updates of matrices orthogonal?",
    "What does the optimizer say of itself?",
    "What do the diagnostics cost?",
)


@dataclass(frozen=True)
class Chart:
    """A chart of some scalars.

    Args:
        title: Its title.
        tags: Regular expressions of the tags that it shows, which may begin after the label of an optimizer.
        about: What is shown, in a sentence.
        unit: The unit of the values.
        advice: What to do where values are not healthy, in a sentence.
        question: Which of :data:`QUESTIONS` it answers.
        healthy: Smallest and largest value of what is usually healthy, ``None`` for no bound.
        log: Whether values are best seen on a logarithmic axis.

    Example:
        >>> chart = Chart("stalled", ("update/stalled$",), "Share of weights that a step does not move.", "none",
        ...     "use float32 weights.", QUESTIONS[1], healthy=(None, 0.1))
        >>> chart.description.partition(" Unit: ")[2]
        'none. Usually healthy: at most 0.1. Otherwise: use float32 weights.'
    """

    title: str
    tags: tuple[str, ...]
    about: str
    unit: str
    advice: str
    question: str
    healthy: tuple[float | None, float | None] = (None, None)
    log: bool = False

    @property
    def bounds(self) -> str:
        """What is healthy, in words; empty where there is no bound."""
        low, high = self.healthy
        if low is None and high is None:
            return ""
        if low is None:
            return f"at most {high:g}"
        return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"

    @property
    def description(self) -> str:
        """What it shows, its unit, what is healthy, and what to do otherwise."""
        healthy = f" Usually healthy: {self.bounds}." if self.bounds else ""
        return f"{self.about} Unit: {self.unit}.{healthy} {'Otherwise' if healthy else 'Look for'}: {self.advice}"

    def shows(self, tag: str) -> bool:
        """Whether a scalar is in the chart."""
        return any(re.match(f"(.*/)?{pattern}", tag) for pattern in self.tags)


def titled(*charts: Chart) -> dict[str, Chart]:
    """Charts by their titles."""
    return {chart.title: chart for chart in charts}


def by_question(charts: Iterable[Chart]) -> dict[str, list[Chart]]:
    """Charts below their questions, in the order of the questions."""
    charts = list(charts)
    known = dict.fromkeys([*QUESTIONS, *(chart.question for chart in charts)])
    groups = {question: [chart for chart in charts if chart.question == question] for question in known}
    return {question: of_it for question, of_it in groups.items() if of_it}


#: Charts of what Lightning and the module log, which no diagnostic makes.
LEARNING: Mapping[str, Chart] = titled(
    Chart(
        "training loss", (r"^train(ing)?[/_]loss.*", r"^loss(_step|_epoch)?$"),
        "Loss of training batches, as the module logs it.", "that of the loss",
        "a loss that does not fall, that rises for good (the learning rate is too high), or that jumps.",
        QUESTIONS[0],
    ),
    Chart(
        "validation", (r"^val(id(ation)?)?[/_].*",),
        "Validation metrics, as the module logs them.", "that of each metric",
        "a validation loss that rises while the training loss falls: the model overfits.",
        QUESTIONS[0],
    ),
    Chart(
        "learning rate", (r"^lr-.*",),
        "Learning rate of each parameter group, as LearningRateMonitor logs it.", "that of the optimizer",
        "a schedule that ends long before the run does, or a warm-up that is too short.",
        QUESTIONS[0], log=True,
    ),
)  # fmt: skip

#: What the diagnostics cost.
COST = Chart(
    "cost of the diagnostics", (r"diagnostics/overhead_share$",),
    "Share of the time of training batches that the diagnostics took since the last value.", "none, from 0 to 1",
    "raise every_n_steps, or choose a lower tier.",
    QUESTIONS[-1], healthy=(None, 0.05),
)  # fmt: skip

#: The charts of each diagnostic by title, by the first part of their tags.
CHARTS: dict[str, dict[str, Chart]] = {
    "training": titled(
        Chart(
            "learning rate by rule", (r"training/lr$", r"training/lr_fallback$"),
            "Learning rate of the matrices, where an optimizer has a rule for them, and of the fallback rule.",
            "that of the optimizer", "a schedule that ends long before the run does.",
            QUESTIONS[0], log=True,
        ),
        Chart(
            "update to weight by role", (r"training/(matrix|other)_to_weight$",),
            "Norm of the change over the norm of the parameters, of hidden matrices and of all others.", "none",
            "matrices that stand still while the others move.",
            QUESTIONS[1], log=True,
        ),
        Chart(
            "growth of weights", (r"training/growth$",),
            "Norm of all parameters over that before the first measured step.", "none",
            "growth by a factor within few steps: the learning rate is too high.",
            QUESTIONS[1], log=True,
        ),
    ),
    "update": titled(
        Chart(
            "update to weight", (r"update/to_weight$",),
            "Norm of the change of all parameters in a step over the norm of the parameters.", "none",
            "below, the learning rate may be too small; above, too large.",
            QUESTIONS[1], healthy=(1e-4, 1e-2), log=True,
        ),
        Chart(
            "update size (RMS)", (r"update/rms$",),
            "Root mean square of the change of all parameters in a step.", "that of the weights",
            "jumps, and a size that does not follow the learning rate.",
            QUESTIONS[1], log=True,
        ),
        Chart(
            "direction of updates", (r"update/cosine_.*",),
            "Cosine of the change to the negative gradient (1 is plain gradient descent) and to the change measured "
            "before.", "none, from -1 to 1",
            "a cosine to the change before that stays below 0: each step turns back the one before, since the learning "
            "rate is too large.",
            QUESTIONS[1],
        ),
        Chart(
            "stalled elements", (r"update/stalled$",),
            "Share of the weights that have a gradient and did not change in a step.", "none, from 0 to 1",
            "updates are lost to rounding: keep float32 weights (bf16-mixed), or choose rounding='split'.",
            QUESTIONS[1], healthy=(None, 0.1),
        ),
    ),
    "sign_collapse": titled(
        Chart(
            "sign collapse", (r"sign_collapse/index$",),
            "How equal the entries of an update are in size: 1 for a sign vector, 0.64 for a Gaussian one.",
            "none, from 0 to 1",
            "the optimizer follows only the sign of the gradient.",
            QUESTIONS[1], healthy=(None, 0.95),
        ),
    ),
    "gradient": titled(
        Chart(
            "gradient norm", (r"gradient/norm$", r"gradient/norm_clipped$", r"spike/norm_max$"),
            "Norm of the gradient of all parameters: before clipping, as the optimizer consumed it, and the largest of "
            "all steps since the last value.", "loss per unit of the weights",
            "growth by orders of magnitude (diverging), or decay to nothing (vanishing gradients, or done).",
            QUESTIONS[2], log=True,
        ),
        Chart(
            "clipped steps", (r"gradient/clipped_fraction$",),
            "Share of the measured steps whose gradient was clipped, a running mean.", "none, from 0 to 1",
            "the clipping threshold sets the step size, unless the optimizer does not follow the gradient's size: "
            "raise it, or lower the learning rate.",
            QUESTIONS[2], healthy=(None, 0.5),
        ),
        Chart(
            "skipped steps and non-finite gradients", (r"gradient/skipped_steps$", r"gradient/nonfinite$"),
            "Steps so far that the loss scaler or the optimizer skipped, and elements of the gradient that were NaN or "
            "infinite since the last value.", "steps and elements",
            "more than a few at the start: gradients overflow. Look at the data, lower the learning rate, or use "
            "bf16-mixed.",
            QUESTIONS[2],
        ),
        Chart(
            "zero gradients", (r"gradient/zeros$",),
            "Share of the elements of the gradient that are exactly zero.", "none, from 0 to 1",
            "units are dead, or inputs (rare tokens, padded borders) never reach them.",
            QUESTIONS[2], healthy=(None, 0.5),
        ),
        Chart(
            "gradient noise scale", (r"gradient/noise_scale$",),
            "Batch size at which noise and signal of the gradient are equal (simple noise scale).", "examples",
            "a noise scale far above the batch size: larger batches would pay; far below: smaller ones would do.",
            QUESTIONS[3], log=True,
        ),
    ),
    "update_variance": titled(
        Chart(
            "noise in updates", (r"update_variance/.*_share$",),
            "Share of the mean square of the updates that is variance: over the steps measured lately (online), or "
            "over mini-batches in the state the optimizer is in (conditional).", "none, from 0 to 1",
            "values near 1 while the loss no longer falls: lower the learning rate, or use larger batches.",
            QUESTIONS[3],
        ),
        Chart(
            "update noise to signal", (r"update_variance/.*_ratio$",),
            "Variance of the updates over the square of their mean.", "none",
            "growth over a run is usual; lower learning rates and larger batches bring it down.",
            QUESTIONS[3], log=True,
        ),
        Chart(
            "angle between mini-batches' updates", (r"update_variance/cosine_spread$",),
            "1 minus the mean cosine between the update from one mini-batch and the mean of these updates.",
            "none, 0 where all agree",
            "values near 1: mini-batches disagree on the direction.",
            QUESTIONS[3],
        ),
    ),
    "spike": titled(
        Chart(
            "gradient spikes: log10 of the z-score", (r"spike/zscore_log10$",),
            "How far the largest gradient norm since the last value is above what is usual: the decimal logarithm of "
            "its robust z-score, 0 for a z-score of 1 or less. Spikes begin at a z-score of 6, which is 0.78.",
            "powers of ten of standard deviations",
            "look at the batches of those steps, and clip gradients.",
            QUESTIONS[4], healthy=(None, 0.78),
        ),
        Chart(
            "gradient spikes: size of the updates after one", (r"spike/(amplification|suppression)$",),
            "Largest and smallest update after a spike, relative to the updates before it.", "none, 1 for no response",
            "above, clip gradients; below, updates are suppressed, as by a second moment that has to forget the spike: "
            "clip gradients or choose a smaller beta2.",
            QUESTIONS[4], healthy=(0.1, 10.0), log=True,
        ),
        Chart(
            "gradient spikes: steps until updates recovered", (r"spike/recovery_steps$",),
            "Steps after a spike until the size of the updates stays at what it was before.", "steps",
            "many steps: the optimizer remembers the spike, in momentum or in a second moment.",
            QUESTIONS[4],
        ),
        Chart(
            "response to a virtual spike", (r"spike/probe_(amplification|displacement)/.*",),
            "What a spike of each size would do now: the largest update relative to that without it (amplification), "
            "and by how many updates parameters would end up elsewhere (displacement).", "none",
            "values that grow with the size of the spike: the optimizer does not bound its response. Clip gradients.",
            QUESTIONS[4], log=True,
        ),
        Chart(
            "steps to recover from a virtual spike", (r"spike/probe_recovery_steps/.*",),
            "Steps after a virtual spike until the size of the updates is what it is without it.", "steps",
            "many steps: the optimizer remembers the spike, in momentum or in a second moment.",
            QUESTIONS[4],
        ),
    ),
    "orthogonality": titled(
        Chart(
            "orthogonality error", (r"orthogonality/(error|factor_error|polar_error).*",),
            "Distance of the updates of hidden matrices (error), and of the factors that a matrix optimizer makes of "
            "momentum (factor_error), from an orthogonal matrix; means over matrices.", "none, 0 for orthogonal",
            "a factor_error above what its iteration explains (0.2 to 0.4, up to 0.7 with kj5): choose an "
            "orthogonalizer with more steps, as pe6 or pe8. Optimizers that do not orthogonalise have an error near 1.",
            QUESTIONS[5],
        ),
        Chart(
            "stable rank of updates", (r"orthogonality/stable_rank$",),
            "How many directions an update of a hidden matrix has: squared Frobenius over squared spectral norm, mean "
            "over matrices.", "none, from 1 to the rank",
            "values near 1: all updates go in one direction.",
            QUESTIONS[5],
        ),
        Chart(
            "spectral norm of updates", (r"orthogonality/spectral_norm$",),
            "Largest singular value of the update of a hidden matrix, mean over matrices.", "that of the weights",
            "jumps, and a norm that does not follow the learning rate.",
            QUESTIONS[5], log=True,
        ),
    ),
    "internals": titled(
        Chart(
            "optimizer internals", (r"internals/.*",),
            "Scalars of the optimizer's own; `lightning-optim list NAME` describes them.", "that of each",
            "values that jump, or that stay at a bound.",
            QUESTIONS[6],
        ),
    ),
}  # fmt: skip
