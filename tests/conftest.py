"""What all tests share."""

from __future__ import annotations

import pytest

from .optimizers.rows import assume_losses


@pytest.fixture(autouse=True)
def _steps_without_a_loss(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared tests call ``step()`` alone; tests of how that is refused are marked ``real_loss``."""
    if "real_loss" not in request.keywords:
        assume_losses(monkeypatch.setattr)
