"""An upstream that answers at once, or after as long as the model's name says ("slow-2.0"), and scores after 0.1 s."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvicorn

JUDGE_SECONDS = 0.1
MODELS = [{"id": "instant", "max_model_len": 4096}, {"id": "slow-2.0", "max_model_len": 4096}]


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    content, more = b"", True
    while more:
        message = await receive()
        content, more = content + message.get("body", b""), message.get("more_body", False)
    answer = await _answer(scope["path"], json.loads(content) if content else {})
    body = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if path.endswith("/models"):
        return {"object": "list", "data": MODELS}
    if path == "/classify":
        await asyncio.sleep(JUDGE_SECONDS)
        return {
            "data": [{"index": 0, "probs": [float(len(body["messages"][-1]["content"]))]}],
            "usage": {"total_tokens": 9},
        }
    _, _, seconds = body.get("model", "").partition("slow-")
    if seconds:
        await asyncio.sleep(float(seconds))
    n = body.get("n", 1)
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": f"an answer{' indeed' * i}."},
            "finish_reason": "stop",
        }
        for i in range(n)
    ]
    usage = {"prompt_tokens": 12, "completion_tokens": 4 * n, "total_tokens": 12 + 4 * n}
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "instant",
        "choices": choices,
        "usage": usage,
    }


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
