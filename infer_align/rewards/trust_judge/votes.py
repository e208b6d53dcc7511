"""Let a reasoning judge vote: sample several critiques, and read the verdict after each.

    5 critiques -> verdicts A, A, B, A, C -> A 0.6, B 0.2, C 0.2

The shares of the votes stand where the probabilities of labels stand without votes, so that scores,
relations and win probabilities follow as usual. A critique that fails, and a verdict that the judge
refuses, is no vote.

Source: "Think-RM" (2505.16265), whose judge reasons at length and decides by the majority.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from infer_align.decoding.labels import LabelQuery
from infer_align.engines import Engine
from infer_align.errors import AlignError
from infer_align.rewards.trust_judge.judgement import (
    Judgement,
    label_probabilities,
    refusal,
    usage_of,
    usage_of_labels,
)
from infer_align.rewards.trust_judge.readings import Reading, mass
from infer_align.types import Candidate, Draw, ScoringUsage

# Verdicts are sampled from the judge's own distribution.
TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class Ballot:
    """One prompt on which a judge votes."""

    messages: list[dict[str, Any]]
    prefix: str  # the text before the label
    valid: tuple[str, ...]
    votes: int
    critique_tokens: int  # maximum length of each critique
    min_mass: float  # less probability than this on valid labels is a refusal


@dataclass(frozen=True, slots=True)
class _Vote:
    label: str | None  # None: no vote, for the reason in `error`
    mass: float = 0.0
    error: str | None = None
    spent: ScoringUsage = field(default_factory=ScoringUsage)


async def vote(engine: Engine, ballot: Ballot) -> Judgement:
    """Return the shares of the votes as a judgement.

    The seeds are fixed, so that the same prompt gets the same votes.
    """
    body: dict[str, Any] = {
        "messages": ballot.messages,
        "max_tokens": ballot.critique_tokens,
        "stop": [ballot.prefix],
        "temperature": TEMPERATURE,
    }
    draw = Draw(body, ballot.votes, tuple(range(ballot.votes)))
    try:
        critiques = await engine.generate(draw)
    except AlignError as error:
        return Judgement(None, error=error.message)
    votes = await asyncio.gather(*(_vote(engine, ballot, critique) for critique in critiques))
    return _count(votes)


async def _vote(engine: Engine, ballot: Ballot, critique: Candidate) -> _Vote:
    """Read the verdict after one critique."""
    spent = usage_of(critique)
    if critique.error is not None:
        return _Vote(None, error=critique.error, spent=spent)
    written = critique.text.rstrip() + "\n"
    try:
        query = LabelQuery(ballot.messages, written + ballot.prefix, ballot.valid)
        answer = await engine.read_labels(query)
    except AlignError as error:
        return _Vote(None, error=error.message, spent=spent)
    spent += usage_of_labels(answer)
    probabilities = label_probabilities(answer)
    share = mass(probabilities, ballot.valid)
    valid = [label for label, _ in probabilities if label in ballot.valid]
    if not valid or share < ballot.min_mass:
        return _Vote(None, share, refusal(share), spent)
    return _Vote(valid[0], share, None, spent)


def _count(votes: Sequence[_Vote]) -> Judgement:
    """Return the shares of the labels among the votes that were given, most frequent first.

    If there is no such vote, the judgement has the error of the first one.
    """
    spent = sum((vote.spent for vote in votes), ScoringUsage())
    valid = [vote for vote in votes if vote.label is not None]
    if not valid:
        return Judgement(None, error=votes[0].error, spent=spent)
    counts = Counter(str(vote.label) for vote in valid)
    shares: list[tuple[str, float]] = []
    for label, count in counts.most_common():
        shares.append((label, count / len(valid)))
    mean_mass = sum(vote.mass for vote in valid) / len(valid)
    return Judgement(Reading(shares), mean_mass, None, spent)
