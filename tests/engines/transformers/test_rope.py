"""One set of rotary factors for the engine: an answer does not depend on the rest of its batch."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from infer_align.checkpoints.rope import by_rope_factors, fix_rope, reads_rows_alone
from infer_align.errors import ConfigError
from tests.engines.transformers.test_model import answer, generate

pytestmark = pytest.mark.anyio

# Eight dimensions per head: four frequencies.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
STATIC = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
PER_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": LONGROPE,
}
LONG = "the cat sat on the mat and the dog ran to the sun " * 4
PHI3 = {"original_max_position_embeddings": 64, "num_key_value_heads": 2}
# architecture, options of its configuration, context_length of the engine
CASES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "Phi-3, longrope, the model's context": ("Phi3", {**PHI3, "rope_parameters": LONGROPE}, None),
    "Phi-3, longrope, a context above the original": (
        "Phi3",
        {**PHI3, "rope_parameters": LONGROPE},
        128,
    ),
    "Phi-3, longrope, a context below the original": (
        "Phi3",
        {**PHI3, "rope_parameters": LONGROPE},
        60,
    ),
    "Llama, longrope": ("Llama", {"rope_parameters": LONGROPE}, None),
    "Gemma 3, longrope in one type of layer": ("Gemma3Text", {"rope_parameters": PER_LAYER}, None),
    "dynamic, the trained context": ("Llama", {"rope_parameters": DYNAMIC}, None),
    "dynamic, a stretched context": (
        "Llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 64},
        256,
    ),
    **{name: ("Llama", {"rope_parameters": each}, None) for name, each in STATIC.items()},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
async def test_a_short_answer_beside_a_long_prompt_is_the_answer_alone(
    case, serving, language_model, draw, finish
):
    architecture, options, context_length = CASES[case]
    model = language_model(architecture, **options)
    async with serving(model=model, context_length=context_length) as engine:
        tokens = 24
        length = engine.context_length - tokens
        ids = engine.frozen.tokenizer(LONG)["input_ids"][: length - 1]
        long = engine.frozen.tokenizer.decode(ids)
        # The model's own factors are fixed too, so `generate` uses the same.
        expected = generate(engine, "the cat", tokens)
        assert await answer(engine, draw, finish, "the cat", tokens) == expected
        both = await asyncio.gather(
            answer(engine, draw, finish, long, tokens),
            answer(engine, draw, finish, "the cat", tokens),
        )
        assert both[1] == expected
        # The keys of the long prompt are not read again with other factors.
        assert await answer(engine, draw, finish, long, tokens) == both[0]
        assert await answer(engine, draw, finish, "the cat", tokens) == expected


@pytest.mark.parametrize(("context_length", "chosen"), [(60, "short"), (128, "long")])
async def test_the_context_length_chooses_the_factors_of_longrope(
    context_length, chosen, serving, language_model
):
    model = language_model("Phi3", rope_parameters=LONGROPE, **PHI3)
    async with serving(model=model, context_length=context_length) as engine:
        rotary = engine.frozen.lm.model.rotary_emb
        exponents = torch.arange(0, 8, 2) / 8
        expected = 1.0 / (torch.tensor(LONGROPE[f"{chosen}_factor"]) * 10000.0**exponents)
        assert torch.allclose(rotary.inv_freq.cpu(), expected)


async def test_dynamic_factors_are_those_of_a_sequence_as_long_as_the_context(
    serving, language_model
):
    model = language_model("Llama", rope_parameters=DYNAMIC, max_position_embeddings=64)
    async with serving(model=model, context_length=256) as engine:
        # base * (factor * length / trained - (factor - 1)) ** (d / (d - 2)), as vLLM computes it.
        base = 10000.0 * (4.0 * 256 / 64 - 3.0) ** (8 / 6)
        expected = 1.0 / base ** (torch.arange(0, 8, 2) / 8)
        assert torch.allclose(engine.frozen.lm.model.rotary_emb.inv_freq.cpu(), expected)
    with pytest.raises(ConfigError, match="context_length: 257 is over the 256"):
        async with serving(model=model, context_length=257):
            pass


async def test_a_model_whose_rows_depend_on_each_other_is_found(language_model):
    path = language_model("Phi3", rope_parameters=LONGROPE, **PHI3)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    assert not reads_rows_alone(model, 256)
    fix_rope(model, 256)
    assert reads_rows_alone(model, 256)


async def test_phimoe_scales_attention_by_one_factor(serving, language_model, draw, finish):
    rope = {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4}
    options = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    model = language_model("Phimoe", rope_parameters=rope, **options)
    async with serving(model=model) as engine:
        alone = await answer(engine, draw, finish, "the cat", 24)
        _, beside = await asyncio.gather(
            answer(engine, draw, finish, LONG, 24),
            answer(engine, draw, finish, "the cat", 24),
        )
        assert beside == alone


def test_texts_are_grouped_by_the_factors_of_their_own_length(language_model):
    config = AutoConfig.from_pretrained(language_model("Phi3", rope_parameters=LONGROPE, **PHI3))
    assert by_rope_factors(config, [3, 64, 65, 9, 200]) == [[0, 1, 3], [2, 4]]
    plain = AutoConfig.from_pretrained(language_model("Llama"))
    assert by_rope_factors(plain, [3, 64, 65]) == [[0, 1, 2]]
    assert by_rope_factors(plain, []) == []
