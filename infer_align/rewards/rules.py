"""Score text by rules that need no model: length, a pattern, JSON, words to use or to avoid."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from infer_align.errors import ConfigError
from infer_align.rewards import DESCRIPTION, Reward, RewardScores
from infer_align.types import Candidate, Messages
from infer_align.words import count_words, is_in_word, plain_text

Rule = Callable[[Candidate], float]


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules about the text. The score is the sum of all rules that are set."""

    description: str = field(default="", metadata=DESCRIPTION)
    target_words: int | None = field(
        default=None,
        metadata={
            "ge": 1,
            "description": "Target number of words. Subtracts the relative distance from it: 0 at "
            "the target, 1 for no words. A letter of a script without spaces, such as Chinese, "
            "counts as a word.",
        },
    )
    words_weight: float = field(
        default=0.0,
        metadata={"description": "Score per word. A negative weight prefers short answers."},
    )
    regex: str | None = field(
        default=None,
        metadata={
            "description": "Regular expression of Python's re module. Adds 1 if it matches "
            "anywhere in the text."
        },
    )
    json_object: bool = field(
        default=False, metadata={"description": "Add 1 if the text is a JSON object."}
    )
    require: tuple[str, ...] = field(
        default=(),
        metadata={
            "description": "Words, phrases or signs to use. Adds the share of them that occur, in "
            "any case."
        },
    )
    avoid: tuple[str, ...] = field(
        default=(),
        metadata={
            "description": "Words, phrases or signs to avoid. Subtracts the number of them that "
            "occur, in any case."
        },
    )
    finished: bool = field(
        default=False,
        metadata={"description": "Subtract 1 if the token limit ended the answer."},
    )

    def load(self) -> RulesReward:
        """Return the reward.

        Raises:
            ConfigError: no rule is set, or `regex` is not a regular expression.
        """
        return RulesReward(self)


plugin = Rules


class RulesReward(Reward):
    """The sum of the rules that are set."""

    cost = "reads nothing"

    def __init__(self, rules: Rules) -> None:
        self._rules = {**_length_rules(rules), **_pattern_rules(rules), **_phrase_rules(rules)}
        if rules.finished:
            self._rules["finished"] = lambda candidate: -float(candidate.finish_reason == "length")
        if not self._rules:
            raise ConfigError(
                "rules: no rule is set; set at least one, "
                "such as words_weight = -0.01 or regex = '...'."
            )
        self.description = rules.description or "rules: " + ", ".join(self._rules)

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Return [1, 1, N] scores. A rule applies to every text, so no score is NaN."""
        values = [self._sum(candidate) for candidate in candidates]
        return RewardScores(np.array([[values]], dtype=np.float64))

    def _sum(self, candidate: Candidate) -> float:
        return sum(rule(candidate) for rule in self._rules.values())


def _length_rules(rules: Rules) -> dict[str, Rule]:
    compiled: dict[str, Rule] = {}
    target = rules.target_words
    if target is not None:
        compiled["target_words"] = lambda candidate: -abs(_words(candidate) - target) / target
    if rules.words_weight:
        compiled["words_weight"] = lambda candidate: rules.words_weight * _words(candidate)
    return compiled


def _pattern_rules(rules: Rules) -> dict[str, Rule]:
    compiled: dict[str, Rule] = {}
    if rules.regex is not None:
        pattern = _pattern(rules.regex)
        compiled["regex"] = lambda candidate: float(pattern.search(candidate.text) is not None)
    if rules.json_object:
        compiled["json_object"] = lambda candidate: float(_is_json_object(candidate.text))
    return compiled


def _phrase_rules(rules: Rules) -> dict[str, Rule]:
    compiled: dict[str, Rule] = {}
    required = [_phrase(text) for text in rules.require]
    avoided = [_phrase(text) for text in rules.avoid]
    if required:
        compiled["require"] = lambda candidate: _matches(required, candidate) / len(required)
    if avoided:
        compiled["avoid"] = lambda candidate: -float(_matches(avoided, candidate))
    return compiled


def _words(candidate: Candidate) -> int:
    return count_words(candidate.text)


def _matches(phrases: Sequence[re.Pattern[str]], candidate: Candidate) -> int:
    """Count the phrases that occur in the candidate's text."""
    text = plain_text(candidate.text)
    return sum(_occurs(phrase, text) for phrase in phrases)


def _occurs(phrase: re.Pattern[str], text: str) -> bool:
    """Return True if a phrase occurs in a text where it neither begins nor ends inside a word."""
    match = phrase.search(text)
    while match is not None:
        if not is_in_word(text, match.start()) and not is_in_word(text, match.end()):
            return True
        # The next occurrence may overlap this one.
        match = phrase.search(text, match.start() + 1)
    return False


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(
            f"rules.regex: {text!r} is not a regular expression: {error}; write one for Python's "
            f"re."
        ) from None


def _phrase(text: str) -> re.Pattern[str]:
    """Compile a pattern for a phrase, in any case and across lines.

    Raises:
        ConfigError: there is nothing to look for.
    """
    words = [re.escape(word) for word in plain_text(text).split()]
    if not words:
        raise ConfigError(
            f"rules: {text!r} is no word or phrase; write one in require and avoid, such as "
            '"please".'
        )
    return re.compile(r"\s+".join(words), re.IGNORECASE)


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text, parse_constant=_no_constant), dict)
    except (ValueError, RecursionError):
        return False


def _no_constant(name: str) -> None:
    """Refuse NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is no JSON")
