"""One call to an upstream, retried only where a retry cannot be paid for twice.

A call is retried, on another host if there is one, after a failure that cost no tokens: no
connection, status 429 or 503, or a kept-alive connection that was already closed. It is not
retried after a 500, 502 or 504, a timeout, a connection lost at another time, or an answer that
breaks off: the upstream may have done the work.

API keys are redacted from every error raised here, and from errors raised by the block that reads
a response.
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
from typing import Any, TypeVar
from weakref import WeakSet

import aiohttp
from aiohttp.connector import Connection

from infer_align.errors import Unavailable
from infer_align.stages import trace_headers
from infer_align.upstream import KEY_REFUSED, Upstream, UpstreamFailed
from infer_align.upstream.pool import Host, Pool
from infer_align.upstream.response import end_response, parse_error, parse_retry_after, read_json
from infer_align.upstream.trace import HEADER, trace

T = TypeVar("T")

# The first wait between two tries. Each further wait is twice as long, and all get random jitter.
BACKOFF_SECONDS = 0.25
# Statuses of a busy upstream: the request was not processed.
RETRIED_STATUSES = frozenset({429, 503})
# Statuses of a request that is wrong on every host.
REFUSED_STATUSES = frozenset({400, 404, 405, 409, 411, 413, 414, 415, 422, 431})
# A kept-alive connection that is lost this soon after a request was written had been closed
# before: the upstream has not read the request.
STALE_SECONDS = 0.25
# Bytes of an error response that are read, and characters of its message that are passed on.
MAX_ERROR_BYTES = 2**16
MAX_MESSAGE = 2000
# Redact prefixes of the key of at least this length too: an error excerpt may cut the key short.
MIN_KEY_PREFIX = 8
# True if the last request of this task was sent over a kept-alive connection.
_kept_alive: ContextVar[bool] = ContextVar("kept_alive", default=False)
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


@dataclass(slots=True)
class CallCounter:
    """A count of the calls that were made, retries included."""

    calls: int = 0


def _unchanged(answer: Any) -> Any:
    return answer


class Client:
    """Calls to the upstreams of one section, over one pool of kept-alive connections.

    Attributes:
        pool: the hosts.
    """

    def __init__(self, config: Upstream) -> None:
        self.config = config
        self.pool = Pool(config.addresses(), config.max_concurrency, config.recovery_seconds)
        self.key = config.api_key()
        self._session: aiohttp.ClientSession | None = None
        self._timeout = aiohttp.ClientTimeout(
            total=config.timeout_seconds, sock_connect=config.connect_timeout_seconds
        )

    async def start(self) -> None:
        """Open the connection pool; must be called in the event loop that will use it."""
        headers = {"Content-Type": "application/json", "User-Agent": "infer-align"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
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

    async def call_host(self, host: Host, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON of one host's answer, without retries; a GET if there is no body.

        The result is recorded in the state of the host.

        Raises:
            UpstreamFailed: there is no answer, or it is not JSON.
        """
        content = None if body is None else _encode(body).encode()
        method = "GET" if content is None else "POST"
        try:
            async with self._open(host, method, path, content) as response:
                return await read_json(response)
        except RetriableFailure as failure:
            raise self.redacted(failure.error) from None
        except UpstreamFailed as error:
            raise self.redacted(error) from None

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        model: str | None = None,
        counter: CallCounter | None = None,
        parse: Callable[[Any], T] = _unchanged,
    ) -> T:
        """Send a JSON body and return `parse(answer)`; by default the answer's JSON as it is.

        Raises:
            UpstreamFailed: see `call`; or the answer breaks off, is not JSON, or `parse` raises.
        """
        counter = counter or CallCounter()
        async with self.call(path, body, model=model, counter=counter) as (_, response):
            return parse(await read_json(response))

    @asynccontextmanager
    async def call(
        self, path: str, body: Mapping[str, Any], *, model: str | None, counter: CallCounter
    ) -> AsyncIterator[tuple[Host, aiohttp.ClientResponse]]:
        """Yield the host and its successful response, whose body is not read yet.

        Leaving the block early closes the connection at once.

        Args:
            path: path below the base URL.
            body: sent as JSON without changes.
            model: only hosts that serve it get the call.
            counter: counts every call.

        Raises:
            UpstreamFailed: the last failure, if it must not or cannot be retried.
            Unavailable: the client is not started, or no host serves the model.
        """
        content = _encode(body).encode()
        failed_hosts: set[Host] = set()
        for attempt in range(self.config.retries + 1):
            host = await self.pool.acquire(model, failed_hosts)
            wait: float | None
            try:
                counter.calls += 1
                async with self._open(host, "POST", path, content) as response:
                    yield host, response
                    return
            except RetriableFailure as failure:
                failed_hosts.add(host)
                wait = self.retry_wait(failure, attempt, failed_hosts, model)
                if wait is None:
                    raise self.redacted(failure.error) from None
            except UpstreamFailed as error:
                raise self.redacted(error) from None
            finally:
                self.pool.release(host)
            await asyncio.sleep(wait)

    def redacted(self, error: UpstreamFailed) -> UpstreamFailed:
        """Return the error with texts that are valid UTF-8, short, and without the key."""
        error.message = self.redact(error.message)
        error.param = None if error.param is None else self.redact(error.param)
        error.code = self.redact(error.code)
        error.args = (error.message,)
        return error

    def redact(self, text: str, max_length: int = MAX_MESSAGE) -> str:
        """Return a text without this server's key, nor a beginning of it, and not too long."""
        key = self.key or ""
        shortest = max(1, min(len(key), MIN_KEY_PREFIX))
        for length in range(len(key), shortest - 1, -1):
            prefix = key[:length]
            escaped = repr(prefix)[1:-1]
            text = text.replace(prefix, "***").replace(escaped, "***")
        return text.encode(errors="replace").decode()[:max_length]

    def retry_wait(
        self,
        failure: RetriableFailure,
        attempt: int,
        failed_hosts: set[Host],
        model: str | None,
    ) -> float | None:
        """Return the seconds until the next try, or None if there must be none."""
        if attempt >= self.config.retries:
            return None
        untried = [host for host in self.pool.serving(model) if host not in failed_hosts]
        if failure.stale or untried:
            return 0.0
        backoff: float = BACKOFF_SECONDS * 2**attempt
        retry_after = failure.error.retry_after
        # The jitter keeps clients from retrying all at once; it needs no secure random numbers.
        if retry_after is None:
            return backoff * random.uniform(0.5, 1.0)  # noqa: S311
        if retry_after > self.config.max_retry_wait_seconds:
            return None
        return retry_after + random.uniform(0.0, 0.1 * backoff)  # noqa: S311

    @asynccontextmanager
    async def _open(
        self, host: Host, method: str, path: str, content: bytes | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send one request to one host and yield its successful response.

        Raises:
            RetriableFailure: the request failed and cost no tokens.
            UpstreamFailed: the request failed otherwise.
        """
        response = await self.send(host, method, f"{host.url}{path}", content)
        try:
            if not 200 <= response.status < 300:
                raise await failure_of(host, response)
            host.record_success()
            yield response
        finally:
            end_response(response)

    async def send(
        self,
        host: Host,
        method: str,
        url: str,
        content: bytes | AsyncIterator[bytes] | None,
        headers: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        """Send one request and return the response; record in the host why there is none."""
        if self._session is None or self._session.closed:
            raise Unavailable("the connections to the upstreams are closed")
        _kept_alive.set(False)
        started = monotonic()
        headers = _continued(headers or {}, trace_headers())
        try:
            return await self._traced_request(self._session, method, url, content, headers)
        except aiohttp.ClientConnectorError as error:
            raise _not_connected(host, f"no connection: {_reason(error)}", 502) from None
        except aiohttp.ConnectionTimeoutError:
            raise _not_connected(host, "no connection in time", 504) from None
        except TimeoutError:
            host.record_failure()
            raise UpstreamFailed(
                f"the upstream did not answer within {self.config.timeout_seconds:.3g} s.",
                status=504,
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            host.record_failure()
            lost = UpstreamFailed(
                f"the connection to the upstream was lost: {type(error).__name__}."
            )
            early = _kept_alive.get() and monotonic() - started < STALE_SECONDS
            if early and isinstance(error, aiohttp.ServerDisconnectedError | OSError):
                raise RetriableFailure(lost, stale=True) from None
            raise lost from None

    async def _traced_request(
        self,
        session: aiohttp.ClientSession,
        method: str,
        url: str,
        content: bytes | AsyncIterator[bytes] | None,
        headers: Mapping[str, str],
    ) -> aiohttp.ClientResponse:
        """Send one request with an id, by which it is found in the logs of both servers."""
        calls = trace.get()
        sent = headers.get(HEADER, "")
        if calls is not None and not sent:
            sent = calls.next_id()
            headers = {**headers, HEADER: sent}
        response = await session.request(
            method, url, data=content, headers=headers, allow_redirects=False
        )
        if calls is not None:
            calls.note(sent, response.headers.get(HEADER))
        return response


class RetriableFailure(Exception):
    """A failure that may be retried; at once if the connection was `stale`."""

    def __init__(self, error: UpstreamFailed, *, stale: bool = False) -> None:
        super().__init__(error.message)
        self.error = error
        self.stale = stale


def _continued(headers: Mapping[str, str], context: Mapping[str, str]) -> Mapping[str, str]:
    """Return headers with the context of a trace; without one, those of the client stay."""
    if not context:
        return headers
    # A state belongs to its parent, and the client's parent is replaced.
    without_state = {name: value for name, value in headers.items() if name != "tracestate"}
    return {**without_state, **context}


def _not_connected(host: Host, reason: str, status: int) -> RetriableFailure:
    error = UpstreamFailed(f"the upstream cannot be reached: {reason}.", status=status)
    host.record_failure(error.message)
    return RetriableFailure(error)


async def failure_of(host: Host, response: aiohttp.ClientResponse) -> Exception:
    """Return the exception for a response with an unsuccessful status."""
    status = response.status
    if status >= 500:
        host.record_failure()
    else:
        host.record_success()
    body = parse_error((await _error_content(response)).decode(errors="replace"))
    if status in {401, 403}:
        return UpstreamFailed(
            f"the upstream does not accept this server's key ({status}).", code=KEY_REFUSED
        )
    if status < 400:
        return UpstreamFailed(
            f"the upstream answered {status}, a redirect, which is not followed; correct its url."
        )
    error = UpstreamFailed(
        body.message or f"the upstream answered {status}.",
        status=status,
        param=body.param,
        code=body.code,
        retry_after=parse_retry_after(response.headers.get("Retry-After")),
        refused=status in REFUSED_STATUSES,
    )
    return RetriableFailure(error) if status in RETRIED_STATUSES else error


async def _error_content(response: aiohttp.ClientResponse) -> bytes:
    """Read the start of an error response, as far as it arrives."""
    content = b""
    with suppress(aiohttp.ClientError, OSError, TimeoutError):
        while len(content) < MAX_ERROR_BYTES:
            received = await response.content.read(MAX_ERROR_BYTES)
            if not received:
                break
            content += received
    return content


class _Connector(aiohttp.TCPConnector):
    """Sets `_kept_alive` for each request; aiohttp's own tracing costs far more."""

    def __init__(self, *, limit: int, keepalive_timeout: float) -> None:
        super().__init__(limit=limit, keepalive_timeout=keepalive_timeout)
        self._used_protocols: WeakSet[Any] = WeakSet()

    # The signature is aiohttp's.
    async def connect(self, req: Any, traces: Any, timeout: Any) -> Connection:  # noqa: ASYNC109
        """Return a connection, new or kept alive."""
        connection = await super().connect(req, traces, timeout)
        _kept_alive.set(connection.protocol in self._used_protocols)
        self._used_protocols.add(connection.protocol)
        return connection


def _reason(error: aiohttp.ClientConnectorError) -> str:
    """Return why there is no connection, without the address."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not trusted"
    if isinstance(error, aiohttp.ClientSSLError):
        return "TLS failed"
    number = error.os_error.errno
    if not number or number <= 0:
        return "its name cannot be looked up"
    return os.strerror(number)
