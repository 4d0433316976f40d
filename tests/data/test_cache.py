"""Preparation: once, complete or absent, however many processes start and however they end."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_optim.data.cache import DataError, cached, download

# A forked child needs no pickling and no second import of torch.
FORK = multiprocessing.get_context("fork")


def write_hello(scratch: Path) -> None:
    (scratch / "hello.txt").write_text("hello" * 1000)


def fail_to_build(scratch: Path) -> None:
    raise AssertionError("built again")


def test_is_built_once(tmp_path: Path) -> None:
    folder = cached(tmp_path / "a" / "entry", write_hello)
    assert cached(tmp_path / "a" / "entry", fail_to_build) == folder
    assert (folder / "hello.txt").read_text() == "hello" * 1000


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def break_the_manifest(file: Path) -> None:
    truncate(file.with_name("manifest.json"))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink, break_the_manifest])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    file = cached(tmp_path / "entry", write_hello) / "hello.txt"
    damage(file)
    cached(tmp_path / "entry", write_hello)
    assert file.read_text() == "hello" * 1000


def test_a_failed_build_leaves_no_entry(tmp_path: Path) -> None:
    def fail_half_way(scratch: Path) -> None:
        write_hello(scratch)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        cached(tmp_path / "entry", fail_half_way)
    assert not (tmp_path / "entry").exists()
    assert (cached(tmp_path / "entry", write_hello) / "hello.txt").exists()


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    barrier = FORK.Barrier(3)

    def build(scratch: Path) -> None:
        with (tmp_path / "log").open("a") as log:
            log.write("built\n")
        time.sleep(0.2)  # long enough for the others to arrive
        write_hello(scratch)

    def prepare() -> None:
        barrier.wait()
        assert (cached(tmp_path / "entry", build) / "hello.txt").read_text() == "hello" * 1000

    processes = [FORK.Process(target=prepare) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_process_leaves_neither_a_lock_nor_half_an_entry(tmp_path: Path) -> None:
    started = FORK.Event()

    def build_for_ever(scratch: Path) -> None:
        (scratch / "half.txt").write_text("half")
        started.set()
        time.sleep(600)

    process = FORK.Process(target=lambda: cached(tmp_path / "entry", build_for_ever))
    process.start()
    assert started.wait(30)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    folder = cached(tmp_path / "entry", write_hello)
    assert sorted(path.name for path in folder.iterdir()) == ["hello.txt", "manifest.json"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Cannot write to .*file/below.*`root`"):
        cached(tmp_path / "file" / "below" / "entry", write_hello)


def test_download_checks_what_it_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: io.BytesIO(b"hello"))
    target = tmp_path / "file"
    with pytest.raises(DataError, match=r"http://x gave 5 bytes that are not the expected file.*by hand"):
        download("http://x", target, hashlib.sha256(b"other").hexdigest())
    assert not target.exists()
    download("http://x", target, hashlib.sha256(b"hello").hexdigest())
    assert target.read_bytes() == b"hello"


@pytest.mark.usefixtures("no_network")
def test_download_without_network_names_url_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Could not download http://x: .*not known.*by hand"):
        download("http://x", tmp_path / "file", "")
