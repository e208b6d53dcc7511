"""`/v1/align/judge`: judge candidates that the client sends, one by one and in pairs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from infer_align.config.config import JUDGE
from infer_align.config.schema import parse
from infer_align.errors import DeadlineExceeded, InvalidRequest, RewardFailed, nearest
from infer_align.flow.discovery import when_discovered
from infer_align.flow.limits import check_judging
from infer_align.flow.request import check_prompt
from infer_align.methods.trust_judge import (
    PRINCIPLES,
    RUBRIC,
    VOTES,
    Aspects,
    Criteria,
    Mode,
    Principles,
    Readout,
    Scale,
    Votes,
    check_replaced,
)
from infer_align.rewards import Reward
from infer_align.rewards.trust_judge import (
    TrustJudgeReward,
    conflict_ratio,
    nontransitivity,
    rescale,
)
from infer_align.rewards.trust_judge.consistency import cycles
from infer_align.rewards.trust_judge.criteria import Objective
from infer_align.rewards.trust_judge.panel import JudgePanel, position_bias
from infer_align.rewards.trust_judge.questions import Questions
from infer_align.rewards.trust_judge.ratings import Ratings
from infer_align.rewards.trust_judge.readings import Rule
from infer_align.rewards.trust_judge.report import (
    comparison_details,
    joined,
    order_json,
    rating_details,
    rubric_report,
    with_score_statistics,
)
from infer_align.rewards.trust_judge.tournament import Comparisons, Schedule
from infer_align.types import Messages, ScoringUsage
from infer_align_server.scoring import parse_candidates
from infer_align_server.service import Service
from infer_align_server.wire.completion import scoring_usage_json
from infer_align_server.wire.encoding import number

# The sizes of the subsets whose transitivity is reported.
SUBSET_SIZES = (3, 4, 5)
COMMON_FIELDS = ("model", "messages", "candidates")
# The fields that say what is read. A request that sets one replaces those of its preset.
QUESTIONS = {"criteria", "principles", "rubric", "aspects"}
# The fields of Judging that replace settings of the judge, if they are not None.
JUDGE_SETTINGS = (
    "scale",
    "criteria",
    "principles",
    "rubric",
    "aspects",
    "votes",
    "readout",
    "rule",
    "tolerance",
    "schedule",
)


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
    principles: Principles | None = field(default=None, metadata=PRINCIPLES)
    rubric: Criteria | None = field(default=None, metadata=RUBRIC)
    aspects: Aspects | None = field(
        default=None,
        metadata={
            "description": "Qualities that are read one by one and count the same: {name: words}, "
            'or a list of names such as "honesty".'
        },
    )
    votes: Votes | None = field(default=None, metadata=VOTES)
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

    def __post_init__(self) -> None:
        """Check that what is to be read fits together.

        Raises:
            WrongField: it does not.
        """
        check_replaced(self.criteria, self.principles or (), self.rubric, self.aspects or ())


FIELDS = (*COMMON_FIELDS, *Judging.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Judgements:
    """The readings of one request: a score per candidate, and the comparisons of pairs.

    Either is empty if the request did not include it.
    """

    questions: Questions
    ratings: Ratings = field(default_factory=Ratings)
    comparisons: Comparisons = field(default_factory=Comparisons)

    @property
    def usage(self) -> ScoringUsage:
        """Return the usage of all readings, and of a rubric."""
        return self.questions.spent + self.ratings.spent + self.comparisons.spent

    @property
    def objective(self) -> Objective:
        """Return the one objective of the scores and comparisons."""
        return self.questions.together()

    def check(self) -> None:
        """Check that something could be judged.

        Raises:
            RewardFailed: There are errors and not one reading.
        """
        errors = [error for error in self.ratings.errors if error]
        errors += self.comparisons.errors.values()
        has_score = any(not math.isnan(score) for score in self.ratings.scores)
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
    check_prompt(body, "chat")
    settings = _preset_settings(service, preset)
    fields = {key: body[key] for key in body if key not in COMMON_FIELDS}
    requested = {key: value for key, value in fields.items() if value is not None}
    if requested.keys() & QUESTIONS:
        settings = {key: value for key, value in settings.items() if key not in QUESTIONS}
    settings |= requested
    judging = parse(Judging, settings, "")
    reward = await when_discovered(lambda: _judge_reward(service, judging))
    modes: tuple[Mode, ...] = ("score", "pairwise") if judging.mode == "both" else (judging.mode,)
    worst_case = 0
    for mode in modes:
        worst_case += reward.with_parameters({"mode": mode}).worst_case_tokens(len(texts))
    check_judging(worst_case, len(texts), "candidates", service.config.limits)
    async with service.scoring(worst_case, caller) as count_usage:
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
    ratings = Ratings()
    comparisons = Comparisons()
    panel = reward.panel
    try:
        async with asyncio.timeout(reward.timeout_seconds):
            questions = await reward.questions(messages)
            objective = questions.together()
            if "score" in modes:
                ratings = await panel.rate(messages, texts, objective)
            if "pairwise" in modes:
                schedule = reward.config.schedule
                comparisons = await panel.compare(messages, texts, objective, schedule)
    except TimeoutError:
        raise DeadlineExceeded(
            f"The judge did not finish within its {reward.timeout_seconds:.3g} s; send fewer "
            "candidates."
        ) from None
    return Judgements(questions, ratings, comparisons)


def _preset_settings(service: Service, preset: str | None) -> dict[str, Any]:
    """Return the judge's settings in a preset.

    The weight and the mode are left out: they are about the selection.
    """
    if preset is None:
        return {}
    settings = service.config.presets[preset].get(JUDGE) or {}
    names = Judging.__dataclass_fields__.keys() - {"mode"}
    return {key: value for key, value in settings.items() if key in names}


def judge_names(rewards: Mapping[str, Reward]) -> list[str]:
    """Return the names of the rewards that are judges."""
    return [*_judges(rewards)]


def _judges(rewards: Mapping[str, Reward]) -> dict[str, TrustJudgeReward]:
    judges = {}
    for name, reward in rewards.items():
        if isinstance(reward, TrustJudgeReward):
            judges[name] = reward
    return judges


def _judge_reward(service: Service, judging: Judging) -> TrustJudgeReward:
    """Return the judge with the settings of a request."""
    judges = _judges(service.rewards)
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
    scores = dict(enumerate(judgements.ratings.scores))
    usage = scoring_usage_json(judgements.usage)
    del usage["reward_tokens"]
    rubric = judgements.questions.rubric
    scale = reward.config.scale
    inconsistent: dict[str, float | None] = {}
    for k in SUBSET_SIZES:
        inconsistent[str(k)] = number(nontransitivity(relations, k))
    return {
        "object": "align.judge",
        "scale": scale,
        "candidates": [_candidate_json(i, scale, scores, judgements) for i in range(len(texts))],
        "pairs": [_pair_json(comparisons, pair) for pair in comparisons.pairs],
        "conflict_ratio": number(conflict_ratio(scores, relations)),
        "tie_rate": _tie_rate(comparisons),
        "position_bias": number(position_bias(comparisons.readings)),
        "nontransitivity": inconsistent,
        "cycles": [list(cycle) for cycle in cycles(relations)],
        "drop_rate": _drop_rates(judgements),
        **_details(reward.panel, scale, len(texts), judgements),
        "rubric": None if rubric is None else rubric_report(rubric),
        "usage": usage,
    }


def _details(panel: JudgePanel, scale: Scale, n: int, judgements: Judgements) -> dict[str, Any]:
    """Return the readings by each principle, and those of each judge of a panel."""
    objective = judgements.objective
    indices = range(n)
    rated: dict[str, Any] = {}
    compared: dict[str, Any] = {}
    if judgements.ratings.scores:
        rated = rating_details(panel, objective, judgements.ratings, indices, scale)
        rows: list[list[float]] = []
        for part in judgements.ratings.parts:
            rows.append(part.rescaled_scores(scale))
        rated = with_score_statistics(rated, np.array(rows))
    if judgements.comparisons.pairs:
        compared = comparison_details(panel, objective, judgements.comparisons, indices)
    judges: dict[str, Any] = {}
    for name in [] if panel.is_single else panel.readers:
        score = rated.get("judges", {}).get(name, {})
        pairwise = compared.get("judges", {}).get(name, {})
        judges[name] = {
            "lean": score.get("lean"),
            "position_bias": pairwise.get("position_bias"),
            "agreement": {
                "score": score.get("agreement"),
                "pairwise": pairwise.get("agreement"),
            },
            "principles": joined(score, pairwise).get("principles", []),
        }
    return {"principles": joined(rated, compared).get("principles", []), "judges": judges}


def _candidate_json(
    index: int, scale: Scale, scores: Mapping[int, float], judgements: Judgements
) -> dict[str, Any]:
    score = None
    rescaled = None
    if scores:
        score = number(scores[index])
        rescaled = number(rescale(scores[index], scale))
        error = judgements.ratings.errors[index]
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

    In both orders the label A stands for the candidate that comes first in the judge's prompt. A
    comparison by several principles or judges has its orders there.
    """
    judged = comparisons.orders.get(pair, ())
    return {
        "pair": list(pair),
        "relation": comparisons.relations.get(pair),
        "win_probability": comparisons.chances.get(pair),
        "orders": [order_json(judgement.reading) for judgement in judged],
        "error": comparisons.errors.get(pair),
    }


def _tie_rate(comparisons: Comparisons) -> float | None:
    relations = list(comparisons.relations.values())
    return relations.count("equal") / len(relations) if relations else None


def _drop_rates(judgements: Judgements) -> dict[str, float | None]:
    """Return the share of scores and of pairs that could not be read."""
    score_rate = None
    if judgements.ratings.scores:
        score_rate = judgements.ratings.drop_rate
    pair_rate = None
    comparisons = judgements.comparisons
    if comparisons.pairs:
        pair_rate = len(comparisons.errors) / len(comparisons.pairs)
    return {"score": score_rate, "pairwise": pair_rate}
