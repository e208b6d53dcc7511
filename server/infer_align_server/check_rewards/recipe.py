"""Let the configured rewards score a few texts, and compare classifiers with a plain recipe.

The scores of classifiers are compared with the plain recipe of Hugging Face, the text of the chat
template through `tokenizer(text, truncation=True)`. A difference means that the model may read
other tokens here than in its training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infer_align.config import Config
from infer_align.rewards import ComparableReward, Reward, RewardScores
from infer_align.types import Array, Candidate, Messages
from infer_align_server.check_rewards.chosen import check_reward, choose_rewards, started
from infer_align_server.check_rewards.progress import ProgressLines

# A larger difference comes from other tokens, not from rounding; relative to the scores' size.
TOLERANCE = 1e-3

SHORT = "Owls eat mice."
LONG = "Owls eat mice, voles and other small animals, which they hunt at night. " * 200
QUESTION = "What do owls eat?"
# {name of a text: (turns of the user, candidates)}
TEXTS: dict[str, tuple[Messages, Sequence[str]]] = {
    "short": ([{"role": "user", "content": QUESTION}], [SHORT, "I do not know."]),
    "long answer": ([{"role": "user", "content": QUESTION}], [LONG]),
    "long prompt": ([{"role": "user", "content": LONG + QUESTION}], [SHORT]),
}


class CheckedText(NamedTuple):
    """One text in the table."""

    text: str
    score: Array  # [A, K]
    recipe: Array | None  # [A, K], None if the reward cannot be compared
    note: str

    @property
    def difference(self) -> float:
        """Return the largest difference, relative to the size of the scores if that is over 1."""
        if self.recipe is None:
            return 0.0
        size = max(1.0, float(np.abs(self.recipe).max()))
        return float(np.abs(self.score - self.recipe).max()) / size

    @property
    def is_good(self) -> bool:
        """Return True if the text was scored, and as by the recipe.

        A truncated text, which has a note, may differ: the recipe may cut off its other end.
        """
        if not np.isfinite(self.score).all():
            return False
        return bool(self.note) or self.difference <= TOLERANCE


async def run(config: Config, names: Sequence[str], out: Console) -> int:
    """Check the rewards and print a table.

    Args:
        config: the configuration.
        names: sections of rewards; () for all that need no engine.
        out: gets the table.

    Returns:
        The exit status: 0 if every text was scored, and those that were not truncated as by the
        recipe; else 1.

    Raises:
        ConfigError: there is no reward to check, or one cannot be loaded.
    """
    chosen = choose_rewards(config, config.load_rewards(), names, None)
    table = Table("reward", "text", "score", "plain recipe", "difference", "note")
    warnings: list[str] = []
    all_good = True
    progress = ProgressLines(Console(stderr=True))
    async with started(config, chosen.sections, progress) as rewards:
        for name in dict.fromkeys(name.partition(".")[0] for name in chosen.checked):
            reward = rewards[name]
            check_reward("--reward", name, reward)
            for row in await check(reward):
                all_good = all_good and row.is_good
                table.add_row(name, *_cells(row))
            warnings += [f"{name}: {warning}" for warning in reward.warnings]
    out.print(table)
    for warning in warnings:
        out.print(escape(warning), highlight=False)
    return 0 if all_good else 1


async def check(reward: Reward) -> list[CheckedText]:
    """Let a reward score the texts.

    Raises:
        AlignError: it cannot score.
    """
    rows: list[CheckedText] = []
    for text, (messages, answers) in TEXTS.items():
        candidates: list[Candidate] = []
        for index, answer in enumerate(answers):
            choice = {"message": {"role": "assistant", "content": answer}}
            candidates.append(Candidate(index, choice))
        scores = await reward.score(messages, candidates)
        recipe = None
        if isinstance(reward, ComparableReward):
            recipe = await reward.score_by_recipe(messages, candidates)
        rows += _rows(text, scores, recipe)
    return rows


def _rows(text: str, scores: RewardScores, recipe: RewardScores | None) -> Iterator[CheckedText]:
    for index in range(scores.values.shape[-1]):
        reference = None if recipe is None else recipe.values[..., index]
        note = (scores.notes[index] if scores.notes else None) or ""
        yield CheckedText(text, scores.values[..., index], reference, note)


def _cells(row: CheckedText) -> tuple[str, ...]:
    if row.recipe is None:
        return row.text, _numbers(row.score), "-", "-", escape(row.note)
    difference = f"{row.difference:.2g}"
    marked = difference if row.is_good else f"[bold red]{difference}[/]"
    return row.text, _numbers(row.score), _numbers(row.recipe), marked, escape(row.note)


def _numbers(scores: Array) -> str:
    return " ".join(f"{score:.4g}" for score in scores.flatten())
