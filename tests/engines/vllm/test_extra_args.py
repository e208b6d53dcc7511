"""The part of a request for the workers is read as it was written, and checked. No vLLM."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.engines.vllm.extra_args import (
    ESTIMATES_KEY,
    STEERING_KEY,
    EstimateRequest,
    SteeringRequest,
    publish_value_names,
    published_value_names,
    withdraw_value_names,
)
from infer_align.steering import EstimateSchedule, Steering


@given(
    st.dictionaries(st.text(min_size=1), st.floats(-1000, 1000), min_size=1),
    st.integers(1, 2**40),
    st.sampled_from(["keep", "mask"]),
)
def test_steering_is_read_as_it_was_written(beta: dict[str, float], top_k: int, tail: Any) -> None:
    written = SteeringRequest.write(Steering(beta, top_k, tail))
    request = SteeringRequest.read(written)
    weights = {name: weight for name, weight in beta.items() if weight}
    if weights:
        assert request == SteeringRequest(weights, top_k, tail == "mask")
    else:
        assert request is None


def test_top_k_is_at_most_the_vocabulary() -> None:
    written = SteeringRequest.write(Steering({"a": 1.0}, 10**6, "keep"), 1992)
    assert written[STEERING_KEY]["top_k"] == 1992


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (5, "not of the form"),
        ({"beta": {"a": 1.0}}, "not of the form"),
        ({"beta": [1.0], "top_k": 1, "tail": "keep"}, "not of the form"),
        ({"beta": {"a": 1.0}, "top_k": 1, "tail": "keep", "more": 1}, "not of the form"),
        ({"beta": {"a": 1001.0}, "top_k": 1, "tail": "keep"}, "from -1000 to 1000"),
        ({"beta": {"a": float("nan")}, "top_k": 1, "tail": "keep"}, "from -1000 to 1000"),
        ({"beta": {"a": "1"}, "top_k": 1, "tail": "keep"}, "from -1000 to 1000"),
        ({"beta": {"a": 1.0}, "top_k": 0, "tail": "keep"}, "top_k"),
        ({"beta": {"a": 1.0}, "top_k": True, "tail": "keep"}, "top_k"),
        ({"beta": {"a": 1.0}, "top_k": 3, "tail": "cut"}, "tail"),
        ({"beta": {"a": 1.0}, "top_k": "most", "tail": "keep"}, "top_k"),
        ({"beta": {"a": 1.0}, "top_k": 20, "tail": "keep", "min_p": 0}, "min_p"),
        ({"beta": {"a": 1.0}, "top_k": 20, "tail": "keep", "min_p": 1.5}, "min_p"),
        ({"beta": {"a": 1.0}, "top_k": 20, "tail": "keep", "min_p": "0.1"}, "min_p"),
        ({"beta": {"a": 1.0}, "top_k": 20, "tail": "keep", "max_kl": 0}, "max_kl"),
        ({"beta": {"a": 1.0}, "top_k": 20, "tail": "keep", "max_kl": float("nan")}, "max_kl"),
        ({"beta": {"a": 1.0}, "top_k": 20, "tail": "keep", "max_kl": True}, "max_kl"),
        ({"beta": {"a": 1.0}, "top_k": 20, "tail": "mask", "max_kl": 1.0}, "max_kl"),
        ({"beta": {"b": 1.0}, "top_k": 3, "tail": "keep"}, r"beta\.b: no such value; known: a"),
    ],
)
def test_other_steering_is_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SteeringRequest.read({STEERING_KEY: fields}, {"a"})


def test_steering_without_a_fixed_number_is_read_as_it_was_written() -> None:
    every = SteeringRequest.write(Steering({"a": 2.0}, "all", "keep"), 1992)
    assert SteeringRequest.read(every) == SteeringRequest({"a": 2.0}, None, False)
    likely = SteeringRequest.write(Steering({"a": 2.0}, 20, "mask", 0.1), 1992)
    assert SteeringRequest.read(likely) == SteeringRequest({"a": 2.0}, None, True, 0.1)


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}])
def test_a_request_may_carry_neither(extra_args: Any) -> None:
    assert SteeringRequest.read(extra_args) is None
    assert EstimateRequest.read(extra_args) is None


def test_an_estimate_request_is_read_as_it_was_written() -> None:
    request = EstimateRequest("a", EstimateSchedule({"helpful": 0.5, "brief": -1.0}, 7))
    assert EstimateRequest.read(request.write()) == request


@pytest.mark.parametrize(
    "fields",
    [1, {}, {"name": "a", "values": {}, "after": 0}, {"name": 1, "values": {}, "after": 3}],
)
def test_another_estimate_request_is_refused(fields: Any) -> None:
    with pytest.raises(ValueError, match=r"use align\.early_stop instead"):
        EstimateRequest.read({ESTIMATES_KEY: fields})


@pytest.mark.parametrize(
    "values",
    [{"helpful": None}, {"helpful": True}, {"helpful": "1"}, {"helpful": float("nan")}, {"": 1e9}],
)
def test_estimate_weights_that_would_end_a_worker_are_refused(values: Any) -> None:
    with pytest.raises(ValueError, match=r"align\.early_stop\.values"):
        EstimateRequest.read({ESTIMATES_KEY: {"name": "a", "values": values, "after": 3}})


def test_an_unknown_value_of_an_estimate_is_refused_with_the_nearest() -> None:
    request = EstimateRequest("a", EstimateSchedule({"helpfull": 1.0}, 4))
    with pytest.raises(ValueError, match=r"values\.helpfull: no such value; did you mean 'helpful"):
        EstimateRequest.read(request.write(), {"helpful"})


class Engine:
    """Stands for an engine that publishes names."""


def test_names_are_published_until_they_are_withdrawn() -> None:
    first, second = Engine(), Engine()
    publish_value_names(first, ["test-a", "test-b"])
    publish_value_names(second, ["test-b", "test-c"])
    assert {"test-a", "test-b", "test-c"} <= published_value_names()
    withdraw_value_names(first)
    assert "test-a" not in published_value_names()
    assert "test-b" in published_value_names()
    del second
    assert "test-c" not in published_value_names(), "the names disappear with their engine"
    withdraw_value_names(first)
