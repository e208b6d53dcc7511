"""A fake upstream: a real HTTP server that answers well, slowly, wrongly or not at all.

It records the requests that it gets.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from tests.threaded_server import ThreadedServer

Body = dict[str, Any]
Behaviour: TypeAlias = "Callable[[FakeUpstream, Body, Any], Awaitable[None]]"
Header = tuple[bytes, bytes]
JSON: Header = (b"content-type", b"application/json")
SSE: Header = (b"content-type", b"text/event-stream")


class FakeUpstream:
    """An ASGI app. Candidate i of the test says "candidate <number>", with the numbers in order.

    Attributes:
        models: the entries of /models.
        numbers: the numbers of the candidates.
        seeded: True to make the numbers from the seeds of the calls instead.
        behave: names what becomes of a call: "ok", a method of `Faults`, or a function like one.
        answer: gives the JSON of an answer instead of candidates.
        max_choices: largest number of choices that a call returns.
        refuse_n: True to refuse calls for several choices.
        extra: fields added to each answer.
        extra_choice: fields added to each choice.
        usage_details: fields added to the usage.
        word_seconds: pause before each word.
        reader_is_ready: set by a test once it has read the stream so far; see `pause`.
    """

    def __init__(self) -> None:
        self.numbers = [3, 1, 9, 9, 5, 2, 7, 4]
        self.port = 0
        self.running = 0
        self.reset()

    def reset(self) -> None:
        """Behave well and forget all requests."""
        self.models: list[Body] = [{"id": "up", "object": "model", "max_model_len": 1000}]
        self.behave: Callable[[int, Body], str | Behaviour] = lambda _, __: "ok"
        self.answer: Callable[[str, Body], Body] | None = None
        self.seeded = False
        self.max_choices: int | None = None
        self.refuse_n = False
        self.extra: Body = {}
        self.extra_choice: Body = {}
        self.usage_details: Body = {}
        self.word_seconds = 0.0
        self.reader_is_ready: threading.Event | None = None
        self.clear_log()

    def clear_log(self) -> None:
        """Forget all requests."""
        self.bodies: list[Body] = []
        self.paths: list[str] = []
        # Method, path and query.
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.raw: list[bytes] = []
        self.texts_sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def calls(self) -> int:
        return len(self.bodies)

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> bool:
        """Return True as soon as the condition holds, False after a time that is never needed."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    async def pause(self) -> None:
        """Wait until the reader has what was sent: by the test's event, or for a moment."""
        if self.reader_is_ready is None:
            await asyncio.sleep(0.2)
            return
        while not self.reader_is_ready.is_set():
            await asyncio.sleep(0.005)

    # --- the ASGI app ---

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] == "GET" and scope["path"].endswith("/models"):
            await reply(send, 200, {"object": "list", "data": self.models})
            return
        content = await _read(receive)
        call = self.calls
        body = _parse(content)
        self._log(scope, content, body)
        self.running += 1
        work = asyncio.create_task(self._respond(call, body, scope["path"], send))
        # The next message is the disconnect.
        disconnect = asyncio.create_task(receive())
        await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        for task in (work, disconnect):
            task.cancel()
        await asyncio.gather(work, disconnect, return_exceptions=True)
        self.running -= 1

    def _log(self, scope: Any, content: bytes, body: Body) -> None:
        query = scope["query_string"].decode()
        self.requests.append(f"{scope['method']} {scope['path']}?{query}".rstrip("?"))
        self.paths.append(scope["path"])
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        self.raw.append(content)
        self.bodies.append(body)

    async def _respond(self, call: int, body: Body, path: str, send: Any) -> None:
        behaviour = self.behave(call, body)
        if callable(behaviour):
            await behaviour(self, body, send)
        elif behaviour != "ok":
            await getattr(Faults, behaviour)(self, body, send)
        elif self.answer:
            await reply(send, 200, self.answer(path, body))
        elif self.refuse_n and body.get("n", 1) > 1:
            error = {"message": "n must be 1", "param": "n", "code": "bad_n"}
            await reply(send, 400, {"error": error})
        else:
            await self._send_candidates(body, send, chat=path.endswith("/chat/completions"))

    # --- candidates ---

    def next_texts(self, body: Body) -> list[str]:
        """Return the texts of a call."""
        n = min(body.get("n", 1), self.max_choices or 10**6)
        first = self.texts_sent
        self.texts_sent += n
        if self.seeded:
            seed = body.get("seed") or 0
            return [f"candidate {seed + i}" for i in range(n)]
        return [f"candidate {self.numbers[(first + i) % len(self.numbers)]}" for i in range(n)]

    async def _send_candidates(self, body: Body, send: Any, *, chat: bool) -> None:
        texts = self.next_texts(body)
        tokens = 2 * len(texts)
        usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
        usage |= self.usage_details
        head = {"id": "x", "model": body.get("model"), "created": 1, **self.extra}
        if body.get("stream"):
            await self._stream(texts, head, send, chat=chat)
            if (body.get("stream_options") or {}).get("include_usage"):
                await event(send, {**head, "choices": [], "usage": usage})
            await done(send)
            return
        await asyncio.sleep(2 * self.word_seconds)
        choices = [self.choice(i, text, chat=chat) for i, text in enumerate(texts)]
        await reply(send, 200, {**head, "choices": choices, "usage": usage})

    async def _stream(self, texts: list[str], head: Body, send: Any, *, chat: bool) -> None:
        async def send_piece(index: int, text: str | None, **fields: Any) -> None:
            piece: Body = {"text": text or ""}
            if chat:
                piece = {"delta": {} if text is None else {"content": text}}
            await event(send, {**head, "choices": [{"index": index, **piece, **fields}]})

        await start(send, 200, SSE)
        for index in range(len(texts)):
            role = {"delta": {"role": "assistant", "content": ""}} if chat else {}
            await send_piece(index, "", **role)
        for word in range(2):
            await asyncio.sleep(self.word_seconds)
            for index, text in enumerate(texts):
                first, second = text.split(" ")
                await send_piece(index, f" {second}" if word else first, finish_reason=None)
        for index in range(len(texts)):
            await send_piece(index, None, finish_reason="stop", **self.extra_choice)

    def choice(self, index: int, text: str, *, chat: bool) -> Body:
        """Return a complete choice."""
        content: Body = {"text": text}
        if chat:
            content = {"message": {"role": "assistant", "content": text}}
        ending = {"logprobs": None, "finish_reason": "stop", **self.extra_choice}
        return {"index": index, **content, **ending}


class Faults:
    """Wrong behaviours of an upstream."""

    # --- errors with a status ---

    @staticmethod
    async def error_400(_: FakeUpstream, __: Body, send: Any) -> None:
        message = "top_p is 7, which is too much"
        error = {"message": message, "param": "top_p", "code": "bad_top_p"}
        await reply(send, 400, {"error": error})

    @staticmethod
    async def newer_limit(_: FakeUpstream, __: Body, send: Any) -> None:
        message = "Unsupported parameter: use 'max_completion_tokens' instead."
        error = {"message": message, "param": "max_tokens", "code": "unsupported"}
        await reply(send, 400, {"error": error})

    @staticmethod
    async def echo(_: FakeUpstream, body: Body, send: Any) -> None:
        error = {"message": f"I refuse {json.dumps(body)}", "param": None, "code": None}
        await reply(send, 400, {"error": error})

    @staticmethod
    async def no_stream_options(_: FakeUpstream, __: Body, send: Any) -> None:
        message = "Unrecognized request argument supplied: stream_options"
        await reply(send, 400, {"error": {"message": message}})

    @staticmethod
    async def error_401(_: FakeUpstream, __: Body, send: Any) -> None:
        message = "Incorrect API key provided: sk-upstream-secret"
        await reply(send, 401, {"error": {"message": message}})

    @staticmethod
    async def error_404(_: FakeUpstream, __: Body, send: Any) -> None:
        error = {"message": "The model `up` does not exist.", "code": "model_not_found"}
        await reply(send, 404, {"error": error})

    @staticmethod
    async def error_422(_: FakeUpstream, __: Body, send: Any) -> None:
        detail = [{"loc": ["body", "temperature"], "msg": "not a number"}]
        await reply(send, 422, {"detail": detail})

    @staticmethod
    async def error_429(_: FakeUpstream, __: Body, send: Any) -> None:
        await reply(send, 429, {"error": {"message": "slow down"}}, (b"retry-after", b"0.2"))

    @staticmethod
    async def error_429_long(_: FakeUpstream, __: Body, send: Any) -> None:
        await reply(send, 429, {"error": {"message": "slow down"}}, (b"retry-after", b"77"))

    @staticmethod
    async def error_500(_: FakeUpstream, __: Body, send: Any) -> None:
        error = {"type": "server_error", "param": None, "code": None}
        await reply(send, 500, {"error": {"message": "the GPU is on fire", **error}})

    @staticmethod
    async def error_502(_: FakeUpstream, __: Body, send: Any) -> None:
        await start(send, 502, (b"content-type", b"text/html"))
        await body_part(send, b"<html>bad gateway</html>", last=True)

    @staticmethod
    async def error_503(_: FakeUpstream, __: Body, send: Any) -> None:
        await reply(send, 503, {"message": "loading"}, (b"retry-after", b"0"))

    @staticmethod
    async def error_504(_: FakeUpstream, __: Body, send: Any) -> None:
        await reply(send, 504, {"error": "too late"})

    @staticmethod
    async def redirect(_: FakeUpstream, __: Body, send: Any) -> None:
        await start(send, 307, (b"location", b"http://127.0.0.1:1/elsewhere"))
        await body_part(send, b"", last=True)

    # --- answers that are none ---

    @staticmethod
    async def garbage(_: FakeUpstream, __: Body, send: Any) -> None:
        await start(send, 200, JSON)
        await body_part(send, b'{"choices": [{"mess', last=True)

    @staticmethod
    async def html(_: FakeUpstream, __: Body, send: Any) -> None:
        await start(send, 200, (b"content-type", b"text/html"))
        await body_part(send, b"<html>welcome to the captive portal</html>", last=True)

    @staticmethod
    async def sse_as_json(_: FakeUpstream, __: Body, send: Any) -> None:
        await start(send, 200, JSON)
        await body_part(send, b'data: {"choices": []}\n\ndata: [DONE]\n\n', last=True)

    @staticmethod
    async def error_in_200(_: FakeUpstream, __: Body, send: Any) -> None:
        await reply(send, 200, {"error": {"message": "no credits left"}})

    @staticmethod
    async def a_list(_: FakeUpstream, __: Body, send: Any) -> None:
        await reply(send, 200, [1, 2])

    @staticmethod
    async def no_choices(_: FakeUpstream, __: Body, send: Any) -> None:
        await reply(send, 200, {"choices": []})

    # --- choices that are none ---

    @staticmethod
    async def choices_of_text(_: FakeUpstream, __: Body, send: Any) -> None:
        await reply(send, 200, {"choices": ["hello"]})

    @staticmethod
    async def message_missing(_: FakeUpstream, __: Body, send: Any) -> None:
        await reply(send, 200, {"choices": [{"index": 0, "finish_reason": "stop"}]})

    @staticmethod
    async def message_of_text(_: FakeUpstream, __: Body, send: Any) -> None:
        choice = {"index": 0, "message": "hello", "finish_reason": "stop"}
        await reply(send, 200, {"choices": [choice]})

    @staticmethod
    async def infinite(_: FakeUpstream, __: Body, send: Any) -> None:
        # json.dumps writes -Infinity, which is not JSON.
        logprobs = {"content": [{"token": "a", "logprob": float("-inf")}]}
        choice = {"index": 0, "message": {"content": "a"}, "logprobs": logprobs}
        await reply(send, 200, {"choices": [choice]})

    @staticmethod
    async def half_a_character(_: FakeUpstream, __: Body, send: Any) -> None:
        choice = {"index": 0, "message": {"content": "\ud83d"}, "finish_reason": "stop"}
        await reply(send, 200, {"choices": [choice]})

    @staticmethod
    async def half_flawed(app: FakeUpstream, body: Body, send: Any) -> None:
        """Every second choice is malformed, and the number of tokens is negative."""
        choices: list[Any] = []
        malformed = iter([None, "missing", {"content": 5}, []])
        for i, text in enumerate(app.next_texts(body)):
            choice: Body = {"index": i}
            if i % 2 == 0:
                choice = app.choice(i, text, chat=True)
            else:
                message = next(malformed)
                if message != "missing":
                    choice["message"] = message
            choices.append(choice)
        usage = {"prompt_tokens": 5, "completion_tokens": -5}
        await reply(send, 200, {"choices": choices, "usage": usage})

    # --- no answer, and slow ones ---

    @staticmethod
    async def hang(_: FakeUpstream, __: Body, ___: Any) -> None:
        await asyncio.Event().wait()

    @staticmethod
    async def drip(_: FakeUpstream, body: Body, send: Any) -> None:
        """Stream a word every 0.15 s. Without a stream, hang."""
        if not body.get("stream"):
            await asyncio.Event().wait()
        await start(send, 200, SSE)
        for i in range(400):
            await delta(send, 0, f"{i} ")
            await asyncio.sleep(0.15)

    # --- answers that break off ---

    @staticmethod
    async def reset(_: FakeUpstream, __: Body, send: Any) -> None:
        """Lose the connection at once."""
        send.__self__.transport.abort()

    @staticmethod
    async def slow_reset(_: FakeUpstream, __: Body, send: Any) -> None:
        """Lose the connection after a while, when the work may have been done."""
        await asyncio.sleep(0.4)
        send.__self__.transport.abort()

    @staticmethod
    async def truncated(app: FakeUpstream, body: Body, send: Any) -> None:
        """Lose the connection in the middle of the answer."""
        if body.get("stream"):
            await start(send, 200, SSE)
            await delta(send, 0, "half an")
            await app.pause()
        else:
            await start(send, 200, JSON, (b"content-length", b"1000"))
            await body_part(send, b'{"choices"')
        send.__self__.transport.close()

    @staticmethod
    async def ended_early(app: FakeUpstream, __: Body, send: Any) -> None:
        """End the HTTP response properly in the middle of the answer."""
        await start(send, 200, SSE)
        await delta(send, 0, "half an")
        await app.pause()
        await body_part(send, b"", last=True)

    @staticmethod
    async def garbage_in_stream(app: FakeUpstream, __: Body, send: Any) -> None:
        await start(send, 200, SSE)
        await delta(send, 0, "half an")
        await app.pause()
        await body_part(send, b"data: {nonsense\n\n")
        await asyncio.Event().wait()

    @staticmethod
    async def odd_in_stream(app: FakeUpstream, __: Body, send: Any) -> None:
        """Send JSON of the wrong shape."""
        await start(send, 200, SSE)
        await delta(send, 0, "half an")
        await app.pause()
        await event(send, {"choices": [{"index": 0, "delta": 7}]})
        await finish(send, 0)
        await done(send)

    @staticmethod
    async def half_then_broken(app: FakeUpstream, body: Body, send: Any) -> None:
        """Finish the first half of the choices, then lose the connection."""
        await Faults._half(app, body, send)
        await app.pause()
        send.__self__.transport.close()

    @staticmethod
    async def half_then_drip(app: FakeUpstream, body: Body, send: Any) -> None:
        """Finish the first half of the choices, then stream one word of the last every 0.1 s."""
        await Faults._half(app, body, send)
        for _ in range(100):
            await asyncio.sleep(0.1)
            await delta(send, body["n"] - 1, " 0")

    @staticmethod
    async def _half(app: FakeUpstream, body: Body, send: Any) -> None:
        await start(send, 200, SSE)
        for i, text in enumerate(app.next_texts(body)):
            await delta(send, i, text)
            if i < body["n"] / 2:
                await finish(send, i)


# --- messages of a response ---


def _parse(content: bytes) -> Body:
    """Return the fields of a JSON object; {} for any other body, such as a file."""
    try:
        body = json.loads(content)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


async def _read(receive: Any) -> bytes:
    content = b""
    while True:
        message = await receive()
        content += message.get("body", b"")
        if not message.get("more_body"):
            return content


async def start(send: Any, status: int, *headers: Header) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})


async def body_part(send: Any, content: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": not last})


async def reply(send: Any, status: int, body: Any, *headers: Header) -> None:
    await start(send, status, JSON, *headers)
    await body_part(send, json.dumps(body).encode(), last=True)


async def event(send: Any, chunk: Body) -> None:
    await body_part(send, b"data: " + json.dumps(chunk).encode() + b"\n\n")


async def delta(send: Any, index: int, text: str) -> None:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": None}
    await event(send, {"choices": [choice]})


async def finish(send: Any, index: int) -> None:
    await event(send, {"choices": [{"index": index, "delta": {}, "finish_reason": "stop"}]})


async def done(send: Any) -> None:
    await body_part(send, b"data: [DONE]\n\n", last=True)


@contextmanager
def fake_upstream() -> Iterator[FakeUpstream]:
    """Run a fake upstream on a free port."""
    app = FakeUpstream()
    server = ThreadedServer(app, lifespan="off", timeout_graceful_shutdown=1)
    app.port = server.port
    try:
        yield app
    finally:
        server.end()
