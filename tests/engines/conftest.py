"""Draws, and the transformers engine on tiny models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import MappingProxyType
from typing import Any

import pytest

from infer_align.engines.transformers import Transformers
from infer_align.types import Draw


@pytest.fixture(scope="session")
def draw() -> Callable[..., Draw]:
    """Return a draw: `draw("words", n=2, seed=7, temperature=0, kind="completion")`."""

    def make(
        text: str = "the cat", n: int = 1, seed: int = 0, kind: Any = "chat", **fields: Any
    ) -> Draw:
        prompt = (
            {"messages": [{"role": "user", "content": text}]}
            if kind == "chat"
            else {"prompt": text}
        )
        return Draw({**prompt, **fields}, n, tuple(seed + i for i in range(n)), kind)

    return make


@pytest.fixture(scope="session")
def serving(language_model: Callable[..., str]) -> Callable[..., AbstractAsyncContextManager[Any]]:
    """Serve a tiny model: `async with serving("GPT2", prefill_tokens=16) as engine`."""

    @asynccontextmanager
    async def serve(
        architecture: str = "Llama",
        model: str | None = None,
        values: Any = MappingProxyType({}),
        **config: Any,
    ) -> AsyncIterator[Any]:
        engine = Transformers(model=model or language_model(architecture), **config).load()
        engine.values = values
        await engine.start()
        try:
            yield engine
        finally:
            await engine.close()

    return serve
