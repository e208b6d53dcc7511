"""Test the folder of a value LM: it is read back, shared by its heads, and refused if damaged."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
)

from infer_align.decoding.cache import RowCache
from infer_align.errors import ConfigError
from infer_align.values import FrozenModel, lookahead
from infer_align.values.lookahead import Lookahead, LookaheadValue

V, D = 20, 16
# The hidden size of the frozen model does not matter to a value LM.
FROZEN = FrozenModel("tiny", V, 99, "digest", "cpu")


def tiny(vocabulary: int = V, seed: int = 0, layers: int = 2, **options: Any) -> LlamaModel:
    torch.manual_seed(seed)
    return LlamaModel(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=D,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **options,
        )
    )


def heads(*names: str) -> dict[str, tuple[torch.Tensor, float]]:
    generator = torch.Generator().manual_seed(1)
    return {name: (torch.randn(D, generator=generator), float(i)) for i, name in enumerate(names)}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a value LM with these heads: `write("one", "two", seed=0)`."""

    def make(*names: str, folder: str = "lm", **options: Any) -> Path:
        lookahead.write(
            tmp_path / folder,
            tiny(**options),
            heads(*names),
            FROZEN,
            {"description": "a helpful answer"},
        )
        return tmp_path / folder

    return make


def start(
    path: Path, head: str | None = None, shared: Any = None, **options: Any
) -> LookaheadValue:
    value = Lookahead(str(path), head, **options).load()
    value.start(FROZEN, {} if shared is None else shared)
    return value


def test_a_value_lm_is_read_back_as_it_was_written(write: Any) -> None:
    path = write("one", "two")
    one, two = start(path, "one"), start(path, "two")
    assert one.lm is not None
    assert two.description == "a helpful answer"
    assert start(path, "one", description="other").description == "other"
    ids, lm = torch.tensor([[3, 4, 5]]), tiny().eval()
    values = one.lm.forward(ids, RowCache(), torch.arange(3)[None], None)
    with torch.no_grad():
        states = lm(ids).last_hidden_state
    for value, (weight, bias) in zip((one, two), heads("one", "two").values(), strict=True):
        assert values[..., value.index].allclose(states @ weight + bias, atol=1e-5)
    card = json.loads((path / lookahead.CARD).read_text())
    assert card == {
        "description": "a helpful answer",
        "kind": "lookahead",
        "model": "tiny",
        "tokenizer": "digest",
        "heads": ["one", "two"],
    }


def test_a_value_lm_reads_a_row_by_the_same_rotary_factors_beside_any_other(write: Any) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 2.0],
        "long_factor": [4.0, 8.0],
        "original_max_position_embeddings": 16,
    }
    lm = start(write("one", rope_parameters=rope)).lm
    assert lm is not None
    ids = torch.tensor([[3, 4, 5], [3, 4, 5]])
    near = torch.tensor([[0, 1, 2], [0, 1, 2]])
    far = torch.tensor([[0, 1, 2], [37, 38, 39]])
    mask = torch.ones_like(ids)
    alone = lm.forward(ids, RowCache(), near, mask)[0]
    assert torch.equal(lm.forward(ids, RowCache(), far, mask)[0], alone)


def test_values_of_one_folder_share_one_lm(write: Any) -> None:
    shared: dict[object, Any] = {}
    path = write("one", "two")
    one, two = start(path, "one", shared), start(path, "two", shared)
    assert one.lm is two.lm
    assert (one.index, two.index) == (0, 1)
    assert start(path, "one", shared, dtype="bfloat16").lm is not one.lm
    assert start(write("one", folder="other"), None, shared).lm is not one.lm


@pytest.mark.slow
def test_a_folder_that_was_rewritten_is_loaded_again(write: Any) -> None:
    shared: dict[object, Any] = {}
    old = start(write("one"), "one", shared)
    new = start(write("one", seed=7), "one", shared)
    assert new.lm is not old.lm
    assert not torch.equal(new.lm.lm.embed_tokens.weight, old.lm.lm.embed_tokens.weight)
    old_lm = weakref.ref(old.lm)
    del old
    gc.collect()
    assert old_lm() is None, "the old LM must be freed"


def test_the_cache_bytes_of_a_token_are_measured(write: Any) -> None:
    # Keys and values of 2 heads of 4 float32 each, in every layer.
    assert start(write("one")).lm.cell_bytes == 2 * 2 * 2 * 4 * 4
    assert start(write("one", layers=3)).lm.cell_bytes == 3 * 2 * 2 * 4 * 4
    assert start(write("one"), dtype="bfloat16").lm.cell_bytes == 2 * 2 * 2 * 4 * 2


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(write: Any, tmp_path: Path) -> None:
    path = write("one")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    mixed_heads = {**heads("one"), "two": (torch.zeros(D + 1), 0.0)}
    with pytest.raises(RuntimeError):
        lookahead.write(path, tiny(seed=7), mixed_heads, FROZEN, {})
    with pytest.raises(TypeError):
        lookahead.write(path, tiny(seed=7), heads("one"), FROZEN, {"description": object()})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["lm"]


def test_other_files_of_the_folder_stay(write: Any) -> None:
    path = write("one")
    (path / "notes.txt").write_text("other")
    write("one", seed=7)
    assert (path / "notes.txt").read_text() == "other"


@pytest.mark.parametrize("name", ["", None, "three"])
def test_an_unknown_or_missing_head_is_refused(write: Any, name: str | None) -> None:
    with pytest.raises(ConfigError, match="one, two; name one with head"):
        start(write("one", "two"), name)


def test_a_single_head_needs_no_name(write: Any) -> None:
    assert start(write("one")).index == 0
    with pytest.raises(ConfigError, match="'two' is not one of: one"):
        start(write("one"), "two")


def test_another_tokenizer_is_refused(write: Any) -> None:
    path = write("one")
    with pytest.raises(ConfigError, match="their token ids differ") as caught:
        LookaheadValue(Lookahead(str(path))).start(replace(FROZEN, tokenizer="other"), {})
    assert str(path) in caught.value.message


def test_another_vocabulary_is_refused_and_a_padded_one_is_not(write: Any) -> None:
    path = write("one", vocabulary=V - 1)
    with pytest.raises(ConfigError, match=f"{path}: reads 19 tokens, but 'tiny' has 20"):
        start(path)
    start(write("one", vocabulary=V + 4, folder="padded"))


def refuses(path: Path) -> None:
    with pytest.raises(ConfigError, match=str(path)):
        start(path, "one")


@pytest.mark.parametrize(
    "name", [lookahead.CARD, lookahead.HEADS, "config.json", "model.safetensors"]
)
def test_a_folder_without_one_of_its_files_is_refused(write: Any, name: str) -> None:
    path = write("one")
    (path / name).unlink()
    refuses(path)


@pytest.mark.parametrize("name", [lookahead.CARD, lookahead.HEADS, "model.safetensors"])
def test_a_folder_with_a_broken_file_is_refused(write: Any, name: str) -> None:
    path = write("one")
    (path / name).write_text("hello")
    refuses(path)


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.mlp.up_proj.weight"])
def test_an_lm_without_one_of_its_weights_is_refused(write: Any, name: str) -> None:
    path = write("one")
    weights = load_file(path / "model.safetensors")
    del weights[name]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"not a complete value LM.* no weights for {name}"):
        start(path, "one")


def test_an_lm_with_weights_of_another_size_is_refused(write: Any) -> None:
    path = write("one")
    weights = load_file(path / "model.safetensors")
    weights["norm.weight"] = torch.zeros(D + 1)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"norm.weight \(saved \[17\], needed \[16\]\)"):
        start(path, "one")


def test_a_card_that_is_not_an_object_is_refused(write: Any) -> None:
    path = write("one")
    (path / lookahead.CARD).write_text("[]")
    refuses(path)


def test_a_card_without_heads_is_refused(write: Any) -> None:
    path = write("one")
    card = json.loads((path / lookahead.CARD).read_text())
    del card["heads"]
    (path / lookahead.CARD).write_text(json.dumps(card))
    refuses(path)


def test_a_card_with_more_heads_than_the_weights_is_refused(write: Any) -> None:
    path = write("one")
    card = json.loads((path / lookahead.CARD).read_text())
    (path / lookahead.CARD).write_text(json.dumps({**card, "heads": ["one", "two"]}))
    refuses(path)


def test_heads_without_a_weight_are_refused(write: Any) -> None:
    path = write("one")
    save_file({"bias": load_file(path / lookahead.HEADS)["bias"]}, path / lookahead.HEADS)
    refuses(path)


def test_heads_of_another_width_are_refused(write: Any) -> None:
    path = write("one")
    tensors = load_file(path / lookahead.HEADS)
    save_file({**tensors, "weight": torch.zeros(1, D + 1)}, path / lookahead.HEADS)
    refuses(path)


def test_a_path_that_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path / "none")):
        start(tmp_path / "none")
    (tmp_path / "file").write_text("hello")
    with pytest.raises(ConfigError, match=str(tmp_path / "file")):
        start(tmp_path / "file")


def test_an_unknown_dtype_is_refused(write: Any) -> None:
    with pytest.raises(ConfigError, match="lm: dtype: 'float33' is no type of weights"):
        start(write("one"), dtype="float33")


def test_a_model_without_a_cache_is_refused(tmp_path: Path) -> None:
    bert = BertModel(
        BertConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    lookahead.write(tmp_path / "bert", bert, heads("one"), FROZEN, {})
    with pytest.raises(ConfigError, match="keeps no plain keys and values"):
        start(tmp_path / "bert")


@pytest.mark.parametrize("window", [None, 8, 63, 64])
def test_a_sliding_window_is_refused_unless_it_holds_every_text(
    window: int | None, tmp_path: Path
) -> None:
    mistral = MistralModel(
        MistralConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            sliding_window=window,
        )
    )
    path = tmp_path / "mistral"
    lookahead.write(path, mistral, heads("one"), FROZEN, {})
    if window in {8, 63}:
        with pytest.raises(ConfigError, match=f"window of {window} tokens"):
            start(path)
    else:
        assert start(path).lm is not None
