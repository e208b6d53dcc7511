"""Serve an upstream of known speed.

It answers at once, or after the seconds in the model's name ("slow-2.0"). A score takes 0.1 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import uvicorn

JUDGE_SECONDS = 0.1
MODELS = [{"id": "instant", "max_model_len": 4096}, {"id": "slow-2.0", "max_model_len": 4096}]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer one request (ASGI)."""
    if scope["type"] != "http":
        return
    body = await _read_body(receive)
    answer = await _answer(scope["path"], body)
    content = json.dumps(answer).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _read_body(receive: Any) -> dict[str, Any]:
    content = b""
    more = True
    while more:
        message = await receive()
        content += message.get("body", b"")
        more = message.get("more_body", False)
    body: dict[str, Any] = json.loads(content) if content else {}
    return body


async def _answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if path.endswith("/models"):
        return {"object": "list", "data": MODELS}
    if path == "/classify":
        await asyncio.sleep(JUDGE_SECONDS)
        score = float(len(body["messages"][-1]["content"]))
        return {"data": [{"index": 0, "probs": [score]}], "usage": {"total_tokens": 9}}
    _, _, seconds = body.get("model", "").partition("slow-")
    if seconds:
        await asyncio.sleep(float(seconds))
    return _completion(body.get("n", 1))


def _completion(n: int) -> dict[str, Any]:
    """Return a chat completion with n choices of different length."""
    choices = []
    for i in range(n):
        message = {"role": "assistant", "content": f"an answer{' indeed' * i}."}
        choices.append({"index": i, "message": message, "finish_reason": "stop"})
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "instant",
        "choices": choices,
        "usage": {"prompt_tokens": 12, "completion_tokens": 4 * n, "total_tokens": 12 + 4 * n},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    uvicorn.run(app, port=parser.parse_args().port, log_level="warning")
