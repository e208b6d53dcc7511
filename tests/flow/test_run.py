"""The flow with a scripted engine and rewards of every temper: what fails is data, what is left is answered."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from infer_align import align
from infer_align.engines.fake import Fake, FakeEngine, Reply
from infer_align.errors import AlignError, DeadlineExceeded, EngineFailed, RewardFailed
from infer_align.objectives import Ensemble
from infer_align.rewards import Reward, RewardScores
from infer_align.types import Delta, Draw, EstimateSchedule, Plan, Response, ScoringUsage

BODY = {"messages": [{"role": "user", "content": "hello"}]}


class Scripted(Reward):
    """Says what the test tells it to."""

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
        made = self._score(candidates)
        return await made if asyncio.iscoroutine(made) else made


def by_number(candidates: Any) -> RewardScores:
    return RewardScores(
        np.array([[[float(c.text) for c in candidates]]]), spent=ScoringUsage(len(candidates))
    )


def plan(n: int = 3, *, draws: int = 1, rewards: Any = None, **fields: Any) -> Plan:
    made = tuple(Draw(BODY, n, tuple(range(d * n, (d + 1) * n))) for d in range(draws))
    weights = {"r": 1.0} if rewards is None else rewards
    return Plan(
        made, Ensemble("mean"), weights, messages=BODY["messages"], selects=n * draws > 1, **fields
    )


def engine(*replies: Reply | str) -> FakeEngine:
    return Fake(replies=tuple(r if isinstance(r, Reply) else Reply(r) for r in replies)).load()


def run(
    made: Plan,
    source: FakeEngine,
    reward: Reward | None = None,
    on_delta: Any = None,
    **rewards: Reward,
) -> Response:
    async def scenario() -> Response:
        await source.start()
        response = await align(
            made, source, {**rewards, **({"r": reward} if reward else {})}, on_delta
        )
        await asyncio.sleep(0.05 if source.running else 0)
        assert source.running == 0, "something still runs after the answer"
        return response

    return asyncio.run(scenario())


def test_the_best_is_kept_and_all_is_accounted_for() -> None:
    response = run(plan(keep=2), engine("1", "3", "2"), Scripted(by_number))
    assert [c.text for c in response.returned] == ["3", "2"]
    assert response.selection.ranking == (1, 2, 0)
    assert response.scores.spent == ScoringUsage(3)
    assert response.prompt_tokens == 1
    assert not response.partial
    timing = response.timing
    assert timing.total_seconds >= timing.generate_seconds + timing.score_seconds - 1e-9


def test_several_draws_are_numbered_through() -> None:
    response = run(plan(2, draws=3), engine("{seed}"), Scripted(by_number))
    assert [c.index for c in response.candidates] == list(range(6))
    assert [c.draw for c in response.candidates] == [0, 0, 1, 1, 2, 2]
    assert [c.text for c in response.candidates] == ["0", "1", "2", "3", "4", "5"]
    assert response.selection.ranking[0] == 5
    assert response.prompt_tokens == 1, "one prompt, however often it is drawn from"


def test_deltas_arrive_as_they_are_sampled() -> None:
    deltas: list[Delta] = []
    response = run(plan(2, rewards={}), engine("a b c"), on_delta=deltas.append)
    for i in (0, 1):
        assert (
            "".join(d.choice["delta"]["content"] for d in deltas if d.index == i)
            == response.candidates[i].text
        )


def test_failed_candidates_are_data_until_none_is_left() -> None:
    bad = Reply("", error="boom", status=503)
    response = run(plan(), engine(bad, "1", "2"), Scripted(by_number))
    assert response.selection.ranking == (2, 1)
    assert response.selection.dropped == {0: "failed: boom"}
    assert math.isnan(response.scores.members["r"][0, 0])
    with pytest.raises(EngineFailed, match=r"all 3 candidates failed; first: boom") as caught:
        run(plan(), engine(bad), Scripted(by_number))
    assert caught.value.status == 503


def raises(_: Any) -> Any:
    raise ValueError("bad weights")


def refuses(_: Any) -> Any:
    raise AlignError("upstream said no")


async def forever(_: Any) -> RewardScores:
    await asyncio.sleep(60)
    raise AssertionError


TEMPERS: list[tuple[Any, str]] = [
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


@pytest.mark.parametrize(("score", "why"), TEMPERS)
def test_a_reward_that_fails_is_nan_with_a_reason(score: Any, why: str) -> None:
    reward = Scripted(score, timeout=0.1)
    with pytest.raises(RewardFailed, match=why):
        run(plan(), engine("1", "2", "3"), reward)
    beside = run(
        plan(rewards={"r": 0.0, "good": 1.0}),
        engine("1", "3", "2"),
        reward,
        good=Scripted(by_number),
    )
    assert beside.selection.ranking == (1, 2, 0), "weight 0: it fails and does not matter"
    assert np.isnan(beside.scores.members["r"]).all()
    alone = run(plan(1), engine("1"), reward)
    assert [c.text for c in alone.returned] == ["1"], "one candidate needs no score"
    assert not alone.partial


def test_rewards_are_asked_at_once_and_each_only_once() -> None:
    started = 0

    async def together(candidates: Any) -> RewardScores:
        nonlocal started
        started += 1
        while started < 2:
            await asyncio.sleep(0)
        return by_number(candidates)

    two, many = (
        Scripted(together),
        Scripted(lambda c: RewardScores(np.zeros((2, 1, len(c)))), attributes=("x", "y")),
    )
    made = plan(rewards={"r": 1.0, "two": 1.0, "many.y": 1.0, "many.x": 0.0})
    response = run(made, engine("1", "2", "3"), Scripted(together), two=two, many=many)
    assert (two.calls, many.calls) == (1, 1)
    assert set(response.scores.members) == {"r", "two", "many.x", "many.y"}


def test_attributes_are_rows_and_members_columns() -> None:
    values = np.arange(2 * 3 * 2, dtype=float).reshape(2, 3, 2)
    reward = Scripted(lambda _: RewardScores(values), members=3, attributes=("x", "y"))
    response = run(plan(2, rewards={"r.y": 1.0}), engine("a"), reward)
    np.testing.assert_array_equal(response.scores.members["r.y"], values[1])


def test_only_those_that_did_not_fail_are_scored() -> None:
    seen: list[int] = []

    def look(candidates: Any) -> RewardScores:
        seen.extend(c.index for c in candidates)
        return RewardScores(
            np.ones((1, 1, len(candidates))), notes=tuple(f"about {c.index}" for c in candidates)
        )

    response = run(plan(), engine("1", Reply("", error="x"), "3"), Scripted(look))
    assert seen == [0, 2]
    assert response.scores.notes["r"] == ("about 0", None, "about 2")


# --- deadlines ---


def test_deadline_with_nothing() -> None:
    with pytest.raises(DeadlineExceeded, match=r"0\.1 s"):
        run(
            plan(deadline_seconds=0.1),
            engine(Reply("1 2", first_token_seconds=9)),
            Scripted(by_number),
        )


def test_deadline_cuts_those_that_run_and_keeps_those_that_are_done() -> None:
    slow = Reply("7 x y z", seconds_per_token=0.1)
    response = run(
        plan(deadline_seconds=0.35),
        engine("1", slow, "2"),
        Scripted(lambda c: RewardScores(np.ones((1, 1, len(c))))),
    )
    assert response.partial
    assert [c.interrupted for c in response.candidates] == [False, True, False]
    assert response.candidates[1].finish_reason == "length"
    assert response.candidates[1].text.startswith("7")


def test_deadline_while_scoring() -> None:
    response = run(
        plan(keep=2, deadline_seconds=0.3),
        engine("1", Reply("", error="x"), "3"),
        Scripted(forever),
    )
    assert response.partial
    assert [c.text for c in response.returned] == ["1", "3"], "what failed is not an answer"
    assert "deadline" in response.selection.reason


class Deaf(FakeEngine):
    """Does not listen to stop."""

    def sample(self, draw: Draw) -> Any:
        stream = super().sample(draw)
        stream.stop = lambda index=None: None  # type: ignore[method-assign]
        return stream


def test_an_engine_that_does_not_stop_is_left_after_a_grace() -> None:
    source = Deaf(Fake(replies=(Reply("1"), Reply("2", first_token_seconds=60))))
    response = run(plan(2, deadline_seconds=0.2), source, Scripted(by_number))
    assert [c.text for c in response.returned] == ["1"]
    assert response.partial
    assert response.selection.dropped == {1: "failed: the deadline passed"}


# --- leaving ---


@pytest.mark.parametrize("draws", [1, 3])
def test_cancelling_the_flow_cancels_every_candidate(draws: int) -> None:
    async def scenario() -> None:
        source = engine(Reply("1 2", first_token_seconds=60))
        await source.start()
        task = asyncio.create_task(align(plan(4, draws=draws), source, {"r": Scripted(by_number)}))
        while source.running < 4 * draws:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait({task})
        await asyncio.sleep(0.05)
        assert source.running == 0

    asyncio.run(scenario())


def test_a_draw_that_is_refused_cancels_the_others_and_says_why() -> None:
    class Refusing(FakeEngine):
        def sample(self, draw: Draw) -> Any:
            if draw.seeds[0]:
                raise AlignError("the second is refused", status=400)
            return super().sample(draw)

    async def scenario() -> None:
        source = Refusing(Fake(replies=(Reply("1", first_token_seconds=60),)))
        with pytest.raises(AlignError, match="the second is refused"):
            await align(plan(2, draws=2), source, {"r": Scripted(by_number)})
        await asyncio.sleep(0.05)
        assert source.running == 0

    asyncio.run(scenario())


def test_best_of_one_is_the_engine_alone() -> None:
    made = plan(1)
    plain = run(replace(made, rewards={}), engine("{seed}"))
    best = run(replace(made, selects=True), engine("{seed}"), Scripted(by_number))
    assert best.returned == plain.returned


class Pipelined(Scripted):
    """Asked about each candidate as soon as it is finished."""

    pipelined = True


def test_a_pipelined_reward_is_asked_while_others_are_drawn() -> None:
    asked: list[str] = []

    def mark(candidates: Any) -> RewardScores:
        asked.extend(c.text for c in candidates)
        return RewardScores(
            by_number(candidates).values, ScoringUsage(5), notes=(f"read {candidates[0].text}",)
        )

    replies = engine(Reply("1"), Reply("3", first_token_seconds=0.3), Reply("2"))
    before: list[list[str]] = []
    response = run(plan(3), replies, Pipelined(mark), on_delta=lambda _: before.append([*asked]))
    assert before[-1] == ["1", "2"], "two are scored before the last has said anything"
    assert [c.text for c in response.returned] == ["3"]
    assert response.scores.members["r"].tolist() == [[1.0, 3.0, 2.0]]
    assert response.scores.notes["r"] == ("read 1", "read 3", "read 2")
    assert response.scores.spent.reward_tokens == 15


def test_pipelined_and_other_rewards_say_the_same_over_several_draws() -> None:
    replies = [Reply("{seed}"), Reply("x", error="broken"), Reply("{seed}")]
    made = plan(3, draws=2, rewards={"r": 1.0, "late": 1.0})
    found = run(made, engine(*replies), Scripted(by_number), late=Pipelined(by_number))
    np.testing.assert_array_equal(found.scores.members["r"], found.scores.members["late"])
    assert [c.index for c in found.candidates] == list(range(6))


def test_a_pipelined_reward_that_fails_for_one_candidate_fails_for_it_alone() -> None:
    def mark(candidates: Any) -> RewardScores:
        if candidates[0].text == "2":
            raise ValueError("not this one")
        return by_number(candidates)

    response = run(plan(3), engine("1", "2", "3"), Pipelined(mark))
    np.testing.assert_array_equal(response.scores.members["r"], [[1.0, math.nan, 3.0]])
    assert "not this one" in (response.scores.notes["r"][1] or "")


def test_a_pipelined_reward_ends_with_the_deadline_and_with_the_request() -> None:
    ended: list[str] = []

    async def forever(candidates: Any) -> RewardScores:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(candidates[0].text)
        raise AssertionError

    late = run(plan(2, deadline_seconds=0.4), engine("1", "2"), Pipelined(forever))
    assert late.partial
    assert sorted(ended) == ["1", "2"]
    ended.clear()

    async def cancelled() -> None:
        source = engine(Reply("1"), Reply("2", first_token_seconds=30))
        await source.start()
        answer = asyncio.create_task(align(plan(2), source, {"r": Pipelined(forever)}))
        await asyncio.sleep(0.1)
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer
        await asyncio.sleep(0.05)
        assert source.running == 0

    asyncio.run(cancelled())
    assert ended == ["1"]


def watched(n: int, *, draws: int = 1, **fields: Any) -> Plan:
    made = plan(n, draws=draws, survival=0.5, **fields)
    return replace(
        made,
        draws=tuple(
            replace(draw, estimates=EstimateSchedule({"v": 1.0}, 4)) for draw in made.draws
        ),
    )


def worth(value: float, text: str = "1 " * 30 + "1") -> Reply:
    return Reply(text, estimates={"v": value}, seconds_per_token=0.002)


def test_candidates_of_all_draws_are_compared_with_each_other() -> None:
    response = run(
        watched(1, draws=4),
        engine(worth(0.5)),
        Scripted(lambda found: RewardScores(np.ones((1, 1, len(found))))),
    )
    assert response.selection.ranking == (0,)
    assert [c.completion_tokens < 31 for c in response.candidates] == [False, True, True, True]


def test_early_rewards_are_not_asked_about_losers_and_a_failure_leaves_what_is_left() -> None:
    class Eager(Scripted):
        pipelined = True

    reward = Eager(lambda found: RewardScores(np.ones((1, 1, len(found)))))
    response = run(watched(4), engine(worth(0.1), worth(0.9), worth(0.2), worth(0.8)), reward)
    assert response.selection.ranking == (1,)
    assert reward.calls == 1
    failing = replace(worth(0.9), error="boom", status=503)
    with pytest.raises(EngineFailed, match="boom"):
        run(watched(2), engine(worth(0.1), failing), Scripted(by_number))
