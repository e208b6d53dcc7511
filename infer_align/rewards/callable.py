"""Use any Python function as a reward."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import numpy as np

from infer_align.errors import ConfigError, nearest
from infer_align.rewards import TIMEOUT, Reward, RewardScores
from infer_align.types import Candidate, Messages

Function = Callable[[Messages, str], float]


@dataclass(frozen=True, slots=True)
class FromCallable:
    """A function `(messages, text) -> float` of a module. NaN means not scored."""

    function: str = field(
        metadata={
            "description": 'The function, as "package.module:function". The module is installed, '
            "on PYTHONPATH, or in the working directory."
        }
    )
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
        function = _find(self.function)
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise ConfigError(
                f"callable.function: {self.function!r} must be a plain function (messages, text) "
                f"-> float."
            )
        _check_parameters(self.function, function)
        return CallableReward(function, self.description, self.timeout_seconds)


plugin = FromCallable


def _check_parameters(path: str, function: Function) -> None:
    """Refuse a function that cannot be called with the conversation and a text.

    Raises:
        ConfigError: naming its parameters.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        # Some functions in C do not say what they take.
        return
    try:
        signature.bind([], "")
    except TypeError as error:
        raise ConfigError(
            f"callable.function: {path!r} has the parameters {signature}, but it is called as "
            f"function(messages, text): {error}; change its parameters."
        ) from None


def _find(path: str) -> Function:
    """Import "module:function". Modules of the working directory are found after all others.

    Raises:
        ConfigError: naming the fix.
    """
    where = f"callable.function: {path!r}"
    module_name, _, name = path.partition(":")
    is_dotted_name = all(part.isidentifier() for part in module_name.split("."))
    if not name or not is_dotted_name or module_name.endswith(".py"):
        raise ConfigError(
            f"{where} is not the name of a function; write it as 'module:function', such as "
            "'my_rewards:score' for the function score in my_rewards.py."
        )
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    module = _import(where, module_name, folder)
    try:
        function: Function = attrgetter(name)(module)
    except AttributeError:
        file = getattr(module, "__file__", None) or "a namespace package"
        raise ConfigError(
            f"{where}: the module {module_name!r} ({file}) has no {name!r}; "
            f"{nearest(name, _public_names(module))}"
        ) from None
    return function


def _import(where: str, name: str, folder: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        # Importing runs the user's code, which may raise anything.
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"{where}: there is no module {missing!r} in the working directory ({folder}), on "
                "PYTHONPATH or among the installed packages. Start in the folder that holds it, or "
                "put that folder on PYTHONPATH."
            ) from error
        hint = f" Install {missing!r} in this environment." if missing is not None else ""
        raise ConfigError(
            f"{where}: importing {name!r} failed: {type(error).__name__}: {error}.{hint}"
        ) from error


def _public_names(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]


class CallableReward(Reward):
    """Calls the function once per candidate, each in a thread.

    A candidate whose call raises is not scored.
    """

    cost = "calls the function once per answer"

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
        failures = [failure for _, failure in results]
        notes = tuple(_note(failure) for failure in failures)
        first = next((failure for failure in failures if failure is not None), None)
        return RewardScores(np.array([[values]]), notes=notes, failure=first)

    def _call(self, messages: Messages, text: str) -> tuple[float, BaseException | None]:
        try:
            return float(self._function(messages, text)), None
        except (Exception, SystemExit) as error:
            # An exception of the user's code concerns this candidate only. A call of sys.exit
            # would end the server.
            return math.nan, error


def _note(failure: BaseException | None) -> str | None:
    return None if failure is None else f"{type(failure).__name__}: {failure}"
