"""Judge candidates with a language model: TrustJudge (2509.21117).

    [rewards.trust_judge]       # infer-align.toml
    kind = "trust_judge"
    engine = "served"           # the served model judges its own candidates
    mode = "score"
    scale = 100

    {"best_of_n": {"n": 2}, "trust_judge": {"criteria": "brief"}}       # `align` of a request

    candidate 0: label "80" has probability 0.6 and "70" has 0.4 -> 76 on 1..100 -> 4.03 on 1..5
    candidate 1: the judge refused                               -> NaN, with a note that says why

The score is read from the probabilities of the judge's labels, not from a label that it samples. In
mode "pairwise", the judge compares candidates two at a time in both orders, and a candidate's score
is its win rate, mapped to 1..5. A candidate that the judge does not score is NaN, never 0; the
report gives the share of such readings as `drop_rate`.

`prompts.py` writes the prompts, `judge.py` sends them, `readings.py` turns label probabilities into
scores and relations, `tournament.py` schedules comparisons, and `consistency.py` measures how well
scores and comparisons agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from infer_align.engines import Engine
from infer_align.errors import ConfigError, Unsupported, nearest
from infer_align.methods.trust_judge import CRITERIA, Criteria, Mode, Readout, Scale, TrustJudge
from infer_align.rewards import DESCRIPTION, TIMEOUT, Reward, RewardScores
from infer_align.rewards.trust_judge.consistency import conflict_ratio, cycles, nontransitivity
from infer_align.rewards.trust_judge.judge import Judge, Judgement
from infer_align.rewards.trust_judge.prompts import SIDES, labels
from infer_align.rewards.trust_judge.readings import (
    Reading,
    Rule,
    expected_score,
    relation,
    rescale,
)
from infer_align.rewards.trust_judge.tournament import (
    Comparisons,
    Schedule,
    max_readings,
    round_robin,
    swiss,
)
from infer_align.types import Body, Candidate, Capability, Messages, ScoringUsage

__all__ = [
    "Reading",
    "TrustJudgeReward",
    "TrustJudgeSection",
    "conflict_ratio",
    "expected_score",
    "nontransitivity",
    "plugin",
    "relation",
    "rescale",
]


@dataclass(frozen=True, slots=True)
class TrustJudgeSection:
    """A language model that scores or compares candidates.

    Fields set in `align.trust_judge` override the configured ones.
    """

    engine: str = field(
        default="served",
        metadata={"description": 'Engine that judges: "served", or a name of `[engines.*]`.'},
    )
    mode: Mode = field(
        default="score",
        metadata={
            "description": '"score" scores each candidate alone, "pairwise" compares candidates '
            "in both orders."
        },
    )
    scale: Scale = field(
        default=100, metadata={"description": "Highest score that the judge can give."}
    )
    criteria: Criteria = field(
        default=CRITERIA, metadata={"description": "Qualities to judge by, in words."}
    )
    readout: Readout = field(
        default="expected",
        metadata={
            "description": '"expected": mean over the labels. "geval": the same without '
            'normalising. "published": the '
            "paper's code, bugs included."
        },
    )
    rule: Rule = field(
        default="likelihood",
        metadata={
            "description": 'How both orders of a comparison become one relation. "first_label": '
            "the likeliest label, if both "
            'orders agree. "likelihood": the label with the most probability over both orders. '
            '"perplexity": the likeliest '
            "label in the order with the lower perplexity."
        },
    )
    tolerance: float = field(
        default=0.0,
        metadata={"ge": 0, "description": "A comparison with a smaller difference is a tie."},
    )
    schedule: Schedule = field(
        default="round_robin",
        metadata={
            "description": '"round_robin" compares all pairs, "swiss" compares neighbours in the '
            "standings for log2 N + 1 rounds."
        },
    )
    critique_tokens: int = field(
        default=0,
        metadata={
            "ge": 0,
            "description": "Maximum number of tokens of a critique before the label; for "
            "reasoning judges. 0: no critique.",
        },
    )
    min_mass: float = field(
        default=0.1,
        metadata={
            "ge": 0,
            "le": 1,
            "description": "Minimum probability on valid labels. With less, the judge has "
            "refused, and the candidate is not scored.",
        },
    )
    description: str = field(default="", metadata=DESCRIPTION)
    timeout_seconds: float = field(default=60.0, metadata=TIMEOUT)

    def load(self) -> TrustJudgeReward:
        """Return the reward. Its `engines` must be set before it starts."""
        return TrustJudgeReward(self)


plugin = TrustJudgeSection


class TrustJudgeReward(Reward):
    """A judge that reads all candidates at once; scores are from 1 to 5."""

    uses_engine = True
    named_only = True
    parameters = TrustJudge

    def __init__(self, config: TrustJudgeSection) -> None:
        self.config = config
        self.timeout_seconds = config.timeout_seconds
        self.compares_pairs = config.mode == "pairwise"
        self.relative = config.mode == "pairwise"
        self.cost = "samples a label, or several, for each answer"
        if config.mode == "pairwise":
            self.cost = "samples labels for each pair of answers, in both orders"
        self.description = (
            config.description or f"a judge on the engine {config.engine!r}, mode {config.mode}"
        )

    async def start(self) -> None:
        """Check that the engine exists.

        Raises:
            ConfigError: there is no engine of the configured name.
        """
        if self.engines and self.config.engine not in self.engines:
            raise ConfigError(
                f"trust_judge.engine: {self.config.engine!r} is not configured; "
                f"{nearest('', self.engines)}"
            )

    def with_parameters(self, parameters: Mapping[str, Any]) -> TrustJudgeReward:
        """Return the same judge with these fields of its section changed.

        A field that is None stays as configured.
        """
        changes = {name: value for name, value in parameters.items() if value is not None}
        reward = TrustJudgeReward(replace(self.config, **changes))
        reward.engines = self.engines
        return reward

    def check(self, where: str) -> None:
        """Refuse an engine that does not report the probabilities that the judge needs.

        Raises:
            Unsupported: naming `where`, the engine and the missing capabilities.
        """
        needed = frozenset({Capability.LABEL_LOGPROBS})
        if self._critique_logprobs:
            needed |= {Capability.LOGPROBS}
        missing = sorted(self._engine.missing(needed))
        if not missing:
            return
        able: list[str] = []
        for name, engine in self.engines.items():
            if needed <= engine.capabilities:
                able.append(f"engine = {name!r}")
        advice = " or ".join(able)
        if not able:
            advice = "an engine of [engines.*] that has it, such as transformers or vllm"
        raise Unsupported(
            f"{where}: needs {', '.join(missing)}, which {self._engine.describe()} lacks; "
            f"set in the judge's section {advice}.",
            param=where,
        )

    def worst_case_tokens(self, n: int) -> int:
        """Return the maximum number of sampled tokens for n candidates: labels and critiques."""
        if self.config.mode == "score":
            readings = n
            valid = labels(self.config.scale)
        else:
            readings = max_readings(n, self.config.schedule)
            valid = SIDES
        return readings * (self._engine.label_calls(valid) + self.config.critique_tokens)

    @property
    def _engine(self) -> Engine:
        if self.config.engine not in self.engines:
            raise Unsupported(f"the judge's engine {self.config.engine!r} does not run here.")
        return self.engines[self.config.engine]

    @property
    def _critique_logprobs(self) -> bool:
        """True if the log-probability of a critique is needed: for its perplexity."""
        config = self.config
        return (
            config.critique_tokens > 0 and config.mode == "pairwise" and config.rule == "perplexity"
        )

    @property
    def judge(self) -> Judge:
        """The engine and the way it is prompted."""
        return Judge(
            engine=self._engine,
            criteria=self.config.criteria,
            critique_tokens=self.config.critique_tokens,
            critique_logprobs=self._critique_logprobs,
            min_mass=self.config.min_mass,
        )

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Return [1, 1, N] scores from 1 to 5. A candidate without a valid reading is NaN."""
        answers = [candidate.text for candidate in candidates]
        if self.config.mode == "score":
            judgements = await self.judge.scores(messages, answers, self.config.scale)
            return self._from_judgements(judgements)
        comparisons = await self.compare(messages, answers)
        return _from_comparisons(comparisons, [candidate.index for candidate in candidates])

    def join_reports(self, parts: Sequence[RewardScores]) -> Body:
        """Return the report of mode "score" on the candidates of several calls."""
        dropped = sum(int(np.isnan(part.values).sum()) for part in parts)
        candidates = sum(part.values.shape[-1] for part in parts)
        return {**parts[-1].report, "drop_rate": dropped / max(1, candidates)}

    async def compare(self, messages: Messages, answers: list[str]) -> Comparisons:
        """Compare the answers two at a time, by the configured schedule."""
        schedule = swiss if self.config.schedule == "swiss" else round_robin
        return await schedule(
            self.judge, messages, answers, self.config.rule, self.config.tolerance
        )

    def read(self, judgement: Judgement) -> float:
        """Return a judgement's score on 1..scale, or NaN if it has no reading."""
        if judgement.reading is None:
            return math.nan
        return expected_score(judgement.reading.probs, self.config.scale, self.config.readout)

    def _from_judgements(self, judgements: Sequence[Judgement]) -> RewardScores:
        values = [rescale(self.read(judgement), self.config.scale) for judgement in judgements]
        dropped = sum(judgement.reading is None for judgement in judgements)
        report = {
            "mode": "score",
            "scale": self.config.scale,
            "drop_rate": dropped / max(1, len(judgements)),
        }
        spent = sum((judgement.spent for judgement in judgements), ScoringUsage())
        notes = tuple(judgement.error for judgement in judgements)
        return RewardScores(np.array([[values]], dtype=np.float64), spent, notes, report)


def _from_comparisons(comparisons: Comparisons, indices: Sequence[int]) -> RewardScores:
    """Turn comparisons into scores. `indices` are the candidates' indices, for the report."""
    n = len(indices)
    rates = [comparisons.win_rate(item) for item in range(n)]
    notes: list[str | None] = [None] * n
    win_rates: dict[str, float] = {}
    for item, rate in enumerate(rates):
        if math.isnan(rate):
            notes[item] = _missing_reason(comparisons, item, n)
        else:
            win_rates[str(indices[item])] = rate
    compared: list[dict[str, Any]] = []
    for i, j in comparisons.orders:
        related = comparisons.relations.get((i, j))
        compared.append({"pair": [indices[i], indices[j]], "relation": related})
    named_cycles: list[list[int]] = []
    for cycle in cycles(comparisons.relations):
        named_cycles.append([indices[i] for i in cycle])
    report = {
        "mode": "pairwise",
        "comparisons": compared,
        "win_rates": win_rates,
        "cycles": named_cycles,
        "drop_rate": len(comparisons.errors) / max(1, len(comparisons.orders)),
    }
    values = 1.0 + 4.0 * np.array([[rates]], dtype=np.float64)
    matrix = comparisons.win_probabilities(n)
    return RewardScores(values, comparisons.spent, tuple(notes), report, matrix=matrix)


def _missing_reason(comparisons: Comparisons, item: int, n: int) -> str:
    """Explain why one of n candidates has no win rate."""
    if n == 1:
        return "there was no other candidate to compare with"
    reason = "none of its comparisons was judged"
    for pair, error in comparisons.errors.items():
        if item in pair:
            reason = error
    return reason
