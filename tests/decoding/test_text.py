"""Tests of streaming text: complete characters, no part of a stop string, nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infer_align.decoding.text import TextStream, token_bytes

TEXTS = st.text(alphabet=st.sampled_from("ab .!é你😀\n\u200d\u0301"), max_size=24)
QUICK = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def naive(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """Find the stop string that is complete first, and of several the longest.

    Returns the text before it, and whether there is one.
    """
    for end in range(1, len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: end - len(max(ends, key=len))], True
    return text, False


def stream(tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    text = TextStream(tokenizer, stops)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()], text


@pytest.mark.parametrize("tokenizer", ["byte_level", "byte_fallback"])
@QUICK
@given(text=TEXTS)
def test_the_pieces_add_up_to_the_text(request, tokenizer, text):
    tokenizer = request.getfixturevalue(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, streamed = stream(tokenizer, ids)
    assert "".join(pieces) == streamed.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["byte_level", "byte_fallback"])
@QUICK
@given(
    text=TEXTS,
    stops=st.lists(st.text(alphabet="ab .é你😀", min_size=1, max_size=4), max_size=4).map(tuple),
)
def test_stop_strings_are_found_wherever_tokens_end(request, tokenizer, text, stops):
    tokenizer = request.getfixturevalue(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    complete = tokenizer.decode(ids, skip_special_tokens=True)
    pieces, streamed = stream(tokenizer, ids, stops)
    assert ("".join(pieces), streamed.stopped) == naive(complete, stops)
    assert streamed.text == "".join(pieces)


@QUICK
@given(ids=st.lists(st.integers(0, 299), max_size=30))
def test_any_tokens_of_a_byte_level_vocabulary_are_decoded(byte_level, ids):
    pieces, streamed = stream(byte_level, ids)
    assert "".join(pieces) == streamed.text == byte_level.decode(ids, skip_special_tokens=True)
    assert (
        b"".join(token_bytes(byte_level, i) for i in ids if i > 1).decode(errors="replace")
        == streamed.text
    )


@QUICK
@given(ids=st.lists(st.integers(0, 293), max_size=40))
def test_any_tokens_of_a_byte_fallback_vocabulary_are_decoded(byte_fallback, ids):
    # Bytes that spoil an emitted character must not raise.
    pieces, streamed = stream(byte_fallback, ids)
    assert "".join(pieces) == streamed.text


def test_bytes_that_follow_a_character_do_not_retract_it(byte_fallback):
    ids = byte_fallback.convert_tokens_to_ids(["<0xE4>", "<0xBD>", "<0xA0>", "<0xE4>", "a", "▁b"])
    pieces, _ = stream(byte_fallback, ids)
    assert pieces == ["", "", "你", "", "\ufffda", " b", ""]


def test_endless_broken_characters_are_emitted_in_the_end(byte_level):
    text = TextStream(byte_level)
    broken = byte_level("你", add_special_tokens=False)["input_ids"][1]
    assert any(text.push(broken) for _ in range(40))


def test_the_beginning_of_a_stop_string_is_held_until_the_end(byte_level):
    ids = byte_level("one STO", add_special_tokens=False)["input_ids"]
    text = TextStream(byte_level, ("STOP",))
    assert "".join(text.push(i) for i in ids) == "one "
    assert text.finish() == "STO"
    assert not text.stopped


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (0, ("one ST", True)),
        # The stop string begins in the text that is kept, and ends behind it.
        (7, ("one ST", True)),
        (8, ("one STOP ST", True)),
        (99, ("one STOP STOP", False)),
    ],
)
def test_a_stop_string_that_ends_too_early_does_not_count(byte_level, kept, expected):
    ids = [byte_level(letter, add_special_tokens=False)["input_ids"][0] for letter in "one STOP"]
    ids += byte_level(" STOP", add_special_tokens=False)["input_ids"]
    text = TextStream(byte_level, ("OP",))
    pieces = []
    for count, token in enumerate(ids, 1):
        pieces.append(text.push(token, may_stop=count > kept))
        if text.stopped:
            break
    pieces.append(text.finish())
    assert ("".join(pieces), text.stopped) == expected
    assert text.text == expected[0]


def test_an_unfinished_character_at_the_end_is_emitted(byte_level):
    ids = byte_level("a你", add_special_tokens=False)["input_ids"][:-1]
    pieces, streamed = stream(byte_level, ids)
    assert streamed.text == "a\ufffd"
    assert pieces[-1] == "\ufffd"


def test_the_bytes_of_tokens_add_up_to_the_text(byte_level, byte_fallback):
    for tokenizer in (byte_level, byte_fallback):
        ids = tokenizer(" a你b", add_special_tokens=False)["input_ids"]
        assert b"".join(token_bytes(tokenizer, i) for i in ids).decode().strip() == "a你b"
        assert token_bytes(tokenizer, tokenizer.eos_token_id) == b"</s>"
        assert token_bytes(tokenizer, len(tokenizer) + 5) == b""


class CountingTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that counts how often its added tokens are listed."""

    lists = 0

    @property
    def added_tokens_decoder(self):
        type(self).lists += 1
        return super().added_tokens_decoder


def test_added_tokens_are_listed_once_for_a_vocabulary(byte_fallback):
    # Gemma has six thousand of them: listing them for each token took a quarter of an hour.
    tokenizer = CountingTokenizer(tokenizer_object=byte_fallback.backend_tokenizer)
    CountingTokenizer.lists = 0
    for token in range(len(tokenizer)):
        token_bytes(tokenizer, token)
    assert CountingTokenizer.lists == 1


@pytest.fixture(scope="module")
def metaspace():
    """Build a tokenizer whose decoder drops the space before the first word, as T5's does."""
    words = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz.!", "▁a", "▁b", "ab"]
    model = models.BPE(
        {word: i for i, word in enumerate(words)},
        [("▁", "a"), ("▁", "b"), ("a", "b")],
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def word_piece():
    """Build a tokenizer that joins parts of words, as BERT's does."""
    words = ["<pad>", "</s>", "<unk>", "a", "b", "ab", ".", "##a", "##b"]
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


CONTINUATIONS = [("a b", "ab"), ("ab ", "b a"), ("a.", "a ab b"), ("a", ". b"), ("a  b", " ab")]


@pytest.mark.parametrize("tokenizer", ["byte_level", "byte_fallback", "metaspace", "word_piece"])
@pytest.mark.parametrize(("prompt", "answer"), CONTINUATIONS)
@pytest.mark.parametrize("has_stop", [False, True])
def test_an_answer_goes_on_where_the_text_of_its_prompt_ends(
    request, tokenizer, prompt, answer, has_stop
):
    tokenizer = request.getfixturevalue(tokenizer)
    ids = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]
    for split in range(1, len(ids)):
        before = tokenizer.decode(ids[:split])
        complete = tokenizer.decode(ids)
        # The decoder of word pieces joins a full stop to the word before it, for example.
        assert complete.startswith(before)
        text = TextStream(tokenizer, ("zzz",) if has_stop else (), prompt=ids[:split])
        pieces = [text.push(token) for token in ids[split:]]
        assert before + "".join([*pieces, text.finish()]) == complete


def test_a_stop_string_may_begin_with_the_space_of_the_first_word(byte_fallback):
    prompt, rest = byte_fallback("a b", add_special_tokens=False)["input_ids"], ["▁a", "▁b"]
    text = TextStream(byte_fallback, (" a",), prompt=prompt)
    for token in byte_fallback.convert_tokens_to_ids(rest):
        text.push(token)
    assert text.stopped
    assert text.text == ""


def test_a_prompt_of_control_tokens_alone_is_no_text(byte_fallback):
    text = TextStream(byte_fallback, prompt=[byte_fallback.eos_token_id])
    pieces = [text.push(token) for token in byte_fallback.convert_tokens_to_ids(["▁a", "▁b"])]
    assert pieces == ["a", " b"]


def test_a_prompt_that_ends_in_bytes_shows_whole_characters(byte_fallback):
    prompt = byte_fallback("ab 你", add_special_tokens=False)["input_ids"]
    text = TextStream(byte_fallback, prompt=prompt)
    pieces = [text.push(token) for token in byte_fallback("你 b")["input_ids"]]
    assert "".join([*pieces, text.finish()]) == " 你 b"
