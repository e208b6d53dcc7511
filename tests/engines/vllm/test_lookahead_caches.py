"""The caches of value LMs in a worker: rows that join, leave and wait have their own tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from infer_align.engines.vllm.lookahead import (
    DeviceHistory,
    HostHistory,
    LookaheadCaches,
    LookaheadRow,
)
from tests.decoding.value_lms import VOCABULARY, TinyValueLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[False, True], ids=["masked", "pass"])
def lm(request: pytest.FixtureRequest) -> Any:
    return TinyValueLM(CPU, has_pass=request.param)


class Step:
    """One step of a batch: each request has a history; its place in the list is its row."""

    def __init__(self, lm: Any, caches: LookaheadCaches, k: int) -> None:
        self.lm = lm
        self.caches = caches
        self.k = k

    def value(self, histories: Sequence[HostHistory], rng: random.Random) -> list[list[int]]:
        """Value random candidates of every row and compare; return the candidates."""
        rows = [
            LookaheadRow(position, history, history.length, frozenset([self.lm]))
            for position, history in enumerate(histories)
        ]
        cache = self.caches.prepare(rows)[self.lm]
        candidates = [rng.sample(range(VOCABULARY), self.k) for _ in histories]
        values = cache.siblings(torch.tensor(candidates)[cache.members])
        assert sorted(cache.members) == list(range(len(rows)))
        for row, position in enumerate(cache.members):
            history = histories[position]
            text = [*history.prompt, *history.output]
            for place, token in enumerate(candidates[position]):
                expected = self.lm.value([*text, token])
                torch.testing.assert_close(values[row, place], expected, atol=1e-5, rtol=1e-5)
        return candidates


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_rows_that_join_leave_and_wait_have_the_values_of_their_own_text(
    lm: Any, seed: int
) -> None:
    rng = random.Random(seed)
    step = Step(lm, LookaheadCaches(), k=3)
    histories: list[HostHistory] = []
    for _ in range(12):
        for _ in range(rng.randint(0, 2)):
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6))]
            # Two requests may have the same prompt.
            for _ in range(rng.randint(1, 2)):
                histories.append(HostHistory(prompt, [], CPU))
        rng.shuffle(histories)
        if not histories:
            continue
        candidates = step.value(histories, rng)
        assert step.caches.rows == len(histories)
        for history, row in zip(histories, candidates, strict=True):
            # The prompt of some is still being read, so that their sample is dropped.
            if rng.random() < 0.8 and isinstance(history.output, list):
                history.output.append(rng.choice([*row, rng.randrange(VOCABULARY)]))
        histories = [history for history in histories if rng.random() < 0.8]


@torch.inference_mode()
def test_a_request_that_joins_again_is_read_again(lm: Any) -> None:
    rng = random.Random(9)
    step = Step(lm, LookaheadCaches(), k=2)
    stays = HostHistory([1, 2, 3], [], CPU)
    preempted = HostHistory([4, 5], [], CPU)
    for token in (6, 7):
        step.value([stays, preempted], rng)
        for history in (stays, preempted):
            assert isinstance(history.output, list)
            history.output.append(token)
    step.value([stays], rng)
    assert step.caches.rows == 1
    # It has as many tokens as before and comes back with a history of its own.
    step.value([HostHistory([4, 5], [6, 7], CPU), stays], rng)
    assert step.caches.rows == 2
    step.caches.clear()
    assert step.caches.rows == 0


@torch.inference_mode()
def test_rows_of_two_value_lms_are_kept_apart(lm: Any) -> None:
    other: Any = TinyValueLM(CPU)
    caches = LookaheadCaches()
    rows = [
        LookaheadRow(0, HostHistory([1, 2], [], CPU), 2, frozenset([lm])),
        LookaheadRow(1, HostHistory([3], [], CPU), 1, frozenset([lm, other])),
    ]
    prepared = caches.prepare(rows)
    assert prepared[lm].members == [0, 1]
    assert prepared[other].members == [1]
    assert caches.prepare([]) == {}


def test_a_history_reads_the_tokens_between_two_positions() -> None:
    host = HostHistory([1, 2, 3], [4, 5], CPU)
    device = DeviceHistory(torch.tensor([[9, 9, 9, 9, 9], [1, 2, 3, 4, 5]], dtype=torch.int32), 1)
    for first in range(5):
        for last in range(first, 6):
            expected = [1, 2, 3, 4, 5][first:last]
            assert host.read(first, last).tolist() == expected
            assert device.read(first, last).tolist() == expected
