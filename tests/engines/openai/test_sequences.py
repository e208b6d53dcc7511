"""Log-probabilities of given texts in front of an upstream that lists those of prompts."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from infer_align.decoding.sequences import SequenceQuery
from infer_align.engines.openai import OpenAIEngine
from infer_align.engines.openai.prompt_tokens import PromptToken, text_logprobs
from infer_align.errors import Unsupported
from infer_align.types import Capability
from tests.engines.openai.upstream import FakeUpstream

pytestmark = pytest.mark.anyio
MakeEngine = Callable[..., Awaitable[OpenAIEngine]]
QUESTION = [{"role": "user", "content": "what now"}]


def split(text: str) -> list[str]:
    """Return tokens as many tokenizers make them: words with the space before them."""
    return re.findall(r"<\w+>| ?[^\s<]+|\s", text)


def lists_prompts(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Answer as an upstream that lists the logprobs of prompts: minus the length of each token."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
    if path.endswith("/chat/completions"):
        turns = "".join(f"<{turn['role']}>{turn['content']}" for turn in body["messages"])
        tokens = split(turns)
        choice["message"] = {"role": "assistant", "content": "x"}
        listed: list[Any] = [None]
        for i, token in enumerate(tokens[1:]):
            listed.append({str(i): {"logprob": -float(len(token)), "decoded_token": token}})
        extra = {"prompt_logprobs": listed} if "prompt_logprobs" in body else {}
    else:
        tokens = split(body["prompt"])
        choice["text"] = body["prompt"] + " x"
        logprobs = [None, *(-float(len(token)) for token in tokens[1:]), -9.0]
        choice["logprobs"] = {"tokens": [*tokens, " x"], "token_logprobs": logprobs}
        extra = {}
    return {"choices": [choice], "usage": {"prompt_tokens": len(tokens)}, **extra}


async def test_a_turn_is_continued_and_its_prompt_listed(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    up.answer = lists_prompts
    engine = await make_engine(probe="lazy")
    asked = SequenceQuery({"messages": QUESTION, "temperature": 0}, ("hello you all", "", "no"))
    answer = await engine.sequence_logprobs(asked)
    assert [each.tolist() for each in answer.logprobs] == [[-5.0, -4.0, -4.0], [], [-2.0]]
    assert (answer.prompt_tokens, answer.text_tokens) == (4, 4)
    assert Capability.SEQUENCE_LOGPROBS in engine.capabilities
    probes = up.calls - 2
    assert up.bodies[-1]["continue_final_message"] is True
    assert up.bodies[-1]["temperature"] == 1.0
    # What was found out is remembered.
    await engine.sequence_logprobs(SequenceQuery({"messages": QUESTION}, ("no",)))
    assert (probes, up.calls) == (1, 4)
    next_turn = SequenceQuery({"messages": QUESTION}, ("thanks",), role="user")
    assert (await engine.sequence_logprobs(next_turn)).sums == (-6.0,)
    assert up.bodies[-1]["messages"][-1] == {"role": "user", "content": "thanks"}


async def test_a_text_completion_echoes_its_prompt(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    up.answer = lists_prompts
    engine = await make_engine(probe="lazy")
    asked = SequenceQuery({"prompt": "one two"}, (" three", " four five"), kind="completion")
    answer = await engine.sequence_logprobs(asked)
    assert [each.tolist() for each in answer.logprobs] == [[-6.0], [-5.0, -5.0]]
    assert (answer.prompt_tokens, answer.text_tokens) == (2, 3)
    assert set(up.paths) == {"/v1/completions"}


async def test_an_upstream_that_lists_nothing_is_refused_by_name(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    engine = await make_engine(probe="lazy")
    for kind, body in (("chat", {"messages": QUESTION}), ("completion", {"prompt": "a"})):
        asked: Any = SequenceQuery(body, ("b",), kind=kind)
        with pytest.raises(Unsupported, match="the engine of 'up' does not report"):
            await engine.sequence_logprobs(asked)
    assert Capability.SEQUENCE_LOGPROBS not in engine.capabilities
    assert engine.missing(frozenset({Capability.SEQUENCE_LOGPROBS}))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (SequenceQuery({"messages": QUESTION}, ("a", "b <end>")), "text 1: .* control token"),
        (SequenceQuery({"prompt": "one tw"}, ("o",), kind="completion"), "text 0: .* of its own"),
        (SequenceQuery({"prompt": [1, 2]}, ("o",), kind="completion"), "prompt: token ids"),
        (SequenceQuery({"messages": QUESTION}, ("a",), values=("good",)), "values: good"),
        (
            SequenceQuery({"messages": QUESTION, "continue_final_message": True}, ("a",)),
            "continue_final_message",
        ),
    ],
    ids=["control", "border", "ids", "values", "continued"],
)
async def test_what_an_upstream_cannot_read_is_refused_by_name(
    up: FakeUpstream, make_engine: MakeEngine, asked: SequenceQuery, message: str
) -> None:
    up.answer = lists_prompts
    engine = await make_engine(probe=False, capabilities=("echo", "sequence_logprobs"))
    with pytest.raises(Unsupported, match=message):
        await engine.sequence_logprobs(asked)


def test_a_text_is_found_at_the_end_of_a_prompt() -> None:
    tokens = [PromptToken(b"a", None), PromptToken(b" b", -1.0), PromptToken(b"\xe2\x82", -2.0)]
    tokens.append(PromptToken(b"\xac", -3.0))
    assert text_logprobs(tokens, "\u20ac") == [-2.0, -3.0]
    assert text_logprobs(tokens, " b\u20ac") == [-1.0, -2.0, -3.0]
    # Without the space that some upstreams leave out.
    assert text_logprobs(tokens, "b\u20ac") == [-1.0, -2.0, -3.0]
    # The first token follows nothing.
    assert text_logprobs(tokens, "a b\u20ac") is None
    assert text_logprobs(tokens, "x") is None
