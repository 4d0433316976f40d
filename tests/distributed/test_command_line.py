"""Runs of the command line on several processes, started as the documentation says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# The script that a user calls is a Python program beside the interpreter.
PROGRAM = str(Path(sys.executable).parent / "lightning-optim")
RUN = ["fit", "-c", "namo", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
SHORT = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "3", "--trainer.limit_val_batches", "1"]


def finish(processes: list[subprocess.Popen[str]]) -> str:
    """The output of all, none of which may fail or wait for another for ever."""
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
    return "\n".join(outputs)


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check_run(folder: Path, output: str) -> None:
    run = folder / "runs" / "digits" / "NAMO-lr0.012-s1"
    assert "Starting with 2 processes" in output
    assert output.count("Logs and checkpoints") == 1
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert [path.name for path in run.parent.iterdir()] == ["NAMO-lr0.012-s1"]


@pytest.mark.distributed
def test_two_devices_of_one_machine(tmp_path: Path) -> None:
    command = [sys.executable, PROGRAM, *RUN, *SHORT, "--trainer.devices", "2"]
    check_run(tmp_path, finish([start(command, tmp_path)]))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_nodes_with_torchrun(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", port]
    run = [PROGRAM, *RUN, *SHORT, "--trainer.num_nodes", "2", "--trainer.devices", "1"]
    check_run(tmp_path, finish([start([*launch, "--node_rank", str(node), *run], tmp_path) for node in range(2)]))
