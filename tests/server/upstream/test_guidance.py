"""A server before another one guides its model as that server itself does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

from infer_align import config as configuration
from infer_align.demo import world
from tests.server.conftest import Live, end, start
from tests.server.upstream.conftest import align_of

pytestmark = pytest.mark.slow

TRAITS = """
[traits.polite]
prompt = "Answer politely and say you hope it helps."
[traits.rude]
prompt = "You are rude."
negative_prompt = "You are polite."
"""
BACK = f'[engine]\nkind = "transformers"\nmodel = "demo"\nthreads = 1\n{TRAITS}'
REWARD = '[rewards.brevity]\nkind = "rules"\nwords_weight = -1.0\n'
QUESTIONS = world.prompts(2, seed=4)


def serve(folder: Any, text: str) -> Live:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return start(configuration.load(path))


@pytest.fixture(scope="module")
def back(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The server that owns the model."""
    live = serve(tmp_path_factory.mktemp("back"), BACK)
    yield live
    end(live)


@pytest.fixture(scope="module")
def front(back: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The server before it."""
    engine = f'[engine]\nkind = "openai"\nurls = "{back.base_url}"\ntokenizer = "demo"\n'
    live = serve(tmp_path_factory.mktemp("front"), f"{engine}{REWARD}{TRAITS}")
    yield live
    end(live)


def ask(live: Live, scale: dict[str, float], question: str = QUESTIONS[0], **fields: Any) -> Any:
    align = {"guidance": {"scale": scale}, **fields.pop("align", {})}
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 12, **fields}
    return live.post({"temperature": 0, **body, "align": align})


def content(answer: Any) -> Any:
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    "scale", [{"polite": 2.0}, {"polite": -1.0}, {"rude": 1.0, "polite": -0.5}], ids=json.dumps
)
def test_the_answers_are_those_of_the_server_behind(
    front: Live, back: Live, scale: dict[str, float], question: str
) -> None:
    answer = ask(front, scale, question)
    behind = ask(back, scale, question)
    assert align_of(answer)["methods"] == ["guidance"]
    assert content(answer) == content(behind)
    for name in ("candidate_tokens", "context_tokens"):
        assert align_of(answer)["usage"][name] == align_of(behind)["usage"][name]


def test_the_cost_is_reported(front: Live) -> None:
    answer = ask(front, {"rude": 1.0}, max_tokens=3)
    usage = align_of(answer)["usage"]
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert usage["engine_calls"] == 3 * 3, "three contexts"
    assert usage["context_tokens"] > 2 * 3 + 2 * answer.json()["usage"]["prompt_tokens"]


def test_the_best_of_several_guided_candidates_is_returned(front: Live) -> None:
    align = {"best_of_n": {"n": 3}, "rewards": {"brevity": 1.0}}
    answer = ask(front, {"polite": 1.0}, temperature=1.0, seed=3, align=align)
    candidates = align_of(answer)["candidates"]
    scores = [candidate["scores"]["brevity"]["value"] for candidate in candidates]
    assert scores[align_of(answer)["selected"]] == max(scores)
    again = ask(front, {"polite": 1.0}, temperature=1.0, seed=3, align=align)
    assert content(again) == content(answer)


def test_a_guided_answer_streams(front: Live) -> None:
    whole = content(ask(front, {"polite": 2.0}))
    events = ask(front, {"polite": 2.0}, stream=True).text.split("\n\n")
    pieces = []
    for event in events[:-2]:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            pieces.append(choice["delta"].get("content") or "")
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 2


# A template is code, and this one would run for hours.
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("server", ["front", "back"])
def test_a_client_sets_no_template(request: pytest.FixtureRequest, server: str) -> None:
    live: Live = request.getfixturevalue(server)
    answer = ask(live, {"polite": 1.0}, chat_template_kwargs={"chat_template": ENDLESS})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "chat_template_kwargs"
    assert error["message"] == (
        "chat_template_kwargs.chat_template: is not a variable of the template; leave it out."
    )
    assert ask(live, {"polite": 1.0}, chat_template=ENDLESS).json()["error"]["param"] == (
        "chat_template"
    )


def test_the_list_of_methods_says_that_guidance_is_there(front: Live) -> None:
    ask(front, {"polite": 1.0}, max_tokens=1)
    listed = front.get("/v1/align/methods").json()
    assert listed["methods"]["guidance"]["available"]
    assert "guide" in listed["capabilities"]


def test_a_request_that_the_limits_refuse_makes_no_call(front: Live, back: Live) -> None:
    ask(front, {"polite": 1.0}, max_tokens=1)
    calls = back.metric("infer_align_requests_total")
    refused = ask(front, {"polite": 1.0}, align={"budget": {"completion_tokens": 5}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "align.budget.completion_tokens"
    assert back.metric("infer_align_requests_total") == calls
