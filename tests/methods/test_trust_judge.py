"""What a request asks of the judge, as a plan."""

from __future__ import annotations

import pytest

from infer_align.config import Limits
from infer_align.config.schema import parse
from infer_align.engines.fake import Fake
from infer_align.errors import InvalidRequest, Unsupported
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.methods import PlanDraft, ScorerRequest
from infer_align.methods.trust_judge import TrustJudge
from infer_align.rewards.rules import Rules
from infer_align.rewards.trust_judge.prompts import SCALES
from infer_align.types import Draw

BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


def test_the_judge_joins_the_rewards_with_its_weight() -> None:
    other = ScorerRequest("short", 1.0)
    draft = PlanDraft((Draw(BODY),), scorers=(other,))
    planned = TrustJudge(weight=0.5, criteria="brief").apply(draft)
    judge = ScorerRequest("trust_judge", 0.5, {"criteria": "brief"})
    assert planned.scorers == (other, judge)
    assert planned.draws == draft.draws
    assert not planned.selects, "it draws nothing"


@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale: int) -> None:
    assert parse(TrustJudge, {"scale": scale}, "align.trust_judge").scale == scale


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 7},
        {"scale": "100"},
        {"criteria": "  "},
        {"criteria": "x" * 4001},
        {"weight": 1e10},
    ],
)
def test_what_is_wrong(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(TrustJudge, wrong, "align.trust_judge")
    assert refused.value.param == f"align.trust_judge.{next(iter(wrong))}"


def test_where_there_is_nobody_to_ask() -> None:
    request = parse_request({**BODY, "align": {"trust_judge": {}}}, "chat", {})
    with pytest.raises(Unsupported) as refused:
        make_plan(
            request, Fake().load(), {"short": Rules(words_weight=-1.0).load()}, {}, Limits(8, 1000)
        )
    assert refused.value.param == "align.trust_judge"
