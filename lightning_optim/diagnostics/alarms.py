"""What is said while a run trains: only what is broken, and each thing once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

#: Steps skipped in a row. A loss scaler skips fewer while it finds its scale from 65,536: eight halvings are 256.
_SKIPS = 8
#: The loss over its start, for so many steps.
_RISEN, _FOR_STEPS = 3.0, 20


@dataclass
class Alarms:
    """Watches a run step by step.

    Args:
        said: Causes that have been told.

    Example:
        >>> alarms = Alarms()
        >>> alarms.loss(0, 2.3), alarms.loss(1, float("nan"))
        ([], ['step 1: the loss is nan (it was 2.3).'])
        >>> alarms.loss(2, float("nan"))
        []
    """

    said: set[str] = field(default_factory=set)
    _first: float = math.nan
    _last: float = math.nan
    _high: int = 0
    _skipped: int = 0
    _in_a_row: int = 0
    _still: int = 0

    def loss(self, step: int, loss: float) -> list[str]:
        """Take in the loss of a step."""
        last, self._last = self._last, loss
        if not math.isfinite(loss):
            return self._say("nonfinite_loss", f"step {step}: the loss is {loss:g} (it was {last:.4g}).")
        if math.isnan(self._first):
            self._first = loss
        self._high = self._high + 1 if loss > _RISEN * self._first > 0 else 0
        if self._high < _FOR_STEPS:
            return []
        since = f"step {step}: the loss has been above {_RISEN:g} times its start"
        return self._say("diverged", f"{since} ({self._first:.4g}) for {_FOR_STEPS} steps and is {loss:.4g}.")

    def skips(self, step: int, skipped: int) -> list[str]:
        """Take in how many steps have been skipped up to a step that is about to be made."""
        self._in_a_row = self._in_a_row + skipped - self._skipped if skipped > self._skipped else 0
        self._skipped = skipped
        if self._in_a_row < _SKIPS:
            return []
        words = f"step {step}: {self._in_a_row} steps have just been skipped, since their gradients were not finite."
        return self._say("skipped", words)

    def moved(self, step: int, update: float) -> list[str]:
        """Take in the size of all updates together at a measured step."""
        self._still = self._still + 1 if update == 0 else 0
        if self._still < 2:  # The first step of a warm-up may have a learning rate of 0.
            return []
        return self._say("nothing_moves", f"step {step}: no parameter has moved at the last two measured steps.")

    def _say(self, cause: str, words: str) -> list[str]:
        if cause in self.said:
            return []
        self.said.add(cause)
        return [words]
