"""Models of a given shape with random weights, on which speed can be measured.

The language model has no weights on the disk: vLLM makes them up (`load_format = "dummy"`). The
value heads and the value LM are files, as the server reads them.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, LlamaConfig

from infer_align import demo
from infer_align.values import FrozenModel, head, lookahead, tokenizer_digest

SEED = 0
HEADS = ("one", "two", "three", "four")
LOOKAHEAD = "ahead"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a Llama."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    def config(self) -> LlamaConfig:
        """Return the configuration of transformers. The end token is the tokenizer's."""
        return LlamaConfig(
            **asdict(self),
            architectures=["LlamaForCausalLM"],
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )


@dataclass(frozen=True, slots=True)
class Size:
    """The models of one measurement.

    Attributes:
        name: of the size, for the record.
        lm: the language model.
        value_lm: the value LM.
        rank: of the value heads.
        dtype: of both models.
    """

    name: str
    lm: Shape
    value_lm: Shape
    rank: int
    dtype: str


LARGE = Size(
    name="8B",
    lm=Shape(4096, 14336, 32, 32, 8, 128_256),
    value_lm=Shape(2048, 8192, 16, 32, 8, 128_256),
    rank=128,
    dtype="bfloat16",
)
# More tokens than the tokenizer has, as in LARGE.
TINY = Size(
    name="tiny",
    lm=Shape(64, 128, 2, 2, 2, 2112),
    value_lm=Shape(32, 64, 1, 2, 1, 2112),
    rank=16,
    dtype="float32",
)


def write_models(folder: Path, size: Size, device: torch.device) -> None:
    """Write the language model's configuration, its tokenizer, the value heads and the value LM.

    Args:
        folder: to write to. Each model has a folder of its own there.
        size: shapes of the models.
        device: where the random numbers are drawn; a GPU is faster.
    """
    lm = folder / "lm"
    lm.mkdir(parents=True, exist_ok=True)
    source = demo.path(demo.LM)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, lm / name)
    size.lm.config().save_pretrained(lm)
    vocabulary = AutoTokenizer.from_pretrained(lm).get_vocab()
    frozen = FrozenModel(
        str(lm), size.lm.vocab_size, size.lm.hidden_size, tokenizer_digest(vocabulary), str(device)
    )
    generator = torch.Generator(device).manual_seed(SEED)
    for name in HEADS:
        tensors = _random_head(size, generator)
        head.write(folder / f"{name}.safetensors", tensors, frozen, {"description": "random"})
    _write_value_lm(folder / LOOKAHEAD, size, frozen, generator)


def _random_head(size: Size, generator: torch.Generator) -> dict[str, torch.Tensor]:
    rank, hidden_size = size.rank, size.lm.hidden_size

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device)

    return {
        "P": random(rank, hidden_size) * hidden_size**-0.5,
        "E": random(size.lm.vocab_size, rank) * rank**-0.5,
        "b": torch.zeros(size.lm.vocab_size, device=generator.device),
    }


def _write_value_lm(
    folder: Path, size: Size, frozen: FrozenModel, generator: torch.Generator
) -> None:
    torch.manual_seed(SEED)
    with generator.device:
        model = AutoModel.from_config(size.value_lm.config(), dtype=getattr(torch, size.dtype))
    weight = torch.randn(
        size.value_lm.hidden_size, generator=generator, device=generator.device
    ).cpu()
    lookahead.write(folder, model, {"score": (weight, 0.0)}, frozen, {"description": "random"})


def write_config(folder: Path, size: Size, options: dict[str, Any]) -> Path:
    """Write the configuration of a server with these models, and return its file.

    Args:
        folder: that of `write_models`.
        size: shapes of the models.
        options: of vLLM.
    """
    lines = [
        "[server]",
        'served_name = "lm"',
        'log_level = "warning"',
        "default_rewards = { brevity = 1.0 }",
        "[limits]",
        "max_running = 512",
        "[rewards.brevity]",
        'kind = "rules"',
        "words_weight = -1.0",
        "[engine]",
        'kind = "vllm"',
        f'model = "{folder / "lm"}"',
        'load_format = "dummy"',
        f'dtype = "{size.dtype}"',
    ]
    lines += [f"{name} = {_toml(value)}" for name, value in options.items()]
    for name in HEADS:
        lines += [f"[values.{name}]", 'kind = "head"']
        lines.append(f'path = "{folder / name}.safetensors"')
    lines += [f"[values.{LOOKAHEAD}]", 'kind = "lookahead"', f'dtype = "{size.dtype}"']
    lines.append(f'path = "{folder / LOOKAHEAD}"')
    file = folder / "server.toml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        items = [f"{name} = {_toml(item)}" for name, item in value.items()]
        return "{ " + ", ".join(items) + " }"
    return f'"{value}"' if isinstance(value, str) else str(value)
