"""Any Python function as a reward: the door for scores that no other kind can express."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from infer_align.errors import ConfigError
from infer_align.rewards import Reward, RewardScores
from infer_align.types import Candidate, Messages

Function = Callable[[Messages, str], float]


@dataclass(frozen=True, slots=True)
class FromCallable:
    """A function `(messages, text) -> float` of an installed module; NaN means that it has no opinion."""

    function: str = field(metadata={"description": '"package.module:function"'})
    description: str = field(
        default="",
        metadata={"description": "one line for people; default: the function's docstring"},
    )
    timeout_seconds: float = field(
        default=30.0,
        metadata={"gt": 0, "description": "after this a candidate counts as not scored"},
    )

    def load(self) -> CallableReward:
        """The reward.

        Raises:
            ConfigError: the function cannot be imported or called.
        """
        module, _, name = self.function.partition(":")
        try:
            function: Function = getattr(importlib.import_module(module), name)
        except Exception as error:  # importing runs the user's code
            raise ConfigError(
                f"callable.function: {self.function!r} cannot be imported: {error}; write it as 'module:name'."
            ) from error
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise ConfigError(
                f"callable.function: {self.function!r} must be a plain function (messages, text) -> float."
            )
        return CallableReward(function, self.description, self.timeout_seconds)


plugin = FromCallable


class CallableReward(Reward):
    """Calls the function per candidate, in a thread: it may be slow. An exception leaves that candidate not scored."""

    def __init__(
        self, function: Function, description: str = "", timeout_seconds: float = 30.0
    ) -> None:
        self._function = function
        self.timeout_seconds = timeout_seconds
        self.description = description or (function.__doc__ or "").strip().partition("\n")[0]

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """[1, 1, N]."""
        results = await asyncio.gather(
            *(asyncio.to_thread(self._call, messages, c.text) for c in candidates)
        )
        return RewardScores(
            np.array([[[value for value, _ in results]]]), notes=tuple(note for _, note in results)
        )

    def _call(self, messages: Messages, text: str) -> tuple[float, str | None]:
        try:
            return float(self._function(messages, text)), None
        except Exception as error:  # the user's code: whatever it raises is data, not a crash
            return math.nan, f"{type(error).__name__}: {error}"
