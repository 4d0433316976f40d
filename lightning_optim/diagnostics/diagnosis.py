"""What is wrong with a run, in order of weight.

A rule looks at the :class:`.evidence.Evidence` of a run for one cause. Rules stand in the order of causes and their
consequences: what a cause that was found explains is not said a second time. The bounds are documented in the guide on
diagnostics, with the runs that they were chosen on.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from .causes import CAUSES
from .coverage import patterns
from .evidence import Array, Evidence, Layer
from .findings import SEVERITIES, Diagnosis, Finding, Severity
from .run import Run

Rule = Callable[[Evidence], "Finding | None"]
#: Every rule by the cause that it looks for.
RULES: dict[str, Rule] = {}

#: Causes and those that are but their consequences.
CONSEQUENCES: dict[str, tuple[str, ...]] = {
    "nothing_moves": ("lr_too_low", "matrices_stand_still", "no_signal", "not_trained", "lost_to_rounding"),
    "nonfinite_loss": ("warmup_missing", "diverged", "lr_too_high", "gradient_spikes", "nothing_moves",
                       "exploding_gradients"),
    "loss_scale_collapse": ("warmup_missing", "nonfinite_loss", "diverged", "nothing_moves", "gradient_spikes",
                            "no_signal"),
    "exploding_gradients": ("warmup_missing", "gradient_spikes", "lr_too_high", "diverged", "no_signal"),
    "diverged": ("warmup_missing", "lr_too_high", "gradient_spikes", "overfitting", "dead_units",
                 "no_signal", "vanishing_gradients"),
    "layer_lr_too_high": ("warmup_missing", "diverged", "lr_too_high", "dead_units", "gradient_spikes",
                          "no_signal", "overfitting", "vanishing_gradients"),
    "lr_too_high": ("warmup_missing", "dead_units", "gradient_spikes", "no_signal", "overfitting",
                    "vanishing_gradients"),
    "warmup_missing": ("no_signal", "dead_units", "vanishing_gradients", "lr_too_low"),
    "momentum_too_long": ("warmup_missing", "no_signal", "lr_too_low", "diverged", "lr_too_high", "gradient_spikes"),
    "matrices_stand_still": ("lr_too_low", "no_signal"),
    "clipping_limits_step": ("lr_too_low", "no_signal"),
    "lost_to_rounding": ("lr_too_low", "no_signal", "matrices_stand_still"),
    "lr_too_low": ("no_signal", "overfitting"),
    "schedule_ended_early": ("lr_too_low", "no_signal", "lost_to_rounding", "nothing_moves"),
    "dead_units": ("vanishing_gradients", "no_signal", "lr_too_low"),
    "vanishing_gradients": ("no_signal", "lr_too_low"),
    "decay_dominates": ("warmup_missing", "no_signal", "dead_units", "vanishing_gradients", "decay_on_norms"),
    "no_signal": ("overfitting",),
    "loss_reduction": ("gradient_spikes", "overfitting"),
    "untouched_rows": ("overfitting",),
}  # fmt: skip


def rule(function: Rule) -> Rule:
    """Add a rule; its name is that of the cause."""
    name = function.__name__.removeprefix("_")
    assert name in CAUSES, name
    RULES[name] = function
    return function


def diagnose(run: Run) -> Diagnosis:
    """Find out what is wrong with a run.

    Args:
        run: Its logs, with the records of :class:`.RunRecord`.

    Returns:
        The findings, and the coverage of the parameters. A run without records is not judged.

    Example:
        >>> diagnose(Run("a", {"val/loss": ([0], [1.0])})).verdict
        'unknown'
    """
    evidence = Evidence(run)
    if not evidence.settings:
        return Diagnosis(run.name, "", measured=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # A median of nothing is NaN, and NaN is above no bound.
        found = {name: finding for name in CAUSES if (finding := RULES[name](evidence))}
    explained = {c for name in found for c in CONSEQUENCES.get(name, ())}
    left = [finding for name, finding in found.items() if name not in explained]
    order = sorted(left, key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(run.name, ", ".join(evidence.optimizers), tuple(order), evidence.coverage)


def _severity(e: Evidence, otherwise: Severity = "wasteful") -> Severity:
    return otherwise if e.learns else "broken"


def _named(layers: Iterable[Layer]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _percent(x: float) -> str:
    return f"{100 * x:.2g} %" if abs(x) < 0.1 else f"{100 * x:.0f} %"


def _first(steps: Array, where: NDArray[np.bool_]) -> int | None:
    """The first step of those for which something is true."""
    return int(steps[where][0]) if where.any() else None


# --- what the run is made of --------------------------------------------------------------------------------------


@rule
def _not_trained(e: Evidence) -> Finding | None:
    """Weights, not single vectors, without a rule or a gradient. A run must have been measured three times."""
    if e.coverage is None or len(e.rates[0]) < 3:
        return None
    bad = {
        state: [p for p in parameters if sum(n > 1 for n in p.shape) >= 2]
        for state, parameters in e.coverage.untrained().items()
        if state in ("in no optimizer", "no gradient")
    }
    chosen = [p for parameters in bad.values() for p in parameters]
    if not chosen:
        return None
    share = e.coverage.share(chosen)
    words = {"in no optimizer": "in no optimizer", "no gradient": "never given a gradient"}
    parts = [f"{patterns(p.name for p in ps)} {words[state]}" for state, ps in bad.items() if ps]
    return Finding(
        "not_trained",
        "wasteful",
        f"{_percent(share)} of the parameters ask for a gradient and are not trained: {'; '.join(parts)}.",
        "Give all parameters to the optimizer, and let the loss depend on them; or set requires_grad to False.",
        where=tuple(p.name for p in chosen),
        evidence={"share": share},
    )


@rule
def _frozen_between(e: Evidence) -> Finding | None:
    """Fewer frozen weights than trained ones, with trained ones on both sides: neither a frozen start nor LoRA."""
    if e.coverage is None:
        return None
    weights = [p for p in e.coverage.parameters if sum(n > 1 for n in p.shape) >= 2]
    trained = [i for i, p in enumerate(weights) if p.state == "trained"]
    frozen = [p for i, p in enumerate(weights) if p.state == "frozen" and trained and trained[0] < i < trained[-1]]
    if not frozen or len(frozen) > len(trained) / 2:
        return None
    share = e.coverage.share(frozen)
    return Finding(
        "frozen_between",
        "worth a look",
        f"{patterns(p.name for p in frozen)} ({_percent(share)} of the parameters) have requires_grad=False, while "
        "layers before and after them are trained.",
        "If that is not meant, unfreeze them before the optimizer is built.",
        where=tuple(p.name for p in frozen),
        evidence={"share": share},
    )


@rule
def _loss_reduction(e: Evidence) -> Finding | None:
    """The training loss is an integer multiple, or fraction, of the validation loss, by 30 %: that of the batch.

    Or, of a classifier, of the logarithm of its outputs before training.
    """
    if not e.has_loss:
        return None
    batch, parts = e.settings["batch_size"], e.settings["accumulate"]
    factors = {f: words for f, words in (
        (batch * parts, "batch size times accumulation"), (batch, "batch size"), (parts, "accumulation"),
    ) if f > 2}  # fmt: skip
    ratio, reference = math.nan, ""
    if e.validation_loss is not None:
        at, values = e.validation_loss
        before = [np.median(e.loss[e.steps <= x][-5:]) for x in at if (e.steps <= x).any()]
        pairs = [b / v for b, v in zip(before, values) if v > 0]
        if pairs:
            ratio, reference = float(pairs[0]), "the validation loss"
    outputs = e.settings.get("outputs", 0)
    if outputs >= 2 and not reference:
        ratio, reference = float(e.loss[0]) / math.log(outputs), f"ln {outputs}, that of a classifier before training"
    if not reference or not ratio > 0:
        return None
    for factor, words in factors.items():
        for times, form in ((factor, "summed instead of averaged"), (1 / factor, "divided twice")):
            if abs(math.log(ratio / times)) < 0.25 and (times > 1 or words == "accumulation"):
                return Finding(
                    "loss_reduction",
                    _severity(e),
                    f"The training loss is {ratio:.3g} times {reference}, and {words} is {factor}: it is {form}.",
                    "Average the loss over the batch; Lightning itself divides by accumulate_grad_batches.",
                    int(e.steps[0]),
                    evidence={"ratio": ratio, "factor": times},
                )
    return None


@rule
def _stuck_data(e: Evidence) -> Finding | None:
    """Losses of the same place in successive epochs are correlated, beyond their trend: three epochs of eight steps."""
    period, n = e.settings.get("epoch_steps", 0), len(e.loss)
    if not e.has_loss or period < 8 or n < 3 * period or not np.isfinite(e.loss).all():
        return None
    if len(e.steps) != e.steps[-1] - e.steps[0] + 1:  # losses of blocks of steps
        return None
    logs = np.log(np.maximum(e.loss, 1e-12))
    # Differences take the trend out.
    change = np.diff(logs - running_mean(logs, 3))
    a, b = change[:-period], change[period:]
    correlation = float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0
    if correlation < max(0.5, 4 / math.sqrt(len(a))):
        return None
    return Finding(
        "stuck_data",
        "worth a look",
        f"The losses of one epoch ({period} steps) go up and down at the same steps as those of the one before "
        f"(correlation {correlation:.2f}): the batches come in the same order.",
        "Shuffle the training data: DataLoader(..., shuffle=True), or a sampler with set_epoch.",
        evidence={"correlation": correlation, "epoch_steps": period},
    )


def running_mean(x: Array, side: int) -> Array:
    """Mean over a window that reaches ``side`` values to each side."""
    kernel = np.ones(2 * side + 1)
    return np.convolve(x, kernel, "same") / np.convolve(np.ones(len(x)), kernel, "same")


# --- what is broken while it runs ---------------------------------------------------------------------------------


def _grew_before(e: Evidence, i: int) -> bool:
    """Whether loss or gradients had grown before the loss at a place was not finite any more."""
    before, norms = e.loss[max(0, i - 5) : i], e.norms[max(0, i - 5) : i]
    if not len(before) or not np.isfinite(before).all():
        return False
    usual = np.nanmedian(e.norms[:i]) if np.isfinite(e.norms[:i]).any() else math.nan
    grown = bool(np.max(before) > 2 * e.first_loss and e.first_loss > 0)
    return grown or bool(np.isfinite(norms).any() and np.nanmax(norms) > 100 * usual)


@rule
def _nonfinite_loss(e: Evidence) -> Finding | None:
    """A loss that is not finite, while neither the losses nor the gradients of the five steps before had grown."""
    bad = ~np.isfinite(e.loss)
    if not bad.any():
        return None
    i = int(np.argmax(bad))
    if _grew_before(e, i):
        return None
    poisoned = bool(bad[i:].all()) and i < len(bad) - 1
    count = "and at every step since" if poisoned else f"at {int(bad.sum())} of {len(bad)} steps"
    last = f" It was {e.loss[i - 1]:.3g} the step before." if i else ""
    return Finding(
        "nonfinite_loss",
        "broken",
        f"The loss was not finite at step {int(e.steps[i])}, {count}, and had not grown before.{last}",
        "Look at the batch of that step for NaN, infinity or an empty target, and at logarithms, divisions and square "
        "roots of zero in the loss.",
        int(e.steps[i]),
        evidence={"count": int(bad.sum()), "poisoned": poisoned},
    )


@rule
def _loss_scale_collapse(e: Evidence) -> Finding | None:
    """A loss scaler starts at 65,536 and may skip some steps until it has found its scale: sixteen are too many."""
    if not e.skipped or "16" not in e.settings["precision"] or e.settings["precision"].startswith("bf16"):
        return None
    count = e.skipped[-1][1]
    if count <= max(16, 0.05 * e.length):
        return None
    return Finding(
        "loss_scale_collapse",
        "broken",
        f"{count} of {e.length} steps were skipped because gradients were not finite in float16.",
        "Use bf16-mixed, whose range is that of float32, or take the operation that overflows out of autocast.",
        next(s for s, n in e.skipped if n > 0),
        evidence={"skipped": count},
    )


def _outliers(e: Evidence, factor: float) -> NDArray[np.intp]:
    """Places of gradient norms that are a factor above the median of the 32 before."""
    before = np.concatenate([np.full(32, math.nan), e.norms[:-1]])
    usual = np.nanmedian(np.lib.stride_tricks.sliding_window_view(before, 32), axis=-1)
    found = np.isfinite(e.norms) & (e.norms > factor * usual)
    return np.flatnonzero(found & (np.arange(len(e.norms)) >= 8))


@rule
def _exploding_gradients(e: Evidence) -> Finding | None:
    """Norms of 20 times the usual at 2 % of the steps, at usual losses; or, before the first update, of 50 times if the
    loss was not a tenth of that above the usual, of 8 times where a classifier begins at three times the loss of one
    that knows nothing."""
    far = _far(e)
    if not np.isfinite(e.norms).sum() > 30 or (far and float(np.median([r for r, _ in far])) > TOO_FAR):
        return None
    usual, largest = float(np.nanmedian(e.norms)), float(np.nanmax(e.norms))
    places = _outliers(e, 20.0)
    calm = [e.loss[i] < 10 * np.median(e.loss[max(0, i - 8) : i]) for i in places]
    places = places[np.array(calm, bool)]
    from_the_start = bool(e.norms[0] > 8 * usual)
    if not e.begins_far_above_chance:  # Gradients of a loss that falls to almost nothing do the same.
        fell = float(e.loss[0] / np.nanmedian(e.loss)) if e.has_loss else 1.0
        from_the_start = bool(e.norms[0] > max(50.0, 10 * fell) * usual)
    if from_the_start:
        places = np.flatnonzero(e.norms > min(20 * usual, e.norms[0] / 2))
    elif len(places) < max(3, 0.02 * len(e.norms)):
        return None
    weights = sorted(e.weights, key=lambda layer: -float(np.nanmax(layer.gradient)))
    return Finding(
        "exploding_gradients",
        _severity(e),
        f"The gradient norm went from its usual {usual:.2g} up to {largest:.2g}, far above it at {len(places)} of "
        f"{len(e.norms)} steps, largest in {weights[0].name if weights else 'all layers'}.",
        "Clip gradients, bound recurrent weights (orthogonal initialisation of gain 1), or add normalisation.",
        int(e.steps[places[0]]),
        _named(weights[:3]),
        {"outliers": len(places), "usual": usual, "largest": largest},
    )


@rule
def _diverged(e: Evidence) -> Finding | None:
    """The loss ends half above its start, or where it began after it had fallen to a half; or NaN after growth."""
    if not e.has_loss:
        return None
    bad = ~np.isfinite(e.loss)
    lost = bad.any() and _grew_before(e, int(np.argmax(bad)))
    start = float(e.loss[0])
    last = e.last_loss
    rose = last > 1.5 * start or (e.best_loss < 0.5 * start and last > 0.9 * start)
    if not lost and not rose:
        return None
    if bad.any() and not lost:
        return None
    calm = np.flatnonzero(~bad & (e.loss <= 1.2 * start if last > 1.2 * start or lost else e.loss <= 2 * e.best_loss))
    since = int(e.steps[min(int(calm[-1]) + 1, len(e.steps) - 1)]) if len(calm) else int(e.steps[0])
    end = "not a number any more" if lost else f"{last:.3g}"
    return Finding(
        "diverged",
        "broken",
        f"The loss began at {start:.3g}, was {e.best_loss:.3g} at best, and has been rising since step {since}; at the "
        f"end it is {end}.",
        "Lower the learning rate by a factor of ten, and raise it again once the loss falls.",
        since,
        evidence={"first": start, "best": e.best_loss, "last": math.nan if lost else last},
    )


@rule
def _nothing_moves(e: Evidence) -> Finding | None:
    """Not one update other than zero at two measured steps or more, the first left out for a warm-up from zero."""
    measured = [layer for layer in e.layers if len(layer.steps) >= 2]
    if not measured or any((layer.update[1:] > 0).any() for layer in measured):
        return None
    rate = float(e.rates[1].max()) if len(e.rates[1]) else math.nan
    why = "The learning rate is 0." if rate == 0 else "Gradients are zero or steps are skipped."
    return Finding(
        "nothing_moves",
        "broken",
        f"No parameter moved at any of {len(measured[0].steps)} measured steps. {why}",
        "Set a learning rate; if there is one, look at skipped steps and at requires_grad.",
        0,
        evidence={"lr": rate},
    )


# --- learning rates -----------------------------------------------------------------------------------------------

#: An update of three tenths of what the weights were before training replaces them in three steps.
TOO_FAR = 0.3
#: Weights that have come less far than a twentieth of their size are where they began.
STANDS_STILL = 0.05


def _reach(layer: Layer) -> float:
    """The second largest update relative to the first weights, so that a single spike does not count."""
    known = np.sort(layer.reach[np.isfinite(layer.reach)])
    return float(known[-2]) if len(known) > 1 else math.nan


def _far(e: Evidence) -> list[tuple[float, Layer]]:
    pairs = [(_reach(layer), layer) for layer in e.weights if not layer.is_embedding]
    return sorted(((r, layer) for r, layer in pairs if r == r), key=lambda pair: -pair[0])


@rule
def _layer_lr_too_high(e: Evidence) -> Finding | None:
    """Updates above 0.3 of the weights before training in half of the layers at most, ten times the others'."""
    far = _far(e)
    fast = [(r, layer) for r, layer in far if r > TOO_FAR]
    others = [r for r, _ in far[len(fast) :]]
    if not fast or not others or len(fast) > len(far) / 2 or fast[0][0] < 10 * float(np.median(others)):
        return None
    first, layer = fast[0]
    since = _first(layer.steps, layer.reach > TOO_FAR)
    return Finding(
        "layer_lr_too_high",
        _severity(e),
        f"{patterns(x.name for _, x in fast)}: one update is up to {first:.2g} times the weights before training, "
        f"{first / float(np.median(others)):.0f} times as much as in the other layers; its learning rate is "
        f"{layer.group.get('lr', math.nan):.2g}.",
        "Lower the learning rate of this layer's parameter group to that of the others.",
        since,
        _named(x for _, x in fast),
        {"update_to_first_weight": first, "others": float(np.median(others)), "lr": layer.group.get("lr")},
    )


@rule
def _lr_too_high(e: Evidence) -> Finding | None:
    """Updates above 0.3 of the weights before training in half of the layers or more, at two measured steps."""
    far = _far(e)
    if not far or float(np.median([r for r, _ in far])) < TOO_FAR:
        return None
    middle = float(np.median([r for r, _ in far]))
    growth = max(float(np.nanmax(layer.growth)) for _, layer in far)
    top = far[0][1]
    now = float(top.update[-1] / top.weight[-1])
    return Finding(
        "lr_too_high",
        _severity(e),
        f"Updates are as large as {_percent(middle)} of the weights before training (healthy: about 1 %), and weights "
        f"have grown up to {growth:.3g} times, which hides it: now updates are {_percent(now)} of them.",
        "Lower the learning rate by a factor of ten to a hundred.",
        _first(top.steps, top.reach > TOO_FAR),
        _named(layer for _, layer in far[:3]),
        {"update_to_first_weight": middle, "growth": growth, "fall": e.fall},
    )


#: First updates above this part of the weights before training are large for a network that needs a warm-up.
LARGE_AT_FIRST = 0.04


@rule
def _warmup_missing(e: Evidence) -> Finding | None:
    """No warm-up; first updates above 0.04 of the weights, whatever the size of gradients; gradients that fell to half
    of the first one; and a loss that never fell by a sixth."""
    rates = e.rates[1]
    if e.learns or e.length < 50 or len(rates) < 3 or not rates[0] > 0.5 * rates.max():
        return None
    if any(group.get("scale_invariant") is not True for group in e.groups):
        return None
    early = [float(layer.reach[layer.steps < 0.1 * e.length].max(initial=0.0)) for layer in e.weights]
    reach = float(np.median(early)) if early else math.nan
    first, usual = float(e.norms[0]), float(np.nanmedian(e.norms[e.length // 10 :]))
    if not LARGE_AT_FIRST < reach < TOO_FAR or not first > 2 * usual:
        return None
    return Finding(
        "warmup_missing",
        "broken",
        f"The learning rate is at its peak from the first step on, where updates are as large as {_percent(reach)} of "
        f"the weights (healthy: about 1 %). The loss began at {e.first_loss:.3g} and is {e.last_loss:.3g}, and "
        f"gradients have fallen to {_percent(usual / first)} of the first one: the network got stuck at once.",
        "Raise the learning rate over the first tenth of the run (warm-up), or lower it by a factor of three.",
        0,
        evidence={"update_to_first_weight": reach, "gradient_left": usual / first, "lr": float(rates.max())},
    )


def _travel(layers: Sequence[Layer]) -> float:
    return float(np.median([layer.travel for layer in layers])) if layers else math.nan


@rule
def _matrices_stand_still(e: Evidence) -> Finding | None:
    """Matrices that moved by a twentieth of their size at most, all updates added up; others ten times as far."""
    matrices = [layer for layer in e.weights if layer.group.get("role") == "matrix"]
    others = [layer for layer in e.layers if layer.group.get("role") == "fallback" and layer.first > 0]
    near, far = _travel(matrices), _travel(others)
    if not (near < STANDS_STILL and far > 10 * near) or e.length < 20:
        return None
    rule_name = matrices[0].group["rule"]
    return Finding(
        "matrices_stand_still",
        _severity(e),
        f"In {e.length} steps, the matrices that {rule_name} trains have moved by {_percent(near)} of their size at "
        f"most, and the parameters of the fallback rule by {_percent(far)}: it alone makes the loss fall.",
        f"Raise the learning rate of {rule_name} (now {matrices[0].group['lr']:.2g}); that of the fallback is another.",
        0,
        _named(matrices[:5]),
        {"matrices": near, "others": far, "lr": matrices[0].group["lr"]},
    )


@rule
def _clipping_limits_step(e: Evidence) -> Finding | None:
    """Only where an optimizer follows the size of the gradient; others are not harmed by clipping."""
    clip = e.settings.get("clip")
    _, share = e.scalar("gradient/clipped_fraction")
    if not clip or not len(share) or any(group.get("scale_invariant") is not False for group in e.groups):
        return None
    usual = float(np.nanmedian(e.norms)) if np.isfinite(e.norms).any() else math.nan
    travel = _travel(e.weights)
    if share[-1] < 0.9 or not usual > 10 * clip or not travel < 4 * STANDS_STILL:
        return None
    return Finding(
        "clipping_limits_step",
        _severity(e),
        f"{_percent(float(share[-1]))} of the gradients are clipped, from a norm of {usual:.2g} to {clip:.2g}, and "
        f"steps of {e.optimizers[0]} are as large as its gradients: the weights moved by {_percent(travel)}.",
        f"Clip at the usual norm or above ({usual:.2g}), or raise the learning rate with it.",
        int(e.steps[0]) if len(e.steps) else 0,
        evidence={"clipped": float(share[-1]), "usual": usual, "threshold": clip},
    )


@rule
def _lr_too_low(e: Evidence) -> Finding | None:
    """Weights that moved by a twentieth of their size at most in all, while the loss fell by a fifth at most."""
    travel = _travel(e.weights)
    if not travel < STANDS_STILL or not e.has_loss or not e.fall < 0.2 or e.length < 40:
        return None
    return Finding(
        "lr_too_low",
        _severity(e),
        f"In {e.length} steps the weights have moved by {_percent(travel)} of their size at most, and the loss from "
        f"{e.first_loss:.3g} to {e.last_loss:.3g}. The learning rate is at most {float(e.rates[1].max()):.2g}.",
        "Raise the learning rate by a factor of ten, and again while the loss stays calm.",
        0,
        evidence={"travel": travel, "fall": e.fall, "lr": float(e.rates[1].max())},
    )


@rule
def _schedule_ended_early(e: Evidence) -> Finding | None:
    """The learning rate below a thousandth of its peak for the last three tenths of the run."""
    steps, rates = e.rates
    if len(rates) < 4 or rates.max() <= 0:
        return None
    alive = np.flatnonzero(rates > 1e-3 * rates.max())
    last = steps[alive[-1]]
    if len(rates) - 1 - alive[-1] < 2 or e.length - last < 0.3 * e.length:
        return None
    return Finding(
        "schedule_ended_early",
        "wasteful",
        f"The learning rate has been below a thousandth of its peak since step {int(steps[alive[-1] + 1])} of "
        f"{e.length}: the rest of the run trained nothing.",
        "Give the schedule the length of the run (total_steps), counted in optimizer steps.",
        int(steps[alive[-1] + 1]),
        evidence={"peak": float(rates.max()), "last": float(rates[-1])},
    )


@rule
def _momentum_too_long(e: Evidence) -> Finding | None:
    """Momentum that averages over half the run or more, of a run of a hundred steps or more."""
    for group in e.groups:
        beta = group.get("momentum", (group.get("betas") or [0.0])[0])
        if not isinstance(beta, (int, float)) or not 0.99 <= beta < 1:
            continue
        horizon = 1 / (1 - beta)
        if e.length >= 100 and horizon > 0.5 * e.length:
            return Finding(
                "momentum_too_long",
                _severity(e),
                f"{group['rule']} averages gradients over {horizon:.0f} steps (momentum {beta:g}), and the run has "
                f"{e.length}: updates follow gradients of weights that are long gone.",
                "Use a momentum of 0.9 to 0.95.",
                0,
                evidence={"horizon": horizon, "steps": e.length, "fall": e.fall},
            )
    return None


# --- network and data ---------------------------------------------------------------------------------------------


@rule
def _dead_units(e: Evidence) -> Finding | None:
    """Half of a layer's units or more without a gradient at each of the last measured steps, three at least."""
    dead = []
    for layer in e.layers:
        late = layer.zero_rows[len(layer.zero_rows) // 2 :]
        skip = layer.is_embedding or layer.parameter.kind in ("head", "experts", "transposed experts")
        if not skip and layer.is_weight and len(late) >= 3 and float(np.nanmin(late)) >= 0.5:
            dead.append((float(np.nanmin(late)), layer))
    if not dead:
        return None
    since = min(_first(layer.steps, layer.zero_rows >= 0.5) or 0 for _, layer in dead)
    share, last = dead[-1]
    return Finding(
        "dead_units",
        _severity(e),
        f"{_percent(share)} of the units of {last.name} get no gradient at any measured step"
        f"{f', and of {len(dead) - 1} layers before it' if len(dead) > 1 else ''}.",
        "Look at biases and initialisation before ReLU, or use GELU or LeakyReLU; a learning rate that is too high "
        "kills units as well.",
        since,
        _named(layer for _, layer in reversed(dead)),
        {"share": share},
    )


@rule
def _vanishing_gradients(e: Evidence) -> Finding | None:
    """Gradients of the first quarter of the weights a thousandth of those of the last, at four weights or more."""
    weights = [layer for layer in e.weights if not layer.is_embedding]
    if len(weights) < 4 or e.learns:
        return None
    sizes = np.array([float(np.median(layer.gradient[: max(1, len(layer.gradient) // 2)])) for layer in weights])
    quarter = max(1, len(weights) // 4)
    first, last = float(np.median(sizes[:quarter])), float(np.median(sizes[-quarter:]))
    if not last > 0 or first > 1e-3 * last:
        return None
    small = [layer for layer, size in zip(weights, sizes) if size < 1e-3 * last]
    return Finding(
        "vanishing_gradients",
        "broken",
        f"Gradients fall from {last:.1e} in {weights[-1].name} to {first:.1e} in {weights[0].name}, and the loss does "
        f"not fall (from {e.first_loss:.3g} to {e.last_loss:.3g}).",
        "Add residual connections or normalisation, use ReLU or GELU, or initialise for the depth.",
        int(weights[0].steps[0]),
        _named(small),
        {"first": first, "last": last},
    )


@rule
def _decay_dominates(e: Evidence) -> Finding | None:
    """Half of the weights have shrunk to a half, by updates that pointed to zero while they did."""
    shrunk = []
    for layer in e.weights:
        late = float(layer.growth[-1]) if len(layer.growth) else math.nan
        before = np.concatenate([[1.0], layer.growth[:-1]])
        while_large = layer.along[before > 0.5]
        if late < 0.5 and len(while_large) and float(np.nanmedian(while_large)) < -0.5:
            shrunk.append((late, layer))
    if not shrunk or len(shrunk) < len(e.weights) / 2:
        return None
    late, layer = min(shrunk, key=lambda pair: pair[0])
    rate, decay = layer.group.get("lr", math.nan), layer.group.get("weight_decay", math.nan)
    return Finding(
        "decay_dominates",
        _severity(e),
        f"Weights have shrunk to {_percent(float(np.median([x for x, _ in shrunk])))} of what they were, by updates "
        f"that point to zero (cosine {float(np.nanmin(layer.along)):.2f}): weight decay {decay:g} at a learning rate "
        f"of {rate:.2g} takes {_percent(rate * decay)} of them at every step.",
        "Lower the weight decay by a factor of a hundred.",
        int(layer.steps[0]),
        _named(x for _, x in sorted(shrunk, key=lambda pair: pair[0])),
        {"weights_left": late, "cosine": float(np.nanmin(layer.along)), "weight_decay": decay, "lr": rate},
    )


@rule
def _decay_on_norms(e: Evidence) -> Finding | None:
    """Scales of normalisation layers that began near one, are decayed, and have fallen below seven tenths."""
    norms = [
        layer
        for layer in e.layers
        if layer.parameter.kind == "norm" and 0.5 < layer.first < 2 and layer.group.get("weight_decay")
    ]
    small = [layer for layer in norms if layer.growth[-1] < 0.7 and float(np.nanmedian(layer.along)) < -0.3]
    if not small or len(small) < len(norms) / 2:
        return None
    left = float(np.median([layer.growth[-1] for layer in small]))
    return Finding(
        "decay_on_norms",
        _severity(e, "worth a look"),
        f"Weight decay has shrunk the scales of {patterns(layer.name for layer in small)} to {_percent(left)} of what "
        "they were.",
        "Leave norms and biases out of weight decay, as lightning_optim.build_optimizer does by default.",
        _first(small[0].steps, small[0].growth < 0.9),
        _named(small),
        {"scale_left": left, "weight_decay": small[0].group["weight_decay"]},
    )


@rule
def _untouched_rows(e: Evidence) -> Finding | None:
    """Four fifths of an embedding unused, that number at rest since the middle of the run; a tenth of the model."""
    for layer in e.layers:
        if not layer.is_embedding or len(layer.untouched) < 4 or e.coverage is None:
            continue
        last, middle = float(layer.untouched[-1]), float(layer.untouched[len(layer.untouched) // 2])
        share = e.coverage.share([layer.parameter])
        if last >= 0.8 and middle - last < 0.02 and share > 0.1:
            rows = layer.parameter.shape[0]
            return Finding(
                "untouched_rows",
                "worth a look",
                f"{_percent(last)} of the {rows} rows of {layer.name} were used at no measured step, and no new ones "
                f"since the middle of the run; it holds {_percent(share)} of the parameters.",
                "Make the vocabulary as large as the data needs, or check how indices are made.",
                int(layer.steps[0]),
                (layer.name,),
                {"untouched": last, "rows": rows},
            )
    return None


@rule
def _no_signal(e: Evidence) -> Finding | None:
    """The loss stays within a twelfth of where it began, while the weights move; for classifiers: of chance."""
    if not e.has_loss or e.length < 50 or not _travel(e.weights) > 2 * STANDS_STILL:
        return None
    if not abs(e.fall) < 1 / 12 or not e.best_loss > 0.85 * e.first_loss:
        return None
    at = f" (chance: {e.chance:.3g})" if e.chance == e.chance else ""
    return Finding(
        "no_signal",
        "broken",
        f"The loss began at {e.first_loss:.3g}{at} and is {e.last_loss:.3g} after {e.length} steps, although gradients "
        "reach all layers and the weights move: there is nothing in the data that they can follow.",
        "Check that inputs and labels belong together, that inputs are normalised, and that a few examples can be "
        "learnt by heart.",
        0,
        evidence={"first": e.first_loss, "last": e.last_loss, "travel": _travel(e.weights)},
    )


@rule
def _gradient_spikes(e: Evidence) -> Finding | None:
    """Gradient norms of twenty times the usual at losses of five times the usual, unless the optimizer steps back."""
    if any(group.get("steps_back") for group in e.groups):
        return None
    places = [i for i in _outliers(e, 20.0) if e.loss[i] > 5 * np.median(e.loss[max(0, i - 8) : i])]
    if not places:
        return None
    steps = [int(e.steps[i]) for i in places]
    _, amplified = e.scalar("spike/amplification")
    _, suppressed = e.scalar("spike/suppression")
    _, recovery = e.scalar("spike/recovery_steps")
    after = ""
    if len(suppressed) and suppressed.min() < 0.7:
        after = f" Updates after them fell to {_percent(float(suppressed.min()))} of their size"
        after += f" for about {recovery.max():.0f} steps." if len(recovery) else "."
    elif len(amplified) and amplified.max() > 2:
        after = f" Updates after them were up to {amplified.max():.2g} times as large."
    usual = float(np.nanmedian(e.norms))
    return Finding(
        "gradient_spikes",
        "wasteful" if e.learns else "broken",
        f"At step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps[:5]))}"
        f"{f' and {len(steps) - 5} more' if len(steps) > 5 else ''}, loss and gradient were far out of the ordinary "
        f"(norm {float(e.norms[places].max()):.2g}, usually {usual:.2g}).{after}",
        "Look at those batches; clip gradients, or skip such steps with the callback SkipSpikes.",
        steps[0],
        evidence={
            "steps": steps[:20],
            "usual": usual,
            "largest": float(e.norms[places].max()),
            "suppression": float(suppressed.min()) if len(suppressed) else None,
            "amplification": float(amplified.max()) if len(amplified) else None,
        },
    )


@rule
def _overfitting(e: Evidence) -> Finding | None:
    """The validation loss a third above its best, which was at three fifths of the run or before."""
    if e.validation_loss is None or not e.has_loss:
        return None
    at, values = e.validation_loss
    if len(values) < 4 or not np.isfinite(values).all():
        return None
    best = int(values.argmin())
    then = np.median(e.loss[np.abs(e.steps - at[best]) <= max(3, e.length // 50)])
    if not (values[-1] > 1.33 * values[best] and at[best] <= 0.6 * e.length and e.last_loss < 0.7 * then):
        return None
    return Finding(
        "overfitting",
        "worth a look",
        f"The validation loss was best at step {int(at[best])} ({values[best]:.3g}) and is {values[-1]:.3g} now, while "
        f"the training loss fell from {then:.3g} to {e.last_loss:.3g}.",
        "Stop at the best step (EarlyStopping), or use more data, augmentation, dropout or weight decay.",
        int(at[best]),
        evidence={"best": float(values[best]), "last": float(values[-1])},
    )


# --- precision ----------------------------------------------------------------------------------------------------


@rule
def _lost_to_rounding(e: Evidence) -> Finding | None:
    """Half of the elements with a gradient do not move, in weights of bfloat16 or float16, in the second half."""
    low = [
        layer
        for layer in e.layers
        if layer.is_weight and layer.parameter.dtype in ("bfloat16", "float16") and len(layer.stalled) >= 2
    ]
    if not low or (e.rates[1] == 0).all():
        return None
    late = float(np.median([np.nanmedian(layer.stalled[len(layer.stalled) // 2 :]) for layer in low]))
    if not late > 0.5:
        return None
    worst = sorted(low, key=lambda layer: -float(np.nanmedian(layer.stalled)))
    dtype = low[0].parameter.dtype
    return Finding(
        "lost_to_rounding",
        _severity(e),
        f"{_percent(late)} of the elements that have a gradient do not move: updates of "
        f"{float(np.median(worst[0].update)):.1e} are below what {dtype} resolves at weights of "
        f"{float(np.median(worst[0].weight)):.1e}.",
        'Build the optimizer with rounding="split" (or "kahan", "stochastic"), which cures it without float32 weights; '
        "or use bf16-mixed.",
        _first(worst[0].steps, worst[0].stalled > 0.5),
        _named(worst[:5]),
        {"stalled": late, "dtype": dtype},
    )


@rule
def _not_orthogonal(e: Evidence) -> Finding | None:
    """An error above 0.6 with less than four steps of Newton-Schulz. Low-rank momentum alone leads to 0.9 with five."""
    iterations = {str(name) for group in e.groups if (name := group.get("orthogonalizer"))}
    _, errors = e.scalar("orthogonality/factor_error")
    if not iterations or len(errors) < 2:
        return None
    late = float(np.median(errors[len(errors) // 2 :]))
    few = any(re.fullmatch("kj[123]", name) for name in iterations)
    if late < (0.6 if few else 0.97):
        return None
    return Finding(
        "not_orthogonal",
        "worth a look",
        f"The orthogonalised momentum is {late:.2f} away from orthogonal (0.2 to 0.7 with kj5), with "
        f"{', '.join(sorted(iterations))}.",
        'Use an orthogonalizer with more steps: "kj5", "pe6" or "pe8".',
        0,
        evidence={"factor_error": late, "orthogonalizer": sorted(iterations)},
    )
