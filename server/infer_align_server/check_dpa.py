"""`infer-align check dpa`: find out if the served model follows preference directions.

The model answers a few prompts greedily, once per angle between two attributes. A model that was
not trained on directions may give the same answer at every angle; `dpa` and `rps` are then of no
use with it.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infer_align.config import Config
from infer_align.config.align import Align
from infer_align.engines import Engine
from infer_align.errors import ConfigError, EngineFailed
from infer_align.flow.discovery import when_discovered
from infer_align.flow.plan import make_plan
from infer_align.flow.request import Request
from infer_align.flow.run import align
from infer_align.methods.dpa import DPA, Prompting
from infer_align.types import Direction
from infer_align_server.arguments import configuration, positive_integer
from infer_align_server.loading import load_models

PROMPTS = (
    "What are the diet and the colour of the owl?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Should I learn to play the piano?",
)
# Degrees between two attributes: 0 asks for more of the first alone, 90 for more of the second
# alone, -90 for less of the second alone.
ANGLES = (-90, -45, 0, 45, 90)
REFERENCE = ANGLES.index(0)


@dataclass(frozen=True, slots=True)
class CheckedPrompt:
    """The greedy answers to one prompt.

    Attributes:
        prompt: The message of the user.
        answers: One per angle.
        repeated: The answer at 0 degrees, drawn once more.
    """

    prompt: str
    answers: Sequence[str]
    repeated: str

    @property
    def repeats(self) -> bool:
        """Return True if the same direction gave the same answer twice."""
        return self.repeated == self.answers[REFERENCE]

    @property
    def differing(self) -> int:
        """Return the number of answers that differ from the answer at 0 degrees."""
        return sum(answer != self.answers[REFERENCE] for answer in self.answers)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check dpa` itself."""
    parser.add_argument(
        "--max-tokens",
        type=positive_integer,
        default=64,
        help="Maximum number of tokens of an answer. Default: %(default)s.",
    )


def run(options: argparse.Namespace, out: Console) -> int:
    """Check the model and print a table.

    Returns:
        The exit status: 0 if an answer depends on the direction, else 1.

    Raises:
        ConfigError: The model cannot be loaded, or has no name.
        AlignError: The engine refuses the prompts, or fails.
    """
    return asyncio.run(_run(configuration(options), options.max_tokens, out))


async def _run(config: Config, max_tokens: int, out: Console) -> int:
    attributes = config.methods.get(Prompting).attributes[:2]
    directions = [direction(attributes, degrees) for degrees in ANGLES]
    rows = await check(config, directions, max_tokens)
    table = Table("prompt", *(f"{degrees}°" for degrees in ANGLES), "answers that differ from 0°")
    for row in rows:
        table.add_row(*_cells(row))
    out.print(f"Words of each greedy answer, by the angle between {_names(attributes)}:")
    out.print(table)
    status, sentence = conclusion(rows)
    out.print(escape(sentence), highlight=False, soft_wrap=True)
    return status


def direction(attributes: Sequence[str], degrees: float) -> Direction:
    """Return the direction at an angle from the first attribute to the second.

    With one attribute, its weight goes from -1 at -90 degrees to 1 at 90 degrees, but is never 0.
    """
    if len(attributes) == 1:
        return {attributes[0]: -1.0 if degrees < 0 else 1.0}
    first, second = attributes
    radians = math.radians(degrees)
    return {first: math.cos(radians), second: math.sin(radians)}


async def check(
    config: Config, directions: Sequence[Direction], max_tokens: int
) -> list[CheckedPrompt]:
    """Start the engine, let the model answer, and close the engine.

    Answers are drawn one after the other: an engine may round differently in a batch.

    Raises:
        ConfigError: The model cannot be loaded, or has no name.
        AlignError: The engine refuses the prompts, or fails.
    """
    engine = config.load_engine()
    rows: list[CheckedPrompt] = []
    try:
        await load_models(config, {"served": engine}, {}, lambda _: None)
        if not engine.model:
            raise ConfigError("the engine serves several models; name one with --model MODEL.")
        for prompt in PROMPTS:
            answers: list[str] = []
            for v in [*directions, directions[REFERENCE]]:
                answers.append(await _answer(config, engine, prompt, v, max_tokens))
            rows.append(CheckedPrompt(prompt, answers[:-1], answers[-1]))
    finally:
        await engine.close()
    return rows


async def _answer(
    config: Config, engine: Engine, prompt: str, v: Direction, max_tokens: int
) -> str:
    """Return the greedy answer to one prompt along one direction."""
    body = {
        "model": engine.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "seed": 0,
    }
    request = Request(body, align=Align(methods={"dpa": DPA(dict(v))}), aligned=True)
    plan = await when_discovered(
        lambda: make_plan(request, engine, {}, {}, config.limits, config.methods)
    )
    response = await align(plan, engine)
    candidate = response.candidates[0]
    if candidate.error:
        raise EngineFailed(candidate.error, status=candidate.status)
    return candidate.text


def conclusion(rows: Sequence[CheckedPrompt]) -> tuple[int, str]:
    """Return the exit status and what the answers say about the model, in one sentence.

    A prompt whose answer changes when it is drawn again says nothing, and does not count.
    """
    stable = [row for row in rows if row.repeats]
    compared = sum(len(row.answers) - 1 for row in stable)
    differing = sum(row.differing for row in stable)
    if not stable:
        return 1, (
            "This cannot be decided: each prompt got another answer when the same direction was "
            "drawn again, although the temperature is 0."
        )
    if not differing:
        return 1, (
            f"The model ignores directions: none of {compared} answers differs from the answer "
            "at 0°; dpa and rps cannot change what it says."
        )
    if differing < compared / 4:
        return 0, (
            f"The model hardly follows directions: only {differing} of {compared} answers differ "
            "from the answer at 0°; expect little of dpa and rps."
        )
    return 0, (
        f"The model follows directions: {differing} of {compared} answers differ from the answer "
        "at 0°; if the answers are what the directions ask for, set [dpa] trained = true."
    )


def _cells(row: CheckedPrompt) -> Iterator[str]:
    yield row.prompt
    for answer in row.answers:
        yield str(len(answer.split()))
    yield f"{row.differing} of {len(row.answers) - 1}"


def _names(attributes: Sequence[str]) -> str:
    if len(attributes) == 1:
        return f"less and more {attributes[0]}"
    return f"{attributes[0]} (0°) and {attributes[1]} (90°)"
