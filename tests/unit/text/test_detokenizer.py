from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers import normalizers as norm

from hatrack_server.text.detokenizer import MAX_PENDING, REPLACEMENT, Detokenizer

NONE: frozenset[int] = frozenset()
WORDS = ["▁", "▁Hello", "▁there", "there", "!", "é", "\n"]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 has it: words with U+2581 for spaces, single bytes for the rest."""
    symbols = ["<unk>", *WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES = byte_level()
PIECES = sentencepiece()


def split(items: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(cut % (len(items) + 1) for cut in cuts), len(items)]
    return [items[a:b] for a, b in pairwise(edges)]


def streamed(tokenizer: Tokenizer, chunks: list[list[int]]) -> str:
    detokenizer = Detokenizer(tokenizer, NONE)
    return "".join(detokenizer.push(chunk) for chunk in chunks) + detokenizer.flush()


@given(st.text(), st.lists(st.integers(0, 400)))
def test_pieces_equal_the_decoded_whole(text: str, cuts: list[int]) -> None:
    assert streamed(BYTES, split(BYTES.encode(text).ids, cuts)) == text


@given(st.lists(st.integers(0, 255), max_size=60), st.lists(st.integers(0, 60)))
def test_bytes_that_are_no_text_equal_the_decoded_whole(ids: list[int], cuts: list[int]) -> None:
    assert streamed(BYTES, split(ids, cuts)) == BYTES.decode(ids)


@given(st.text(st.sampled_from(["é", "你", "�", "a", "😀"]), max_size=40))
def test_every_prefix_is_a_prefix_and_no_character_is_half(text: str) -> None:
    detokenizer, out = Detokenizer(BYTES, NONE), ""
    for token in BYTES.encode(text).ids:
        out += detokenizer.push([token])
        assert text.startswith(out)
        assert len(detokenizer._pending) < MAX_PENDING
    assert out + detokenizer.flush() == text


@given(st.lists(st.sampled_from([*WORDS, "你", "😀"]), max_size=30), st.lists(st.integers(0, 60)))
def test_sentencepiece_pieces_equal_the_decoded_whole(words: list[str], cuts: list[int]) -> None:
    ids = [token for word in words for token in _piece_ids(word)]
    assert streamed(PIECES, split(ids, cuts)) == PIECES.decode(ids)


def _piece_ids(word: str) -> list[int]:
    known = PIECES.token_to_id(word)
    return [known] if known is not None else [PIECES.token_to_id(f"<0x{byte:02X}>") for byte in word.encode()]


def test_a_leading_space_counts_behind_a_prompt() -> None:
    hello, there = PIECES.token_to_id("▁Hello"), PIECES.token_to_id("▁there")
    assert Detokenizer(PIECES, NONE).push([there]) == "there"
    assert Detokenizer(PIECES, NONE, [hello]).push([there]) == " there"


def test_special_and_unknown_ids_are_silent_and_keep_the_space() -> None:
    hello, there, special = PIECES.token_to_id("▁Hello"), PIECES.token_to_id("▁there"), 0
    detokenizer = Detokenizer(PIECES, frozenset({special}))
    assert detokenizer.push([hello, special, 100_000, there]) == "Hello there"


def test_an_unfinished_character_comes_with_the_flush() -> None:
    detokenizer = Detokenizer(BYTES, NONE)
    assert detokenizer.push(BYTES.encode("a😀").ids[:3]) == "a"
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_prompt_window_that_starts_inside_a_character(cut: int) -> None:
    prompt = BYTES.encode("😀 ab").ids[cut:]
    assert Detokenizer(BYTES, NONE, prompt).push(BYTES.encode("c").ids) == "c"


def test_work_does_not_grow_with_the_text() -> None:
    detokenizer = Detokenizer(BYTES, NONE)
    detokenizer.push([255] * 2000)
    assert len(detokenizer._context) + len(detokenizer._pending) < 2 * MAX_PENDING
