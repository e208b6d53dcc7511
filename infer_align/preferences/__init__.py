r"""Read preferences from a file: pairs of a better and a worse answer, or pools of rated answers.

A line that cannot be read is never dropped in silence: it becomes a problem with its number. These
forms of a line are understood, and a file may mix them:

    {"prompt" | "messages", "chosen", "rejected"}       an answer is a text, a message or messages
    {"chosen", "rejected"}                              whole dialogues: lists of messages, or the
                                                        text of HH-RLHF, "\n\nHuman: ..."
    {"prompt" | "messages", "answers": [...]}           a pool: texts, or {"text", "rating"}
    {"prompt" | "messages", "answer", "rating"}         lines of one prompt make a pool
    {"object": "align.profile.export", "choices": ...}  what `infer-align profiles export` prints
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infer_align.errors import quote
from infer_align.preferences.fields import (
    ANSWERS,
    DIALOGUE_TURN,
    PROMPTS,
    checked_messages,
    hh_turns,
    plain,
    read_answer,
    read_model,
    read_prompt,
    read_rating,
    required,
    text_of_answer,
)
from infer_align.preferences.lines import BadLineError, Problems, json_objects, nothing_to_read
from infer_align.types import Messages

# A pool with more pairs than this gives as many of them, drawn at random with a fixed seed.
MAX_POOL_PAIRS = 100
EXPORT = "align.profile.export"


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one conversation, of which the first is better."""

    messages: Messages  # the conversation that both texts answer
    chosen: str
    rejected: str
    line: int  # of the file, from 1


@dataclass(frozen=True, slots=True)
class PreferenceFile:
    """The pairs of a file, and the reason for each line that gives none."""

    pairs: tuple[PreferencePair, ...]
    problems: tuple[str, ...]  # such as "line 12: has no field 'rejected'"


@dataclass(frozen=True, slots=True)
class AnswerPool:
    """Several answers to one conversation."""

    messages: Messages
    answers: tuple[str, ...]
    gold: tuple[float, ...] | None  # ratings, if the file has them; more is better
    models: tuple[str, ...] | None  # names of the models that wrote the answers
    line: int  # of the file, from 1


def read_preferences(path: Path) -> PreferenceFile:
    """Return the pairs of a file of JSON lines, which may be compressed (.gz, .xz, .bz2).

    Ratings become pairs: each two answers of one prompt with different ratings.

    Raises:
        ConfigError: the file cannot be read, is empty, or has no pair.
    """
    pairs: list[PreferencePair] = []
    problems = Problems()
    rated = _Ratings()
    for line, record in json_objects(path, problems):
        with problems.at(line):
            if "choices" in record and record.get("object") == EXPORT:
                pairs += _export_pairs(record["choices"], line, problems)
            elif "answers" in record:
                pairs += _pool_pairs(_pool(record, line), problems)
            elif "chosen" in record or "rejected" in record:
                pairs.append(_pair(record, line))
            else:
                rated.add(record, line)
    for pool in rated.pools():
        with problems.at(pool.line):
            pairs += _pool_pairs(pool, problems)
    if not pairs:
        raise nothing_to_read(path, "pair of answers", problems)
    return PreferenceFile(tuple(pairs), _sentences(problems))


def read_pools(path: Path) -> tuple[tuple[AnswerPool, ...], tuple[str, ...]]:
    """Return the pools of a file of JSON lines (.gz, .xz, .bz2), and a problem for each other line.

    Raises:
        ConfigError: the file cannot be read, is empty, or has no pool.
    """
    pools: list[AnswerPool] = []
    problems = Problems()
    rated = _Ratings()
    for line, record in json_objects(path, problems):
        with problems.at(line):
            if "chosen" in record or "rejected" in record:
                raise BadLineError("is a pair of answers; a pool has the field 'answers'")
            if "answers" in record:
                pools.append(_pool(record, line))
            else:
                rated.add(record, line)
    pools += rated.pools()
    if not pools:
        raise nothing_to_read(path, "pool of answers", problems)
    return tuple(pools), problems.sentences()


# --- pairs ---


def _pair(record: Mapping[str, Any], line: int) -> PreferencePair:
    """Return the pair of one line: a prompt with two answers, or two whole dialogues.

    Raises:
        BadLineError: the line is no pair; it says why.
    """
    chosen = required(record, "chosen")
    rejected = required(record, "rejected")
    prompt = {name: record[name] for name in PROMPTS if name in record}
    if isinstance(chosen, list) and chosen == prompt.get("messages"):
        # UltraFeedback repeats the chosen dialogue under this name.
        del prompt["messages"]
    if not prompt:
        dialogue = _dialogue("chosen", chosen)
        other_dialogue = _dialogue("rejected", rejected)
        return _pair_of_dialogues(dialogue, other_dialogue, line)
    messages = read_prompt(prompt)
    text = read_answer("chosen", chosen, messages)
    other_text = read_answer("rejected", rejected, messages)
    return _checked(PreferencePair(messages, text, other_text, line))


def _checked(pair: PreferencePair) -> PreferencePair:
    if pair.chosen == pair.rejected:
        raise BadLineError("chosen and rejected are the same text")
    return pair


def _pair_of_dialogues(
    chosen: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]], line: int
) -> PreferencePair:
    texts: list[str] = []
    for name, dialogue in (("chosen", chosen), ("rejected", rejected)):
        if not dialogue:
            raise BadLineError(f"{name} is an empty list of messages")
        texts.append(text_of_answer(name, dialogue[-1]))
    earlier = list(chosen[:-1])
    if earlier != list(rejected[:-1]):
        raise BadLineError("chosen and rejected differ before their last answer")
    if not earlier:
        raise BadLineError("chosen and rejected have no turn of a user before their answer")
    return _checked(PreferencePair(earlier, texts[0], texts[1], line))


def _dialogue(name: str, value: object) -> Sequence[Mapping[str, Any]]:
    """Return the messages of a whole dialogue."""
    if isinstance(value, list):
        return checked_messages(name, value)
    if isinstance(value, str) and DIALOGUE_TURN.match(value):
        return hh_turns(value)
    raise BadLineError(
        f"has neither 'prompt' nor 'messages', and {name} is no dialogue: {quote(value)}"
    )


def _export_pairs(choices: object, line: int, problems: Problems) -> list[PreferencePair]:
    if not isinstance(choices, list):
        raise BadLineError(f"choices is {quote(choices)}; must be a list")
    pairs: list[PreferencePair] = []
    for index, choice in enumerate(choices):
        texts = choice.get("text") if isinstance(choice, dict) else None
        if not isinstance(texts, dict):
            problems.add(f"choices[{index}] has no text; set [profiles] store_text to keep texts")
            continue
        present = {name: value for name, value in texts.items() if value is not None}
        with problems.at(line):
            # A choice without messages answers to nothing that is stored.
            pairs.append(_pair({"messages": [], **present}, line))
    return pairs


# --- pools ---


@dataclass(slots=True)
class _Ratings:
    """Lines with one rated answer each, grouped by their prompt."""

    groups: dict[str, list[tuple[Messages, str, float, str, int]]] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any], line: int) -> None:
        messages = read_prompt(record)
        if not any(name in record for name in ANSWERS):
            raise BadLineError(
                "has no field 'answer' or 'response', no 'answers', and no 'chosen' and "
                f"'rejected'; it has {', '.join(quote(name) for name in record)}"
            )
        text = read_answer("answer", required(record, *ANSWERS), messages)
        rating = read_rating(record)
        if rating is None:
            raise BadLineError("has no field 'rating'")
        key = json.dumps(messages, sort_keys=True)
        row = (messages, text, rating, read_model(record), line)
        self.groups.setdefault(key, []).append(row)

    def pools(self) -> list[AnswerPool]:
        pools: list[AnswerPool] = []
        for rows in self.groups.values():
            messages, texts, ratings, models, lines = zip(*rows, strict=True)
            names = models if any(models) else None
            pools.append(AnswerPool(messages[0], texts, ratings, names, lines[0]))
        return pools


def _pool(record: Mapping[str, Any], line: int) -> AnswerPool:
    messages = read_prompt(record)
    answers = required(record, "answers")
    if not isinstance(answers, list) or not answers:
        raise BadLineError(f"answers is {quote(answers)}; must be a list of answers")
    texts: list[str] = []
    ratings: list[float] = []
    models: list[str] = []
    for index, answer in enumerate(answers):
        name = f"answers[{index}]"
        fields = answer if isinstance(answer, dict) else {}
        if isinstance(answer, dict) and "text" not in answer and "content" not in answer:
            raise BadLineError(f"{name} has no field 'text'")
        texts.append(read_answer(name, fields.get("text", answer), messages))
        rating = read_rating(fields)
        if rating is not None:
            ratings.append(rating)
        models.append(read_model(fields))
    if ratings and len(ratings) < len(texts):
        raise BadLineError(f"{len(texts) - len(ratings)} of {len(texts)} answers have no rating")
    gold = tuple(ratings) or None
    return AnswerPool(messages, tuple(texts), gold, tuple(models) if any(models) else None, line)


def _pool_pairs(pool: AnswerPool, problems: Problems) -> list[PreferencePair]:
    """Return the pairs of a pool whose ratings and texts differ, or a sample of them."""
    if pool.gold is None:
        raise BadLineError("its answers have no rating")
    ratings, texts = pool.gold, pool.answers
    ordered: list[tuple[int, int]] = []
    for i, j in itertools.combinations(range(len(texts)), 2):
        if ratings[i] == ratings[j]:
            continue
        if texts[i] == texts[j]:
            problems.same_texts += 1
            continue
        ordered.append((i, j) if ratings[i] > ratings[j] else (j, i))
    if not ordered:
        raise BadLineError("has no two different answers with different ratings")
    if len(ordered) > MAX_POOL_PAIRS:
        problems.sampled += 1
        sample = np.random.default_rng(pool.line)
        rows = sample.choice(len(ordered), MAX_POOL_PAIRS, replace=False)
        ordered = [ordered[row] for row in sorted(rows)]
    return [PreferencePair(pool.messages, texts[i], texts[j], pool.line) for i, j in ordered]


def _sentences(problems: Problems) -> tuple[str, ...]:
    sentences = list(problems.sentences())
    if problems.sampled:
        sentences.append(
            f"{problems.sampled} prompts have more than {MAX_POOL_PAIRS} pairs of answers: "
            f"{MAX_POOL_PAIRS} of each are read"
        )
    if problems.same_texts:
        sentences.append(
            f"{problems.same_texts} pairs of rated answers have the same text and different "
            "ratings: they are left out"
        )
    return tuple(sentences)


def pair_remarks(pairs: Iterable[PreferencePair]) -> tuple[str, ...]:
    """Return sentences about pairs that occur more than once, in both orders, or are no choice."""
    pairs = tuple(pairs)
    texts = Counter((conversation_key(each.messages), each.chosen, each.rejected) for each in pairs)
    sentences: list[str] = []
    repeated = texts.total() - len(texts)
    if repeated:
        sentences.append(f"{repeated} pairs occur more than once; each occurrence counts")
    both = sum((key, rejected, chosen) in texts for key, chosen, rejected in texts) // 2
    if both:
        sentences.append(f"{both} pairs occur in both orders: their labels contradict each other")
    equal = sum(_in_words(each.chosen) == _in_words(each.rejected) for each in pairs)
    if equal:
        sentences.append(
            f"{equal} pairs differ in spaces, invisible characters or the encoding of letters "
            "alone: their labels say nothing about words"
        )
    return tuple(sentences)


def _in_words(text: str) -> str:
    """Return a text in one encoding of its letters, with single spaces."""
    visible = [letter for letter in text if unicodedata.category(letter) != "Cf"]
    return " ".join(unicodedata.normalize("NFC", "".join(visible)).split())


def pool_remarks(pools: Sequence[AnswerPool]) -> tuple[str, ...]:
    """Return sentences about pools whose answers cannot be compared, or occur more than once."""
    single = repeated = equal = 0
    for pool in pools:
        different = len(set(pool.answers))
        single += different == 1
        repeated += 1 < different < len(pool.answers)
        equal += different > 1 and pool.gold is not None and len(set(pool.gold)) == 1
    conversations = len({conversation_key(pool.messages) for pool in pools})
    counts = {
        "have no two different answers, so that nothing in them can be compared": single,
        "have an answer more than once; each occurrence counts": repeated,
        "have the same rating for all answers, so that none is better": equal,
        "have the conversation of an earlier one; each of them counts": len(pools) - conversations,
    }
    return tuple(f"{n} of {len(pools)} pools {text}" for text, n in counts.items() if n)


def count_prompts(pairs: Iterable[PreferencePair]) -> int:
    """Return the number of different conversations that pairs answer."""
    return len({conversation_key(pair.messages) for pair in pairs})


def conversation_key(messages: Messages) -> str:
    """Return a text that is equal for equal conversations. Pairs of one key are not independent.

    Conversations that differ in spaces and line ends alone are equal.
    """
    turns: list[list[object]] = []
    for message in messages:
        role, text = plain(message)
        turns.append([role, " ".join(text.split())])
    return json.dumps(turns)
