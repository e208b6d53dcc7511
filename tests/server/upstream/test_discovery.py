"""Nothing is generated before a request needs to know what an upstream can do."""

from __future__ import annotations

import threading
from typing import Any

from tests.engines.openai.test_probe import capable, indifferent
from tests.engines.openai.upstream import FakeUpstream, reply
from tests.server.conftest import USER
from tests.server.upstream.conftest import BEST_OF_4, Serve, align_of

LAZY = 'probe = "lazy"'
NAMES = [f"model-{i}" for i in range(300)]
ROUTES = ("/ready", "/v1/models", "/v1/align/methods", "/openapi.json", "/metrics", "/health")
JUDGED = {"best_of_n": {"n": 2}, "trust_judge": {"criteria": "brief"}}


def numbered(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Answer as a capable upstream; several choices have texts that the reward can read."""
    answer = capable(path, body)
    if body.get("n", 1) > 1:
        for choice in answer["choices"]:
            choice["message"] = {"role": "assistant", "content": f"candidate {choice['index']}"}
    return answer


def listing_300(up: FakeUpstream) -> None:
    up.models = [{"id": name} for name in NAMES]
    up.answer = numbered


def models_called(up: FakeUpstream) -> set[str]:
    return {body["model"] for body in up.bodies}


def test_no_generation_before_a_request_and_one_models_probes_after_it(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    listing_300(up)
    server = serve_upstream(LAZY)
    for route in ROUTES:
        assert server.get(route).status_code == 200
    assert server.get("/v1/models/model-7").status_code == 200
    assert len(server.get("/v1/models").json()["data"]) == 300
    assert up.calls == 0
    align_of(server.post({"model": "model-7", "messages": USER, "align": BEST_OF_4}))
    assert models_called(up) == {"model-7"}
    assert up.calls == 1, "the calls themselves show if n is honoured"


def test_a_feature_is_looked_for_at_its_first_need_and_remembered(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    listing_300(up)
    server = serve_upstream(LAZY)
    body = {"model": "model-9", "messages": USER, "logprobs": True, "align": BEST_OF_4}
    assert server.post(body).status_code == 200
    assert [bool(each.get("n")) for each in up.bodies] == [False, True]
    assert server.post(body).status_code == 200
    assert up.calls == 3
    assert models_called(up) == {"model-9"}
    assert server.post({**body, "model": "model-8"}).status_code == 200
    assert up.calls == 5


def test_an_ignored_field_is_refused_before_anything_is_drawn(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    up.answer = indifferent
    server = serve_upstream(LAZY)
    for field in ("logprobs", "logit_bias"):
        answer = server.chat(BEST_OF_4, **{field: {"5": 1} if field == "logit_bias" else True})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == field
        assert "the upstream of 'up' does not honour it" in error["message"]
    assert all("n" not in body for body in up.bodies)


def test_a_judge_looks_for_label_probabilities_once(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    up.answer = indifferent
    server = serve_upstream(LAZY)
    for _ in range(2):
        answer = server.chat(JUDGED)
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert "align.trust_judge: needs label_logprobs" in message
        assert "the engine of 'up' lacks" in message
    assert up.calls == 3, "one call for logprobs, two for begun turns"
    body = {"messages": USER, "candidates": ["a", "b"]}
    assert server.post(body, "/v1/align/judge").status_code == 400
    assert up.calls == 3


def test_a_missing_capability_without_a_probe_names_the_engine(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    listing_300(up)
    server = serve_upstream(LAZY)
    body = {"model": "model-3", "messages": USER, "align": {"vas": {"beta": {"x": 1.0}}}}
    answer = server.post(body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "align.vas: needs steer, which the engine of 'model-3' lacks" in message
    assert up.calls == 0


def test_concurrent_first_needs_share_one_probe(up: FakeUpstream, serve_upstream: Serve) -> None:
    server = serve_upstream(LAZY)
    everyone_waits = threading.Event()

    async def answer_together(app: FakeUpstream, body: dict[str, Any], send: Any) -> None:
        app.reader_is_ready = everyone_waits
        if body.get("logprobs") and "n" not in body:
            await app.pause()
        await reply(send, 200, numbered("", body))

    up.behave = lambda _, __: answer_together
    statuses: list[int] = []

    def client() -> None:
        statuses.append(server.chat(BEST_OF_4, logprobs=True).status_code)

    clients = [threading.Thread(target=client) for _ in range(5)]
    for thread in clients:
        thread.start()
    assert server.until(lambda: up.calls > 0)
    everyone_waits.set()
    for thread in clients:
        thread.join(60)
    assert statuses == [200] * 5
    assert sum("n" not in body for body in up.bodies) == 1


def test_a_failed_probe_is_not_remembered(up: FakeUpstream, serve_upstream: Serve) -> None:
    server = serve_upstream(f"{LAZY}\nrecovery_seconds = 0.2")
    up.behave = lambda _, __: "error_500"
    answer = server.chat(JUDGED)
    assert answer.status_code == 503
    assert "label_logprobs" in answer.json()["error"]["message"]
    assert "retry-after" in answer.headers
    up.behave = lambda _, __: "ok"
    up.answer = numbered

    assert server.until(lambda: "label_logprobs" not in server.chat(JUDGED).text)


def test_a_plain_request_probes_nothing(up: FakeUpstream, serve_upstream: Serve) -> None:
    server = serve_upstream(LAZY)
    assert server.chat(logprobs=True, top_logprobs=2, logit_bias={"5": 1}, n=2).status_code == 200
    assert server.post({"prompt": "x", "logprobs": 1}, "/v1/completions").status_code == 200
    assert up.calls == 2


def test_probing_at_the_start_stays_available(up: FakeUpstream, serve_upstream: Serve) -> None:
    up.answer = numbered
    server = serve_upstream('probe = "start"')
    assert up.calls == 0, "the log was cleared after the start"
    listed = server.get("/v1/align/methods").json()
    assert "label_logprobs" in listed["capabilities"]
    assert listed["unknown_capabilities"] == []
    assert server.chat(BEST_OF_4, logprobs=True).status_code == 200
    assert up.calls == 1
