"""Judge candidates that somebody else generated: their scores, their comparisons, and how well the two agree."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from infer_align.config.schema import parse
from infer_align.errors import DeadlineExceeded, InvalidRequest, RewardFailed, nearest
from infer_align.flow.request import check_prompt
from infer_align.methods.trust_judge import Criteria, Readout, Scale
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
from infer_align.types import ScoringUsage
from infer_align_server.scoring import candidates_of
from infer_align_server.service import Service
from infer_align_server.wire.encoding import number

SUBSETS = (3, 4, 5)
GIVEN = ("model", "messages", "candidates")


@dataclass(frozen=True, slots=True)
class Judging:
    """How to judge; what is left out is as the judge is configured."""

    judge: str = field(
        default="trust_judge", metadata={"description": "which judge, by its reward's name"}
    )
    mode: Literal["score", "pairwise", "both"] = field(
        default="both", metadata={"description": "scores, comparisons, or both"}
    )
    scale: Scale | None = field(default=None, metadata={"description": "the highest score"})
    criteria: Criteria | None = field(
        default=None, metadata={"description": "what is judged, in words"}
    )
    readout: Readout | None = field(default=None, metadata={"description": "how scores are read"})
    rule: Rule | None = field(
        default=None, metadata={"description": "how two orders become one relation"}
    )
    tolerance: float | None = field(
        default=None, metadata={"ge": 0, "description": "nearer than this is a tie"}
    )
    schedule: Schedule | None = field(
        default=None, metadata={"description": "which pairs are compared"}
    )


FIELDS = (*GIVEN, *Judging.__dataclass_fields__)


async def judge(service: Service, body: Mapping[str, Any], caller: str = "") -> dict[str, Any]:
    """The answer of /v1/align/judge.

    Raises:
        InvalidRequest: a field is missing, wrong or unknown, or the judge's engine shows no label probabilities.
        DeadlineExceeded: the judge took longer than its configuration allows.
        RewardFailed: nothing at all could be judged.
    """
    texts = candidates_of(service, body, FIELDS)
    preset = service.resolve_model(body.get("model")).preset
    check_prompt({"messages": body.get("messages")}, "chat")
    given = {key: value for key, value in body.items() if key not in GIVEN and value is not None}
    wanted, reward = _reward(service, {**_of_preset(service, preset), **given})
    judgements: Sequence[Judgement] = ()
    compared = Comparisons()
    modes = ("score", "pairwise") if wanted.mode == "both" else (wanted.mode,)
    worst = sum(
        reward.with_parameters({"mode": mode}).worst_case_tokens(len(texts)) for mode in modes
    )
    async with service.scoring(worst, caller) as told:
        try:
            async with asyncio.timeout(reward.timeout_seconds):
                if "score" in modes:
                    judgements = await reward.judge.scores(
                        body["messages"], texts, reward.config.scale
                    )
                if "pairwise" in modes:
                    compared = await reward.compare(body["messages"], texts)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no judgement within {reward.timeout_seconds:.3g} s; send fewer candidates."
            ) from None
        spent = sum((judgement.spent for judgement in judgements), compared.spent)
        told(spent)
    first = next(iter([j.error for j in judgements if j.error] + [*compared.errors.values()]), None)
    if (
        first is not None
        and len(compared.relations) + sum(j.reading is not None for j in judgements) == 0
    ):
        raise RewardFailed(f"nothing could be judged; first: {first}")
    # Counting subsets takes seconds where there are a hundred candidates: not in the event loop.
    return await asyncio.to_thread(_answer, reward, texts, judgements, compared, spent)


def _of_preset(service: Service, preset: str | None) -> dict[str, Any]:
    """How a preset has its candidates judged, but for the weight and the mode, which are about choosing."""
    judging = service.config.presets[preset].get("trust_judge") or {} if preset else {}
    return {
        key: value
        for key, value in judging.items()
        if key in Judging.__dataclass_fields__ and key != "mode"
    }


def _reward(service: Service, given: Mapping[str, Any]) -> tuple[Judging, TrustJudgeReward]:
    wanted = parse(Judging, given, "")
    judges = {
        name: reward
        for name, reward in service.rewards.items()
        if isinstance(reward, TrustJudgeReward)
    }
    if wanted.judge not in judges:
        raise InvalidRequest(
            f"judge: {wanted.judge!r} is no judge here; {nearest(wanted.judge, judges)}",
            param="judge",
        )
    names = ("scale", "criteria", "readout", "rule", "tolerance", "schedule")
    fields = {name: value for name in names if (value := getattr(wanted, name)) is not None}
    # The mode decides whether a critique's own probability is read, which comparisons alone need.
    reward = judges[wanted.judge].with_parameters(
        {**fields, "mode": "score" if wanted.mode == "score" else "pairwise"}
    )
    reward.check("judge")
    return wanted, reward


def _answer(
    reward: TrustJudgeReward,
    texts: Sequence[str],
    judgements: Sequence[Judgement],
    compared: Comparisons,
    spent: ScoringUsage,
) -> dict[str, Any]:
    scale = reward.config.scale
    scores = {i: reward.read(judgement) for i, judgement in enumerate(judgements)}
    dropped = sum(judgement.reading is None for judgement in judgements)
    relations = compared.relations
    ties = sum(relation == "equal" for relation in relations.values())
    return {
        "object": "align.judge",
        "scale": scale,
        "candidates": [
            {
                "index": i,
                "score": number(scores[i]) if judgements else None,
                "rescaled": number(rescale(scores[i], scale)) if judgements else None,
                "win_rate": number(compared.win_rate(i)),
                "error": judgements[i].error if judgements else _unjudged(compared, i),
            }
            for i in range(len(texts))
        ],
        "pairs": [_pair(compared, pair) for pair in compared.orders],
        "conflict_ratio": number(conflict_ratio(scores, relations)),
        "tie_rate": number(ties / len(relations)) if relations else None,
        "nontransitivity": {str(k): number(nontransitivity(relations, k)) for k in SUBSETS},
        "cycles": [list(cycle) for cycle in cycles(relations)],
        "drop_rate": {
            "score": number(dropped / len(judgements)) if judgements else None,
            "pairwise": number(len(compared.errors) / len(compared.orders))
            if compared.orders
            else None,
        },
        "usage": {name: count for name, count in asdict(spent).items() if name != "reward_tokens"},
    }


def _unjudged(compared: Comparisons, item: int) -> str | None:
    """Why an item has no win rate."""
    if any(item in pair for pair in compared.relations):
        return None
    return next(
        (why for pair, why in compared.errors.items() if item in pair),
        "there was no other candidate to compare with",
    )


def _pair(compared: Comparisons, pair: tuple[int, int]) -> dict[str, Any]:
    """One comparison: what each order said, and what they come to. In both orders A is the answer that was shown first."""
    shown = [
        dict(judgement.reading.probs) if judgement.reading else None
        for judgement in compared.orders[pair]
    ]
    return {
        "pair": list(pair),
        "relation": compared.relations.get(pair),
        "orders": shown,
        "error": compared.errors.get(pair),
    }
