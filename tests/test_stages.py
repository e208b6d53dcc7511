"""The stages of a request as a watcher sees them, and what a missing watcher costs: nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from infer_align import stages
from infer_align.stages import Fail


class Notes:
    """A watcher that writes down what it sees."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, name: str, subject: str) -> AbstractContextManager[Fail]:
        return self._stage(f"{name} {subject}".strip())

    @contextmanager
    def _stage(self, line: str) -> Iterator[Fail]:
        self.lines.append(f"begin {line}")
        yield lambda error_type: self.lines.append(f"{line} failed: {error_type}")
        self.lines.append(f"end {line}")

    def headers(self) -> Mapping[str, str]:
        return {"traceparent": "00-1-2-01"}


def test_a_watcher_sees_the_stages_of_its_own_task_only() -> None:
    notes = Notes()

    async def watched() -> Mapping[str, str]:
        stages.watcher.set(notes)
        with stages.stage("draw"), stages.stage("reward", "quality") as fail:
            fail("ValueError")
        return stages.trace_headers()

    async def both() -> tuple[Mapping[str, str], Mapping[str, str]]:
        headers = await asyncio.create_task(watched())
        with stages.stage("select") as fail:
            fail("ignored")
        return headers, stages.trace_headers()

    assert asyncio.run(both()) == ({"traceparent": "00-1-2-01"}, {})
    assert notes.lines == [
        "begin draw",
        "begin reward quality",
        "reward quality failed: ValueError",
        "end reward quality",
        "end draw",
    ]
