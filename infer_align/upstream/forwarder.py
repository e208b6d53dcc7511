"""A client that also passes requests on as they are; see `forward.py`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType

import aiohttp

from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import (
    MIN_KEY_PREFIX,
    RETRIED_STATUSES,
    Client,
    RetriableFailure,
    failure_of,
)
from infer_align.upstream.forward import ForwardedAnswer, ForwardedRequest, response_headers
from infer_align.upstream.pool import Host
from infer_align.upstream.response import (
    end_response,
    parse_retry_after,
    read_bytes,
    read_content,
)


class Forwarder(Client):
    """Calls to the upstreams of one section, and requests that are passed on to them."""

    def forward(self, request: ForwardedRequest) -> AbstractAsyncContextManager[ForwardedAnswer]:
        """Yield an upstream's own answer, whatever its status, except for three kinds.

        A redirect, or a refusal of this server's own key, is an error of this server. A busy
        upstream is tried again as in `call`. A search goes on to the next host after a 404 or 405.

        Raises:
            UpstreamFailed: there is no answer that can be passed on, or its body breaks off.
            Unavailable: see `call`.
        """
        return _Forwarding(self, request)

    async def respond(self, host: Host, request: ForwardedRequest) -> aiohttp.ClientResponse:
        """Send a request that is passed on, and return the response, to be ended by the caller.

        Raises:
            RetriableFailure: the request failed and cost no tokens.
            UpstreamFailed: the request failed otherwise, or its response cannot be passed on.
        """
        headers = {**request.headers, "Accept-Encoding": "identity"}
        response = await self.send(
            host, request.method, request.url(host.url), request.content, headers
        )
        if response.status in {401, 403} or 300 <= response.status < 400:
            try:
                raise await failure_of(host, response)
            finally:
                end_response(response)
        if response.status >= 500:
            host.record_failure()
        else:
            host.record_success()
        return response

    def wait_before_next(
        self,
        request: ForwardedRequest,
        response: aiohttp.ClientResponse,
        host: Host,
        attempt: int,
        failed_hosts: set[Host],
    ) -> float | None:
        """Return the seconds until the next try; None to pass on this response."""
        if not request.repeatable:
            return None
        if request.try_every_host and response.status in {404, 405}:
            failed_hosts.add(host)
            untried = set(self.pool.serving(request.model)) - failed_hosts
            return 0.0 if untried else None
        if response.status not in RETRIED_STATUSES:
            return None
        failed_hosts.add(host)
        retry_after = parse_retry_after(response.headers.get("Retry-After"))
        failure = RetriableFailure(UpstreamFailed("busy", retry_after=retry_after))
        return self.retry_wait(failure, attempt, failed_hosts, request.model)

    def forwarded(self, response: aiohttp.ClientResponse) -> ForwardedAnswer:
        """Return a response in the form in which it is passed on."""
        length = response.content_length
        if "Content-Encoding" in response.headers:
            # aiohttp has unpacked the body.
            length = None
        return ForwardedAnswer(
            response.status,
            response_headers(response.headers.items()),
            length,
            self._readable(response),
            partial(self._read_all, response),
        )

    async def _readable(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Yield the body of a response without this server's key; audio and files as they are."""
        async for chunk in read_bytes(response):
            yield self._without_key(response, chunk)

    async def _read_all(self, response: aiohttp.ClientResponse) -> bytes:
        """Return the body of a response, like `_readable`."""
        return self._without_key(response, await read_content(response))

    def _without_key(self, response: aiohttp.ClientResponse, content: bytes) -> bytes:
        prefix = (self.key or "")[:MIN_KEY_PREFIX].encode()
        if not prefix or prefix not in content:
            return content
        if response.content_type.startswith("text/") or "json" in response.content_type:
            return self.redact(content.decode("latin-1"), len(content)).encode("latin-1")
        return content


class _Forwarding(AbstractAsyncContextManager[ForwardedAnswer]):
    """One request that is passed on: the answer inside the block, and its end after the block.

    A class, because a generator for each of its parts takes longer than all that they do.
    """

    def __init__(self, client: Forwarder, request: ForwardedRequest) -> None:
        self._client = client
        self._request = request
        self._failed_hosts: set[Host] = set()
        self._host: Host | None = None
        self._response: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> ForwardedAnswer:
        client = self._client
        for attempt in itertools.count():
            self._host = host = await client.pool.acquire(self._request.model, self._failed_hosts)
            try:
                wait = await self._attempt(host, attempt)
            except BaseException:
                self._end()
                raise
            if wait is None and self._response is not None:
                return client.forwarded(self._response)
            self._end()
            await asyncio.sleep(wait or 0.0)
        raise UpstreamFailed("the upstreams were not tried.")

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        self._end()
        if isinstance(error, UpstreamFailed):
            self._client.redacted(error)

    async def _attempt(self, host: Host, attempt: int) -> float | None:
        """Send the request once; return the seconds until the next try, None if there is none."""
        client, request = self._client, self._request
        try:
            self._response = await client.respond(host, request)
            return client.wait_before_next(
                request, self._response, host, attempt, self._failed_hosts
            )
        except RetriableFailure as failure:
            self._failed_hosts.add(host)
            wait = None
            if request.repeatable:
                wait = client.retry_wait(failure, attempt, self._failed_hosts, request.model)
            if wait is None:
                raise client.redacted(failure.error) from None
            return wait
        except UpstreamFailed as error:
            raise client.redacted(error) from None

    def _end(self) -> None:
        """End the response, and give back the place at the host."""
        response, self._response = self._response, None
        host, self._host = self._host, None
        if response is not None:
            end_response(response)
        if host is not None:
            self._client.pool.release(host)
