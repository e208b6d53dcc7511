"""One call to an upstream: sent to the host that has room, and again, to another where there is one, while that is safe.

Safe is what cost no tokens and changed nothing: no connection, 429, 503, or a kept-alive connection that turns out to be closed. A
500, 502 or 504, a timeout, a connection lost at any other time, or an answer that breaks off is not repeated: the work may have
been done, and be done and paid for twice.

What is raised by a call, or inside the block that reads it, has lost the upstream's key before anybody sees it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic
from typing import Any
from weakref import WeakSet

import aiohttp
from aiohttp.connector import Connection

from infer_align.errors import Unavailable
from infer_align.upstream import KEY_REFUSED, Upstream, UpstreamFailed
from infer_align.upstream.pool import Host, Pool
from infer_align.upstream.reading import seconds, told, whole

# The first wait between two tries; each further one is twice as long, and all are shortened by lot.
BACKOFF_SECONDS = 0.25
RETRIED = frozenset({429, 503})
REFUSED = frozenset({400, 404, 405, 409, 411, 413, 414, 415, 422, 431})
# A kept-alive connection that is lost this soon after a request was written to it was closed before: nobody has read the request.
STALE_SECONDS = 0.25
# Of an upstream's error: what is read, and what is passed on.
MAX_ERROR_BYTES = 2**16
MAX_MESSAGE = 2000
# A key's beginning of this many characters says something of the key; an excerpt may end in the middle of one.
TELLING = 8
# Of the request that this task has sent last: whether its connection had been kept alive.
_kept_alive: ContextVar[bool] = ContextVar("kept_alive", default=False)
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


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
        self._timeout = aiohttp.ClientTimeout(
            total=config.timeout_seconds, sock_connect=config.connect_timeout_seconds
        )

    async def start(self) -> None:
        """Open the connection pool. Call it in the event loop that will use it."""
        headers = {"Content-Type": "application/json", "User-Agent": "infer-align"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            connector=_Connector(limit=0, keepalive_timeout=30),
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
            async with self._open(
                host, "GET" if content is None else "POST", path, content
            ) as response:
                return await whole(response)
        except _Retriable as failure:
            raise self._redacted(failure.error) from None
        except UpstreamFailed as error:
            raise self._redacted(error) from None

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        model: str | None = None,
        tally: Tally | None = None,
        read: Callable[[Any], Any] = lambda answer: answer,
    ) -> Any:
        """What `read` makes of the JSON answer to a JSON body; the answer itself where it is not given.

        Raises:
            UpstreamFailed: see `call`; or the answer broke off, is not JSON, or is not what `read` expects.
        """
        async with self.call(path, body, model=model, tally=tally or Tally()) as (_, response):
            return read(await whole(response))

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
                    raise self._redacted(failure.error) from None
            except UpstreamFailed as error:
                raise self._redacted(error) from None
            finally:
                self.pool.release(host)
            await asyncio.sleep(wait)

    @asynccontextmanager
    async def relay(
        self, method: str, path: str, content: bytes | None, *, model: str | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer as it comes, of the first host that does not say 404: what was stored lies on one of them. Nothing is repeated.

        Raises:
            UpstreamFailed: the last host's failure.
            Unavailable: see `call`.
        """
        failures: dict[Host, UpstreamFailed] = {}
        while True:
            host = await self.pool.acquire(model, failures)
            begun = False
            try:
                if host in failures:
                    raise self._redacted(failures[host])
                async with self._open(host, method, path, content) as response:
                    begun = True
                    yield response
                    return
            except _Retriable as failure:
                failures[host] = failure.error
            except UpstreamFailed as error:
                if begun or host in failures or error.status not in {404, 405}:
                    raise self._redacted(error) from None
                failures[host] = error
            finally:
                self.pool.release(host)

    def _redacted(self, error: UpstreamFailed) -> UpstreamFailed:
        """The error, its texts without the key, without halves of characters, and not too long."""
        error.message = self._without_key(error.message)[:MAX_MESSAGE]
        error.param = None if error.param is None else self._without_key(error.param)[:MAX_MESSAGE]
        error.code = self._without_key(error.code)[:MAX_MESSAGE]
        error.args = (error.message,)
        return error

    def _without_key(self, text: str) -> str:
        key = self._key or ""
        lengths = range(len(key), min(len(key), TELLING) - 1, -1) if key else ()
        for length in lengths:
            for form in {key[:length], repr(key[:length])[1:-1]}:
                text = text.replace(form, "***")
        return text.encode(errors="replace").decode()

    def _wait(
        self, failure: _Retriable, attempt: int, tried: set[Host], model: str | None
    ) -> float | None:
        """Seconds until the next try; None where there is none."""
        if attempt >= self.config.retries:
            return None
        if failure.stale or [host for host in self.pool.having(model) if host not in tried]:
            return 0.0  # somebody else may be well
        asked = failure.error.retry_after
        if asked is not None and asked > self.config.max_retry_wait_seconds:
            return None
        backoff = BACKOFF_SECONDS * 2**attempt
        return (
            backoff * random.uniform(0.5, 1.0)
            if asked is None
            else asked + random.uniform(0.0, 0.1 * backoff)
        )

    @asynccontextmanager
    async def _open(
        self, host: Host, method: str, path: str, content: bytes | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None or self._session.closed:
            raise Unavailable("the connections to the upstreams are closed")
        _kept_alive.set(False)
        started = monotonic()
        try:
            response = await self._session.request(
                method, f"{host.url}{path}", data=content, allow_redirects=False
            )
        except aiohttp.ClientConnectorError as error:
            reason = f"no connection: {_reason(error)}"
            host.failed(reason)
            raise _Retriable(
                UpstreamFailed(f"the upstream cannot be reached: {reason}.", status=502)
            ) from None
        except aiohttp.ConnectionTimeoutError:
            host.failed("no connection in time")
            raise _Retriable(
                UpstreamFailed("the upstream cannot be reached: no connection in time.", status=504)
            ) from None
        except TimeoutError:
            host.failed()
            raise self._late() from None
        except (aiohttp.ClientError, OSError) as error:
            host.failed()
            lost = UpstreamFailed(
                f"the connection to the upstream was lost: {type(error).__name__}."
            )
            early = _kept_alive.get() and monotonic() - started < STALE_SECONDS
            if early and isinstance(error, aiohttp.ServerDisconnectedError | OSError):
                raise _Retriable(lost, stale=True) from None
            raise lost from None
        try:
            if not 200 <= response.status < 300:
                raise await self._failure(host, response)
            host.answered()
            yield response
        finally:
            response.release() if response.content.at_eof() else response.close()

    def _late(self) -> UpstreamFailed:
        return UpstreamFailed(
            f"the upstream did not answer within {self.config.timeout_seconds:.3g} s.", status=504
        )

    async def _failure(self, host: Host, response: aiohttp.ClientResponse) -> Exception:
        """What a status other than 200 means."""
        status = response.status
        host.failed() if status >= 500 else host.answered()
        content = b""
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            while len(content) < MAX_ERROR_BYTES and (
                part := await response.content.read(MAX_ERROR_BYTES)
            ):
                content += part
        message, param, code = told(content.decode(errors="replace"))
        after = seconds(response.headers.get("Retry-After"))
        if status in {401, 403}:
            error = UpstreamFailed(
                f"the upstream does not accept this server's key ({status}).", code=KEY_REFUSED
            )
        elif status < 400:
            error = UpstreamFailed(
                f"the upstream answered {status}, which is not followed; correct its url."
            )
        else:
            refused = status in REFUSED
            says = message or f"the upstream answered {status}."
            error = UpstreamFailed(
                says, status=status, param=param, code=code, retry_after=after, refused=refused
            )
        return _Retriable(error) if status in RETRIED else error


class _Retriable(Exception):
    """A failure that may be tried again; at once where only the connection was `stale`."""

    def __init__(self, error: UpstreamFailed, *, stale: bool = False) -> None:
        super().__init__(error.message)
        self.error = error
        self.stale = stale


class _Connector(aiohttp.TCPConnector):
    """Notes whether a request goes over a connection that had been kept alive; aiohttp's own tracing costs far more."""

    def __init__(self, *, limit: int, keepalive_timeout: float) -> None:
        super().__init__(limit=limit, keepalive_timeout=keepalive_timeout)
        self._known: WeakSet[Any] = WeakSet()

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Connection:  # noqa: ASYNC109 - aiohttp's own signature
        """A connection, new or kept alive."""
        connection = await super().connect(req, traces, timeout)
        _kept_alive.set(connection.protocol in self._known)
        self._known.add(connection.protocol)
        return connection


def _reason(error: aiohttp.ClientConnectorError) -> str:
    """Why there is no connection, in words that do not say where it should have gone."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not one to trust"
    if isinstance(error, aiohttp.ClientSSLError):
        return "TLS failed"
    number = error.os_error.errno
    return os.strerror(number) if number and number > 0 else "its name cannot be looked up"
