"""What cannot work ends in one line before the work is done; mistakes in the user's code are shown from there on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_optim.cli import OptimCLI, main
from lightning_optim.cli.errors import UsageError, explain_trainer, missing_package
from lightning_optim.cli.outputs import check_figure, check_file, check_folder, explain_os_error
from lightning_optim.cli.tracebacks import root_causes, users_traceback

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SHORT = [*QUIET, "--trainer.max_steps=2", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
CPU = "--trainer.accelerator=cpu"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-optim"])
    monkeypatch.setattr(sys, "path", [*sys.path])


# --- one line, with the argument, the value and the remedy ---------------------------------------------------------

WRONG: dict[str, tuple[list[str], list[str]]] = {
    "devices below zero": ([CPU, "--trainer.devices=-2"], ["--trainer.devices -2", "auto"]),
    "no device": ([CPU, "--trainer.devices=0"], ["--trainer.devices 0", "auto"]),
    "devices by index": ([CPU, "--trainer.devices=[0, 3]"], ["--trainer.devices [0, 3]", "auto"]),
    "devices in words": ([CPU, "--trainer.devices=many"], ["--trainer.devices many", "auto"]),
    "nodes": ([CPU, "--trainer.num_nodes=0"], ["--trainer.num_nodes 0"]),
    "strategy": (["--trainer.strategy=dpp"], ["--trainer.strategy dpp"]),
    "profiler": (["--trainer.profiler=quick"], ["--trainer.profiler quick", "simple"]),
    "accumulation": (["--trainer.accumulate_grad_batches=0"], ["--trainer.accumulate_grad_batches 0", "from 1 on"]),
    "share of the data": (["--trainer.limit_train_batches=1.5"], ["--trainer.limit_train_batches 1.5"]),
    "a logger's package": (["--trainer.logger=CometLogger"], ["--trainer.logger CometLogger", "pip install 'comet-ml"]),
    "loggers' packages": (
        ["--trainer.logger+=MLFlowLogger"],
        ["--trainer.logger MLFlowLogger", "pip install 'mlflow"],
    ),
    "a plugin's package": (
        ["--trainer.plugins=BitsandbytesPrecision", "--trainer.plugins.mode=nf4"],
        ["--trainer.plugins BitsandbytesPrecision", "pip install 'bitsandbytes"],
    ),
    "a strategy's package": (["--trainer.strategy=deepspeed"], ["--trainer.strategy deepspeed", "pip install"]),
    "a precision's package": (["--trainer.precision=transformer-engine"], ["transformer-engine", "pip install"]),
    "a file for runs": (["--trainer.default_root_dir=file"], ["--trainer.default_root_dir file", "is a file"]),
    "a folder in a file": (["--trainer.default_root_dir=file/a/b"], ["--trainer.default_root_dir file/a/b"]),
    "a cache in a file": (["-c", "stdlib-text", "--data.cache=file/cache"], ["file/cache", "cache"]),
    "two numbers": (["--optimizer.betas", "0.8", "0.88"], ["--optimizer.betas", "brackets", "'[0.8, 0.88]'"]),
    "two numbers after a class": (
        ["--optimizer=NAMO", "--optimizer.betas", "0.8", "0.88", "--optimizer.lr=1"],
        ["brackets", "--optimizer.betas '[0.8, 0.88]'"],
    ),
    "numbers with a comma": (["--optimizer.betas=0.8,0.88"], ["brackets", "--optimizer.betas '[0.8, 0.88]'"]),
    "numbers in parentheses": (["--optimizer.betas", "(0.8,", "0.88)"], ["--optimizer.betas '[0.8, 0.88]'"]),
    "two words": (["--grouping.no_decay", "norm", "bias"], ["--grouping.no_decay '[norm, bias]'"]),
    "one word": (["--diagnostics.layers", "stem"], ["--diagnostics.layers '[stem]'"]),
    "two devices": ([CPU, "--trainer.devices", "0", "1"], ["--trainer.devices '[0, 1]'"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_before_the_work_is_done(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, parts = WRONG[case]
    Path("file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *SHORT, *args])
    assert stop.value.code == 2
    shown = capsys.readouterr().err.splitlines()
    assert "Traceback" not in shown
    assert shown[-1].startswith("lightning-optim: error: ")
    for part in parts:
        assert part in shown[-1]
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "flags", [["--trainer.accelerator=gpu"], ["--trainer.accelerator=cuda", "--trainer.devices=3"]]
)
def test_no_gpu(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *SHORT, *flags])
    assert stop.value.code == 2
    assert f"{flags[0].replace('=', ' ')}: " in capsys.readouterr().err


@pytest.mark.parametrize("preset", [[], ["-c", "namo"]])
def test_presets_without_checkpoints(preset: list[str]) -> None:
    main(["fit", *preset, *SHORT, "--trainer.enable_checkpointing=false"])
    assert list(Path("runs/digits").iterdir())
    assert not list(Path("runs").rglob("*.ckpt"))


COMMANDS = [
    ["spike", "--optimizers", "SGD", "--out", "x.foo"],
    ["spike", "--optimizers", "SGD", "--out", "x"],
    ["spike", "--optimizers", "SGD", "--out", "none/x.png"],
    ["spike", "--optimizers", "SGD", "--json", "file/x.json"],
    ["diagnostics", "runs", "--out", "x.foo"],
    ["diagnostics", "runs", "--out", "."],
    ["diagnostics", "runs", "--out", "none/x.pdf"],
]


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_results_that_cannot_be_saved(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"error: {' '.join(args[-2:])}: " in shown.err


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["new/folder", ".", "s3://bucket/runs", "~"])
def test_folders_that_can_be_written_to(place: str) -> None:
    check_folder("--x", place)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["a.png", "b.PDF", "c.svg"])
def test_figures_that_can_be_saved(name: str) -> None:
    check_figure("--x", name)
    assert list(Path().iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="may write everywhere")
def test_folders_and_files_of_others() -> None:
    Path("theirs").mkdir()
    Path("theirs/a.json").touch()
    Path("theirs/a.json").chmod(0o400)
    check_file("--x", "theirs/b.json")
    with pytest.raises(UsageError, match=r"--x theirs/a\.json: it cannot be written"):
        check_file("--x", "theirs/a.json")
    Path("theirs").chmod(0o500)
    for place in ("theirs", "theirs/below"):
        with pytest.raises(UsageError, match=f"--x {place}: nothing can be written to .*theirs"):
            check_folder("--x", place)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_the_system_says_while_a_run_is_under_way(code: int) -> None:
    said = explain_os_error(OSError(code, os.strerror(code), "events.1"), "--folder")
    assert said is not None
    assert said.startswith(f"events.1: {os.strerror(code)}. ")
    assert said.endswith("--folder.")
    assert ("Free some space" in said) is (code in (errno.ENOSPC, errno.EDQUOT))
    for other in (errno.ECONNRESET, errno.ENOENT):
        assert explain_os_error(OSError(other, "x"), "--folder") is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'a.b'", name="a.b"), "x needs the package a, "),
        (
            ImportError("Requirement 'c>=1.0' not met. HINT: Try running `pip install -U 'c>=1.0'`"),
            "pip install 'c>=1.0'",
        ),
        (ModuleNotFoundError("`d-e` is not installed"), "x needs the package d-e"),
        (ImportError("something else"), "x: something else"),
    ],
)
def test_what_to_install(error: ImportError, said: str) -> None:
    assert said in missing_package(error, "x")


def test_a_setting_is_named_by_its_value_where_the_message_does_not_name_it() -> None:
    settings = {"accelerator": "tpu", "precision": "bf16-mixed", "max_steps": 3}
    assert explain_trainer("No bf16-mixed here!", settings) == "--trainer.precision bf16-mixed: No bf16-mixed here."
    assert explain_trainer("max_steps is odd", settings).startswith("--trainer.max_steps 3: max_steps is odd.")


# --- mistakes in the user's code ------------------------------------------------------------------------------------

MODULES = {
    "broken": "class Model(:\n    pass\n",
    "unindented": "def f():\npass\n",
    "incomplete": "import no_such_package_of_ours\n",
    "nested": "from incomplete import Model\n",
    "failing": "LIMIT = 1 / 0\n",
    "misnamed": "from math import no_such_function\n",
    "mistaken": """
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger

class InInit(BoringModel):
    def __init__(self):
        super().__init__()
        self.prepare()

    def prepare(self):
        raise KeyError("a mistake of mine")

class InStep(BoringModel):
    def training_step(self, batch, batch_idx):
        return batch.no_such_attribute

class InForward(BoringModel):
    def forward(self, x):
        raise OSError(28, "a mistake of mine")

class InSetup(BoringModel):
    def setup(self, stage):
        from no_such_package_of_ours import Thing

class InOptimizer(BoringModel):
    def configure_optimizers(self):
        return self.no_such_attribute

class Callback(pl.Callback):
    def __init__(self):
        raise ValueError("a mistake of mine")

class Hook(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        raise ValueError("a mistake of mine")

class Data(BoringDataModule):
    def __init__(self):
        raise RuntimeError("a mistake of mine")

class Logger(CSVLogger):
    def __init__(self):
        raise TypeError("a mistake of mine")
""",
}
BORING = "--model=lightning.pytorch.demos.boring_classes.BoringModel"
MISTAKES = {
    "syntax": (["--model=broken.Model"], SyntaxError, "broken.py"),
    "indentation": (["--model=unindented.Model"], IndentationError, "unindented.py"),
    "package": (["--model=incomplete.Model"], ModuleNotFoundError, "incomplete.py"),
    "package of a package": (["--model=nested.Model"], ModuleNotFoundError, "nested.py"),
    "module": (["--model=failing.Model"], ZeroDivisionError, "failing.py"),
    "name": ([BORING, "--trainer.callbacks+=misnamed.Callback"], ImportError, "misnamed.py"),
    "init": (["--model=mistaken.InInit"], KeyError, "mistaken.py"),
    "step": (["--model=mistaken.InStep"], AttributeError, "mistaken.py"),
    "forward": (["--model=mistaken.InForward"], OSError, "mistaken.py"),
    "import in a hook": (["--model=mistaken.InSetup"], ModuleNotFoundError, "mistaken.py"),
    "optimizer": (["--model=mistaken.InOptimizer"], AttributeError, "mistaken.py"),
    "callback": ([BORING, "--trainer.callbacks+=mistaken.Callback"], ValueError, "mistaken.py"),
    "hook": ([BORING, "--trainer.callbacks+=mistaken.Hook"], ValueError, "mistaken.py"),
    "data": ([BORING, "--data=mistaken.Data"], RuntimeError, "mistaken.py"),
    "logger": ([BORING, "--trainer.logger=mistaken.Logger"], TypeError, "mistaken.py"),
    "loggers": ([BORING, "--trainer.logger+=mistaken.Logger"], TypeError, "mistaken.py"),
}


@pytest.fixture
def mistakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, code in MODULES.items():
        Path(f"{name}.py").write_text(code)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("mistakes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_begin_with_the_users_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_optim.cli import tracebacks

    args, kind, file = MISTAKES[case]
    with pytest.raises(Exception) as raised:
        main(["fit", *SHORT, "--trainer.logger=false", *args])
    error = raised.value
    assert any(isinstance(cause, kind) for cause in root_causes(error))
    capsys.readouterr()
    tracebacks._show(type(error), error, error.__traceback__)
    shown = capsys.readouterr().err
    files = [line.split('"')[1] for line in shown.splitlines() if line.lstrip().startswith('File "')]
    assert Path(files[0]).name == file, shown
    assert shown.splitlines()[-1].startswith(kind.__name__)
    assert not any(
        f"{os.sep}jsonargparse{os.sep}" in name or f"{os.sep}lightning{os.sep}" in name for name in files[:1]
    )


@pytest.mark.usefixtures("mistakes")
def test_the_program_shows_them_so() -> None:
    command = [Path(sys.executable).with_name("lightning-optim"), "fit", *SHORT, "--model=mistaken.InInit"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    lines = run.stderr.splitlines()
    begin = lines.index("Traceback (most recent call last):")
    assert "calls of libraries" in lines[begin - 1]
    assert "mistaken.py" in lines[begin + 1]
    assert lines[-1] == "KeyError: 'a mistake of mine'"
    assert not any(str(Path(pl.__file__).parent) in line for line in lines[begin:])


def test_our_own_mistakes_keep_all_calls(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_optim.cli import tracebacks

    with pytest.raises(TypeError) as raised:
        OptimCLI(BoringModel, run=False, args=["--optimizer=NAMO"], parser_class=3)
    assert users_traceback(raised.value) is None
    tracebacks._show(TypeError, raised.value, raised.value.__traceback__)
    shown = capsys.readouterr().err
    assert "optim_cli.py" in shown


# --- a full disk while a run is under way ---------------------------------------------------------------------------


def test_a_full_disk_ends_a_run_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *SHORT])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lightning-optim: error: The checkpoint runs/digits/")
    assert "No space left on device. Free some space" in last
    assert not list(Path("runs").rglob("*.part"))
