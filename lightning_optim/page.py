"""One self-contained HTML page of text, tables and figures, and the same as Markdown."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["COLOURS", "Page", "series_style"]

#: Colours of twelve series. Each has a contrast of at least 3 : 1 to a white and to a dark page, and each pair
#: differs by at least 0.15 in OKLab.
COLOURS = (
    "#1e78d2", "#ff5a00", "#00a500", "#d200ff", "#965a00", "#ff3cb4",
    "#875a87", "#879678", "#d21e5a", "#00784b", "#b478e1", "#783cff",
)  # fmt: skip
_MARKERS = "osD^vPX<>ph*"
_LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


def series_style(i: int) -> dict[str, Any]:
    """How matplotlib draws the ``i``-th series: colour, marker and line, so that no two of the first 12 share any two.

    >>> series_style(0)
    {'color': '#1e78d2', 'marker': 'o', 'linestyle': '-'}
    """
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": _LINES[i // len(COLOURS) % len(_LINES)],
    }


# --- blocks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heading:
    title: str
    folded: bool


@dataclass(frozen=True)
class _Text:
    text: str


@dataclass(frozen=True)
class _Code:
    text: str


@dataclass(frozen=True)
class _Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclass(frozen=True)
class _Figure:
    figure: Any
    caption: str
    number: int


_Block: TypeAlias = _Heading | _Text | _Code | _Table | _Figure


@dataclass
class Page:
    """A page that is written from top to bottom.

    Text, captions and cells may hold ```code``` and ``**bold**``; everything else in them is shown as it stands.
    The HTML needs no other file and no network, follows the reader's choice of light or dark, and prints in black on
    white.

    Args:
        title: Its title.
        lead: Some words below the title.

    Example:
        >>> page = Page("Two optimizers", "Loss after 100 steps.")
        >>> page.heading("Result")
        >>> page.table(["optimizer", "loss"], [["AdamW", 0.31], ["NAMO", 0.29]])
        >>> print(page.markdown())
        # Two optimizers
        <BLANKLINE>
        Loss after 100 steps.
        <BLANKLINE>
        ## Result
        <BLANKLINE>
        | optimizer | loss |
        | --- | ---: |
        | AdamW | 0.31 |
        | NAMO | 0.29 |
        <BLANKLINE>
    """

    title: str
    lead: str = ""
    _blocks: list[_Block] = field(default_factory=list, repr=False)

    def heading(self, title: str, folded: bool = False) -> None:
        """Begin a section. A folded one is closed on the screen until the reader opens it, and open on paper."""
        self._blocks.append(_Heading(title, folded))

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._blocks.append(_Text(text))

    def code(self, text: str) -> None:
        """Add lines of code, as they are."""
        self._blocks.append(_Code(text))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> None:
        """Add a table. Columns that hold numbers are aligned to the right.

        Raises:
            ValueError: A row has not one cell for each column.
        """
        cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
        for row in cells:
            if len(row) != len(columns):
                raise ValueError(f"The table has {len(columns)} columns ({', '.join(columns)}), and a row is {row}.")
        self._blocks.append(_Table(list(columns), cells, caption))

    def figure(self, figure: Any, caption: str) -> None:
        """Add a ``matplotlib.figure.Figure``.

        What is drawn in black or on white follows the colours of the page.
        """
        number = 1 + sum(isinstance(block, _Figure) for block in self._blocks)
        self._blocks.append(_Figure(figure, caption, number))

    # --- HTML ---------------------------------------------------------------------------------------------------------

    def html(self) -> str:
        """The page as HTML."""
        headings = [block for block in self._blocks if isinstance(block, _Heading)]
        parts = [f"<h1>{_inline(self.title)}</h1>", f'<p class="lead">{_inline(self.lead)}</p>' if self.lead else ""]
        if len(headings) > 3:
            links = (f'<a href="#section-{i}">{_inline(h.title)}</a>' for i, h in enumerate(headings))
            parts.append(f"<nav>{' '.join(links)}</nav>")
        end, number = "", 0
        for block in self._blocks:
            if isinstance(block, _Heading):
                tag, inner = ("details", "summary") if block.folded else ("section", "h2")
                parts += [end, f'<{tag} id="section-{number}"><{inner}>{_inline(block.title)}</{inner}>']
                end, number = f"</{tag}>", number + 1
            else:
                parts.append(_html(block))
        body = "\n".join(part for part in [*parts, end] if part)
        return _FRAME.format(title=html.escape(self.title), style=_STYLE, body=body)

    def write_html(self, path: str | Path) -> Path:
        """Write the page as one HTML file."""
        return _write(Path(path), self.html())

    # --- Markdown -----------------------------------------------------------------------------------------------------

    def markdown(self, figure_path: Callable[[int], str] | None = None) -> str:
        """The page as Markdown.

        Args:
            figure_path: Where the figure of a number, from 1, is found. Default: figures leave only their captions.
        """
        parts = [f"# {self.title}", self.lead]
        for block in self._blocks:
            parts.append(_markdown(block, figure_path))
        return "\n\n".join(part for part in parts if part) + "\n"

    def write_markdown(self, path: str | Path) -> Path:
        """Write the page as Markdown, with its figures as SVG files in a folder beside it."""
        path = Path(path)
        folder = path.with_name(f"{path.stem}-figures")
        for block in self._blocks:
            if isinstance(block, _Figure):
                folder.mkdir(parents=True, exist_ok=True)
                _write(folder / f"{block.number}.svg", _svg(block.figure))
        return _write(path, self.markdown(lambda number: f"{folder.name}/{number}.svg"))


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _markdown(block: _Block, figure_path: Callable[[int], str] | None) -> str:
    if isinstance(block, _Heading):
        return f"## {block.title}"
    if isinstance(block, _Text):
        return block.text
    if isinstance(block, _Code):
        return f"```text\n{block.text}\n```"
    if isinstance(block, _Figure):
        words = f"Figure {block.number}. {block.caption}"
        shown = re.sub(r"[`*\[\]]", "", block.caption)
        return f"![{shown}]({figure_path(block.number)})\n\n{words}" if figure_path else words
    right = _numeric(block)
    lines = [
        block.columns,
        ["---:" if number else "---" for number in right],
        *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in block.rows),
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{block.caption}\n\n{table}" if block.caption else table


def _html(block: _Text | _Code | _Table | _Figure) -> str:
    if isinstance(block, _Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, _Code):
        return f"<pre><code>{html.escape(block.text)}</code></pre>"
    if isinstance(block, _Figure):
        label = html.escape(re.sub(r"[`*]", "", block.caption))
        drawn = _themed(_svg(block.figure), f"figure-{block.number}").replace(
            "<svg ", f'<svg role="img" aria-label="{label}" ', 1
        )
        caption = f"<figcaption>Figure {block.number}. {_inline(block.caption)}</figcaption>"
        return f'<figure><div class="wide">{drawn}</div>{caption}</figure>'
    kinds = [' class="number"' if number else "" for number in _numeric(block)]
    head = "".join(f"<th{kind}>{_inline(name)}</th>" for kind, name in zip(kinds, block.columns))
    rows = "\n".join(
        f"<tr>{''.join(f'<td{kind}>{_inline(cell)}</td>' for kind, cell in zip(kinds, row))}</tr>" for row in block.rows
    )
    caption = f"<caption>{_inline(block.caption)}</caption>" if block.caption else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _numeric(table: _Table) -> list[bool]:
    """Which columns hold numbers, and perhaps words where there is none."""
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    return [
        any(map(_is_number, column)) and all(_is_number(cell) or cell in ("", "-", "none") for cell in column)
        for column in columns
    ]


def _is_number(cell: str) -> bool:
    return re.match(r"[*<>~+\-\s]*(\d|\.\d|inf\b|nan\b)", cell) is not None


def _inline(text: str) -> str:
    text = html.escape(text)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


# --- figures ----------------------------------------------------------------------------------------------------------


def _svg(figure: Any) -> str:
    """A figure as an SVG element, the same every time."""
    import matplotlib

    file = io.StringIO()
    # Text stays text: it can be found and copied, and takes a tenth of the room.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = file.getvalue()
    return re.sub(r"<metadata>.*?</metadata>\s*", "", drawn[drawn.index("<svg") :], flags=re.DOTALL).rstrip()


def _themed(svg: str, prefix: str) -> str:
    """An SVG element in the colours of the page, whose names do not clash with those of other figures."""
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", svg)
    svg = re.sub(r"#000000\b", "currentColor", svg)
    return re.sub(r"#ffffff\b", "var(--page)", svg)


# --- style ------------------------------------------------------------------------------------------------------------

_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --page: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --shade: #f5f7f9; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16191d; --ink: #e3e7eb; --soft: #9aa4ae; --line: #363d45; --shade: #1e2329; --link: #79b8ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0; }
h2, summary { font-size: 1.2rem; font-weight: 600; margin: 2.2rem 0 0.6rem; }
summary { cursor: pointer; }
p, pre { max-width: 60rem; }
.lead { color: var(--soft); font-size: 1.05rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; padding: 0.6rem 0; border-block: 1px solid var(--line); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; margin: 0.8rem 0; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.4rem; }
th, td { padding: 0.3rem 0.8rem 0.3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.92em; }
p code, td code, li code { background: var(--shade); padding: 0.05em 0.3em; border-radius: 3px; }
pre { background: var(--shade); padding: 0.8rem 1rem; overflow-x: auto; border-radius: 5px; }
figure { margin: 1.2rem 0; }
figure svg { max-width: 100%; height: auto; fill: currentColor; }
figure svg text { font-family: "DejaVu Sans", Verdana, sans-serif; }
figcaption { color: var(--soft); font-size: 0.92rem; max-width: 60rem; }
@media print {
  :root { --page: #ffffff; --ink: #000000; --soft: #444444; --line: #bbbbbb; --shade: #f5f5f5; --link: #000000; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .wide { overflow: visible; }
  pre { white-space: pre-wrap; overflow: visible; }
  figure, tr { break-inside: avoid; }
  h2, summary { break-after: avoid; }
  thead { display: table-header-group; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
