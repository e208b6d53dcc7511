"""Load the weights and the tokenizer of the frozen model."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from infer_align.demo.locate import locate
from infer_align.errors import ConfigError


def load_weights(name: str, dtype: str, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load the weights and the tokenizer.

    Args:
        name: "demo", a folder, or a Hugging Face id.
        dtype: the type of the weights, by the name that transformers knows.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ConfigError: the model cannot be loaded, or has no fast tokenizer.
    """
    path = locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        lm = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"[engine] model: {name!r} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"[engine] model: {name!r} has no fast tokenizer, which streaming needs; "
            "convert it to tokenizer.json."
        )
    return lm, tokenizer
