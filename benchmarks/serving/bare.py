"""The baseline of the overhead benchmark: the same fake engine behind a bare FastAPI route."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI

from infer_align.engines.fake import Fake
from infer_align.types import Candidate, Draw

app = FastAPI()
engine = Fake().load()


@app.get("/ready")
async def ready() -> dict[str, bool]:
    return {"ready": True}


@app.post("/v1/chat/completions")
async def chat(body: dict[str, Any]) -> dict[str, Any]:
    async with engine.sample(Draw({"messages": body["messages"]}, n=1, seeds=(0,))) as stream:
        async for event in stream:
            if isinstance(event, Candidate):
                return {
                    "id": "chatcmpl-0",
                    "object": "chat.completion",
                    "choices": [{"index": 0, **event.choice}],
                }
    raise RuntimeError("no candidate")


if __name__ == "__main__":
    asyncio.run(engine.start())
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
