"""Refuse a checkpoint that does not hold all weights of its model.

transformers fills missing weights with random numbers and only warns. The model is then served, and
each start gives other answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infer_align.errors import ConfigError

# At most this many weights are named in a message.
NAMED_WEIGHTS = 4


def check_complete(field: str, model: str, kind: str, loading: Mapping[str, Any]) -> None:
    """Refuse a loaded model some of whose weights did not come from its checkpoint.

    Load it with `output_loading_info=True`, and with `ignore_mismatched_sizes=True` to have weights
    of a wrong size named too. Weights that are tied to others, such as the output layer to the
    embeddings, do not count as missing.

    Args:
        field: the configuration field that names the model, such as "[engine] model".
        model: the name of the model.
        kind: what the checkpoint should be, such as "causal language model".
        loading: the loading info of transformers.

    Raises:
        ConfigError: naming the missing weights, or those of a wrong size.
    """
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ConfigError(
            f"{field}: {model!r} is not a complete {kind}: its checkpoint has no weights for "
            f"{_names(missing)}. They would be random. Save the model with its head, or configure "
            "another one."
        )
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        sizes: list[str] = []
        for name, saved, needed in mismatched:
            sizes.append(f"{name} (saved {list(saved)}, needed {list(needed)})")
        raise ConfigError(
            f"{field}: {model!r} has weights whose size does not fit its config.json: "
            f"{_names(sizes)}. Use the config.json that was saved with the weights."
        )


def _names(items: list[str]) -> str:
    named = ", ".join(items[:NAMED_WEIGHTS])
    rest = len(items) - NAMED_WEIGHTS
    return f"{named} and {rest} more" if rest > 0 else named
