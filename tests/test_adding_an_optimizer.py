"""Adding an optimizer takes what CONTRIBUTING says: three files, and what is written from them.

The test does it, in a copy of the repository, with a throw-away algorithm of each kind, and finds them in everything
that is derived or parametrised. No file of the copy is edited.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.optimizers import rows

ROOT = Path(__file__).parents[1]

ALGORITHMS = {
    "wobble": '''
"""Wobble: momentum with a pull."""

from typing import Annotated

from ..engine.arithmetic import add_, ema_
from ..engine.hyperparameters import number
from ..engine.kinds import Elementwise, Move


class Wobble(
    Elementwise,
    paper="arXiv 0000.00001",
    about="momentum that is pulled by the gradient",
    experimental="The paper leaves the default of ``pull`` open.",
):
    r"""Wobble (`arXiv 0000.00001 <https://arxiv.org/abs/0000.00001>`_).

    .. math::
        m_t = \\mu m_{t-1} + (1-\\mu) g_t, \\qquad \\theta_t = \\theta_{t-1} - \\eta (m_t + \\kappa g_t)

    Args:
        momentum: Decay rate :math:`\\mu`.
        pull: How much :math:`\\kappa` of the gradient is added.
    """

    lr: float = 1e-2
    momentum: float = 0.9
    pull: Annotated[float, number(0, 5)] = 0.5
    weight_decay: float = 0.0

    buffers = ("m",)

    @staticmethod
    def update(g, s, k):
        ema_(s.m, g, k.momentum)
        return Move(add_(s.m.clone(), g, k.pull), k.lr)
''',
    "choir": '''
"""Choir: all tensors of a group have one scale."""

from ..engine.arithmetic import ema_
from ..engine.kinds import Group, Move
from ..engine.rule import Internal


def _loudness(g, s, t, h):
    return s.loudness, s.loudness.new_ones(())


class Choir(Group, paper="arXiv 0000.00002", about="momentum over the norm of all gradients"):
    r"""Choir: :math:`\\theta_t = \\theta_{t-1} - \\eta m_t / (\\sqrt{\\sum \\|g_t\\|^2} + \\epsilon)`."""

    lr: float = 1e-2
    momentum: float = 0.9
    eps: float = 1e-8
    weight_decay: float = 0.0

    buffers = ("m",)
    group_state = {"loudness": 0.0}
    internals = {"loudness": Internal("sum of all squared gradients", _loudness)}

    @staticmethod
    def sums(g, s, k):
        g = g.double().flatten()
        return (g.dot(g),)

    @staticmethod
    def combine(sums, s, k):
        (gg,) = sums
        return {"loudness": gg}, {"scale": 1 / (gg.sqrt() + k.eps)}

    @staticmethod
    def update(g, s, k):
        ema_(s.m, g, k.momentum)
        return Move(s.m * k.scale, k.lr)
''',
    "turn": '''
"""Turn: orthogonalised momentum, times the norm of the momentum over that of the gradients."""

from math import sqrt

from ..engine.arithmetic import ema_, squared_norm
from ..engine.kinds import Matrix, Move
from ..engine.rule import LIKE_PARAMETER, Polar, mean_of


class Turn(Matrix, paper="arXiv 0000.00003", about="orthogonalised momentum, as long as gradients agree"):
    r"""Turn: :math:`W_t = W_{t-1} - \\eta\\|\\hat M_t\\|\\,\\mathrm{polar}(M_t)/(\\sqrt{\\hat v_t} + \\epsilon)`."""

    lr: float = 0.02
    momentum: float = 0.9
    eps: float = 1e-8
    weight_decay: float = 0.0
    orthogonalizer: str = "kj5"

    by_rows = True
    internals = {"loudness": mean_of("loudness", "norm of the gradients")}

    @staticmethod
    def buffers(shape, h):
        return {"m": LIKE_PARAMETER, "v": (1, 1)}

    @staticmethod
    def scalars(t, h, shape):
        return {"bias": sqrt(1 - h.momentum**t)}

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g, k.momentum)
        o, (gg, mm) = yield Polar(s.m, k.orthogonalizer, (squared_norm(g), squared_norm(s.m)))
        ema_(s.v, gg, k.momentum)
        norm = s.v.sqrt()
        observe("loudness", norm)
        return Move(o, k.lr / k.bias * mm.sqrt() / norm.add_(k.eps * k.bias))
''',
}

ROWS = {
    "wobble": '''
"""Wobble."""

from __future__ import annotations

from dataclasses import dataclass

from ..references import Array, Reference, State
from ..row import Row


@dataclass
class WobbleReference(Reference):
    lr: float = 1e-2
    momentum: float = 0.9
    pull: float = 0.5
    weight_decay: float = 0.0

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        p = (1 - lr * self.weight_decay) * p
        s["m"] = self.momentum * s["m"] + (1 - self.momentum) * g
        return p - lr * (s["m"] + self.pull * g)


ROWS = [
    Row(
        "Wobble",
        WobbleReference,
        [{}, {"weight_decay": 0.1, "decay": "coupled"}],
        golden="a throw-away",
        lr=0.1,
        proportional=True,
    )
]
''',
    "choir": '''
"""Choir."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..references import Array, Reference, State
from ..row import Row


@dataclass
class ChoirReference(Reference):
    lr: float = 1e-2
    momentum: float = 0.9
    eps: float = 1e-8
    weight_decay: float = 0.0

    def move(self, grads: Sequence[Array], lr: float) -> None:
        self.norm = np.sqrt(sum(np.sum(g**2) for g in grads))
        super().move(grads, lr)

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        s["m"] = self.momentum * s["m"] + (1 - self.momentum) * g
        return (1 - lr * self.weight_decay) * p - lr * s["m"] / (self.norm + self.eps)


ROWS = [Row("Choir", ChoirReference, golden="a throw-away", lr=0.2)]
''',
    "turn": '''
"""Turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..references import Array, Reference, State, flatten
from ..row import Row


@dataclass
class TurnReference(Reference):
    lr: float = 0.02
    momentum: float = 0.9
    eps: float = 1e-8
    weight_decay: float = 0.0
    orthogonalizer: str = "kj5"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        s["m"] = self.momentum * s["m"] + (1 - self.momentum) * g
        s["v"] = self.momentum * s["v"] + (1 - self.momentum) * np.sum(g**2)
        unbiased = 1 - self.momentum**self.t
        ratio = np.linalg.norm(s["m"]) / unbiased / (np.sqrt(s["v"] / unbiased) + self.eps)
        o = self.orthogonalize(flatten(s["m"])).reshape(p.shape)
        return (1 - lr * self.weight_decay) * p - lr * ratio * o


ROWS = [Row("Turn", TurnReference, [{}, {"weight_decay": 0.1}], golden="a throw-away", lr=0.1)]
''',
}

PRESET = """# {name} as its paper has it.
optimizer:
  class_path: lightning_optim.{name}
  init_args:
    lr: 1.0e-3
"""

NAMES = {"wobble": "Wobble", "choir": "Choir", "turn": "Turn"}
KINDS = {"Wobble": "element-wise", "Choir": "group", "Turn": "matrix"}
#: What a contributor writes for one optimizer.
FILES = {
    "lightning_optim/optimizers/{file}.py": ALGORITHMS,
    "lightning_optim/configs/optimizers/{file}.yaml": {key: PRESET.format(name=name) for key, name in NAMES.items()},
    "tests/optimizers/rows/{file}.py": ROWS,
}

#: The two commands that a contributor runs.
COMMANDS = [("docs/generate.py",), ("-m", "tests.optimizers.interface")]


def copied(folder: Path) -> Path:
    """The repository with what the build maps into ``lightning_optim`` inside of it, so that this is imported."""
    leave = shutil.ignore_patterns("__pycache__", "*.pyc", ".venv")
    shutil.copytree(ROOT / "lightning_optim", folder / "lightning_optim", ignore=leave)
    for inside in ("callbacks", "models", "configs"):
        shutil.copytree(ROOT / inside, folder / "lightning_optim" / inside, ignore=leave)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=leave)
    (folder / "docs").mkdir()
    for file in ("pyproject.toml", "conftest.py", "README.md", "CONTRIBUTING.md", "docs/generate.py"):
        shutil.copy(ROOT / file, folder / file)
    return folder


def added(folder: Path) -> Path:
    """Three files for each optimizer."""
    for where, texts in FILES.items():
        for file, text in texts.items():
            path = folder / where.format(file=file)
            assert not path.exists()
            path.write_text(text.lstrip("\n"))
    return folder


def run(folder: Path, *command: str, **environment: str) -> str:
    """What a program of the copy prints."""
    variables = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment
    done = subprocess.run([sys.executable, *command], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return added(copied(tmp_path_factory.mktemp("repository")))


_LIBRARY = """
import contextlib, inspect, io, json
import torch
import lightning_optim as lo
from lightning_optim.cli import main
from lightning_optim.engine.two_rules import fallbacks
from lightning_optim.registry import OPTIMIZERS, table

p = lambda: torch.nn.Parameter(torch.ones(3, 3))
def message(call):
    try:
        call()
    except ValueError as error:
        return str(error)
def printed(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(list(words))
    return out.getvalue()
print(json.dumps({
    "file": lo.__file__,
    "exported": [name for name in ("Wobble", "Choir", "Turn") if getattr(lo, name).__name__ == name],
    "kinds": {name: OPTIMIZERS[name].kind for name in ("Wobble", "Choir", "Turn")},
    "fallbacks": sorted(fallbacks()),
    "table": [name for name in ("Wobble", "Choir", "Turn") if f"`{name}`" in table()],
    "signature": {name: list(inspect.signature(getattr(lo, name)).parameters) for name in ("Wobble", "Choir", "Turn")},
    "documentation": lo.Wobble.__doc__,
    "experimental": {info.name: info.experimental for info in OPTIMIZERS.values() if info.experimental},
    "rows": [row for row in table().splitlines() if "`Wobble`" in row or "`Choir`" in row],
    "wrong": message(lambda: lo.Wobble([p()], pull=7.0)),
    "group": sorted(lo.Wobble([p()]).param_groups[0]),
    "list": printed("list"),
    "page": printed("list", "Wobble"),
    "presets": printed("list", "--presets"),
    "as fallback": lo.NAMO([{"params": [p()], "role": "fallback"}], fallback="Choir").param_groups[0]["rule"],
}))
"""


def test_the_library_knows_them(copy: Path) -> None:
    found = json.loads(run(copy, "-c", _LIBRARY))
    assert found["file"].startswith(str(copy))
    assert found["exported"] == list(KINDS)
    assert found["kinds"] == KINDS
    assert {"Wobble", "Choir"} <= set(found["fallbacks"])
    assert "Turn" not in found["fallbacks"]
    assert found["table"] == list(KINDS)
    assert found["signature"]["Wobble"][:6] == ["params", "lr", "momentum", "pull", "weight_decay", "decay"]
    assert {"maximize", "backend", "rounding"} <= set(found["signature"]["Wobble"])
    assert {"fallback", "fallback_lr"} <= set(found["signature"]["Turn"])
    assert "Weight decay coefficient" in found["documentation"]  # written once, for all
    reason = "The paper leaves the default of ``pull`` open."
    assert found["experimental"]["Wobble"] == reason
    assert f"**Experimental**: {reason}" in found["documentation"]
    assert ["(experimental)" in row for row in found["rows"]] == [True, False]
    assert "Experimental: The paper leaves the default of pull open." in found["page"]
    assert "gradient (experimental)" in found["list"]
    assert found["wrong"] == "Wobble: pull must be a number in [0, 5], got pull=7.0."
    assert "pull" in found["group"]
    assert found["as fallback"] == "Choir"
    assert all(name in found["list"] for name in KINDS)
    assert all(name in found["presets"] for name in NAMES)
    assert "How much" in found["page"]
    assert "pull" in found["page"]


_COMMANDS = """
import contextlib, io, json, sys
from lightning_optim.cli import main

found = {}
for line in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main(line.split())
        except SystemExit as end:
            assert not end.code, line
    found[line] = out.getvalue()
print(json.dumps(found))
"""


def commands(folder: Path, *lines: str) -> dict[str, str]:
    """What command lines print."""
    found: dict[str, str] = json.loads(run(folder, "-W", "ignore", "-c", _COMMANDS, json.dumps(lines)).splitlines()[-1])
    return found


TRY = "--trainer.fast_dev_run 2 --trainer.accelerator cpu"


@pytest.mark.slow
def test_the_command_line_knows_and_trains_them(copy: Path) -> None:
    fits = [f"fit -c digits -c {file} {TRY}" for file in NAMES]
    fits.append(f"fit -c digits -c namo --optimizer.fallback Wobble --optimizer.fallback_betas null {TRY}")
    found = commands(copy, *(f"fit --optimizer.help {name}" for name in KINDS), *fits)
    assert "pull" in found["fit --optimizer.help Wobble"]
    assert "eps" in found["fit --optimizer.help Choir"]
    assert "fallback" in found["fit --optimizer.help Turn"]


#: Suites that every optimizer runs in, and how many of their tests name each kind at least.
SUITES = {
    "tests/optimizers/test_engine.py": KINDS,
    "tests/optimizers/test_fuzz.py": KINDS,
    "tests/optimizers/test_against_references.py": KINDS,
    "tests/optimizers/test_references.py": KINDS,
    "tests/optimizers/test_rules.py": KINDS,
    "tests/optimizers/test_rounding.py": KINDS,
    "tests/optimizers/test_bad_input.py": KINDS,
    "tests/optimizers/test_prepared.py": KINDS,
    "tests/optimizers/test_by_rows.py": ["Turn"],
    "tests/optimizers/test_hybrid.py": ["Turn", "Wobble", "Choir"],  # the last two as fallbacks
    "tests/optimizers/test_execution.py": KINDS,
    "tests/resume/test_matrix.py": KINDS,
    "tests/distributed/test_processes.py": KINDS,
    "tests/precision/test_matrix.py": KINDS,
    "tests/callbacks/test_probes.py": KINDS,
    "tests/callbacks/test_optimizer_internals.py": KINDS,
    "tests/callbacks/test_orthogonality_error.py": ["Turn"],
}


@pytest.mark.slow
def test_all_shared_suites_run_them(copy: Path) -> None:
    collected = run(copy, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *SUITES)
    for suite, names in SUITES.items():
        ids = [line for line in collected.splitlines() if line.startswith(suite)]
        for name in names:
            assert any(name in line for line in ids), f"{suite} has no test of {name}"


def test_some_suites_run_and_pass(copy: Path) -> None:
    """Collected, and really run: references, fuzzing, promises of rules, and rows of matrices."""
    suites = [
        "tests/optimizers/test_against_references.py",
        "tests/optimizers/test_fuzz.py",
        "tests/optimizers/test_rules.py",
        "tests/optimizers/test_by_rows.py",
    ]
    chosen = "(Wobble or Choir or Turn) and not chunked"
    options = ["-m", "not slow", "-q", "-p", "no:cacheprovider", "-k", chosen]
    out = run(copy, "-m", "pytest", *options, *suites, FUZZ_EXAMPLES="200")
    passed = int(re.findall(r"(\d+) passed", out)[-1])
    # Of each: its hyperparameters and trajectory against the reference, and fuzzing; promises in five configurations;
    # rows of Turn's two in three ways.
    assert passed == 3 * (2 + 1) + 5 + 6


def test_contributing_says_what_is_done_here() -> None:
    """As many files, in the same folders, and the same commands."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## Adding an optimizer\n")[2].partition("\n## ")[0]
    assert section.strip().startswith("Three new files, one line, and two commands that write what is derived")
    assert len(FILES) == 3
    for file in FILES:
        assert file.rpartition("/")[0].removeprefix("lightning_optim/") in section
    assert "`python " + " && python ".join(" ".join(command) for command in COMMANDS) + "` writes" in section


def test_the_one_line_is_there_of_every_optimizer() -> None:
    """That of the docs, which no test of the copy can write: what to know about an optimizer."""
    text = (ROOT / "docs" / "optimizers.md").read_text()
    table = text.partition("| name | state, in numbers per parameter | what to know |\n")[2].partition("\n\n")[0]
    names = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert names == set(rows.OURS)


@pytest.mark.slow
def test_what_is_derived_is_written_by_two_commands(copy: Path) -> None:
    for command in COMMANDS:
        run(copy, *command)
    readme, stub = ((copy / f).read_text() for f in ("README.md", "lightning_optim/optimizers/__init__.pyi"))
    stored = json.loads((copy / "tests" / "optimizers" / "interface.json").read_text())
    for file, name in NAMES.items():
        assert f"| `{name}` |" in readme
        assert f"from .{file} import {name} as {name}" in stub
        assert stored[name]["kind"] == KINDS[name]
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/optimizers/test_interface.py")


@pytest.mark.slow
def test_every_test_of_theirs_passes(copy: Path) -> None:
    run(copy, "-m", "tests.optimizers.interface")
    suites = [suite for suite in SUITES if "distributed" not in suite]
    options = ["-m", "not slow", "-q", "-p", "no:cacheprovider", "-k", "Wobble or Choir or Turn"]
    run(copy, "-m", "pytest", *options, *suites, FUZZ_EXAMPLES="1000")


def test_a_missing_row_says_what_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "__path__", [])
    with pytest.raises(LookupError, match=r"has no row in the tests: add tests/optimizers/rows/\w+\.py with its"):
        rows._rows()


_HYPERPARAMETER = """
import inspect, json, torch
import lightning_optim as lo
from lightning_optim.registry import OPTIMIZERS
from tests.optimizers.strategies import bad, choices, extreme, usual
from tests.optimizers.test_against_references import test_a_reference_has_the_hyperparameters_of_its_optimizer as test
from tests.optimizers.test_fuzz import bad_values, hyperparameters

w = torch.nn.Parameter(torch.ones(2))
try:
    lo.Wobble([w], wildness=3.0)
except ValueError as error:
    wrong = str(error)
try:
    test("Wobble")
except AssertionError as error:
    missing = str(error)
optimizer = lo.Wobble([w], lr=1.0, wildness=0.25)
w.grad = torch.ones(2)
optimizer.step()
print(json.dumps({
    "default": inspect.signature(lo.Wobble).parameters["wildness"].default,
    "documentation": lo.Wobble.__doc__,
    "wrong": wrong,
    "missing": missing,
    "group": optimizer.param_groups[0]["wildness"],
    "moved": w.tolist(),
    "registry": OPTIMIZERS["Wobble"].defaults["wildness"],
    "fuzzed": "wildness" in hyperparameters("Wobble"),
    "good": str(extreme(lo.Wobble.fields["wildness"])),
    "bad": len(bad_values("Wobble")["wildness"]),
}))
"""


@pytest.fixture
def wilder(tmp_path: Path) -> Path:
    """A copy in which Wobble has one more hyperparameter: declared, and used."""
    copy = added(copied(tmp_path))
    file = copy / "lightning_optim" / "optimizers" / "wobble.py"
    text = file.read_text()
    for old, new in {
        "    weight_decay: float": "    wildness: Annotated[float, number(0, 1)] = 0.0\n    weight_decay: float",
        "g, k.pull)": "g, k.pull + k.wildness)",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    file.write_text(text)
    return copy


def test_a_hyperparameter_is_two_places(wilder: Path) -> None:
    found: dict[str, Any] = json.loads(run(wilder, "-c", _HYPERPARAMETER))
    assert found["default"] == found["registry"] == 0.0
    assert "wildness" in found["documentation"]
    assert found["wrong"] == "Wobble: wildness must be a number in [0, 1], got wildness=3.0."
    assert found["group"] == 0.25
    assert found["moved"] == pytest.approx([1 - (0.1 + 0.5 + 0.25)] * 2)
    assert found["fuzzed"]
    assert "1.0" in found["good"]
    assert "100.0" not in found["good"]
    assert found["bad"] > 5
    assert found["missing"].startswith("WobbleReference lacks wildness")


@pytest.mark.slow
def test_help_shows_a_new_hyperparameter(wilder: Path) -> None:
    line = "fit --optimizer.help Wobble"
    assert "wildness" in commands(wilder, line)[line]
