"""A limit on the divergence holds at each step inside vLLM, and equals a reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from infer_align.engines.vllm.values import EngineValues
from infer_align.steering import Steering
from tests.engines.vllm.divergence import divergence
from tests.engines.vllm.stepping import (
    WARNINGS,
    Reference,
    SteppedRequest,
    environment,
    make_engine,
    make_lookahead_values,
    prompts,
    run,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), *WARNINGS]

# By lookahead values, by a head, by both, by all tokens' values, and without a limit.
STEERINGS = [
    Steering({"helpful": 9.0}, 20, "keep", max_kl=0.05),
    Steering({"helpful": 9.0, "brief": -4.0}, 300, "keep", max_kl=0.5),
    Steering({"state": 9.0}, 20, "keep", max_kl=0.05),
    Steering({"brief": 9.0, "state": -4.0}, 40, "keep", max_kl=0.2),
    Steering({"state": -9.0}, "all", "keep", max_kl=0.1),
    Steering({"helpful": 9.0}, 20, "keep"),
    None,
]


@pytest.fixture(scope="module")
def values() -> EngineValues:
    return EngineValues(make_lookahead_values())


@pytest.fixture(scope="module")
def engine(values: EngineValues) -> Iterator[Any]:
    with environment():
        engine = make_engine(values, logprobs_mode="processed_logprobs")
        yield engine
        engine.engine_core.shutdown()
        values.close()


def test_each_step_is_steered_as_far_as_its_limit_allows(engine: Any, values: EngineValues) -> None:
    reference = Reference(make_lookahead_values())
    requests = []
    for i, prompt in enumerate(prompts(2 * len(STEERINGS))):
        # Sampled without a seed: vLLM's CPU build cannot read a seeded prompt in parts.
        params = {"temperature": 1.0, "max_tokens": 6, "ignore_eos": True}
        requests.append(SteppedRequest(prompt, STEERINGS[i % len(STEERINGS)], params, i // 3))
    run(engine, values, requests)
    at_limit = 0
    for request in requests:
        ids = [*request.prompt]
        for token, logprob in zip(request.tokens, request.logprobs, strict=True):
            steered, frozen = reference.step(ids, request.steering)
            assert logprob == pytest.approx(float(steered.log_softmax(-1)[token]), abs=1e-4)
            limit = request.steering.max_kl if request.steering else None
            if limit is not None:
                spent = divergence(frozen, steered)
                assert spent <= limit + 1e-6
                at_limit += spent > 0.99 * limit
            ids.append(token)
    assert at_limit >= 10, "the limits matter"
