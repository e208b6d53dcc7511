"""`/v1/align/judge`: judge candidates that the client sends, one by one and in pairs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from infer_align.config.config import JUDGE
from infer_align.config.schema import parse
from infer_align.errors import DeadlineExceeded, InvalidRequest, RewardFailed, nearest
from infer_align.flow.discovery import when_discovered
from infer_align.flow.request import check_prompt
from infer_align.methods.trust_judge import Criteria, Mode, Readout, Scale
from infer_align.rewards.trust_judge import (
    TrustJudgeReward,
    conflict_ratio,
    nontransitivity,
    rescale,
)
from infer_align.rewards.trust_judge.consistency import cycles
from infer_align.rewards.trust_judge.judge import Judgement
from infer_align.rewards.trust_judge.readings import Rule
from infer_align.rewards.trust_judge.tournament import Comparisons, Schedule
from infer_align.types import Messages, ScoringUsage
from infer_align_server.scoring import parse_candidates
from infer_align_server.service import Service
from infer_align_server.wire.encoding import number

# The sizes of the subsets whose transitivity is reported.
SUBSET_SIZES = (3, 4, 5)
COMMON_FIELDS = ("model", "messages", "candidates")
# The fields of Judging that replace settings of the judge, if they are not None.
JUDGE_SETTINGS = ("scale", "criteria", "readout", "rule", "tolerance", "schedule")


@dataclass(frozen=True, slots=True)
class Judging:
    """The settings of one request. Omitted settings are as the judge is configured."""

    judge: str = field(default=JUDGE, metadata={"description": "Name of the judge's reward."})
    mode: Literal["score", "pairwise", "both"] = field(
        default="both",
        metadata={"description": "Score candidates, compare them in pairs, or both."},
    )
    scale: Scale | None = field(
        default=None, metadata={"description": "Highest score that the judge may give."}
    )
    criteria: Criteria | None = field(
        default=None, metadata={"description": "What to judge by, in words."}
    )
    readout: Readout | None = field(
        default=None, metadata={"description": "Method to read a score from probabilities."}
    )
    rule: Rule | None = field(
        default=None,
        metadata={"description": "Rule that makes one relation of a comparison in two orders."},
    )
    tolerance: float | None = field(
        default=None,
        metadata={"ge": 0, "description": "Largest difference that still counts as a tie."},
    )
    schedule: Schedule | None = field(
        default=None, metadata={"description": "Choice of the pairs to compare."}
    )


FIELDS = (*COMMON_FIELDS, *Judging.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Judgements:
    """The readings of one request: a score per candidate, and the comparisons of pairs.

    Either is empty if the request did not include it.
    """

    scores: Sequence[Judgement] = ()
    comparisons: Comparisons = field(default_factory=Comparisons)

    @property
    def usage(self) -> ScoringUsage:
        """The usage of all readings."""
        return sum((judgement.spent for judgement in self.scores), self.comparisons.spent)

    def check(self) -> None:
        """Check that something could be judged.

        Raises:
            RewardFailed: There are errors and not one reading.
        """
        errors = [judgement.error for judgement in self.scores if judgement.error]
        errors += self.comparisons.errors.values()
        has_score = any(judgement.reading is not None for judgement in self.scores)
        if errors and not has_score and not self.comparisons.relations:
            raise RewardFailed(f"nothing could be judged; first: {errors[0]}")


async def judge(service: Service, body: Mapping[str, Any], caller: str = "") -> dict[str, Any]:
    """Return the response of /v1/align/judge.

    Raises:
        Unavailable: The server does not serve requests now.
        InvalidRequest: A field is missing, wrong or unknown, or the judge's engine does not give
            the probabilities of labels.
        DeadlineExceeded: The judge took longer than its configured time limit.
        RewardFailed: Nothing could be judged.
    """
    texts = parse_candidates(service, body, FIELDS)
    preset = service.resolve_model(body.get("model")).preset
    check_prompt({"messages": body.get("messages")}, "chat")
    settings = _preset_settings(service, preset)
    for key, value in body.items():
        if key not in COMMON_FIELDS and value is not None:
            settings[key] = value
    judging = parse(Judging, settings, "")
    reward = await when_discovered(lambda: _judge_reward(service, judging))
    modes: tuple[Mode, ...] = ("score", "pairwise") if judging.mode == "both" else (judging.mode,)
    worst_cases = [
        reward.with_parameters({"mode": mode}).worst_case_tokens(len(texts)) for mode in modes
    ]
    async with service.scoring(sum(worst_cases), caller) as count_usage:
        judgements = await _judge(reward, modes, body["messages"], texts)
        count_usage(judgements.usage)
    judgements.check()
    # Counting subsets takes seconds for a hundred candidates. Do not block the event loop.
    return await asyncio.to_thread(_response, reward, texts, judgements)


async def _judge(
    reward: TrustJudgeReward,
    modes: Sequence[Mode],
    messages: Messages,
    texts: list[str],
) -> Judgements:
    scores: Sequence[Judgement] = ()
    comparisons = Comparisons()
    try:
        async with asyncio.timeout(reward.timeout_seconds):
            if "score" in modes:
                scores = await reward.judge.scores(messages, texts, reward.config.scale)
            if "pairwise" in modes:
                comparisons = await reward.compare(messages, texts)
    except TimeoutError:
        raise DeadlineExceeded(
            f"The judge did not finish within its {reward.timeout_seconds:.3g} s; send fewer "
            "candidates."
        ) from None
    return Judgements(scores, comparisons)


def _preset_settings(service: Service, preset: str | None) -> dict[str, Any]:
    """Return the judge's settings in a preset.

    The weight and the mode are left out: they are about the selection.
    """
    if preset is None:
        return {}
    settings = service.config.presets[preset].get(JUDGE) or {}
    names = Judging.__dataclass_fields__.keys() - {"mode"}
    return {key: value for key, value in settings.items() if key in names}


def _judge_reward(service: Service, judging: Judging) -> TrustJudgeReward:
    """Return the judge with the settings of a request."""
    judges = {}
    for name, reward in service.rewards.items():
        if isinstance(reward, TrustJudgeReward):
            judges[name] = reward
    if judging.judge not in judges:
        raise InvalidRequest(
            f"judge: {judging.judge!r} is not a configured judge; {nearest(judging.judge, judges)}",
            param="judge",
        )
    settings = {}
    for name in JUDGE_SETTINGS:
        value = getattr(judging, name)
        if value is not None:
            settings[name] = value
    # The mode decides if the probability of a critique is read. Only comparisons need it.
    mode: Mode = "score" if judging.mode == "score" else "pairwise"
    configured = judges[judging.judge].with_parameters({**settings, "mode": mode})
    configured.check("judge")
    return configured


def _response(
    reward: TrustJudgeReward, texts: Sequence[str], judgements: Judgements
) -> dict[str, Any]:
    comparisons = judgements.comparisons
    relations = comparisons.relations
    scores = {i: reward.read(judgement) for i, judgement in enumerate(judgements.scores)}
    usage = asdict(judgements.usage)
    del usage["reward_tokens"]
    return {
        "object": "align.judge",
        "scale": reward.config.scale,
        "candidates": [
            _candidate_json(i, reward.config.scale, scores, judgements) for i in range(len(texts))
        ],
        "pairs": [_pair_json(comparisons, pair) for pair in comparisons.orders],
        "conflict_ratio": number(conflict_ratio(scores, relations)),
        "tie_rate": _tie_rate(comparisons),
        "nontransitivity": {str(k): number(nontransitivity(relations, k)) for k in SUBSET_SIZES},
        "cycles": [list(cycle) for cycle in cycles(relations)],
        "drop_rate": _drop_rates(judgements),
        "usage": usage,
    }


def _candidate_json(
    index: int, scale: Scale, scores: Mapping[int, float], judgements: Judgements
) -> dict[str, Any]:
    score = None
    rescaled = None
    if judgements.scores:
        score = number(scores[index])
        rescaled = number(rescale(scores[index], scale))
        error = judgements.scores[index].error
    else:
        error = _comparison_error(judgements.comparisons, index)
    return {
        "index": index,
        "score": score,
        "rescaled": rescaled,
        "win_rate": number(judgements.comparisons.win_rate(index)),
        "error": error,
    }


def _comparison_error(comparisons: Comparisons, index: int) -> str | None:
    """Return the reason why a candidate has no win rate; None if it has one."""
    if any(index in pair for pair in comparisons.relations):
        return None
    for pair, error in comparisons.errors.items():
        if index in pair:
            return error
    return "there was no other candidate to compare with"


def _pair_json(comparisons: Comparisons, pair: tuple[int, int]) -> dict[str, Any]:
    """Return one comparison.

    In both orders the label A stands for the candidate that comes first in the judge's prompt.
    """
    orders = []
    for judgement in comparisons.orders[pair]:
        orders.append(dict(judgement.reading.probs) if judgement.reading else None)
    return {
        "pair": list(pair),
        "relation": comparisons.relations.get(pair),
        "orders": orders,
        "error": comparisons.errors.get(pair),
    }


def _tie_rate(comparisons: Comparisons) -> float | None:
    relations = list(comparisons.relations.values())
    return relations.count("equal") / len(relations) if relations else None


def _drop_rates(judgements: Judgements) -> dict[str, float | None]:
    """Return the share of scores and of pairs that could not be read."""
    score_rate = None
    if judgements.scores:
        dropped = sum(judgement.reading is None for judgement in judgements.scores)
        score_rate = dropped / len(judgements.scores)
    pair_rate = None
    comparisons = judgements.comparisons
    if comparisons.orders:
        pair_rate = len(comparisons.errors) / len(comparisons.orders)
    return {"score": score_rate, "pairwise": pair_rate}
