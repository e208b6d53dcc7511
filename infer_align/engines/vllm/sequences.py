"""Log-probabilities of given texts, read by vLLM as the end of prompts.

One request reads one text after the prompt. vLLM reports the log-probabilities of the tokens of a
prompt, and of chosen next tokens; the last token of a text is such a next token. A prompt that
fills a block of the prefix cache is read once beforehand.

vLLM computes nothing about tokens that its prefix cache holds. If the cache holds some tokens of a
text, because the text was read before, the request is repeated without the cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from infer_align.decoding.continuation import TURN, text_tokens
from infer_align.decoding.params import check_token_ids
from infer_align.decoding.sequences import (
    SequenceLogprobs,
    SequenceQuery,
    check_fit,
    check_token_prompt,
)
from infer_align.errors import InvalidRequest, Unsupported
from infer_align.types import Array

if TYPE_CHECKING:
    from infer_align.vllm.openai import Frontend

# Fields of a chat's body that shape its prompt.
PROMPT_FIELDS = (
    "messages",
    "tools",
    "tool_choice",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "add_generation_prompt",
    "documents",
    "reasoning_effort",
)


async def sequence_logprobs(
    frontend: Frontend, query: SequenceQuery, context_length: int
) -> SequenceLogprobs:
    """Return the log-probability of each text of a query.

    Raises:
        Unsupported: the query asks for values, or names an adapter.
        InvalidRequest: the prompt cannot be rendered, or a text does not fit the context.
        AlignError: vLLM failed.
    """
    _refuse_unsupported(frontend, query)
    prompt, space = await _prompt(frontend, query)
    is_continued = query.kind == "completion" or query.role == "user"
    is_continued = is_continued or bool(query.body.get("continue_final_message"))
    texts: list[list[int]] = []
    for index, text in enumerate(query.texts):
        written = space + text if text else text
        tokens = text_tokens(frontend.tokenizer, written, prompt, is_continued=is_continued)
        check_fit(index, len(prompt), len(tokens), context_length)
        texts.append(tokens)
    if len(prompt) >= frontend.cached_block and any(texts):
        await frontend.label_logprobs(prompt, prompt[-1:])
    logprobs = await _gather(frontend, prompt, texts)
    return SequenceLogprobs(logprobs, len(prompt), sum(len(text) for text in texts))


def _refuse_unsupported(frontend: Frontend, query: SequenceQuery) -> None:
    if query.values:
        raise Unsupported(
            f"values: {', '.join(query.values)} cannot be read after given texts on the engine "
            "vllm, whose workers estimate only while they sample; use an engine of kind "
            "transformers.",
            param="values",
        )
    if query.body.get("model") in frontend.lora_names:
        raise Unsupported(
            f"model: {query.body['model']!r} is an adapter, and log-probabilities of given texts "
            f"are those of {frontend.model!r}; leave the model out.",
            param="model",
        )


async def _gather(
    frontend: Frontend, prompt: list[int], texts: list[list[int]]
) -> tuple[Array, ...]:
    """Read all texts at once. If one fails, the others are cancelled."""
    calls = [asyncio.ensure_future(_read(frontend, prompt, text)) for text in texts]
    try:
        return tuple(await asyncio.gather(*calls))
    finally:
        for call in calls:
            call.cancel()


async def _read(frontend: Frontend, prompt: list[int], text: list[int]) -> Array:
    if not text:
        return np.zeros(0)
    logprobs, cached = await frontend.text_logprobs(prompt, text, uses_cache=True)
    is_complete = len(logprobs) == len(text) and (cached < len(prompt) or len(text) == 1)
    if not is_complete:
        logprobs, _ = await frontend.text_logprobs(prompt, text, uses_cache=False)
    return np.array(logprobs, dtype=np.float64)


async def _prompt(frontend: Frontend, query: SequenceQuery) -> tuple[list[int], str]:
    """Return the tokens of the prompt, and the space that stands before each text."""
    body = query.body
    if query.kind == "completion":
        if isinstance(body["prompt"], str):
            return await frontend.completion_ids(body["prompt"]), ""
        ids = check_token_prompt(body["prompt"])
        check_token_ids("prompt", ids, len(frontend.vocabulary))
        return ids, ""
    fields: dict[str, Any] = {name: body[name] for name in PROMPT_FIELDS if name in body}
    if query.role == "user":
        return await _user_prompt(frontend, fields)
    return await frontend.chat_ids(fields), ""


async def _user_prompt(frontend: Frontend, fields: Mapping[str, Any]) -> tuple[list[int], str]:
    """Return the tokens up to the beginning of the user's next turn.

    Raises:
        InvalidRequest: the chat template refuses the messages, or does not show the turn.
    """
    turn = {"role": "user", "content": TURN}
    ending = {"continue_final_message": False, "add_generation_prompt": False}
    ids = await frontend.chat_ids({**fields, **ending, "messages": [*fields["messages"], turn]})
    tokenizer = frontend.tokenizer.backend_tokenizer
    before, mark, _ = tokenizer.decode(ids, skip_special_tokens=False).partition(TURN)
    if not mark:
        raise InvalidRequest(
            "messages: the model's chat template does not write what the user says next.",
            param="messages",
        )
    while len(tokenizer.decode(ids, skip_special_tokens=False)) > len(before):
        ids = ids[:-1]
    return ids, before[len(tokenizer.decode(ids, skip_special_tokens=False)) :]
