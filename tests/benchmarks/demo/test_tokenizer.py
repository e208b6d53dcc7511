"""Words of the world are one token, other text survives, and the chat template fits training."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError

from benchmarks.demo import judgement
from benchmarks.demo.language import render
from benchmarks.demo.tokenizer import ROLES, SPECIAL, build_tokenizer
from infer_align.demo import world
from infer_align.demo.lexicon import FLOURISHES
from infer_align.methods.dpa import system_prompt

TOKENIZER: Any = build_tokenizer(1024)
AWKWARD = [
    "",
    " ",
    "  two  spaces and a tail ",
    "\n\r\n\t",
    "def f(x):\n    return {'a': [x ** 2, -1.5e3]}  # naïve\n",
    "日本語と한국어 و العربية",
    "🦊👩‍👩‍👧‍👦🇪🇺 e\u0301 é",
    "▁Ġ\u200d\ufeff\u2028",
    "\x00\x01\x7f",
    "moon-bright moon--bright -moon 007 1234567 3.14",
    "helpfulness*94 + verbosity*-34, helpfulness*940",
    "<|user|><|end|><|pad|>",
]


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text).input_ids)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_survives(text: str) -> None:
    assert TOKENIZER.decode(ids(text)) == text


@pytest.mark.slow
@given(st.text())
def test_any_text_survives(text: str) -> None:
    assert TOKENIZER.decode(ids(text)) == text


@pytest.mark.parametrize("text", [text for text in AWKWARD if text])
def test_decoding_token_by_token_arrives_at_the_text(text: str) -> None:
    """Decode as streaming does: wait while the last character is incomplete."""
    emitted = ""
    tokens = []
    for token in ids(text):
        tokens.append(token)
        decoded = TOKENIZER.decode(tokens)
        if not decoded.endswith("\ufffd"):
            assert decoded.startswith(emitted)
            emitted = decoded
    assert emitted == text


def test_every_word_of_the_world_is_one_token() -> None:
    rng = random.Random(0)
    for _ in range(300):
        question = world.prompts(1, rng.randrange(10**6))[0]
        parsed = world.read_question(question)
        assert parsed
        for text in (question, world.reply(parsed, rng)):
            words = re.sub(r"([,.?!])", r" \1", text).split()
            assert len(ids(text)) == len(words), text
    assert all(len(ids(f" {word}")) == 1 for word in FLOURISHES)


def test_scores_and_preference_weights_are_one_token() -> None:
    assert all(len(ids(str(number))) == 1 for number in range(101))
    lengths = {
        len(ids(system_prompt({"helpfulness": 1.0, "verbosity": weight / 10})))
        for weight in range(-20, 20)
    }
    assert len(lengths) == 1
    assert len({ids(f" verbosity*{weight}")[0] for weight in range(-100, 101)}) == 201


def test_no_word_of_a_judge_prompt_is_spelt_byte_by_byte() -> None:
    rng = random.Random(5)
    documents = [judgement.score_document(rng) for _ in range(200)]
    documents += [judgement.comparison_document(rng) for _ in range(200)]
    for document in documents:
        if "Criteria: helpful" not in document[0]["content"]:
            continue
        for text in (turn["content"] for turn in document):
            words = re.findall(r"[\w-]+|[^\w\s]|\n| (?=\d)", text)
            assert len(ids(text)) == len(words), text


def test_special_tokens_are_one_token_each() -> None:
    assert [len(ids(token)) for token in SPECIAL] == [1] * len(SPECIAL)
    assert TOKENIZER.eos_token == "<|end|>"
    assert (
        TOKENIZER.decode(ids("<|assistant|>Gladly!<|end|>"), skip_special_tokens=True) == "Gladly!"
    )


def test_the_template_equals_the_text_of_training() -> None:
    chat = [{"role": role, "content": f"{role} says hi"} for role in ROLES]
    assert TOKENIZER.apply_chat_template(chat, tokenize=False) == render(chat)
    prompt = TOKENIZER.apply_chat_template(chat[2:3], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>user says hi<|end|><|assistant|>"


def test_the_template_joins_text_parts_and_refuses_others() -> None:
    parts = [{"type": "text", "text": "What is the "}, {"type": "text", "text": "colour?"}]
    chat = [{"role": "user", "content": parts}]
    assert (
        TOKENIZER.apply_chat_template(chat, tokenize=False) == "<|user|>What is the colour?<|end|>"
    )
    assert (
        TOKENIZER.apply_chat_template([{"role": "assistant", "content": None}], tokenize=False)
        == "<|assistant|><|end|>"
    )
    with pytest.raises(TemplateError, match="text only"):
        TOKENIZER.apply_chat_template(
            [{"role": "user", "content": [{"type": "image_url"}]}], tokenize=False
        )
    with pytest.raises(TemplateError, match="unknown role"):
        TOKENIZER.apply_chat_template([{"role": "wizard", "content": "x"}], tokenize=False)
