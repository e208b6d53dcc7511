"""Readers of an upstream's response: JSON, server-sent events, plain bytes, and error bodies."""

from __future__ import annotations

import asyncio
import json
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from infer_align.upstream import UpstreamFailed
from infer_align.upstream.sse import EventParser, is_done

# After the last event, the upstream has this long to end its response. If it does, the connection
# can be used again.
DRAIN_SECONDS = 0.2
MAX_RETRY_AFTER = 86_400.0
_decode = json.JSONDecoder().decode


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """The error that a response's body describes."""

    message: str = ""
    param: str | None = None
    code: str | None = None


async def read_json(response: aiohttp.ClientResponse) -> Any:
    """Return the JSON of a whole response.

    Raises:
        UpstreamFailed: the response breaks off, or is not JSON.
    """
    return _parse_json(await read_content(response))


async def read_content(response: aiohttp.ClientResponse) -> bytes:
    """Return the bytes of a whole response.

    Raises:
        UpstreamFailed: the response breaks off.
    """
    with _as_upstream_failures():
        return await response.read()


async def read_events(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    """Yield the JSON of each server-sent event, and None for the final "[DONE]".

    Raises:
        UpstreamFailed: the response breaks off, or an event is not JSON.
    """
    parser = EventParser()
    with _as_upstream_failures():
        async for received in response.content.iter_any():
            events, done = _before_done(parser.feed(received))
            for data in events:
                yield _parse_json(data)
            if done:
                await _drain(response)
                yield None
                return
        for data in parser.end():
            yield None if is_done(data) else _parse_json(data)


def _before_done(events: list[bytes]) -> tuple[list[bytes], bool]:
    """Return the events before "[DONE]", and True if there is a "[DONE]"."""
    for index, data in enumerate(events):
        if is_done(data):
            return events[:index], True
    return events, False


async def read_bytes(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the bytes of a response as they arrive.

    Raises:
        UpstreamFailed: the response breaks off.
    """
    with _as_upstream_failures():
        async for received in response.content.iter_any():
            yield received


def end_response(response: aiohttp.ClientResponse) -> None:
    """Give the connection back if the whole body is read, and close it otherwise."""
    if response.content.at_eof():
        response.release()
    else:
        response.close()


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Read the end of the response, so that the connection can be used again."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            await response.content.readany()


def _parse_json(content: bytes) -> Any:
    """Parse JSON from an upstream, with or without a byte order mark before it.

    Raises:
        UpstreamFailed: the content is not JSON.
    """
    try:
        return _decode(content.removeprefix(BOM_UTF8).decode())
    except (ValueError, RecursionError):
        start = content[:60].decode(errors="replace")
        raise UpstreamFailed(
            f"the upstream's answer is not JSON: it begins with {start!r}."
        ) from None


@contextmanager
def _as_upstream_failures() -> Iterator[None]:
    """Raise UpstreamFailed if a response ends before it is complete."""
    try:
        yield
    except TimeoutError:
        raise UpstreamFailed(
            "the upstream did not finish its answer in time.", status=504
        ) from None
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamFailed(f"the upstream's answer broke off: {type(error).__name__}.") from None
    except ValueError as error:
        # The SSE parser found an event without an end.
        raise UpstreamFailed(f"the upstream's answer cannot be read: {error}.") from None


def parse_error(text: str) -> ErrorBody:
    """Parse the body of an error response, in the format of OpenAI or another."""
    try:
        body = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        # Probably an HTML page: the status says enough.
        return ErrorBody()
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return ErrorBody(str(error))
    message = error.get("message") or error.get("detail") or error.get("title") or ""
    return ErrorBody(_words(message), _string(error.get("param")), _string(error.get("code")))


def _words(message: object) -> str:
    """Return the message of an error as text.

    FastAPI answers with a list of problems, each with the place of its field.
    """
    if isinstance(message, str):
        return message
    problems = message if isinstance(message, list) else [message]
    sentences: list[str] = []
    for problem in problems:
        if not isinstance(problem, dict) or not isinstance(problem.get("msg"), str):
            sentences.append(problem if isinstance(problem, str) else json.dumps(problem))
            continue
        place = problem.get("loc")
        names = [str(name) for name in place if name != "body"] if isinstance(place, list) else []
        sentences.append(f"{'.'.join(names)}: {problem['msg']}" if names else problem["msg"])
    return "; ".join(sentences)


def _string(value: object) -> str | None:
    return value if isinstance(value, str) else None


def parse_retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which is a number or a date, or None."""
    if header is None:
        return None
    seconds: float
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except (ValueError, TypeError):
            return None
        date = date.replace(tzinfo=date.tzinfo or UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return min(max(0.0, seconds), MAX_RETRY_AFTER)
