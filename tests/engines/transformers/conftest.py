"""Waiting for a state of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], Any]], Awaitable[None]]:
    """`await until(condition)`: wait until the condition holds; fail after 60 seconds."""

    async def wait(condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.001)

    return wait


@pytest.fixture(scope="session")
def running() -> Callable[[Any], int]:
    """`running(engine)`: the number of rows in the engine's batch."""

    def count(engine: Any) -> int:
        return len(engine._started.scheduler._batch.rows)

    return count
