"""A value LM's folder: written to be read whole, shared by its heads, refused where it does not fit."""

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
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from infer_align.decoding.cache import RowCache
from infer_align.errors import ConfigError
from infer_align.values import FrozenModel, lookahead
from infer_align.values.lookahead import Lookahead, LookaheadValue

V, D = 20, 16
FROZEN = FrozenModel("tiny", V, 99, "digest", "cpu")  # its hidden size is its own affair


def tiny(vocabulary: int = V, seed: int = 0, layers: int = 2) -> LlamaModel:
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
        )
    )


def heads(*names: str) -> dict[str, tuple[torch.Tensor, float]]:
    generator = torch.Generator().manual_seed(1)
    return {name: (torch.randn(D, generator=generator), float(i)) for i, name in enumerate(names)}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("one", "two", seed=0)`: a folder with a value LM of these heads."""

    def make(*names: str, folder: str = "lm", **options: Any) -> Path:
        lookahead.write(
            tmp_path / folder,
            tiny(**options),
            heads(*names),
            FROZEN,
            {"description": "what it follows"},
        )
        return tmp_path / folder

    return make


def start(
    path: Path, head: str | None = None, shared: Any = None, **options: Any
) -> LookaheadValue:
    value = Lookahead(str(path), head, **options).load()
    value.start(FROZEN, {} if shared is None else shared)
    return value


def test_a_value_lm_comes_back_as_it_was(write: Any) -> None:
    path = write("one", "two")
    one, two = start(path, "one"), start(path, "two")
    assert one.lm is not None
    assert two.description == "what it follows"
    assert start(path, "one", description="mine").description == "mine"
    ids, lm = torch.tensor([[3, 4, 5]]), tiny().eval()
    found = one.lm.forward(ids, RowCache(), torch.arange(3)[None], None)
    with torch.no_grad():
        states = lm(ids).last_hidden_state
    for value, (weight, bias) in zip((one, two), heads("one", "two").values(), strict=True):
        assert found[..., value.index].allclose(states @ weight + bias, atol=1e-5)
    card = json.loads((path / lookahead.CARD).read_text())
    assert card == {
        "description": "what it follows",
        "kind": "lookahead",
        "model": "tiny",
        "tokenizer": "digest",
        "heads": ["one", "two"],
    }


def test_values_of_one_folder_share_one_lm(write: Any) -> None:
    shared: dict[object, Any] = {}
    path = write("one", "two")
    one, two = start(path, "one", shared), start(path, "two", shared)
    assert one.lm is two.lm
    assert (one.index, two.index) == (0, 1)
    assert start(path, "one", shared, dtype="bfloat16").lm is not one.lm
    assert start(write("one", folder="other"), None, shared).lm is not one.lm


def test_a_folder_that_was_fitted_anew_is_loaded_anew(write: Any) -> None:
    shared: dict[object, Any] = {}
    old = start(write("one"), "one", shared)
    new = start(write("one", seed=7), "one", shared)
    assert new.lm is not old.lm
    assert not torch.equal(new.lm.lm.embed_tokens.weight, old.lm.lm.embed_tokens.weight)
    forgotten = weakref.ref(old.lm)
    del old
    gc.collect()
    assert forgotten() is None, "nothing holds on to the old one"


def test_what_a_token_takes_is_measured(write: Any) -> None:
    # Keys and values of 2 heads of 4 float32 each, in every layer.
    assert start(write("one")).lm.cell_bytes == 2 * 2 * 2 * 4 * 4
    assert start(write("one", layers=3)).lm.cell_bytes == 3 * 2 * 2 * 4 * 4
    assert start(write("one"), dtype="bfloat16").lm.cell_bytes == 2 * 2 * 2 * 4 * 2


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(write: Any, tmp_path: Path) -> None:
    path = write("one")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(RuntimeError):
        lookahead.write(
            path, tiny(seed=7), {**heads("one"), "two": (torch.zeros(D + 1), 0.0)}, FROZEN, {}
        )
    with pytest.raises(TypeError):
        lookahead.write(path, tiny(seed=7), heads("one"), FROZEN, {"description": object()})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["lm"]


def test_other_files_of_the_folder_are_left_alone(write: Any) -> None:
    path = write("one")
    (path / "notes.txt").write_text("mine")
    write("one", seed=7)
    assert (path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["", None, "three"])
def test_the_head_has_to_be_one_of_its_own(write: Any, name: str | None) -> None:
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


def spoil(path: Path, how: str) -> None:
    card, weights = path / lookahead.CARD, path / lookahead.HEADS
    tensors = load_file(weights)
    table = json.loads(card.read_text())
    if how.startswith("no "):
        (path / how.removeprefix("no ")).unlink()
    elif how == "card":
        card.write_text("hello")
    elif how == "list":
        card.write_text("[]")
    elif how == "no-names":
        card.write_text(json.dumps({key: value for key, value in table.items() if key != "heads"}))
    elif how == "more names":
        card.write_text(json.dumps({**table, "heads": ["one", "two"]}))
    elif how == "heads":
        weights.write_text("hello")
    elif how == "no-weight":
        save_file({"bias": tensors["bias"]}, weights)
    elif how == "width":
        save_file({**tensors, "weight": torch.zeros(1, D + 1)}, weights)
    elif how == "weights":
        (path / "model.safetensors").write_text("hello")


@pytest.mark.parametrize(
    "how",
    [
        "no value.json",
        "no value_heads.safetensors",
        "no config.json",
        "no model.safetensors",
        "card",
        "list",
        "no-names",
        "more names",
        "heads",
        "no-weight",
        "width",
        "weights",
    ],
)
def test_a_damaged_folder_is_refused_by_its_path(write: Any, how: str) -> None:
    path = write("one")
    spoil(path, how)
    with pytest.raises(ConfigError, match=str(path)):
        start(path, "one")


def test_what_is_not_there_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path / "none")):
        start(tmp_path / "none")
    (tmp_path / "file").write_text("hello")
    with pytest.raises(ConfigError, match=str(tmp_path / "file")):
        start(tmp_path / "file")


def test_an_unknown_dtype_is_refused(write: Any) -> None:
    with pytest.raises(ConfigError, match="lm"):
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
