"""Log-probabilities of given texts, read by an upstream as the end of prompts.

A text of a chat is a turn that the upstream continues, and it lists the logprobs of the rendered
prompt. A text completion echoes its prompt with logprobs. Either way the upstream splits prompt and
text into tokens at once. A text is refused if no tokens at the end spell it: if a token spans the
border, if the template changes the text, or if the upstream reads a part of it as a control token.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from infer_align.decoding.sequences import SequenceLogprobs, SequenceQuery
from infer_align.engines.openai.probe import CONTINUE
from infer_align.engines.openai.prompt_tokens import (
    PromptToken,
    echoed_tokens,
    rendered_tokens,
    text_logprobs,
)
from infer_align.errors import Unsupported
from infer_align.types import Array
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import Client

# Fields of a chat's body that shape its prompt.
PROMPT_FIELDS = ("messages", "tools", "chat_template_kwargs")


async def sequence_logprobs(client: Client, model: str, query: SequenceQuery) -> SequenceLogprobs:
    """Return the log-probability of each text. All texts are read at once, each with its prompt.

    Args:
        client: the upstreams.
        model: the upstream's name of the model.
        query: the prompt and the texts.

    Raises:
        Unsupported: the query asks for something that no upstream reports, or a text cannot be
            found at the end of what the upstream read.
        UpstreamFailed: the upstream did not answer, or lists no logprobs of the prompt.
    """
    _refuse_unsupported(query)
    calls: list[asyncio.Future[tuple[Array, int]]] = []
    for index in range(len(query.texts)):
        calls.append(asyncio.ensure_future(_read(client, model, query, index)))
    try:
        results = await asyncio.gather(*calls)
    finally:
        for call in calls:
            call.cancel()
    logprobs = tuple(each for each, _ in results)
    prompt_tokens = max((tokens for _, tokens in results), default=0)
    return SequenceLogprobs(logprobs, prompt_tokens, sum(len(each) for each in logprobs))


def _refuse_unsupported(query: SequenceQuery) -> None:
    if query.values:
        raise Unsupported(
            f"values: {', '.join(query.values)} cannot be read after given texts in front of an "
            "upstream; use an engine of kind transformers.",
            param="values",
        )
    if query.kind == "completion" and not isinstance(query.body["prompt"], str):
        raise Unsupported(
            "prompt: token ids cannot be joined with a text in front of an upstream; send the "
            "prompt as text.",
            param="prompt",
        )
    if query.role == "assistant" and query.body.get("continue_final_message"):
        raise Unsupported(
            "continue_final_message: log-probabilities of a turn that is continued are not "
            "available in front of an upstream; leave it out.",
            param="continue_final_message",
        )


async def _read(client: Client, model: str, query: SequenceQuery, index: int) -> tuple[Array, int]:
    """Return the logprobs of one text, and the number of tokens before it."""
    text = query.texts[index]
    if not text:
        return np.zeros(0), 0
    tokens = await _prompt_tokens(client, model, query, text)
    logprobs = text_logprobs(tokens, text)
    if logprobs is None:
        raise Unsupported(
            f"text {index}: the upstream of {model!r} does not read it as tokens of its own after "
            "the prompt, or reads a part of it as a control token; use an engine of kind "
            "transformers or vllm."
        )
    return np.array(logprobs, dtype=np.float64), len(tokens) - len(logprobs)


async def _prompt_tokens(
    client: Client, model: str, query: SequenceQuery, text: str
) -> list[PromptToken]:
    body: dict[str, Any] = {"model": model, "max_tokens": 1, "temperature": 1.0}
    if query.kind == "completion":
        body |= {"prompt": query.body["prompt"] + text, "echo": True, "logprobs": 0}
        tokens = echoed_tokens(await client.post("/completions", body, model=model))
    else:
        body |= {name: query.body[name] for name in PROMPT_FIELDS if name in query.body}
        turn = {"role": query.role, "content": text}
        body |= {"messages": [*body["messages"], turn], **CONTINUE, "prompt_logprobs": 0}
        tokens = rendered_tokens(await client.post("/chat/completions", body, model=model))
    if not tokens:
        raise UpstreamFailed("the upstream lists no logprobs of the prompt.")
    return tokens
