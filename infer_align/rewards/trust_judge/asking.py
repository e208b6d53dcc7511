"""Asking a judge: one reading per question, all at once; what it could not or would not say is data, not a failure."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infer_align.errors import AlignError
from infer_align.rewards import CALL_SHARE, time_budget
from infer_align.rewards.trust_judge.prompts import (
    BETTER,
    SCORE,
    SIDES,
    labels,
    pair_messages,
    score_messages,
)
from infer_align.rewards.trust_judge.readings import Reading, mass
from infer_align.types import Candidate, Draw, LabelQuery, LabelReader, Messages, ScoringUsage


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of one question."""

    reading: Reading | None  # None: there is nothing to read, and `error` says why
    mass: float = 0.0  # of the probability, on valid labels
    error: str | None = None
    spent: ScoringUsage = field(default_factory=ScoringUsage)


@dataclass(frozen=True, slots=True)
class Judge:
    """A model and how it is asked."""

    engine: LabelReader
    criteria: str
    critique_tokens: int = 0  # of a critique before the label; 0 for none
    critique_logprobs: bool = False  # whether it is to be known how likely the critique was
    min_mass: float = 0.0  # less than this on valid labels is a refusal

    async def scores(
        self, messages: Messages, answers: Sequence[str], scale: int
    ) -> list[Judgement]:
        """One judgement per answer, with the labels 1..scale."""
        how: Any = {"critique": self.critique_tokens > 0, "controls": self.engine.control_tokens}
        prompts = [
            score_messages(messages, answer, scale, self.criteria, **how) for answer in answers
        ]
        return await asyncio.gather(
            *(self._ask(prompt, SCORE, labels(scale)) for prompt in prompts)
        )

    async def comparisons(
        self, messages: Messages, answers: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> list[tuple[Judgement, Judgement]]:
        """Per pair (i, j) two judgements with the labels A, B, C: i shown first, then j shown first."""
        how: Any = {"critique": self.critique_tokens > 0, "controls": self.engine.control_tokens}
        orders = [order for i, j in pairs for order in ((i, j), (j, i))]
        prompts = [
            pair_messages(messages, answers[a], answers[b], self.criteria, **how) for a, b in orders
        ]
        found = await asyncio.gather(*(self._ask(prompt, BETTER, SIDES) for prompt in prompts))
        return list(zip(found[::2], found[1::2], strict=True))

    async def _ask(
        self, messages: list[dict[str, Any]], prefix: str, among: tuple[str, ...]
    ) -> Judgement:
        allowed = CALL_SHARE * time_budget.get()
        try:
            async with asyncio.timeout(allowed if math.isfinite(allowed) else None):
                return await self._read(messages, prefix, among)
        except TimeoutError:
            return Judgement(None, error=f"the judge did not answer within {allowed:.3g} s")

    async def _read(
        self, messages: list[dict[str, Any]], prefix: str, among: tuple[str, ...]
    ) -> Judgement:
        spent, said, likely = ScoringUsage(), "", 0.0
        try:
            if self.critique_tokens:
                critique = await self._critique(messages, prefix)
                spent = ScoringUsage(
                    0, critique.calls, critique.prompt_tokens, critique.completion_tokens
                )
                if critique.error is not None:
                    return Judgement(None, error=critique.error, spent=spent)
                said, likely = critique.text.rstrip() + "\n", _logprob(critique)
            found = await self.engine.read_labels(LabelQuery(messages, said + prefix, among))
        except AlignError as error:
            return Judgement(None, error=error.message, spent=spent)
        spent += ScoringUsage(
            0, found.calls, found.prompt_tokens, found.calls
        )  # each call samples one token
        probs = sorted(
            ((label, math.exp(p)) for label, p in found.logprobs.items() if p > -math.inf),
            key=lambda item: -item[1],
        )
        if not probs or (shown := mass(probs, among)) < self.min_mass:
            share = mass(probs, among)
            return Judgement(
                None,
                share,
                f"the judge gave its labels {share:.2g} of the probability: a refusal",
                spent,
            )
        tokens = spent.judge_completion_tokens - found.calls + 1
        return Judgement(Reading(probs, likely + math.log(probs[0][1]), tokens), shown, None, spent)

    async def _critique(self, messages: list[dict[str, Any]], marker: str) -> Candidate:
        body: dict[str, Any] = {
            "messages": messages,
            "max_tokens": self.critique_tokens,
            "stop": [marker],
            "temperature": 0,
        }
        if self.critique_logprobs:
            body["logprobs"] = True
        [candidate] = await self.engine.generate(Draw(body, 1, (0,)))
        return candidate


def _logprob(critique: Candidate) -> float:
    """How likely a critique was, in nats; 0 where it is not known."""
    logprobs: Mapping[str, Any] = critique.choice.get("logprobs") or {}
    return math.fsum(token["logprob"] for token in logprobs.get("content") or ())
