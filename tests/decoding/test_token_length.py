"""Test the lower bound on the tokens of a text against the tokens themselves."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infer_align.decoding.token_length import SHORT_TEXT, TokenLength, check_length
from infer_align.errors import InvalidRequest

SPLIT = pre_tokenizers.Split(" ", "removed")
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
TEXTS = (
    "",
    "a",
    "hello hello",
    " " * 50,
    "\u00e9\u0301e\u0301" * 9,
    "\U0001f600 <tool> \ud55c\uad6d",
)


def byte_level(
    *, normalizer: Any = None, splitter: Any = BYTE_LEVEL, drop: int = 0
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes and of "he", without the first `drop` bytes."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet())[drop:], "he"]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, [("h", "e")]))
    backend.pre_tokenizer = splitter
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(),
        byte_level(drop=30),
        byte_level(normalizer=normalizers.NFC()),
        byte_level(
            splitter=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), BYTE_LEVEL])
        ),
    ],
    ids=["plain", "bytes without a token", "normal form", "two splits"],
)
def test_no_text_has_fewer_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("<\u00e9>")])
    length = TokenLength.of(tokenizer)
    assert length is not None
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices(TEXTS, k=5))
        assert length.fewest_tokens(text) <= len(tokenizer(text)["input_ids"])


def test_the_bound_counts_bytes_that_have_a_token() -> None:
    assert TokenLength.of(byte_level()) == TokenLength(2)
    assert TokenLength(2).fewest_tokens("he" * 7) == 7
    assert TokenLength(2).fewest_tokens("\ud800") == 2
    assert TokenLength(2).fewest_tokens("") == 0
    assert TokenLength(2, "\u00e9".encode()).fewest_tokens("\u00e9" * 9 + "abc") == 2
    # The first of the names, in their order, is that of "!".
    assert TokenLength.of(byte_level(drop=1)) == TokenLength(2, b"!")


def test_the_longest_token_may_be_an_added_one() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<to\u00e9l>")])
    assert TokenLength.of(tokenizer) == TokenLength(7)
    # Two bytes of a text may be one of its normal form.
    assert TokenLength.of(byte_level(normalizer=normalizers.NFC())) == TokenLength(8)


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(normalizer=normalizers.NFC(), drop=1),
        byte_level(normalizer=normalizers.Strip()),
        byte_level(splitter=pre_tokenizers.Sequence([SPLIT, BYTE_LEVEL])),
        byte_level(splitter=pre_tokenizers.Whitespace()),
    ],
    ids=["other bytes are dropped", "text is stripped", "spaces are removed", "no bytes"],
)
def test_nothing_is_known_if_text_may_be_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    assert TokenLength.of(tokenizer) is None


def test_nothing_is_known_if_a_token_takes_the_spaces_around_it() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert TokenLength.of(tokenizer) is None


def test_a_long_prompt_that_cannot_fit_is_refused_and_a_short_one_is_left_to_be_read() -> None:
    length = TokenLength(2)
    with pytest.raises(InvalidRequest, match=r"messages: .* at least 50000 tokens") as error:
        check_length("ab" * 50_000, length, 49_999, "messages")
    assert (error.value.param, error.value.code) == ("messages", "context_length_exceeded")
    check_length("ab" * 50_000, length, 50_000, "messages")
    check_length("ab" * 50_000, length, None, "messages")
    check_length("ab" * 50_000, None, 1, "messages")
    check_length("a" * SHORT_TEXT, length, 1, "messages")
