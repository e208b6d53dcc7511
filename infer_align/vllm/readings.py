"""Logprobs of chosen tokens: as the next token of a prompt, or as a text after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from infer_align.vllm.compat import convert_error


async def label_logprobs(
    engine: AsyncLLM, prompt: Sequence[int], tokens: Sequence[int], request_id: str
) -> dict[int, float]:
    """Return the logprob, in nats, of each of `tokens` as the next token of a prompt of token ids.

    The request generates one token. No logits processor changes the logprobs.

    Raises:
        AlignError: vLLM refuses the prompt, or failed.
    """
    params = SamplingParams(
        max_tokens=1,
        temperature=1.0,
        logprob_token_ids=[*tokens],
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    logprobs: dict[int, float] = {}
    try:
        async for output in engine.generate({"prompt_token_ids": [*prompt]}, params, request_id):
            first_token = output.outputs[0].logprobs[0]
            logprobs = {token: entry.logprob for token, entry in first_token.items()}
    except Exception as error:
        raise convert_error(error) from error
    return {token: logprobs[token] for token in tokens}


async def text_logprobs(
    engine: AsyncLLM,
    prompt: Sequence[int],
    text: Sequence[int],
    request_id: str,
    *,
    uses_cache: bool,
) -> tuple[list[float], int]:
    """Return the logprob, in nats, of each token of a text after a prompt of token ids.

    The request reads all but the last token of the text, and generates one token. No logits
    processor changes the logprobs.

    Args:
        engine: the engine.
        prompt: the prompt.
        text: at least one token.
        request_id: the name of the request.
        uses_cache: True to read the prefix cache. vLLM by itself would not: it computes no logprobs
            of cached tokens, so those of a text that is cached are missing from the result.

    Returns:
        The logprobs, and the number of tokens that were cached. The logprobs are complete if not
        all tokens of the prompt were cached, or if the text is one token.

    Raises:
        AlignError: vLLM refuses the prompt, or failed.
    """
    params = SamplingParams(
        max_tokens=1,
        temperature=1.0,
        prompt_logprobs=0 if len(text) > 1 else None,
        logprob_token_ids=[text[-1]],
        skip_reading_prefix_cache=not uses_cache,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    token_ids = [*prompt, *text[:-1]]
    logprobs: list[float] = []
    cached = 0
    try:
        async for output in engine.generate({"prompt_token_ids": token_ids}, params, request_id):
            cached = output.num_cached_tokens or 0
            read = _prompt_entries(output.prompt_logprobs, text[:-1])
            last = output.outputs[0].logprobs[0][text[-1]]
            logprobs = [*read, last.logprob]
    except Exception as error:
        raise convert_error(error) from error
    return logprobs, cached


def _prompt_entries(entries: Sequence[Any] | None, tokens: Sequence[int]) -> list[float]:
    """Return the logprobs of the last tokens of a prompt, without those that were not computed."""
    logprobs: list[float] = []
    for token, entry in zip(reversed(tokens), reversed(entries or ()), strict=False):
        if entry and token in entry:
            logprobs.append(entry[token].logprob)
    return logprobs[::-1]
