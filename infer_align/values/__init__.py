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
from typing import Any, ClassVar

from infer_align.errors import ConfigError, InvalidRequest, nearest
from infer_align.types import Draw


@dataclass(frozen=True, slots=True)
class FrozenModel:
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
        estimates: whether it also says what a state is worth, with no further token read: `HeadValue.expected`.
    """

    description: str = ""
    estimates: ClassVar[bool] = False

    @abstractmethod
    def start(self, frozen: FrozenModel, shared: dict[object, Any]) -> None:
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


def check_fit(path: str, made_for: Mapping[str, Any], frozen: FrozenModel) -> None:
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


def check_values(draw: Draw, values: Mapping[str, Value]) -> None:
    """Refuse a draw that asks for values that are not there, or for estimates of one that has none.

    Raises:
        InvalidRequest: naming the field, and the nearest value.
    """
    asked = [("align.vas.beta", name) for name in (draw.steering.beta if draw.steering else ())]
    asked += [
        ("align.early_stop.values", name)
        for name in (draw.estimates.values if draw.estimates else ())
    ]
    for field, name in asked:
        where = f"{field}.{name}"
        if name not in values:
            raise InvalidRequest(f"{where}: no such value; {nearest(name, values)}", param=where)
        if field == "align.early_stop.values" and not values[name].estimates:
            having = [other for other, value in values.items() if value.estimates]
            raise InvalidRequest(
                f"{where}: says nothing of an answer on its way, as its LM would have to read every token; "
                f"values of kind head do: {', '.join(having) or 'none is configured'}.",
                param=where,
            )
