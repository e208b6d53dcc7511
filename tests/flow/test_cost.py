"""The worst case counts what contexts of guidance and rewards read, and nothing for other plans."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align import align
from infer_align.config import registry
from infer_align.engines.fake import Fake, FakeEngine, Reply
from infer_align.errors import InvalidRequest
from infer_align.flow.cost import read_in_texts
from infer_align.flow.plan import Plan, make_plan, make_scoring_plan
from infer_align.flow.request import parse_request
from infer_align.rewards import Reward
from infer_align.rewards.rules import Rules
from infer_align.types import Candidate, Capability
from tests.flow.builders import LIMITS, REQUEST_BODY

# The conversation has one word, and each prompt is added to it.
TRAITS = {"a": {"prompt": "be kind now"}, "b": {"prompt": "be brief", "negative_prompt": "talk"}}
WORDS = 10  # max_tokens of the request
SHORT: dict[str, Reward] = {"short": Rules(words_weight=-1.0).load()}
SECTIONS: dict[str, dict[str, Any]] = {
    "density_ratio": {"prompt": "be kind", "negative_prompt": "be rude"},
    "follow_up": {"satisfied": ("thank you",), "dissatisfied": ("no", "that is wrong")},
    "likelihood": {"lead": " Answer:"},
    "value": {"value": "v"},
}


class GuidedEngine(FakeEngine):
    """The fake engine, claiming every capability, so that guided requests can be planned."""

    capabilities = frozenset(Capability)
    reads_values = True


def engine() -> GuidedEngine:
    return GuidedEngine(Fake(replies=(Reply("one two three", estimates={"v": 1.0}),)))


def planned(keys: Any, rewards: Any = None, model: FakeEngine | None = None) -> Plan:
    request = parse_request({**REQUEST_BODY, "align": keys}, "chat", {})
    weights = {"short": 1.0} if rewards is None else {}
    return make_plan(request, model or engine(), rewards or SHORT, weights, LIMITS)


def guidance(*traits: str, scale: float = 1.0) -> dict[str, Any]:
    used = {name: TRAITS[name] for name in traits}
    return {"guidance": {"scale": dict.fromkeys(traits, scale), "traits": used}}


def reading(kind: str, model: FakeEngine) -> dict[str, Reward]:
    reward: Reward = registry.rewards.get(kind)(**SECTIONS[kind]).load()
    reward.engines = {"served": model}
    return {"r": reward}


def weights(kind: str) -> dict[str, Any]:
    return {"r": {"weight": 1, "reference": "forty two"}} if kind == "likelihood" else {"r": 1}


def test_a_plan_without_contexts_and_readings_costs_what_it_samples() -> None:
    plan = planned({"best_of_n": {"n": 3}})
    assert plan.worst_case_tokens == plan.drawing_tokens == 3 * WORDS


@pytest.mark.parametrize(
    ("traits", "prompts"), [(("a",), (4,)), (("b",), (3, 2)), (("a", "b"), (4, 3, 2))]
)
@pytest.mark.parametrize(
    ("keys", "n"), [({}, 1), ({"best_of_n": {"n": 5}}, 5), ({"adaptive": {"max_n": 7}}, 7)]
)
def test_each_context_reads_its_prompt_once_and_every_answer(
    traits: tuple[str, ...], prompts: tuple[int, ...], keys: Any, n: int
) -> None:
    plan = planned({**guidance(*traits), **keys})
    cost = plan.context_cost
    assert (cost.prompt_tokens, cost.contexts) == (sum(prompts), len(prompts))
    assert cost.worst_case == sum(prompts) + n * len(prompts) * WORDS
    assert plan.worst_case_tokens == n * WORDS + cost.worst_case
    assert plan.drawing_tokens == n * WORDS


def test_each_direction_reads_the_contexts_of_its_own_prompt() -> None:
    directions = {"rps": {"k": 3}, "dpa": {"direction": {"helpful": 0.8, "brief": 0.6}}}
    plan = planned({**guidance("a"), **directions}, {"r": along()})
    assert len(plan.draws) == 3
    sizes = [engine().context_prompts(draw) for draw in plan.draws]
    assert plan.context_cost.prompt_tokens == sum(sum(size) for size in sizes)


def along() -> Reward:
    reward = Rules(words_weight=-1.0).load()
    reward.attributes = ("helpful", "brief")
    return reward


def test_a_scale_of_0_and_equal_prompts_are_read_once_or_not_at_all() -> None:
    assert planned(guidance("a", scale=0.0)).context_cost.worst_case == 0
    twice = {"scale": {"a": 1.0, "c": 2.0}, "traits": {"a": TRAITS["a"], "c": TRAITS["a"]}}
    assert planned({"guidance": twice}).context_cost.contexts == 1


@given(n=st.integers(1, 16), missing=st.integers(0, 1))
def test_the_budget_holds_the_contexts_to_the_token(n: int, missing: int) -> None:
    keys = {**guidance("a"), "best_of_n": {"n": n}}
    tokens = planned(keys).worst_case_tokens
    keys["budget"] = {"completion_tokens": tokens - missing}
    if not missing:
        assert planned(keys).worst_case_tokens == tokens
        return
    with pytest.raises(InvalidRequest) as caught:
        planned(keys)
    assert (caught.value.param, caught.value.code) == (
        "align.budget.completion_tokens",
        "over_budget",
    )
    noun = "candidate" if n == 1 else "candidates"
    terms = f"({n} {noun} x 10 tokens + {4 + n * 10} read in the contexts of guidance)"
    assert terms in caught.value.message
    assert "traits in align.guidance.scale" in caught.value.message


def test_the_limit_of_the_server_counts_contexts_and_names_the_traits() -> None:
    body = {**REQUEST_BODY, "max_tokens": 500, "align": guidance("a")}
    request = parse_request(body, "chat", {})
    with pytest.raises(InvalidRequest) as caught:
        make_plan(request, engine(), {}, {}, LIMITS)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "over_limit")
    assert "1 candidate x 500 tokens + 504 read in the contexts" in caught.value.message
    assert "traits in align.guidance.scale" in caught.value.message


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        # Both contexts with their prompt, once, and every answer in both.
        ("density_ratio", 2 * (3 + 4 * WORDS)),
        # For each answer the conversation, the answer and the three texts.
        ("follow_up", 4 * (1 + WORDS + 2 + 1 + 3)),
        # For each answer the conversation, the answer, the lead and the reference.
        ("likelihood", 4 * (1 + WORDS + 1 + 2)),
        ("value", 1 + 4 * WORDS),
    ],
)
def test_rewards_that_read_are_admitted_and_count_what_they_read(kind: str, tokens: int) -> None:
    model = engine()
    keys = {"best_of_n": {"n": 4}, "rewards": weights(kind)}
    plan = planned(keys, reading(kind, model), model)
    assert plan.reading_tokens == tokens
    assert plan.worst_case_tokens == 4 * WORDS + tokens
    usage = asyncio.run(align(plan, model)).scores.usage
    assert 0 < usage.engine_tokens == usage.reward_tokens <= tokens


def test_what_rewards_read_is_no_generated_token() -> None:
    model = engine()
    keys = {"best_of_n": {"n": 4}, "rewards": {"r": 1}, "budget": {"completion_tokens": 4 * WORDS}}
    plan = planned(keys, reading("density_ratio", model), model)
    assert plan.worst_case_tokens > plan.drawing_tokens == 4 * WORDS


def test_each_batch_reads_the_prompt_again() -> None:
    model = engine()
    keys = {"adaptive": {"max_n": 7, "batch": 3}, "rewards": {"r": 1}}
    plan = planned(keys, reading("density_ratio", model), model)
    assert len(plan.batches) == 3
    assert plan.reading_tokens == 2 * (3 * 3 + 7 * WORDS)


@given(st.lists(st.text(max_size=12), min_size=1, max_size=4))
def test_texts_that_exist_cost_at_most_their_bytes(texts: list[str]) -> None:
    model = engine()
    request = parse_request({**REQUEST_BODY, "align": {"rewards": {"r": 1}}}, "chat", {})
    plan = make_scoring_plan(
        request.body["messages"],
        len(texts),
        request.align,
        model,
        reading("density_ratio", model),
        {},
    )
    answers = [
        Candidate(i, {"message": {"role": "assistant", "content": text}})
        for i, text in enumerate(texts)
    ]
    written = sum(len(text.encode()) for text in texts)
    assert read_in_texts(plan, answers) == 2 * (3 + written)
