"""What an upstream has answered, from bytes: JSON in one piece, server-sent events, and errors in every shape that there is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from infer_align.upstream import UpstreamFailed
from infer_align.upstream.sse import EventParser, is_done

# After the last event the connection can be used again, if the upstream ends its answer within this time.
DRAIN_SECONDS = 0.2
_decode = json.JSONDecoder().decode


async def whole(response: aiohttp.ClientResponse) -> Any:
    """The JSON of an answer in one piece.

    Raises:
        UpstreamFailed: it breaks off, or is not JSON.
    """
    with _whole_answer():
        content = await response.read()
    return _parse(content)


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    """The JSON of each server-sent event, then None where "[DONE]" was said.

    Raises:
        UpstreamFailed: it breaks off, or an event is not JSON.
    """
    parser = EventParser()
    with _whole_answer():
        async for received in response.content.iter_any():
            for event in parser.feed(received):
                if is_done(event):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(DRAIN_SECONDS):
                            await response.content.readany()
                    yield None
                    return
                yield _parse(event)
        for event in parser.end():
            yield None if is_done(event) else _parse(event)


async def pieces(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """An answer's bytes, as they come.

    Raises:
        UpstreamFailed: it breaks off.
    """
    with _whole_answer():
        async for received in response.content.iter_any():
            yield received


def _parse(content: bytes) -> Any:
    """JSON from an upstream.

    Raises:
        UpstreamFailed: it is none.
    """
    try:
        return _decode(content.decode())
    except (ValueError, RecursionError):
        start = content[:60].decode(errors="replace")
        raise UpstreamFailed(
            f"the upstream's answer is not JSON: it begins with {start!r}."
        ) from None


@contextmanager
def _whole_answer() -> Iterator[None]:
    """What ends the reading of an answer before the answer ends, as what it is."""
    try:
        yield
    except TimeoutError:
        raise UpstreamFailed(
            "the upstream did not finish its answer in time.", status=504
        ) from None
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamFailed(f"the upstream's answer broke off: {type(error).__name__}.") from None
    except ValueError as error:  # an event that does not end
        raise UpstreamFailed(f"the upstream's answer cannot be read: {error}.") from None


def told(text: str) -> tuple[str, str | None, str | None]:
    """(message, param, code) of an error's body, OpenAI's shape or another."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return "", None, None  # a page for people: its status says enough
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error), None, None
    message = error.get("message") or error.get("detail") or error.get("title") or ""
    param, code = error.get("param"), error.get("code")
    return (
        str(message),
        param if isinstance(param, str) else None,
        code if isinstance(code, str) else None,
    )


def seconds(header: str | None) -> float | None:
    """Retry-After, given in seconds or as a date."""
    if header is None:
        return None
    with suppress(ValueError):
        return min(max(0.0, float(header)), 86_400.0)
    with suppress(ValueError, TypeError):
        date = parsedate_to_datetime(header)
        left: float = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        return min(max(0.0, left), 86_400.0)
    return None
