"""The documentation shows the figures that are committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report


@pytest.mark.parametrize("name", list(report.PAGES))
def test_pages_are_made_from_the_results(name: str) -> None:
    text = (report.DOCS / name).read_text()
    assert report.page(name, text) == text, "run `python -m benchmarks.report`"


def test_images_are_shown() -> None:
    shown = "".join((report.DOCS / name).read_text() for name in report.PAGES)
    for name in report.images():
        assert (report.DOCS / "images" / name).stat().st_size > 1000, name
        assert f"images/{name}" in shown


def test_other_figures_make_another_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in report.RESULTS.glob("*.json"):
        content = json.loads(file.read_text())
        for row in content.get("rows", content.get("measured")):
            row["median_ms"] = 123456.0
        (tmp_path / file.name).write_text(json.dumps(content))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for page in ("performance.md", "processes.md"):
        before = (report.DOCS / page).read_text()
        after = report.page(page, before)
        assert "1.23e+05" in after
        assert "1.23e+05" not in before
        assert report.page(page, after) == after


def test_plots_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `plots`")
    for name in report.PAGES:
        (tmp_path / name).write_text((report.DOCS / name).read_text())
    monkeypatch.setattr(report, "DOCS", tmp_path)
    report.main()
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == sorted(report.images())


def test_a_page_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"performance\.md has no part <!-- step-time -->"):
        report.page("performance.md", "# Performance\n")
