"""Read the answers that rewards are checked on: pairs of answers, or pools of rated answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from infer_align.diagnostics.pairs import RATING_GAP, rated_pairs
from infer_align.errors import ConfigError, nearest
from infer_align.messages import message_text
from infer_align.preferences import (
    AnswerPool,
    PreferencePair,
    conversation_key,
    pair_remarks,
    pool_remarks,
    read_pools,
    read_preferences,
)
from infer_align.types import Array, Messages

Pairs = NDArray[np.int64]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class RatedQuestion:
    """The answers to one conversation.

    Attributes:
        messages: the conversation.
        answers: N texts.
        ratings: [N], NaN for an answer without a rating.
        pairs: [P, 2] indices of two answers, the better one first.
        intruders: texts of models that are checked as attacks, by the name of the model.
    """

    messages: Messages
    answers: tuple[str, ...]
    ratings: Array
    pairs: Pairs
    intruders: dict[str, str] = field(default_factory=dict)

    @property
    def lengths(self) -> Array:
        """Return the number of characters of each answer, [N]."""
        return np.array([len(answer) for answer in self.answers], dtype=np.float64)

    @property
    def question(self) -> str:
        """Return the text of the last message of the user, or ""."""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                return message_text(message)
        return ""

    @property
    def has_ratings(self) -> bool:
        """Return True if at least two answers have different ratings."""
        rated = self.ratings[~np.isnan(self.ratings)]
        return len(rated) > 1 and bool(rated.min() < rated.max())


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The content of a file."""

    questions: tuple[RatedQuestion, ...]
    source: str  # "pairs" or "pools"
    total: int  # prompts in the file
    problems: tuple[str, ...]  # sentences about the whole file, and then about single lines


def read_questions(
    pairs: Path | None,
    pools: Path | None,
    limit: int | None,
    answers: int | None,
    attack_models: Sequence[str] = (),
) -> QuestionSet:
    """Return the questions of a file of pairs or of pools.

    Args:
        pairs: path of a file of pairs, or None.
        pools: path of a file of pools, or None; exactly one of the two is a path.
        limit: largest number of prompts, taken evenly from the whole file; None for all.
        answers: largest number of answers of a pool, drawn with a fixed seed; None for all.
        attack_models: models of the pools whose answers are attacks.

    Raises:
        ConfigError: the file cannot be read or gives nothing, or an attack model is not in it.
    """
    if pools is None and pairs is not None:
        file = read_preferences(pairs)
        groups = _groups(file.pairs)
        chosen = [_question_of_pairs(group) for group in _evenly(groups, limit)]
        notes = (*pair_remarks(file.pairs), *file.problems)
        return QuestionSet(tuple(chosen), "pairs", len(groups), notes)
    if pools is None:
        raise ConfigError("--pairs or --pools: give a file of answers.")
    content, problems = read_pools(pools)
    _check_models(content, attack_models)
    questions = []
    for pool in _evenly(content, limit):
        questions.append(_question_of_pool(pool, answers, attack_models))
    notes = (*pool_remarks(content), *problems)
    return QuestionSet(with_rated_pairs(questions), "pools", len(content), notes)


def with_rated_pairs(questions: Sequence[RatedQuestion]) -> tuple[RatedQuestion, ...]:
    """Return the questions with a pair for each two answers whose ratings clearly differ."""
    ratings = np.concatenate([np.empty(0), *(question.ratings for question in questions)])
    ratings = ratings[~np.isnan(ratings)]
    gap = RATING_GAP * float(ratings.max() - ratings.min()) if len(ratings) else 0.0
    rated: list[RatedQuestion] = []
    for question in questions:
        rated.append(replace(question, pairs=rated_pairs(question.ratings, gap)))
    return tuple(rated)


def _evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return at most `limit` items, spread over the whole sequence."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def _groups(pairs: Sequence[PreferencePair]) -> list[list[PreferencePair]]:
    """Return the pairs of each conversation, in the order of the file."""
    groups: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        groups.setdefault(conversation_key(pair.messages), []).append(pair)
    return [*groups.values()]


def _question_of_pairs(group: Sequence[PreferencePair]) -> RatedQuestion:
    """Return the question of the pairs of one conversation.

    If every answer is always chosen or always rejected, the ratings are 1 and 0.
    """
    texts: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    for pair in group:
        better = texts.setdefault(pair.chosen, len(texts))
        worse = texts.setdefault(pair.rejected, len(texts))
        pairs.append((better, worse))
    chosen = {better for better, _ in pairs}
    rejected = {worse for _, worse in pairs}
    ratings = np.full(len(texts), np.nan)
    if not chosen & rejected:
        ratings[list(chosen)] = 1.0
        ratings[list(rejected)] = 0.0
    return RatedQuestion(group[0].messages, tuple(texts), ratings, np.array(pairs, dtype=np.int64))


def _question_of_pool(
    pool: AnswerPool, answers: int | None, attack_models: Sequence[str]
) -> RatedQuestion:
    models = pool.models or ("",) * len(pool.answers)
    indices: list[int] = []
    intruders: dict[str, str] = {}
    for i, model in enumerate(models):
        if model in attack_models:
            intruders[model] = pool.answers[i]
        else:
            indices.append(i)
    if answers is not None and answers < len(indices):
        sample = np.random.default_rng((0, pool.line))
        indices = sorted(int(i) for i in sample.choice(indices, answers, replace=False))
    ratings = np.full(len(pool.answers), np.nan)
    if pool.gold:
        ratings[:] = pool.gold
    return RatedQuestion(
        pool.messages,
        tuple(pool.answers[i] for i in indices),
        ratings[indices],
        np.empty((0, 2), dtype=np.int64),
        intruders,
    )


def _check_models(pools: Sequence[AnswerPool], attack_models: Sequence[str]) -> None:
    models: set[str] = set()
    for pool in pools:
        models |= {model for model in pool.models or () if model}
    for name in attack_models:
        if name not in models:
            raise ConfigError(
                f"--attack-model: {name!r} wrote no answer of this file; {nearest(name, models)}"
            )
