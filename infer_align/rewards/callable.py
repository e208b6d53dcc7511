"""Use any Python function as a reward."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from infer_align.errors import ConfigError
from infer_align.rewards import TIMEOUT, Reward, RewardScores
from infer_align.types import Candidate, Messages

Function = Callable[[Messages, str], float]


@dataclass(frozen=True, slots=True)
class FromCallable:
    """A function `(messages, text) -> float` of an installed module. NaN means not scored."""

    function: str = field(metadata={"description": 'The function, as "package.module:function".'})
    description: str = field(
        default="",
        metadata={
            "description": "One line about this reward, for people. Default: the first line of "
            "the function's docstring."
        },
    )
    timeout_seconds: float = field(default=30.0, metadata=TIMEOUT)

    def load(self) -> CallableReward:
        """Import the function and return the reward.

        Raises:
            ConfigError: the function cannot be imported or called.
        """
        module, _, name = self.function.partition(":")
        try:
            function: Function = getattr(importlib.import_module(module), name)
        except Exception as error:
            # Importing runs the user's code, which may raise anything.
            raise ConfigError(
                f"callable.function: {self.function!r} cannot be imported: {error}; "
                f"write it as 'module:name'."
            ) from error
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise ConfigError(
                f"callable.function: {self.function!r} must be a plain function (messages, text) "
                f"-> float."
            )
        return CallableReward(function, self.description, self.timeout_seconds)


plugin = FromCallable


class CallableReward(Reward):
    """Calls the function once per candidate, each in a thread.

    A candidate whose call raises is not scored.
    """

    def __init__(
        self, function: Function, description: str = "", timeout_seconds: float = 30.0
    ) -> None:
        self._function = function
        self.timeout_seconds = timeout_seconds
        self.description = description or (function.__doc__ or "").strip().partition("\n")[0]

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Return [1, 1, N] scores, with the exception of a failed call as its note."""
        calls = [asyncio.to_thread(self._call, messages, each.text) for each in candidates]
        results = await asyncio.gather(*calls)
        values = [value for value, _ in results]
        notes = tuple(note for _, note in results)
        return RewardScores(np.array([[values]]), notes=notes)

    def _call(self, messages: Messages, text: str) -> tuple[float, str | None]:
        try:
            return float(self._function(messages, text)), None
        except Exception as error:
            # An exception of the user's code concerns this candidate only.
            return math.nan, f"{type(error).__name__}: {error}"
