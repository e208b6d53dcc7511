"""Values estimate the reward of an answer while it is still being written. VAS steers with them.

This module defines what a value is. Each module of the package is one kind: a frozen dataclass that
holds a `[values.<name>]` section, whose `load()` returns a `Value`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from infer_align.errors import ConfigError, InvalidRequest, nearest, quote
from infer_align.steering import Steering
from infer_align.types import Draw


@dataclass(frozen=True, slots=True)
class FrozenModel:
    """The properties of the steered model that a value has to fit.

    Attributes:
        model: name for error messages.
        vocabulary: number of tokens.
        hidden_size: size of the hidden state that the model's output layer reads.
        tokenizer: digest of the tokenizer's vocabulary, from `tokenizer_digest`.
        device: torch device of the model.
        fingerprint: numbers of its weights, see `_fingerprint`; None where they cannot be read.
    """

    model: str
    vocabulary: int
    hidden_size: int
    tokenizer: str
    device: str
    fingerprint: Mapping[str, list[float]] | None = None


class Value(ABC):
    """A value estimate for every continuation of a prefix by one token.

    Attributes:
        description: one line for people.
        estimates_states: True if the value can also estimate a state without a further token, as
            `HeadValue.expected` does. Early stopping needs that.
        warnings: sentences about what an operator should check; they are complete after `start`.
        summary: what `infer-align fit value` has measured, such as "suggested_beta"; None if it is
            not recorded. It is complete after `start`.
    """

    description: str = ""
    warnings: tuple[str, ...] = ()
    summary: Mapping[str, Any] | None = None
    estimates_states: ClassVar[bool] = False

    @abstractmethod
    def start(self, frozen: FrozenModel, shared: dict[object, Any]) -> None:
        """Load the value onto the device of the frozen model.

        Args:
            frozen: the model to be steered.
            shared: objects that several values of one engine use together, such as a value LM
                with several heads. A value adds the objects that it loads.

        Raises:
            ConfigError: the value cannot be loaded, or does not fit the model or its tokenizer.
        """


def tokenizer_digest(vocabulary: Mapping[str, int]) -> str:
    """Return a digest that is equal for tokenizers with equal token ids. {token: id} -> hex."""
    entries = json.dumps(sorted(vocabulary.items()))
    return hashlib.sha256(entries.encode()).hexdigest()[:16]


def check_fit(path: str, metadata: Mapping[str, Any], frozen: FrozenModel) -> None:
    """Refuse a value whose token ids or hidden states are not those of the frozen model.

    Args:
        path: of the value, for the error message.
        metadata: of the value: "tokenizer", and "hidden_size" if it reads hidden states.
        frozen: the model to be steered.

    Raises:
        ConfigError: the tokenizer or the hidden size differs.
    """
    if metadata.get("tokenizer") != frozen.tokenizer:
        raise ConfigError(
            f"{path}: made for a tokenizer with digest {metadata.get('tokenizer')!r}, but that of "
            f"{frozen.model!r} is {frozen.tokenizer!r}: their token ids differ. "
            "Fit the value on this model."
        )
    if "hidden_size" in metadata and int(metadata["hidden_size"]) != frozen.hidden_size:
        raise ConfigError(
            f"{path}: reads hidden states of size {metadata['hidden_size']}, but those of "
            f"{frozen.model!r} have {frozen.hidden_size}. Fit the value on this model."
        )


def check_values(draw: Draw, values: Mapping[str, Value]) -> None:
    """Refuse a draw that names an unknown value, or estimates with a value that cannot estimate.

    Raises:
        InvalidRequest: names the field and the nearest known value.
    """
    if draw.steering:
        for name in draw.steering.beta:
            _check_known(f"align.vas.beta.{name}", name, values)
        _check_values_all(draw.steering, values)
    if draw.estimates:
        for name in draw.estimates.values:
            field = f"align.early_stop.values.{name}"
            check_estimating(field, name, values)


def check_estimating(field: str, name: str, values: Mapping[str, Value]) -> None:
    """Refuse a value that is unknown, or that cannot estimate a state.

    Args:
        field: the field that names the value.
        name: the name of the value.
        values: the known values by name.

    Raises:
        InvalidRequest: names the field and the nearest known value.
    """
    _check_known(field, name, values)
    _check_estimates_states(field, name, values)


def _check_values_all(steering: Steering, values: Mapping[str, Value]) -> None:
    """Refuse to value every token with a value LM, which would have to read every token."""
    if steering.candidates is not None:
        return
    for name in steering.beta:
        if not values[name].estimates_states:
            parameter = "top_k" if steering.min_p is None else "min_p"
            param = f"align.vas.{parameter}"
            raise InvalidRequest(
                f"{param}: {quote(getattr(steering, parameter))} values any number of tokens, "
                f"which {name!r} cannot do because it reads each of them; give a number as "
                "align.vas.top_k, or use values of kind head.",
                param=param,
            )


def _check_known(field: str, name: str, values: Mapping[str, Value]) -> None:
    if name not in values:
        raise InvalidRequest(f"{field}: no such value; {nearest(name, values)}", param=field)


def _check_estimates_states(field: str, name: str, values: Mapping[str, Value]) -> None:
    if values[name].estimates_states:
        return
    usable = [other for other, value in values.items() if value.estimates_states]
    names = ", ".join(usable) or "none is configured"
    raise InvalidRequest(
        f"{field}: cannot estimate an answer, because its value LM would have to read every token; "
        f"values of kind head can: {names}.",
        param=field,
    )
