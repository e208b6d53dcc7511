"""Drawing: failed candidates are data, and a deadline keeps what is finished."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from infer_align import align
from infer_align.engines.fake import Fake, FakeEngine, Reply
from infer_align.errors import AlignError, DeadlineExceeded, EngineFailed
from infer_align.types import Candidate, Delta, Draw
from tests.flow.builders import Scripted, drained, engine, ones, plan, run, scored


def test_candidates_are_numbered_over_all_draws() -> None:
    response = run(scored(2, draws=3), engine("{seed}"))
    assert [c.index for c in response.candidates] == list(range(6))
    assert [c.draw for c in response.candidates] == [0, 0, 1, 1, 2, 2]
    assert [c.text for c in response.candidates] == ["0", "1", "2", "3", "4", "5"]
    assert response.selection.ranking[0] == 5
    assert response.prompt_tokens == 1, "one prompt, however often it is drawn from"


def test_deltas_arrive_as_they_are_sampled() -> None:
    deltas: list[Delta] = []
    response = run(plan(2), engine("a b c"), on_delta=deltas.append)
    for i in (0, 1):
        pieces = [d.choice["delta"]["content"] for d in deltas if d.index == i]
        assert "".join(pieces) == response.candidates[i].text


def test_failed_candidates_are_data_until_none_is_left() -> None:
    bad = Reply("", error="boom", status=503)
    response = run(scored(), engine(bad, "1", "2"))
    assert response.selection.ranking == (2, 1)
    assert response.selection.dropped == {0: "failed: boom"}
    assert math.isnan(response.scores.members["r"][0, 0])
    with pytest.raises(EngineFailed, match=r"all 3 candidates failed; first: boom") as caught:
        run(scored(), engine(bad))
    assert caught.value.status == 503


def test_a_deadline_with_nothing_to_return() -> None:
    with pytest.raises(DeadlineExceeded, match=r"0\.1 s"):
        run(scored(deadline_seconds=0.1), engine(Reply("1 2", first_token_seconds=60)))


class Endless(FakeEngine):
    """Plays its script, but the last candidate's text never ends by itself."""

    async def _play(
        self, draw: Draw, params: Any, index: int, stream: Any, stop: asyncio.Event
    ) -> None:
        if index < draw.n - 1:
            await super()._play(draw, params, index, stream, stop)
            return
        stream.put(Delta(index, {"delta": {"content": "7"}}))
        await stop.wait()
        choice = {"message": {"role": "assistant", "content": "7"}, "finish_reason": "length"}
        stream.put(Candidate(index, choice, 0, 1, 1, interrupted=True))


def test_a_deadline_interrupts_running_candidates_and_keeps_finished_ones() -> None:
    source = Endless(Fake(replies=(Reply("1"), Reply("2"), Reply("7"))))
    response = run(scored(reward=Scripted(ones), deadline_seconds=1.0), source)
    assert response.partial
    assert [c.interrupted for c in response.candidates] == [False, False, True]
    assert response.candidates[2].finish_reason == "length"
    assert response.candidates[2].text == "7"


class Deaf(FakeEngine):
    """An engine that ignores stop."""

    def sample(self, draw: Draw) -> Any:
        stream = super().sample(draw)
        stream.stop = lambda index=None: None  # type: ignore[method-assign]
        return stream


@pytest.mark.slow
def test_an_engine_that_does_not_stop_is_left_after_a_grace() -> None:
    source = Deaf(Fake(replies=(Reply("1"), Reply("2", first_token_seconds=600))))
    response = run(scored(2, deadline_seconds=1.0), source)
    assert [c.text for c in response.returned] == ["1"]
    assert response.partial
    assert response.selection.dropped == {1: "failed: the deadline passed"}


def test_a_draw_that_is_refused_cancels_the_others_and_says_why() -> None:
    class Refusing(FakeEngine):
        def sample(self, draw: Draw) -> Any:
            if draw.seeds[0]:
                raise AlignError("the second is refused", status=400)
            return super().sample(draw)

    async def scenario() -> None:
        source = Refusing(Fake(replies=(Reply("1", first_token_seconds=600),)))
        with pytest.raises(AlignError, match="the second is refused"):
            await align(scored(2, draws=2), source)
        await drained(source)

    asyncio.run(scenario())
