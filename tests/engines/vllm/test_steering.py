"""Steering inside vLLM's V1 runner equals a float32 reference. It runs on a CPU in this process."""

# ruff: noqa: PLC0415 - vLLM takes ten seconds to import
from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from infer_align.engines.vllm.value_source import write_source
from infer_align.engines.vllm.values import EngineValues
from infer_align.errors import ConfigError
from infer_align.steering import EstimateSchedule, Steering
from infer_align.values.head import HeadValue
from tests.engines.vllm.stepping import (
    STEERINGS,
    WARNINGS,
    Reference,
    SteppedRequest,
    assert_estimates,
    environment,
    make_engine,
    make_values,
    mixed_requests,
    prompts,
    run,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    *WARNINGS,
]

# One block of the cache and three tokens. After these the next token is uncertain, steered or not.
UNCERTAIN = [
    [i, *[7] * 31, *rest]
    for i, rest in ((187, (780, 1168, 296)), (258, (1226, 350, 296)), (216, (797, 1666, 338)))
]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HeadValue]:
    return make_values(tmp_path_factory.mktemp("values"))


@pytest.fixture(scope="module")
def reference(heads: dict[str, HeadValue]) -> Reference:
    return Reference(heads)


@pytest.fixture(scope="module")
def values(heads: dict[str, HeadValue]) -> EngineValues:
    return EngineValues(heads)


@pytest.fixture(scope="module")
def engine(values: EngineValues) -> Iterator[Any]:
    with environment():
        engine = make_engine(values)
        yield engine
        engine.engine_core.shutdown()
        values.close()


def assert_equal(requests: list[SteppedRequest], reference: Reference) -> tuple[int, float]:
    """Compare with the reference; return the number of tokens and the largest logprob error."""
    largest = 0.0
    count = 0
    for request in requests:
        tokens, logprobs = reference.greedy(request.prompt, request.steering, len(request.tokens))
        assert request.tokens == tokens
        for actual, expected in zip(request.logprobs, logprobs, strict=True):
            largest = max(largest, abs(actual - expected))
        count += len(tokens)
    assert largest < 1e-4
    return count, largest


def test_32_requests_with_different_steering_equal_the_reference(
    engine: Any, values: EngineValues, reference: Reference
) -> None:
    first = mixed_requests(32)
    run(engine, values, first)
    assert all(request.finish_reason in {"stop", "length"} for request in first)
    count, largest = assert_equal(first, reference)
    print(f"{count} tokens, largest logprob difference {largest:.2g}")
    assert count > 150
    changed = 0
    for request in first:
        unsteered, _ = reference.greedy(request.prompt, None, len(request.tokens))
        changed += request.tokens != unsteered
    assert changed >= 8, "steering changes the answers"

    again = mixed_requests(32)
    for request in again:
        request.arrives = 0
    run(engine, values, again)
    cached_tokens = sum(request.cached_tokens for request in again)
    assert cached_tokens > 32 * 10, "the prefixes come from the cache"
    assert [request.tokens for request in again] == [request.tokens for request in first]
    assert_equal(again, reference)


def test_estimates_equal_the_reference(
    engine: Any, values: EngineValues, reference: Reference
) -> None:
    requests = mixed_requests(24)
    run(engine, values, requests)
    assert_equal(requests, reference)
    assert_estimates(requests, reference)
    assert sum(len(request.estimates) for request in requests) >= 20


def test_aborts_and_reused_slots_do_not_affect_other_requests(
    engine: Any, values: EngineValues, reference: Reference
) -> None:
    requests = mixed_requests(32, ignore_eos=True)
    for i, request in enumerate(requests):
        if i % 4 == 1:
            request.aborted_at = request.arrives + 2 + i % 3
    run(engine, values, requests)
    aborted = [request for request in requests if request.aborted_at is not None]
    unfinished = sum(request.finish_reason is None for request in aborted)
    assert unfinished >= 6, "most of them were aborted before their end"
    for request in requests:
        if request.aborted_at is None:
            assert request.finish_reason == "length"
            assert request.tokens == greedy_past_the_end(reference, request)


def greedy_past_the_end(reference: Reference, request: SteppedRequest) -> list[int]:
    tokens, _ = reference.greedy(request.prompt, request.steering, len(request.tokens), eos=-1)
    return tokens


def test_logprobs_of_the_prompt_are_those_of_the_frozen_model(
    engine: Any, values: EngineValues, reference: Reference
) -> None:
    requests = mixed_requests(12)
    for request in requests[::3]:
        request.params = {**request.params, "prompt_logprobs": 0}
    run(engine, values, requests)
    assert_equal(requests, reference)
    for request in requests[::3]:
        with torch.inference_mode():
            logits = reference.lm(torch.tensor([request.prompt])).logits[0]
        logprobs = torch.log_softmax(logits, -1)
        expected = [float(logprobs[i, token]) for i, token in enumerate(request.prompt[1:])]
        assert request.prompt_logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("tail", ["keep", "mask"])
def test_samples_follow_the_steered_distribution(
    tail: Any, engine: Any, values: EngineValues, reference: Reference
) -> None:
    steering = Steering({"helpful": 2.0, "mlp": 0.3}, 32, tail)
    n = 1200
    temperature = 0.7
    params = {"temperature": temperature, "max_tokens": 1, "logprobs": None}
    statistic = 0.0
    unsteered_statistic = 0.0
    freedom = 0
    for prompt in UNCERTAIN:
        # Every fourth request is steered differently, which must not matter to the others. They
        # have no seeds: on a CPU, vLLM dies of a seeded request whose prompt is read in chunks
        # ("CPU Generator does not use offset").
        requests = [
            SteppedRequest(prompt, steering if i % 4 else STEERINGS[i // 4 % 8], params)
            for i in range(n)
        ]
        torch.manual_seed(n)
        run(engine, values, requests)
        tokens = torch.tensor([request.tokens[0] for i, request in enumerate(requests) if i % 4])
        expected = expected_counts(reference, prompt, steering, temperature, len(tokens))
        counts = torch.bincount(tokens, minlength=len(expected)).double()
        assert not counts[expected == 0].any()
        often = expected >= 5
        pooled_expected = torch.cat([expected[often], expected[~often].sum()[None]])
        pooled_counts = torch.cat([counts[often], counts[~often].sum()[None]])
        statistic += chi_square(pooled_counts, pooled_expected)
        freedom += len(pooled_expected) - 1
        unsteered = expected_counts(reference, prompt, None, temperature, len(tokens))
        often = unsteered >= 5
        unsteered_statistic += chi_square(counts[often], unsteered[often])
    p = float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2.0)))
    print(f"tail {tail}: chi-square {statistic:.1f} on {freedom}, p = {p:.3f}")
    assert freedom >= 12
    assert p > 1e-3
    assert unsteered_statistic > 20 * freedom, "the frozen model would answer differently"


def expected_counts(
    reference: Reference,
    prompt: list[int],
    steering: Steering | None,
    temperature: float,
    samples: int,
) -> torch.Tensor:
    logits, _ = reference.step(prompt, steering)
    return torch.softmax(logits.double() / temperature, -1) * samples


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_a_replaced_value_steers_requests_that_join_later(
    engine: Any, values: EngineValues, heads: dict[str, HeadValue], reference: Reference
) -> None:
    steering = Steering({"helpful": 6.0}, 20, "keep")
    prompt = prompts(4)[3]
    params = {"max_tokens": 24, "ignore_eos": True}
    early = SteppedRequest(prompt, steering, params, arrives=0)
    late = SteppedRequest(prompt, steering, params, arrives=4)
    # Short requests come and go, so that vLLM moves rows.
    short = [SteppedRequest(prompt, None, {"max_tokens": 3}, arrives=step) for step in range(10)]

    def replace(step: int) -> None:
        if step == 3:
            replace_helpful(engine, heads["mlp"])

    run(engine, values, [early, late, *short], replace)
    assert early.tokens == greedy_past_the_end(reference, early)
    by_mlp = Steering({"mlp": 6.0}, 20, "keep")
    assert late.tokens == reference.greedy(prompt, by_mlp, 24, eos=-1)[0]
    assert early.tokens != late.tokens
    replace_helpful(engine, heads["helpful"])


def replace_helpful(engine: Any, value: HeadValue) -> None:
    source = write_source("helpful", value)
    engine.collective_rpc("infer_align_load_value", args=(source,))
    assert engine.collective_rpc("infer_align_use_value", args=("helpful",)) == [1]


def test_invalid_steering_never_reaches_a_worker(engine: Any, values: EngineValues) -> None:
    from vllm.exceptions import VLLMValidationError

    for steering, message in [
        (Steering({"helpful": 1e6}, 5, "keep"), "beta.helpful"),
        (Steering({"helpfull": 1.0}, 5, "keep"), "did you mean 'helpful'"),
        (Steering({"helpful": 1.0}, 0, "keep"), "top_k"),
    ]:
        with pytest.raises(VLLMValidationError, match=message):
            run(engine, values, [SteppedRequest([5, 6], steering)])
    assert not engine.has_unfinished_requests()


def test_the_padding_of_a_cuda_graph_is_never_due() -> None:
    # Where a CUDA graph pads the batch, vLLM pads the lengths but not the slots.
    from infer_align.engines.vllm.processor import ValueProcessor
    from infer_align.engines.vllm.recorder import EstimatedRequest

    schedule = EstimateSchedule({"helpful": 1.0}, 4)
    processor = ValueProcessor.__new__(ValueProcessor)
    processor._prompt_lengths = np.array([0, 10, 20, 30])
    processor._estimated = {slot: EstimatedRequest(str(slot), schedule, {}) for slot in (1, 3)}
    # The lengths of slots 3, 1 and 2, and padding.
    lengths = np.array([34, 15, 24, 0])
    context: Any = SimpleNamespace(
        idx_mapping_np=np.array([3, 1, 2]), seq_lens_upper_bound_np=lengths
    )
    due = [(item.row, item.request.key, item.tokens) for item in processor._due_rows(context)]
    assert due == [(0, "3", 4)]


def test_a_configuration_without_the_tokenizer_is_refused() -> None:
    pytest.importorskip("vllm")
    from infer_align.vllm.compat import vocabulary_of

    model_config: Any = SimpleNamespace(skip_tokenizer_init=True)
    with pytest.raises(ConfigError, match=r"engine\.skip_tokenizer_init"):
        vocabulary_of(model_config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("enforce_eager", "True"), ("enable_prefix_caching", "false"), ("trust_remote_code", 1)],
)
def test_a_switch_must_be_true_or_false(name: str, value: object) -> None:
    from infer_align.vllm.compat import parse_options

    message = rf"\[engine\] {name}: {value!r} is not allowed; must be true or false"
    with pytest.raises(ConfigError, match=message):
        parse_options("demo", "demo", {name: value})


def test_vllms_own_api_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from infer_align.vllm.compat import parse_options

    with pytest.raises(ConfigError, match="api_keys_env"):
        parse_options("demo", "demo", {"api_key": "x"})
    monkeypatch.setenv("VLLM_API_KEY", "x")
    with pytest.raises(ConfigError, match="api_keys_env"):
        parse_options("demo", "demo", {})
