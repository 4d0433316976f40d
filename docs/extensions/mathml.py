"""Equations as MathML, which browsers render themselves.

Unlike with MathJax, pages need neither network nor JavaScript, and TeX that cannot be converted is a warning of the
build instead of red text in the browser.
"""

from __future__ import annotations

import re
from html import escape

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def to_mathml(tex: str, display: bool, node: nodes.Node) -> str:
    if display and ("&" in tex or r"\\" in tex):
        tex = rf"\begin{{split}}{tex}\end{{split}}"
    try:
        result = convert(tex, display="block" if display else "inline")
        if unknown := re.search(r">(\\\w+|&)<", result):  # The converter leaves what it does not know as it is.
            raise ValueError(f"unknown: {unknown[1]}")
    except Exception as error:  # The converter has no error class of its own.
        logger.warning("cannot convert to MathML: %s (%r)", tex, error, location=node)
        return f"<code>{escape(tex)}</code>"
    return result


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(to_mathml(node.astext(), False, node))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{to_mathml(node.astext(), True, node)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
