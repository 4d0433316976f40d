"""The examples of the README and the guides run, offline and on a CPU.

All Python blocks of a page run one after another. ``<!-- not run: REASON -->`` above a block leaves it out, and
``<!-- needs: PACKAGES -->`` skips it where one is missing. Commands that train are parsed, not run.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_optim
from lightning_optim.callbacks import OptimizerSwap
from lightning_optim.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (not run|needs): ([^>]*) -->\n)?^```(python|bash)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Example:
    page: str
    line: int
    language: str
    code: str
    not_run: bool
    needs: tuple[str, ...]


def examples() -> list[Example]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            mark, words, language, code = match.groups()
            line = text.count("\n", 0, match.start(4)) + 1
            needs = tuple(words.split(", ")) if mark == "needs" else ()
            found.append(Example(page.name, line, language, code, mark == "not run", needs))
    return found


EXAMPLES = examples()
WITH_PYTHON = sorted({e.page for e in EXAMPLES if e.language == "python" and not e.not_run})


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    # What every page takes for granted.
    names = {
        "__name__": page,
        "pl": pl,
        "torch": torch,
        "lightning_optim": lightning_optim,
        "OptimizerSwap": OptimizerSwap,
    }
    for example in EXAMPLES:
        if (example.page, example.language, example.not_run) != (page, "python", False):
            continue
        if all(importlib.util.find_spec(package) for package in example.needs):
            exec(compile("\n" * (example.line - 1) + example.code, page, "exec", dont_inherit=True), names)


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for example in EXAMPLES:
        if example.language == "bash" and not example.not_run:
            for line in example.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "fit" in words and "lightning-optim" in line.split(" fit ")[0]:
                    found.append((f"{example.page}:{example.line}", words[words.index("fit") :]))
    return found


def parses(words: list[str]) -> bool:
    """Whether it can be tried here: it needs no run of before, no other package, and does not leave by itself."""
    return not {"--ckpt_path", "--optimizer.help"} & set(words) and not any("Wandb" in word for word in words)


@pytest.mark.parametrize(("place", "words"), [c for c in commands() if parses(c[1])], ids=str)
def test_commands_parse(place: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "--print_config"])
    output = capsys.readouterr()
    assert not end.value.code, f"{place}: {output.err}"
    assert "optimizer:" in output.out


def test_a_model_of_ones_own_is_trained_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, command = [example for example in EXAMPLES if example.page == "own-model.md"][:2]
    (tmp_path / "mine.py").write_text(module.code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    main(shlex.split(command.code.replace("\\\n", " "))[1:])
    assert (tmp_path / "runs" / "Regressor" / "NAMO-lr0.01-s1" / "config.yaml").is_file()
    assert list(tmp_path.glob("runs/Regressor/NAMO-lr0.01-s1/checkpoints/*.ckpt"))


def test_the_rule_on_the_design_page_is_mvn_grad() -> None:
    names: dict[str, Any] = {"__name__": "design"}
    (example,) = [example for example in EXAMPLES if example.page == "design.md"]
    exec(compile(example.code, "design.md", "exec", dont_inherit=True), names)
    gradients = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    ends = []
    for optimizer_class in (names["MVNGradAgain"], lightning_optim.MVNGrad):
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = optimizer_class([p], weight_decay=0.1)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)
