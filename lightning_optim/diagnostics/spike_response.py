"""What a single outlier among the gradients does to the updates that follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..processes import local
from .parameter_change import Sums, sample, sum_of_squares
from .what_if import VirtualOptimizer

#: Updates have recovered where their RMS stays this close to what it was, as in NVIDIA's gradient-spike primer.
TOLERANCE = 0.1

#: Gradient norms this many standard deviations above the usual are spikes, as in OLMo-core's SpikeScore, which also
#: looks back 128 steps.
THRESHOLD = 6.0
WINDOW = 128


def recovery_steps(ratios: Sequence[float], tolerance: float = TOLERANCE) -> int | None:
    """Steps after a spike until the update RMS stays at what it was.

    Args:
        ratios: Update RMS relative to the baseline, from the spike's own step on.
        tolerance: How far from 1 a ratio may be.

    Returns:
        Number of the first step after the spike from which no ratio is off, at least 1; ``None`` where the last is.

    >>> recovery_steps([3.0, 0.5, 1.05, 0.8, 0.95, 1.0]), recovery_steps([9.0, 1.0]), recovery_steps([1.0, 0.5])
    (4, 1, None)
    """
    off = [k for k, ratio in enumerate(ratios) if k > 0 and not abs(ratio - 1) <= tolerance]
    first = off[-1] + 1 if off else 1
    return first if first < len(ratios) else None


# --- offline ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpikeResult:
    """What one gradient spike did to an optimizer's updates.

    Args:
        rms: Update RMS of each step.
        twin_rms: The same without the spike, of an optimizer that gets the same gradients otherwise.
        spike_at: Index of the spike's step in these.
        baseline: Mean update RMS of the (at most 30) steps before the spike.
        amplification: Largest update RMS from the spike on, relative to that without the spike in the same step.
        suppression: Smallest update RMS from the spike on, relative to that without the spike in the same step.
        extra_displacement: Sum over steps from the spike on of the RMS of the difference between the updates with and
            without the spike, relative to the baseline: how many ordinary updates went astray or missing.
        lost: After each step, by how many steps the optimizer is behind the one without the spike, in the direction of
            the mean gradient; negative where the spike put it ahead, NaN where gradients have no mean.
        recovery_steps: Steps after the spike until the update RMS stays within 10 % of that without the spike; ``None``
            where it does not within those that were made. So updates that change in the course of training anyway, as
            while an optimizer warms up, count as recovered.
        crossing_steps: Steps after the spike until the update RMS is within 10 % of that of the last 30 steps for the
            first time, be it on its way from too large to too small: what NVIDIA's primer calls recovery.
    """

    rms: Tensor
    twin_rms: Tensor
    spike_at: int
    baseline: float
    amplification: float
    suppression: float
    extra_displacement: float
    lost: Tensor
    recovery_steps: int | None
    crossing_steps: int | None

    @property
    def lost_steps(self) -> float:
        """The last of :attr:`lost`."""
        return float(self.lost[-1])

    @property
    def ratios(self) -> Tensor:
        """Update RMS of each step relative to that without the spike; 1 where both are 0."""
        return torch.where(self.rms == self.twin_rms, 1.0, self.rms / self.twin_rms)


def spike_response(
    build: Callable[[list[nn.Parameter]], Optimizer],
    scale: float,
    *,
    spike_at: int = 100,
    after: int = 99,
    shape: Sequence[int] = (128, 64),
    seed: int = 0,
    signal: float = 0.0,
) -> SpikeResult:
    """Response of an optimizer to one outlier among independent normal gradients of a single matrix.

    The defaults are the protocol of the gradient-spike primer of NVIDIA's Emerging-Optimizers, in which the learning
    rate is 1 and there is no weight decay. The parameter is put back to zero before each step, lest small updates are
    rounded away.

    In that protocol gradients are noise alone, to which all optimizers that divide by a running second moment respond
    alike. With a ``signal``, those that divide by a variance, or treat the mean in another way, are told from them.

    Args:
        build: Makes the optimizer of a list of one parameter.
        scale: What the noise in the gradient of the spike's step is multiplied by.
        spike_at: Number of steps before the spike.
        after: Number of steps after it.
        shape: Shape of the parameter.
        seed: Seed of the gradients.
        signal: Size of the mean of the gradients, whose signs are random, relative to the noise.

    Raises:
        ValueError: There is no step before or after the spike.

    Example:
        >>> sgd = spike_response(lambda params: torch.optim.SGD(params, lr=1.0), 100.0, spike_at=30, after=10)
        >>> round(sgd.amplification), sgd.recovery_steps
        (100, 1)
    """
    if spike_at < 1 or after < 1:
        raise ValueError(f"spike_at and after must be at least 1, got spike_at={spike_at}, after={after}.")
    generator = torch.Generator().manual_seed(seed)
    mean = torch.zeros(*shape)
    if signal:
        mean = signal * (2.0 * torch.randint(2, tuple(shape), generator=torch.Generator().manual_seed(seed)) - 1.0)
    params = [nn.Parameter(torch.zeros(*shape)) for _ in range(2)]
    optimizers = [build([p]) for p in params]
    rms: list[list[float]] = [[], []]
    extra, ahead, progress = [], [], []
    for t in range(spike_at + 1 + after):
        gradient = torch.randn(*shape, generator=generator)
        for p, optimizer, factor, of_each in zip(params, optimizers, (scale, 1.0), rms):
            p.grad = mean + (gradient * factor if t == spike_at else gradient)
            with torch.no_grad():
                p.zero_()
            optimizer.step()
            of_each.append(_rms(p.detach()))
        difference = (params[0] - params[1]).detach()
        extra.append(_rms(difference))
        ahead.append(float((difference * mean).sum()))
        progress.append(float((params[1].detach() * mean).sum()))
    last = sum(rms[0][spike_at + 1 :][-30:]) / min(30, after)
    baseline = sum(rms[0][max(0, spike_at - 30) : spike_at]) / min(30, spike_at)
    ratios = [1.0 if x == y else x / y if y else math.nan for x, y in zip(*(each[spike_at:] for each in rms))]
    # A step goes down along the mean gradient, so that both are negative.
    of_a_step = sum(progress[spike_at:]) / (after + 1)
    return SpikeResult(
        rms=torch.tensor(rms[0]),
        twin_rms=torch.tensor(rms[1]),
        spike_at=spike_at,
        baseline=baseline,
        amplification=max(ratios),
        suppression=min(ratios),
        extra_displacement=sum(extra[spike_at:]) / baseline if baseline else math.nan,
        lost=-torch.tensor(ahead, dtype=torch.float64).cumsum(0) / (of_a_step if signal and of_a_step else math.nan),
        recovery_steps=recovery_steps(ratios),
        crossing_steps=next(
            (k for k, x in enumerate(rms[0][spike_at:]) if k and abs(x - last) <= TOLERANCE * last), None
        ),
    )


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# --- probe ------------------------------------------------------------------------------------------------------


def spike_probe_sums(
    optimizer: Optimizer,
    gradients: Mapping[Tensor, Tensor],
    spike: Mapping[Tensor, Tensor],
    scales: Sequence[float],
    steps: int,
    prepare: Callable[[Optimizer], None] | None = None,
) -> Sums:
    """Sums over elements that :func:`spike_probe` needs, from virtual steps with the same gradient over and over.

    Args:
        optimizer: The optimizer, which is left alone.
        gradients: Gradients of its parameters.
        spike: What is added to those of some parameters in the first step, times a scale. Sums are of these parameters,
            of at most 4,096 elements of each, scaled up.
        scales: By what the spike is multiplied.
        steps: Number of steps after the first.
        prepare: See :class:`.VirtualOptimizer`.
    """

    def sampled(updates: Mapping[Tensor, Tensor]) -> list[Tensor]:
        return [sample(local(updates[p])).clone() for p in spike]

    def follow(first: Mapping[Tensor, Tensor]) -> Iterable[list[Tensor]]:
        virtual = VirtualOptimizer(optimizer, prepare)
        for t in range(steps + 1):
            yield sampled(virtual.step(gradients if t else first))

    numels = [local(p).numel() for p in spike]
    calm = list(follow(gradients))
    of_all = calm[0][0].new_tensor([n / max(1, u.numel()) for n, u in zip(numels, calm[0])])
    sums = {f"calm_{t}": sum_of_squares(updates) * of_all for t, updates in enumerate(calm)}
    for scale in scales:
        spiked = {p: g + scale * spike[p] if p in spike else g for p, g in gradients.items()}
        for t, updates in enumerate(follow(spiked)):
            sums[f"spiked_{scale_name(scale)}_{t}"] = sum_of_squares(updates) * of_all
            extra = [x - y for x, y in zip(updates, calm[t])]
            sums[f"extra_{scale_name(scale)}_{t}"] = sum_of_squares(extra) * of_all
    return sums


def scale_name(scale: float) -> str:
    """What a scale is called in tags and tables.

    >>> scale_name(1e3), scale_name(1500)
    ('1e+03', '1500')
    """
    short = f"{scale:.0e}"
    return short if float(short) == scale else f"{scale:g}"


def spike_probe(sums: Mapping[str, Tensor], scales: Sequence[float]) -> dict[str, float]:
    """Response of an optimizer in the middle of training to a spike, relative to its steps without the spike.

    Args:
        sums: The sums of :func:`spike_probe_sums`.
        scales: Of the spike.

    Returns:
        For each scale, ``amplification/SCALE``: largest ratio of update RMS with the spike to that without it in the
        same step; ``displacement/SCALE``: sum of the RMS of the difference between the two, in units of the
        update without the spike in the first step; ``recovery_steps/SCALE``: steps until the ratio stays within 10 %
        of 1, or the number of steps if it does not.
    """
    values = {}
    roots = {name: float(x.sum().sqrt()) for name, x in sums.items()}
    steps = sum(name.startswith("calm_") for name in roots)
    calm = [roots[f"calm_{t}"] for t in range(steps)]
    for name in map(scale_name, scales):
        ratios = [roots[f"spiked_{name}_{t}"] / c if (c := calm[t]) else math.nan for t in range(steps)]
        extra = sum(roots[f"extra_{name}_{t}"] for t in range(steps))
        values[f"amplification/{name}"] = max(ratios)
        values[f"displacement/{name}"] = extra / calm[0] if calm[0] else math.nan
        recovered = recovery_steps(ratios)
        values[f"recovery_steps/{name}"] = float(steps - 1 if recovered is None else recovered)
    return values


# --- online -----------------------------------------------------------------------------------------------------


def robust_zscore(x: float, values: Sequence[float]) -> float:
    """How many standard deviations above the median of some values ``x`` is, by their median absolute deviation.

    The standard deviation is taken to be at least a hundredth of the median, lest the slightest change is an outlier
    where gradients hardly vary.

    >>> robust_zscore(10.0, [1.0, 2.0, 3.0, 4.0, 100.0])  # median 3, median absolute deviation 1
    4.721435...
    """
    middle, deviation = _median_and_deviation(values)
    deviation = max(deviation, 0.01 * middle)
    return (x - middle) / deviation if deviation else (math.inf if x > middle else 0.0)


def _median_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    values = sorted(values)
    middle = _middle(values)
    # 1.4826 times the median absolute deviation of normal values is their standard deviation. Of sorted values, they
    # fall and then rise, and are sorted again at once.
    return middle, 1.4826 * _middle(sorted([abs(x - middle) for x in values]))


def _middle(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


@dataclass
class SpikeWatch:
    """Finds the gradient spikes of a run, and what updates do after each.

    Update RMS is needed now and then, for a baseline, and after a spike only.

    Args:
        threshold: Smallest robust z-score of a spike.
        window: Number of gradient norms that a new one is compared with.
        follow: Number of steps after a spike after which it counts as not recovered.

    Attributes:
        norms: The last gradient norms.
        calm: The last update RMS measured away from spikes.
        spike: Steps and their update RMS since the spike that is being followed.
        following: Whether there is one.
        count: Number of spikes.
        zscore: Largest since :meth:`measured` was called last.
        norm_max: Largest gradient norm since then.
        seen: Number of gradient norms.
    """

    threshold: float = THRESHOLD
    window: int = WINDOW
    follow: int = 100
    norms: list[float] = field(default_factory=list)
    calm: list[float] = field(default_factory=list)
    spike: list[tuple[int, float]] = field(default_factory=list)
    following: bool = False
    count: int = 0
    zscore: float = math.nan
    seen: int = 0
    norm_max: float = math.nan

    def see(self, norm: float) -> bool:
        """Take in the gradient norm of a step to come; whether to measure the update that it makes."""
        if math.isfinite(norm):
            self.norm_max = norm if math.isnan(self.norm_max) else max(norm, self.norm_max)
            self._compare(norm)
            self.norms = [*self.norms, norm][-self.window :]
            self.seen += 1
        return self.following or self.seen <= 2 or self.seen % (10 if self.seen <= 100 else 50) == 0

    def _compare(self, norm: float) -> None:
        if len(self.norms) < min(32, self.window):
            return
        z = robust_zscore(norm, self.norms)
        self.zscore = z if math.isnan(self.zscore) else max(z, self.zscore)
        if z > self.threshold:
            self.count += 1
            self.following = self.following or len(self.calm) >= 3

    def measured(self, step: int, rms: float) -> dict[str, float]:
        """Take in the update RMS of a step; what is to be said now."""
        # What is not defined yet stays NaN, also as a logarithm.
        log10 = self.zscore if math.isnan(self.zscore) else math.log10(max(self.zscore, 1.0))
        values = {"zscore": self.zscore, "zscore_log10": log10, "norm_max": self.norm_max}
        values["score"] = self.count / self.seen if self.seen else 0.0
        values |= {"count": float(self.count)} if self.count else {}
        self.zscore = self.norm_max = math.nan
        if not self.following:
            self.calm = [*self.calm, rms][-9:]
            return values
        self.spike.append((step, rms))
        baseline, deviation = _median_and_deviation(self.calm)
        ratios = [x / baseline if baseline else math.nan for _, x in self.spike]
        # Where updates vary by more than 10 % anyway, that is what they recover to.
        tolerance = max(TOLERANCE, 3 * deviation / baseline if baseline else 0.0)
        recovered = recovery_steps(ratios, tolerance)
        begun = self.spike[0][0]
        given_up = step - begun >= self.follow
        # It stays there if five steps say so.
        if given_up or (recovered is not None and len(ratios) - recovered >= 5):
            values |= {
                "amplification": max(ratios),
                "suppression": min(ratios),
                "recovery_steps": float(self.follow if recovered is None else self.spike[recovered][0] - begun),
            }
            self.following, self.spike = False, []
        return values
