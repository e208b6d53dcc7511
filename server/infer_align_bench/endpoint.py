"""One endpoint over HTTP: list its models and send timed requests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any, Self

import aiohttp

from infer_align.errors import AlignError, ConfigError, nearest, quote
from infer_align.urls import is_http_url, quote_url
from infer_align_bench.answer import MAX_EXCERPT, MAX_MESSAGE, Answer, StreamFailed, describe_error
from infer_align_bench.failures import classify_failure, connect_timeout
from infer_align_bench.types import ChatPrompt, Sample, Target

READ_BUFFER_BYTES = 2**20
MAX_MODELS_IN_MESSAGE = 20
# Raised by aiohttp, or by reading an answer: they are outcomes of a request.
REQUEST_ERRORS = (aiohttp.ClientError, TimeoutError, OSError, ValueError)


class Endpoint:
    """A target and its HTTP connections, which are kept alive. Use it as an async context."""

    def __init__(self, target: Target, timeout: float, seed: int) -> None:
        if not is_http_url(target.base_url):
            raise ConfigError(
                f"--base-url: {quote_url(target.base_url)} is not allowed; "
                "must be like http://127.0.0.1:8000/v1."
            )
        self.target = replace(target, base_url=target.base_url.rstrip("/"))
        self._seed = seed
        self._timeout = timeout

    async def __aenter__(self) -> Self:
        key = self.target.key.value
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # No limit: the load decides how many requests are in flight.
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(
                total=self._timeout, sock_connect=connect_timeout(self._timeout)
            ),
            read_bufsize=READ_BUFFER_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def find_model(self) -> None:
        """Check that the endpoint answers, accepts the key and serves the model.

        Without a model in the target, use the first that the endpoint lists.

        Raises:
            AlignError: one of these fails; the message names the fix.
        """
        status, body = await self.call("models")
        place = self.target.place
        if status == 404 and await self._has_v1():
            raise AlignError(f"{place}/models: status 404; did you mean --base-url {place}/v1?")
        if status in (401, 403):
            raise AlignError(self._key_refused(status, body))
        names = _model_names(body) if status == 200 else []
        model = self.target.model
        if model is None and not names:
            raise AlignError(
                f"{place}/models: status {status}, no list of models; name one with --model."
            )
        if names and model is not None and model not in names:
            raise AlignError(
                f"--model: {quote(model)} is not served at {place}; {_served(model, names)}"
            )
        self.target = replace(self.target, model=model or names[0])

    async def _has_v1(self) -> bool:
        """Return True if the API is below /v1 of an address that lacks this path."""
        if self.target.base_url.endswith("/v1"):
            return False
        status, _ = await self.call("v1/models")
        return status == 200

    async def call(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """Send a GET request, or a POST request if there is a body.

        Returns:
            The status, and the JSON answer or the beginning of its text.

        Raises:
            AlignError: there was no answer.
        """
        send = self._http.get if body is None else self._http.post
        try:
            async with send(f"{self.target.base_url}/{path}", json=body) as response:
                return response.status, _decode(await response.text(errors="replace"))
        except REQUEST_ERRORS as error:
            raise AlignError(self._unreachable(error)) from None

    def _unreachable(self, error: Exception) -> str:
        kind, message = classify_failure(error, self._timeout)
        reason = kind if message.lower() == kind else f"{kind}: {self.redact(message)}"
        advice = "is the server running?"
        if kind == "timeout":
            advice = "raise --timeout, or request less"
        return f"{self.target.place} cannot be reached: {reason}; {advice}"

    def _key_refused(self, status: int, body: Any) -> str:
        key = self.target.key
        if key.value:
            problem = f"the key in {key.env} was refused"
        elif key.env:
            problem = f"no key was sent, {key.env} is not set"
        else:
            problem = "no key was sent"
        _, message = describe_error(error_of(body), "")
        return (
            f"{self.target.place}: status {status}: {problem}: {self.redact(message)}; "
            f"name the environment variable of the key with {key.flag}."
        )

    def redact(self, text: str) -> str:
        """Return `text` without the API key, which servers like to quote."""
        key = self.target.key.value
        return text.replace(key, "***") if key else text

    def body(self, prompt: ChatPrompt, index: int) -> dict[str, Any]:
        """Return the request body of a prompt.

        `index` determines the seed, so that both targets of a pair get the same request.
        """
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
        self, prompt: ChatPrompt, index: int, began: float, intended: float | None = None
    ) -> Sample:
        """Send one request. A failure of the endpoint is part of the sample, never an exception.

        Args:
            prompt: the conversation to send.
            index: index of the request.
            began: start of the run on `perf_counter`.
            intended: due time in seconds after `began`; None: now.
        """
        content = json.dumps(self.body(prompt, index)).encode()
        answer = Answer()
        started = perf_counter() - began
        error, message = await self._exchange(content, answer)
        ended = perf_counter() - began
        prompt_tokens, generated, returned = answer.tokens()
        return Sample(
            target=self.target.name,
            index=index,
            intended=started if intended is None else intended,
            started=started,
            ended=ended,
            first=None if answer.first is None else answer.first - began,
            gaps=tuple(answer.gaps),
            chunks=answer.chunks,
            prompt_tokens=prompt_tokens,
            spent=generated,
            returned=returned,
            align=answer.align_usage(),
            finish_reason=answer.finish_reason,
            error=error,
            message=self.redact(message),
        )

    async def _exchange(self, content: bytes, answer: Answer) -> tuple[str | None, str]:
        """Send a chat request and fill `answer`; return the kind and message of an error."""
        url = f"{self.target.base_url}/chat/completions"
        headers = {"Content-Type": "application/json"}
        try:
            async with self._http.post(url, data=content, headers=headers) as response:
                if response.status != 200:
                    text = await response.text(errors="replace")
                    return _status_error(response.status, text)
                await _read(response, answer)
        except StreamFailed as error:
            return error.kind, str(error)
        except REQUEST_ERRORS as error:
            return classify_failure(error, self._timeout)
        return None, ""


def error_of(body: Any) -> Any:
    """Return the `error` field of an answer, or the whole answer if it is not an object."""
    return body.get("error") if isinstance(body, Mapping) else body


async def _read(response: aiohttp.ClientResponse, answer: Answer) -> None:
    if "text/event-stream" in response.headers.get("Content-Type", ""):
        async for received in response.content.iter_any():
            answer.feed(received, perf_counter())
        answer.end(perf_counter())
        return
    text = await response.text(errors="replace")
    body = _decode(text)
    if not isinstance(body, Mapping) or "choices" not in body:
        raise StreamFailed("not an answer", text[:MAX_EXCERPT])
    answer.read_body(body)


def _status_error(status: int, text: str) -> tuple[str, str]:
    body = _decode(text)
    error: Any = text
    if isinstance(body, Mapping):
        error = body.get("error", body.get("detail", text))
    return describe_error(error, f"http {status}")


def _model_names(body: Any) -> list[str]:
    models = body.get("data") if isinstance(body, Mapping) else None
    if not isinstance(models, list):
        return []
    return [str(model.get("id")) for model in models if isinstance(model, Mapping)]


def _served(model: str, names: list[str]) -> str:
    """Name the served model that is nearest to `model`, and list the others."""
    guess = nearest(model, names)
    # Without a near match, `nearest` lists the names itself.
    if not guess.startswith("did you mean"):
        return guess
    return f"{guess} It serves: {', '.join(sorted(names)[:MAX_MODELS_IN_MESSAGE])}."


def _decode(text: str) -> Any:
    """Return the JSON value of `text`, or the beginning of `text` if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text[:MAX_MESSAGE]
