"""Facts about models of rewards that run in this process by torch."""

from __future__ import annotations

from typing import Any

import torch

from infer_align.errors import ConfigError


def pick_device(name: str) -> str:
    """Return a torch device; "auto" is a GPU if there is one, else the CPU.

    Raises:
        ConfigError: torch has no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    # A torch that was built without a device asserts that it has it.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f'device: {name!r} cannot be used: {reason}. Use "auto", or "cpu".'
        ) from error
    return name


def position_count(model: Any) -> int | None:
    """Return the number of positions that a model has for tokens; None if there is no limit."""
    config = model.config.get_text_config()
    for name, module in model.named_modules():
        # The models of RoBERTa's family count positions from the padding token's id.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return len(module.weight) - int(padding) - 1
    # With relative positions alone, as in DeBERTa v2 and v3, any length can be read.
    relative = getattr(config, "relative_attention", False)
    if relative and not getattr(config, "position_biased_input", True):
        return None
    positions = getattr(config, "max_position_embeddings", None)
    return positions if positions and positions > 0 else None
