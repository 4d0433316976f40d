"""The repository's promises about files: what a wheel holds, what the README shows."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lightning_optim
from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS, stub, table

ROOT = Path(__file__).parents[1]


def test_what_is_derived_from_the_registry_is_up_to_date() -> None:
    """If this fails: ``python docs/generate.py``."""
    assert table() in (ROOT / "README.md").read_text()
    assert (ROOT / "lightning_optim" / "optimizers" / "__init__.pyi").read_text() == stub()


def test_every_optimizer_is_exported_and_has_a_preset() -> None:
    for info in OPTIMIZERS.values():
        if issubclass(info.cls, RuleOptimizer):
            assert getattr(lightning_optim, info.name) is info.cls
        assert list((ROOT / "configs" / "optimizers").glob(f"{info.name.lower()}.yaml")), info.name


def test_public_names_exist() -> None:
    for name in lightning_optim.__all__:
        assert getattr(lightning_optim, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = lightning_optim.nothing_of_the_kind


def test_importing_the_optimizers_does_not_import_lightning() -> None:
    code = "import sys, lightning_optim; assert 'lightning' not in sys.modules, 'lightning was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ci_runs_the_readmes_test_command() -> None:
    commands = re.findall(r"^.*bin/pytest.*$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) == 1
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_a_wheel_works_from_any_folder_and_adds_one_name(tmp_path: Path) -> None:
    pytest.importorskip("pip", reason="building a wheel needs pip")
    wheels, target, elsewhere = tmp_path / "wheels", tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT], check=True)
    (wheel,) = wheels.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lightning_optim"}
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"lightning_optim/configs/{path.relative_to(ROOT / 'configs')}" in names
    assert "lightning_optim/py.typed" in names
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    # -P and the folder keep the checkout out of sight; the wheel comes before an editable install.
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(target)!r}); " + _SMOKE]
    result = subprocess.run(run, cwd=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(target) in result.stdout


_SMOKE = """
import lightning_optim.cli
print(lightning_optim.cli.__file__)
lightning_optim.cli.main(["fit", "-c", "digits", "-c", "namo", "--print_config"])
"""
