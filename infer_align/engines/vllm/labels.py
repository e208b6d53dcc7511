"""Read label probabilities: one generated token after each path of tokens that spells a label."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from infer_align.decoding.labels import LabelTree, Path
from infer_align.types import LabelLogprobs, LabelQuery

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
    calls = [
        frontend.label_logprobs([*prompt, *request.path], request.tokens) for request in requests
    ]
    logprobs: dict[Path, dict[int, float]] = {}
    for request, result in zip(requests, await asyncio.gather(*calls), strict=True):
        logprobs.setdefault(request.path, {}).update(result)
    return LabelLogprobs(tree.logprobs(logprobs), len(prompt), len(requests))


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
            requests.append(LabelRequest(path, tokens[start : start + MAX_TOKENS]))
    return requests
