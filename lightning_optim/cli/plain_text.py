r"""Docstrings as plain text: equations in Unicode, no markup.

It knows the LaTeX that the docstrings here use. Fractions and roots get the parentheses that they need, which
pylatexenc (2.11) leaves out and unicodeit (0.7) does not write at all.

>>> equation(r"s_t = \beta_2 s_{t-1} + (1-\beta_2)\,g_t^2,\quad d = \frac{\hat m_t}{\sqrt{s_t + \epsilon}}")
'sₜ = β₂ sₜ₋₁ + (1-β₂) gₜ²,   d = m̂ₜ/√(sₜ + ε)'
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi chi psi omega"
)
_CAPITALS = "Gamma Delta Theta Lambda Sigma Phi Psi Omega"
_SYMBOLS = dict(zip(f"{_GREEK} {_CAPITALS}".split(), "αβγδεεζηθκλμνξπρστφχψωΓΔΘΛΣΦΨΩ")) | {
    "leftarrow": "←", "rightarrow": "→", "to": "→", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "neq": "≠", "ne": "≠",
    "approx": "≈", "sim": "~", "propto": "∝", "in": "∈", "circ": "∘", "odot": "⊙", "otimes": "⊗", "times": "×",
    "cdot": "·", "pm": "±", "infty": "∞", "nabla": "∇", "partial": "∂", "sum": "Σ", "prod": "∏", "top": "ᵀ", "ell": "ℓ",
    "langle": "⟨", "rangle": "⟩", "|": "‖", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "ldots": "...",
    "dots": "...", "cdots": "...", "quad": "   ", "qquad": "     ", ",": " ", ";": " ", ":": " ", " ": " ", "!": "",
    "{": "{", "}": "}", "_": "_", "%": "%",
}  # fmt: skip
_IGNORED = {"bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr", "big", "Big", "left", "right", "displaystyle", "limits"}
_ACCENTS = {"hat": "\u0302", "widehat": "\u0302", "bar": "\u0304", "overline": "\u0304", "tilde": "\u0303"}
_FONTS = {"mathrm", "mathbf", "mathcal", "text", "textbf", "textit", "operatorname", "mathit", "bf"}
_BELOW = dict(zip("0123456789+-=()aehijklmnoprstuvxβγρφχ", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓᵦᵧᵨᵩᵪ"))
_ABOVE = dict(zip("0123456789+-=()abcdefghijklmnoprstuvwxyzTᵀ'", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻᵀᵀ'"))


class _Reader:
    """Reads LaTeX from left to right."""

    def __init__(self, source: str) -> None:
        self.tokens = re.findall(r"\\[A-Za-z]+|\\.|[^\\]", source)
        self.position = 0

    def all(self, end: str = "") -> str:
        """The text up to a token, which is passed over."""
        parts: list[str] = []
        while self.position < len(self.tokens):
            if self.tokens[self.position] == end:
                self.position += 1
                break
            parts.append(self.one())
        return "".join(parts)

    def one(self) -> str:
        """The text of the next token and of its arguments."""
        token = self.tokens[self.position]
        self.position += 1
        if token == "{":
            return self.all("}")
        if token in "_^":
            return _script(self.argument(), token)
        if not token.startswith("\\"):
            return "" if token == "&" else token
        name = token[1:]
        if name in ("frac", "tfrac", "dfrac"):
            over, under = self.argument(), self.argument()
            return f"{_atom(over, '+-·, ')}/{_atom(under, '+-·/, ')}"
        if name == "sqrt":
            under = self.argument().strip()
            return f"√{under}" if len(under) == 1 or re.fullmatch(r"[a-z]+\(.*\)", under) else f"√({under})"
        if name in _ACCENTS:
            base = self.argument()
            return base[:1] + _ACCENTS[name] + base[1:]
        if name in _FONTS:
            return self.argument()
        if name in _IGNORED:
            return ""
        return _SYMBOLS.get(name, name)  # A function, such as \max, is its name.

    def argument(self) -> str:
        """The text of an argument: of braces, or of one token."""
        while self.tokens[self.position : self.position + 1] == [" "]:
            self.position += 1
        return self.one() if self.position < len(self.tokens) else ""


def _script(text: str, which: str) -> str:
    letters = _BELOW if which == "_" else _ABOVE
    if all(letter in letters for letter in text):
        return "".join(letters[letter] for letter in text)
    return f"{which}{text}" if len(text) == 1 else f"{which}({text})"


def _atom(text: str, splits: str) -> str:
    """In parentheses, where it would not be read as one."""
    text = text.strip()
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([⟨") - (letter in ")]⟩")
        if depth == 0 and letter in splits and i:
            return f"({text})"
    return text


def equation(latex: str) -> str:
    """LaTeX as Unicode text; ``&`` and line breaks are for :func:`plain`."""
    text = _Reader(re.sub(r"\s+", " ", latex)).all().strip()
    return re.sub(r" {3,}", "   ", re.sub(r"(?<! )  (?! )", " ", text))


def _inline(text: str) -> str:
    """A paragraph without markup."""
    text = re.sub(r":math:`([^`]*)`", lambda found: equation(found[1]), text)
    text = re.sub(r":\w+:`~(?:[\w.]*\.)?(\w+)`", r"\1", text)
    text = re.sub(r":\w+:`\.?([^`]*)`", r"\1", text)
    text = re.sub(r"`([^`<]*) <([^`>]*)>`__?", r"\1, \2", text)
    text = re.sub(r"``([^`]*)``", r"\1", text)
    return re.sub(r"\*\*([^*]*)\*\*", r"\1", text)


class _Block(NamedTuple):
    is_equation: bool
    text: str


def _blocks(text: str) -> Iterator[_Block]:
    """The equations and paragraphs of a docstring without indentation."""
    targets = dict(re.findall(r"^\.\. _([^:]+): *(\S+)$", text, flags=re.MULTILINE))
    text = re.sub(r"^\.\. _[^:]+: *\S+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`([^`<]+)`_", lambda found: f"{found[1]}, {targets.get(found[1], '')}".rstrip(", "), text)
    for is_equation, body in _pieces(text):
        if is_equation:
            for line in re.split(r"\\\\", body):
                yield _Block(True, equation(line))
        else:
            for paragraph in re.split(r"\n\s*\n", body.strip()):
                yield _Block(False, _inline(" ".join(paragraph.split())))


def _pieces(text: str) -> Iterator[tuple[bool, str]]:
    parts = re.split(r"^\.\. math::[ ]*\n((?:[ ]+\S.*\n?|[ ]*\n)+)", text + "\n", flags=re.MULTILINE)
    for i, part in enumerate(parts):
        if part.strip():
            yield i % 2 == 1, part


def plain(docstring: str, width: int = 100) -> str:
    r"""A docstring of reStructuredText as plain text.

    Args:
        docstring: The text, without common indentation.
        width: Where paragraphs are wrapped. Equations are not.

    >>> print(plain("Adds :math:`\\eta`, see :class:`~a.B`.\n\n.. math::\n    x &= x + \\eta \\\\\n    y &= 2\n"))
    Adds η, see B.
    <BLANKLINE>
        x = x + η
        y = 2
    """
    lines: list[str] = []
    was_equation = False
    for block in _blocks(docstring):
        if lines and not (block.is_equation and was_equation):
            lines.append("")
        if block.is_equation:
            lines.append(f"    {block.text}")
        else:
            lines += textwrap.wrap(block.text, width, break_long_words=False, break_on_hyphens=False)
        was_equation = block.is_equation
    return "\n".join(lines)
