"""Directional preference alignment: put a preference direction in the prompt, score along it.

A preference is a unit vector v over named attributes. The objective of an answer y is v . r(x, y),
and the system prompt of the model names 100 v, rounded. The published sentence has no full stop at
its end, and the published model was trained on it to the letter. A model that was not trained on
such numbers may ignore them.

Source: Wang et al., "Arithmetic Control of LLMs for Diverse User Preferences" (2402.18571).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from infer_align.added_text import prepend_text
from infer_align.errors import InvalidRequest, nearest, quote
from infer_align.methods import PlanDraft, Stage
from infer_align.types import Body, Capability, Direction, Draw, Messages

PUBLISHED = (
    "You are a helpful, respectful, and honest assistant who always responds to the user in a "
    "harmless way. Your response should maximize weighted rating = {weights}"
)
# Placeholders without which a field of `Prompting` would not name the direction.
_PLACEHOLDERS = {"template": ("{weights}",), "term": ("{attribute}", "{weight}")}


@dataclass(frozen=True, slots=True)
class Prompting:
    """`[dpa]`: the sentence that names a direction. The default is the published one."""

    attributes: tuple[str, ...] = field(
        default=("helpfulness", "verbosity"),
        metadata={
            "min_length": 1,
            "description": "Attributes that a direction may name, in the order of the sentence.",
        },
    )
    template: str = field(
        default=PUBLISHED,
        metadata={"description": 'The sentence; "{weights}" stands for the terms.'},
    )
    term: str = field(
        default="{attribute}*{weight}",
        metadata={"description": "One term: an attribute with its weight."},
    )
    separator: str = field(default=" + ", metadata={"description": "Text between two terms."})
    scale: float = field(
        default=100.0,
        metadata={"gt": 0, "description": "Factor from the unit direction to the weights."},
    )
    decimals: int = field(
        default=0,
        metadata={
            "ge": 0,
            "le": 6,
            "description": "Decimal places of a weight, rounded half to even.",
        },
    )
    placement: Literal["system", "user"] = field(
        default="system",
        metadata={
            "description": '"system" puts the sentence before the client\'s system message, "user" '
            "before the last user message."
        },
    )

    trained: bool = field(
        default=False,
        metadata={
            "description": "The model was trained on directions in this form. Without it, the "
            "start says that the model may ignore them."
        },
    )
    trained_range: dict[str, tuple[float, float]] = field(
        default_factory=dict,
        metadata={
            "description": "{attribute: [lowest, highest]}: the weights of unit directions that "
            "the model was trained on. The playground shades them."
        },
    )

    def __post_init__(self) -> None:
        """Check that the sentence names the direction.

        Raises:
            ValueError: a placeholder is missing, or an attribute appears twice.
        """
        for name, placeholders in _PLACEHOLDERS.items():
            missing = [text for text in placeholders if text not in getattr(self, name)]
            if missing:
                raise ValueError(
                    f"a sentence with {' and '.join(missing)} in {name}; without it the prompt "
                    "does not name the direction"
                )
        if len(set(self.attributes)) < len(self.attributes):
            raise ValueError("a list in which each attribute appears once")
        for name, (low, high) in self.trained_range.items():
            if name not in self.attributes or not -1 <= low <= high <= 1:
                raise ValueError(
                    f"a trained_range of configured attributes, each from -1 to 1; {name} is "
                    f"[{low}, {high}]"
                )

    def complete(self, direction: Direction) -> dict[str, float]:
        """Return the direction in the order of the sentence.

        If the direction names some attribute of the sentence, the sentence's other attributes are
        added with weight 0.
        """
        if not direction.keys() & set(self.attributes):
            return dict(direction)
        further = [name for name in direction if name not in self.attributes]
        return {name: direction.get(name, 0.0) for name in [*self.attributes, *further]}

    def weights(self, direction: Direction) -> dict[str, int | float]:
        """Return the rounded weight of each attribute, as the sentence shows it."""
        weights: dict[str, int | float] = {}
        for name, weight in self.complete(unit(direction)).items():
            # Adding 0 turns -0.0 into 0.0.
            rounded = float(np.round(self.scale * weight, self.decimals)) + 0.0
            weights[name] = rounded if self.decimals else int(rounded)
        return weights

    def sentence(self, direction: Direction) -> str:
        """Return the sentence that names the direction."""
        terms = []
        for name, weight in self.weights(direction).items():
            term = self.term.replace("{attribute}", name)
            terms.append(term.replace("{weight}", str(weight)))
        return self.template.replace("{weights}", self.separator.join(terms))

    def condition(self, body: Body, direction: Direction) -> Body:
        """Return the chat body with the sentence in it. The client's own messages stay."""
        messages = list(body["messages"])
        sentence = self.sentence(direction)
        index = self._message_index(messages)
        if index is None:
            messages.insert(0, {"role": self.placement, "content": sentence})
        else:
            content = prepend_text(sentence, messages[index].get("content"))
            messages[index] = {**messages[index], "content": content}
        return {**body, "messages": messages}

    def _message_index(self, messages: Messages) -> int | None:
        """Return the index of the message that the sentence goes into, or None for a new one."""
        if self.placement == "system":
            first_role = messages[0]["role"] if messages else None
            return 0 if first_role in {"system", "developer"} else None
        for i in range(len(messages) - 1, -1, -1):
            if messages[i]["role"] == "user":
                return i
        return None


@dataclass(frozen=True, slots=True)
class DPA:
    """Name a preference direction in the prompt, and score answers along it."""

    direction: dict[str, float] = field(
        metadata={
            "json_schema_extra": {
                "x-names": "attributes",
                "examples": [{"helpfulness": 1.0}],
                "x-slider": {"minimum": -1, "maximum": 1, "step": 0.01},
            },
            "min_length": 1,
            "description": "{attribute: weight}; only the proportions matter; a negative weight "
            "asks for less of the attribute.",
        }
    )

    stage: ClassVar[Stage] = Stage.CONDITION
    needs: ClassVar[frozenset[Capability]] = frozenset()
    chat_only: ClassVar[bool] = True
    section: ClassVar[type] = Prompting

    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Write the unit direction into every draw, and score the plan along it.

        Raises:
            InvalidRequest: an attribute is unknown, the direction has no length, or the request is
                not a chat.
        """
        param = draft.param("dpa")
        if any(draw.kind != "chat" for draw in draft.draws):
            raise InvalidRequest(
                f"{param}: a direction needs a chat prompt; use /v1/chat/completions.", param=param
            )
        prompting = draft.sections.get(Prompting)
        self._check_attributes({*prompting.attributes, *draft.attributes}, param)
        try:
            v = prompting.complete(unit(self.direction))
        except ValueError as error:
            raise InvalidRequest(f"{param}.{error}", param=f"{param}.direction") from None
        draws: list[Draw] = []
        for draw in draft.draws:
            body = prompting.condition(draw.body, v)
            draws.append(replace(draw, body=body, direction=v))
        setting = '[dpa] placement = "user"' if prompting.placement == "system" else None
        return replace(
            draft,
            draws=tuple(draws),
            direction=v,
            condition=prompting.condition,
            system_setting=setting,
        )

    def _check_attributes(self, attributes: set[str], param: str) -> None:
        for name in self.direction:
            if name not in attributes:
                raise InvalidRequest(
                    f"{param}.direction.{name}: no such attribute; {nearest(name, attributes)}",
                    param=f"{param}.direction.{name}",
                )


plugin = DPA


def unit(direction: Direction) -> dict[str, float]:
    """Scale a direction to length 1.

    Args:
        direction: {name: weight}.

    Raises:
        ValueError: a weight is not a finite number, or all weights are 0.
    """
    for name, weight in direction.items():
        if not _is_finite_number(weight):
            raise ValueError(
                f"direction.{name}: {quote(weight)} is not allowed; must be a finite number."
            )
    largest = max((abs(float(weight)) for weight in direction.values()), default=0.0)
    if not largest:
        raise ValueError(
            f"direction: {quote(dict(direction))} has no length; give at least one weight other "
            "than 0."
        )
    # Scaled to at most 1 first, so that the squares neither overflow nor underflow.
    scaled = {name: float(weight) / largest for name, weight in direction.items()}
    length = math.hypot(*scaled.values())
    return {name: weight / length for name, weight in scaled.items()}


def prompt_weights(direction: Direction) -> dict[str, int]:
    """Return the weights of the published prompt: 100 times the unit direction.

    They are rounded half to even.
    """
    weights = Prompting(attributes=tuple(direction)).weights(direction)
    return {name: int(weight) for name, weight in weights.items()}


def system_prompt(direction: Direction) -> str:
    """Return the published sentence to the letter.

    It ends without a full stop: "... weighted rating = helpfulness*71 + verbosity*71".
    """
    return Prompting().sentence(direction)


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        # An integer that no float can hold.
        return False
