"""The flow with a scripted engine and scripted rewards: failures are data, the rest is answered."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from infer_align import align
from infer_align.engines.fake import Fake, FakeEngine, Reply
from infer_align.errors import AlignError, DeadlineExceeded, EngineFailed, RewardFailed
from infer_align.flow.plan import Plan
from infer_align.flow.response import Response
from infer_align.flow.scorers import Scorer
from infer_align.methods import Observer
from infer_align.methods.early_stop import EarlyStop
from infer_align.objectives import Ensemble
from infer_align.rewards import Reward, RewardScores
from infer_align.types import (
    Candidate,
    Delta,
    Draw,
    Estimate,
    EstimateSchedule,
    Event,
    ScoringUsage,
)

BODY = {"messages": [{"role": "user", "content": "hello"}]}


class Scripted(Reward):
    """A reward whose scores are a function of the candidates."""

    def __init__(
        self,
        score: Callable[[Any], Any],
        members: int = 1,
        attributes: tuple[str, ...] = (),
        timeout: float = 5.0,
    ) -> None:
        self.members = tuple(str(i) for i in range(members))
        self.attributes = attributes
        self.timeout_seconds = timeout
        self.calls = 0
        self._score = score

    async def score(self, messages: Any, candidates: Any) -> RewardScores:
        self.calls += 1
        scores = self._score(candidates)
        return await scores if asyncio.iscoroutine(scores) else scores


def by_number(candidates: Any) -> RewardScores:
    values = np.array([[[float(c.text) for c in candidates]]])
    return RewardScores(values, usage=ScoringUsage(len(candidates)))


def ones(candidates: Any) -> RewardScores:
    return RewardScores(np.ones((1, 1, len(candidates))))


def scorers(weights: dict[str, float], rewards: dict[str, Reward]) -> tuple[Scorer, ...]:
    """Return the scorers for {name or name.attribute: weight}."""
    made = []
    for name, weight in weights.items():
        reward_name, _, attribute = name.partition(".")
        made.append(Scorer(reward_name, rewards[reward_name], weight, attribute or None))
    return tuple(made)


def plan(n: int = 3, *, draws: int = 1, **fields: Any) -> Plan:
    made = tuple(Draw(BODY, n, tuple(range(d * n, (d + 1) * n))) for d in range(draws))
    return Plan(
        made,
        ensemble=Ensemble("mean"),
        messages=BODY["messages"],
        selects=n * draws > 1,
        **fields,
    )


def scored(n: int = 3, reward: Reward | None = None, **fields: Any) -> Plan:
    """Return a plan with one scorer, "r"; by default it reads the candidate's text as a number."""
    reward = Scripted(by_number) if reward is None else reward
    return plan(n, scorers=scorers({"r": 1.0}, {"r": reward}), **fields)


def engine(*replies: Reply | str) -> FakeEngine:
    return Fake(replies=tuple(r if isinstance(r, Reply) else Reply(r) for r in replies)).load()


async def drained(source: FakeEngine) -> None:
    """Wait until the engine samples nothing."""
    async with asyncio.timeout(30):
        while source.running:
            await asyncio.sleep(0.001)


def run(made: Plan, source: FakeEngine, on_delta: Any = None) -> Response:
    async def scenario() -> Response:
        await source.start()
        response = await align(made, source, on_delta)
        await drained(source)
        return response

    return asyncio.run(scenario())


def test_the_best_is_returned_and_everything_is_accounted_for() -> None:
    response = run(scored(n_returned=2), engine("1", "3", "2"))
    assert [c.text for c in response.returned] == ["3", "2"]
    assert response.selection.ranking == (1, 2, 0)
    assert response.scores.usage == ScoringUsage(3)
    assert response.prompt_tokens == 1
    assert not response.partial
    timing = response.timing
    assert timing.total_seconds >= timing.generate_seconds + timing.score_seconds - 1e-9


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


# --- rewards ---


def raises(_: Any) -> Any:
    raise ValueError("bad weights")


def refuses(_: Any) -> Any:
    raise AlignError("upstream said no")


async def forever(_: Any) -> RewardScores:
    await asyncio.Event().wait()
    raise AssertionError


FAULTS: list[tuple[Any, str]] = [
    (raises, "ValueError: bad weights"),
    (refuses, "upstream said no"),
    (forever, "no score within 0.1 s"),
    (lambda c: RewardScores(np.full((1, 1, len(c)), np.nan)), "NaN"),
    (lambda c: RewardScores(np.full((1, 1, len(c)), np.inf)), "NaN"),
    (lambda c: RewardScores(np.full((1, 1, len(c)), -np.inf)), "NaN"),
    (lambda c: RewardScores(np.zeros((1, 2, len(c)))), "shape"),
    (lambda c: RewardScores(np.zeros((1, 1, len(c) + 1))), "shape"),
    (lambda c: RewardScores(np.zeros(len(c))), "shape"),
    (lambda c: RewardScores([[[0.0] * len(c)]]), "AttributeError"),
    (lambda _: None, "AttributeError"),
]


@pytest.mark.parametrize(("score", "why"), FAULTS)
def test_a_reward_that_fails_is_nan_with_a_reason(score: Any, why: str) -> None:
    reward = Scripted(score, timeout=0.1)
    with pytest.raises(RewardFailed, match=why):
        run(scored(reward=reward), engine("1", "2", "3"))
    both = scorers({"r": 0.0, "good": 1.0}, {"r": reward, "good": Scripted(by_number)})
    response = run(plan(scorers=both), engine("1", "3", "2"))
    assert response.selection.ranking == (1, 2, 0), "a failed reward of weight 0 does not matter"
    assert np.isnan(response.scores.members["r"]).all()
    single = run(scored(1, reward), engine("1"))
    assert [c.text for c in single.returned] == ["1"], "one candidate needs no score"
    assert not single.partial


def test_rewards_run_at_once_and_each_only_once() -> None:
    started = 0

    async def together(candidates: Any) -> RewardScores:
        nonlocal started
        started += 1
        while started < 2:
            await asyncio.sleep(0)
        return by_number(candidates)

    many = Scripted(lambda c: RewardScores(np.zeros((2, 1, len(c)))), attributes=("x", "y"))
    rewards: dict[str, Reward] = {"r": Scripted(together), "two": Scripted(together), "many": many}
    weights = {"r": 1.0, "two": 1.0, "many.y": 1.0, "many.x": 0.0}
    response = run(plan(scorers=scorers(weights, rewards)), engine("1", "2", "3"))
    assert (started, many.calls) == (2, 1)
    assert set(response.scores.members) == {"r", "two", "many.x", "many.y"}


def test_attributes_are_rows_and_members_columns() -> None:
    values = np.arange(2 * 3 * 2, dtype=float).reshape(2, 3, 2)
    reward = Scripted(lambda _: RewardScores(values), members=3, attributes=("x", "y"))
    response = run(plan(2, scorers=scorers({"r.y": 1.0}, {"r": reward})), engine("a"))
    np.testing.assert_array_equal(response.scores.members["r.y"], values[1])


def test_failed_candidates_are_not_scored() -> None:
    seen: list[int] = []

    def record(candidates: Any) -> RewardScores:
        seen.extend(c.index for c in candidates)
        notes = tuple(f"about {c.index}" for c in candidates)
        return RewardScores(np.ones((1, 1, len(candidates))), notes=notes)

    response = run(scored(reward=Scripted(record)), engine("1", Reply("", error="x"), "3"))
    assert seen == [0, 2]
    assert response.scores.notes["r"] == ("about 0", None, "about 2")


class Pipelined(Scripted):
    """Scores each candidate as soon as it is finished."""

    pipelined = True


def test_a_pipelined_reward_scores_while_others_are_drawn() -> None:
    scored_texts: list[str] = []

    def record(candidates: Any) -> RewardScores:
        scored_texts.extend(c.text for c in candidates)
        notes = (f"read {candidates[0].text}",)
        return RewardScores(by_number(candidates).values, ScoringUsage(5), notes=notes)

    class Waiting(FakeEngine):
        """Finishes "3" only after the others are scored."""

        def sample(self, draw: Draw) -> Any:
            stream = super().sample(draw)
            put = stream.put
            delayed: list[Any] = []

            async def release(event: Any) -> None:
                while len(scored_texts) < 2:
                    await asyncio.sleep(0.001)
                put(event)

            def put_in_order(event: Any) -> None:
                if getattr(event, "text", None) == "3":
                    delayed.append(asyncio.create_task(release(event)))
                else:
                    put(event)

            stream.put = put_in_order  # type: ignore[method-assign]
            return stream

    source = Waiting(Fake(replies=(Reply("1"), Reply("3"), Reply("2"))))
    response = run(scored(reward=Pipelined(record)), source)
    assert sorted(scored_texts[:2]) == ["1", "2"]
    assert scored_texts[2:] == ["3"]
    assert [c.text for c in response.returned] == ["3"]
    assert response.scores.members["r"].tolist() == [[1.0, 3.0, 2.0]]
    assert response.scores.notes["r"] == ("read 1", "read 3", "read 2")
    assert response.scores.usage.reward_tokens == 15


def test_pipelined_and_other_rewards_agree_over_several_draws() -> None:
    replies = [Reply("{seed}"), Reply("x", error="broken"), Reply("{seed}")]
    rewards: dict[str, Reward] = {"r": Scripted(by_number), "late": Pipelined(by_number)}
    made = plan(3, draws=2, scorers=scorers({"r": 1.0, "late": 1.0}, rewards))
    response = run(made, engine(*replies))
    members = response.scores.members
    np.testing.assert_array_equal(members["r"], members["late"])
    assert [c.index for c in response.candidates] == list(range(6))


def test_a_pipelined_reward_that_fails_for_one_candidate_fails_for_it_alone() -> None:
    def score(candidates: Any) -> RewardScores:
        if candidates[0].text == "2":
            raise ValueError("not this one")
        return by_number(candidates)

    response = run(scored(reward=Pipelined(score)), engine("1", "2", "3"))
    np.testing.assert_array_equal(response.scores.members["r"], [[1.0, math.nan, 3.0]])
    assert "not this one" in (response.scores.notes["r"][1] or "")


# --- deadlines ---


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


def test_a_deadline_while_scoring() -> None:
    response = run(
        scored(reward=Scripted(forever, timeout=60), n_returned=2, deadline_seconds=1.0),
        engine("1", Reply("", error="x"), "3"),
    )
    assert response.partial
    assert [c.text for c in response.returned] == ["1", "3"], "a failed candidate is no answer"
    assert "deadline" in response.selection.reason


class Deaf(FakeEngine):
    """An engine that ignores stop."""

    def sample(self, draw: Draw) -> Any:
        stream = super().sample(draw)
        stream.stop = lambda index=None: None  # type: ignore[method-assign]
        return stream


def test_an_engine_that_does_not_stop_is_left_after_a_grace() -> None:
    source = Deaf(Fake(replies=(Reply("1"), Reply("2", first_token_seconds=600))))
    response = run(scored(2, deadline_seconds=1.0), source)
    assert [c.text for c in response.returned] == ["1"]
    assert response.partial
    assert response.selection.dropped == {1: "failed: the deadline passed"}


# --- cancellation ---


@pytest.mark.parametrize("draws", [1, 3])
def test_cancelling_the_flow_cancels_every_candidate(draws: int) -> None:
    async def scenario() -> None:
        source = engine(Reply("1 2", first_token_seconds=600))
        await source.start()
        task = asyncio.create_task(align(scored(4, draws=draws), source))
        while source.running < 4 * draws:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait({task})
        await drained(source)

    asyncio.run(scenario())


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


def test_a_pipelined_reward_ends_with_the_deadline_and_with_the_request() -> None:
    ended: list[str] = []
    started: list[str] = []

    async def never(candidates: Any) -> RewardScores:
        started.append(candidates[0].text)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(candidates[0].text)
        raise AssertionError

    late = run(scored(2, Pipelined(never, timeout=60), deadline_seconds=1.0), engine("1", "2"))
    assert late.partial
    assert sorted(ended) == ["1", "2"]
    ended.clear()
    started.clear()

    async def cancelled() -> None:
        source = engine(Reply("1"), Reply("2", first_token_seconds=600))
        await source.start()
        answer = asyncio.create_task(align(scored(2, Pipelined(never, timeout=60)), source))
        while not started:
            await asyncio.sleep(0.001)
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer
        await drained(source)
        while not ended:
            await asyncio.sleep(0.001)

    asyncio.run(cancelled())
    assert ended == ["1"]


def test_best_of_one_is_the_engine_alone() -> None:
    plain = run(plan(1), engine("{seed}"))
    best = run(replace(scored(1), selects=True), engine("{seed}"))
    assert best.returned == plain.returned


# --- observers ---


class RejectAt(Observer):
    """Rejects one candidate at the first estimate of any."""

    def __init__(self, index: int) -> None:
        self._index = index
        self.events: list[Event] = []

    def observe(self, event: Event) -> Mapping[int, str]:
        self.events.append(event)
        return {self._index: "by the test"} if isinstance(event, Estimate) else {}


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
