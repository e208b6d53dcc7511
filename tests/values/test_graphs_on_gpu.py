"""Replayed graphs of a value LM's pass give the values of eager passes. This needs a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.siblings import ValueCache, read_tokens
from infer_align.values._step_graphs import CAPTURED_AT_USE, StepGraphs
from tests.decoding.value_lms import VOCABULARY, TinyValueLM

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"),
    pytest.mark.slow,
]
K = 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """Run each test in inference mode, as the engines do."""
    with torch.inference_mode():
        yield


def value_lm(dtype: torch.dtype, *, has_graphs: bool) -> Any:
    lm: Any = TinyValueLM(torch.device("cuda", 0), has_pass=True, dtype=dtype)
    lm.sibling_pass.graphs.may_capture = has_graphs
    return lm


def joined(lm: Any, cache: ValueCache, text: list[int]) -> ValueCache:
    row = ValueCache(lm, [len(cache.members)], [len(text)], read_tokens(lm, text))
    return cache.join(row)


def steps(lm: Any, count: int) -> list[torch.Tensor]:
    """Return the values of steps in which rows join, leave, and sample other tokens.

    Texts grow over the length for which passes are prepared first, and to a second part.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randint(0, VOCABULARY, size, generator=generator)

    cache = ValueCache(lm, [], [], RowCache())
    for length in (1018, 3, 40):
        cache = joined(lm, cache, numbers(length).tolist())
    values = []
    for step in range(count):
        rows = len(cache.members)
        candidates = numbers(rows, K)
        values.append(cache.siblings(candidates.cuda()))
        chosen = candidates[torch.arange(rows), numbers(rows) % K]
        if step % 3 == 0:
            chosen[0] = int(numbers(1))
        cache.choose(chosen.cuda())
        if step % 11 == 7:
            cache = cache.take(range(rows - 1)) if step % 2 else cache.take(range(1, rows))
        if step % 9 == 4:
            cache = joined(lm, cache, numbers(step).tolist())
    return values


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_replayed_steps_equal_eager_steps(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    replaying, eager = value_lm(dtype, has_graphs=True), value_lm(dtype, has_graphs=False)
    count = 60
    with caplog.at_level(logging.WARNING, logger="infer_align"):
        replayed, expected = steps(replaying, count), steps(eager, count)
    assert [record.getMessage() for record in caplog.records] == []
    assert len(replaying.sibling_pass.graphs) >= 2
    assert len(eager.sibling_pass.graphs) == 0
    for first, second in zip(replayed, expected, strict=True):
        torch.testing.assert_close(first, second, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_graphs_and_eager_steps_of_several_sizes_take_turns() -> None:
    lm = value_lm(torch.float32, has_graphs=True)
    caches = []
    for rows in (1, 2, 7):
        cache = ValueCache(lm, [], [], RowCache())
        for row in range(rows):
            cache = joined(lm, cache, list(range(1, row + 2)))
        caches.append(cache)
    ids = torch.arange(K, device="cuda")
    expected = [cache.siblings(ids.expand(len(cache.members), -1)) for cache in caches]
    for _ in range(CAPTURED_AT_USE + 3):
        results = [cache.siblings(ids.expand(len(cache.members), -1)) for cache in caches]
        for result, values in zip(results, expected, strict=True):
            torch.testing.assert_close(result, values, atol=1e-5, rtol=1e-5)
    assert len(lm.sibling_pass.graphs) == 3


def test_a_step_that_waits_runs_eagerly_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda", 0)
    source, result = torch.ones(3, device=device), torch.zeros(3, device=device)
    stream = torch.cuda.current_stream(device)

    def waits() -> None:
        result.copy_(source * float(source.sum()))

    graphs = StepGraphs("waits", device)
    with caplog.at_level(logging.WARNING, logger="infer_align"):
        for number in range(1, 2 * CAPTURED_AT_USE):
            source.fill_(number)
            graphs.run("size", waits)
            assert result.tolist() == [3.0 * number**2] * 3
    assert len(graphs) == 0
    assert len(caplog.records) == 1
    assert torch.cuda.current_stream(device) == stream
    # Another step is captured afterwards.
    others = StepGraphs("others", device)
    for number in range(1, 2 * CAPTURED_AT_USE):
        source.fill_(number)
        others.run("size", lambda: result.copy_(source * 2))
        assert result.tolist() == [2.0 * number] * 3
    assert len(others) == 1
