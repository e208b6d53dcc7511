"""One call to an upstream: sent to the host that has room, and again, to another where there is one, while that is safe.

Safe is what cost no tokens and changed nothing: no connection, 429, 502, 503, or a connection lost before the answer began. A
500, a 504, a timeout or an answer that breaks off is not repeated: the work may have been done, and be done and paid for twice.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from infer_align.errors import Unavailable
from infer_align.upstream import KEY_REFUSED, Upstream, UpstreamFailed
from infer_align.upstream.pool import Host, Pool
from infer_align.upstream.sse import EventParser

# The first wait between two tries; each further one is twice as long, and all are shortened by lot.
BACKOFF_SECONDS = 0.25
RETRIED = frozenset({429, 502, 503})
REFUSED = frozenset({400, 404, 405, 409, 411, 413, 414, 415, 422, 431})
# After the last event the connection can be used again, if the upstream ends its answer within this time.
DRAIN_SECONDS = 0.2
# Of an upstream's error: what is read, and what is passed on.
MAX_ERROR_BYTES = 2**16
MAX_MESSAGE = 2000
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_decode = json.JSONDecoder().decode


@dataclass(slots=True)
class Tally:
    """How many calls were made, counted as they are made."""

    calls: int = 0


class Client:
    """Calls to the upstreams of one section, over one pool of kept-alive connections.

    Attributes:
        pool: the hosts.
    """

    def __init__(self, config: Upstream) -> None:
        self.config = config
        self.pool = Pool(config.addresses(), config.max_concurrency, config.recovery_seconds)
        self._key = config.api_key()
        self._session: aiohttp.ClientSession | None = None
        self._timeout = aiohttp.ClientTimeout(total=config.timeout_seconds, sock_connect=config.connect_timeout_seconds)

    async def start(self) -> None:
        """Open the connection pool. Call it in the event loop that will use it."""
        headers = {"Content-Type": "application/json", "User-Agent": "infer-align"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            timeout=self._timeout,
        )

    async def close(self) -> None:
        """Close every connection."""
        if self._session:
            await self._session.close()

    async def once(self, host: Host, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of one host, asked once; whether it can be reached is noted. Without a body it is a GET.

        Raises:
            UpstreamFailed: no answer, or not JSON.
        """
        content = None if body is None else _encode(body).encode()
        try:
            async with self._open(host, "GET" if content is None else "POST", path, content) as response:
                return await whole(response)
        except _Retriable as failure:
            raise failure.error from None

    async def post(self, path: str, body: Mapping[str, Any], *, model: str | None = None, tally: Tally | None = None) -> Any:
        """The JSON answer to a JSON body.

        Raises:
            UpstreamFailed: see `call`; or the answer broke off, or is not JSON.
        """
        async with self.call(path, body, model=model, tally=tally or Tally()) as (_, response):
            return await whole(response)

    @asynccontextmanager
    async def call(
        self, path: str, body: Mapping[str, Any], *, model: str | None, tally: Tally
    ) -> AsyncIterator[tuple[Host, aiohttp.ClientResponse]]:
        """A 200 of one of the hosts, its body not yet read; leaving the block early closes the connection at once.

        Args:
            path: below the base URL.
            body: sent as JSON, as it stands.
            model: only hosts that have it are asked.
            tally: counts every call.

        Raises:
            UpstreamFailed: the last failure, when it must not or can not be repeated.
            Unavailable: not started, or no host has the model.
        """
        content = _encode(body).encode()
        tried: set[Host] = set()
        for attempt in range(self.config.retries + 1):
            host = await self.pool.acquire(model, tried)
            wait: float | None
            try:
                tally.calls += 1
                async with self._open(host, "POST", path, content) as response:
                    yield host, response
                    return
            except _Retriable as failure:
                tried.add(host)
                wait = self._wait(failure, attempt, tried, model)
                if wait is None:
                    raise failure.error from None
            finally:
                self.pool.release(host)
            await asyncio.sleep(wait)

    def _wait(self, failure: _Retriable, attempt: int, tried: set[Host], model: str | None) -> float | None:
        """Seconds until the next try; None where there is none."""
        if attempt >= self.config.retries:
            return None
        if [host for host in self.pool.having(model) if host not in tried]:
            return 0.0  # somebody else may be well
        asked = failure.error.retry_after
        if asked is not None and asked > self.config.max_retry_wait_seconds:
            return None
        backoff = BACKOFF_SECONDS * 2**attempt
        return backoff * random.uniform(0.5, 1.0) if asked is None else asked + random.uniform(0.0, 0.1 * backoff)  # noqa: S311

    @asynccontextmanager
    async def _open(self, host: Host, method: str, path: str, content: bytes | None) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None or self._session.closed:
            raise Unavailable("the connections to the upstreams are closed")
        try:
            response = await self._session.request(method, f"{host.url}{path}", data=content, allow_redirects=False)
        except aiohttp.ClientConnectorError as error:
            reason = f"no connection: {error.strerror or error.os_error}"
            host.failed(reason)
            raise _Retriable(UpstreamFailed(f"the upstream cannot be reached: {reason}.", status=502)) from None
        except aiohttp.ConnectionTimeoutError:
            host.failed("no connection in time")
            raise _Retriable(UpstreamFailed("the upstream cannot be reached: no connection in time.", status=504)) from None
        except TimeoutError:
            host.failed()
            raise self._late() from None
        except (aiohttp.ClientError, OSError) as error:
            host.failed()
            raise _Retriable(UpstreamFailed(f"the connection to the upstream was lost: {type(error).__name__}.")) from None
        try:
            if response.status != 200:
                raise await self._failure(host, response)
            host.answered()
            yield response
        finally:
            response.release() if response.content.at_eof() else response.close()

    def _late(self) -> UpstreamFailed:
        return UpstreamFailed(f"the upstream did not answer within {self.config.timeout_seconds:.3g} s.", status=504)

    async def _failure(self, host: Host, response: aiohttp.ClientResponse) -> Exception:
        """What a status other than 200 means."""
        status = response.status
        host.failed() if status >= 500 else host.answered()
        content = b""
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            while len(content) < MAX_ERROR_BYTES and (part := await response.content.read(MAX_ERROR_BYTES)):
                content += part
        message, param, code = _told(content.decode(errors="replace"))
        message = (message.replace(self._key, "***") if self._key else message)[:MAX_MESSAGE]
        after = _seconds(response.headers.get("Retry-After"))
        if status in {401, 403}:
            error = UpstreamFailed(f"the upstream does not accept this server's key ({status}).", code=KEY_REFUSED)
        elif status < 400:
            error = UpstreamFailed(f"the upstream answered {status}, which is not followed; correct its url.")
        else:
            refused = status in REFUSED
            says = message or f"the upstream answered {status}."
            error = UpstreamFailed(says, status=status, param=param, code=code, retry_after=after, refused=refused)
        return _Retriable(error) if status in RETRIED else error


class _Retriable(Exception):
    """A failure that may be tried again."""

    def __init__(self, error: UpstreamFailed) -> None:
        super().__init__(error.message)
        self.error = error


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
                if event.strip() == b"[DONE]":
                    with suppress(TimeoutError):
                        async with asyncio.timeout(DRAIN_SECONDS):
                            await response.content.readany()
                    yield None
                    return
                yield _parse(event)
        for event in parser.end():
            yield None if event.strip() == b"[DONE]" else _parse(event)


def _parse(content: bytes) -> Any:
    """JSON from an upstream.

    Raises:
        UpstreamFailed: it is none.
    """
    try:
        return _decode(content.decode())
    except (ValueError, RecursionError):
        start = content[:60].decode(errors="replace")
        raise UpstreamFailed(f"the upstream's answer is not JSON: it begins with {start!r}.") from None


@contextmanager
def _whole_answer() -> Iterator[None]:
    """What ends the reading of an answer before the answer ends, as what it is."""
    try:
        yield
    except TimeoutError:
        raise UpstreamFailed("the upstream did not finish its answer in time.", status=504) from None
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamFailed(f"the upstream's answer broke off: {type(error).__name__}.") from None
    except ValueError as error:  # an event that does not end
        raise UpstreamFailed(f"the upstream's answer cannot be read: {error}.") from None


def _told(text: str) -> tuple[str, str | None, str | None]:
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
    return str(message), param if isinstance(param, str) else None, code if isinstance(code, str) else None


def _seconds(header: str | None) -> float | None:
    """Retry-After, given in seconds or as a date."""
    if header is None:
        return None
    with suppress(ValueError):
        return min(max(0.0, float(header)), 86_400.0)
    with suppress(ValueError, TypeError):
        date = parsedate_to_datetime(header)
        seconds: float = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        return min(max(0.0, seconds), 86_400.0)
    return None
