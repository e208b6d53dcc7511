"""The file of finished answers, from which an interrupted measurement continues."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infer_align.errors import ConfigError

FORMAT = 2


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One scored answer."""

    # Digest of the setting and the prompt. Another run reuses the answer to an equal request.
    key: str
    cell: str
    prompt: int
    draw: int
    text: str
    # None: the scorer gave no score.
    gold: float | None
    seconds: float
    # Completion tokens that were generated; None: the endpoint did not count them.
    spent: int | None
    returned: int | None
    prompt_tokens: int | None
    # Tokens that rewards and the judge read and wrote, from align.usage.
    scoring: int
    # Log ratio of the answer under the steered and the frozen policy, whose mean is the KL in nats;
    # None: the endpoint did not report it.
    kl: float | None = None

    @property
    def tokens(self) -> float:
        """Return all tokens: prompt, generated and scoring; NaN if the endpoint did not count."""
        if self.spent is None:
            return math.nan
        return self.spent + (self.prompt_tokens or 0) + self.scoring


class Notebook:
    """The rows of a JSONL file. Its first line describes the measurement that they belong to."""

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        """Open the file, or create it.

        Args:
            path: of the file.
            made_with: everything that influences answers or scores.

        Raises:
            ConfigError: the file is not a notebook, or belongs to another measurement.
        """
        self.rows: dict[tuple[str, int], ScoredAnswer] = {}
        self._path = path
        if path.exists() and path.stat().st_size:
            self._load(made_with)
        else:
            path.write_text(json.dumps({"made_with": made_with}) + "\n", encoding="utf-8")

    def _load(self, made_with: Mapping[str, Any]) -> None:
        text = self._path.read_text(encoding="utf-8")
        header, *lines = text.split("\n")
        self._check_header(header, made_with)
        # A killed run may leave an incomplete line: start the next row on a line of its own.
        if not text.endswith("\n"):
            self._append("\n")
        for line in lines:
            with suppress(ValueError, TypeError, RecursionError):
                row = ScoredAnswer(**json.loads(line))
                self.rows[row.key, row.draw] = row

    def _check_header(self, header: str, made_with: Mapping[str, Any]) -> None:
        try:
            previous = json.loads(header)["made_with"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(
                f"{self._path} is not a notebook of `bench quality`; "
                "name another file with --notebook."
            ) from None
        changed = []
        for key in sorted({*previous, *made_with}):
            if previous.get(key) != made_with.get(key):
                changed.append(key)
        if changed:
            raise ConfigError(
                f"{self._path} was made with another {', '.join(changed)}; "
                "remove it, or name another file with --notebook."
            )

    def add(self, row: ScoredAnswer) -> None:
        """Write a row to the file, then keep it in memory."""
        self._append(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        self.rows[row.key, row.draw] = row

    def _append(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)
