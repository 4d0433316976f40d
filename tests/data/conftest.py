from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real data sets: SHARED_DATA, by default ../shared/data, is a folder of them or has a script that unpacks them."""
    folder = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    script = folder / "unpack.sh"
    if not script.exists():
        if (folder / "FashionMNIST").is_dir():
            return folder
        pytest.skip(f"no data sets in {folder}: set SHARED_DATA")
    # pytest-xdist gives every worker a folder of its own below a common one.
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    with FileLock(base / "data.lock"):
        subprocess.run([script, base / "shared-data"], check=True, stdout=subprocess.DEVNULL)
    return base / "shared-data"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every download fail as it does without a network."""
    from urllib.error import URLError

    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", fail)
