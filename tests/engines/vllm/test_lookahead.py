"""Steering by lookahead values inside vLLM's V1 runner equals a float32 reference on a CPU.

The reference reads the whole text again for every candidate.
"""

# ruff: noqa: PLC0415 - vLLM takes ten seconds to import
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from infer_align.engines.vllm.values import EngineValues
from infer_align.steering import Steering
from infer_align.values import Value
from tests.engines.vllm.stepping import (
    LOOKAHEAD_STEERINGS,
    WARNINGS,
    Reference,
    SteppedRequest,
    environment,
    make_engine,
    make_lookahead_values,
    mixed_requests,
    prompts,
    run,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), *WARNINGS]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(make_lookahead_values())


@pytest.fixture(scope="module")
def values() -> EngineValues:
    return EngineValues(make_lookahead_values())


@pytest.fixture(scope="module")
def engine(values: EngineValues) -> Iterator[Any]:
    with environment():
        # Prompts of up to 150 tokens are read in chunks of at most 40.
        engine = make_engine(values)
        yield engine
        engine.engine_core.shutdown()
        values.close()


def cached_rows(engine: Any) -> int:
    """Return the number of rows that the worker's value LMs keep."""
    from infer_align.engines.vllm.processor import _processors

    config = engine.vllm_config
    processors = [each for each in _processors if each.vllm_config is config]
    return sum(processor._caches.rows for processor in processors)


def assert_equal(requests: list[SteppedRequest], reference: Reference, eos: int = 1) -> None:
    for request in requests:
        count = len(request.tokens)
        tokens, logprobs = reference.greedy(request.prompt, request.steering, count, eos=eos)
        assert request.tokens == tokens
        assert request.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_requests_that_join_one_after_the_other_equal_the_reference(
    engine: Any, values: EngineValues, reference: Reference
) -> None:
    first = mixed_requests(21, LOOKAHEAD_STEERINGS)
    run(engine, values, first)
    assert_equal(first, reference)
    changed = 0
    for request in first:
        unsteered, _ = reference.greedy(request.prompt, None, len(request.tokens))
        changed += request.tokens != unsteered
    assert changed >= 6, "steering changes the answers"

    again = mixed_requests(21, LOOKAHEAD_STEERINGS)
    run(engine, values, again)
    assert sum(request.cached_tokens for request in again) > 21 * 10, "the prefixes are cached"
    assert [request.tokens for request in again] == [request.tokens for request in first]


def test_aborts_do_not_affect_other_requests_and_free_their_rows(
    engine: Any, values: EngineValues, reference: Reference
) -> None:
    requests = mixed_requests(14, LOOKAHEAD_STEERINGS, ignore_eos=True)
    for i, request in enumerate(requests):
        if i % 4 == 1:
            request.aborted_at = request.arrives + 2 + i % 3
    most = 0

    def count(_: int) -> None:
        nonlocal most
        most = max(most, cached_rows(engine))

    run(engine, values, requests, count)
    assert 0 < most <= 14
    finished = [request for request in requests if request.aborted_at is None]
    assert_equal(finished, reference, eos=-1)
    # The next step frees the rows of the last requests.
    plain = SteppedRequest(prompts(1)[0], None, {"max_tokens": 2})
    run(engine, values, [plain])
    assert cached_rows(engine) == 0


def test_a_replaced_value_lm_steers_requests_that_join_later(
    engine: Any, values: EngineValues, reference: Reference
) -> None:
    prompt = prompts(4)[3]
    params = {"max_tokens": 12, "ignore_eos": True}
    steering = Steering({"helpful": 6.0}, 20, "keep")
    early = SteppedRequest(prompt, steering, params, arrives=0)
    late = SteppedRequest(prompt, steering, params, arrives=4)
    by_name = make_lookahead_values()

    def replace(step: int) -> None:
        if step == 3:
            use(engine, by_name["brief"])

    run(engine, values, [early, late], replace)
    assert_equal([early], reference, eos=-1)
    late.steering = Steering({"brief": 6.0}, 20, "keep")
    assert_equal([late], reference, eos=-1)
    use(engine, by_name["helpful"])


def use(engine: Any, value: Value) -> None:
    from infer_align.engines.vllm.value_source import write_source

    engine.collective_rpc("infer_align_load_value", args=(write_source("helpful", value),))
    assert engine.collective_rpc("infer_align_use_value", args=("helpful",)) == [1]


def test_preempted_requests_equal_the_reference(
    engine: Any, values: EngineValues, reference: Reference
) -> None:
    steering = Steering({"helpful": 6.0}, 20, "keep")
    params = {"max_tokens": 14, "ignore_eos": True}
    requests = [
        SteppedRequest(prompt, steering, params, arrives=i) for i, prompt in enumerate(prompts(5))
    ]
    preempted: list[int] = []

    def preempt(step: int) -> None:
        if step == 9:
            scheduler = engine.engine_core.engine_core.scheduler
            engine.reset_prefix_cache(reset_running_requests=True)
            preempted.append(sum(each.num_preemptions for each in scheduler.requests.values()))

    run(engine, values, requests, preempt)
    assert preempted[0] >= 2
    assert_equal(requests, reference, eos=-1)
