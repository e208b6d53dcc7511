"""Let a language model judge answers: one prompt per reading, all prompts at once.

A prompt that fails, or that the judge refuses, gives a judgement with an error. It fails nothing
else.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer_align.decoding.labels import LabelLogprobs, LabelQuery
from infer_align.engines import Engine
from infer_align.errors import AlignError
from infer_align.rewards import CALL_SHARE, time_budget
from infer_align.rewards.trust_judge.judgement import (
    Judgement,
    label_probabilities,
    refusal,
    usage_of,
    usage_of_labels,
)
from infer_align.rewards.trust_judge.prompts import (
    BETTER,
    SCORE,
    SIDES,
    labels,
    pair_messages,
    score_messages,
)
from infer_align.rewards.trust_judge.readings import Reading, mass
from infer_align.rewards.trust_judge.votes import Ballot, vote
from infer_align.types import Candidate, Draw, Messages, ScoringUsage


@dataclass(frozen=True, slots=True)
class Judge:
    """A language model and the way it is prompted."""

    engine: Engine
    criteria: str
    critique_tokens: int = 0  # maximum length of a critique before the label; 0 for no critique
    critique_logprobs: bool = False  # True if the log-probability of the critique is needed
    min_mass: float = 0.0  # less probability than this on valid labels is a refusal
    votes: int = 1  # number of critiques with a verdict each; 1 reads probabilities instead

    async def scores(
        self, messages: Messages, answers: Sequence[str], scale: int
    ) -> list[Judgement]:
        """Return one judgement per answer, with the labels 1..scale."""
        valid = labels(scale)
        tasks: list[Coroutine[Any, Any, Judgement]] = []
        for answer in answers:
            prompt = score_messages(
                messages,
                answer,
                scale,
                self.criteria,
                critique=self.critique_tokens > 0,
                controls=self.engine.control_tokens,
                system_role=self.engine.has_system_role,
            )
            tasks.append(self._judge(prompt, SCORE, valid))
        return await asyncio.gather(*tasks)

    async def comparisons(
        self, messages: Messages, answers: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> list[tuple[Judgement, Judgement]]:
        """Return two judgements per pair (i, j), with the labels A, B, C.

        The first judgement is of the prompt that shows answer i first, the second of the prompt
        that shows answer j first.
        """
        orders: list[tuple[int, int]] = []
        for i, j in pairs:
            orders += [(i, j), (j, i)]
        tasks: list[Coroutine[Any, Any, Judgement]] = []
        for first, second in orders:
            prompt = pair_messages(
                messages,
                answers[first],
                answers[second],
                self.criteria,
                critique=self.critique_tokens > 0,
                controls=self.engine.control_tokens,
                system_role=self.engine.has_system_role,
            )
            tasks.append(self._judge(prompt, BETTER, SIDES))
        judgements = await asyncio.gather(*tasks)
        return list(zip(judgements[::2], judgements[1::2], strict=True))

    async def _judge(
        self, messages: list[dict[str, Any]], prefix: str, valid: tuple[str, ...]
    ) -> Judgement:
        """Judge one prompt within the time budget of the scoring that runs now."""
        seconds = CALL_SHARE * time_budget.get()
        try:
            async with asyncio.timeout(seconds if math.isfinite(seconds) else None):
                if self.votes > 1:
                    return await vote(self.engine, self._ballot(messages, prefix, valid))
                return await self._read(messages, prefix, valid)
        except TimeoutError:
            return Judgement(None, error=f"the judge did not answer within {seconds:.3g} s")

    def _ballot(
        self, messages: list[dict[str, Any]], prefix: str, valid: tuple[str, ...]
    ) -> Ballot:
        return Ballot(messages, prefix, valid, self.votes, self.critique_tokens, self.min_mass)

    async def _read(
        self, messages: list[dict[str, Any]], prefix: str, valid: tuple[str, ...]
    ) -> Judgement:
        """Let the judge write its critique, if it writes one, and read the labels that follow."""
        spent = ScoringUsage()
        written = ""
        logprob = 0.0
        try:
            if self.critique_tokens:
                critique = await self._critique(messages, prefix)
                spent = usage_of(critique)
                if critique.error is not None:
                    return Judgement(None, error=critique.error, spent=spent)
                written = critique.text.rstrip() + "\n"
                logprob = _logprob(critique)
            answer = await self.engine.read_labels(LabelQuery(messages, written + prefix, valid))
        except AlignError as error:
            return Judgement(None, error=error.message, spent=spent)
        # The critique's tokens, and one for the label.
        tokens = spent.judge_completion_tokens + 1
        spent += usage_of_labels(answer)
        return self._judgement(answer, valid, logprob, tokens, spent)

    def _judgement(
        self,
        answer: LabelLogprobs,
        valid: tuple[str, ...],
        logprob: float,
        tokens: int,
        spent: ScoringUsage,
    ) -> Judgement:
        """Turn label log-probabilities into a judgement.

        Args:
            answer: the log-probabilities of the labels.
            valid: the labels that were allowed.
            logprob: log-probability of the text before the label, in nats.
            tokens: tokens of that text, and one for the label.
            spent: the usage of all calls for this judgement.
        """
        probs = label_probabilities(answer)
        share = mass(probs, valid)
        if not probs or share < self.min_mass:
            return Judgement(None, share, refusal(share), spent)
        # The likeliest label stands first. It is what the judge would have written.
        label_logprob = math.log(probs[0][1])
        reading = Reading(probs, logprob + label_logprob, tokens)
        return Judgement(reading, share, None, spent)

    async def _critique(self, messages: list[dict[str, Any]], stop: str) -> Candidate:
        """Generate a critique greedily, up to the text before the label."""
        body: dict[str, Any] = {
            "messages": messages,
            "max_tokens": self.critique_tokens,
            "stop": [stop],
            "temperature": 0,
        }
        if self.critique_logprobs:
            body["logprobs"] = True
        [candidate] = await self.engine.generate(Draw(body, 1, (0,)))
        return candidate


def _logprob(critique: Candidate) -> float:
    """Return the log-probability of a critique in nats, or 0 if the engine does not report it."""
    logprobs: Mapping[str, Any] = critique.choice.get("logprobs") or {}
    return math.fsum(token["logprob"] for token in logprobs.get("content") or ())
