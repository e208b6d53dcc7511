"""The reweighting and the TD(lambda) targets, against vectors from the paper's published code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.config.schema import parse
from infer_align.errors import InvalidRequest
from infer_align.methods import PlanDraft
from infer_align.methods.vas import VAS, lambda_returns, reweight
from infer_align.steering import Steering
from infer_align.types import Draw

ALIGN = {"vas": {"beta": {"helpful": 1.0}}}

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vas_public.json").read_text())


def numbers(value: list) -> np.ndarray:
    return np.array(value, dtype=np.float64)  # "-Infinity" parses as a float


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-logits, axis=-1, kind="stable")[:, : min(k, logits.shape[-1])]


def logprobs(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    "case", VECTORS["single"] + VECTORS["identity_and_invariance"], ids=lambda case: case["id"]
)
def test_published_reweighting(case: dict) -> None:
    logits = numbers(case["logits"])
    ids = top_k(logits, case["topk"])
    values = numbers(case.get("value_of_each_token_continuation") or case["values"])
    out = reweight(logits, ids, values[ids][None], [case["beta"]])
    assert out == pytest.approx(numbers(case["expected_processed_logits"]), abs=1e-9)
    assert logprobs(out) == pytest.approx(numbers(case["expected_logprobs"]), abs=1e-9)
    if case.get("equals_input"):
        assert logprobs(out) == pytest.approx(logprobs(logits), abs=1e-9)


@pytest.mark.parametrize("case", VECTORS["composition"], ids=lambda case: case["id"])
def test_values_share_one_top_k(case: dict) -> None:
    logits = numbers(case["logits"])
    ids = top_k(logits, case["topk"])
    values = numbers(case["values_per_reward"])[:, ids]
    out = reweight(logits, ids, values, case["betas"])
    assert out == pytest.approx(numbers(case["expected_shared_topk_processed_logits"]), abs=1e-9)
    summed = np.einsum("m,mbk->bk", case["betas"], values)[None]
    assert reweight(logits, ids, summed, [1.0]) == pytest.approx(out, abs=1e-9)
    chained = numbers(case["chained_published_processors_processed_logits"])
    assert np.allclose(chained, out, atol=1e-9) == case["chained_equals_shared"]


@pytest.mark.parametrize("case", VECTORS["tail"], ids=lambda case: case["id"])
def test_tail(case: dict) -> None:
    logits = numbers(case["logits"])
    ids = top_k(logits, case["topk"])
    values = numbers(case["values"])[ids][None]
    probabilities = np.exp(logprobs(reweight(logits, ids, values, [case["beta"]])))
    outside = np.setdiff1d(np.arange(case["V"]), ids[0])
    assert probabilities[0, outside].sum() == pytest.approx(
        case["expected_prob_mass_outside_topk_published"], abs=1e-9
    )
    masked = logprobs(reweight(logits, ids, values, [case["beta"]], "mask"))
    for token, logprob in case["independent_truncated_variant_logprobs_topk_sorted"]:
        assert masked[0, token] == pytest.approx(logprob, abs=1e-9)
    assert np.isneginf(masked[0, outside]).all()


@pytest.mark.parametrize("case", VECTORS["td_lambda_returns"], ids=lambda case: case["id"])
def test_published_returns(case: dict) -> None:
    mask = numbers(case["mask"])
    returns = lambda_returns(
        numbers(case["values"]) * mask, case["rewards"], case["gamma"], case["lam"]
    )
    assert returns == pytest.approx(numbers(case["expected_returns"]), abs=1e-9)


def test_more_candidates_than_tokens_are_all_of_them() -> None:
    assert parse(VAS, {"beta": {"helpful": 1}, "top_k": 10**9}, "align.vas").top_k == 10**9
    assert top_k(np.zeros((1, 5)), 20).shape == (1, 5)


@given(st.integers(1, 6), st.sampled_from(["keep", "mask"]), st.data())
def test_weight_zero_is_the_frozen_model_bit_for_bit(
    k: int, tail: str, data: st.DataObject
) -> None:
    logits = np.array([data.draw(st.lists(st.floats(-50, 50), min_size=6, max_size=6))])
    values = np.full((2, 1, k), np.nan)
    assert np.array_equal(reweight(logits, top_k(logits, k), values, [0.0, 0.0], tail), logits)


def test_a_value_of_weight_zero_is_not_looked_at() -> None:
    values = np.array([[[1.0, -1.0]], [[np.nan, np.inf]]])
    assert reweight([[0.0, 0.0, 5.0]], [[0, 1]], values, [2.0, 0.0]).tolist() == [[2.0, -2.0, 5.0]]


def test_rows_have_weights_of_their_own() -> None:
    logits, ids, values = (
        np.zeros((2, 3)),
        np.array([[0, 1], [0, 1]]),
        np.array([[[1.0, -1.0], [1.0, -1.0]]]),
    )
    assert reweight(logits, ids, values, [[2.0], [-1.0]]).tolist() == [
        [2.0, -2.0, 0.0],
        [-1.0, 1.0, 0.0],
    ]


def test_an_unknown_tail_is_refused() -> None:
    tail: Any = "drop"
    with pytest.raises(ValueError, match="tail: 'drop' is not allowed; must be 'keep' or 'mask'"):
        reweight([[1.0, 2.0]], [[0]], [[[1.0]]], [1.0], tail)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"must be \[B, V\]"):
        reweight(np.zeros((2, 3)), np.zeros((1, 2), int), np.zeros((1, 2, 2)), [1.0])
    with pytest.raises(ValueError, match="both must be"):
        lambda_returns([[1.0]], [[1.0, 2.0]], 1.0, 1.0)


@pytest.mark.parametrize("token", [-1, 2])
def test_a_token_outside_of_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match=r"token_ids: .* must be from 0 to 1"):
        reweight([[1.0, 2.0]], [[0, token]], [[[1.0, 2.0]]], [1.0])


@pytest.mark.filterwarnings("error")
def test_no_candidates_change_nothing() -> None:
    steered = reweight([[1.0, 2.0]], np.zeros((1, 0), int), np.zeros((1, 1, 0)), [1.0])
    np.testing.assert_array_equal(steered, [[1.0, 2.0]])


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"beta": {}}, "align.vas.beta"),
        ({"beta": {"helpful": float("nan")}}, "align.vas.beta.helpful"),
        ({"beta": {"helpful": 1e9}}, "align.vas.beta.helpful"),
        ({"beta": {"helpful": 1}, "top_k": 0}, "align.vas.top_k"),
        ({"beta": {"helpful": 1}, "tail": "cut"}, "align.vas.tail"),
        ({"beta": {"helpful": 1}, "max_kl": 0}, "align.vas.max_kl"),
        ({"beta": {"helpful": 1}, "max_kl": "1"}, "align.vas.max_kl"),
        ({"beta": {"helpful": 1}, "max_kl": float("nan")}, "align.vas.max_kl"),
        ({}, "align.vas.beta"),
    ],
)
def test_bad_parameters_are_named(params: dict, param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse(VAS, params, "align.vas")
    assert error.value.param == param


def test_plan_steers_every_draw() -> None:
    plan = PlanDraft(draws=(Draw(body={}), Draw(body={}, n=3)))
    steered = VAS({"helpful": 2.0}, top_k=5, tail="mask").apply(plan)
    assert all(draw.steering == Steering({"helpful": 2.0}, 5, "mask") for draw in steered.draws)
    assert [draw.n for draw in steered.draws] == [1, 3]


def test_a_limit_of_the_divergence_needs_an_unmasked_tail() -> None:
    draft = PlanDraft(draws=(Draw({}),))
    (draw,) = VAS({"a": 1.0}, max_kl=0.5).apply(draft).draws
    assert draw.steering is not None
    assert draw.steering.max_kl == 0.5
    with pytest.raises(InvalidRequest, match='needs tail "keep"') as refused:
        VAS({"a": 1.0}, tail="mask", max_kl=0.5).apply(draft)
    assert refused.value.param == "align.vas.max_kl"


def test_min_p_takes_the_place_of_top_k() -> None:
    draft = PlanDraft(draws=(Draw({}),))
    (draw,) = VAS({"a": 1.0}, min_p=0.1).apply(draft).draws
    assert draw.steering == Steering({"a": 1.0}, 20, "keep", 0.1)
    assert draw.steering.candidates is None
    with pytest.raises(InvalidRequest) as refused:
        VAS({"a": 1.0}, top_k=5, min_p=0.1).apply(draft)
    assert refused.value.param == "align.vas.min_p"
    assert "top_k, which is 5" in refused.value.message
