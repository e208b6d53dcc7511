"""Every prompt under every setting, each answer scored and on disk before the next one is counted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from infer_align.errors import AlignError, ConfigError
from infer_align_bench.endpoint import Endpoint
from infer_align_bench.events import Answer, described
from infer_align_bench.load import until
from infer_align_bench.quality.gold import Gold
from infer_align_bench.quality.grid import Cell
from infer_align_bench.types import Prompt

DRAW_STRIDE = 1_000_003  # between the seeds of one prompt's draws: more than there are prompts
REFUSED = (400, 404, 413, 422)  # asked wrongly, or more than it can do: asking again will not help
REFUSALS = (
    3  # prompts at which a setting is refused, with none answered, before it is asked no more
)
PATIENCE = 20  # failures in a row, whatever was asked: then the endpoint is gone
FORMAT = 2

SCORING = ("reward_tokens", "judge_prompt_tokens", "judge_completion_tokens")
IGNORED = (
    "the endpoint ignored `align`: its answer carries none, and would count as one that was aligned"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One scored answer."""

    key: str  # digest of the setting and the prompt: what may be taken up by another run
    cell: str
    prompt: int
    draw: int
    text: str
    gold: float | None  # None: the scorer has no opinion
    seconds: float
    spent: int | None  # completion tokens that were generated; None: the endpoint does not say
    returned: int | None
    prompt_tokens: int | None
    scoring: int  # tokens that rewards and the judge read and wrote, of align.usage

    @property
    def tokens(self) -> float:
        """All that it cost: prompt, generated, rewards' and judge's; NaN where the endpoint does not say."""
        return (
            math.nan
            if self.spent is None
            else self.spent + (self.prompt_tokens or 0) + self.scoring
        )


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
            raise ConfigError(
                f"{self._path} is no notebook of `bench quality`; name another with --notebook."
            ) from None
        if before != dict(made_with):
            changed = sorted(
                key for key in {*before, *made_with} if before.get(key) != made_with.get(key)
            )
            raise ConfigError(
                f"{self._path} was made with another {', '.join(changed)}; remove it, or name another with --notebook."
            )
        if lines[-1]:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n")
        for line in lines[1:]:
            with suppress(
                ValueError, TypeError
            ):  # the last line of a run that was killed may be half a line
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


@dataclass(frozen=True, slots=True)
class Failure:
    """One answer that could not be had, or not be scored."""

    prompt: int
    why: str
    refused: bool  # the setting or the prompt, by the endpoint: asking again will not help


class Runner:
    """Carries out work, `concurrency` answers at a time. What fails is kept as that answer's failure; the others go on."""

    def __init__(
        self, endpoint: Endpoint, gold: Gold, prompts: Sequence[Prompt], notebook: Notebook
    ) -> None:
        self.failures: dict[str, list[Failure]] = {}  # by setting
        self.lost = False  # whether it gave up on the endpoint
        self.endpoint, self._gold, self._prompts, self._notebook = endpoint, gold, prompts, notebook
        self._answered = Counter(row.cell for row in notebook.rows.values())
        self._in_a_row = 0

    @property
    def refused(self) -> dict[str, str]:
        """The settings that were refused at every prompt, and why."""
        return {
            name: found[0].why
            for name, found in self.failures.items()
            if not self._answered[name] and all(one.refused for one in found)
        }

    async def run(
        self,
        wanted: Sequence[Work],
        concurrency: int,
        stop: asyncio.Event,
        on_row: Callable[[], None],
    ) -> bool:
        """Do what is not yet in the notebook; -> whether it was stopped."""
        left = iter([one for one in wanted if (one.key, one.draw) not in self._notebook.rows])

        async def worker() -> None:
            for one in left:
                if self._in_a_row >= PATIENCE:
                    self.lost = True
                    return
                if not self._hopeless(one.cell.name):
                    await self._one(one)
                on_row()

        async def workers() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(worker())

        return not await until(stop, workers())

    def _hopeless(self, name: str) -> bool:
        refusals = {one.prompt for one in self.failures.get(name, ()) if one.refused}
        return len(refusals) >= REFUSALS and name in self.refused

    async def _one(self, one: Work) -> None:
        try:
            row = await self._asked(one)
        except AlignError as error:
            self._failed(one, error.message)
            return
        if row is not None:
            self._in_a_row = 0
            self._answered[one.cell.name] += 1
            self._notebook.add(row)

    def _failed(self, one: Work, why: str, *, refused: bool = False) -> None:
        self._in_a_row = 0 if refused else self._in_a_row + 1
        self.failures.setdefault(one.cell.name, []).append(
            Failure(one.prompt, self.endpoint.safe(why), refused)
        )

    async def _asked(self, one: Work) -> Row | None:
        prompt = self._prompts[one.prompt]
        body = self.endpoint.body(prompt, one.prompt + one.draw * DRAW_STRIDE) | dict(one.cell.body)
        if one.cell.align is not None:
            body["align"] = one.cell.align
        started = perf_counter()
        status, answer = await self.endpoint.call("chat/completions", body)
        seconds = perf_counter() - started
        text = _text(answer)
        if status != 200 or text is None:
            said = ": ".join(
                described(
                    answer.get("error") if isinstance(answer, Mapping) else answer,
                    f"status {status}",
                )
            )
            self._failed(one, said, refused=status in REFUSED)
            return None
        if one.cell.align and one.cell.align.get("details") != "none" and "align" not in answer:
            self._failed(one, IGNORED, refused=True)
            return None
        told = Answer()
        told.whole(answer)
        prompt_tokens, spent, returned = told.tokens()
        usage = told.align_usage()
        score = await self._gold(prompt.messages, text)
        return Row(
            one.key,
            one.cell.name,
            one.prompt,
            one.draw,
            text,
            score if math.isfinite(score) else None,
            seconds,
            spent,
            returned,
            prompt_tokens,
            sum(usage.get(name, 0) for name in SCORING),
        )


def _text(answer: Any) -> str | None:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else ""
