"""The page on performance shows the figures that are committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report


def test_the_page_is_made_from_the_results() -> None:
    assert report.page(report.PAGE.read_text()) == report.PAGE.read_text(), "run `python -m benchmarks.report`"
    for name in report.images():
        assert (report.IMAGES / name).stat().st_size > 1000, name
        assert f"images/{name}" in report.PAGE.read_text()


def test_other_figures_make_another_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in report.RESULTS.glob("*.json"):
        content = json.loads(file.read_text())
        for row in content["rows"]:
            row["median_ms"] = 123456.0
        (tmp_path / file.name).write_text(json.dumps(content))
    before = report.PAGE.read_text()
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    after = report.page(before)
    assert "1.23e+05" in after
    assert "1.23e+05" not in before
    assert report.page(after) == after


def test_plots_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `plots`")
    page = tmp_path / "performance.md"
    page.write_text(report.PAGE.read_text())
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    report.main()
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == sorted(report.images())


def test_a_page_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"performance\.md has no part <!-- step-time -->"):
        report.page("# Performance\n")
