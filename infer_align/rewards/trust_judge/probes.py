"""Probes: answers of known worth, by which a generated rubric is checked if there are no labels.

    the real answer     what the judge itself answers to the conversation
    null answers        "I do not know." and a text that says nothing

A rubric by which a null answer is as good as the real one cannot choose between candidates: it
would return the emptiest one. This finds texts that are no rubric at all, such as an answer to the
question, because the judge then gives all answers about the same score.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from infer_align.errors import AlignError
from infer_align.rewards.trust_judge.criteria import Objective
from infer_align.rewards.trust_judge.judgement import usage_of
from infer_align.rewards.trust_judge.principles import Reader
from infer_align.rewards.trust_judge.readings import rescale
from infer_align.types import Draw, Messages, ScoringUsage

NULL_ANSWERS = ("I do not know.", "Asdf qwer zxcv.")
PROBES = 1 + len(NULL_ANSWERS)
# Maximum length of the judge's own answer.
PROBE_TOKENS = 128
# Scores that differ by less than this, on 1..5, count as equal.
MIN_LEAD = 0.05


@dataclass(frozen=True, slots=True)
class ProbeScores:
    """The scores of the probes by one rubric, on 1..5."""

    answer: float = 0.0  # of the judge's own answer
    nulls: tuple[float, ...] = ()  # of each of `NULL_ANSWERS`
    error: str | None = None  # why there are no scores; None if there are
    spent: ScoringUsage = field(default_factory=ScoringUsage)

    @property
    def problem(self) -> str | None:
        """Return the reason why the rubric cannot be used; None if it prefers the real answer."""
        if self.error is not None:
            return f"it could not be tried on an answer: {self.error}"
        highest = max(self.nulls)
        if self.answer - highest >= MIN_LEAD:
            return None
        null = NULL_ANSWERS[self.nulls.index(highest)]
        return (
            f"judging by it, an answer gets {self.answer:.2f} of 5 and {null!r} gets {highest:.2f}"
        )


async def probe(reader: Reader, messages: Messages, objective: Objective) -> ProbeScores:
    """Let the judge answer the conversation, and judge this answer beside null answers."""
    body = {"messages": messages, "max_tokens": PROBE_TOKENS, "temperature": 0}
    try:
        [candidate] = await reader.judge.engine.generate(Draw(body, 1, (0,)))
    except AlignError as error:
        return ProbeScores(error=error.message)
    spent = usage_of(candidate)
    if candidate.error is not None:
        return ProbeScores(error=candidate.error, spent=spent)
    ratings = await reader.rate(messages, (candidate.text, *NULL_ANSWERS), objective)
    spent += ratings.spent
    errors = [error for error in ratings.errors if error is not None]
    if errors:
        return ProbeScores(error=errors[0], spent=spent)
    answer, *nulls = (rescale(score, reader.scale) for score in ratings.scores)
    return ProbeScores(answer, tuple(nulls), spent=spent)
