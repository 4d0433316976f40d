"""The site: it builds without a warning, every public name has a page, and what is broken is found."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import lightning_optim
import lightning_optim.callbacks
import lightning_optim.cli
import lightning_optim.diagnostics
import lightning_optim.models
import lightning_optim.polar
import lightning_optim.schedules
from lightning_optim.registry import OPTIMIZERS

for package in ("sphinx", "furo", "myst_parser", "sphinx_copybutton", "latex2mathml"):
    pytest.importorskip(package, reason="the extra `docs` is not installed")

ROOT = Path(__file__).parents[2]
BUILD = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, which pytest-xdist's workers build once."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, log = shared / "site", shared / "site.log"
    with FileLock(shared / "site.lock"):
        if not log.exists():
            command = [*BUILD, "-d", shared / "doctrees", ROOT / "docs", folder]
            result = subprocess.run(command, capture_output=True, text=True)
            log.write_text(result.stderr + (f"exit status {result.returncode}" if result.returncode else ""))
    return folder


def names(site: Path) -> dict[str, str]:
    """The page of every name of Python that the site has."""
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    return {
        name: item.uri for kind, items in inventory.data.items() if kind[:3] == "py:" for name, item in items.items()
    }


def test_the_site_builds_without_a_warning(site: Path) -> None:
    assert (site.parent / "site.log").read_text() == ""


@pytest.mark.parametrize(
    "module",
    [
        lightning_optim,
        lightning_optim.callbacks,
        lightning_optim.cli,
        lightning_optim.diagnostics,
        lightning_optim.models,
        lightning_optim.polar,
        lightning_optim.schedules,
    ],
    ids=lambda module: module.__name__,
)
def test_every_public_name_has_a_page(site: Path, module: object) -> None:
    pages = names(site)
    missing = [name for name in module.__all__ if f"{module.__name__}.{name}" not in pages]
    assert not missing


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_page(site: Path, name: str) -> None:
    info = OPTIMIZERS[name]
    page = (site / "reference" / "optimizers" / f"{name}.html").read_text()
    assert info.kind in page
    assert "Preset" in page
    for number in re.findall(r"arXiv (\d+\.\d+)", info.paper):
        assert f"https://arxiv.org/abs/{number}" in page
    for argument in info.defaults:
        assert argument in page
    for internal in info.internals:
        assert internal in page
    if info.cls.__module__.startswith("lightning_optim"):
        assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in page
    assert f"{name}.html" in (site / "reference" / "optimizers" / "index.html").read_text()


def test_pages_need_no_network(site: Path) -> None:
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]*src=\"https?:|<link[^>]*rel=\"(?:stylesheet|preload)\"[^>]*href=\"https?:"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(OPTIMIZERS)
    for page in pages:
        assert not loads.search(page.read_text()), page


def test_the_search_finds_optimizers_and_guides(site: Path) -> None:
    index = (site / "searchindex.js").read_text()
    for word in ("normuon", "checkpoint", "orthogon"):  # stems, as Sphinx indexes them
        assert word in index.lower()


def test_broken_references_and_equations_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sphinx.application import Sphinx

    right = [":class:`torch.optim.AdamW`", ":func:`.orthogonalize`", ":class:`ValueError`", r":math:`\sqrt{x}`"]
    wrong = [":class:`torch.optim.AdamV`", ":func:`.orthogonalise`", ":class:`NoSuchError`", r":math:`\sqroot{x}`"]
    wrong += [":meth:`lightning_optim.callbacks.UpdateSize.measure_nothing`", ":doc:`nowhere`"]
    (tmp_path / "index.rst").write_text("Title\n=====\n\n" + "\n\n".join(right + wrong))
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "extensions"))
    settings = {"extensions": ["mathml", "references"], "nitpicky": True, "html_math_renderer": "mathml"}
    warnings = io.StringIO()
    site = Sphinx(tmp_path, None, tmp_path / "out", tmp_path / "out", "html", settings, None, warnings, True)
    site.build()
    lines = [line for line in warnings.getvalue().splitlines() if "WARNING" in line]
    found = {int(line.split(":")[1]) for line in lines}
    assert found == {2 * i + 4 for i in range(len(right), len(right + wrong))}, warnings.getvalue()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_from_the_repository_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing
