"""Rubrics: rules to judge one conversation by, given as text or written by the judge itself.

    Answers in one sentence. [Hard Rule]
    Names a source. [Principle]
    Is polite.

Each line is read as a criterion of its own. Hard rules multiply, all other lines average.

With `rubric = "auto"` the judge writes one rubric for each conversation; it is cached. A text that
is no list of rules is refused. If labelled pairs of that conversation are configured, the rubric is
written from their contrast, and it is used only if judging by it reproduces their labels. Without
labels it is used only if it prefers a real answer to null answers (`probes.py`). Without a rubric
that can be used, the judge's principles or criteria decide, and `align.reason` says why.

Source: "OpenRubrics" (2510.07743). The paper trains the writer and the judge; here both are frozen.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from infer_align.engines import Engine
from infer_align.errors import AlignError
from infer_align.methods.trust_judge import BULLET, HARD_TAG, PRINCIPLE_TAG, rule_words
from infer_align.preferences import conversation_key, read_preferences
from infer_align.rewards.trust_judge.criteria import Criterion, Objective
from infer_align.rewards.trust_judge.judgement import usage_of
from infer_align.rewards.trust_judge.principles import Reader
from infer_align.rewards.trust_judge.probes import PROBES, ProbeScores, probe
from infer_align.rewards.trust_judge.prompts import rubric_messages, without_controls
from infer_align.types import Candidate, Draw, Messages, ScoringUsage

# A generated rubric has at most so many rules; further lines are ignored.
MAX_RULES = 5
# Maximum length of a generated rubric.
RUBRIC_TOKENS = 256
# A generated line of more characters is no rule.
_MAX_LINE = 300
_CACHED = 1024
# Marks of emphasis around a rule or its first words.
_EMPHASIS = re.compile(r"\*\*|__")

# Better and worse answers by conversation, see `conversation_key`.
LabelledPairs = Mapping[str, Sequence[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Rubric:
    """The rules that the judge wrote for one conversation."""

    rules: tuple[Criterion, ...] = ()
    reason: str | None = None  # why it is not used; None if it is
    labels: int = 0  # labelled pairs of the conversation
    reproduced: int = 0  # those that judging by the rubric reproduces
    probes: ProbeScores | None = None  # scores of a real and of null answers, without labels
    is_final: bool = True  # False if a call failed, so that the next request tries again

    @property
    def accepted(self) -> bool:
        """Return True if answers are judged by it."""
        return self.reason is None


@dataclass(slots=True)
class _Entry:
    """A place in the cache. Its lock lets concurrent requests share one generation."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    rubric: Rubric | None = None


class RubricWriter:
    """Writes one rubric for each conversation and judge, and remembers the latest ones."""

    def __init__(self, labelled: LabelledPairs) -> None:
        self._labelled = labelled
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    async def rubric(self, reader: Reader, messages: Messages) -> tuple[Rubric, ScoringUsage]:
        """Return the rubric of a conversation, and what it cost: nothing if it is cached."""
        conversation = conversation_key(messages)
        entry = self._entry(f"{reader.judge.engine.model}\0{reader.scale}\0{conversation}")
        async with entry.lock:
            if entry.rubric is not None:
                return entry.rubric, ScoringUsage()
            pairs = self._labelled.get(conversation, ())
            rubric, spent = await _write(reader, messages, pairs)
            if rubric.is_final:
                entry.rubric = rubric
            return rubric, spent

    def _entry(self, key: str) -> _Entry:
        entry = self._entries.setdefault(key, _Entry())
        self._entries.move_to_end(key)
        while len(self._entries) > _CACHED:
            self._entries.popitem(last=False)
        return entry

    @property
    def max_checked_answers(self) -> int:
        """Return the largest number of answers that one rubric is checked on."""
        checked = [PROBES]
        checked += [2 * len(pairs) for pairs in self._labelled.values()]
        return max(checked)


def read_labelled(path: Path) -> tuple[LabelledPairs, tuple[str, ...]]:
    """Return the labelled pairs of a file by conversation, and its lines that hold none.

    Raises:
        ConfigError: the file cannot be read or holds no pair.
    """
    preferences = read_preferences(path)
    labelled: dict[str, list[tuple[str, str]]] = {}
    for pair in preferences.pairs:
        key = conversation_key(pair.messages)
        labelled.setdefault(key, []).append((pair.chosen, pair.rejected))
    return labelled, preferences.problems


def parse_rubric(text: str) -> tuple[Criterion, ...]:
    """Return the rules of a rubric, one for each line that holds words."""
    rules: list[Criterion] = []
    for line in text.splitlines():
        words = rule_words(line)
        if words:
            hard = HARD_TAG.search(line) is not None
            rules.append(Criterion(words.rstrip("."), hard=hard))
    return tuple(rules)


def parse_generated(text: str) -> tuple[Criterion, ...]:
    """Return the rules of a text that a model wrote as a rubric.

    A rule is an item of a list, or it has a tag such as [Hard Rule]. Other lines are no rules: a
    model may introduce its list, or answer the question instead.
    """
    rules: list[Criterion] = []
    for line in text.splitlines():
        is_item = BULLET.match(line) is not None
        is_tagged = HARD_TAG.search(line) is not None or PRINCIPLE_TAG.search(line) is not None
        if is_item or is_tagged:
            rules += parse_rubric(_EMPHASIS.sub("", line))
    return tuple(rule for rule in rules if len(rule.text) <= _MAX_LINE)


async def _write(
    reader: Reader, messages: Messages, pairs: Sequence[tuple[str, str]]
) -> tuple[Rubric, ScoringUsage]:
    """Let the judge write a rubric, and check it on the labelled pairs, or else on probes."""
    engine = reader.judge.engine
    try:
        candidate = await _generate(engine, messages, pairs[0] if pairs else None)
    except AlignError as error:
        return _failed(error.message), ScoringUsage()
    spent = usage_of(candidate)
    if candidate.error is not None:
        return _failed(candidate.error), spent
    lines = _complete_lines(candidate)
    rules: list[Criterion] = []
    for rule in parse_generated("\n".join(lines)):
        rules.append(replace(rule, text=without_controls(rule.text, engine.control_tokens)))
    if 2 * len(rules) < len(lines) or not rules:
        reason = f"the judge wrote no list of rules: {len(rules)} of {len(lines)} lines are rules"
        return Rubric(tuple(rules[:MAX_RULES]), reason, labels=len(pairs)), spent
    rubric = Rubric(tuple(rules[:MAX_RULES]), labels=len(pairs))
    if pairs:
        checked, spent_on_check = await _check_labels(rubric, reader, messages, pairs)
    else:
        checked, spent_on_check = await _check_probes(rubric, reader, messages)
    return checked, spent + spent_on_check


def _complete_lines(candidate: Candidate) -> list[str]:
    """Return the lines of a text that hold words, without a last one that the limit cut off."""
    lines = candidate.text.splitlines()
    if candidate.choice.get("finish_reason") == "length" and len(lines) > 1:
        lines.pop()
    return [line for line in lines if any(character.isalnum() for character in line)]


async def _check_probes(
    rubric: Rubric, reader: Reader, messages: Messages
) -> tuple[Rubric, ScoringUsage]:
    """Judge a real answer and null answers by a rubric; accept it if the real one is better."""
    scores = await probe(reader, messages, Objective(rubric.rules))
    checked = replace(rubric, reason=scores.problem, is_final=scores.error is None, probes=scores)
    return checked, scores.spent


async def _check_labels(
    rubric: Rubric, reader: Reader, messages: Messages, pairs: Sequence[tuple[str, str]]
) -> tuple[Rubric, ScoringUsage]:
    """Judge the labelled pairs by a rubric; accept it if every label is reproduced."""
    spent = ScoringUsage()
    reproduced = 0
    is_final = True
    for pair in pairs:
        ratings = await reader.rate(messages, pair, Objective(rubric.rules))
        spent += ratings.spent
        better, worse = ratings.scores
        reproduced += better > worse
        is_final = is_final and not any(ratings.errors)
    reason = None
    if reproduced < len(pairs):
        reason = f"judging by it reproduces {reproduced} of {len(pairs)} labels"
    return replace(rubric, reproduced=reproduced, reason=reason, is_final=is_final), spent


def _failed(error: str) -> Rubric:
    return Rubric(reason=f"the judge wrote no rubric: {error}", is_final=False)


async def _generate(
    engine: Engine, messages: Messages, contrast: tuple[str, str] | None
) -> Candidate:
    """Return the text of a rubric, as the judge wrote it.

    Raises:
        AlignError: the engine failed.
    """
    prompt = rubric_messages(
        messages,
        contrast,
        controls=engine.control_tokens,
        system_role=engine.has_system_role,
    )
    body = {"messages": prompt, "max_tokens": RUBRIC_TOKENS, "temperature": 0}
    [candidate] = await engine.generate(Draw(body, 1, (0,)))
    return candidate
