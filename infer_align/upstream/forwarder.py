"""A client that also passes requests on as they are; see `forward.py`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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
from infer_align.upstream.response import end_response, parse_retry_after, read_bytes


class Forwarder(Client):
    """Calls to the upstreams of one section, and requests that are passed on to them."""

    @asynccontextmanager
    async def forward(self, request: ForwardedRequest) -> AsyncIterator[ForwardedAnswer]:
        """Yield an upstream's own answer, whatever its status, except for three kinds.

        A redirect, or a refusal of this server's own key, is an error of this server. A busy
        upstream is tried again as in `call`. A search goes on to the next host after a 404 or 405.

        Raises:
            UpstreamFailed: there is no answer that can be passed on, or its body breaks off.
            Unavailable: see `call`.
        """
        failed_hosts: set[Host] = set()
        for attempt in itertools.count():
            async with self._attempt(request, attempt, failed_hosts) as (answer, wait):
                if answer is not None:
                    yield answer
                    return
            await asyncio.sleep(wait)

    @asynccontextmanager
    async def _attempt(
        self, request: ForwardedRequest, attempt: int, failed_hosts: set[Host]
    ) -> AsyncIterator[tuple[ForwardedAnswer | None, float]]:
        """Send the request once; yield the answer, or None and the seconds until the next try."""
        host = await self.pool.acquire(request.model, failed_hosts)
        try:
            async with self._response(host, request) as response:
                wait = self._wait_before_next(request, response, host, attempt, failed_hosts)
                yield (self._forwarded(response) if wait is None else None), wait or 0.0
        except RetriableFailure as failure:
            failed_hosts.add(host)
            wait = None
            if request.repeatable:
                wait = self.retry_wait(failure, attempt, failed_hosts, request.model)
            if wait is None:
                raise self.redacted(failure.error) from None
            yield None, wait
        except UpstreamFailed as error:
            raise self.redacted(error) from None
        finally:
            self.pool.release(host)

    @asynccontextmanager
    async def _response(
        self, host: Host, request: ForwardedRequest
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request that is passed on, and yield the response."""
        headers = {**request.headers, "Accept-Encoding": "identity"}
        response = await self.send(
            host, request.method, request.url(host.url), request.content, headers
        )
        try:
            if response.status in {401, 403} or 300 <= response.status < 400:
                raise await failure_of(host, response)
            if response.status >= 500:
                host.record_failure()
            else:
                host.record_success()
            yield response
        finally:
            end_response(response)

    def _wait_before_next(
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

    def _forwarded(self, response: aiohttp.ClientResponse) -> ForwardedAnswer:
        length = response.content_length
        if "Content-Encoding" in response.headers:
            # aiohttp has unpacked the body.
            length = None
        return ForwardedAnswer(
            response.status,
            response_headers(response.headers.items()),
            length,
            self._readable(response),
        )

    async def _readable(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Yield the body of a response without this server's key; audio and files as they are."""
        is_text = response.content_type.startswith("text/") or "json" in response.content_type
        prefix = (self.key or "")[:MIN_KEY_PREFIX].encode()
        async for chunk in read_bytes(response):
            if is_text and prefix and prefix in chunk:
                yield self.redact(chunk.decode("latin-1"), len(chunk)).encode("latin-1")
            else:
                yield chunk
