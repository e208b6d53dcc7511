"""Rules that need no model: length, a pattern, JSON, words to use or to avoid. Each rule is an attribute of its own or one sum."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from infer_align.errors import ConfigError
from infer_align.rewards import Reward, RewardScores
from infer_align.types import Candidate, Messages

Rule = Callable[[Candidate], float]


@dataclass(frozen=True, slots=True)
class Rules:
    """Score text by rules; the reward is the sum of those that are set."""

    description: str = field(default="", metadata={"description": "one line for people"})
    target_words: int | None = field(
        default=None,
        metadata={
            "ge": 1,
            "description": "minus the relative distance from this many words: 0 at the target",
        },
    )
    words_weight: float = field(
        default=0.0, metadata={"description": "this much per word; negative prefers brevity"}
    )
    regex: str | None = field(
        default=None, metadata={"description": "1 where the pattern is found (Python's re), else 0"}
    )
    json_object: bool = field(
        default=False, metadata={"description": "1 where the whole text is a JSON object, else 0"}
    )
    require: tuple[str, ...] = field(
        default=(), metadata={"description": "share of these words or phrases that occur, any case"}
    )
    avoid: tuple[str, ...] = field(
        default=(),
        metadata={"description": "minus the number of these words or phrases that occur, any case"},
    )
    finished: bool = field(
        default=False,
        metadata={"description": "minus 1 where the answer was cut by the token maximum"},
    )

    def load(self) -> RulesReward:
        """The reward.

        Raises:
            ConfigError: no rule is set, or the pattern is not one.
        """
        return RulesReward(self)


plugin = Rules


class RulesReward(Reward):
    """The sum of the rules that are set."""

    def __init__(self, rules: Rules) -> None:
        self._rules = _compile(rules)
        if not self._rules:
            raise ConfigError(
                "rules: none is set; set at least one, such as words_weight = -0.01 or regex = '...'."
            )
        self.description = rules.description or "rules: " + ", ".join(self._rules)

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """[1, 1, N]; a rule always has an answer, so nothing is NaN."""
        return RewardScores(
            np.array(
                [[[sum(rule(c) for rule in self._rules.values()) for c in candidates]]],
                dtype=np.float64,
            )
        )


def _compile(rules: Rules) -> dict[str, Rule]:
    compiled: dict[str, Rule] = {}
    if (target := rules.target_words) is not None:
        compiled["target_words"] = lambda c: -abs(len(c.text.split()) - target) / target
    if rules.words_weight:
        compiled["words_weight"] = lambda c: rules.words_weight * len(c.text.split())
    if rules.regex is not None:
        pattern = _pattern(rules.regex)
        compiled["regex"] = lambda c: float(pattern.search(c.text) is not None)
    if rules.json_object:
        compiled["json_object"] = lambda c: float(_is_json_object(c.text))
    if rules.require:
        wanted = [_phrase(p) for p in rules.require]
        compiled["require"] = lambda c: (
            sum(p.search(c.text) is not None for p in wanted) / len(wanted)
        )
    if rules.avoid:
        unwanted = [_phrase(p) for p in rules.avoid]
        compiled["avoid"] = lambda c: -float(sum(p.search(c.text) is not None for p in unwanted))
    if rules.finished:
        compiled["finished"] = lambda c: -float(c.finish_reason == "length")
    return compiled


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"rules.regex: {text!r} is not a regular expression: {error}.") from None


def _phrase(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
