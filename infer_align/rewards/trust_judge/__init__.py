"""A judge as a reward: TrustJudge (2509.21117), read from the probabilities of its labels.

    messages, candidates ─ prompts.py ─▶ LabelQuery ─ engine ─▶ Reading (readings.py) ─▶ scores on 1..scale, rescaled to 1..5
                          two at a time, in both orders ─▶ relations (tournament.py) ─▶ win rates, cycles (consistency.py)

What the judge does not say is not scored: NaN, with the share of readings it was lost in. It is never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from infer_align.errors import ConfigError, Unsupported, nearest
from infer_align.methods.trust_judge import CRITERIA, Criteria
from infer_align.methods.trust_judge import TrustJudge as Asked
from infer_align.rewards import Reward, RewardScores
from infer_align.rewards.trust_judge.asking import Judge, Judgement
from infer_align.rewards.trust_judge.consistency import conflict_ratio, cycles, nontransitivity
from infer_align.rewards.trust_judge.prompts import SIDES, labels
from infer_align.rewards.trust_judge.readings import Reading, expected_score, relation, rescale
from infer_align.rewards.trust_judge.tournament import (
    Comparisons,
    most_readings,
    round_robin,
    swiss,
)
from infer_align.types import Candidate, Capability, LabelReader, Messages, ScoringUsage

__all__ = [
    "Reading",
    "TrustJudge",
    "TrustJudgeReward",
    "conflict_ratio",
    "expected_score",
    "nontransitivity",
    "plugin",
    "relation",
    "rescale",
]


@dataclass(frozen=True, slots=True)
class TrustJudge:
    """A language model that scores or compares candidates. `align.trust_judge` overrides what it names."""

    engine: str = field(
        default="served",
        metadata={"description": 'who judges: "served", or a name of `[engines.*]`'},
    )
    mode: Literal["score", "pairwise"] = field(
        default="score", metadata={"description": "one score each, or comparisons"}
    )
    scale: Literal[5, 10, 100] = field(
        default=100, metadata={"description": "the highest score that it may give"}
    )
    criteria: Criteria = field(
        default=CRITERIA, metadata={"description": "what is judged, in words"}
    )
    readout: Literal["expected", "geval", "published"] = field(
        default="expected", metadata={"description": "how scores are read"}
    )
    rule: Literal["first_label", "likelihood", "perplexity"] = field(
        default="likelihood",
        metadata={"description": "how the two orders of a comparison become one relation"},
    )
    tolerance: float = field(
        default=0.0, metadata={"ge": 0, "description": "comparisons nearer than this are ties"}
    )
    schedule: Literal["round_robin", "swiss"] = field(
        default="round_robin",
        metadata={
            "description": "compare all pairs, or neighbours in the standings for log2 N + 1 rounds"
        },
    )
    critique_tokens: int = field(
        default=0,
        metadata={
            "ge": 0,
            "description": "let it write a critique of up to so many tokens first; for reasoning judges",
        },
    )
    min_mass: float = field(
        default=0.1,
        metadata={
            "ge": 0,
            "le": 1,
            "description": "less probability than this on its labels is a refusal: not scored",
        },
    )
    description: str = field(default="", metadata={"description": "one line for people"})
    timeout_seconds: float = field(
        default=60.0,
        metadata={"gt": 0, "description": "after this a candidate counts as not scored"},
    )

    def load(self) -> TrustJudgeReward:
        """The reward; its engine is given to it before it starts."""
        return TrustJudgeReward(self)


plugin = TrustJudge


class TrustJudgeReward(Reward):
    """Asks the judge about all candidates at once; scores are from 1 to 5."""

    uses_engine = True

    def __init__(self, config: TrustJudge) -> None:
        self.config = config
        self.timeout_seconds = config.timeout_seconds
        self.description = (
            config.description or f"a judge on the engine {config.engine!r}, mode {config.mode}"
        )

    async def start(self) -> None:
        """Find the engine.

        Raises:
            ConfigError: there is none of that name.
        """
        if self.engines and self.config.engine not in self.engines:
            raise ConfigError(
                f"trust_judge.engine: {self.config.engine!r} is not configured; {nearest('', self.engines)}"
            )

    def with_parameters(self, parameters: object) -> TrustJudgeReward:
        """The same judge with what a request says of mode, scale, criteria and readout."""
        assert isinstance(parameters, Asked)
        said = {
            name: getattr(parameters, name) for name in ("mode", "scale", "criteria", "readout")
        }
        return self.configured(**{name: value for name, value in said.items() if value is not None})

    def configured(self, **fields: Any) -> TrustJudgeReward:
        """The same judge with these fields of its section changed."""
        other = TrustJudgeReward(replace(self.config, **fields))
        other.engines = self.engines
        return other

    def check(self, where: str) -> None:
        """Refuse a judge whose engine does not show label probabilities, or not those of its critique.

        Raises:
            Unsupported: naming `where`, the engine and what it lacks.
        """
        needed = {Capability.LABEL_LOGPROBS}
        if self._critique_logprobs:
            needed.add(Capability.LOGPROBS)
        if missing := sorted(needed - self._engine.capabilities):
            able = [
                f"engine = {name!r}"
                for name, engine in self.engines.items()
                if needed <= engine.capabilities
            ]
            advice = (
                " or ".join(able)
                or "an engine of [engines.*] that has it, such as transformers or vllm"
            )
            raise Unsupported(
                f"{where}: needs {', '.join(missing)}, which the engine of {self._engine.model!r} lacks; "
                f"set in the judge's section {advice}.",
                param=where,
            )

    def worst_case_tokens(self, n: int) -> int:
        """The calls of each reading, and its critique."""
        single = self.config.mode == "score"
        readings = n if single else most_readings(n, self.config.schedule)
        calls = self._engine.label_calls(labels(self.config.scale) if single else SIDES)
        return readings * (calls + self.config.critique_tokens)

    @property
    def _engine(self) -> LabelReader:
        if self.config.engine not in self.engines:
            raise Unsupported(f"the judge's engine {self.config.engine!r} does not run here.")
        return self.engines[self.config.engine]

    @property
    def _critique_logprobs(self) -> bool:
        return (
            self.config.critique_tokens > 0
            and self.config.mode == "pairwise"
            and self.config.rule == "perplexity"
        )

    @property
    def judge(self) -> Judge:
        """Who is asked, and how."""
        c = self.config
        return Judge(
            self._engine, c.criteria, c.critique_tokens, self._critique_logprobs, c.min_mass
        )

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """[1, 1, N], from 1 to 5; NaN where the judge said nothing that can be read."""
        answers = [candidate.text for candidate in candidates]
        if self.config.mode == "score":
            return self._scored(await self.judge.scores(messages, answers, self.config.scale))
        return self._compared(
            await self.compare(messages, answers), [candidate.index for candidate in candidates]
        )

    async def compare(self, messages: Messages, answers: list[str]) -> Comparisons:
        """The answers two at a time, by the configured schedule."""
        schedule = swiss if self.config.schedule == "swiss" else round_robin
        return await schedule(
            self.judge, messages, answers, self.config.rule, self.config.tolerance
        )

    def read(self, judgement: Judgement) -> float:
        """A judgement's score on 1..scale; NaN where there is none."""
        if judgement.reading is None:
            return float("nan")
        return expected_score(judgement.reading.probs, self.config.scale, self.config.readout)

    def _scored(self, judgements: Sequence[Judgement]) -> RewardScores:
        values = [rescale(self.read(judgement), self.config.scale) for judgement in judgements]
        dropped = sum(judgement.reading is None for judgement in judgements)
        report = {
            "mode": "score",
            "scale": self.config.scale,
            "drop_rate": dropped / max(1, len(judgements)),
        }
        spent = sum((judgement.spent for judgement in judgements), ScoringUsage())
        return RewardScores(
            np.array([[values]], dtype=np.float64),
            spent,
            tuple(j.error for j in judgements),
            report,
        )

    def _compared(self, found: Comparisons, names: Sequence[int]) -> RewardScores:
        rates = [found.win_rate(i) for i in range(len(names))]
        errors = {i: why for pair, why in found.errors.items() for i in pair}
        lost = (
            "there was no other candidate to compare with"
            if len(names) == 1
            else "none of its comparisons was judged"
        )
        notes = tuple(
            errors.get(i, lost) if np.isnan(rate) else None for i, rate in enumerate(rates)
        )
        report = {
            "mode": "pairwise",
            "comparisons": [
                {"pair": [names[i], names[j]], "relation": found.relations.get((i, j))}
                for i, j in found.orders
            ],
            "win_rates": {
                str(name): rate
                for name, rate in zip(names, rates, strict=True)
                if not np.isnan(rate)
            },
            "cycles": [[names[i] for i in cycle] for cycle in cycles(found.relations)],
            "drop_rate": len(found.errors) / max(1, len(found.orders)),
        }
        return RewardScores(
            1.0 + 4.0 * np.array([[rates]], dtype=np.float64), found.spent, notes, report
        )
