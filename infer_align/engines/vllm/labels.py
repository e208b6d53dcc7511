"""Read label probabilities: one generated token after each path of tokens that spells a label."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from infer_align.decoding.labels import LabelLogprobs, LabelQuery, LabelTree, Path

if TYPE_CHECKING:
    from infer_align.vllm.openai import Frontend

# vLLM returns the logprobs of at most this many chosen tokens per request.
MAX_TOKENS = 128


class LabelRequest(NamedTuple):
    """One request to vLLM: the logprobs of `tokens` as the next token after `path`."""

    path: Path
    tokens: tuple[int, ...]


async def read_labels(frontend: Frontend, query: LabelQuery) -> LabelLogprobs:
    """Send all requests of one query at once; they share the cached prefix of the prompt.

    Raises:
        AlignError: vLLM refuses the messages, or failed.
    """
    tree = LabelTree(frontend.vocabulary, query.labels)
    prompt = await frontend.prompt_ids(query.messages, query.prefix)
    requests = _requests(tree)
    calls = []
    for request in requests:
        token_ids = [*prompt, *request.path]
        calls.append(frontend.label_logprobs(token_ids, request.tokens))
    results = await asyncio.gather(*calls)
    measured: dict[Path, dict[int, float]] = {}
    for request, logprobs in zip(requests, results, strict=True):
        measured.setdefault(request.path, {}).update(logprobs)
    return LabelLogprobs(tree.logprobs(measured), len(prompt), len(requests))


def count_requests(frontend: Frontend, labels: tuple[str, ...]) -> int:
    """Return the number of requests that one query with these labels sends.

    Raises:
        Unsupported: the tokenizer cannot spell a label.
    """
    return len(_requests(LabelTree(frontend.vocabulary, labels)))


def _requests(tree: LabelTree) -> list[LabelRequest]:
    requests = []
    for path, tokens in tree.readings.items():
        for start in range(0, len(tokens), MAX_TOKENS):
            part = tokens[start : start + MAX_TOKENS]
            requests.append(LabelRequest(path, part))
    return requests
