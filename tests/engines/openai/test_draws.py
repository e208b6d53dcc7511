"""A draw takes few calls, and its candidates report calls and tokens truthfully."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from infer_align.errors import InvalidRequest
from infer_align.types import Candidate, Delta, Draw
from tests.engines.openai.conftest import QUESTION, MakeEngine
from tests.engines.openai.upstream import FakeUpstream

pytestmark = pytest.mark.anyio


async def test_a_message_that_names_stream_options_does_not_switch_usage_off(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    """The error message repeats the request, and with it the name of the option."""
    up.behave = lambda _, body: "echo" if "top_p" in body else "ok"
    engine = await make_engine()
    with pytest.raises(InvalidRequest, match="I refuse"):
        await engine.generate(Draw({"messages": QUESTION, "top_p": 7}, deltas=True))
    up.clear_log()
    await engine.generate(Draw({"messages": QUESTION}, deltas=True))
    assert up.bodies[0]["stream_options"] == {"include_usage": True}


async def test_an_upstream_that_rejects_stream_options_gets_none(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    up.behave = lambda _, body: "no_stream_options" if "stream_options" in body else "ok"
    engine = await make_engine()
    for calls in (2, 1):
        up.clear_log()
        (candidate,) = await engine.generate(Draw({"messages": QUESTION}, deltas=True))
        # The text has eleven characters, which is an estimate of three tokens.
        assert (candidate.text, candidate.completion_tokens) == ("candidate 3", 3)
        assert candidate.calls == up.calls == calls


async def test_missing_usage_is_estimated_from_the_text(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    message = {"role": "assistant", "content": "x" * 400}
    up.answer = lambda _, __: {"choices": [{"index": 0, "message": message}]}
    engine = await make_engine()
    (candidate,) = await engine.generate(Draw({"messages": QUESTION}))
    assert candidate.completion_tokens == 100
    # "hello" has five characters.
    assert candidate.prompt_tokens == 2


async def test_counts_that_are_written_as_floats_are_counts(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    message = {"role": "assistant", "content": "x" * 400}
    usage = {"prompt_tokens": 5.0, "completion_tokens": 7.0, "total_tokens": 12.0}
    up.answer = lambda _, __: {"choices": [{"index": 0, "message": message}], "usage": usage}
    engine = await make_engine()
    (candidate,) = await engine.generate(Draw({"messages": QUESTION}))
    assert (candidate.prompt_tokens, candidate.completion_tokens) == (5, 7)


async def test_finished_choices_of_a_broken_stream_count(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    """Four of eight choices finish before the connection is lost."""
    up.behave = lambda _, __: "half_then_broken"
    up.reader_is_ready = threading.Event()
    engine = await make_engine()
    candidates: dict[int, Candidate] = {}
    async with engine.sample(Draw({"messages": QUESTION}, 8, deltas=True)) as stream:
        async for event in stream:
            if isinstance(event, Candidate):
                candidates[event.index] = event
            elif isinstance(event, Delta) and event.index == 7:
                # This is the last event before the pause.
                up.reader_is_ready.set()
    assert [candidates[i].text for i in range(4)] == [f"candidate {n}" for n in (3, 1, 9, 9)]
    assert all("broke off" in (candidates[i].error or "") for i in range(4, 8))
    assert sum(candidate.calls for candidate in candidates.values()) == up.calls == 1


def refuses_more_than(limit: int) -> Any:
    return lambda _, body: "error_400" if body.get("n", 1) > limit else "ok"


def sizes_of(up: FakeUpstream) -> list[int]:
    """Return the numbers of candidates of all calls, ascending."""
    return sorted(body.get("n", 1) for body in up.bodies)


async def test_a_refused_number_is_halved_if_smaller_batches_are_known_to_work(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    up.behave = refuses_more_than(8)
    engine = await make_engine()
    for n, sizes in ((4, [4]), (16, [1, 7, 8, 16]), (4, [4]), (8, [8])):
        up.clear_log()
        candidates = await engine.generate(Draw({"messages": QUESTION}, n))
        assert all(candidate.error is None for candidate in candidates)
        assert sizes_of(up) == sizes
        assert sum(candidate.calls for candidate in candidates) == len(sizes)


async def test_a_batch_that_is_refused_although_one_was_accepted_is_halved_again(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    up.behave = refuses_more_than(2)
    engine = await make_engine()
    await engine.generate(Draw({"messages": QUESTION}, 2))
    up.clear_log()
    candidates = await engine.generate(Draw({"messages": QUESTION}, 9))
    assert all(candidate.error is None for candidate in candidates)
    assert sizes_of(up) == [1, 2, 2, 2, 2, 4, 4, 9]
    assert sum(candidate.calls for candidate in candidates) == up.calls


@pytest.mark.parametrize(("mode", "sizes"), [("auto", [1, 4]), ("native", [4])])
async def test_a_wrong_request_fails_the_draw_after_one_more_call_at_most(
    up: FakeUpstream, make_engine: MakeEngine, mode: str, sizes: list[int]
) -> None:
    up.behave = lambda _, __: "error_400"
    engine = await make_engine(n=mode)
    with pytest.raises(InvalidRequest, match="top_p") as raised:
        await engine.generate(Draw({"messages": QUESTION}, 4))
    assert (raised.value.param, raised.value.code) == ("top_p", "bad_top_p")
    assert sizes_of(up) == sizes
