"""The flow of one request: draw, score, select, and account for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from infer_align import align
from infer_align.engines.fake import Reply
from infer_align.types import ScoringUsage
from tests.flow.builders import Scripted, drained, engine, forever, plan, run, scored


def test_the_best_is_returned_and_everything_is_accounted_for() -> None:
    response = run(scored(n_returned=2), engine("1", "3", "2"))
    assert [c.text for c in response.returned] == ["3", "2"]
    assert response.selection.ranking == (1, 2, 0)
    assert response.scores.usage == ScoringUsage(3)
    assert response.prompt_tokens == 1
    assert not response.partial
    timing = response.timing
    assert timing.total_seconds >= timing.generate_seconds + timing.score_seconds - 1e-9


@pytest.mark.slow
def test_a_deadline_while_scoring() -> None:
    response = run(
        scored(reward=Scripted(forever, timeout=60), n_returned=2, deadline_seconds=1.0),
        engine("1", Reply("", error="x"), "3"),
    )
    assert response.partial
    assert [c.text for c in response.returned] == ["1", "3"], "a failed candidate is no answer"
    assert "deadline" in response.selection.reason


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


def test_best_of_one_is_the_engine_alone() -> None:
    plain = run(plan(1), engine("{seed}"))
    best = run(replace(scored(1), selects=True), engine("{seed}"))
    assert best.returned == plain.returned
