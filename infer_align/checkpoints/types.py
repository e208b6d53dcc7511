"""The types of weights that a section of the configuration may name."""

from __future__ import annotations

import torch

from infer_align.errors import ConfigError

# transformers loads no smaller floats into a model that it has not quantized.
_SMALLEST = 2


def check_weights_type(where: str, dtype: str, *, also: str = "") -> None:
    """Refuse a type in which no weights can be loaded.

    Args:
        where: the field that names it, for the message.
        dtype: the name of the type, as torch has it, or "auto".
        also: a further type that this model can have, in words.

    Raises:
        ConfigError: there is no such type, or it is too small or has no fractions.
    """
    if dtype == "auto":
        return
    named = getattr(torch, dtype, None)
    if not (
        isinstance(named, torch.dtype) and named.is_floating_point and named.itemsize >= _SMALLEST
    ):
        last = f'"bfloat16", "float16" or, {also}' if also else '"bfloat16" or "float16"'
        raise ConfigError(
            f'{where}: {dtype!r} is no type of weights. Use "auto", "float32", {last}.'
        )
