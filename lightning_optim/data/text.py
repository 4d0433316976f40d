"""Text for language models."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from lightning_optim.data import corpora
from lightning_optim.data.cache import DataError, cached
from lightning_optim.data.loading import BatchDataModule, BatchDataset, check, run_seed
from lightning_optim.data.tokenizers import TOKENIZERS, Tokenizer

TextSet = Literal["stdlib", "files", "shakespeare", "wikitext-2", "wikitext-103", "openwebtext", "fineweb"]
TokenizerName = Literal["byte", "character", "word", "gpt2"]

_STREAMED = ("openwebtext", "fineweb")
_STANDARD_LIBRARY_BYTES = 4_000_000
_PROMPTS = 4
_FORMAT = 1  # of the cache; raise it when the tokens of an unchanged text change


class TextData(BatchDataModule):
    """Text for next-token prediction. A batch is (inputs, targets), int64 (b, sequence_length) each.

    Targets are the inputs one token later.

    Data sets, where they come from, and their licences:

    - ``stdlib``: 4 MB of the source of Python's own standard library, without tests; no network. PSF-2.0.
    - ``files``: your own UTF-8 files, named by ``files`` and perhaps ``validation_files``.
    - ``shakespeare``: 1.1 MB, ``root/tinyshakespeare/input.txt`` or by download. Public domain.
    - ``wikitext-2``, ``wikitext-103``: 2 and 103 million words of Wikipedia with rare ones as ``<unk>``:
      ``root/wikitext-2/{train,valid,test}.txt``, or by the package ``datasets``. CC BY-SA.
    - ``openwebtext``: 8 million web pages, 38 GB, by ``datasets``. CC0, though the pages are their authors'.
    - ``fineweb``: the sample of 10 billion tokens of FineWeb, by ``datasets``. ODC-By.

    As tokenizers there are ``byte`` (256 tokens), ``character``, ``word`` (with ``<eos>`` at the end of a line,
    as usual for WikiText) and ``gpt2`` (50,257 tokens, by ``tiktoken``). The packages ``datasets`` and
    ``tiktoken`` come with ``pip install "lightning-optim[text]"``.

    The tokens are prepared once, under ``cache``, and read as memory maps. A set without a validation split
    gives the last ``validation_fraction`` of its text for it (``openwebtext`` and ``fineweb``: a document at
    regular intervals); one without a test split tests on the validation split.

    A training epoch is every window of ``sequence_length`` tokens, in a new order and from a new offset; both
    depend on ``seed``, Lightning's ``seed_everything`` and the epoch. Validation and test windows follow one
    another. Prediction has four beginnings of half the length, taken at regular intervals from the validation
    text.

    Args:
        dataset: One of the above.
        root: The folder of the data.
        tokenizer: One of the above.
        sequence_length: Tokens per example.
        batch_size: Examples per batch and process.
        files: Paths or glob patterns, ``**`` too, for ``dataset="files"``.
        validation_files: The same for validation. None: the end of ``files``.
        max_bytes: Bytes of text to take, for training and what is split off it. None: all; of ``stdlib`` 4 MB.
        validation_fraction: 0 < f < 1. None: 0.1; for ``openwebtext`` and ``fineweb`` 0.0005.
        num_workers: Processes that load batches; 0 is fast enough.
        seed: See above.
        cache: The folder of the prepared tokens. None: ``root/cache``.

    Attributes:
        vocab_size: Number of tokens. Known at once for ``byte`` and ``gpt2``; else this prepares the data.
        bytes_per_token: UTF-8 bytes of the validation text divided by its tokens: a loss in nats / ln 2 /
            this is in bits per byte. Prepares the data.
        test_bytes_per_token: The same of the test text.
        tokenizer: The ``Tokenizer``, with ``encode`` and ``decode``.

    Raises:
        ValueError: For an argument out of its range.
        DataError: For files that are missing, corrupt or cannot be downloaded, a package that is not
            installed, or a text too short for one window.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     data = TextData("stdlib", root, sequence_length=64, batch_size=8, max_bytes=100_000)
        ...     data.prepare_data(); data.setup()
        ...     inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, bool((inputs[:, 1:] == targets[:, :-1]).all()), data.vocab_size
        (torch.Size([8, 64]), True, 256)
    """

    def __init__(
        self,
        dataset: TextSet = "stdlib",
        root: str = "data",
        tokenizer: TokenizerName = "byte",
        sequence_length: int = 128,
        batch_size: int = 32,
        files: list[str] | None = None,
        validation_files: list[str] | None = None,
        max_bytes: int | None = None,
        validation_fraction: float | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check("dataset", dataset, dataset in get_args(TextSet), f"one of {', '.join(get_args(TextSet))}")
        check("tokenizer", tokenizer, tokenizer in TOKENIZERS, f"one of {', '.join(TOKENIZERS)}")
        check("sequence_length", sequence_length, sequence_length >= 1, "at least 1")
        check("files", files, bool(files) == (dataset == "files"), "paths exactly when dataset='files'")
        check("validation_files", validation_files, bool(files) or not validation_files, "None without files")
        check("max_bytes", max_bytes, max_bytes is None or max_bytes >= 1, "None or at least 1")
        usual_fraction = 0.0005 if dataset in _STREAMED else 0.1
        fraction = usual_fraction if validation_fraction is None else validation_fraction
        check("validation_fraction", validation_fraction, 0 < fraction < 1, "None, or between 0 and 1")
        # To learn a vocabulary would take a second pass over a download that is not kept.
        learnable = dataset not in _STREAMED or not TOKENIZERS[tokenizer].is_learned
        check("tokenizer", tokenizer, learnable, f"byte or gpt2 for dataset={dataset!r}")
        self.save_hyperparameters(logger=False)  # the model logs what both have
        self.dataset = dataset
        self.root = Path(root).expanduser()
        self.cache = Path(cache).expanduser() if cache else self.root / "cache"
        self.sequence_length = sequence_length
        self.files = files
        self.validation_files = validation_files
        self.max_bytes = max_bytes
        self.validation_fraction = fraction
        self._tokenizer_name = tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def bytes_per_token(self) -> float:
        return self._bytes_per_token("validation")

    @property
    def test_bytes_per_token(self) -> float:
        return self._bytes_per_token(self._test_split)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        kind = TOKENIZERS[self._tokenizer_name]
        return kind(**self._prepared.tokenizer) if kind.is_learned else kind()

    def prepare_data(self) -> None:
        _ = self._prepared

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "train_set"):
            return
        length = self.sequence_length
        self.train_set = self._windows("train", length, seed=run_seed(self.seed))
        self.val_set = self._windows("validation", length)
        self.test_set = self._windows(self._test_split, length)
        beginnings = self._windows("validation", max(length // 2, 1))
        spread = np.linspace(0, len(beginnings) - 1, _PROMPTS, dtype=int)
        self.predict_set = Subset(beginnings, spread.tolist())

    def _windows(self, split: str, length: int, seed: int | None = None) -> WindowDataset:
        available = self._prepared.tokens[split]
        # A training epoch begins up to `length` - 1 tokens after the start.
        needed = length + 1 if seed is None else 2 * length
        if available < needed:
            raise DataError(
                f"The {split} split of dataset={self.dataset!r} has {available} tokens, but "
                f"sequence_length={length} needs {needed}. Reduce sequence_length, or use more text or "
                "another validation_fraction."
            )
        return WindowDataset(self._prepared.folder / f"{split}.npy", length, seed)

    def _bytes_per_token(self, split: str) -> float:
        return self._prepared.bytes[split] / self._prepared.tokens[split]

    @property
    def _test_split(self) -> str:
        return "test" if "test" in self._prepared.tokens else "validation"

    @cached_property
    def _prepared(self) -> PreparedText:
        corpus = self._corpus()
        identity = json.dumps([_FORMAT, self._tokenizer_name, corpus.identity])
        name = f"{self.dataset}-{self._tokenizer_name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        kind = TOKENIZERS[self._tokenizer_name]
        folder = cached(self.cache / name, lambda scratch: tokenize(corpus, kind, scratch))
        return PreparedText(folder, **json.loads((folder / "text.json").read_text()))

    def _corpus(self) -> corpora.Corpus:
        fraction, max_bytes = self.validation_fraction, self.max_bytes
        if self.dataset == "stdlib":
            return corpora.standard_library(fraction, max_bytes or _STANDARD_LIBRARY_BYTES)
        if self.dataset == "files":
            return corpora.text_files(self.files or [], self.validation_files, fraction, max_bytes)
        if self.dataset == "shakespeare":
            return corpora.shakespeare(self.root, fraction, max_bytes)
        if self.dataset in _STREAMED:
            return corpora.web_text(self.dataset, fraction, max_bytes)
        return corpora.wikitext(self.dataset, self.root, max_bytes)


class WindowDataset(BatchDataset):
    """Windows of ``length`` tokens, one after another, of a file of tokens, and the same one token later.

    With a seed, the first window of every epoch starts at another of the first ``length`` tokens.
    """

    def __init__(self, path: Path, length: int, seed: int | None = None) -> None:
        self.path = path
        self.length = length
        self.seed = seed
        self.tokens = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        first = 1 if self.seed is None else self.length
        return (len(self.tokens) - first) // self.length

    def __getitems__(self, keys: list[int]) -> tuple[Tensor, Tensor]:
        epoch, offset = keys[0] // len(self), 0
        if self.seed is not None:
            offset = int(np.random.default_rng((self.seed, epoch)).integers(self.length))
        starts = offset + np.asarray(keys) % len(self) * self.length
        windows = torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.length + 1)].astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled as it is, a memory map would carry all its data to every worker.
        return WindowDataset, (self.path, self.length, self.seed)


@dataclass(frozen=True)
class PreparedText:
    """A folder of token files, one for each split, and what is known of them."""

    folder: Path
    tokenizer: dict[str, Any]  # Tokenizer.state()
    tokens: dict[str, int]  # of each split
    bytes: dict[str, int]


def tokenize(corpus: corpora.Corpus, kind: type[Tokenizer], folder: Path) -> None:
    """Writes the tokens of each split to ``folder``/<split>.npy and the rest of ``PreparedText`` to text.json."""
    tokenizer = kind.learn(corpus.pieces())
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    tokens: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for split, text in corpus.pieces():
            if split not in files:
                files[split] = stack.enter_context((folder / f"{split}.npy").open("wb"))
                _write_header(files[split], dtype, 0)
            encoded = tokenizer.encode(text)
            if corpus.has_documents and tokenizer.end_of_text is not None:
                encoded = np.append(encoded, tokenizer.end_of_text)
            encoded.astype(dtype).tofile(files[split])
            tokens[split] += len(encoded)
            sizes[split] += len(text.encode())
        for split, file in files.items():
            _write_header(file, dtype, tokens[split])
    for split in ("train", "validation"):
        if not tokens[split]:
            raise DataError(f"There is no text for the {split} split. Use more text or another validation_fraction.")
    description = {"tokenizer": tokenizer.state(), "tokens": tokens, "bytes": sizes}
    (folder / "text.json").write_text(json.dumps(description))


def _write_header(file: BinaryIO, dtype: np.dtype[Any], length: int) -> None:
    """Writes the header of a .npy file. Numpy leaves room in it for any length: it can be written again."""
    file.seek(0)
    description = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, description)
