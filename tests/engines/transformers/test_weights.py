"""A checkpoint that lacks weights, or is no language model, is refused at start."""

# ruff: noqa: PLC0415 - transformers is slow to import
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from infer_align.errors import ConfigError

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.fixture
def edited(tmp_path, language_model):
    """Copy a tiny model and edit its weights: `edited(edit, **options)`; return the folder."""

    def make(edit, **options) -> Path:
        folder = shutil.copytree(language_model("Llama", **options), tmp_path / "edited")
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


async def refusal(serving, folder) -> str:
    with pytest.raises(ConfigError) as caught:
        async with serving(model=str(folder)):
            pass
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"],
)
async def test_a_checkpoint_without_a_weight_is_refused_by_its_name(serving, edited, name):
    message = await refusal(serving, edited(lambda weights: weights.pop(name)))
    assert f"its checkpoint has no weights for {name}." in message


async def test_a_weight_of_a_wrong_size_is_refused(serving, edited):
    def cut(weights):
        weights["lm_head.weight"] = weights["lm_head.weight"][:-3].contiguous()

    message = await refusal(serving, edited(cut))
    assert "lm_head.weight (saved [" in message


async def test_a_base_model_without_its_output_layer_is_refused(
    serving, language_model, tmp_path, byte_level
):
    from transformers import AutoModel

    AutoModel.from_pretrained(language_model("Llama")).save_pretrained(tmp_path)
    byte_level.save_pretrained(tmp_path)
    assert "no weights for lm_head.weight" in await refusal(serving, tmp_path)


async def test_a_base_model_whose_output_layer_is_tied_is_served(
    serving, language_model, tmp_path, byte_level, draw, finish
):
    from transformers import AutoModel

    tied = language_model("Llama", tie_word_embeddings=True)
    AutoModel.from_pretrained(tied).save_pretrained(tmp_path)
    byte_level.save_pretrained(tmp_path)
    texts = []
    for folder in (tied, str(tmp_path)):
        async with serving(model=folder) as engine:
            (candidate,), _ = await finish(engine, draw("the cat", max_tokens=12, temperature=0))
            texts.append(candidate.text)
    assert texts[0] == texts[1]


async def test_a_tied_model_without_its_embeddings_is_refused(serving, edited):
    folder = edited(lambda w: w.pop("model.embed_tokens.weight"), tie_word_embeddings=True)
    assert "model.embed_tokens.weight" in await refusal(serving, folder)


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("architecture", ["Llama", "Bert", "GPT2"])
async def test_a_classifier_is_refused(serving, reward_model, architecture, options):
    message = await refusal(serving, reward_model(architecture, **options))
    assert f"{architecture}ForSequenceClassification, not a causal language model" in message


async def test_an_encoder_is_refused(serving, tmp_path, byte_level):
    from transformers import BertConfig, BertForMaskedLM, BertModel

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(byte_level), intermediate_size=48, **size)
    for name, model in {"base": BertModel(config), "masked": BertForMaskedLM(config)}.items():
        model.save_pretrained(tmp_path / name)
        byte_level.save_pretrained(tmp_path / name)
    assert "no weights for cls.predictions" in await refusal(serving, tmp_path / "base")
    masked = tmp_path / "masked"
    assert "is a BertForMaskedLM" in await refusal(serving, masked)
    # The name of its class is not what gives it away.
    config = json.loads((masked / "config.json").read_text())
    (masked / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert "whose tokens read the tokens after them" in await refusal(serving, masked)


async def test_a_model_of_another_task_is_refused_in_one_line(serving, tmp_path, byte_level):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    byte_level.save_pretrained(tmp_path)
    message = await refusal(serving, tmp_path)
    assert "T5Config" in message
    assert len(message) < 400


@pytest.mark.parametrize("size", [0, 5000])
async def test_a_truncated_file_of_weights_is_refused(serving, language_model, tmp_path, size):
    folder = shutil.copytree(language_model("Llama"), tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "cannot be loaded" in await refusal(serving, folder)


async def test_a_gguf_file_is_served_like_the_model_it_was_made_from(
    serving, draw, finish, monkeypatch, tmp_path, gguf_model, language_model
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = []
    for model in (str(gguf_model()), language_model("Llama")):
        async with serving(model=model) as engine:
            (candidate,), _ = await finish(engine, draw("the cat", max_tokens=12, temperature=0))
            texts.append(candidate.text)
    assert texts[0] == texts[1]
