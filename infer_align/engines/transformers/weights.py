"""Load the weights and the tokenizer of the frozen model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infer_align.checkpoints.complete import check_complete
from infer_align.checkpoints.errors import LOAD_ERRORS
from infer_align.checkpoints.gguf import convert_gguf, find_gguf
from infer_align.demo.locate import locate
from infer_align.errors import ConfigError

FIELD = "[engine] model"
# A change of a token's logits that counts as rounding, as a share of the largest logit. Types
# with fewer bits than float32 are given two units in the last place.
ROUNDING = 1e-4
# Heads that predict no next token. Their bodies may load as a language model without an error.
OTHER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForMaskedLM",
)


def load_weights(
    name: str, dtype: str, *, trust_remote_code: bool, progress: Callable[[str], None]
) -> tuple[Any, Any]:
    """Load the weights and the tokenizer.

    Args:
        name: "demo", a folder, a GGUF file, or a Hugging Face id.
        dtype: the type of the weights, by the name that transformers knows.
        trust_remote_code: run Python code that comes with the model.
        progress: called with a short text about what is being loaded.

    Raises:
        ConfigError: the model cannot be loaded, lacks weights, is no causal language model, or has
            no fast tokenizer.
    """
    path = locate(name)
    gguf = find_gguf(path, FIELD)
    if gguf:
        path = str(convert_gguf(gguf, dtype, FIELD, progress))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        lm, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except LOAD_ERRORS as error:
        # The first line is the cause. After it, transformers lists every model it knows.
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{FIELD}: {name!r} cannot be loaded: {cause}") from error
    _check_architecture(name, lm)
    check_complete(FIELD, name, "causal language model", loading)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{FIELD}: {name!r} has no fast tokenizer, which streaming needs; "
            "convert it to tokenizer.json."
        )
    return lm, tokenizer


def _check_architecture(name: str, lm: Any) -> None:
    """Refuse a checkpoint that was saved with another head than that of a language model."""
    for architecture in lm.config.architectures or ():
        if architecture.endswith(OTHER_HEADS):
            raise ConfigError(
                f"{FIELD}: {name!r} is a {architecture}, not a causal language model. "
                "Configure a model that generates text; a classifier can be a reward."
            )


@torch.inference_mode()
def check_causal(name: str, lm: Any) -> None:
    """Refuse a model whose tokens read the tokens after them, such as BERT.

    Raises:
        ConfigError: naming the model.
    """
    # Two texts that differ in their second token only.
    texts = torch.tensor([[0, 0], [0, 1]], device=lm.device)
    first = lm(input_ids=texts[:1], use_cache=False).logits[0, 0]
    second = lm(input_ids=texts[1:], use_cache=False).logits[0, 0]
    change = (second.float() - first.float()).abs().max()
    rounding = max(ROUNDING, 2 * torch.finfo(first.dtype).eps)
    if change > rounding * first.float().abs().max():
        raise ConfigError(
            f"{FIELD}: {name!r} is a {type(lm).__name__} whose tokens read the tokens after them. "
            "It is an encoder, not a causal language model. Configure a model that generates text."
        )
