"""How likely labels are to come next: one generated token after each path that spells one."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

from infer_align.decoding.labels import LabelTree, Path
from infer_align.types import LabelLogprobs, LabelQuery

if TYPE_CHECKING:
    from infer_align.vllm.openai import Frontend

# vLLM reports at most so many chosen tokens at once.
TOKENS_AT_ONCE = 128


async def read_labels(engine: Any, frontend: Frontend, query: LabelQuery) -> LabelLogprobs:
    """All paths at once; they share the prompt's cached prefix.

    Raises:
        AlignError: vLLM refuses the messages, or failed.
    """
    from infer_align.vllm.compat import label_logprobs  # noqa: PLC0415 - vLLM is running by now

    tree = LabelTree(frontend.vocabulary, query.labels)
    prompt = await frontend.turn(query.messages, query.prefix)
    asked = _asked(tree)
    answers = await asyncio.gather(
        *(
            label_logprobs(engine, [*prompt, *path], tokens, f"label-{uuid.uuid4().hex}")
            for path, tokens in asked
        )
    )
    read: dict[Path, dict[int, float]] = {}
    for (path, _), logprobs in zip(asked, answers, strict=True):
        read.setdefault(path, {}).update(logprobs)
    return LabelLogprobs(tree.logprobs(read), len(prompt), len(asked))


def readings(frontend: Frontend, labels: tuple[str, ...]) -> list[tuple[Path, tuple[int, ...]]]:
    """What one reading of these labels asks: after a path, which tokens.

    Raises:
        Unsupported: a label cannot be spelt.
    """
    return _asked(LabelTree(frontend.vocabulary, labels))


def _asked(tree: LabelTree) -> list[tuple[Path, tuple[int, ...]]]:
    return [
        (path, tokens[start : start + TOKENS_AT_ONCE])
        for path, tokens in tree.readings.items()
        for start in range(0, len(tokens), TOKENS_AT_ONCE)
    ]
