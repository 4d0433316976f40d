"""Text to integer tokens and back."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_optim.data.cache import DataError

Tokens = NDArray[np.integer[Any]]


class Tokenizer(ABC):
    """Turns text into tokens 0 ... ``vocab_size`` - 1 and back.

    Attributes:
        vocab_size: How many different tokens there are.
        end_of_text: The token that closes a document where documents are kept apart.
        is_learned: Whether the vocabulary comes from the training text.
    """

    vocab_size: int
    end_of_text: int | None = None
    is_learned: ClassVar[bool] = False

    @classmethod
    def learn(cls, pieces: Iterable[tuple[str, str]]) -> Tokenizer:
        """Makes the tokenizer of a corpus from its (split, text) pieces."""
        return cls()

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """Tokens of ``text``, one-dimensional."""

    @abstractmethod
    def decode(self, tokens: ArrayLike) -> str:
        """Text of ``tokens``."""

    def state(self) -> dict[str, Any]:
        """The arguments that make this tokenizer again; they can be stored as JSON."""
        return {}


class ByteTokenizer(Tokenizer):
    """The bytes of the text in UTF-8. A NUL byte closes a document.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("né").tolist()
        [110, 195, 169]
        >>> tokenizer.decode([110, 195, 169])
        'né'
    """

    vocab_size = 256
    end_of_text = 0

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, tokens: ArrayLike) -> str:
        return np.asarray(tokens, np.uint8).tobytes().decode(errors="replace")


class CharacterTokenizer(Tokenizer):
    """The characters of the text, by code point. Every character of the corpus, in any split, has a token.

    Example:
        >>> tokenizer = CharacterTokenizer.learn([("train", "hello"), ("validation", "yellow")])
        >>> tokenizer.alphabet
        'ehlowy'
        >>> tokenizer.encode("yell").tolist()
        [5, 0, 2, 2]
        >>> tokenizer.decode([1, 0, 2, 2, 3])
        'hello'
    """

    is_learned = True

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet
        self.vocab_size = len(alphabet)
        self._code_points = _code_points(alphabet)

    @classmethod
    def learn(cls, pieces: Iterable[tuple[str, str]]) -> Tokenizer:
        characters: set[str] = set()
        for _, text in pieces:
            characters.update(text)
        return cls("".join(sorted(characters)))

    def encode(self, text: str) -> Tokens:
        characters = _code_points(text)
        tokens = np.searchsorted(self._code_points, characters)
        unknown = self._code_points[np.minimum(tokens, self.vocab_size - 1)] != characters
        if unknown.any():
            raise ValueError(
                f"The character {text[unknown.argmax()]!r} is not one of the {self.vocab_size} of the data. "
                "Leave it out, or use tokenizer='byte'."
            )
        return tokens

    def decode(self, tokens: ArrayLike) -> str:
        return self._code_points[np.asarray(tokens, np.int64)].tobytes().decode("utf-32-le")

    def state(self) -> dict[str, Any]:
        return {"alphabet": self.alphabet}


class WordTokenizer(Tokenizer):
    """The words between white space, and ``<eos>`` at the end of every line, as usual for WikiText.

    The vocabulary is that of the training split, most frequent first; a word outside it is ``<unk>``.
    Decoding gives the words back with single spaces between them.

    Example:
        >>> tokenizer = WordTokenizer.learn([("train", "the cat \\n the dog \\n")])
        >>> tokenizer.words
        ['<eos>', 'the', 'cat', 'dog', '<unk>']
        >>> tokenizer.encode("the bird").tolist()
        [1, 4, 0]
        >>> tokenizer.decode([1, 2, 0, 1, 3, 0])
        'the cat\\nthe dog\\n'
    """

    is_learned = True

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.vocab_size = len(words)
        self._number = {word: i for i, word in enumerate(words)}

    @classmethod
    def learn(cls, pieces: Iterable[tuple[str, str]]) -> Tokenizer:
        counts = Counter(word for split, text in pieces if split == "train" for word in cls._split(text))
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(words if "<unk>" in counts else [*words, "<unk>"])

    def encode(self, text: str) -> Tokens:
        unknown = self._number["<unk>"]
        return np.fromiter((self._number.get(word, unknown) for word in self._split(text)), np.int64)

    def decode(self, tokens: ArrayLike) -> str:
        text = " ".join(self.words[token] for token in np.asarray(tokens, np.int64))
        return re.sub(" ?<eos> ?", "\n", text)

    def state(self) -> dict[str, Any]:
        return {"words": self.words}

    @staticmethod
    def _split(text: str) -> Iterable[str]:
        for line in text.removesuffix("\n").split("\n") if text else ():
            yield from line.split()
            yield "<eos>"


class GPT2Tokenizer(Tokenizer):
    """The byte pair encoding of GPT-2, through ``tiktoken``, which downloads its vocabulary once."""

    vocab_size = 50257
    end_of_text = 50256

    def __init__(self) -> None:
        self._encoding: Any = None

    def encode(self, text: str) -> Tokens:
        return np.asarray(self._gpt2.encode_ordinary(text), np.int64)

    def decode(self, tokens: ArrayLike) -> str:
        return self._gpt2.decode(np.asarray(tokens).tolist())

    @property
    def _gpt2(self) -> Any:
        if self._encoding is None:
            try:
                import tiktoken
            except ImportError as error:
                raise DataError(
                    "tokenizer='gpt2' needs the package tiktoken: pip install \"lightning-optim[text]\". "
                    "tokenizer='byte' needs nothing."
                ) from error
            try:
                self._encoding = tiktoken.get_encoding("gpt2")
            except Exception as error:  # requests' errors are not all OSErrors
                raise DataError(
                    f"tiktoken could not get the vocabulary of GPT-2: {error}. Check the network, or set "
                    "TIKTOKEN_CACHE_DIR to a copy of its cache; tokenizer='byte' needs no network."
                ) from error
        return self._encoding


TOKENIZERS: dict[str, type[Tokenizer]] = {
    "byte": ByteTokenizer,
    "character": CharacterTokenizer,
    "word": WordTokenizer,
    "gpt2": GPT2Tokenizer,
}


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
