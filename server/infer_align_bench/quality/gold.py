"""Who says how good an answer is: a reward or a judge of a running server, or a function of one's own."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from infer_align.errors import AlignError, ConfigError
from infer_align_bench.endpoint import Endpoint
from infer_align_bench.events import described

Messages = Sequence[Mapping[str, Any]]
Gold = Callable[[Messages, str], Awaitable[float]]


def scorer(text: str, endpoint: Endpoint) -> Gold:
    """`text` as a scorer, of `endpoint` where it is one of a server.

    A name is a reward that the server has configured; an object is what `/v1/align/score` takes (`{"trust_judge": {}}`,
    `{"rewards": {"a": 1, "b": 0.5}}`); `module:function` is a function (messages, text) -> float, run here.

    Raises:
        ConfigError: none of these.
    """
    if text.startswith("{"):
        try:
            return _served(endpoint, {"rewards": {}, **json.loads(text)})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--gold: {text!r} is not a JSON object: {error}.") from None
    if ":" in text:
        return _called(text)
    return _served(endpoint, {"rewards": {text: 1.0}, "ensemble": {"objective": "mean"}})


def served(text: str) -> bool:
    """Whether a server scores, so that it matters which."""
    return text.startswith("{") or ":" not in text


def _served(endpoint: Endpoint, settings: Mapping[str, Any]) -> Gold:
    async def score(messages: Messages, text: str) -> float:
        body = {"messages": list(messages), "candidates": [text], **settings}
        status, answer = await endpoint.call("align/score", body)
        if status != 200 or not isinstance(answer, Mapping):
            said = described(
                answer.get("error") if isinstance(answer, Mapping) else answer, f"status {status}"
            )
            raise AlignError(
                endpoint.safe(f"--gold: {endpoint.target.place}/align/score: {': '.join(said)}")
            )
        try:
            value = answer["candidates"][0]["objective"]
        except (KeyError, IndexError, TypeError):
            raise AlignError(
                f"--gold: {endpoint.target.place}/align/score: its answer holds no objective."
            ) from None
        return math.nan if value is None else float(value)

    return score


def _called(text: str) -> Gold:
    module, _, name = text.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the user's code
        raise ConfigError(
            f"--gold: {text!r} cannot be imported: {error}; write it as 'module:function'."
        ) from None
    if not callable(function):
        raise ConfigError(f"--gold: {text!r} is not a function (messages, text) -> float.")

    async def score(messages: Messages, answer: str) -> float:
        try:
            return float(await asyncio.to_thread(function, messages, answer))
        except Exception as error:  # the user's code
            raise AlignError(f"--gold: {text} raised {type(error).__name__}: {error}") from None

    return score
