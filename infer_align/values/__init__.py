"""Values estimate the reward that an answer will earn, while it is still being written. VAS steers with them.

This page is what a value is; each file beside it is one kind. A value module holds a frozen dataclass, its `[values.<name>]`
section, whose `load()` gives the Value.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infer_align.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Frozen:
    """What a value has to fit: the frozen model that it steers."""

    model: str
    vocabulary: int
    hidden_size: int  # of the hidden state that the model's output layer reads
    tokenizer: str  # digest of its vocabulary
    device: str


class Value(ABC):
    """A value estimate for every continuation of a prefix by one token.

    Attributes:
        description: one line for people.
    """

    description: str = ""

    @abstractmethod
    def start(self, frozen: Frozen, shared: dict[object, Any]) -> None:
        """Load, onto the frozen model's device.

        Args:
            frozen: the model to be steered.
            shared: what the values of one engine have loaded and may use together, such as one value LM with several heads.

        Raises:
            ConfigError: not loadable, or made for another model or tokenizer.
        """


def tokenizer_digest(vocabulary: Mapping[str, int]) -> str:
    """What two tokenizers with the same token ids share. {token: id} -> hex."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:16]


def check_fit(path: str, made_for: Mapping[str, Any], frozen: Frozen) -> None:
    """Refuse a value whose token ids, or hidden states, are not those of the frozen model.

    Args:
        path: of the value, for the message.
        made_for: the value's metadata: "tokenizer", and "hidden_size" when it reads the frozen model's states.
        frozen: the model to be steered.

    Raises:
        ConfigError: naming what differs.
    """
    if made_for.get("tokenizer") != frozen.tokenizer:
        raise ConfigError(
            f"{path}: made for a tokenizer with digest {made_for.get('tokenizer')!r}, but {frozen.model!r} has "
            f"{frozen.tokenizer!r}: their token ids differ; fit the value on this model."
        )
    if "hidden_size" in made_for and int(made_for["hidden_size"]) != frozen.hidden_size:
        raise ConfigError(
            f"{path}: reads hidden states of size {made_for['hidden_size']}, but those of {frozen.model!r} have "
            f"{frozen.hidden_size}; fit the value on this model."
        )
