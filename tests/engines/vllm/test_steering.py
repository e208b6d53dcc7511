"""Steering inside vLLM's V1 runner, on a CPU in this process, equals a reference of transformers in float32."""

# ruff: noqa: PLC0415 - vLLM takes ten seconds to import
from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from infer_align.engines.vllm.steering import Steerer
from infer_align.errors import ConfigError
from infer_align.types import EstimateSchedule, Steering
from infer_align.values.head import HeadValue
from tests.engines.vllm.stepping import (
    MIXES,
    WARNINGS,
    Ask,
    Reference,
    assert_estimates,
    environment,
    make_engine,
    make_values,
    mixed,
    prompts,
    run,
)

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    *WARNINGS,
]

# After these the demo's model is in doubt, and steered it still is. A block of the cache, and three tokens.
UNCERTAIN = [
    [i, *[7] * 31, *rest]
    for i, rest in ((187, (780, 1168, 296)), (258, (1226, 350, 296)), (216, (797, 1666, 338)))
]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HeadValue]:
    return make_values(tmp_path_factory.mktemp("values"))


@pytest.fixture(scope="module")
def reference(values: dict[str, HeadValue]) -> Reference:
    return Reference(values)


@pytest.fixture(scope="module")
def steerer(values: dict[str, HeadValue]) -> Steerer:
    return Steerer(values)


@pytest.fixture(scope="module")
def engine(steerer: Steerer) -> Iterator[Any]:
    with environment():
        engine = make_engine(steerer)
        yield engine
        engine.engine_core.shutdown()


def assert_equal(found: list[Ask], reference: Reference) -> tuple[int, float]:
    """-> how many tokens were compared, and the largest difference of a logprob."""
    worst, compared = 0.0, 0
    for ask in found:
        tokens, logprobs = reference.greedy(ask.prompt, ask.steering, len(ask.tokens))
        assert ask.tokens == tokens
        worst = max(worst, *(abs(a - b) for a, b in zip(ask.logprobs, logprobs, strict=True)))
        compared += len(tokens)
    assert worst < 1e-4
    return compared, worst


def test_32_requests_with_different_steering_equal_the_reference(
    engine: Any, steerer: Steerer, reference: Reference
) -> None:
    first = mixed(32)
    run(engine, steerer, first)
    assert all(ask.reason in {"stop", "length"} for ask in first)
    compared, worst = assert_equal(first, reference)
    print(f"{compared} tokens, worst logprob difference {worst:.2g}")
    assert compared > 150
    changed = [
        ask for ask in first if ask.tokens != reference.greedy(ask.prompt, None, len(ask.tokens))[0]
    ]
    assert len(changed) >= 8, "steering changes what is said"

    again = mixed(32)
    for ask in again:
        ask.arrives = 0  # all at once
    run(engine, steerer, again)
    assert sum(ask.cached for ask in again) > 32 * 10, "the prefixes come from the cache"
    assert [ask.tokens for ask in again] == [ask.tokens for ask in first]
    assert_equal(again, reference)


def test_estimates_of_watched_requests_equal_the_reference(
    engine: Any, steerer: Steerer, reference: Reference
) -> None:
    found = mixed(24)
    run(engine, steerer, found)
    assert_equal(found, reference)
    assert_estimates(found, reference)
    assert sum(len(ask.estimates) for ask in found) >= 20


def test_aborts_and_reused_slots_leave_the_others_alone(
    engine: Any, steerer: Steerer, reference: Reference
) -> None:
    found = mixed(32, ignore_eos=True)
    for i, ask in enumerate(found):
        if i % 4 == 1:
            ask.aborted_at = ask.arrives + 2 + i % 3
    run(engine, steerer, found)
    gone = [ask for ask in found if ask.aborted_at is not None]
    assert sum(ask.reason is None for ask in gone) >= 6, "most of them were cut off midway"
    for ask in found:
        if ask.aborted_at is None:
            assert ask.reason == "length"
            assert ask.tokens == reference_without_end(reference, ask)


def reference_without_end(reference: Reference, ask: Ask) -> list[int]:
    return reference.greedy(ask.prompt, ask.steering, len(ask.tokens), eos=-1)[0]


def test_logprobs_of_the_prompt_stay_those_of_the_frozen_model(
    engine: Any, steerer: Steerer, reference: Reference
) -> None:
    found = mixed(12)
    for ask in found[::3]:
        ask.params = {**ask.params, "prompt_logprobs": 0}
    run(engine, steerer, found)
    assert_equal(found, reference)
    for ask in found[::3]:
        with torch.inference_mode():
            logprobs = torch.log_softmax(reference.lm(torch.tensor([ask.prompt])).logits[0], -1)
        expected = [float(logprobs[i, token]) for i, token in enumerate(ask.prompt[1:])]
        assert ask.prompt_logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("tail", ["keep", "mask"])
def test_samples_follow_the_steered_distribution(
    tail: Any, engine: Any, steerer: Steerer, reference: Reference
) -> None:
    steering, each, temperature = Steering({"helpful": 2.0, "mlp": 0.3}, 32, tail), 1200, 0.7
    statistic, against, freedom = 0.0, 0.0, 0
    for prompt in UNCERTAIN:
        params = {"temperature": temperature, "max_tokens": 1, "logprobs": None}
        # Others in the batch, steered otherwise, are nobody's business. No seeds of their own: on a CPU, vLLM dies of a seeded
        # request whose prompt is read in pieces ("CPU Generator does not use offset").
        found = [
            Ask(prompt, steering if i % 4 else MIXES[i // 4 % len(MIXES)], params)
            for i in range(each)
        ]
        torch.manual_seed(len(found))
        run(engine, steerer, found)
        tokens = torch.tensor([ask.tokens[0] for i, ask in enumerate(found) if i % 4])
        expected = torch.softmax(
            reference.step(prompt, steering)[0].double() / temperature, -1
        ) * len(tokens)
        counts = torch.bincount(tokens, minlength=len(expected)).double()
        assert not counts[expected == 0].any()
        often = expected >= 5
        e = torch.cat([expected[often], expected[~often].sum()[None]])
        c = torch.cat([counts[often], counts[~often].sum()[None]])
        statistic += float(((c - e) ** 2 / e).sum())
        freedom += len(e) - 1
        unsteered = torch.softmax(reference.step(prompt, None)[0].double() / temperature, -1) * len(
            tokens
        )
        against += float(
            ((counts - unsteered)[unsteered >= 5] ** 2 / unsteered[unsteered >= 5]).sum()
        )
    p = float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2.0)))
    print(f"tail {tail}: chi-square {statistic:.1f} on {freedom}, p = {p:.3f}")
    assert freedom >= 12
    assert p > 1e-3
    assert against > 20 * freedom, "the model that is not steered would not have said this"


def test_a_replaced_value_steers_those_who_come_after(
    engine: Any, steerer: Steerer, values: dict[str, HeadValue], reference: Reference
) -> None:
    steering = Steering({"helpful": 6.0}, 20, "keep")
    prompt = prompts(4)[3]
    early, late = (
        Ask(prompt, steering, {"max_tokens": 24, "ignore_eos": True}, arrives=step)
        for step in (0, 4)
    )
    # Others come and go, which moves rows about.
    others = [Ask(prompt, None, {"max_tokens": 3}, arrives=step) for step in range(10)]

    def replace(step: int) -> None:
        if step == 3:
            swap(engine, values["mlp"])

    run(engine, steerer, [early, late, *others], replace)
    other = Steering({"mlp": 6.0}, 20, "keep")
    assert early.tokens == reference_without_end(reference, early)
    assert late.tokens == reference.greedy(prompt, other, 24, eos=-1)[0]
    assert early.tokens != late.tokens
    swap(engine, values["helpful"])


def swap(engine: Any, value: HeadValue) -> None:
    engine.collective_rpc("infer_align_load_value", args=(value.path,))
    assert engine.collective_rpc("infer_align_use_value", args=("helpful",)) == [1]


def test_what_is_out_of_bounds_never_reaches_a_worker(engine: Any, steerer: Steerer) -> None:
    from vllm.exceptions import VLLMValidationError

    for steering, named in [
        (Steering({"helpful": 1e6}, 5, "keep"), "beta.helpful"),
        (Steering({"helpfull": 1.0}, 5, "keep"), "did you mean 'helpful'"),
        (Steering({"helpful": 1.0}, 0, "keep"), "top_k"),
    ]:
        with pytest.raises(VLLMValidationError, match=named):
            run(engine, steerer, [Ask([5, 6], steering)])
    assert not engine.has_unfinished_requests()


def test_what_is_due_in_a_padded_step_of_the_v2_runner() -> None:
    """Where a CUDA graph pads the batch, vLLM pads the lengths but not the slots."""
    from infer_align.engines.vllm.processor import ValueProcessor
    from infer_align.engines.vllm.watching import Watched

    processor = ValueProcessor.__new__(ValueProcessor)
    processor._prompt_lengths = np.array([0, 10, 20, 30])
    processor._watched = {
        slot: Watched(str(slot), EstimateSchedule({"helpful": 1.0}, 4), ()) for slot in (1, 3)
    }
    lengths = np.array([34, 15, 24, 0])  # of slots 3, 1, 2, and padding
    ctx: Any = SimpleNamespace(idx_mapping_np=np.array([3, 1, 2]), seq_lens_upper_bound_np=lengths)
    assert [(row, watched.name, tokens) for row, watched, tokens in processor._due(ctx)] == [
        (0, "3", 4)
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("enforce_eager", "True"), ("enable_prefix_caching", "false"), ("trust_remote_code", 1)],
)
def test_options_that_are_true_or_false_are_nothing_else(name: str, value: object) -> None:
    from infer_align.vllm.compat import arguments

    with pytest.raises(
        ConfigError, match=rf"\[engine\] {name}: {value!r} is not allowed; must be true or false"
    ):
        arguments("demo", "demo", {name: value})


def test_keys_of_vllms_own_would_guard_half_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from infer_align.vllm.compat import arguments

    with pytest.raises(ConfigError, match="api_keys_env"):
        arguments("demo", "demo", {"api_key": "x"})
    monkeypatch.setenv("VLLM_API_KEY", "x")
    with pytest.raises(ConfigError, match="api_keys_env"):
        arguments("demo", "demo", {})
