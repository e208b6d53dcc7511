"""Serve the fake engine behind a bare FastAPI route: the baseline of the overhead benchmark."""

from __future__ import annotations

import argparse
import asyncio
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
    draw = Draw({"messages": body["messages"]}, n=1, seeds=(0,))
    async with engine.sample(draw) as stream:
        async for event in stream:
            if isinstance(event, Candidate):
                choices = [{"index": 0, **event.choice}]
                return {"id": "chatcmpl-0", "object": "chat.completion", "choices": choices}
    raise RuntimeError("the engine returned no candidate")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    asyncio.run(engine.start())
    uvicorn.run(app, port=options.port, log_level="warning")
