"""The limits of callers and the metrics, which the workers of one server share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from infer_align.config import Limits
from infer_align_server.limits.buckets import SharedBuckets


@dataclass(frozen=True, slots=True)
class Sharing:
    """The part of a worker that it shares with the others.

    Attributes:
        folder: A folder of temporary files, which all workers use.
        workers: The number of workers.
        start_time: The Unix time in seconds at which the server started.
    """

    folder: Path
    workers: int
    start_time: int

    def make_files(self) -> None:
        """Make the files, before the first worker starts."""
        SharedBuckets.make_file(self._limits_file)

    def buckets(self, unit: str) -> SharedBuckets:
        """Return the buckets of all callers for one unit."""
        return SharedBuckets(self._limits_file, unit)

    def limits(self, limits: Limits) -> Limits:
        """Return one worker's share of what may run and wait at once.

        The shares are rounded down, so that all workers together never exceed a limit.
        """
        return replace(
            limits,
            max_running=limits.max_running // self.workers,
            max_running_tokens=limits.max_running_tokens // self.workers,
            max_queue=limits.max_queue // self.workers,
        )

    @property
    def _limits_file(self) -> Path:
        return self.folder / "limits.sqlite"
