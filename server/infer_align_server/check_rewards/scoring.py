"""Score the answers and the attacks with the rewards of a configuration."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from infer_align.diagnostics.attacks import AttackText, attack_texts
from infer_align.errors import InvalidRequest
from infer_align.flow.scoring import score_with
from infer_align.objectives import Ensemble
from infer_align.rewards import Reward
from infer_align.types import Array, Body, Candidate, Messages
from infer_align_server.check_rewards.progress import ProgressLines
from infer_align_server.check_rewards.questions import RatedQuestion

# Answers of one call of a reward, so that its time limit, made for a request, suffices.
CHUNK = 8
# Prompts that are scored at once. An engine in this process gains nothing from more than one.
CONCURRENCY = 4


@dataclass(frozen=True, slots=True)
class ScoredAttack:
    """The score of one attack, and the scores of the real answers that it is compared with."""

    attack: AttackText
    score: float
    answers: Array  # [N]


@dataclass(frozen=True, slots=True)
class ScoredReward:
    """The scores of one reward, or of one attribute of it.

    Attributes:
        name: as a request names it, such as "preference.helpfulness".
        description: one line.
        members: names of the K members.
        scores: per question, [K, N]; NaN means not scored.
        attacks: per question, the scores of the attacks; () if they were not scored.
        reasons: why an answer was not scored, with the number of answers.
        remarks: the notes on answers that were scored, such as on truncated ones, with the number
            of answers; notes that differ only after a colon are counted under the first one.
    """

    name: str
    description: str
    members: tuple[str, ...]
    scores: list[Array]
    attacks: list[tuple[ScoredAttack, ...]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)

    @property
    def objective(self) -> list[Array]:
        """Return one score per answer, by the default way to combine members: per question, [N]."""
        ensemble = Ensemble()
        return [ensemble.reduce(scores) for scores in self.scores]

    @property
    def answers(self) -> int:
        """Return the number of answers."""
        return sum(scores.shape[1] for scores in self.scores)

    @property
    def unscored(self) -> int:
        """Return the number of answers that have no score at all."""
        return sum(int(np.isnan(scores).all(axis=0).sum()) for scores in self.scores)


class _Answered(NamedTuple):
    """The scores of one question by one reward, each [A, K, N] or [A, K, M]."""

    answers: Array
    attacks: Array
    # The answers that the attacks are compared with: of a relative reward, scored with the attacks.
    rivals: Array
    notes: tuple[str, ...]  # of the answers without a score
    remarks: tuple[str, ...]  # of the answers with one


async def score_questions(
    name: str,
    reward: Reward,
    questions: Sequence[RatedQuestion],
    progress: ProgressLines,
    rubric: str | None = None,
) -> list[ScoredReward]:
    """Score all answers and attacks with one reward.

    Args:
        name: the section of the reward.
        reward: it has started.
        questions: the answers.
        progress: prints how many prompts are done.
        rubric: what the reward looks for, in words; None to score no attacks.

    Returns:
        One per attribute, or one.
    """
    progress.begin(name)
    room = asyncio.Semaphore(1 if reward.uses_engine else CONCURRENCY)
    attacks: list[list[AttackText]] = []
    for question in questions:
        attacks.append([] if rubric is None else _attacks(question, rubric))
    done = 0

    async def score(question: RatedQuestion, texts: Sequence[AttackText]) -> _Answered:
        nonlocal done
        async with room:
            answered = await _score_question(reward, question, [each.text for each in texts])
        done += 1
        progress.advance(done, len(questions), "prompts")
        return answered

    async with asyncio.TaskGroup() as group:
        tasks = []
        for question, texts in zip(questions, attacks, strict=True):
            tasks.append(group.create_task(score(question, texts)))
    results = [task.result() for task in tasks]
    attributes = reward.attributes or ("",)
    scored: list[ScoredReward] = []
    for index, attribute in enumerate(attributes):
        title = f"{name}.{attribute}" if attribute else name
        scored.append(_scored_reward(title, reward, index, results, attacks))
    return scored


def _attacks(question: RatedQuestion, rubric: str) -> list[AttackText]:
    attacks = attack_texts(question.question, question.answers, rubric)
    for model, text in question.intruders.items():
        attacks.append(AttackText(model, text))
    return attacks


async def _score_question(
    reward: Reward, question: RatedQuestion, attacks: Sequence[str]
) -> _Answered:
    """Score the answers to one question; what fails is NaN with a note."""
    count = len(question.answers)
    try:
        reward.check_conversation("messages", question.messages)
    except InvalidRequest as error:
        shape = (max(1, len(reward.attributes)), len(reward.members))
        nothing = np.full((*shape, count), np.nan)
        unread = np.full((*shape, len(attacks)), np.nan)
        return _Answered(nothing, unread, nothing, (error.message,) * count, ())
    texts = [*question.answers, *attacks]
    if not reward.relative:
        values, notes = await _score_texts(reward, question.messages, texts, CHUNK)
        answers = values[..., :count]
        return _Answered(
            answers,
            values[..., count:],
            answers,
            _notes(answers, notes),
            _remarks(answers, notes),
        )
    answers, notes = await _score_texts(reward, question.messages, question.answers, count)
    rivals = answers
    values = np.full((*answers.shape[:2], 0), np.nan)
    if attacks:
        together, _ = await _score_texts(reward, question.messages, texts, len(texts))
        rivals = together[..., :count]
        values = together[..., count:]
    return _Answered(answers, values, rivals, _notes(answers, notes), _remarks(answers, notes))


async def _score_texts(
    reward: Reward, messages: Messages, texts: Sequence[str], chunk: int
) -> tuple[Array, list[str | None]]:
    """Return the scores [A, K, N] of texts and a note on each, `chunk` texts at a time."""
    values: list[Array] = []
    notes: list[str | None] = []
    for start in range(0, len(texts), chunk):
        part = texts[start : start + chunk]
        candidates = [Candidate(index, _choice(text)) for index, text in enumerate(part)]
        scores = await score_with(reward, messages, candidates)
        values.append(scores.values)
        notes += scores.notes or (None,) * len(candidates)
    return np.concatenate(values, axis=-1), notes


def _choice(text: str) -> Body:
    return {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}


def _notes(values: Array, notes: Sequence[str | None]) -> tuple[str, ...]:
    """Return why each answer without a score has none."""
    reasons: list[str] = []
    missing = np.isnan(values).all(axis=(0, 1))
    for index in np.flatnonzero(missing):
        reasons.append(notes[int(index)] or "its score is not a number")
    return tuple(reasons)


def _remarks(values: Array, notes: Sequence[str | None]) -> tuple[str, ...]:
    """Return the notes on the answers that have a score."""
    remarks: list[str] = []
    scored = ~np.isnan(values).all(axis=(0, 1))
    for index in np.flatnonzero(scored):
        note = notes[int(index)]
        if note:
            remarks.append(note)
    return tuple(remarks)


def _by_kind(remarks: Iterable[str]) -> Counter[str]:
    """Count remarks by their text before a colon; the first of each kind is the key."""
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for remark in remarks:
        counts[examples.setdefault(remark.partition(":")[0], remark)] += 1
    return counts


def _scored_reward(
    name: str,
    reward: Reward,
    attribute: int,
    results: Sequence[_Answered],
    attacks: Sequence[Sequence[AttackText]],
) -> ScoredReward:
    scored = ScoredReward(name, reward.description, tuple(reward.members), [])
    ensemble = Ensemble()
    remarks: list[str] = []
    for answered, texts in zip(results, attacks, strict=True):
        scored.scores.append(answered.answers[attribute])
        rivals = ensemble.reduce(answered.rivals[attribute])
        values = ensemble.reduce(answered.attacks[attribute])
        rows: list[ScoredAttack] = []
        for text, value in zip(texts, values, strict=True):
            rows.append(ScoredAttack(text, float(value), rivals))
        scored.attacks.append(tuple(rows))
        scored.reasons.update(answered.notes)
        remarks += answered.remarks
    scored.remarks.update(_by_kind(remarks))
    return scored
