"""Learning-rate schedules with a warm-up, as torch schedulers.

Every schedule multiplies the initial learning rate of each parameter group by one factor of the step, so
groups keep their ratios. The factor is a closed form of the step, so a resumed run continues exactly where it
stopped.

Lengths (``warmup``, ``decay``) are steps when they are integers and fractions of ``total_steps`` when they
are floats: ``warmup=1`` is one step, ``warmup=1.0`` the whole run. On the command line ``1`` and ``1.0``
differ in the same way.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["WarmupConstant", "WarmupCosine", "WarmupLinear", "WarmupStableDecay"]


class _WarmupDecay(LRScheduler):
    r"""Warm-up over the first ``warmup`` steps, 1, then a tail over the last ``decay`` steps.

    ``decay=None`` is everything after the warm-up.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None,
        warmup: int | float,
        decay: int | float | None,
        tail: Literal["linear", "cosine"],
        min_lr_ratio: float,
    ) -> None:
        if isinstance(total_steps, Integral):
            total_steps = int(total_steps)  # and not one of NumPy's, which no checkpoint should hold
        if tail not in ("linear", "cosine"):
            raise ValueError(f"tail must be 'linear' or 'cosine', got {tail!r}")
        if not 0.0 <= min_lr_ratio <= 1.0:
            raise ValueError(f"min_lr_ratio is a fraction of the learning rate, in [0, 1], got {min_lr_ratio}")
        self.total_steps = total_steps
        self.warmup = self._steps("warmup", warmup)
        self.decay = max(self._known_total() - self.warmup, 0) if decay is None else self._steps("decay", decay)
        self.tail = tail
        self.min_lr_ratio = min_lr_ratio
        if total_steps is not None and self.warmup + self.decay > self._known_total():
            raise ValueError(
                f"the warm-up ({self.warmup} steps) and the decay ({self.decay} steps) do not fit into the "
                f"{total_steps} steps of the run: shorten them, or train for longer"
            )
        super().__init__(optimizer)

    def _known_total(self) -> int:
        # Lightning's estimate is inf for an endless run and -1 for endless data.
        if self.total_steps is None or not 0 < self.total_steps < math.inf:
            raise ValueError(
                f"{type(self).__name__} needs the length of the run, but total_steps is {self.total_steps}: give it "
                "total_steps=N (--lr_scheduler.total_steps N on a command line)"
            )
        return self.total_steps

    def _steps(self, argument: str, length: int | float) -> int:
        """A length in steps, from steps (int) or a fraction of the run (float)."""
        if isinstance(length, Integral):
            if length < 0:
                raise ValueError(f"{argument} must not be negative, got {length}")
            return int(length)
        if not 0.0 <= length <= 1.0:
            raise ValueError(
                f"{argument} as a float is a fraction of the run, in [0, 1], got {length}; "
                "write an integer for a number of steps"
            )
        # Rounded down, so that fractions that add up to 1 fit; the nudge keeps 0.29 of 100 steps at 29.
        return int(length * self._known_total() + 1e-6) if length else 0

    def factor(self, step: int) -> float:
        """The multiplier of the learning rate at ``step``, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if not self.decay:
            return 1.0
        start = self._known_total() - self.decay
        progress = min(max(step - start, 0) / self.decay, 1.0)
        shape = 1.0 - progress if self.tail == "linear" else (1.0 + math.cos(math.pi * progress)) / 2.0
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * shape

    def get_lr(self) -> list[float | Tensor]:
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:  # added since, relative to the present rates
            self.base_lrs.append(group["lr"] / max(self.factor(self.last_epoch - 1), 1e-12))
        factor = self.factor(self.last_epoch)
        return [base_lr * factor for base_lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The progress only: the shape comes from the arguments, so that a run can be resumed with a longer
        one."""
        return {key: self.__dict__[key] for key in ("base_lrs", "last_epoch", "_step_count", "_last_lr")}


class WarmupConstant(_WarmupDecay):
    r"""Linear warm-up, then constant.

    With :math:`w` warm-up steps, the learning rate at step :math:`t = 0, 1, \dots` is its initial value times

    .. math:: \min\left(1, \frac{t + 1}{w}\right)

    The warm-up never spends a step at zero: step 0 uses :math:`1/w` and the :math:`w`-th step the full rate,
    as build-nanogpt and torchtitan do (Hugging Face's schedules start from :math:`0/w` instead).

    Args:
        optimizer: Its groups' learning rates at this moment are the peak values.
        total_steps: Length of the run in steps; only a fractional ``warmup`` needs it. Filled in from the
            Trainer when the schedule is named in a configuration.
        warmup: Length of the warm-up: steps if an integer, a fraction of ``total_steps`` if a float.

    Raises:
        ValueError: A length is out of range, or a fraction is given and ``total_steps`` is not known.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = WarmupConstant(optimizer, warmup=4)
        >>> [schedule.factor(step) for step in range(6)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    def __init__(self, optimizer: Optimizer, total_steps: int | None = None, warmup: int | float = 0) -> None:
        super().__init__(optimizer, total_steps, warmup, decay=0, tail="linear", min_lr_ratio=1.0)


class WarmupCosine(_WarmupDecay):
    r"""Linear warm-up, then half a cosine down to ``min_lr_ratio`` at the end of the run.

    With :math:`w` warm-up steps, :math:`T` steps in all and :math:`r` = ``min_lr_ratio``, the learning rate
    at step :math:`t = 0, 1, \dots` is its initial value times

    .. math::
        \frac{t + 1}{w} \text{ for } t < w, \qquad
        r + (1 - r)\, \frac{1}{2} \left(1 + \cos \pi \frac{t - w}{T - w}\right) \text{ for } w \le t \le T

    and stays at :math:`r` after :math:`T`. The last of :math:`T` steps is :math:`t = T - 1`, so no step is
    spent at zero.

    Args:
        optimizer: Its groups' learning rates at this moment are the peak values.
        total_steps: Length of the run in steps. Filled in from the Trainer when the schedule is named in a
            configuration.
        warmup: Length of the warm-up: steps if an integer, a fraction of ``total_steps`` if a float.
        min_lr_ratio: Final learning rate as a fraction of the peak, in [0, 1].

    Raises:
        ValueError: An argument is out of range, the warm-up is longer than the run, or ``total_steps`` is not
            known.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = WarmupCosine(optimizer, total_steps=6, warmup=2, min_lr_ratio=0.1)
        >>> [round(schedule.factor(step), 3) for step in range(8)]
        [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup: int | float = 0,
        min_lr_ratio: float = 0.0,
    ) -> None:
        super().__init__(optimizer, total_steps, warmup, decay=None, tail="cosine", min_lr_ratio=min_lr_ratio)


class WarmupLinear(_WarmupDecay):
    r"""Linear warm-up, then a straight line down to ``min_lr_ratio`` at the end of the run.

    With :math:`w` warm-up steps, :math:`T` steps in all and :math:`r` = ``min_lr_ratio``, the learning rate
    at step :math:`t = 0, 1, \dots` is its initial value times

    .. math::
        \frac{t + 1}{w} \text{ for } t < w, \qquad
        r + (1 - r) \left(1 - \frac{t - w}{T - w}\right) \text{ for } w \le t \le T

    and stays at :math:`r` after :math:`T`.

    Args:
        optimizer: Its groups' learning rates at this moment are the peak values.
        total_steps: Length of the run in steps. Filled in from the Trainer when the schedule is named in a
            configuration.
        warmup: Length of the warm-up: steps if an integer, a fraction of ``total_steps`` if a float.
        min_lr_ratio: Final learning rate as a fraction of the peak, in [0, 1].

    Raises:
        ValueError: An argument is out of range, the warm-up is longer than the run, or ``total_steps`` is not
            known.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = WarmupLinear(optimizer, total_steps=6, warmup=2)
        >>> [schedule.factor(step) for step in range(8)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup: int | float = 0,
        min_lr_ratio: float = 0.0,
    ) -> None:
        super().__init__(optimizer, total_steps, warmup, decay=None, tail="linear", min_lr_ratio=min_lr_ratio)


class WarmupStableDecay(_WarmupDecay):
    r"""Linear warm-up, constant, and a decay over the last part of the run (WSD, also called trapezoidal).

    With :math:`w` warm-up steps, :math:`d` decay steps, :math:`T` steps in all, :math:`r` = ``min_lr_ratio``
    and :math:`p = (t - T + d) / d`, the learning rate at step :math:`t = 0, 1, \dots` is its initial value
    times

    .. math::
        \frac{t + 1}{w} \text{ for } t < w, \qquad 1 \text{ for } w \le t \le T - d, \qquad
        r + (1 - r)\, s(p) \text{ for } T - d \le t \le T

    with :math:`s(p) = 1 - p` (``tail="linear"``) or :math:`\frac{1}{2}(1 + \cos \pi p)`
    (``tail="cosine"``), and stays at :math:`r` after :math:`T`. ``decay=0`` never decays.

    A checkpoint holds only the progress, so a run stopped in its constant part can be resumed with another
    ``total_steps`` or ``decay``.

    Args:
        optimizer: Its groups' learning rates at this moment are the peak values.
        total_steps: Length of the run in steps. Filled in from the Trainer when the schedule is named in a
            configuration.
        warmup: Length of the warm-up: steps if an integer, a fraction of ``total_steps`` if a float.
        decay: Length of the decay, likewise. A fifth of the run by default, as in Hägele et al.
            (https://arxiv.org/abs/2405.18392).
        tail: Shape of the decay.
        min_lr_ratio: Final learning rate as a fraction of the peak, in [0, 1].

    Raises:
        ValueError: An argument is out of range, warm-up and decay together are longer than the run, or
            ``total_steps`` is not known.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = WarmupStableDecay(optimizer, total_steps=8, warmup=2, decay=0.5)
        >>> [schedule.factor(step) for step in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup: int | float = 0,
        decay: int | float = 0.2,
        tail: Literal["linear", "cosine"] = "linear",
        min_lr_ratio: float = 0.0,
    ) -> None:
        super().__init__(optimizer, total_steps, warmup, decay, tail, min_lr_ratio)
