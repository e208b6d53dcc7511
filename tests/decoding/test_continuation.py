"""The tokens of a text at its place: after a prompt, and at the beginning of a turn."""

from __future__ import annotations

import copy
import threading

import pytest

from infer_align.decoding.continuation import text_tokens, turn_space
from infer_align.decoding.text import TextStream
from infer_align.errors import InvalidRequest

WITH_SPACE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("the cat", " sat on"),
        ("the cat", "s"),
        ("the ", "cat"),
        ("a", "\n\nb"),
        ("a\n", "\nb a"),
        ("b</s>", " a ab"),
        ("hi", " é€"),
        ("x", "</s> <pad>y"),
    ],
)
def test_a_continuation_spells_the_text_after_its_prompt(tokenizer, prompt, text):
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens = text_tokens(tokenizer, text, ids, is_continued=True)
    stream = TextStream(tokenizer, special=True, prompt=ids)
    assert "".join(map(stream.push, tokens)) + stream.finish() == text
    # Only those written in the prompt are control tokens.
    assert not set(tokens) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("text", ["the cat", " ab", "a", "\n", "</s>", "é", "b\na"])
@pytest.mark.parametrize("template", [None, WITH_SPACE])
def test_a_turn_spells_the_text_alone(tokenizer, template, text):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    prompt = tokenizer("[INST] a [/INST]", add_special_tokens=False)["input_ids"]
    tokens = text_tokens(tokenizer, text, prompt, is_continued=False)
    stream = TextStream(tokenizer, special=True)
    assert "".join(map(stream.push, tokens)) + stream.finish() == text


def test_the_space_of_the_template_belongs_to_the_first_word(byte_fallback):
    spaced, plain = copy.deepcopy(byte_fallback), copy.deepcopy(byte_fallback)
    spaced.chat_template = WITH_SPACE
    plain.chat_template = WITH_SPACE.replace("else %} {{", "else %}{{")
    assert turn_space(spaced, spaced.chat_template) == " "
    assert turn_space(plain, plain.chat_template) == ""
    prompt = spaced("[INST] a [/INST]", add_special_tokens=False)["input_ids"]
    for tokenizer, first in ((spaced, "▁ab"), (plain, "ab")):
        tokens = text_tokens(tokenizer, "ab", prompt, is_continued=False)
        assert tokenizer.convert_ids_to_tokens(tokens) == [first]


def test_a_template_that_fails_writes_no_space(byte_level):
    assert turn_space(byte_level, "{{ raise_exception('no') }}") == ""
    assert turn_space(byte_level, "") == ""


def test_a_text_with_control_tokens_may_be_read_while_others_read_prompts(tokenizer):
    prompt = "the cat</s> sat" * 200
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    expected = text_tokens(tokenizer, prompt, [], is_continued=True)
    assert not set(expected) & set(tokenizer.all_special_ids)
    readings = []

    def read_prompts() -> None:
        readings.extend(tokenizer(prompt, add_special_tokens=False)["input_ids"] for _ in range(99))

    thread = threading.Thread(target=read_prompts)
    thread.start()
    for _ in range(33):
        assert text_tokens(tokenizer, prompt, [], is_continued=True) == expected
    thread.join()
    assert readings == [ids] * 99


def test_an_empty_text_has_no_tokens_and_text_must_be_unicode(tokenizer):
    assert text_tokens(tokenizer, "", [5], is_continued=True) == []
    assert text_tokens(tokenizer, "", [5], is_continued=False) == []
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        text_tokens(tokenizer, "\ud800", [5], is_continued=False)
