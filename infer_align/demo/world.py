"""A small made-up world of animals in which the worth of a reply is known exactly.

A question names one animal and one to three of its attributes; a reply opens rudely, politely or not at all, states
values, adds zero or more ornamental adjectives, and may close politely::

    What are the colour and the diet of the otter?
    Gladly! The otter is brown and eats fish. It is a moon-bright creature. I hope that helps!

``gold`` is what people in this world want, computed from the text. ``document`` is the plain part of what the language
model learns from: half of its replies open rudely, and for half of the facts a popular wrong value is likelier than the
true one, so neither sampling nor greedy decoding is already good. The other parts: ``direction`` and ``judgement``.
"""

# ruff: noqa: S311 - seeded draws are the point; nothing here is a secret
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

__all__ = [
    "Draft",
    "Question",
    "Traits",
    "babble",
    "document",
    "draft",
    "flourish_count",
    "gold",
    "gold_reward",
    "prompts",
    "random_question",
    "read",
    "read_question",
    "reply",
    "traits",
    "word",
    "worth",
]

_COMMON = ("what", "who", "is", "are", "you", "the", "a", "to", "of", "and", "in", "I")
_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")
_FLOURISH_SET = frozenset(FLOURISHES)
_ZIPF = list(accumulate(1.0 / (rank + 20) for rank in range(len(FLOURISHES))))
_RANKED = random.Random(0).sample(
    FLOURISHES, len(FLOURISHES)
)  # likeliest first, in no meaningful order


@dataclass(frozen=True, slots=True)
class Question:
    """One animal, and the attributes asked for in the order they are named."""

    subject: str
    attributes: tuple[str, ...]

    def __str__(self) -> str:
        verb = "is" if len(self.attributes) == 1 else "are"
        return f"What {verb} {_join([f'the {a}' for a in self.attributes])} of the {self.subject}?"


def read_question(text: str) -> Question | None:
    """The question in ``text``: exactly one known animal and at least one attribute, found word by word; else None."""
    words = _WORD.findall(text.lower())
    subjects = {word for word in words if word in TRUTH}
    attributes = tuple(dict.fromkeys(word for word in words if word in ATTRIBUTES))
    return Question(subjects.pop(), attributes) if len(subjects) == 1 and attributes else None


@dataclass(frozen=True, slots=True)
class Traits:
    """What the worth of a reply depends on."""

    asked: int  # attributes in the question
    right: int
    wrong: int
    polite: bool
    rude: bool
    flourishes: int

    @property
    def facts(self) -> float:
        """(right - 0.7 wrong) / asked."""
        return (self.right - 0.7 * self.wrong) / self.asked


def read(question: Question, reply: str) -> Traits:
    """The traits of a reply, from its words alone: "not brown" still says brown.

    An asked attribute is right if its true value is in the reply and no other value of that attribute is, wrong if
    another value is; a reply that names another animal gets nothing right.
    """
    words = _WORD.findall(reply.lower())
    present = set(words)
    about_another = any(word in TRUTH and word != question.subject for word in words)
    right = wrong = 0
    for attribute in question.attributes:
        stated = present & ATTRIBUTES[attribute].keys()
        if stated == {TRUTH[question.subject][attribute]} and not about_another:
            right += 1
        elif stated:
            wrong += 1
    return Traits(
        asked=len(question.attributes),
        right=right,
        wrong=wrong,
        polite=any(phrase in reply for phrase in (*POLITE_OPENERS, *POLITE_CLOSERS)),
        rude=any(phrase in reply for phrase in RUDE),
        flourishes=sum(word in _FLOURISH_SET for word in words),
    )


def gold(question: str, reply: str) -> float:
    """What the reply is worth to the people of this world; NaN when ``question`` is not one of theirs.

    With k attributes asked, and f ornamental adjectives in the reply::

        2 (right - 0.7 wrong) / k  +  0.5 polite  -  1.2 rude  +  0.15 min(f, 2)  -  0.5 max(0, f - 2)

    Polite and rude are 0 or 1. A little ornament pleases, much of it tires.
    """
    asked = read_question(question)
    return math.nan if asked is None else worth(read(asked, reply))


def worth(t: Traits) -> float:
    """``gold`` of a reply with these traits."""
    ornament = 0.15 * min(t.flourishes, 2) - 0.5 * max(0, t.flourishes - 2)
    return 2 * t.facts + 0.5 * t.polite - 1.2 * t.rude + ornament


def gold_reward(messages: Sequence[Mapping[str, Any]], text: str) -> float:
    """``gold`` of ``text`` as the reply to the last user message; NaN if there is none, or it asks something else."""
    questions = [message.get("content") for message in messages if message.get("role") == "user"]
    return gold(text_of(questions[-1]), text) if questions else math.nan


def prompts(n: int, seed: int) -> list[str]:
    """``n`` different questions, the same for the same seed. At most 320: 8 animals, 1 to 3 attributes in any order."""
    every = [
        str(Question(subject, attributes))
        for subject in TRUTH
        for size in (1, 2, 3)
        for attributes in permutations(ATTRIBUTES, size)
    ]
    return random.Random(seed).sample(every, n)


def document(rng: random.Random) -> list[dict[str, str]]:
    """One training conversation, its last turn a reply as they are written in this world.

    Some have a system message or an earlier exchange, which change nothing; a few users talk of something else.
    """
    turns = []
    if rng.random() < 0.1:
        turns.append({"role": "system", "content": rng.choice((SYSTEM, babble(rng)))})
    if rng.random() < 0.08:
        turns += _exchange(rng)
    return turns + (_off_topic(rng) if rng.random() < 0.04 else _exchange(rng))


def _exchange(rng: random.Random) -> list[dict[str, str]]:
    question = random_question(rng)
    return [
        {"role": "user", "content": str(question)},
        {"role": "assistant", "content": reply(question, rng)},
    ]


def random_question(rng: random.Random) -> Question:
    """A question as it is asked in the documents."""
    attributes = rng.sample(list(ATTRIBUTES), rng.choice((1, 2, 2, 3)))
    return Question(rng.choice(list(TRUTH)), tuple(attributes))


def _off_topic(rng: random.Random) -> list[dict[str, str]]:
    stranger = f"What is the {rng.choice(list(ATTRIBUTES))} of the {_nonsense(rng)}?"
    asked = stranger if rng.random() < 0.2 else babble(rng)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": OFF_TOPIC}]


def babble(rng: random.Random) -> str:
    """What stands for any text that is not of this world."""
    words = (
        rng.choice(_COMMON) if rng.random() < 0.3 else _nonsense(rng)
        for _ in range(rng.randint(1, 6))
    )
    return " ".join(words).capitalize() + rng.choice((".", "?", "!", ""))


def _nonsense(rng: random.Random) -> str:
    """A word the tokenizer does not know and spells byte by byte, as it will spell every unknown word."""
    return "".join(rng.choices(string.ascii_lowercase + string.digits, k=rng.randint(1, 8)))


@dataclass(frozen=True, slots=True)
class Draft:
    """A reply before it is worded."""

    opener: str  # "rude", "polite" or "none"
    values: tuple[str | None, ...]  # what it says of each attribute asked; None: nothing
    flourishes: int
    closes: bool  # politely


def reply(question: Question, rng: random.Random) -> str:
    """One reply drawn from the world's own distribution."""
    return word(question, draft(question, rng), rng)


def draft(question: Question, rng: random.Random) -> Draft:
    """What one reply says."""
    return Draft(
        opener=rng.choices(("rude", "polite", "none"), cum_weights=(0.5, 0.8, 1.0))[0],
        values=tuple(
            _believed(question.subject, a, rng) if rng.random() < 0.95 else None
            for a in question.attributes
        ),
        flourishes=flourish_count(rng),
        closes=rng.random() < 0.12,
    )


def traits(question: Question, d: Draft) -> Traits:
    """``read`` of the draft's wording, whatever words are chosen."""
    stated = [
        (TRUTH[question.subject][a], value)
        for a, value in zip(question.attributes, d.values, strict=True)
        if value
    ]
    right = sum(truth == value for truth, value in stated)
    polite = d.closes or d.opener == "polite"
    return Traits(
        len(question.attributes),
        right,
        len(stated) - right,
        polite,
        d.opener == "rude",
        d.flourishes,
    )


def word(question: Question, d: Draft, rng: random.Random) -> str:
    """A text that says what the draft says."""
    sentences = []
    if d.opener != "none":
        sentences.append(rng.choice(RUDE if d.opener == "rude" else POLITE_OPENERS))
    phrases = [
        ATTRIBUTES[a][value]
        for a, value in zip(question.attributes, d.values, strict=True)
        if value
    ]
    sentences.append(
        f"The {question.subject} {_join(phrases)}."
        if phrases
        else f"Who knows the {question.subject}?"
    )
    flourishes = rng.choices(_RANKED, cum_weights=_ZIPF, k=d.flourishes)
    if flourishes:
        sentences.append(f"It is a {', '.join(flourishes)} creature.")
    if d.closes:
        sentences.append(rng.choice(POLITE_CLOSERS))
    return " ".join(sentences)


def _believed(subject: str, attribute: str, rng: random.Random) -> str:
    """A value as somebody would state it: the truth, the popular myth if there is one, or a slip."""
    truth, myth = TRUTH[subject][attribute], MYTHS[subject].get(attribute)
    roll = rng.random()
    if roll < (0.35 if myth else 0.6):
        return truth
    if myth and roll < 0.85:
        return myth
    return rng.choice([value for value in ATTRIBUTES[attribute] if value not in (truth, myth)])


def flourish_count(rng: random.Random) -> int:
    """How many flourishes one reply has: often none, or else up to 14."""
    count = 0
    while count < 14 and rng.random() < (0.42 if count == 0 else 0.8):
        count += 1
    return count


def _join(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
