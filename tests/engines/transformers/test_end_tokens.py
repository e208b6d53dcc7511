"""An answer ends at every token that the tokenizer, generation_config or the configuration name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infer_align.errors import InvalidRequest

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

# Tokens of the greedy answer "sun" of the tiny model, found by `greedy` below.
TOKENS = 12


@pytest.fixture(scope="module")
async def greedy(serving: Any) -> list[int]:
    """Return the greedy tokens after "sun", with no end."""
    async with serving() as engine:
        ids = engine.frozen.tokenizer("sun", return_tensors="pt")["input_ids"]
        ids = ids.to(engine.frozen.device)
        out = engine.frozen.lm.generate(
            ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


@pytest.fixture
def model(language_model: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """Return a copy of the tiny Llama with other end tokens in its files."""

    def make(
        config: Any = 1, generation: Any = None, tokenizer: dict[str, Any] | None = None
    ) -> str:
        folder = tmp_path / "model"
        shutil.copytree(language_model(), folder, dirs_exist_ok=True)
        _update(folder / "config.json", {"eos_token_id": config})
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        _update(folder / "tokenizer_config.json", tokenizer or {})
        return str(folder)

    return make


def _update(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _name(tokenizer: Any, token: int) -> dict[str, Any]:
    """Return the added token of a tokenizer_config.json for an ordinary token."""
    content = tokenizer.convert_ids_to_tokens(token)
    return {"content": content, "special": True, "normalized": False}


async def _answer(serving: Any, finish: Any, draw: Any, model: str, **fields: Any) -> Any:
    async with serving(model=model) as engine:
        body = {"max_tokens": TOKENS, "temperature": 0, **fields}
        (candidate,), _ = await finish(engine, draw("sun", kind="completion", **body))
    return candidate


CASES = {
    "generation_config lists it, the tokenizer names another": ({}, "generation", True),
    "generation_config has one other than the tokenizer's": ({}, "generation", False),
    "only the configuration names it": ({"temperature": 0.5}, "config", False),
    "only the configuration lists it": ({"temperature": 0.5}, "config", True),
}


@pytest.mark.parametrize("case", CASES)
async def test_an_answer_ends_wherever_the_token_is_named(
    case, model, greedy, serving, finish, draw
):
    generation, place, is_list = CASES[case]
    end = greedy[3]
    named = [1, end] if is_list else end
    if place == "generation":
        path = model(generation={"eos_token_id": named})
    else:
        path = model(config=named, generation=generation)
    candidate = await _answer(serving, finish, draw, path)
    assert candidate.finish_reason == "stop"
    assert candidate.completion_tokens == greedy.index(end) + 1


async def test_an_answer_ends_at_the_tokenizers_end_when_generation_config_names_another(
    model, greedy, serving, finish, draw, byte_level
):
    end = byte_level.convert_ids_to_tokens(greedy[3])
    path = model(generation={"eos_token_id": [1]}, tokenizer={"eos_token": end})
    candidate = await _answer(serving, finish, draw, path)
    assert candidate.finish_reason == "stop"
    assert candidate.completion_tokens == greedy.index(greedy[3]) + 1


async def test_an_answer_ends_at_the_end_of_turn_that_the_tokenizer_names(
    model, greedy, serving, finish, draw, byte_level
):
    end = byte_level.convert_ids_to_tokens(greedy[3])
    path = model(tokenizer={"extra_special_tokens": {"eot_token": end}})
    candidate = await _answer(serving, finish, draw, path)
    assert candidate.finish_reason == "stop"
    assert candidate.completion_tokens == greedy.index(greedy[3]) + 1


async def test_a_default_of_the_configuration_class_is_no_end_token(model, serving):
    # Llama's class says 2, which is an ordinary token of this vocabulary.
    path = model(generation={"eos_token_id": 1})
    config = Path(path) / "config.json"
    fields = json.loads(config.read_text())
    del fields["eos_token_id"]
    config.write_text(json.dumps(fields))
    async with serving(model=path) as engine:
        assert engine.frozen.eos == {1}


async def test_a_model_without_any_end_token_runs_to_the_maximum(model, serving, finish, draw):
    path = model(config=None, tokenizer={"eos_token": None})
    async with serving(model=path) as engine:
        assert engine.frozen.eos == frozenset()
    candidate = await _answer(serving, finish, draw, path)
    assert candidate.finish_reason == "length"


async def test_an_end_token_beyond_the_vocabulary_is_no_end(model, serving, finish, draw):
    path = model(generation={"eos_token_id": [1, 100_000]})
    async with serving(model=path) as engine:
        assert engine.frozen.eos == {1}
    candidate = await _answer(serving, finish, draw, path, min_tokens=TOKENS)
    assert candidate.completion_tokens == TOKENS


async def test_ignore_eos_and_min_tokens_respect_all_end_tokens(
    model, greedy, serving, finish, draw, byte_level
):
    ends = greedy[2:5]
    path = model(
        config=ends[0],
        generation={"eos_token_id": [ends[1]]},
        tokenizer={"eos_token": byte_level.convert_ids_to_tokens(ends[2])},
    )
    async with serving(model=path) as engine:
        assert set(ends) <= engine.frozen.eos
    ignored = await _answer(serving, finish, draw, path, ignore_eos=True)
    assert ignored.completion_tokens == TOKENS
    short = await _answer(serving, finish, draw, path, min_tokens=8, logprobs=0)
    assert short.completion_tokens >= 8
    names = set(byte_level.convert_ids_to_tokens(ends))
    tokens = [token.replace(" ", "Ġ") for token in short.choice["logprobs"]["tokens"]]
    assert not names & set(tokens[:8])


async def test_stop_token_ids_end_an_answer_that_ignores_eos(model, greedy, serving, finish, draw):
    end = greedy[3]
    fields = {"stop_token_ids": [end], "ignore_eos": True}
    candidate = await _answer(serving, finish, draw, model(), **fields)
    assert candidate.finish_reason == "stop"
    assert candidate.completion_tokens == greedy.index(end) + 1
    banned = await _answer(serving, finish, draw, model(), min_tokens=8, **fields)
    assert banned.completion_tokens >= 8


@pytest.mark.parametrize("value", [5, "5", [-1], ["5"], [True], [1.5], [100_000]])
async def test_stop_token_ids_must_be_tokens_of_the_model(value, serving, draw):
    async with serving() as engine:
        request = draw("sun", kind="completion", stop_token_ids=value)
        with pytest.raises(InvalidRequest, match="stop_token_ids"):
            engine.sample(request)
