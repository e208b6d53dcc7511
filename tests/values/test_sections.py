"""Test the sections `[values.<name>]`, and replacing a value while the engine runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from infer_align import config
from infer_align.config import registry
from infer_align.engines.transformers import Transformers
from infer_align.errors import ConfigError
from infer_align.steering import Steering
from infer_align.types import Draw
from infer_align.values import head, lookahead
from infer_align.values.head import Head, HeadValue
from infer_align.values.lookahead import Lookahead, LookaheadValue

WRONG = [
    (
        "[values.v]\nkind = 'haed'\npath = 'x'\n",
        "values.v.kind: 'haed' is not a known kind; did you mean 'head'?",
    ),
    ("[values.v]\npath = 'x'\n", "[values.v] needs a kind"),
    ("[values]\nv = 5\n", "[values.v] needs a kind"),
    ("[values.v]\nkind = 'head'\n", "values.v.path"),
    ("[values.v]\nkind = 'head'\npath = 5\n", "values.v.path"),
    ("[values.v]\nkind = 'head'\npath = 'x'\nhead = 'y'\n", "values.v.head: no such parameter"),
    ("[values.v]\nkind = 'lookahead'\nhead = 'y'\n", "values.v.path"),
    (
        "[values.v]\nkind = 'lookahead'\npath = 'x'\nhed = 'y'\n",
        "values.v.hed: no such parameter; did you mean 'head'?",
    ),
    ("[values.'a.b']\nkind = 'head'\npath = 'x'\n", "cannot contain '.' or '@'"),
    ("values = 5\n", "write it as a section [values]"),
    ("[value.v]\nkind = 'head'\n", "did you mean 'values'?"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_section_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "c.toml", ["engine.kind=fake"])
    assert message in caught.value.message


def test_sections_become_values(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        "[values.a]\nkind = 'head'\npath = 'x'\n"
        "[values.b]\nkind = 'lookahead'\npath = 'y'\nhead = 'z'\ndtype = 'bfloat16'\n"
    )
    loaded = config.load(tmp_path / "c.toml", ["engine.kind=fake"])
    assert loaded.values == {"a": Head("x"), "b": Lookahead("y", "z", dtype="bfloat16")}
    assert [type(value) for value in loaded.load_engine().values.values()] == [
        HeadValue,
        LookaheadValue,
    ]
    assert ("values.b.head", "z", str(tmp_path / "c.toml")) in [*loaded.settings()]


@pytest.mark.parametrize("name", registry.values.names())
def test_every_field_is_documented(name: str) -> None:
    section = registry.values.get(name)
    assert section.__doc__
    assert all(field.metadata.get("description") for field in fields(section))


# --- in a running engine ---


class ValueFolder:
    """Write values that make one token almost certain."""

    def __init__(self, path: Path, frozen: Any) -> None:
        self.path, self.frozen = path, frozen

    def head(self, token: int, name: str = "v") -> HeadValue:
        b = torch.zeros(self.frozen.vocabulary)
        b[token] = 1.0
        tensors = {
            "P": torch.zeros(1, self.frozen.hidden_size),
            "E": torch.zeros(self.frozen.vocabulary, 1),
            "b": b,
        }
        head.write(self.path / f"{name}.safetensors", tensors, self.frozen, {})
        return HeadValue(str(self.path / f"{name}.safetensors"))

    def lookahead(self, token: int, name: str = "lm") -> LookaheadValue:
        options = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256}
        lm = LlamaModel(
            LlamaConfig(
                vocab_size=self.frozen.vocabulary, hidden_size=16, intermediate_size=16, **options
            )
        )
        with torch.no_grad():
            # The layer adds nothing, so the state is the embedding of the token.
            lm.layers[0].self_attn.o_proj.weight.zero_()
            lm.layers[0].mlp.down_proj.weight.zero_()
            lm.embed_tokens.weight.fill_(-1.0)
            lm.embed_tokens.weight[token] = 1.0
        lookahead.write(self.path / name, lm, {"only": (torch.ones(16), 0.0)}, self.frozen, {})
        return LookaheadValue(Lookahead(str(self.path / name)))


async def tokens(engine: Any, value: str, finish: Any) -> set[bytes]:
    body = {
        "messages": [{"role": "user", "content": "the cat"}],
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": True,
    }
    (candidate,), _ = await finish(
        engine, Draw(body, 1, (0,), steering=Steering({value: 1000.0}, 10**6, "keep"))
    )
    return {bytes(entry["bytes"]) for entry in candidate.choice["logprobs"]["content"]}


@pytest.fixture
def running(language_model: Callable[..., str], tmp_path: Path) -> Any:
    engine = Transformers(model=language_model("Llama"), threads=1).load()
    asyncio.run(engine.start())
    yield engine, ValueFolder(tmp_path, engine.frozen.frozen("tiny"))
    asyncio.run(engine.close())


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["head", "lookahead"])
async def test_a_value_of_the_same_name_replaces_the_old_one(
    running: Any, finish: Any, kind: str
) -> None:
    engine, folder = running
    make = getattr(folder, kind)
    await engine.add_value("v", make(40))
    first = await tokens(engine, "v", finish)
    # The same path is written again.
    await engine.add_value("v", make(41))
    second = await tokens(engine, "v", finish)
    await engine.add_value("v", make(42, "elsewhere"))
    third = await tokens(engine, "v", finish)
    assert [len(first), len(second), len(third)] == [1, 1, 1]
    assert len(first | second | third) == 3


@pytest.mark.anyio
async def test_the_old_value_stays_if_the_new_one_does_not_fit(running: Any, finish: Any) -> None:
    engine, folder = running
    await engine.add_value("v", folder.head(40))
    before = await tokens(engine, "v", finish)
    with pytest.raises(ConfigError, match="none"):
        await engine.add_value("v", HeadValue(str(folder.path / "none")))
    assert await tokens(engine, "v", finish) == before
