"""TextData: every source and tokenizer, the windows, the cache, and what is said when something is wrong."""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import pickle
import shutil
import sys
import sysconfig
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.data import DataError, TextData, corpora
from lightning_optim.data.text import WindowDataset

LINE = "the quick brown fox jumps over the lazy dog \n"


def ready(*args: Any, **kwargs: Any) -> TextData:
    data = TextData(*args, **kwargs)
    data.prepare_data()
    data.setup()
    return data


def text_of(data: TextData, split: str) -> str:
    (folder,) = (entry for entry in data.cache.iterdir() if entry.is_dir())
    return data.tokenizer.decode(np.load(folder / f"{split}.npy"))


@pytest.fixture
def book(tmp_path: Path) -> str:
    """A file of 256 numbered lines, 48 bytes each."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{i:02x} {LINE}" for i in range(256)))
    return str(path)


# ---------------------------------------------------------------------------------------------------- the sources


def test_the_standard_library_needs_no_network(tmp_path: Path, no_network: None) -> None:
    data = ready(root=str(tmp_path), max_bytes=200_000)
    training, validation = text_of(data, "train"), text_of(data, "validation")
    assert len(training.encode()) == pytest.approx(180_000, abs=3)  # a character at the cut may move
    assert len(validation.encode()) == pytest.approx(20_000, abs=3)
    assert data.vocab_size == 256
    assert data.bytes_per_token == 1
    assert training.count("def ") > 100


def test_the_standard_library_is_without_its_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("os.py", "json/tool.py", "test/test_os.py", "json/tests/a.py", "site-packages/b.py", "notes.txt"):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(f"# {name}\n" * 50)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    data = ready(root=str(tmp_path / "data"), sequence_length=16)
    assert set((text_of(data, "train") + text_of(data, "validation")).split("\n")) == {"# os.py", "# json/tool.py", ""}
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"no source files in .*empty.*dataset='files'"):
        TextData(root=str(tmp_path / "data")).prepare_data()


def test_files_are_split_by_position(tmp_path: Path, book: str) -> None:
    data = ready("files", root=str(tmp_path), files=[book], validation_fraction=0.25, sequence_length=48)
    whole = Path(book).read_text()
    assert text_of(data, "train") == whole[: len(whole) * 3 // 4]
    assert text_of(data, "validation") == whole[len(whole) * 3 // 4 :]
    assert len(data.test_set) == len(data.val_set), "without a test split, testing uses the validation split"


def test_glob_patterns_and_validation_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "a/no.md", "held/out.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name} {LINE}" * 10)
    data = ready(
        "files",
        root=str(tmp_path),
        files=[f"{tmp_path}/[ab]/**/*.txt", f"{tmp_path}/a/1.txt"],
        validation_files=[f"{tmp_path}/held/*"],
        sequence_length=16,
    )
    assert text_of(data, "train") == f"a/1.txt {LINE}" * 10 + f"b/2.txt {LINE}" * 10
    assert text_of(data, "validation") == f"held/out.txt {LINE}" * 10


@given(text=st.text(min_size=10), start=st.integers(0, 20), stop=st.integers(0, 100), piece=st.integers(1, 9))
def test_files_are_read_in_whole_characters(
    tmp_path_factory: pytest.TempPathFactory, text: str, start: int, stop: int, piece: int
) -> None:
    folder = tmp_path_factory.mktemp("read")
    paths = [folder / "a", folder / "b"]
    for path, part in zip(paths, (text[:5], text[5:])):
        path.write_bytes(part.encode())
    end = len(text.encode())
    start, stop = sorted((min(start, end), min(stop, end)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "_PIECE_BYTES", piece)
        parts = ["".join(corpora._read(paths, *cut)) for cut in ((0, start), (start, stop), (stop, end))]
    assert "".join(parts) == text
    # A character at a cut belongs to the earlier part: a part is at most three bytes longer or shorter.
    assert abs(len(parts[1].encode()) - (stop - start)) <= 3


def test_a_limit_takes_the_beginning(tmp_path: Path, book: str) -> None:
    options: dict[str, Any] = {"files": [book], "max_bytes": 1000, "sequence_length": 16}
    data = ready("files", root=str(tmp_path / "a"), **options)
    assert text_of(data, "train") + text_of(data, "validation") == Path(book).read_text()[:1000]
    data = ready("files", root=str(tmp_path / "b"), validation_files=[book], **options)
    assert text_of(data, "train") == Path(book).read_text()[:1000]
    assert text_of(data, "validation") == Path(book).read_text()


def test_shakespeare(tmp_path: Path, shared_data: Path, no_network: None) -> None:
    data = ready("shakespeare", root=str(shared_data), cache=str(tmp_path), tokenizer="character")
    assert data.vocab_size == 65
    # The training split of nanoGPT.
    whole = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    assert text_of(data, "train") == whole[:1003854]
    assert text_of(data, "validation") == whole[1003854:]


def test_shakespeare_is_downloaded_once(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = (shared_data / "tinyshakespeare" / "input.txt").read_bytes()
    requests = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        requests.append(url)
        return io.BytesIO(original)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for tokenizer in ("byte", "word"):
        ready("shakespeare", root=str(tmp_path), tokenizer=tokenizer)
    assert len(requests) == 1
    assert (tmp_path / "tinyshakespeare" / "input.txt").read_bytes() == original


def test_wikitext_2(tmp_path: Path, shared_data: Path) -> None:
    data = ready("wikitext-2", root=str(shared_data), cache=str(tmp_path), tokenizer="word", sequence_length=1)
    assert data.vocab_size == 33278
    # With a length of 1, a training epoch leaves out one token and an evaluation the first.
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [2088627, 217645, 245568]
    assert data.bytes_per_token == pytest.approx(1121681 / 217646)
    assert data.test_bytes_per_token == pytest.approx(1256449 / 245569)
    x, _ = next(iter(data.val_dataloader()))
    assert data.tokenizer.decode(x.flatten()[:6]) == "\n= Homarus gammarus =\n"


class Hub:
    """A stand-in for the package `datasets`."""

    def __init__(self, rows: dict[str, list[str]]) -> None:
        self.rows = rows
        self.requests: list[tuple[Any, ...]] = []

    def load_dataset(self, repository: str, name: str | None, split: str, streaming: bool) -> Any:
        self.requests.append((repository, name, split, streaming))
        return iter([{"text": text} for text in self.rows[split]])


def test_wikitext_from_the_hub_is_that_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    articles = {split: [" \n", f" = {split} = \n", " \n", " a <unk> b \n"] * 9 for split in ("train", "valid", "test")}
    (tmp_path / "files" / "wikitext-2").mkdir(parents=True)
    for split, rows in articles.items():
        (tmp_path / "files" / "wikitext-2" / f"{split}.txt").write_text("".join(rows))
    # The hub has empty rows where the files have a line with a space.
    articles["validation"] = articles.pop("valid")
    hub = Hub({split: ["" if row == " \n" else row for row in rows] for split, rows in articles.items()})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    for tokenizer in ("byte", "word"):
        one, other = (
            ready(
                "wikitext-2",
                root=str(tmp_path / root),
                tokenizer=tokenizer,
                sequence_length=4,
                cache=str(tmp_path / root / tokenizer),
            )
            for root in ("files", "hub")
        )
        assert one.bytes_per_token == other.bytes_per_token
        for split in ("train", "validation", "test"):
            assert text_of(one, split) == text_of(other, split)
    assert ("Salesforce/wikitext", "wikitext-2-v1", "test", False) in hub.requests


@pytest.mark.parametrize("dataset", ["openwebtext", "fineweb"])
def test_web_pages_are_streamed_and_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
    pages = [f"page {i} né" for i in range(1000)]
    hub = Hub({"train": pages})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    options: dict[str, Any] = {"root": str(tmp_path), "sequence_length": 8, "validation_fraction": 0.25}
    data = ready(dataset, max_bytes=1050, **options)
    # 10 pages of 10 bytes and 86 of 11 fit into 1050.
    assert text_of(data, "validation").split("\0") == [*pages[:96:4], ""]
    assert text_of(data, "train").split("\0") == [*(page for i, page in enumerate(pages[:96]) if i % 4), ""]
    assert data.bytes_per_token == pytest.approx(1 - 24 / (24 + sum(len(page.encode()) for page in pages[:96:4])))
    assert [request[2:] for request in hub.requests] == [("train", True)]
    ready(dataset, max_bytes=1050, **options)
    assert len(hub.requests) == 1, "prepared once"


def test_gpt2_tokens_end_every_web_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = SimpleNamespace(encode_ordinary=lambda text: [ord(c) + 1000 for c in text])
    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding=lambda name: encoding))
    monkeypatch.setitem(sys.modules, "datasets", Hub({"train": ["ab", "cd", "e"] * 20}))
    data = ready("fineweb", root=str(tmp_path), tokenizer="gpt2", sequence_length=4, validation_fraction=0.3)
    assert data.vocab_size == 50257
    x, _ = next(iter(data.val_dataloader()))
    assert x.flatten()[:6].tolist() == [1097, 1098, 50256, 1097, 1098, 50256]


# ---------------------------------------------------------------------------------------------------- the windows


@given(n=st.integers(2, 200), length=st.integers(1, 20))
def test_evaluation_windows_follow_one_another(tmp_path_factory: pytest.TempPathFactory, n: int, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "tokens.npy"
    np.save(path, np.arange(n, dtype=np.uint16))
    windows = WindowDataset(path, length)
    count = (n - 1) // length
    assert len(windows) == count
    if count:
        x, y = windows.__getitems__(list(range(count)))
        assert x.flatten().tolist() == list(range(count * length))
        assert torch.equal(y, x + 1)
        assert x.dtype == y.dtype == torch.int64


@given(more=st.integers(0, 300), length=st.integers(1, 20), epoch=st.integers(0, 9), seed=st.integers(0, 2**32))
def test_training_windows_cover_the_text_from_a_new_offset(
    tmp_path_factory: pytest.TempPathFactory, more: int, length: int, epoch: int, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "tokens.npy"
    n = 2 * length + more
    np.save(path, np.arange(n, dtype=np.uint16))
    windows = WindowDataset(path, length, seed)
    count = len(windows)
    x, y = windows.__getitems__([epoch * count + i for i in range(count)])
    first = int(x[0, 0])
    assert 0 <= first < length
    assert x.flatten().tolist() == list(range(first, first + count * length))
    assert torch.equal(y, x + 1)
    assert n - count * length < 2 * length, "all but the ends"


def test_an_epoch_is_shuffled_and_reproducible(tmp_path: Path, book: str) -> None:
    def epoch(number: int, seed: int = 0) -> torch.Tensor:
        data = ready("files", root=str(tmp_path), files=[book], sequence_length=48, batch_size=4, seed=seed)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return torch.cat([x for x, _ in loader])

    before = torch.random.get_rng_state()
    assert torch.equal(epoch(0), epoch(0))
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is left alone"
    assert not torch.equal(epoch(0), epoch(1))
    assert not torch.equal(epoch(0), epoch(0, seed=1))
    offsets = {int(np.argmax(np.array(epoch(i)[0]) == ord("\n"))) for i in range(8)}
    assert len(offsets) > 4, "every epoch has an offset of its own"
    lines = {bytes(row) for row in epoch(0).numpy().astype(np.uint8)}
    assert len(lines) == len(epoch(0)), "no window comes twice"


def test_prompts_are_beginnings_of_validation_text(tmp_path: Path, book: str) -> None:
    data = ready("files", root=str(tmp_path), files=[book], sequence_length=32)
    ((prompts, _),) = data.predict_dataloader()
    assert prompts.shape == (4, 16)
    for prompt in prompts:
        assert data.tokenizer.decode(prompt) in text_of(data, "validation")


def test_windows_are_pickled_without_their_tokens(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(100_000))
    windows = WindowDataset(tmp_path / "tokens.npy", 10, seed=3)
    pickled = pickle.dumps(windows)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[5][0], windows[5][0])


@pytest.mark.parametrize("tokenizer", ["byte", "character", "word"])
def test_bits_per_byte_do_not_depend_on_the_tokenizer(tmp_path: Path, book: str, tokenizer: Any) -> None:
    """A model that spends 8 bits a byte, spread evenly over the tokens, has a loss of 8 bits per byte."""
    data = ready("files", root=str(tmp_path), files=[book], tokenizer=tokenizer, sequence_length=10)
    size = os.path.getsize(book) - int(os.path.getsize(book) * 0.9)
    tokens = len(data.tokenizer.encode(Path(book).read_text()[-size:]))
    loss_in_nats = 8 * math.log(2) * size / tokens
    assert loss_in_nats / math.log(2) / data.bytes_per_token == pytest.approx(8)


# ------------------------------------------------------------------------------------------------------ the cache


def test_the_vocabulary_is_known_without_the_data_where_it_can_be(tmp_path: Path) -> None:
    assert TextData("openwebtext", root=str(tmp_path), tokenizer="gpt2").vocab_size == 50257
    assert TextData("openwebtext", root=str(tmp_path)).vocab_size == 256
    assert not list(tmp_path.iterdir())


def test_the_vocabulary_is_prepared_where_it_must_be(tmp_path: Path, book: str) -> None:
    data = TextData("files", root=str(tmp_path), files=[book], tokenizer="character")
    assert data.vocab_size == len(set(Path(book).read_text()))


@pytest.mark.parametrize("tokenizer", ["byte", "character", "word"])
def test_a_second_run_reads_what_the_first_prepared(
    tmp_path: Path, book: str, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    options: dict[str, Any] = {"root": str(tmp_path), "files": [book], "tokenizer": tokenizer, "sequence_length": 8}
    first = ready("files", **options)
    monkeypatch.setattr("lightning_optim.data.text.tokenize", None)
    second = ready("files", **options)
    assert second.vocab_size == first.vocab_size
    assert text_of(second, "train") == text_of(first, "train")
    assert [x.tolist() for x, _ in second.val_dataloader()] == [x.tolist() for x, _ in first.val_dataloader()]


def test_a_truncated_cache_is_prepared_again(tmp_path: Path, book: str) -> None:
    options: dict[str, Any] = {"root": str(tmp_path), "files": [book]}
    expected = text_of(ready("files", **options), "train")
    (tokens,) = (tmp_path / "cache").glob("*/train.npy")
    tokens.write_bytes(tokens.read_bytes()[:-10])
    assert text_of(ready("files", **options), "train") == expected


def test_a_changed_source_or_argument_is_prepared_anew(tmp_path: Path, book: str) -> None:
    def prepare(**changes: Any) -> str:
        options: dict[str, Any] = {"root": str(tmp_path), "files": [book], "sequence_length": 8} | changes
        data = ready("files", **options)
        return data._prepared.folder.name

    names = [prepare(), prepare(tokenizer="word"), prepare(validation_fraction=0.2), prepare(max_bytes=5000)]
    times = os.stat(book)
    Path(book).write_text(Path(book).read_text().replace("fox", "cat"))
    os.utime(book, ns=(times.st_atime_ns, times.st_mtime_ns))  # as an archive or rsync sets it
    names.append(prepare())
    assert len(set(names)) == 5
    assert prepare(sequence_length=16, batch_size=3) == prepare(), "the tokens are the same"


@pytest.mark.parametrize("change", ["time", "copy", "moved folder", "renamed"])
def test_a_copy_of_the_source_is_the_same_source(
    tmp_path: Path, book: str, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    options: dict[str, Any] = {"root": str(tmp_path), "tokenizer": "byte"}
    first = ready("files", files=[book], **options)
    other = Path(book)
    if change == "time":
        os.utime(book, (1, 1))
    elif change == "copy":
        other = Path(shutil.copy(book, other.with_name("copy.txt")))
    else:
        folder = tmp_path / "elsewhere"
        folder.mkdir()
        other = Path(shutil.move(book, folder / ("renamed.txt" if change == "renamed" else other.name)))
    monkeypatch.setattr("lightning_optim.data.text.tokenize", None)
    second = ready("files", files=[str(other)], **options)
    assert text_of(second, "train") == text_of(first, "train")


def test_two_processes_that_start_together(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)

    def prepare() -> None:
        barrier.wait()
        data = ready(root=str(tmp_path), max_bytes=300_000)
        assert len(list(data.val_dataloader())) == 8  # 30,000 tokens: 234 windows, 32 a batch

    processes = [fork.Process(target=prepare) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 1


def test_tokens_take_as_few_bytes_as_they_need(tmp_path: Path, book: str) -> None:
    data = ready("files", root=str(tmp_path), files=[book])
    assert np.load(data._prepared.folder / "train.npy").dtype == np.uint8
    Path(book).write_text(" ".join(f"word{i}" for i in range(300)))
    data = ready("files", root=str(tmp_path), files=[book], tokenizer="word", sequence_length=8)
    assert np.load(data._prepared.folder / "train.npy").dtype == np.uint16


# --------------------------------------------------------------------------------------------------- the messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "wikitext"}, r"dataset='wikitext': expected one of stdlib, .*wikitext-2"),
        ({"tokenizer": "bpe"}, r"tokenizer='bpe': expected one of byte, character, word, gpt2"),
        ({"sequence_length": 0}, "sequence_length=0: expected at least 1"),
        ({"dataset": "files"}, "files=None: expected paths exactly when dataset='files'"),
        ({"files": ["a.txt"]}, r"files=\['a.txt'\]: expected paths exactly when dataset='files'"),
        ({"validation_files": ["a.txt"]}, "validation_files=.*expected None without files"),
        ({"max_bytes": 0}, "max_bytes=0: expected None or at least 1"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0: expected None, or between 0 and 1"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0: expected None, or between 0 and 1"),
        ({"dataset": "fineweb", "tokenizer": "word"}, "tokenizer='word': expected byte or gpt2 for dataset='fineweb'"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextData(**arguments)


def test_a_missing_file_is_named(tmp_path: Path, book: str) -> None:
    for argument in ("files", "validation_files"):
        options = {"files": [book]} | {argument: [book, f"{tmp_path}/none*.txt"]}
        with pytest.raises(DataError, match=rf"^{argument}: no file matches '.*none\*\.txt'"):
            TextData("files", root=str(tmp_path), **options).prepare_data()


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"hello\n" * 3 + "né".encode("latin1") + b"\n")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 text, at byte 19\. Convert it"):
        TextData("files", root=str(tmp_path), files=[f"{tmp_path}/latin.txt"], validation_fraction=0.01).prepare_data()


@pytest.mark.parametrize("text", ["", "abc", LINE])
def test_a_text_that_is_too_short(tmp_path: Path, text: str) -> None:
    (tmp_path / "short.txt").write_text(text)
    with pytest.raises(DataError, match=r"split.*more text or another validation_fraction"):
        ready("files", root=str(tmp_path), files=[f"{tmp_path}/short.txt"])


def test_damaged_shakespeare(tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("To be, or")
    with pytest.raises(DataError, match=r"input\.txt is damaged\. Delete it to download it again"):
        TextData("shakespeare", root=str(tmp_path)).prepare_data()


def test_incomplete_wikitext(tmp_path: Path) -> None:
    (tmp_path / "wikitext-103").mkdir()
    (tmp_path / "wikitext-103" / "train.txt").write_text(LINE)
    with pytest.raises(DataError, match=r"Not found beside the others: .*valid\.txt, .*test\.txt"):
        TextData("wikitext-103", root=str(tmp_path)).prepare_data()


@pytest.mark.usefixtures("no_network")
def test_shakespeare_without_network(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Could not download https://.*not known.*tinyshakespeare/input\.txt"):
        TextData("shakespeare", root=str(tmp_path)).prepare_data()


@pytest.mark.parametrize("dataset", ["wikitext-2", "wikitext-103", "openwebtext", "fineweb"])
def test_the_hub_without_package_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=rf'{dataset}.*pip install "lightning-optim\[text\]"'):
        TextData(dataset, root=str(tmp_path)).prepare_data()

    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=rf"Could not get dataset='{dataset}'.*no route.*Check the network"):
        TextData(dataset, root=str(tmp_path)).prepare_data()


def test_a_cache_that_cannot_be_written(tmp_path: Path, book: str) -> None:
    with pytest.raises(DataError, match=r"Cannot write to .*book\.txt.*`cache`"):
        TextData("files", root=str(tmp_path), files=[book], cache=book).prepare_data()
