"""Checkpoints and the settings beside them do not decide which code runs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_optim.cli import OptimCLI, find_checkpoint, main
from lightning_optim.cli.errors import UsageError
from lightning_optim.cli.trust import check_hyperparameters

QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


class Boring(BoringModel):
    def __init__(self, activation: Any = None, width: int = 1) -> None:
        super().__init__()


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a mark when it is imported, in the folder where the command is given."""
    marker = tmp_path / "imported"
    (tmp_path / "evil_code.py").write_text(
        f"open({str(marker)!r}, 'w')\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "class Model(BoringModel): pass\n"
        "def run(*args): pass\n"
    )
    for name in ("evil.yaml", "evil.txt"):
        (tmp_path / name).write_text("class_path: evil_code.Model\n")
    (tmp_path / "name").write_text("evil_code.Model\n")
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    (tmp_path / "data.bin").write_bytes(bytes(range(256)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("evil_code", None)
    return marker


NAMED: dict[str, dict[str, Any]] = {
    "class": {"_class_path": "evil_code.Model"},
    "class and instantiator": {"_class_path": "evil_code.Model", "_instantiator": "evil_code.run"},
    "nested class": {"activation": {"class_path": "evil_code.Model", "init_args": {}}},
    "deeply nested class": {"activation": [{"a": {"b": ({"class_path": "evil_code.Model"},)}}]},
    "function": {"activation": "evil_code.run"},
    "submodule": {"activation": "evil_code.a.b.c"},
    "standard library": {"activation": "antigravity.fly"},
    "a loaded function": {"activation": "os.system"},
    "a loaded class": {"activation": {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}}},
    "a function of torch": {"activation": "torch.hub.load"},
    "a function of this library": {"activation": "lightning_optim.cli.main"},
    "a configuration file": {"activation": "evil.yaml"},
    "a configuration file of another name": {"activation": "evil.txt"},
    "a name in a file": {"activation": "name"},
    "JSON": {"activation": '{"class_path": "evil_code.Model"}'},
    "YAML": {"activation": "class_path: evil_code.Model"},
    "a list in YAML": {"activation": "- evil_code.Model"},
    "YAML that refers to itself": {"activation": "&a [*a, evil_code.Model]"},
    "YAML with escapes": {"activation": '{"class\\u005fpath": "evil\\u005fcode.Model"}'},
    "YAML in a text in YAML": {"activation": "{a: '{class_path: evil_code.Model}'}"},
    "a file in YAML": {"activation": "[evil.txt]"},
    "a reference": {"activation": "${model.width}.Model"},
    "YAML that is nested too deeply": {"activation": "[" * 1200 + "evil_code.Model" + "]" * 1200},
    "a name with spaces": {"activation": " evil_code.Model\n"},
    "YAML in YAML": {"activation": {"init_args": {"x": ['{"class_path": "evil_code.Model"}']}}},
}
HARMLESS: dict[str, dict[str, Any]] = {
    "numbers": {"width": 3},
    "a loaded network": {"activation": {"class_path": "torch.nn.ReLU"}},
    "a name of timm": {"activation": "resnet50.a1_in1k"},
    "words": {"activation": "gelu"},
    "a path": {"activation": "data/none.yaml"},
    "of this library": {"activation": "lightning_optim.Grouping"},
    "Lightning's instantiator": {"_instantiator": "lightning.pytorch.cli.instantiate_module"},
    "a dtype": {"activation": "torch.float32"},
    "a text with a colon": {"activation": "note: 3.5 of [4]"},
    "no YAML": {"activation": "{unclosed: ["},
    "a data file": {"activation": "data.csv"},
    "a file that is no text": {"activation": "data.bin"},
    "YAML that refers to itself": {"activation": "&a [*a, 1]"},
}


@pytest.mark.parametrize("what", NAMED)
def test_hyperparameters_are_refused_before_an_import(what: str, evil: Path) -> None:
    with pytest.raises(UsageError, match="do not name"):
        check_hyperparameters("a.ckpt", NAMED[what], {"class_path": "mine.Model"})
    assert not evil.exists()


@pytest.mark.parametrize("what", HARMLESS)
def test_others_are_taken(what: str, evil: Path) -> None:
    check_hyperparameters("a.ckpt", HARMLESS[what], {})


@pytest.mark.parametrize("what", NAMED)
def test_what_the_settings_name_is_taken(what: str, evil: Path) -> None:
    check_hyperparameters("a.ckpt", NAMED[what], {"other": [NAMED[what]]})


@pytest.mark.parametrize(
    "what", ["class", "nested class", "function", "a loaded class", "a configuration file", "JSON", "a name in a file"]
)
@pytest.mark.parametrize("named", ["-c", "by the program"])
def test_the_command_line_imports_nothing(
    what: str, named: str, evil: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": BoringModel().state_dict(), "hyper_parameters": NAMED[what]}, "a.ckpt")
    args = ["validate", *QUIET, "--trainer.accelerator=cpu", "--trainer.limit_val_batches=1", "--ckpt_path=a.ckpt"]
    model = Boring if named == "by the program" else None
    Path("own.yaml").write_text("model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}\n")
    more = [] if model else ["-c", "own.yaml"]
    with pytest.raises(SystemExit) as caught:
        OptimCLI(model, args=[*args, *more])
    assert caught.value.code == 2
    assert "which the settings of this run do not name" in capsys.readouterr().err.replace("\n", " ")
    assert not evil.exists()


# --- settings beside a checkpoint -------------------------------------------------------------------------------------


def run_of(folder: Path, model: str) -> Path:
    checkpoint = folder / "digits" / "version_0" / "checkpoints" / "a.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"state_dict": {}, "epoch": 0, "global_step": 1, "callbacks": {}}, checkpoint)
    (checkpoint.parents[1] / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": model}}))
    return checkpoint


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_settings_of_another_folder_are_not_used(
    subcommand: str, evil: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run_of(Path("downloaded"), "evil_code.Model")
    with pytest.raises(SystemExit):
        main([subcommand, "--ckpt_path", str(checkpoint)])
    said = " ".join(capsys.readouterr().err.split())
    assert "are not used" in said
    assert "evil_code.Model" in said
    assert f"-c {checkpoint.parents[1] / 'config.yaml'}" in said
    assert not evil.exists()


@pytest.mark.parametrize("how", ["..", "symbolic link"])
def test_nor_by_a_detour(how: str, evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run_of(Path("downloaded"), "evil_code.Model")
    if how == "..":
        Path("runs").mkdir()
        checkpoint = Path("runs") / ".." / checkpoint
    else:
        Path("runs").mkdir()
        (Path("runs") / "digits").symlink_to(Path("downloaded/digits").resolve())
        checkpoint = Path("runs") / checkpoint.relative_to("downloaded")
    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path", str(checkpoint)])
    assert "are not used" in capsys.readouterr().err
    assert not evil.exists()


def test_settings_of_a_run_are_announced(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run_of(Path("runs"), "no_such_module.Model")
    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path", str(checkpoint)])
    said = capsys.readouterr().err
    assert "With the settings of the run" in said
    assert "no_such_module.Model" in said.partition("\n")[0]


# --- the newest -------------------------------------------------------------------------------------------------------


def checkpoint(path: Path, **content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "callbacks": {}, **content}, path)


@pytest.mark.parametrize("stamped", [True, False])
def test_the_newest_is_found_by_contents(stamped: bool, tmp_path: Path) -> None:
    """Written in another order than they are copied: runs 2, 9, 10; the steps of a run as text sort otherwise."""
    clock = 0.0
    for version in (2, 9, 10):
        for step in (5, 100, 20):
            clock += 1
            name = f"a/version_{version}/checkpoints/step={step}.ckpt"
            checkpoint(tmp_path / name, epoch=0, global_step=step, **({"saved_at": clock} if stamped else {}))
    copy = tmp_path / "copy"
    for path in sorted((tmp_path / "a").rglob("*.ckpt"), reverse=True):
        target = copy / path.relative_to(tmp_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    expected = "version_10/checkpoints/step=20.ckpt" if stamped else "version_10/checkpoints/step=100.ckpt"
    for root in (tmp_path / "a", copy):
        assert str(find_checkpoint("last", root)).endswith(expected)


def test_a_checkpoint_with_a_time_is_newer_than_one_without(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a/version_1/checkpoints/b.ckpt", epoch=0, global_step=1, saved_at=1.0)
    checkpoint(tmp_path / "a/version_2/checkpoints/c.ckpt", epoch=9, global_step=9)
    assert find_checkpoint("last", tmp_path / "a").name == "b.ckpt"
