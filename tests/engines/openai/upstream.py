"""A real HTTP upstream that behaves as it is told: well, slowly, wrongly, or not at all. It keeps what it was sent."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

Body = dict[str, Any]
JSON = (b"content-type", b"application/json")
SSE = (b"content-type", b"text/event-stream")


class Upstream:
    """Candidate i of call c says "candidate <number>", numbers from `numbers`, in the order they are asked for.

    `behave(call, body)` names what becomes of each generating call: "ok" or a method of `Faults`.
    """

    def __init__(self) -> None:
        self.models: list[Body] = [{"id": "up", "object": "model", "max_model_len": 1000}]
        self.numbers = [3, 1, 9, 9, 5, 2, 7, 4]
        self.most: int | None = None  # choices a call gives at most
        self.refuse_n = False
        self.behave: Callable[[int, Body], str] = lambda _, __: "ok"
        self.extra_choice: Body = {}
        self.extra: Body = {}
        self.details: Body = {}  # of the usage
        self.words_seconds = 0.0
        self.answer: Callable[[str, Body], Body] | None = None  # instead of candidates
        self.port = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was sent."""
        self.bodies: list[Body] = []
        self.paths: list[str] = []
        self.asked: list[str] = []  # method, path and query
        self.headers: list[dict[str, str]] = []
        self.raw: list[bytes] = []
        self.running = 0
        self.said = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def calls(self) -> int:
        return len(self.bodies)

    def until(self, condition: Callable[[], bool], seconds: float = 2.0) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] == "GET" and scope["path"].endswith("/models"):
            await reply(send, 200, {"object": "list", "data": self.models})
            return
        content = b""
        while True:
            message = await receive()
            content += message.get("body", b"")
            if not message.get("more_body"):
                break
        call, body = self.calls, json.loads(content or b"{}")
        self.raw.append(content)
        self.bodies.append(body)
        self.paths.append(scope["path"])
        self.asked.append(
            f"{scope['method']} {scope['path']}?{scope['query_string'].decode()}".rstrip("?")
        )
        self.headers.append({k.decode(): v.decode() for k, v in scope["headers"]})
        self.running += 1
        work = asyncio.create_task(self._work(call, body, scope, send))
        gone = asyncio.create_task(receive())  # the next message is the disconnect
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
        self.running -= 1

    async def _work(self, call: int, body: Body, scope: Any, send: Any) -> None:
        name = self.behave(call, body)
        if name != "ok":
            await getattr(Faults, name)(self, body, send)
        elif self.answer:
            await reply(send, 200, self.answer(scope["path"], body))
        elif self.refuse_n and body.get("n", 1) > 1:
            await reply(
                send, 400, {"error": {"message": "n must be 1", "param": "n", "code": "bad_n"}}
            )
        else:
            await self._speak(body, send, chat=scope["path"].endswith("/chat/completions"))

    def _texts(self, body: Body) -> list[str]:
        n = min(body.get("n", 1), self.most or 10**6)
        texts = [f"candidate {self.numbers[(self.said + i) % len(self.numbers)]}" for i in range(n)]
        self.said += n
        return texts

    async def _speak(self, body: Body, send: Any, *, chat: bool) -> None:
        texts = self._texts(body)
        usage = {
            "prompt_tokens": 5,
            "completion_tokens": 2 * len(texts),
            "total_tokens": 5 + 2 * len(texts),
            **self.details,
        }
        head = {"id": "x", "model": body.get("model"), "created": 1, **self.extra}
        if not body.get("stream"):
            await asyncio.sleep(self.words_seconds * 2)
            await reply(
                send,
                200,
                {
                    **head,
                    "choices": [self._choice(i, t, chat) for i, t in enumerate(texts)],
                    "usage": usage,
                },
            )
            return
        await start(send, 200, SSE)
        for i in range(len(texts)):
            await event(
                send,
                {
                    **head,
                    "choices": [
                        {
                            "index": i,
                            **(
                                {"delta": {"role": "assistant", "content": ""}}
                                if chat
                                else {"text": ""}
                            ),
                        }
                    ],
                },
            )
        words = [text.split(" ") for text in texts]
        for place in range(2):
            await asyncio.sleep(self.words_seconds)
            for i, each in enumerate(words):
                piece = each[place] if not place else f" {each[place]}"
                await event(
                    send,
                    {
                        **head,
                        "choices": [
                            {
                                "index": i,
                                **({"delta": {"content": piece}} if chat else {"text": piece}),
                                "finish_reason": None,
                            }
                        ],
                    },
                )
        for i in range(len(texts)):
            await event(
                send,
                {
                    **head,
                    "choices": [
                        {
                            "index": i,
                            **({"delta": {}} if chat else {"text": ""}),
                            "finish_reason": "stop",
                            **self.extra_choice,
                        }
                    ],
                },
            )
        if (body.get("stream_options") or {}).get("include_usage"):
            await event(send, {**head, "choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def _choice(self, i: int, text: str, chat: bool) -> Body:
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {"index": i, **said, "logprobs": None, "finish_reason": "stop", **self.extra_choice}


class Faults:
    """What an upstream can do wrong."""

    @staticmethod
    async def error_500(_: Upstream, __: Body, send: Any) -> None:
        await reply(
            send,
            500,
            {
                "error": {
                    "message": "the GPU is on fire",
                    "type": "server_error",
                    "param": None,
                    "code": None,
                }
            },
        )

    @staticmethod
    async def error_400(_: Upstream, __: Body, send: Any) -> None:
        await reply(
            send,
            400,
            {
                "error": {
                    "message": "top_p is 7, which is too much",
                    "param": "top_p",
                    "code": "bad_top_p",
                }
            },
        )

    @staticmethod
    async def newer_limit(_: Upstream, __: Body, send: Any) -> None:
        told = {
            "message": "Unsupported parameter: use 'max_completion_tokens' instead.",
            "param": "max_tokens",
            "code": "unsupported",
        }
        await reply(send, 400, {"error": told})

    @staticmethod
    async def echo(_: Upstream, body: Body, send: Any) -> None:
        await reply(
            send,
            400,
            {"error": {"message": f"I refuse {json.dumps(body)}", "param": None, "code": None}},
        )

    @staticmethod
    async def no_stream_options(_: Upstream, __: Body, send: Any) -> None:
        await reply(
            send,
            400,
            {"error": {"message": "Unrecognized request argument supplied: stream_options"}},
        )

    @staticmethod
    async def error_401(_: Upstream, __: Body, send: Any) -> None:
        await reply(
            send, 401, {"error": {"message": "Incorrect API key provided: sk-upstream-secret"}}
        )

    @staticmethod
    async def error_404(_: Upstream, __: Body, send: Any) -> None:
        await reply(
            send,
            404,
            {"error": {"message": "The model `up` does not exist.", "code": "model_not_found"}},
        )

    @staticmethod
    async def error_422(_: Upstream, __: Body, send: Any) -> None:
        await reply(
            send, 422, {"detail": [{"loc": ["body", "temperature"], "msg": "not a number"}]}
        )

    @staticmethod
    async def error_429(_: Upstream, __: Body, send: Any) -> None:
        await reply(send, 429, {"error": {"message": "slow down"}}, (b"retry-after", b"1"))

    @staticmethod
    async def error_429_long(_: Upstream, __: Body, send: Any) -> None:
        await reply(send, 429, {"error": {"message": "slow down"}}, (b"retry-after", b"77"))

    @staticmethod
    async def error_502(_: Upstream, __: Body, send: Any) -> None:
        await start(send, 502, (b"content-type", b"text/html"))
        await send({"type": "http.response.body", "body": b"<html>bad gateway</html>"})

    @staticmethod
    async def error_503(_: Upstream, __: Body, send: Any) -> None:
        await reply(send, 503, {"message": "loading"}, (b"retry-after", b"0"))

    @staticmethod
    async def error_504(_: Upstream, __: Body, send: Any) -> None:
        await reply(send, 504, {"error": "too late"})

    @staticmethod
    async def redirect(_: Upstream, __: Body, send: Any) -> None:
        await start(send, 307, (b"location", b"http://127.0.0.1:1/elsewhere"))
        await send({"type": "http.response.body", "body": b""})

    @staticmethod
    async def hang(_: Upstream, __: Body, ___: Any) -> None:
        await asyncio.sleep(60)

    @staticmethod
    async def drip(_: Upstream, body: Body, send: Any) -> None:
        if not body.get("stream"):
            await asyncio.sleep(60)
        await start(send, 200, SSE)
        for i in range(400):
            await event(
                send,
                {"choices": [{"index": 0, "delta": {"content": f"{i} "}, "finish_reason": None}]},
            )
            await asyncio.sleep(0.15)

    @staticmethod
    async def garbage(_: Upstream, __: Body, send: Any) -> None:
        await start(send, 200, JSON)
        await send({"type": "http.response.body", "body": b'{"choices": [{"mess'})

    @staticmethod
    async def html(_: Upstream, __: Body, send: Any) -> None:
        await start(send, 200, (b"content-type", b"text/html"))
        await send(
            {"type": "http.response.body", "body": b"<html>welcome to the captive portal</html>"}
        )

    @staticmethod
    async def error_in_200(_: Upstream, __: Body, send: Any) -> None:
        await reply(send, 200, {"error": {"message": "no credits left"}})

    @staticmethod
    async def no_choices(_: Upstream, __: Body, send: Any) -> None:
        await reply(send, 200, {"choices": []})

    @staticmethod
    async def truncated(_: Upstream, body: Body, send: Any) -> None:
        """Breaks off in the middle of the answer."""
        if body.get("stream"):
            await start(send, 200, SSE)
            await event(
                send,
                {"choices": [{"index": 0, "delta": {"content": "half an"}, "finish_reason": None}]},
            )
            await asyncio.sleep(0.2)
        else:
            await start(send, 200, JSON, (b"content-length", b"1000"))
            await send({"type": "http.response.body", "body": b'{"choices"', "more_body": True})
        send.__self__.transport.close()

    @staticmethod
    async def ended_early(_: Upstream, __: Body, send: Any) -> None:
        """A stream that ends, as HTTP goes, well, but without its end."""
        await start(send, 200, SSE)
        await event(
            send,
            {"choices": [{"index": 0, "delta": {"content": "half an"}, "finish_reason": None}]},
        )
        await asyncio.sleep(0.2)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def message_missing(_: Upstream, __: Body, send: Any) -> None:
        await reply(send, 200, {"choices": [{"index": 0, "finish_reason": "stop"}]})

    @staticmethod
    async def message_of_text(_: Upstream, __: Body, send: Any) -> None:
        await reply(
            send, 200, {"choices": [{"index": 0, "message": "hello", "finish_reason": "stop"}]}
        )

    @staticmethod
    async def infinite(_: Upstream, __: Body, send: Any) -> None:
        logprobs = {
            "content": [{"token": "a", "logprob": float("-inf")}]
        }  # json.dumps writes -Infinity
        await reply(
            send,
            200,
            {"choices": [{"index": 0, "message": {"content": "a"}, "logprobs": logprobs}]},
        )

    @staticmethod
    async def half_a_character(_: Upstream, __: Body, send: Any) -> None:
        await reply(
            send,
            200,
            {"choices": [{"index": 0, "message": {"content": "\ud83d"}, "finish_reason": "stop"}]},
        )

    @staticmethod
    async def choices_of_text(_: Upstream, __: Body, send: Any) -> None:
        await reply(send, 200, {"choices": ["hello"]})

    @staticmethod
    async def a_list(_: Upstream, __: Body, send: Any) -> None:
        await reply(send, 200, [1, 2])

    @staticmethod
    async def sse_as_json(_: Upstream, __: Body, send: Any) -> None:
        await start(send, 200, JSON)
        await send(
            {"type": "http.response.body", "body": b'data: {"choices": []}\n\ndata: [DONE]\n\n'}
        )

    @staticmethod
    async def half_flawed(app: Upstream, body: Body, send: Any) -> None:
        """Every second choice is one; and the number of tokens is none."""
        good = [app._choice(i, text, True) for i, text in enumerate(app._texts(body))]
        bad: list[Any] = [
            {"index": 1, "message": None},
            {"index": 3},
            {"index": 5, "message": {"content": 5}},
            {"index": 7, "message": []},
        ]
        choices = [good[i] if i % 2 == 0 else bad[i // 2] for i in range(len(good))]
        await reply(
            send, 200, {"choices": choices, "usage": {"prompt_tokens": 5, "completion_tokens": -5}}
        )

    @staticmethod
    async def _half(app: Upstream, body: Body, send: Any) -> None:
        """The first half of the choices to their end, of the others a beginning."""
        await start(send, 200, SSE)
        for i, text in enumerate(app._texts(body)):
            await event(
                send, {"choices": [{"index": i, "delta": {"content": text}, "finish_reason": None}]}
            )
            if i < body["n"] / 2:
                await event(send, {"choices": [{"index": i, "delta": {}, "finish_reason": "stop"}]})

    @staticmethod
    async def half_then_broken(app: Upstream, body: Body, send: Any) -> None:
        await Faults._half(app, body, send)
        await asyncio.sleep(0.2)
        send.__self__.transport.close()

    @staticmethod
    async def half_then_drip(app: Upstream, body: Body, send: Any) -> None:
        await Faults._half(app, body, send)
        for _ in range(100):
            await asyncio.sleep(0.1)
            await event(
                send,
                {
                    "choices": [
                        {"index": body["n"] - 1, "delta": {"content": " 0"}, "finish_reason": None}
                    ]
                },
            )

    @staticmethod
    async def garbage_in_stream(_: Upstream, __: Body, send: Any) -> None:
        await start(send, 200, SSE)
        await event(
            send,
            {"choices": [{"index": 0, "delta": {"content": "half an"}, "finish_reason": None}]},
        )
        await asyncio.sleep(0.2)
        await send(
            {"type": "http.response.body", "body": b"data: {nonsense\n\n", "more_body": True}
        )
        await asyncio.sleep(60)

    @staticmethod
    async def odd_in_stream(_: Upstream, __: Body, send: Any) -> None:
        """JSON, and of the wrong shape."""
        await start(send, 200, SSE)
        await event(
            send,
            {"choices": [{"index": 0, "delta": {"content": "half an"}, "finish_reason": None}]},
        )
        await asyncio.sleep(0.2)
        await event(send, {"choices": [{"index": 0, "delta": 7}]})
        await event(send, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    @staticmethod
    async def slow_reset(_: Upstream, __: Body, send: Any) -> None:
        """The connection is lost after a while: the work may have been done."""
        await asyncio.sleep(0.4)
        send.__self__.transport.abort()

    @staticmethod
    async def reset(_: Upstream, __: Body, send: Any) -> None:
        """The connection is lost before the answer begins."""
        send.__self__.transport.abort()


async def start(send: Any, status: int, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})


async def reply(send: Any, status: int, body: Any, *headers: tuple[bytes, bytes]) -> None:
    await start(send, status, JSON, *headers)
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


async def event(send: Any, chunk: Body) -> None:
    await send(
        {
            "type": "http.response.body",
            "body": b"data: " + json.dumps(chunk).encode() + b"\n\n",
            "more_body": True,
        }
    )


@contextmanager
def upstream() -> Iterator[Upstream]:
    """One that runs."""
    app = Upstream()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            port=0,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    app.port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield app
    finally:
        server.should_exit = True
        thread.join(10)
