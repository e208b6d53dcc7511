"""A head is refused on a model with other weights than those that it was fitted on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infer_align import demo
from infer_align.engines.transformers.model import Model
from infer_align.errors import ConfigError
from infer_align.values import FrozenModel, head
from infer_align.values._fingerprint import (
    Fingerprint,
    different_parts,
    fingerprint,
    from_json,
    to_json,
)
from infer_align.values.head import HeadValue

ARCHITECTURES = ["Llama", "Qwen2", "Mistral", "Gemma2", "GPT2"]


def fingerprint_of(path: str, dtype: torch.dtype = torch.float32) -> Fingerprint:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return fingerprint(model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copies_in_other_types_are_the_same_model(
    language_model: Callable[..., str], architecture: str
) -> None:
    path = language_model(architecture)
    original = fingerprint_of(path)
    assert {"embedding", "norm"} <= original.keys()
    assert from_json(to_json(original)) == original
    assert original == fingerprint_of(path, torch.bfloat16)
    assert different_parts(original, fingerprint_of(path, torch.float16)) == []
    half = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16).float()
    assert different_parts(original, fingerprint(half.named_parameters())) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_model_of_the_same_shape_differs(
    language_model: Callable[..., str], architecture: str
) -> None:
    first = fingerprint_of(language_model(architecture, seed=1))
    differences = different_parts(first, fingerprint_of(language_model(architecture, seed=2)))
    assert differences
    assert "embedding" in differences


@pytest.mark.parametrize("projection", ["q_proj", "down_proj"])
def test_a_model_with_a_merged_adapter_differs(
    language_model: Callable[..., str], projection: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(language_model("Llama"))
    before = fingerprint(model.named_parameters())
    for name, weight in model.named_parameters():
        if projection in name:
            update = torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1]))
            weight.data += 0.05 * update
    differences = different_parts(before, fingerprint(model.named_parameters()))
    assert differences == [f"layer 1 {projection.partition('_')[0].replace('q', 'query')}"]


def test_joined_and_sharded_projections_have_the_same_fingerprint(
    language_model: Callable[..., str],
) -> None:
    """vLLM joins the projections of a layer, and keeps a part of each on each GPU."""
    parameters = dict(
        AutoModelForCausalLM.from_pretrained(language_model("Llama")).named_parameters()
    )
    arranged = {}
    for name, weight in parameters.items():
        if name.endswith("q_proj.weight"):
            key = parameters[name.replace("q_proj", "k_proj")]
            value = parameters[name.replace("q_proj", "v_proj")]
            halves = [each[: len(each) // 2] for each in (weight, key, value)]
            arranged[name.replace("q_proj", "qkv_proj")] = torch.cat(halves)
        elif name.endswith("down_proj.weight"):
            arranged[name] = weight[:, : weight.shape[1] - 8]
        elif name.endswith("embed_tokens.weight"):
            arranged[name] = weight[:128]
        elif "k_proj" not in name and "v_proj" not in name:
            arranged[name] = weight
    assert fingerprint(arranged.items()) == fingerprint(parameters.items())


def test_quantised_and_other_parts_are_left_out() -> None:
    weight = torch.ones(4, 4)
    parameters = {
        "model.embed_tokens.weight": weight.to(torch.float8_e4m3fn),
        "model.layers.0.self_attn.q_proj.weight": weight.to(torch.int8),
        "model.vision_tower.norm.weight": weight[0],
        "model.norm.weight": weight[0],
    }
    assert fingerprint(parameters.items()).keys() == {"norm"}
    assert different_parts({"norm": [1.0]}, {"embedding": [1.0]}) is None
    assert different_parts({"norm": [1.0]}, {"norm": [1.0, 1.0]}) == ["norm"]


def describe(path: str, name: str, dtype: str = "float32") -> FrozenModel:
    """Load a model as the embedded engine does, and describe it."""
    model = Model.load(
        path,
        device="cpu",
        dtype=dtype,
        context_length=None,
        trust_remote_code=False,
        progress=lambda _: None,
    )
    return model.frozen(name)


@pytest.fixture
def frozen(language_model: Callable[..., str]) -> FrozenModel:
    """Describe a tiny model."""
    return describe(language_model("Llama", seed=1), "first")


def write_head(path: Path, frozen: FrozenModel) -> None:
    tensors = {
        "P": torch.randn(2, frozen.hidden_size),
        "E": torch.randn(frozen.vocabulary, 2),
        "b": torch.randn(frozen.vocabulary),
    }
    head.write(path, tensors, frozen, {"reward": "helpful"})


@pytest.mark.slow
def test_a_head_fitted_on_another_model_is_refused(
    tmp_path: Path, frozen: FrozenModel, language_model: Callable[..., str]
) -> None:
    path = tmp_path / "v.safetensors"
    write_head(path, frozen)
    value = HeadValue(str(path))
    value.start(frozen, {})
    assert value.warnings == ()
    same = describe(language_model("Llama", seed=1), "copy", "bfloat16")
    HeadValue(str(path)).start(same, {})
    other = describe(language_model("Llama", seed=2), "second")
    with pytest.raises(ConfigError) as raised:
        HeadValue(str(path)).start(other, {})
    message = raised.value.message
    assert str(path) in message
    assert "'first'" in message
    assert "'second'" in message
    assert "embedding" in message
    assert message.count("(fingerprint ") == 2
    assert "Fit the value on this model" in message


@pytest.mark.slow
@pytest.mark.parametrize("stored", [None, "", "[1]", "{", '{"norm": 3}'])
def test_a_head_without_a_fingerprint_loads_with_a_warning(
    tmp_path: Path, frozen: FrozenModel, stored: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "v.safetensors"
    write_head(path, replace(frozen, fingerprint=None))
    if stored is not None:
        _, metadata = head.read(str(path))
        save_file(load_file(path), path, {**metadata, "fingerprint": stored})
    value = HeadValue(str(path))
    with caplog.at_level(logging.WARNING):
        value.start(frozen, {})
    assert "no fingerprint" in value.warnings[0]
    assert str(path) in caplog.text
    # An engine that cannot read the weights compares nothing.
    value = HeadValue(str(path))
    value.start(replace(frozen, fingerprint=None), {})
    assert value.warnings == ()


def test_the_demos_heads_carry_the_fingerprint_of_its_model() -> None:
    expected = fingerprint_of(str(demo.path(demo.LM)))
    for name in ("helpful", "brief"):
        _, metadata = head.read(f"demo/value-{name}.safetensors")
        assert from_json(metadata["fingerprint"]) == expected
