"""The repository's promises about files: what a wheel holds, what the README shows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
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


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, made from a copy of the repository and without network."""
    copy, out = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("dist")
    for path in ROOT.iterdir():
        if path.name in ("lightning_optim", "callbacks", "models", "configs", "tests", "docs", "benchmarks"):
            leave_out = shutil.ignore_patterns("__pycache__", "_build", "reference")
            shutil.copytree(path, copy / path.name, ignore=leave_out)
        elif path.is_file():
            shutil.copy(path, copy)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def test_distributions_are_complete_and_pass_pypis_checks(distributions: Path) -> None:
    (wheel,), (source,) = distributions.glob("*.whl"), distributions.glob("*.tar.gz")
    assert source.name == f"lightning_optim-{lightning_optim.__version__}.tar.gz"
    check = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", wheel, source]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lightning_optim"}
    assert "lightning_optim/py.typed" in names
    # Every module and preset is in the wheel, wherever in the repository it lies.
    for folder, inside in (("lightning_optim", ""), ("callbacks", "callbacks/"), ("models", "models/")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"lightning_optim/{inside}{path.relative_to(ROOT / folder)}" in names
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"lightning_optim/configs/{path.relative_to(ROOT / 'configs')}" in names
    with tarfile.open(source) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/test_packaging.py", "docs/index.md", "conftest.py", "CHANGELOG.md", "SECURITY.md"} <= sources


def test_the_version_is_the_same_everywhere() -> None:
    version = lightning_optim.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == version


def test_badges_are_true() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    badges = re.findall(r"^\[?!\[([^\]]*)\]", (ROOT / "README.md").read_text().split("```")[0], re.M)
    (python,) = re.findall(r'^requires-python = ">=(.+)"', project, re.M)
    (license,) = re.findall(r'^license = "(.+)"', project, re.M)
    assert badges == [f"Python {python} or newer", f"License: {license}"]


@pytest.mark.slow
def test_a_wheel_works_from_any_folder(distributions: Path, tmp_path: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(target)
    # The folder keeps the checkout out of sight; the wheel comes before an editable install.
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(target)!r}); " + _SMOKE]
    result = subprocess.run(run, cwd=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(target) in result.stdout


_SMOKE = """
import lightning_optim.cli
print(lightning_optim.cli.__file__)
lightning_optim.cli.main(["fit", "-c", "digits", "-c", "namo", "--print_config"])
"""
