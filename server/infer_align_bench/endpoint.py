"""One endpoint over HTTP: which models it serves, and one timed request."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any, Self

from infer_align.errors import AlignError, ConfigError, nearest, shown

try:
    import aiohttp
except ImportError:
    raise ConfigError(
        "bench: aiohttp is not installed; install it with: pip install 'infer-align[bench]'."
    ) from None

from infer_align_bench.events import Answer, StreamFailed, described
from infer_align_bench.types import Prompt, Sample, Target

CONNECT_SECONDS = 10.0


class Endpoint:
    """A target and its connections; kept alive, as many as there are requests under way."""

    def __init__(self, target: Target, timeout: float, seed: int) -> None:
        if not re.match(r"https?://[^/]+", target.base_url):
            raise ConfigError(
                f"--base-url: {shown(target.base_url)} is not allowed; must be like http://127.0.0.1:8000/v1."
            )
        self.target = replace(target, base_url=target.base_url.rstrip("/"))
        self._seed = seed
        self._timeout = timeout

    async def __aenter__(self) -> Self:
        key = self.target.key.value
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(
                total=self._timeout, sock_connect=min(self._timeout, CONNECT_SECONDS)
            ),
            read_bufsize=2**20,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def find_model(self) -> None:
        """Make sure that it answers, takes the key and serves the model; takes the first model where none was named.

        Raises:
            AlignError: it does not, and what to do.
        """
        status, body = await self.call("models")
        if (
            status == 404
            and not self.target.base_url.endswith("/v1")
            and (await self.call("v1/models"))[0] == 200
        ):
            raise AlignError(
                f"{self.target.place}/models: status 404; did you mean --base-url {self.target.place}/v1?"
            )
        if status in (401, 403):
            raise AlignError(self._refused(status, body))
        names = [str(model.get("id")) for model in _models(body)] if status == 200 else []
        model = self.target.model
        if model is None and not names:
            raise AlignError(
                f"{self.target.place}/models: status {status}, no list of models; name one with --model."
            )
        if names and model is not None and model not in names:
            guess = nearest(model, names)
            served = (
                "" if guess.startswith("known") else f" It serves: {', '.join(sorted(names)[:20])}."
            )
            raise AlignError(
                f"--model: {shown(model)} is not served at {self.target.place}; {guess}{served}"
            )
        self.target = replace(self.target, model=model or names[0])

    async def call(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """One GET, or POST of a body; -> the status, and the JSON answer or its text.

        Raises:
            AlignError: no answer.
        """
        send = self._http.get if body is None else self._http.post
        try:
            async with send(f"{self.target.base_url}/{path}", json=body) as response:
                return response.status, _json(await response.text(errors="replace"))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            kind, said = failure(error, self._timeout)
            why = kind if said.lower() == kind else f"{kind}: {self.safe(said)}"
            advice = (
                "raise --timeout, or ask for less"
                if kind == "timeout"
                else "is the server running?"
            )
            raise AlignError(f"{self.target.place} cannot be reached: {why}; {advice}") from None

    def _refused(self, status: int, body: Any) -> str:
        said = self.safe(described(body.get("error") if isinstance(body, Mapping) else body, "")[1])
        key = self.target.key
        given = (
            f"the key in {key.env} was refused"
            if key.value
            else f"no key was sent{f', {key.env} is not set' if key.env else ''}"
        )
        return f"{self.target.place}: status {status}: {given}: {said}; name its variable with {key.flag}."

    def safe(self, text: str) -> str:
        """`text` without the key, which servers like to quote."""
        return text.replace(self.target.key.value, "***") if self.target.key.value else text

    def body(self, prompt: Prompt, index: int) -> dict[str, Any]:
        """What is sent for a prompt; `index` makes the seed, so that both targets of a pair are asked the same."""
        body: dict[str, Any] = {
            "model": self.target.model,
            "messages": list(prompt.messages),
            "seed": self._seed + index,
        }
        if self.target.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= {**prompt.body, **self.target.body}
        if self.target.align is not None:
            body["align"] = self.target.align
        return {name: value for name, value in body.items() if value is not None}

    async def send(
        self, prompt: Prompt, index: int, began: float, intended: float | None = None
    ) -> Sample:
        """One request; never raises for what an endpoint does.

        Args:
            prompt: what is asked.
            index: of the request.
            began: the run's start on `perf_counter`.
            intended: seconds after it at which the request was due; None: now.
        """
        content = json.dumps(self.body(prompt, index)).encode()
        started, answer = perf_counter(), Answer()
        kind, message = await self._exchange(content, answer)
        prompt_tokens, spent, returned = answer.tokens()
        return Sample(
            self.target.name,
            index,
            started - began if intended is None else intended,
            started - began,
            perf_counter() - began,
            None if answer.first is None else answer.first - began,
            tuple(answer.gaps),
            answer.chunks,
            prompt_tokens,
            spent,
            returned,
            answer.align_usage(),
            answer.finish_reason,
            kind,
            self.safe(message),
        )

    async def _exchange(self, content: bytes, answer: Answer) -> tuple[str | None, str]:
        url, headers = (
            f"{self.target.base_url}/chat/completions",
            {"Content-Type": "application/json"},
        )
        try:
            async with self._http.post(url, data=content, headers=headers) as response:
                if response.status != 200:
                    return _failure(response.status, await response.text(errors="replace"))
                await self._read(response, answer)
        except StreamFailed as error:
            return error.kind, str(error)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return failure(error, self._timeout)
        return None, ""

    async def _read(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        if "text/event-stream" in response.headers.get("Content-Type", ""):
            async for data in response.content.iter_any():
                answer.feed(data, perf_counter())
            answer.end()
            return
        text = await response.text(errors="replace")
        if not isinstance(body := _json(text), Mapping) or "choices" not in body:
            raise StreamFailed("not an answer", text[:200])
        answer.whole(body)


def failure(error: Exception, timeout: float) -> tuple[str, str]:
    """What kept a request from its answer: the kind of error, and a sentence."""
    cause = getattr(error, "os_error", error)  # aiohttp wraps what the system said
    if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
        return (
            "client out of files",
            f"{os.strerror(cause.errno)}: this client's limit, not the endpoint's; see ulimit -n",
        )
    if isinstance(error, aiohttp.ServerTimeoutError):
        return "connect timeout", f"no connection within {min(timeout, CONNECT_SECONDS):g} s"
    if isinstance(error, TimeoutError):
        return "timeout", f"no end within {timeout:g} s"
    refused = (
        "connection refused" if isinstance(cause, ConnectionRefusedError) else "connection failed"
    )
    kinds: list[tuple[type[Exception] | tuple[type[Exception], ...], str]] = [
        (aiohttp.ClientConnectorDNSError, "name not found"),
        (aiohttp.ClientSSLError, "TLS failed"),
        (aiohttp.ClientConnectorError, refused),
        ((aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, OSError), "connection lost"),
    ]
    kind = next((kind for types, kind in kinds if isinstance(error, types)), "bad HTTP")
    said = (
        os.strerror(code)
        if isinstance(code := getattr(cause, "errno", None), int) and code > 0
        else str(cause)
    )
    return kind, said or type(error).__name__


def _failure(status: int, text: str) -> tuple[str, str]:
    body = _json(text)
    error = body.get("error", body.get("detail", text)) if isinstance(body, Mapping) else text
    return described(error, f"http {status}")


def _models(body: Any) -> list[Mapping[str, Any]]:
    found = body.get("data") if isinstance(body, Mapping) else None
    return (
        [model for model in found if isinstance(model, Mapping)] if isinstance(found, list) else []
    )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text[:500]
