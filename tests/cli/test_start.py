"""What is imported before a command needs it, the list of commands, and completion in a shell."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_optim
from lightning_optim.cli import CommandLine, Invocation, main
from lightning_optim.cli.entry import command_names
from lightning_optim.cli.invocation import OPTIONS, TRAINER_COMMANDS
from lightning_optim.registry import OPTIMIZERS

SLOW_TO_IMPORT = ("lightning", "pytorch_lightning", "torchvision", "timm", "torchmetrics", "sklearn", "sympy")

# One process runs all of them, because what one does not import, those before it have not imported either.
QUICK = """
import contextlib, os, sys
from torch.utils.tensorboard import SummaryWriter
writer = SummaryWriter("logs")
writer.add_scalar("update/to_weight", 1e-3, 0)
writer.close()
before = set(sys.modules)
from lightning_optim.cli import main
for line in sys.argv[1:]:
    with contextlib.redirect_stdout(open(os.devnull, "w")), contextlib.suppress(SystemExit):
        main(line.split())
    # torch imports sympy, with its compiler, when it makes an optimizer, as `spike` does last of all.
    early = [name for name in SLOW if name in sys.modules and name not in before and (name, line) != ("sympy", LAST)]
    assert not early, f"{line!r} imports {early}"
"""

LINES = [
    "",
    "--help",
    "--version",
    "fitt",
    "lst --json",
    "fit --optimiser NAMO",
    "fit --lr 0.1",
    "validate --modle x.Y",
    "fit -c digit",
    "list",
    "list --json",
    "list --presets",
    "list --jsn",
    "diagnostics logs",
    "diagnostics nowhere",
    "compare --optimizers Namo",
    "compare --optimizer NAMO",
    "compare --study s --budget 2",
    "spike --optimizers Namo",
    "spike --optimizers SGD MVNGrad Muon --scales 10 --at 5 --after 2",
]


def test_commands_import_no_more_than_they_need(tmp_path: Path) -> None:
    code = QUICK.replace("SLOW", repr(SLOW_TO_IMPORT)).replace("LAST", repr(LINES[-1]))
    run = subprocess.run([sys.executable, "-c", code, *LINES], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # Each wrong line has been explained.
    assert run.stderr.count("lightning-optim: error: ") == 12, run.stderr


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_all_commands_are_listed(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(args)
    shown = capsys.readouterr().out
    named = [line.split()[0] for line in shown.partition("commands")[2].splitlines() if line.startswith("  ")]
    assert named[: len(TRAINER_COMMANDS) + len(command_names())] == [*TRAINER_COMMANDS, *command_names()]
    assert {"list", "diagnostics", "spike"} <= set(command_names())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.startswith(f"lightning-optim {lightning_optim.__version__} torch ")


@pytest.mark.parametrize(
    ("args", "suggestion"),
    [
        (["--lr", "0.1"], "--optimizer.lr"),
        (["--weight_decay=0.1"], "--optimizer.weight_decay"),
        (["--fallback_lr", "1"], "--optimizer.fallback_lr"),
        (["--schedule", "WarmupCosine"], "--lr_scheduler"),
        (["--diagnostic.tier", "full"], "--diagnostics"),
        (["--max_epochs", "3"], "--trainer.max_epochs"),
        (["--batch_size", "3"], "--data.batch_size"),
        (["--backbone", "resnet18"], "--model.backbone"),
    ],
)
def test_what_an_option_should_have_been(args: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args])
    assert stop.value.code == 2
    assert suggestion in capsys.readouterr().err


class Parsed(Exception):
    pass


class ParserOnly(CommandLine):
    def parse_arguments(self, parser, args):  # type: ignore[no-untyped-def]
        raise Parsed(self._subcommand_parsers)


def test_the_options_that_are_known_before_the_parser_is_made() -> None:
    with pytest.raises(Parsed) as parsed:
        ParserOnly(Invocation.of(["fit"]))
    parsers = parsed.value.args[0]
    assert list(parsers) == list(TRAINER_COMMANDS)
    names = {
        option.removeprefix("--").partition(".")[0].removesuffix("+")
        for parser in parsers.values()
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert names == set(OPTIONS)


COMPLETE = """
source ./script
for line in "$@"; do
    read -ra words <<< "$line|"
    COMP_WORDS=("${words[@]}")
    last=$(( ${#COMP_WORDS[@]} - 1 ))
    COMP_WORDS[last]=${COMP_WORDS[last]%|}
    COMP_CWORD=$last COMPREPLY=()
    _shtab_lightning_optim lightning-optim "${COMP_WORDS[last]}" "${COMP_WORDS[last - 1]}"
    echo "${COMPREPLY[*]}"
done
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="the script is for bash")
def test_completion_in_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    expected = {
        "lightning-optim sp": {"spike"},
        "lightning-optim fit -c shakes": {"shakespeare"},
        "lightning-optim fit --config mvn": {"mvngrad"},
        "lightning-optim fit --optimizer NAM": {"NAMO", "NAMOD"},
        "lightning-optim fit --optimizer ": set(OPTIMIZERS),
        "lightning-optim test --ckpt_path b": {"best"},
        "lightning-optim fit --optimizer NAMO --optimizer.nest": {"--optimizer.nesterov"},
        "lightning-optim fit --trainer.max_": {f"--trainer.max_{name}" for name in ("epochs", "steps", "time")},
        "lightning-optim fit --diagnostics.tier ": {"off", "light", "standard", "full"},
        "lightning-optim list --pre": {"--presets"},
        "lightning-optim spike --optimizers Muon MV": {"MVNGrad"},
    }
    run = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", *expected], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    completed = dict(zip(expected, (set(line.split()) for line in run.stdout.splitlines())))
    assert completed == expected, run.stderr
