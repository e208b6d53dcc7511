"""The scripted engine does what its script says."""

from __future__ import annotations

import asyncio
import math

import pytest

from infer_align.decoding.labels import LabelQuery
from infer_align.decoding.sequences import SequenceQuery
from infer_align.engines.fake import Fake, Reply, ScriptedLabels, ScriptedWords
from infer_align.errors import EngineFailed, InvalidRequest, Unavailable
from infer_align.types import Candidate, Capability

pytestmark = pytest.mark.anyio


async def becomes(engine, running: int) -> bool:
    async with asyncio.timeout(20):
        while engine.running != running:
            await asyncio.sleep(0)
    return True


async def started(*replies: Reply, **script):
    engine = Fake(replies=replies or (Reply(),), **script).load()
    await engine.start()
    return engine


async def test_candidates_speak_the_script_in_turn(draw, finish):
    engine = await started(Reply("one {seed}"), Reply("two of {prompt}"))
    candidates, deltas = await finish(engine, draw("tea", n=3, seed=40))
    assert [c.text for c in candidates] == ["one 40", "two of tea", "one 42"]
    assert [c.completion_tokens for c in candidates] == [2, 3, 2]
    assert "".join(d.choice["delta"]["content"] for d in deltas if d.index == 1) == "two of tea"
    assert (engine.running, engine.sampled) == (0, 3)
    assert engine.bodies[-1]["messages"][0]["content"] == "tea"


async def test_text_completions_and_parts(draw, finish):
    engine = await started(Reply("re: {prompt}"))
    (candidate,), deltas = await finish(engine, draw("tea", kind="completion"))
    assert candidate.choice == {"text": "re: tea", "logprobs": None, "finish_reason": "stop"}
    assert [d.choice for d in deltas] == [{"text": "re:"}, {"text": " tea"}]


async def test_max_tokens_and_stop(draw, finish):
    engine = await started(Reply("a b c d e"))
    (candidate,), _ = await finish(engine, draw(max_tokens=2))
    assert (candidate.text, candidate.finish_reason, candidate.interrupted) == (
        "a b",
        "length",
        False,
    )
    (candidate,), _ = await finish(engine, draw(stop=["d", "b"]))
    assert (candidate.text, candidate.finish_reason) == ("a ", "stop")


async def test_faults_are_candidates_with_an_error(draw, finish):
    engine = await started(Reply("fine"), Reply("half", error="no luck", status=503))
    fine, failed = (await finish(engine, draw(n=2)))[0]
    assert (fine.error, fine.text) == (None, "fine")
    assert (failed.error, failed.status, failed.choice) == ("no luck", 503, {})


async def test_tool_calls(draw, finish):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    engine = await started(Reply("", tool_calls=(call,)))
    (candidate,), _ = await finish(engine, draw(tools=[{"type": "function"}]))
    assert candidate.finish_reason == "tool_calls"
    assert candidate.choice["message"]["tool_calls"] == [call]
    assert candidate.choice["message"]["content"] is None


async def test_stop_and_delays(draw):
    engine = await started(Reply("a b c", first_token_seconds=100))
    async with engine.sample(draw(n=2)) as stream:
        asyncio.get_running_loop().call_soon(stream.stop, 0)
        first = await anext(stream)
        assert isinstance(first, Candidate)
        assert (first.index, first.text, first.interrupted, first.finish_reason) == (
            0,
            "",
            True,
            "length",
        )
        assert await becomes(engine, 1)
    assert await becomes(engine, 0)


async def test_loading_takes_as_long_as_the_script_says():
    engine = Fake(load_seconds=0.01).load()
    assert engine.health()
    await engine.start()
    assert engine.health() is None


async def test_closing_ends_what_is_spoken(draw, finish):
    engine = await started(Reply("a", first_token_seconds=100))
    task = asyncio.create_task(finish(engine, draw(n=2)))
    assert await becomes(engine, 2)
    await engine.close()
    with pytest.raises(Unavailable):
        await task
    assert await becomes(engine, 0)


def question(text: str, labels: tuple[str, ...]) -> LabelQuery:
    return LabelQuery([{"role": "user", "content": text}], "Score: [", labels)


async def test_label_probabilities_follow_the_script():
    script = (
        ScriptedLabels({"5": 0.5, "4": 0.25}, "good"),
        ScriptedLabels({"A": 1.0}),
        ScriptedLabels({}, "broken", error="no judge today"),
    )
    engine = Fake(labels=script).load()
    await engine.start()
    reading = await engine.read_labels(question("a good one", ("1", "4", "5")))
    assert {label: round(math.exp(p), 9) for label, p in reading.logprobs.items()} == {
        "1": 0.0,
        "4": 0.25,
        "5": 0.5,
    }
    assert (await engine.read_labels(question("x", ("A", "B")))).logprobs == {
        "A": 0.0,
        "B": -math.inf,
    }
    even = await engine.read_labels(question("bad", ("1", "2")))
    assert all(math.isclose(p, math.log(0.5)) for p in even.logprobs.values())
    assert len(engine.queries) == 3
    with pytest.raises(EngineFailed, match="no judge"):
        await engine.read_labels(question("broken", ("1", "2")))


def words_query(text: str, *texts: str, values: tuple[str, ...] = ()) -> SequenceQuery:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]
    return SequenceQuery({"messages": messages}, texts, values=values)


async def test_log_probabilities_of_words_follow_the_script():
    script = (
        ScriptedWords({"please": -0.5, "no": -4.0}, "kind.*polite"),
        ScriptedWords(pattern="broken", error="no words today"),
        ScriptedWords({"no": -0.25}, other=-2.0),
    )
    engine = Fake(words=script).load()
    await engine.start()
    assert Capability.SEQUENCE_LOGPROBS in engine.capabilities
    answer = await engine.sequence_logprobs(words_query("polite", "yes please", "", "no"))
    assert [each.tolist() for each in answer.logprobs] == [[-1.0, -0.5], [], [-4.0]]
    assert answer.sums == (-1.5, 0.0, -4.0)
    assert (answer.prompt_tokens, answer.text_tokens) == (3, 3)
    rude = await engine.sequence_logprobs(words_query("rude", "no please"))
    assert rude.sums == (-2.25,)
    assert len(engine.sequence_queries) == 2
    with pytest.raises(EngineFailed, match="no words"):
        await engine.sequence_logprobs(words_query("broken", "a"))
    completion = SequenceQuery({"prompt": "one two"}, ("three",), kind="completion")
    plain = await (await started()).sequence_logprobs(completion)
    assert (plain.sums, plain.prompt_tokens) == ((-1.0,), 2)


async def test_estimates_of_texts_are_those_of_the_replies():
    engine = await started(
        Reply("about {prompt}: good", estimates={"helpful": 2.0}), Reply("bad"), context_length=8
    )
    answer = await engine.sequence_logprobs(
        words_query("tea", "about tea:", "bad", "new", values=("helpful",))
    )
    assert answer.estimates["helpful"][0] == 2.0
    assert [math.isnan(value) for value in answer.estimates["helpful"]] == [False, True, True]
    with pytest.raises(InvalidRequest, match=r"values\.helpfull: no such value.*'helpful'"):
        await engine.sequence_logprobs(words_query("tea", "a", values=("helpfull",)))
    with pytest.raises(InvalidRequest, match=r"text 1: 3 tokens of prompt and 6 .* context of 8"):
        await engine.sequence_logprobs(words_query("tea", "a", "1 2 3 4 5 6"))
