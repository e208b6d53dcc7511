"""Every prompt under every setting, each answer scored and on disk before the next one is counted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from infer_align.errors import ConfigError
from infer_align_bench.endpoint import Endpoint
from infer_align_bench.events import Answer, described
from infer_align_bench.load import until
from infer_align_bench.quality.gold import Gold
from infer_align_bench.quality.grid import Cell
from infer_align_bench.types import Prompt

DRAW_STRIDE = 1_000_003  # between the seeds of one prompt's draws: more than there are prompts
REFUSED = (400, 404, 413, 422)  # asked wrongly, or more than it can do: asking again will not help

IGNORED = "the endpoint ignored `align`: its answer carries none, and would count as one that was aligned"


@dataclass(frozen=True, slots=True)
class Row:
    """One scored answer."""

    key: str  # digest of the setting and the prompt: what may be taken up by another run
    cell: str
    prompt: int
    draw: int
    text: str
    gold: float | None  # None: the scorer has no opinion
    spent: int
    returned: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """One answer that is wanted."""

    cell: Cell
    prompt: int
    draw: int
    key: str


class Notebook:
    """The finished rows of a file, one JSON line each; a first line says what they were made with."""

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        self.rows: dict[tuple[str, int], Row] = {}
        self._path = path
        if path.exists() and path.stat().st_size:
            self._take_up(made_with)
        else:
            path.write_text(json.dumps({"made_with": made_with}) + "\n", encoding="utf-8")

    def _take_up(self, made_with: Mapping[str, Any]) -> None:
        lines = self._path.read_text(encoding="utf-8").split("\n")
        try:
            before = json.loads(lines[0])["made_with"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self._path} is no notebook of `bench quality`; name another with --notebook.") from None
        if before != dict(made_with):
            changed = sorted(key for key in {*before, *made_with} if before.get(key) != made_with.get(key))
            raise ConfigError(
                f"{self._path} was made with another {', '.join(changed)}; remove it, or name another with --notebook."
            )
        if lines[-1]:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n")
        for line in lines[1:]:
            with suppress(ValueError, TypeError):  # the last line of a run that was killed may be half a line
                row = Row(**json.loads(line))
                self.rows[row.key, row.draw] = row

    def add(self, row: Row) -> None:
        """Keep it, on disk first."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        self.rows[row.key, row.draw] = row


def work(cells: Sequence[Cell], prompts: Sequence[Prompt], draws: int, seed: int) -> list[Work]:
    """All that is wanted: prompt by prompt, the settings of each in another order, so that a slow hour falls on all of them."""
    found = []
    for draw in range(draws):
        for i, prompt in enumerate(prompts):
            each = [Work(cell, i, draw, _key(cell, prompt)) for cell in cells]
            random.Random(f"{seed}/{draw}/{i}").shuffle(each)  # noqa: S311 - an order, no secret
            found += each
    return found


def _key(cell: Cell, prompt: Prompt) -> str:
    said = json.dumps([cell.align, cell.body, prompt.messages, prompt.body], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


class Runner:
    """Carries out work, `concurrency` answers at a time."""

    def __init__(self, endpoint: Endpoint, gold: Gold, prompts: Sequence[Prompt], notebook: Notebook) -> None:
        self.refused: dict[str, str] = {}  # cell -> why
        self.failed: dict[str, list[str]] = {}  # cell -> what failed, one at a time
        self.endpoint, self._gold, self._prompts, self._notebook = endpoint, gold, prompts, notebook

    async def run(self, wanted: Sequence[Work], concurrency: int, stop: asyncio.Event, on_row: Callable[[], None]) -> bool:
        """Do what is not yet in the notebook; -> whether it was stopped.

        Raises:
            AlignError: the scorer failed, or the endpoint is gone.
        """
        left = iter([one for one in wanted if (one.key, one.draw) not in self._notebook.rows])

        async def worker() -> None:
            for one in left:
                if one.cell.name not in self.refused:
                    await self._one(one)
                on_row()

        async def workers() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(worker())

        return not await until(stop, workers())

    async def _one(self, one: Work) -> None:
        prompt = self._prompts[one.prompt]
        body = self.endpoint.body(prompt, one.prompt + one.draw * DRAW_STRIDE) | dict(one.cell.body)
        if one.cell.align is not None:
            body["align"] = one.cell.align
        started = perf_counter()
        status, answer = await self.endpoint.call("chat/completions", body)
        seconds = perf_counter() - started
        text = _text(answer)
        if status != 200 or text is None:
            said = ": ".join(described(answer.get("error") if isinstance(answer, Mapping) else answer, f"status {status}"))
            if status in REFUSED:
                self.refused.setdefault(one.cell.name, said)
            else:
                self.failed.setdefault(one.cell.name, []).append(said)
            return
        if one.cell.align and one.cell.align.get("details") != "none" and "align" not in answer:
            self.refused.setdefault(one.cell.name, IGNORED)
            return
        told = Answer()
        told.whole(answer)
        _, spent, returned = told.tokens()
        score = await self._gold(prompt.messages, text)
        known = score if score == score else None  # noqa: PLR0124 - NaN
        self._notebook.add(Row(one.key, one.cell.name, one.prompt, one.draw, text, known, spent or 0, returned or 0, seconds))


def _text(answer: Any) -> str | None:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else ""
