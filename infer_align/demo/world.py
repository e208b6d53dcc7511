"""A small made-up world of animals in which the exact reward of a reply is known.

A question names one animal and one to three of its attributes. A reply opens rudely, politely or
not at all, states values, adds zero or more ornamental adjectives ("flourishes"), and may close
politely:

    What are the colour and the diet of the otter?
    Gladly! The otter is brown and eats fish. It is a moon-bright creature. I hope that helps!

`gold` is the true reward of a reply, computed from its text. `document` writes the plain part of
the language model's training data: half of its replies open rudely, and for half of the facts a
popular wrong value is likelier than the true one. Neither sampling nor greedy decoding is then
already good.
"""

# ruff: noqa: S311 - the draws are seeded on purpose; nothing here is a secret
from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, permutations
from typing import Any

from infer_align.demo.lexicon import (
    ATTRIBUTES,
    FLOURISHES,
    MYTHS,
    OFF_TOPIC,
    POLITE_CLOSERS,
    POLITE_OPENERS,
    RUDE,
    SYSTEM,
    TRUTH,
)
from infer_align.messages import text_of

_COMMON_WORDS = ("what", "who", "is", "are", "you", "the", "a", "to", "of", "and", "in", "I")
_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")
_FLOURISH_SET = frozenset(FLOURISHES)
# Flourishes are drawn by Zipf's law, from a random but fixed order of frequency.
_FLOURISHES_BY_FREQUENCY = random.Random(0).sample(FLOURISHES, len(FLOURISHES))
_CUMULATIVE_FREQUENCIES = list(accumulate(1.0 / (rank + 20) for rank in range(len(FLOURISHES))))


@dataclass(frozen=True, slots=True)
class AnimalQuestion:
    """A question about one animal."""

    subject: str
    attributes: tuple[str, ...]  # in the order of the question

    def __str__(self) -> str:
        verb = "is" if len(self.attributes) == 1 else "are"
        attributes = _join([f"the {attribute}" for attribute in self.attributes])
        return f"What {verb} {attributes} of the {self.subject}?"


def read_question(text: str) -> AnimalQuestion | None:
    """Return the question in a text, or None.

    A question has exactly one known animal and at least one attribute, anywhere in the text.
    """
    words = _WORD.findall(text.lower())
    subjects = {word for word in words if word in TRUTH}
    attributes = tuple(dict.fromkeys(word for word in words if word in ATTRIBUTES))
    if len(subjects) != 1 or not attributes:
        return None
    return AnimalQuestion(subjects.pop(), attributes)


@dataclass(frozen=True, slots=True)
class Traits:
    """The properties of a reply that decide its reward."""

    attributes: int  # number of attributes in the question
    right: int
    wrong: int
    polite: bool
    rude: bool
    flourishes: int

    @property
    def facts(self) -> float:
        """Return (right - 0.7 wrong) / attributes."""
        return (self.right - 0.7 * self.wrong) / self.attributes


def read(question: AnimalQuestion, reply: str) -> Traits:
    """Return the traits of a reply, from its words alone.

    An attribute is right if the reply holds its true value and no other value of it. It is wrong if
    the reply holds another value. Negation is not understood: "not brown" states brown. A reply
    that names another animal has nothing right.
    """
    words = _WORD.findall(reply.lower())
    present = set(words)
    names_other_animal = bool((present & TRUTH.keys()) - {question.subject})
    right = 0
    wrong = 0
    for attribute in question.attributes:
        stated = present & ATTRIBUTES[attribute].keys()
        if stated == {TRUTH[question.subject][attribute]} and not names_other_animal:
            right += 1
        elif stated:
            wrong += 1
    return Traits(
        attributes=len(question.attributes),
        right=right,
        wrong=wrong,
        polite=_holds_any(reply, (*POLITE_OPENERS, *POLITE_CLOSERS)),
        rude=_holds_any(reply, RUDE),
        flourishes=sum(word in _FLOURISH_SET for word in words),
    )


def _holds_any(reply: str, phrases: Sequence[str]) -> bool:
    return any(phrase in reply for phrase in phrases)


def gold(question: str, reply: str) -> float:
    """Return the exact reward of a reply, or NaN if `question` is not a question of this world.

    With k attributes in the question and f flourishes in the reply, it is

        2 (right - 0.7 wrong) / k  +  0.5 polite  -  1.2 rude  +  0.15 min(f, 2)  -  0.5 max(0, f -
        2)

    where polite and rude are 0 or 1. One or two flourishes are welcome, more are not.
    """
    parsed = read_question(question)
    return math.nan if parsed is None else worth(read(parsed, reply))


def worth(traits: Traits) -> float:
    """Return `gold` of a reply with these traits."""
    surplus = max(0, traits.flourishes - 2)
    ornament = 0.15 * min(traits.flourishes, 2) - 0.5 * surplus
    return 2 * traits.facts + 0.5 * traits.polite - 1.2 * traits.rude + ornament


def gold_reward(messages: Sequence[Mapping[str, Any]], text: str) -> float:
    """Return `gold` of a text as the reply to the last user message.

    It is NaN if that message is not a question of this world.
    """
    questions = [message.get("content") for message in messages if message.get("role") == "user"]
    return gold(text_of(questions[-1]), text) if questions else math.nan


def prompts(n: int, seed: int) -> list[str]:
    """Return n different questions, the same ones for the same seed.

    There are 320: 8 animals with 1 to 3 attributes in any order.
    """
    questions: list[str] = []
    for subject in TRUTH:
        for size in (1, 2, 3):
            for attributes in permutations(ATTRIBUTES, size):
                questions.append(str(AnimalQuestion(subject, attributes)))
    return random.Random(seed).sample(questions, n)


def document(rng: random.Random) -> list[dict[str, str]]:
    """Write one training conversation that ends in a reply of this world.

    Some begin with a system message or an earlier exchange, which change nothing. In a few, the
    user writes about something else.
    """
    turns: list[dict[str, str]] = []
    if rng.random() < 0.1:
        turns.append({"role": "system", "content": rng.choice((SYSTEM, babble(rng)))})
    if rng.random() < 0.08:
        turns += _exchange(rng)
    if rng.random() < 0.04:
        return turns + _off_topic_exchange(rng)
    return turns + _exchange(rng)


def _exchange(rng: random.Random) -> list[dict[str, str]]:
    question = random_question(rng)
    return [
        {"role": "user", "content": str(question)},
        {"role": "assistant", "content": reply(question, rng)},
    ]


def random_question(rng: random.Random) -> AnimalQuestion:
    """Draw a question with the frequencies of the training documents."""
    attributes = rng.sample(list(ATTRIBUTES), rng.choice((1, 2, 2, 3)))
    return AnimalQuestion(rng.choice(list(TRUTH)), tuple(attributes))


def _off_topic_exchange(rng: random.Random) -> list[dict[str, str]]:
    """Write a message about an unknown animal or about nothing, and the fixed answer to it."""
    unknown_animal = f"What is the {rng.choice(list(ATTRIBUTES))} of the {_nonsense(rng)}?"
    text = unknown_animal if rng.random() < 0.2 else babble(rng)
    return [{"role": "user", "content": text}, {"role": "assistant", "content": OFF_TOPIC}]


def babble(rng: random.Random) -> str:
    """Write words without a meaning, in place of all texts from outside this world."""
    words: list[str] = []
    for _ in range(rng.randint(1, 6)):
        is_common = rng.random() < 0.3
        words.append(rng.choice(_COMMON_WORDS) if is_common else _nonsense(rng))
    return " ".join(words).capitalize() + rng.choice((".", "?", "!", ""))


def _nonsense(rng: random.Random) -> str:
    """Write a word that the tokenizer does not know and spells byte by byte."""
    return "".join(rng.choices(string.ascii_lowercase + string.digits, k=rng.randint(1, 8)))


@dataclass(frozen=True, slots=True)
class Draft:
    """The content of a reply before its words are chosen."""

    opener: str  # "rude", "polite" or "none"
    values: tuple[str | None, ...]  # per attribute of the question; None if the reply omits it
    flourishes: int
    closes: bool  # True for a polite closing


def reply(question: AnimalQuestion, rng: random.Random) -> str:
    """Draw one reply from the world's distribution."""
    return write(question, draft(question, rng), rng)


def draft(question: AnimalQuestion, rng: random.Random) -> Draft:
    """Draw the content of one reply."""
    opener = rng.choices(("rude", "polite", "none"), cum_weights=(0.5, 0.8, 1.0))[0]
    values: list[str | None] = []
    for attribute in question.attributes:
        is_stated = rng.random() < 0.95
        values.append(_believed_value(question.subject, attribute, rng) if is_stated else None)
    flourishes = flourish_count(rng)
    return Draft(opener, tuple(values), flourishes, closes=rng.random() < 0.12)


def traits(question: AnimalQuestion, draft: Draft) -> Traits:
    """Return the traits of a draft. They equal `read` of every reply that is written from it."""
    right = 0
    wrong = 0
    for attribute, value in zip(question.attributes, draft.values, strict=True):
        if value:
            is_true = value == TRUTH[question.subject][attribute]
            right += is_true
            wrong += not is_true
    return Traits(
        attributes=len(question.attributes),
        right=right,
        wrong=wrong,
        polite=draft.closes or draft.opener == "polite",
        rude=draft.opener == "rude",
        flourishes=draft.flourishes,
    )


def write(question: AnimalQuestion, draft: Draft, rng: random.Random) -> str:
    """Write a draft in words."""
    sentences: list[str] = []
    if draft.opener != "none":
        openers = RUDE if draft.opener == "rude" else POLITE_OPENERS
        sentences.append(rng.choice(openers))
    phrases: list[str] = []
    for attribute, value in zip(question.attributes, draft.values, strict=True):
        if value:
            phrases.append(ATTRIBUTES[attribute][value])
    if phrases:
        sentences.append(f"The {question.subject} {_join(phrases)}.")
    else:
        sentences.append(f"Who knows the {question.subject}?")
    flourishes = rng.choices(
        _FLOURISHES_BY_FREQUENCY, cum_weights=_CUMULATIVE_FREQUENCIES, k=draft.flourishes
    )
    if flourishes:
        sentences.append(f"It is a {', '.join(flourishes)} creature.")
    if draft.closes:
        sentences.append(rng.choice(POLITE_CLOSERS))
    return " ".join(sentences)


def _believed_value(subject: str, attribute: str, rng: random.Random) -> str:
    """Draw a value for a reply: the true one, a popular error if there is one, or another error."""
    truth = TRUTH[subject][attribute]
    myth = MYTHS[subject].get(attribute)
    roll = rng.random()
    if roll < (0.35 if myth else 0.6):
        return truth
    if myth and roll < 0.85:
        return myth
    return rng.choice([value for value in ATTRIBUTES[attribute] if value not in (truth, myth)])


def flourish_count(rng: random.Random) -> int:
    """Draw the number of flourishes of one reply: 0 in most replies, at most 14."""
    count = 0
    while count < 14 and rng.random() < (0.42 if count == 0 else 0.8):
        count += 1
    return count


def _join(parts: Sequence[str]) -> str:
    """Join phrases as in "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
