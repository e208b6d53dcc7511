"""Several candidates take as few calls as the upstream allows."""

from __future__ import annotations

import pytest

from infer_align.engines.openai import batch_size
from tests.engines.openai.upstream import FakeUpstream
from tests.server.upstream.conftest import BEST_OF_4, Serve, align_of, content_of, events_of


@pytest.mark.parametrize(
    ("engine", "max_choices", "refuse", "first", "second"),
    [
        ("", None, False, 1, 1),
        ('n = "native"', None, False, 1, 1),
        ('n = "single"', None, False, 5, 5),
        # One call returns 1 of 5, and four more the others. Then five calls start at once.
        ("", 1, False, 5, 5),
        # One call returns 3 of 5, and two more the others. Then the calls are for 3 and 2.
        ("", 3, False, 3, 2),
        # One call is refused, and five more return one each. The next request starts the same
        # way, because a refusal may have other reasons than the number.
        ("", None, True, 6, 6),
        ('n = "native"', 3, False, 3, 3),
    ],
)
def test_the_calls_follow_what_the_upstream_returns(
    up: FakeUpstream,
    serve_upstream: Serve,
    engine: str,
    max_choices: int | None,
    refuse: bool,
    first: int,
    second: int,
) -> None:
    server = serve_upstream(engine)
    up.max_choices = max_choices
    up.refuse_n = refuse
    for calls in (first, second):
        up.clear_log()
        answer = server.chat({"best_of_n": {"n": 5}})
        align = align_of(answer)
        assert up.calls == align["usage"]["engine_calls"] == calls
        assert content_of(answer) == "candidate 9"
        assert len(align["candidates"]) == 5
        assert answer.json()["usage"]["completion_tokens"] == 10
        assert sum(each["completion_tokens"] for each in align["candidates"]) == 10


def test_without_a_selection_every_choice_is_streamed(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    texts = ["", "", ""]
    for chunk in events_of(serve_upstream().chat(n=3, stream=True)):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == ["candidate 3", "candidate 1", "candidate 9"]
    assert up.calls == 1


def test_a_refused_n_changes_nothing_for_other_requests(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    """vLLM, for example, refuses n over 1 at temperature 0."""
    server = serve_upstream()
    up.behave = lambda _, body: (
        "error_400" if body.get("n", 1) > 1 and body.get("temperature") == 0 else "ok"
    )
    calls = []
    for fields in ({}, {"temperature": 0}, {}):
        up.clear_log()
        align_of(server.chat({"best_of_n": {"n": 8}}, **fields))
        calls.append(up.calls)
    assert calls == [1, 9, 1]


def test_a_number_that_is_too_large_is_approached_in_batches(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    server = serve_upstream()
    up.behave = lambda _, body: "error_400" if body.get("n", 1) > 8 else "ok"
    calls = []
    for n in (4, 16, 4, 8):
        up.clear_log()
        assert align_of(server.chat({"best_of_n": {"n": n}}))["dropped"] == 0
        calls.append(up.calls)
    # 16 are refused and one is accepted. The others come in batches of 8 and 7.
    assert calls == [1, 4, 1, 1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the batch sizes read, in seconds."""
    seconds = [0.0]
    monkeypatch.setattr(batch_size, "monotonic", lambda: seconds[0])
    return seconds


def test_an_ignored_n_is_requested_again_after_a_while(
    up: FakeUpstream, serve_upstream: Serve, clock: list[float]
) -> None:
    server = serve_upstream()
    up.max_choices = 1
    server.chat(BEST_OF_4)
    up.clear_log()
    up.max_choices = None
    server.chat(BEST_OF_4)
    assert up.calls == 4
    clock[0] += batch_size.FORGET_SECONDS
    up.clear_log()
    server.chat(BEST_OF_4)
    assert up.calls == 1
