"""Directional preference alignment: a unit direction over named attributes, told to the model and used to score its answers.

Wang et al., "Arithmetic Control of LLMs for Diverse User Preferences" (2402.18571): the preference is a unit vector v in reward
space, the objective v . r(x, y), and the model is told 100 v, rounded, in its system prompt. The published sentence ends without
a stop, and its model was trained on it to the letter; a model that was not trained on such numbers may not heed them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from infer_align.errors import InvalidRequest, nearest, shown
from infer_align.types import Body, Capability, Direction, Plan, Stage

PUBLISHED = (
    "You are a helpful, respectful, and honest assistant who always responds to the user in a harmless way. "
    "Your response should maximize weighted rating = {weights}"
)


@dataclass(frozen=True, slots=True)
class Prompting:
    """How a direction is written into the prompt; the default is what the published model was trained on."""

    attributes: tuple[str, ...] = field(
        default=("helpfulness", "verbosity"),
        metadata={
            "min_length": 1,
            "description": "what a direction may name, in the template's order",
        },
    )
    template: str = field(
        default=PUBLISHED,
        metadata={"description": 'the sentence; "{weights}" stands for the terms'},
    )
    term: str = field(
        default="{attribute}*{weight}", metadata={"description": "one attribute with its weight"}
    )
    separator: str = field(default=" + ", metadata={"description": "between terms"})
    scale: float = field(
        default=100.0,
        metadata={"gt": 0, "description": "a weight is this times the unit direction"},
    )
    decimals: int = field(
        default=0,
        metadata={"ge": 0, "le": 6, "description": "digits that it is rounded to, half to even"},
    )
    placement: Literal["system", "user"] = field(
        default="system",
        metadata={
            "description": "before the client's own system message, or before the last user message"
        },
    )

    def __post_init__(self) -> None:
        """Refuse a sentence that would not say the direction."""
        for name, needed in (("template", ("{weights}",)), ("term", ("{attribute}", "{weight}"))):
            if missing := [part for part in needed if part not in getattr(self, name)]:
                raise ValueError(
                    f"a sentence with {' and '.join(missing)} in {name}: without it the model is not told the direction"
                )
        if len({*self.attributes}) < len(self.attributes):
            raise ValueError("told each attribute once")

    def completed(self, direction: Direction) -> dict[str, float]:
        """The direction in the template's order, with the template's attributes that it does not name at 0, if it names any."""
        names = [*self.attributes, *(name for name in direction if name not in self.attributes)]
        if not direction.keys() & {*self.attributes}:
            names = [*direction]
        return {name: direction.get(name, 0.0) for name in names}

    def weights(self, direction: Direction) -> dict[str, int | float]:
        """Attribute -> the rounded weight. An attribute of the template that the direction does not name weighs 0."""
        v = self.completed(unit(direction))
        rounded = {
            name: float(np.round(self.scale * weight, self.decimals)) + 0.0
            for name, weight in v.items()
        }  # + 0: no -0
        return rounded if self.decimals else {name: int(weight) for name, weight in rounded.items()}

    def sentence(self, direction: Direction) -> str:
        """The template, filled in."""
        terms = [
            self.term.replace("{attribute}", name).replace("{weight}", str(weight))
            for name, weight in self.weights(direction).items()
        ]
        return self.template.replace("{weights}", self.separator.join(terms))

    def condition(self, body: Body, direction: Direction) -> Body:
        """A chat body whose model is told the direction; what the client's own messages say stays."""
        messages = [*body["messages"]]
        sentence = self.sentence(direction)
        if self.placement == "user":
            at = max(
                (i for i, message in enumerate(messages) if message["role"] == "user"), default=None
            )
        else:
            at = 0 if messages and messages[0]["role"] in {"system", "developer"} else None
        if at is None:
            messages.insert(0, {"role": self.placement, "content": sentence})
        else:
            messages[at] = {
                **messages[at],
                "content": _before(sentence, messages[at].get("content")),
            }
        return {**body, "messages": messages}


@dataclass(frozen=True, slots=True)
class DPA:
    """Tell the model a preference direction, and score answers along it."""

    direction: dict[str, float] = field(
        metadata={
            "min_length": 1,
            "description": "{attribute: weight}; its length does not matter, negative asks for less",
        }
    )

    stage: ClassVar[Stage] = Stage.CONDITION
    needs: ClassVar[frozenset[Capability]] = (
        frozenset()
    )  # of a chat, which the draw is checked to be

    def plan(self, plan: Plan) -> Plan:
        """Every draw conditioned on the unit direction, and the plan scored along it.

        Raises:
            InvalidRequest: an attribute is not known, the direction has no length, or the prompt is no chat.
        """
        prompting = plan.settings.get("dpa", Prompting())
        assert isinstance(prompting, Prompting)
        where = "align.dpa"
        if any(draw.kind != "chat" for draw in plan.draws):
            raise InvalidRequest(
                f"{where}: a direction is told in a chat prompt; use /v1/chat/completions.",
                param=where,
            )
        known = {*prompting.attributes, *plan.attributes}
        for name in self.direction:
            if name not in known:
                place = f"{where}.direction.{name}"
                raise InvalidRequest(
                    f"{place}: no such attribute; {nearest(name, known)}", param=place
                )
        try:
            v = prompting.completed(unit(self.direction))
        except ValueError as error:
            raise InvalidRequest(f"{where}.{error}", param=f"{where}.direction") from None
        draws = tuple(
            replace(draw, body=prompting.condition(draw.body, v), direction=v)
            for draw in plan.draws
        )
        return replace(plan, draws=draws, direction=v, conditioner=prompting)


plugin = DPA


def unit(direction: Direction) -> dict[str, float]:
    """The direction at length 1: {name: weight} -> {name: weight}.

    Raises:
        ValueError: a weight is no finite number, or all are 0.
    """
    for name, weight in direction.items():
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float | np.floating | np.integer)
            or not math.isfinite(weight)
        ):
            raise ValueError(
                f"direction.{name}: {shown(weight)} is not allowed; must be a finite number."
            )
    largest = max((abs(float(weight)) for weight in direction.values()), default=0.0)
    if not largest:
        raise ValueError(
            f"direction: {shown(dict(direction))} has no length; give at least one weight other than 0."
        )
    scaled = {
        name: float(weight) / largest for name, weight in direction.items()
    }  # no overflow, no underflow in the squares
    length = math.hypot(*scaled.values())
    return {name: weight / length for name, weight in scaled.items()}


def prompt_weights(direction: Direction) -> dict[str, int]:
    """The weights as the published prompt writes them: 100 times the unit direction, rounded half to even."""
    return {
        name: int(weight)
        for name, weight in Prompting(attributes=tuple(direction)).weights(direction).items()
    }


def system_prompt(direction: Direction) -> str:
    """The published sentence, to the letter: "... weighted rating = helpfulness*71 + verbosity*71", without a final stop."""
    return Prompting().sentence(direction)


def _before(sentence: str, content: object) -> str | list[Mapping[str, Any]]:
    """The sentence, then what a message says already: text, or a list of parts."""
    if isinstance(content, list):
        return [{"type": "text", "text": f"{sentence}\n\n"}, *content]
    return f"{sentence}\n\n{content}" if content else sentence
