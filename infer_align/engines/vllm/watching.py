"""Value estimates on their way back from vLLM's workers.

A request says which values it is watched by, under a name of its own. A worker reads them at the steps that are due, from the
states and logits that it has in its hands, and keeps them. vLLM has no way back for them, so the frontend fetches what there is
for as long as somebody waits; one call serves all requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from infer_align.decoding.steering import expected_values, upload
from infer_align.engines.vllm.steering import checked_weight
from infer_align.types import EstimateSchedule
from infer_align.values.head import HeadValue

log = logging.getLogger("infer_align")

# Where a request's watch stands in SamplingParams.extra_args.
KEY = "infer_align_watch"
# Between two looks: about a step of a large model, and no more than a few of a small one.
FETCH_SECONDS = 0.02
# A dead engine answers no call, and says nothing.
PATIENCE_SECONDS = 10.0
# Estimates that nobody fetches any more are forgotten; so many steps' are kept.
KEPT_STEPS = 4096

Estimates = list[
    tuple[str, int, float]
]  # the request's name, its tokens, what it is expected to be worth
Tell = Callable[[int, float], None]
Sampled = Callable[[], int]  # how many tokens a request has by now


class Named(NamedTuple):
    """A watch as it travels to the workers."""

    name: str
    estimates: EstimateSchedule

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None) -> Named | None:
        """What a request's extra arguments ask for; None where it is not watched.

        Raises:
            ValueError: of another form.
        """
        match (extra_args or {}).get(KEY):
            case None:
                return None
            case {"name": str(name), "values": dict(values), "after": int(after)} if after > 0:
                weights = {
                    key: checked_weight(f"align.early_stop.values.{key}", key, weight)
                    for key, weight in values.items()
                }
                return cls(name, EstimateSchedule(weights, after))
        raise ValueError(
            f"extra_args.{KEY}: not of the form {{name, values, after}}; ask for align.early_stop instead."
        )

    def extra_args(self) -> dict[str, Any]:
        """What `read` reads."""
        return {
            KEY: {
                "name": self.name,
                "values": dict(self.estimates.values),
                "after": self.estimates.after,
            }
        }


@dataclass(frozen=True, slots=True, eq=False)
class Watched:
    """One request in a worker."""

    name: str
    estimates: EstimateSchedule
    values: tuple[tuple[HeadValue, float], ...]  # as they were when it joined, with their weights
    output: Sequence[int] = ()  # its tokens, where vLLM's older runner keeps them


class Recorder:
    """What the values of a worker have said, until it is fetched."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: deque[tuple[list[tuple[str, int]], torch.Tensor]] = deque(maxlen=KEPT_STEPS)

    def add(
        self, logits: torch.Tensor, hidden: torch.Tensor, due: Sequence[tuple[int, Watched, int]]
    ) -> None:
        """Estimate these rows, each with its tokens so far; waits for nothing.

        Args:
            logits: [rows, V], those that are sampled from.
            hidden: [rows, d].
            due: which rows.
        """
        rows = upload(np.array([row for row, _, _ in due], np.int64), self._device)
        weights = [dict(watched.values) for _, watched, _ in due]
        found = expected_values(logits.index_select(0, rows), hidden.index_select(0, rows), weights)
        self._kept.append(([(watched.name, tokens) for _, watched, tokens in due], found))

    def take(self) -> Estimates:
        """All that was kept, once."""
        taken, kept = [], self._kept
        while kept:
            names, found = kept.popleft()
            taken += [
                (name, tokens, value)
                for (name, tokens), value in zip(names, found.tolist(), strict=True)
            ]
        return taken


@dataclass(slots=True, eq=False)
class _Waiting:
    tell: Tell
    sampled: Sampled
    due: int  # tokens at which there will be the next estimate

    def told(self, tokens: int, value: float) -> None:
        self.due = max(self.due, 2 * tokens)
        self.tell(tokens, value)


class Fetcher:
    """The frontend's side: who waits for estimates, and what brings them. `fetch` asks every worker.

    A call waits for the step that is under way, and on several GPUs for those behind it: it is made when something is due.
    """

    def __init__(self, fetch: Callable[[], Awaitable[list[Estimates]]]) -> None:
        self._fetch = fetch
        self._waiting: dict[str, _Waiting] = {}
        self._task: asyncio.Task[None] | None = None
        self._fetching: asyncio.Task[None] | None = None  # the latest

    def add(self, named: Named, sampled: Sampled, tell: Tell) -> None:
        """Call `tell` with the tokens and the value of each estimate of a request."""
        self._waiting[named.name] = _Waiting(tell, sampled, named.estimates.after)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    def discard(self, names: Iterable[str]) -> None:
        """Nobody waits for these any more."""
        for name in names:
            self._waiting.pop(name, None)

    async def flush(self) -> None:
        """Have told all that the workers have said until now: what has ended has been estimated before.

        Those that end while a fetch is under way share the next one.
        """
        under_way = self._fetching
        if under_way is not None and not under_way.done():
            await asyncio.wait({under_way})
        if self._fetching is under_way:
            self._fetching = asyncio.create_task(self._tell())
        assert self._fetching is not None
        await asyncio.wait({self._fetching})

    def close(self) -> None:
        """Fetch nothing more."""
        self._waiting.clear()
        for task in (self._task, self._fetching):
            if task is not None:
                task.cancel()

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(FETCH_SECONDS)
            if any(
                waiting.sampled() > waiting.due for waiting in self._waiting.values()
            ):  # the step after it was made
                await self.flush()

    async def _tell(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                answers = await self._fetch()
        except (
            Exception
        ):  # the engine has died, and its requests say so; without estimates nothing is given up
            log.exception("value estimates could not be fetched")
            self._waiting.clear()
            return
        # Workers that sample the same rows say the same.
        for (name, tokens), value in {
            (name, tokens): value for said in answers for name, tokens, value in said
        }.items():
            if waiting := self._waiting.get(name):
                waiting.told(tokens, value)
