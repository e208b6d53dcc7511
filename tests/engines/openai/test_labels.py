"""Labels are read from the top logprobs of as few calls as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from infer_align.decoding.labels import LabelLogprobs, LabelQuery
from infer_align.upstream import UpstreamFailed
from tests.engines.openai.conftest import QUESTION, MakeEngine
from tests.engines.openai.upstream import FakeUpstream

pytestmark = pytest.mark.anyio

PREFIX = "Score: ["
ONE_TO_TEN = tuple(str(i) for i in range(1, 11))
ONE_TO_HUNDRED = tuple(str(i) for i in range(1, 101))
# Text so far -> the probabilities of the next token.
Model = Mapping[str, Mapping[str, float]]


def answer_like(model: Model, *, continues: bool) -> Callable[[str, dict[str, Any]], Any]:
    """Return the answers of an upstream with this model."""

    def answer(_: str, body: dict[str, Any]) -> dict[str, Any]:
        content = body["messages"][-1]["content"]
        if body.get("continue_final_message") and continues:
            text = content.removeprefix(PREFIX)
        else:
            text = content.partition(PREFIX)[2].partition("'")[0]
        probabilities = model.get(text, {"z": 1.0})
        top = [{"token": t, "logprob": math.log(p)} for t, p in probabilities.items()]
        entry = {"token": "?", "top_logprobs": top[: body.get("top_logprobs", 0)]}
        choice = {"message": {"content": "?"}, "logprobs": {"content": [entry]}}
        return {"choices": [choice], "usage": {"prompt_tokens": 11}}

    return answer


def probabilities_of(reading: LabelLogprobs) -> dict[str, float]:
    """Return the probabilities of the labels that have any."""
    probabilities = {label: math.exp(logprob) for label, logprob in reading.logprobs.items()}
    return {label: p for label, p in probabilities.items() if p}


@pytest.mark.parametrize("continues", [True, False])
async def test_labels_of_one_token_take_one_call(
    up: FakeUpstream, make_engine: MakeEngine, continues: bool
) -> None:
    up.answer = answer_like({"": {"3": 0.5, "4": 0.25, "x": 0.25}}, continues=continues)
    features = ("label_logprobs", "continue") if continues else ("label_logprobs",)
    engine = await make_engine(capabilities=features)
    reading = await engine.read_labels(LabelQuery(QUESTION, PREFIX, ("3", "4", "5")))
    assert reading.logprobs == {
        "3": pytest.approx(math.log(0.5)),
        "4": pytest.approx(math.log(0.25)),
        "5": -math.inf,
    }
    assert (reading.calls, reading.prompt_tokens, up.calls) == (1, 11, 1)
    (body,) = up.bodies
    assert (body["max_tokens"], body["top_logprobs"]) == (1, 20)
    assert (body["messages"][-1]["role"] == "assistant") is continues
    assert body.get("add_generation_prompt", True) is not continues


async def test_labels_of_several_tokens_take_a_call_per_likely_beginning(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    model = {
        "": {"8": 0.5, "1": 0.4, "85": 0.0625},
        "8": {"5": 0.5, "]": 0.5},
        "1": {"0": 0.5, "]": 0.5},
        "10": {"0": 0.5, "]": 0.5},
    }
    up.answer = answer_like(model, continues=True)
    engine = await make_engine(capabilities=("label_logprobs", "continue"))
    reading = await engine.read_labels(LabelQuery(QUESTION, PREFIX, ONE_TO_HUNDRED))
    assert probabilities_of(reading) == pytest.approx(
        {"8": 0.25, "85": 0.25 + 0.0625, "1": 0.2, "10": 0.1, "100": 0.1}
    )
    assert reading.calls == up.calls == 4


async def test_a_reply_may_end_a_label_that_begins_a_longer_one(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    """Without continued turns, "]" among the replies stands for the end of the label."""
    model = {"": {"1": 0.9, "2": 0.1}, "1": {"]": 0.95, "0": 0.05}}
    up.answer = answer_like(model, continues=False)
    engine = await make_engine(capabilities=("label_logprobs",))
    reading = await engine.read_labels(LabelQuery(QUESTION, PREFIX, ONE_TO_TEN))
    assert probabilities_of(reading) == pytest.approx({"1": 0.855, "10": 0.045, "2": 0.1})
    assert up.bodies[1]["messages"][-1]["content"].endswith("It is one of: ], 0.")


async def test_a_model_with_labels_as_tokens_takes_one_call(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    model = {"": {"1": 0.9, "85": 0.1}, "1": {"0": 1.0}, "8": {"5": 1.0}}
    up.answer = answer_like(model, continues=False)
    engine = await make_engine(capabilities=("label_logprobs",))
    reading = await engine.read_labels(LabelQuery(QUESTION, PREFIX, ONE_TO_HUNDRED))
    assert probabilities_of(reading) == pytest.approx({"1": 0.9, "85": 0.1})
    assert up.calls == reading.calls == 1


@pytest.mark.parametrize(("probed", "calls"), [(True, 1), (False, 2)])
async def test_a_model_may_know_only_the_newer_limit(
    up: FakeUpstream, make_engine: MakeEngine, probed: bool, calls: int
) -> None:
    up.behave = lambda _, body: "newer_limit" if "max_tokens" in body else "ok"
    up.answer = answer_like({"": {"3": 0.5, "4": 0.25}}, continues=False)
    engine = await make_engine(probe=probed, capabilities=("label_logprobs",))
    up.clear_log()
    reading = await engine.read_labels(LabelQuery(QUESTION, PREFIX, ("3", "4")))
    assert reading.logprobs["3"] == pytest.approx(math.log(0.5))
    assert (reading.calls, up.calls) == (calls, calls)
    assert up.bodies[-1]["max_completion_tokens"] >= 1


async def test_a_reading_fails_with_a_reason(up: FakeUpstream, make_engine: MakeEngine) -> None:
    engine = await make_engine(capabilities=("label_logprobs",))
    with pytest.raises(UpstreamFailed, match="no top logprobs"):
        await engine.read_labels(LabelQuery(QUESTION, "", ("1",)))
    up.behave = lambda _, __: "error_500"
    with pytest.raises(UpstreamFailed, match="on fire"):
        await engine.read_labels(LabelQuery(QUESTION, "", ("1",)))


@pytest.mark.parametrize("continues", [True, False])
@pytest.mark.parametrize("space", [" ", "\n", "\xa0", "▁", "Ġ"])
async def test_labels_that_differ_by_space_are_one_label(
    up: FakeUpstream, make_engine: MakeEngine, space: str, continues: bool
) -> None:
    model = {"": {"A": 0.2, f"{space}A": 0.3, f"A{space}": 0.1, "B": 0.25, "a": 0.1, space: 0.05}}
    up.answer = answer_like(model, continues=continues)
    features = ("label_logprobs", "continue") if continues else ("label_logprobs",)
    engine = await make_engine(capabilities=features)
    reading = await engine.read_labels(LabelQuery(QUESTION, PREFIX, ("A", "B", "C")))
    assert probabilities_of(reading) == pytest.approx({"A": 0.6, "B": 0.25})
    assert reading.calls == 1


async def test_a_space_inside_a_label_is_none_of_its_characters(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    model = {"": {" 1": 0.5, "1 ": 0.25}, "1": {"0": 0.25, " 0": 0.25, "0 ": 0.25}}
    up.answer = answer_like(model, continues=True)
    engine = await make_engine(capabilities=("label_logprobs", "continue"))
    reading = await engine.read_labels(LabelQuery(QUESTION, PREFIX, ONE_TO_TEN))
    assert probabilities_of(reading) == pytest.approx({"1": 0.5, "10": 0.25})
