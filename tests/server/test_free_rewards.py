"""Rewards that need no reward model, over HTTP: parameters in a request, and the default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from infer_align.engines.fake import Fake, FakeEngine
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.types import Capability
from tests.flow.builders import LIMITS, REQUEST_BODY, weights

Serve = Callable[[str], Any]

ENGINE = r"""
[engine]
kind = "fake"
replies = [{text = "no"}, {text = "fine thanks"}, {text = "no way"}]
words = [
  {pattern = "helpfully|expert", logprobs = {fine = -0.1, thanks = -0.1}, other = -2.0},
  {pattern = "rudely", logprobs = {way = -0.1}, other = -3.0},
  {pattern = 'no way\s+Answer:', logprobs = {42 = -0.5}},
]
"""
REWARDS = """
[rewards.kind]
kind = "density_ratio"
prompt = "Answer helpfully."
[rewards.right]
kind = "likelihood"
[rewards.same]
kind = "agreement"
[rewards.short]
kind = "rules"
words_weight = -1.0
[presets.right]
best_of_n = {n = 3}
rewards = {right = {reference = "42"}, short = 0}
"""


@pytest.fixture(scope="module")
def bare(serve: Serve) -> Any:
    return serve(ENGINE)


@pytest.fixture(scope="module")
def live(serve: Serve) -> Any:
    return serve(ENGINE + REWARDS)


# --- the default ---


def test_best_of_n_works_where_no_reward_is_configured(bare: Any) -> None:
    answer = bare.chat({"best_of_n": {"n": 3}}).json()
    assert answer["choices"][0]["message"]["content"] == "fine thanks"
    report = answer["align"]
    assert "no reward is configured: chosen by density_ratio" in report["reason"]
    values = [each["scores"]["density_ratio"]["value"] for each in report["candidates"]]
    assert values == pytest.approx([-1.0, 0.9, -1.0])
    assert report["usage"]["reward_tokens"] > 0


def test_the_methods_say_what_chooses(bare: Any, live: Any) -> None:
    listed = bare.get("/v1/align/methods").json()["methods"]
    for name in ("best_of_n", "rps"):
        assert listed[name]["available"] is True
        assert listed[name]["note"] == "no reward is configured: density_ratio chooses"
        assert 'kind = "density_ratio"' in listed[name]["fix"]
    configured = live.get("/v1/align/methods").json()["methods"]["best_of_n"]
    assert (configured["note"], configured["fix"]) == ("", "")


def test_answers_are_scored_where_no_reward_is_configured(bare: Any) -> None:
    body = {"messages": REQUEST_BODY["messages"], "candidates": ["no", "fine"]}
    scored = bare.post(body, "/v1/align/score").json()
    assert scored["ranking"] == [1, 0]
    assert "density_ratio" in scored["candidates"][0]["scores"]


def test_text_completions_and_streams_have_the_default_too(bare: Any) -> None:
    body = {"model": "fake", "prompt": "Once", "align": {"best_of_n": {"n": 3}}}
    answer = bare.post(body, "/v1/completions").json()
    assert answer["choices"][0]["text"] == "fine thanks"
    streamed = bare.chat({"best_of_n": {"n": 3}}, stream=True).text
    assert "chosen by density_ratio" in streamed


def test_a_judge_of_the_request_chooses_alone(bare: Any) -> None:
    report = bare.chat({"best_of_n": {"n": 2}, "trust_judge": {}}).json()["align"]
    assert set(report["candidates"][0]["scores"]) == {"trust_judge"}
    assert "no reward" not in report["reason"]


def test_a_request_that_names_no_weight_is_still_refused(bare: Any) -> None:
    refused = bare.chat({"best_of_n": {}, "rewards": {}})
    assert refused.status_code == 400
    assert "nothing to choose by" in refused.json()["error"]["message"]


class Silent(FakeEngine):
    """Does not report log-probabilities of given texts."""

    capabilities = FakeEngine.capabilities - {Capability.SEQUENCE_LOGPROBS}


def test_an_engine_that_cannot_read_chooses_by_agreement() -> None:
    request = parse_request({**REQUEST_BODY, "align": {"best_of_n": {"n": 2}}}, "chat", {})
    plan = make_plan(request, Silent(Fake()), {}, {}, LIMITS)
    assert weights(plan) == {"agreement": 1.0}
    assert "chosen by agreement" in plan.note


def test_images_are_chosen_by_agreement() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}
    request = parse_request({**body, "align": {"best_of_n": {"n": 2}}}, "chat", {})
    assert weights(make_plan(request, Fake().load(), {}, {}, LIMITS)) == {"agreement": 1.0}


def test_a_configured_reward_stays_the_default(live: Any) -> None:
    report = live.chat({"best_of_n": {"n": 3}}).json()["align"]
    assert set(report["candidates"][0]["scores"]) == {"same", "short"}
    assert "no reward" not in report["reason"]


def test_a_reward_that_reads_is_the_default_if_there_is_no_other(serve: Serve) -> None:
    section = '[rewards.kind]\nkind = "density_ratio"\nprompt = "rudely"\n'
    report = serve(ENGINE + section).chat({"best_of_n": {"n": 3}}).json()["align"]
    assert set(report["candidates"][0]["scores"]) == {"kind"}
    assert report["selected"] == 2


# --- parameters of a request ---


def test_a_reference_chooses_the_reasoning_that_leads_to_it(live: Any) -> None:
    for name, align in (
        ("fake", {"best_of_n": {"n": 3}, "rewards": {"right": {"weight": 1, "reference": "42"}}}),
        ("fake@right", None),
    ):
        answer = live.chat(align, model=name).json()
        assert answer["choices"][0]["message"]["content"] == "no way"


def test_existing_answers_take_parameters_too(live: Any) -> None:
    body = {
        "messages": REQUEST_BODY["messages"],
        "candidates": ["no", "no way"],
        "rewards": {"right": {"reference": "42"}, "short": {"weight": 0}},
    }
    scored = live.post(body, "/v1/align/score").json()
    assert scored["ranking"] == [1, 0]
    assert scored["candidates"][1]["scores"]["right"]["value"] == pytest.approx(-0.5)


def test_a_request_may_bring_its_own_prompt(live: Any) -> None:
    own = {"weight": 1, "prompt": "Answer rudely.", "per_token": True}
    report = live.chat({"best_of_n": {"n": 3}, "rewards": {"kind": own}}).json()["align"]
    values = [each["scores"]["kind"]["value"] for each in report["candidates"]]
    assert values == pytest.approx([-2.0, -2.0, (-3.1 + 2.0) / 2])


REFUSED = [
    ({"right": 1}, "align.rewards.right", "needs the reference"),
    ({"right": {}}, "align.rewards.right", "needs the reference"),
    ({"right": {"reference": 5}}, "align.rewards.right.reference", "string"),
    ({"right": {"reference": " "}}, "align.rewards.right.reference", "words"),
    ({"right": {"reference": None}}, "align.rewards.right.reference", "string"),
    ({"right": {"refrence": "a"}}, "align.rewards.right.refrence", "did you mean 'reference'"),
    ({"short": {"words": 1}}, "align.rewards.short.words", "takes no parameters"),
    ({"short": {"weight": -1}}, "align.rewards.short.weight", "from 0"),
    ({"short": {"weight": None}}, "align.rewards.short.weight", "number"),
    ({"short": [1]}, "align.rewards.short", "number"),
    ({"kind": {"prompt": None}}, "align.rewards.kind", "compares a context with itself"),
    ({"kind": {"per_token": 1}}, "align.rewards.kind.per_token", "boolean"),
    ({"same": {"extract": "("}}, "align.rewards.same.extract", "regular expression"),
    ({"same": {"extract": "a" * 501}}, "align.rewards.same.extract", "500"),
    ({"trust_judge": {"scale": 7}}, "align.rewards.trust_judge.scale", "5, 10 or 100"),
    ({"other": {"weight": 1}}, "align.rewards.other", "no such reward"),
]


@pytest.mark.parametrize(("rewards", "param", "message"), REFUSED)
def test_wrong_parameters_are_refused_by_name(
    live: Any, rewards: Any, param: str, message: str
) -> None:
    before = live.engine.sampled
    refused = live.chat({"best_of_n": {"n": 2}, "rewards": rewards})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert live.engine.sampled == before


def test_the_rewards_list_their_cost_and_parameters(live: Any) -> None:
    rewards = live.get("/v1/align/methods").json()["rewards"]
    assert set(rewards["right"]["parameters"]["properties"]) == {"reference"}
    assert rewards["short"]["parameters"] is None
    assert "twice" in rewards["kind"]["cost"]
    assert all(reward["cost"] for reward in rewards.values())


def test_the_schema_of_the_api_knows_the_parameters(live: Any) -> None:
    schemas = live.get("/openapi.json").json()["components"]["schemas"]
    rewards = schemas["Align"]["properties"]["rewards"]["anyOf"][0]["properties"]
    assert rewards["right"]["required"] == ["reference"]
    assert "anyOf" in rewards["kind"]


@pytest.mark.slow
def test_a_pattern_that_would_take_years_ends_with_a_4xx(serve: Serve) -> None:
    slow = serve(
        f'[engine]\nkind = "fake"\nreplies = [{{text = "{"x" * 3000}"}}]\n'
        '[rewards.same]\nkind = "agreement"\n'
    )
    own = {"same": {"extract": "(?:x+x+)+y"}}
    failed = slow.chat({"best_of_n": {"n": 2}, "rewards": own})
    assert failed.status_code == 424
    assert "takes longer than" in failed.json()["error"]["message"]
