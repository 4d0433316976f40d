"""The page that reports are written on."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from lightning_optim.page import COLOURS, Page, series_style


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects what a page would load and how its parts are named."""

    VOID = ("meta", "path", "use", "rect", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.names.append(value or "")
            if name in ("src", "href", "xlink:href", "data") and not (value or "").startswith("#"):
                self.loaded.append(value or "")
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def drawing(label: str = "AdamW & co") -> Figure:
    figure = Figure(figsize=(4, 2))
    axes = figure.add_subplot()
    axes.plot([1, 2, 3], [3, 1, 2], label=label, **series_style(0))
    axes.legend()
    return figure


def example() -> Page:
    page = Page("Loss <of> a & b", "Some `code`, and **more**.")
    page.heading("One")
    page.text("a < b")
    page.table(["name", "loss"], [["a|b", 0.5], ["c", "none"], ["d", -1]], "Losses.")
    page.figure(drawing(), "A line.")
    page.figure(drawing(), "The same line.")
    for title in ("Two", "Three"):
        page.heading(title)
    page.heading("Settings", folded=True)
    page.code("x = {'a': 1} <y>")
    return page


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    return reader


def test_html_is_well_formed_and_loads_nothing() -> None:
    text = example().html()
    reader = read(text)
    assert reader.open == []
    assert reader.loaded == []
    assert "script" not in reader.tags
    assert "url(http" not in text
    assert "@import" not in text
    assert len(reader.names) == len(set(reader.names))  # of two figures with the same parts
    assert {"nav", "details", "figure", "caption"} <= set(reader.tags)


def test_text_is_escaped_and_code_and_bold_are_marked() -> None:
    text = example().html()
    assert "<h1>Loss &lt;of&gt; a &amp; b</h1>" in text
    assert "Some <code>code</code>, and <strong>more</strong>." in text
    assert "<p>a &lt; b</p>" in text
    assert "x = {&#x27;a&#x27;: 1} &lt;y&gt;" in text
    assert "AdamW &amp; co" in text  # a figure's text stays text


def test_names_in_figures_are_found() -> None:
    """Every reference in a figure, such as to a clipping path, is to a part of the same page."""
    reader = read(text := example().html())
    wanted = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert len(wanted) > 4
    assert {a or b for a, b in wanted} <= set(reader.names)


def test_figures_take_the_colours_of_the_page() -> None:
    text = example().html()
    figure = text[text.index("<figure") : text.index("</figure>")]
    assert "#000000" not in figure
    assert "#ffffff" not in figure
    assert "currentColor" in figure
    assert COLOURS[0] in figure


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    page = Page("p")
    page.table(
        ["name", "number", "mixed", "empty"],
        [["a", "1.5", "1", ""], ["b", "-2 +- 1", "x", ""], ["c", "inf", "2", ""], ["d", ".5 s", "3", ""]],
    )
    assert "| --- | ---: | --- | --- |" in page.markdown()
    assert re.findall(r"<th( class=\"number\")?>", page.html()) == ["", ' class="number"', "", ""]


def test_a_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"2 columns \(a, b\)"):
        Page("p").table(["a", "b"], [[1]])


def test_markdown_and_figures_beside_it(tmp_path: Path) -> None:
    path = example().write_markdown(tmp_path / "folder" / "report.md")
    text = path.read_text()
    assert "| a\\|b | 0.5 |" in text
    assert "## Settings" in text
    assert "```text\nx = {'a': 1} <y>\n```" in text
    found = re.findall(r"!\[(.*?)\]\((.*?)\)", text)
    assert [label for label, _ in found] == ["A line.", "The same line."]
    for _, place in found:
        assert (path.parent / place).read_text().startswith("<svg")
    # Without a place for figures, their captions are left.
    assert "Figure 2. The same line." in example().markdown()
    assert "![" not in example().markdown()


def test_the_same_page_is_the_same_file(tmp_path: Path) -> None:
    first, second = (example().write_html(tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


# --- colours ----------------------------------------------------------------------------------------------------------


def linear(colour: str) -> np.ndarray:
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def oklab(colour: str) -> np.ndarray:
    """Coordinates whose distances are those that people see (B. Ottosson, 2020)."""
    lms = np.cbrt(
        np.array(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ]
        )
        @ linear(colour)
    )
    return (
        np.array(
            [
                [0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660],
            ]
        )
        @ lms
    )


def contrast(a: str, b: str) -> float:
    """The contrast ratio of WCAG 2."""
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def test_twelve_series_are_told_apart_on_both_pages() -> None:
    assert len(COLOURS) == 12
    pages = re.findall(r"--page: (#\w+)", example().html())
    assert len(set(pages)) == 2
    for page, colour in itertools.product(pages, COLOURS):
        assert contrast(page, colour) >= 3  # what WCAG 2 asks of graphics
    # A just noticeable difference is about 0.02.
    assert min(np.linalg.norm(oklab(a) - oklab(b)) for a, b in itertools.combinations(COLOURS, 2)) > 0.15
    styles = [series_style(i) for i in range(48)]
    assert len({style["marker"] for style in styles[:12]}) == 12
    assert len({str(style) for style in styles}) == 48  # lines tell apart more than twelve
