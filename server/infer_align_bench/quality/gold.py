"""The gold scorer of a quality measurement: a reward or judge of a server, or a function."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from infer_align.errors import AlignError, ConfigError, quote
from infer_align_bench.answer import describe_error
from infer_align_bench.endpoint import Endpoint, error_of

Messages = Sequence[Mapping[str, Any]]
Gold = Callable[[Messages, str], Awaitable[float]]


def load_scorer(text: str, endpoint: Endpoint) -> Gold:
    """Return the scorer that `text` names.

    A name is a reward that the server has configured. An object is a body of `/v1/align/score`,
    such as {"trust_judge": {}} or {"rewards": {"a": 1, "b": 0.5}}. `module:function` is a function
    (messages, text) -> float, which runs in this process.

    Args:
        text: name, object or function.
        endpoint: of the server that scores.

    Raises:
        ConfigError: the object is not JSON, or the function cannot be imported.
    """
    if text.startswith("{"):
        try:
            settings = {"rewards": {}, **json.loads(text)}
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"--gold: {quote(text)} is not a JSON object: {error}; "
                'must be like {"rewards": {"helpful": 1}}.'
            ) from None
        return _server_scorer(endpoint, settings)
    if ":" in text:
        return _function_scorer(text)
    settings = {"rewards": {text: 1.0}, "ensemble": {"objective": "mean"}}
    return _server_scorer(endpoint, settings)


def uses_server(text: str) -> bool:
    """Return True if a server computes the scores, False for a function of this process."""
    return text.startswith("{") or ":" not in text


def _server_scorer(endpoint: Endpoint, settings: Mapping[str, Any]) -> Gold:
    url = f"{endpoint.target.place}/align/score"

    async def score(messages: Messages, text: str) -> float:
        body = {"messages": list(messages), "candidates": [text], **settings}
        status, answer = await endpoint.call("align/score", body)
        if status != 200 or not isinstance(answer, Mapping):
            error = ": ".join(describe_error(error_of(answer), f"status {status}"))
            raise AlignError(endpoint.redact(f"--gold: {url}: {error}"))
        try:
            value = answer["candidates"][0]["objective"]
        except (KeyError, IndexError, TypeError):
            raise AlignError(
                f"--gold: {url}: the answer has no objective; "
                "must be the URL of an infer-align server."
            ) from None
        return math.nan if value is None else float(value)

    return score


def _function_scorer(text: str) -> Gold:
    module, _, name = text.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    # The import runs the user's code, which may raise anything.
    except Exception as error:
        raise ConfigError(
            f"--gold: {text!r} cannot be imported: {error}; must be 'module:function'."
        ) from None
    if not callable(function):
        raise ConfigError(f"--gold: {text!r} is not a function; must be (messages, text) -> float.")

    async def score(messages: Messages, answer: str) -> float:
        try:
            result: Any = await asyncio.to_thread(function, messages, answer)
            return float(result)
        # The user's code may raise anything.
        except Exception as error:
            raise AlignError(f"--gold: {text} raised {type(error).__name__}: {error}") from None

    return score
