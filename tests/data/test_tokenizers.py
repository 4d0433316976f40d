"""Tokenizers: what is encoded can be decoded, and the conventions are those of the literature."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.data import DataError
from lightning_optim.data.tokenizers import (
    TOKENIZERS,
    ByteTokenizer,
    CharacterTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    WordTokenizer,
)

# Words are cut at white space, and "<eos>" is the end of a line.
words = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda w: w.split() == [w] and "<eos>" not in w)
lines = st.lists(words).map(" ".join)


def learn(kind: str, text: str) -> Tokenizer:
    return TOKENIZERS[kind].learn([("train", text)])


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) == len(text.encode())


def test_half_a_character_can_be_decoded() -> None:
    assert ByteTokenizer().decode([110, 195]) == "n\N{REPLACEMENT CHARACTER}"


@given(st.text(min_size=1))
def test_characters_round_trip(text: str) -> None:
    tokenizer = learn("character", text)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert set(tokens.tolist()) == set(range(tokenizer.vocab_size))


@given(st.lists(lines, min_size=1))
def test_words_round_trip_up_to_white_space(text: list[str]) -> None:
    source = "".join(f"  {line} \n" for line in text)
    tokenizer = learn("word", source)
    assert tokenizer.decode(tokenizer.encode(source)) == "".join(f"{line}\n" for line in text)


@given(st.text(), st.text(min_size=1))
def test_any_text_gives_tokens_of_the_vocabulary(text: str, training: str) -> None:
    tokens = (tokenizer := learn("word", training)).encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)


@pytest.mark.parametrize("kind", ["byte", "character", "word"])
def test_state_survives_json(kind: str) -> None:
    text = "to be, or not to be: né \n"
    tokenizer = learn(kind, text)
    copy = TOKENIZERS[kind](**json.loads(json.dumps(tokenizer.state())))
    assert copy.vocab_size == tokenizer.vocab_size
    assert copy.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_an_unknown_character_is_named() -> None:
    tokenizer = CharacterTokenizer("abc")
    for text in ("ab\N{EURO SIGN}", "\N{EURO SIGN}", "abA"):
        with pytest.raises(ValueError, match=f"character '{text[-1]}' is not one of the 3.*tokenizer='byte'"):
            tokenizer.encode(text)


def test_words_follow_the_convention_of_wikitext() -> None:
    tokenizer = WordTokenizer.learn([("train", " a b \n \n a <unk> \n"), ("validation", "c")])
    assert tokenizer.state() == {"words": ["<eos>", "a", "<unk>", "b"]}
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a c\n\nb")] == ["a", "<unk>", "\n", "\n", "b", "\n"]


def test_gpt2_without_tiktoken_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert GPT2Tokenizer().vocab_size == 50257
    with pytest.raises(DataError, match=r'pip install "lightning-optim\[text\]"'):
        GPT2Tokenizer().encode("hello")


def test_gpt2_without_network_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_encoding(name: str) -> None:
        raise ConnectionError(f"no route to {name}")

    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding=get_encoding))
    with pytest.raises(DataError, match=r"no route to gpt2.*TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer().encode("hello")


def test_gpt2_tokens() -> None:
    pytest.importorskip("tiktoken")
    tokenizer = GPT2Tokenizer()
    try:
        tokens = tokenizer.encode("Hello world<|endoftext|>")
    except DataError as error:
        pytest.skip(str(error))
    assert tokens[:2].tolist() == [15496, 995]  # the tokens of GPT-2's own code
    assert tokenizer.end_of_text not in tokens, "text cannot forge the end of a document"
    assert tokenizer.decode(tokens) == "Hello world<|endoftext|>"
    assert tokenizer.decode(np.array([tokenizer.end_of_text])) == "<|endoftext|>"
