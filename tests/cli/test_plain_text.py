"""Equations and docstrings as plain text, and the page of an optimizer."""

from __future__ import annotations

import re

import pytest
import yaml

from lightning_optim.cli import main, presets
from lightning_optim.cli.optimizer_page import page
from lightning_optim.cli.plain_text import equation, plain
from lightning_optim.registry import OPTIMIZERS


@pytest.mark.parametrize(
    ("latex", "expected"),
    [
        (r"\theta_t = \theta_{t-1} - \eta\, m_t", "θₜ = θₜ₋₁ - η mₜ"),
        (r"\frac{a+b}{c\,d}", "(a+b)/(c d)"),
        (r"\frac{x}{y}", "x/y"),
        (r"\frac{\|M_t\|_F}{\sqrt{v_t}+\epsilon}", "‖Mₜ‖_F/(√(vₜ)+ε)"),
        (r"\sqrt{mn}", "√(mn)"),
        (r"\sqrt d\,\sqrt{\max(m, n)}", "√d √max(m, n)"),
        (r"\sqrt{\frac{1}{n}}", "√(1/n)"),
        (r"\hat m_t, \widehat{V}_{ij}", "m̂ₜ, V̂ᵢⱼ"),
        (r"10^{6 d_t - 3}", "10^(6 dₜ - 3)"),
        (r"M_{i,:}", "M_(i,:)"),
        (r"Q_L^\top G", "Q_Lᵀ G"),
        (r"\bigl(\mathrm{polar}(M) + \lambda W\bigr)", "(polar(M) + λ W)"),
        (r"\min(\max(d, c), 1)", "min(max(d, c), 1)"),
        (r"\unknown x", "unknown x"),
    ],
)
def test_equations(latex: str, expected: str) -> None:
    assert equation(latex) == expected


def test_markup_is_left_out_and_paragraphs_are_wrapped() -> None:
    text = (
        "See :class:`~torch.optim.Adam`, :meth:`step` and ``lr=0.1`` "
        "(`arXiv 1 <https://arxiv.org/abs/1>`_, `arXiv 2`_):\n"
        "**bold**.\n\n.. math::\n    a &= b \\\\\n    c &= d\n\nwhere :math:`a_1` counts.\n\n"
        ".. _arXiv 2: https://arxiv.org/abs/2\n"
    )
    assert plain(text, 200) == (
        "See Adam, step and lr=0.1 (arXiv 1, https://arxiv.org/abs/1, arXiv 2, https://arxiv.org/abs/2): bold.\n\n"
        "    a = b\n    c = d\n\nwhere a₁ counts."
    )
    assert max(map(len, plain("word " * 100, 40).splitlines())) <= 40


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_page_of_an_optimizer(name: str) -> None:
    info = OPTIMIZERS[name]
    shown = page(info, 100)
    assert not re.search(r"\\|:\w+:`|\.\. |``|`_", shown)
    for argument, default in info.defaults.items():
        assert f"\n  {argument} = {'null' if default is None else ''}" in shown
    # The settings of the paper are those of the preset.
    settings = yaml.safe_load(presets("optimizers")[name.lower()].read_text())
    assert yaml.safe_load(shown[shown.index("  optimizer:\n") :]) == settings
    if not info.cls.__module__.startswith("torch."):
        assert re.search(r"^    .* [=←] .*[α-ω]", shown, re.MULTILINE), "there is no equation"
        text = " ".join(shown.split())
        assert "Decay of" in text or "Learning rate" in text


def test_the_page_is_shown_by_list_and_by_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "NAMO"])
    shown = capsys.readouterr().out
    assert "Mₜ = μ₁ Mₜ₋₁ + (1-μ₁) Gₜ" in shown
    assert "nesterov=False, scale=None, max_step=None" in shown
    main(["fit", "--optimizer.help", "NAMO"])
    assert capsys.readouterr().out == shown
    main(["fit", "-c", "digits", "--optimizer.help=NAMO"])
    assert capsys.readouterr().out == shown
