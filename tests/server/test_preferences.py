"""Directions over HTTP with the unchanged OpenAI SDK: in prompts, draws and the selection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import openai
import pytest

USER: Any = [{"role": "user", "content": "hello there"}]
SYSTEM: Any = [{"role": "system", "content": "Be kind."}, *USER]
PAIR = {"helpfulness": 3.0, "verbosity": 4.0}
CONFIG = """
[engine]
kind = "fake"
replies = [{{text = "candidate {{seed}}"}}, {{text = "the cat {{seed}} sat"}}]
[rewards.quality]
kind = "classifier"
model = "{model}"
attributes = ["helpfulness", "verbosity"]
scaling = {{helpfulness = {{mean = 1.0, std = 2.0}}}}
[rewards.raw]
kind = "classifier"
model = "{model}"
attributes = ["helpfulness", "verbosity"]
[rewards.warmth]
kind = "classifier"
model = "{model}"
attributes = ["warmth", "depth"]
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[presets.thorough]
dpa = {{direction = {{verbosity = 1.0}}}}
rps = {{k = 3}}
rewards = {{quality = 1.0}}
"""


@pytest.fixture(scope="module")
def live(serve: Callable[[str], Any], reward_model: Callable[..., str]) -> Any:
    return serve(CONFIG.format(model=reward_model(labels=2)))


@pytest.fixture
def client(live: Any) -> Any:
    with openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=0, timeout=60) as sdk:
        yield sdk


def ask(client: openai.OpenAI, align: Any, messages: Any = USER, **fields: Any) -> tuple[Any, Any]:
    answer = client.chat.completions.create(
        model="fake",
        messages=messages,
        seed=fields.pop("seed", 5),
        extra_body={"align": align},
        **fields,
    )
    return answer, (answer.model_extra or {})["align"]


def test_a_direction_extends_the_prompt_and_keeps_the_clients_messages(
    client: openai.OpenAI, live: Any
) -> None:
    _, align = ask(client, {"dpa": {"direction": PAIR}}, SYSTEM)
    assert align["methods"] == ["dpa"]
    assert align["direction"] == pytest.approx({"helpfulness": 0.6, "verbosity": 0.8})
    assert align["candidates"][0]["direction"] == align["direction"]
    sent = live.engine.bodies[-1]["messages"]
    assert sent[0]["content"].endswith("= helpfulness*60 + verbosity*80\n\nBe kind.")
    assert sent[1:] == USER


def test_a_direction_alone_streams(client: openai.OpenAI) -> None:
    body: Any = {"align": {"dpa": {"direction": PAIR}}}
    with client.chat.completions.create(
        model="fake", messages=USER, seed=5, stream=True, extra_body=body
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "candidate 5"
    assert (chunks[-1].model_extra or {})["align"]["direction"]["verbosity"] == pytest.approx(0.8)


def test_best_of_n_along_a_direction(client: openai.OpenAI) -> None:
    rewards = {"quality": 1.0, "raw.helpfulness": 0.0, "raw.verbosity": 0.0}
    answer, align = ask(
        client, {"dpa": {"direction": PAIR}, "best_of_n": {"n": 6}, "rewards": rewards}
    )
    for candidate in align["candidates"]:
        scores = {name: score["value"] for name, score in candidate["scores"].items()}
        projected = 0.6 * (scores["raw.helpfulness"] - 1.0) / 2.0 + 0.8 * scores["raw.verbosity"]
        assert scores["quality"] == candidate["objective"] == pytest.approx(projected, abs=1e-5)
    best = max(align["candidates"], key=lambda c: c["objective"])
    assert align["selected"] == best["index"]
    assert answer.choices[0].message.content


def test_rps_draws_around_and_selects_by_the_target(client: openai.OpenAI, live: Any) -> None:
    before = live.engine.sampled
    align_body = {
        "dpa": {"direction": PAIR},
        "rps": {"k": 5, "max_angle": 20},
        "rewards": {"quality": 1, "raw": 0},
    }
    _, align = ask(client, align_body)
    assert live.engine.sampled - before == 5
    assert align["methods"] == ["dpa", "rps"]
    directions = [candidate["direction"] for candidate in align["candidates"]]
    assert len({repr(d) for d in directions}) == 5
    for d in directions:
        assert math.hypot(*d.values()) == pytest.approx(1.0)
        assert 0.6 * d["helpfulness"] + 0.8 * d["verbosity"] >= math.cos(math.radians(20)) - 1e-9
    _, single = ask(
        client,
        {
            "dpa": {"direction": PAIR},
            "best_of_n": {"n": 1},
            "rewards": {"raw.helpfulness": 0, "quality": 1},
        },
    )
    assert single["candidates"][0]["scores"]["quality"]["value"] is not None
    again = ask(client, align_body)[1]
    assert again["candidates"] == align["candidates"], "the seed fixes neighbours and candidates"
    assert ask(client, align_body, seed=6)[1]["candidates"] != align["candidates"]


def test_rps_with_best_of_n_is_n_per_direction(client: openai.OpenAI) -> None:
    for align_body in (
        {"dpa": {"direction": PAIR}, "rps": {"k": 3}, "best_of_n": {"n": 2}},
        {"best_of_n": {"n": 2}, "rps": {"k": 3}, "dpa": {"direction": PAIR}},
    ):
        answer, align = ask(client, align_body, n=2)
        assert len(align["candidates"]) == 6
        assert len(answer.choices) == 2
        assert [repr(c["direction"]) for c in align["candidates"][::2]] == [
            repr(c["direction"]) for c in align["candidates"][1::2]
        ]


def test_by_default_the_rewards_with_the_attributes_score(client: openai.OpenAI) -> None:
    _, align = ask(client, {"dpa": {"direction": PAIR}, "rps": {"k": 2}})
    assert set(align["candidates"][0]["scores"]) == {"quality", "raw"}
    _, other = ask(client, {"dpa": {"direction": {"warmth": 1.0}}, "best_of_n": {"n": 2}})
    assert set(other["candidates"][0]["scores"]) == {"warmth"}
    _, mixed = ask(
        client, {"dpa": {"direction": {"warmth": 1.0, "verbosity": 1.0}}, "best_of_n": {"n": 2}}
    )
    assert set(mixed["candidates"][0]["scores"]) == {"brevity"}, "none scores both"


def test_a_budget_is_checked_and_named(client: openai.OpenAI) -> None:
    _, align = ask(client, {"dpa": {"direction": PAIR}, "rps": {"k": 4, "max_angle": 0}})
    assert len(align["candidates"]) == 4
    assert "1 of 4 directions within 0 degrees" in align["reason"]
    _, plain = ask(client, {"dpa": {"direction": PAIR}, "rps": {"k": 4, "neighborhood": "none"}})
    assert len(plain["candidates"]) == 4
    assert "directions" not in plain["reason"]


def test_by_preset(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake@thorough", messages=USER)
    align = (answer.model_extra or {})["align"]
    assert align["methods"] == ["dpa", "rps"]
    assert len(align["candidates"]) == 3


def test_usage_counts_each_prompt_once(client: openai.OpenAI) -> None:
    answer, align = ask(
        client, {"dpa": {"direction": PAIR}, "rps": {"k": 3}, "best_of_n": {"n": 2}}
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3 * 2, (
        "three prompts of two words, as the fake engine counts"
    )
    assert answer.usage.completion_tokens == sum(
        c["completion_tokens"] for c in align["candidates"]
    )
    assert align["usage"]["engine_calls"] == 6


def test_score_along_a_direction(live: Any) -> None:
    body = {
        "messages": USER,
        "candidates": ["the cat", "a dog"],
        "dpa": {"direction": PAIR},
        "rewards": {"quality": 1, "raw.verbosity": 0},
    }
    answer = live.post(body, "/v1/align/score").json()
    assert answer["direction"] == pytest.approx({"helpfulness": 0.6, "verbosity": 0.8})
    assert answer["candidates"][0]["scores"].keys() == {"quality", "raw.verbosity"}
    assert answer["usage"]["reward_tokens"] > 0


BAD: list[Any] = [
    (
        {"dpa": {"direction": {"helpfulnes": 1}}},
        "align.dpa.direction.helpfulnes",
        "did you mean 'helpfulness'?",
    ),
    ({"dpa": {"direction": {"helpfulness": 0}}}, "align.dpa.direction", "no length"),
    ({"dpa": {"direction": {}}}, "align.dpa.direction", "at least 1"),
    ({"dpa": {"direction": {"helpfulness": True}}}, "align.dpa.direction.helpfulness", "number"),
    ({"dpa": {"direction": {"helpfulness": "1"}}}, "align.dpa.direction.helpfulness", "number"),
    ({"dpa": {"direction": {"helpfulness": 10**400}}}, "align.dpa.direction.helpfulness", "finite"),
    ({"dpa": {"direction": [1, 2]}}, "align.dpa.direction", "object"),
    ({"dpa": {}}, "align.dpa.direction", "required"),
    ({"rps": {}}, "align.rps", "align.dpa.direction"),
    ({"dpa": {"direction": PAIR}, "rps": {"k": 0}}, "align.rps.k", "greater than or equal to 1"),
    ({"dpa": {"direction": PAIR}, "rps": {"k": 129}}, "align.rps.k", "less than or equal to 128"),
    (
        {"dpa": {"direction": PAIR}, "rps": {"k": 100}, "best_of_n": {"n": 2}},
        "align.best_of_n.n",
        "limit of 128",
    ),
    (
        {"dpa": {"direction": PAIR}, "rps": {"max_angle": 181}},
        "align.rps.max_angle",
        "less than or equal to 180",
    ),
    (
        {"dpa": {"direction": PAIR}, "rps": {"max_angle": -1}},
        "align.rps.max_angle",
        "greater than or equal to 0",
    ),
    (
        {"dpa": {"direction": PAIR}, "rps": {"neighborhood": "near"}},
        "align.rps.neighborhood",
        "'uniform', 'published' or 'none'",
    ),
    (
        {"dpa": {"direction": {**PAIR, "depth": 1}}, "rps": {"neighborhood": "published"}},
        "align.rps.neighborhood",
        "2 attributes",
    ),
    ({"best_of_n": {}, "rewards": {"quality": 1}}, "align.rewards.quality", "several objectives"),
    (
        {"dpa": {"direction": {"depth": 1}}, "best_of_n": {}, "rewards": {"quality": 1}},
        "align.rewards.quality",
        "does not score 'depth'",
    ),
]


@pytest.mark.parametrize(
    ("align", "param", "hint"), BAD, ids=lambda v: v if isinstance(v, str) else ""
)
def test_wrong_parameters_are_named(live: Any, align: Any, param: str, hint: str) -> None:
    before = live.engine.sampled
    answer = live.chat(align)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert hint in error["message"], error["message"]
    assert live.engine.sampled == before, "nothing was spent"


def test_numbers_that_json_cannot_represent_are_refused(live: Any) -> None:
    for value in (b"NaN", b"Infinity", b"-Infinity"):
        direction = b'{"direction": {"verbosity": %s}}' % value
        messages = b'[{"role": "user", "content": "x"}]'
        body = b'{"messages": %s, "align": {"dpa": %s}}' % (messages, direction)
        answer = live.post(body)
        assert answer.status_code == 400
        assert value.decode().strip("-") in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "align", [{"dpa": {"direction": PAIR}}, {"dpa": {"direction": PAIR}, "rps": {}}]
)
def test_text_completions_have_no_direction(live: Any, align: Any) -> None:
    answer = live.post({"prompt": "x", "align": align}, "/v1/completions")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "align.dpa"
    assert "/v1/chat/completions" in answer.json()["error"]["message"]
