"""Scoring: rewards run at once, and a reward that fails gives NaN with a reason."""

from __future__ import annotations

import asyncio
import math
from time import monotonic
from typing import Any

import numpy as np
import pytest

from infer_align import align
from infer_align.engines.fake import Fake, FakeEngine, Reply
from infer_align.errors import AlignError, EngineFailed, InvalidRequest, RewardFailed
from infer_align.flow import scoring
from infer_align.rewards import Reward, RewardScores
from infer_align.types import Candidate, Draw, ScoringUsage
from tests.flow.builders import (
    Pipelined,
    Scripted,
    by_number,
    drained,
    engine,
    forever,
    plan,
    run,
    scored,
    scorers,
)


def raises(_: Any) -> Any:
    raise ValueError("bad weights")


def refuses(_: Any) -> Any:
    raise AlignError("upstream said no")


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
    (
        lambda c: RewardScores(np.zeros((1, 1, len(c))), matrix=np.zeros((1, len(c)))),
        "win probabilities of shape",
    ),
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
    scored_indices: list[int] = []

    def record(candidates: Any) -> RewardScores:
        scored_indices.extend(c.index for c in candidates)
        notes = tuple(f"about {c.index}" for c in candidates)
        return RewardScores(np.ones((1, 1, len(candidates))), notes=notes)

    response = run(scored(reward=Scripted(record)), engine("1", Reply("", error="x"), "3"))
    assert scored_indices == [0, 2]
    assert response.scores.notes["r"] == ("about 0", None, "about 2")


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


@pytest.mark.slow
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


def judged(matrix: Any) -> RewardScores:
    """Return the scores of three candidates that a pairwise judge compared."""
    return RewardScores(np.array([[[1.0, 2.0, 3.0]]]), matrix=np.array(matrix))


def test_win_probabilities_are_numbered_like_the_candidates() -> None:
    pair = [[0.5, 0.2], [0.8, 0.5]]
    reward = Scripted(lambda c: RewardScores(np.ones((1, 1, len(c))), matrix=np.array(pair)))
    response = run(scored(reward=reward), engine("1", Reply("", error="x"), "3"))
    nan = math.nan
    expected = [[0.5, nan, 0.2], [nan, nan, nan], [0.8, nan, 0.5]]
    np.testing.assert_array_equal(response.scores.matrices["r"], expected)


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.5, 0.6, 0.5], [0.6, 0.5, 0.5], [0.5, 0.5, 0.5]],
        [[0.5, 1.5, 0.5], [-0.5, 0.5, 0.5], [0.5, 0.5, 0.5]],
        [[0.5, math.nan, 0.5], [0.4, 0.5, 0.5], [0.5, 0.5, 0.5]],
        [[0.5, math.inf, 0.5], [-math.inf, 0.5, 0.5], [0.5, 0.5, 0.5]],
    ],
)
def test_what_are_no_win_probabilities_is_a_failed_reward(matrix: Any) -> None:
    with pytest.raises(RewardFailed, match="win probabilities that are not from 0 to 1"):
        run(scored(reward=Scripted(lambda _: judged(matrix))), engine("1", "2", "3"))


@pytest.mark.parametrize(
    ("failure", "level"),
    [
        (InvalidRequest("messages: too long."), "WARNING"),
        (EngineFailed("a judge's prompt does not fit.", status=400), "WARNING"),
        (EngineFailed("the upstream is down.", status=502), "ERROR"),
        (EngineFailed("the key is wrong.", status=401), "ERROR"),
        (ValueError("a bug"), "ERROR"),
    ],
)
def test_a_text_that_a_reward_cannot_read_is_no_error_of_the_server(
    caplog: pytest.LogCaptureFixture, failure: Exception, level: str
) -> None:
    def refuse(_: Any) -> Any:
        raise failure

    held = plan(scorers=scorers({"r": 1.0}, {"r": Scripted(refuse)}))
    candidates = [Candidate(0, {"message": {"role": "assistant", "content": "an answer"}})]
    with caplog.at_level("INFO", "infer_align"):
        scores = asyncio.run(scoring.score(held, candidates))
    assert scores.failures == {"r": 1}
    (line,) = caplog.records
    assert (line.levelname, line.message) == (level, "reward failed")
    assert line.reward == "r"
    assert bool(line.exc_info) == (level == "ERROR")


@pytest.mark.parametrize("deadline_seconds", [None, 0.0, 0.05])
def test_a_deadline_of_the_request_is_no_error_of_the_server(
    caplog: pytest.LogCaptureFixture, deadline_seconds: float | None
) -> None:
    timeout = 0.1 if deadline_seconds is None else 100.0
    held = plan(scorers=scorers({"r": 1.0}, {"r": Scripted(forever, timeout=timeout)}))
    candidates = [Candidate(0, {"message": {"role": "assistant", "content": "an answer"}})]
    deadline = None if deadline_seconds is None else monotonic() + deadline_seconds
    with caplog.at_level("INFO", "infer_align"):
        scores = asyncio.run(scoring.score(held, candidates, deadline))
    assert scores.failures == {"r": 1}
    (line,) = caplog.records
    if deadline is None:
        assert (line.levelname, line.message) == ("ERROR", "reward failed")
        assert isinstance(line.exc_info[1], TimeoutError)
    else:
        event = "reward failed: the deadline of the request passed"
        assert (line.levelname, line.message, line.exc_info) == ("INFO", event, None)


# --- candidates that say nothing ---


@pytest.mark.parametrize("kind", [Scripted, Pipelined])
def test_candidates_without_a_word_leave_when_a_later_batch_speaks(kind: type[Scripted]) -> None:
    def lengths(candidates: Any) -> RewardScores:
        values = np.array([[[float(len(c.text)) for c in candidates]]])
        return RewardScores(values, usage=ScoringUsage(len(candidates)))

    empty = {"text": "", "finish_reason": "content_filter"}
    batches = [
        [Candidate(0, empty), Candidate(1, empty)],
        [Candidate(2, {"text": "word"}), Candidate(3, empty), Candidate(4, {"text": "words"})],
        [Candidate(5, {"text": "a"})],
    ]
    made = scored(6, kind(lengths))

    async def scenario() -> list[Any]:
        drawn: list[Candidate] = []
        results = []
        async with scoring.Scoring(made) as running:
            for batch in batches:
                for candidate in batch:
                    running.candidate_finished(candidate)
                drawn += batch
                results.append(await running.score(drawn))
        return results

    first, second, third = asyncio.run(scenario())
    np.testing.assert_array_equal(first.members["r"], [[0, 0]])
    np.testing.assert_array_equal(second.members["r"], [[math.nan, math.nan, 4, math.nan, 5]])
    np.testing.assert_array_equal(third.members["r"], [[math.nan, math.nan, 4, math.nan, 5, 1]])
    assert third.usage.reward_tokens == 2 + 2 + 1
