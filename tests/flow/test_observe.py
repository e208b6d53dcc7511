"""Observers follow the running candidates of a plan and may reject them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from infer_align.engines.fake import Reply
from infer_align.errors import EngineFailed
from infer_align.flow.plan import Plan
from infer_align.flow.selection import NothingScored
from infer_align.methods import Observer
from infer_align.methods.early_stop import EarlyStop
from infer_align.steering import EstimateSchedule
from infer_align.types import Candidate, Delta, Estimate, Event
from tests.flow.builders import Pipelined, Scripted, engine, ones, run, scored


class RejectAt(Observer):
    """Rejects one candidate at the first estimate of any."""

    def __init__(self, index: int) -> None:
        self._index = index
        self.events: list[Event] = []

    def observe(self, event: Event) -> Mapping[int, str]:
        self.events.append(event)
        return {self._index: "by the test"} if isinstance(event, Estimate) else {}


class RejectEvery(Observer):
    """Rejects each candidate at its first event."""

    def observe(self, event: Event) -> Mapping[int, str]:
        return {event.index: "by the test"}


def observed(
    n: int, observer: Observer | None = None, *, deltas: bool = False, **fields: Any
) -> Plan:
    """Return a plan whose draws are estimated after 4 tokens, with early stopping by default."""
    made = scored(n, **fields)
    schedule = EstimateSchedule({"v": 1.0}, 4)
    draws = tuple(replace(draw, estimates=schedule, deltas=deltas) for draw in made.draws)
    factory = EarlyStop({"v": 1.0}, 4, 0.5).observer
    observers = (factory,) if observer is None else (lambda _n, _returned: observer,)
    return replace(made, draws=draws, observers=observers)


def worth(value: float, text: str = "1 " * 300 + "1") -> Reply:
    return Reply(text, estimates={"v": value}, seconds_per_token=0.001)


def test_candidates_of_all_draws_are_compared_with_each_other() -> None:
    response = run(observed(1, draws=4, reward=Scripted(ones)), engine(worth(0.5)))
    assert response.selection.ranking == (0,)
    rejected = [c.rejected is not None for c in response.candidates]
    assert rejected == [False, True, True, True]
    assert "3 of them stopped early" in response.selection.reason


def test_a_pipelined_reward_does_not_score_rejected_candidates() -> None:
    reward = Pipelined(ones)
    replies = (worth(0.1), worth(0.9), worth(0.2), worth(0.8))
    response = run(observed(4, reward=reward), engine(*replies))
    assert response.selection.ranking == (1,)
    assert reward.calls == 1


def test_a_failure_of_the_last_candidate_fails_the_request() -> None:
    failing = replace(worth(0.9), error="boom", status=503)
    with pytest.raises(EngineFailed, match="boom"):
        run(observed(2), engine(worth(0.1), failing))


def test_any_observer_sees_every_event_and_may_reject() -> None:
    observer = RejectAt(2)
    made = observed(1, observer, deltas=True, draws=3, reward=Scripted(ones))
    response = run(made, engine(worth(0.5)))
    assert response.candidates[2].rejected == "by the test"
    assert response.selection.dropped == {2: "by the test"}
    assert {event.index for event in observer.events} == {0, 1, 2}
    kinds = {type(event) for event in observer.events}
    assert kinds == {Delta, Estimate, Candidate}


@pytest.mark.parametrize("deadline_seconds", [None, 600.0])
@pytest.mark.parametrize("n", [1, 3])
def test_a_request_whose_candidates_are_all_rejected_says_why(
    n: int, deadline_seconds: float | None
) -> None:
    made = observed(n, RejectEvery(), deltas=True, deadline_seconds=deadline_seconds)
    with pytest.raises(
        NothingScored, match=r"every candidate was rejected .*: by the test"
    ) as none:
        run(made, engine(worth(0.5)))
    assert len(none.value.candidates) == n
