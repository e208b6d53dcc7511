"""The answers of a few prompts side by side, so that a reader sees what the figures stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from infer_align.messages import text_of
from infer_align_bench.page import table
from infer_align_bench.quality.grid import Cell
from infer_align_bench.quality.notebook import ScoredAnswer
from infer_align_bench.quality.runner import Work
from infer_align_bench.types import ChatPrompt

PROMPTS = 5
MAX_PROMPT = 300
MAX_ANSWER = 700


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to a few prompts.

    Attributes:
        prompts: the last message of each prompt.
        rows: setting -> its answer to each prompt; None where there is none.
    """

    prompts: Sequence[str]
    rows: Mapping[str, Sequence[ScoredAnswer | None]]


def choose_answers(
    cells: Sequence[Cell],
    prompts: Sequence[ChatPrompt],
    work: Iterable[Work],
    rows: Mapping[tuple[str, int], ScoredAnswer],
) -> Answers:
    """Return the answer of each setting to the first prompts.

    Args:
        cells: the settings, in the order of the report.
        prompts: all prompts.
        work: the prompts and settings of one draw.
        rows: the measured answers, by the key and the draw of their work.
    """
    first = prompts[:PROMPTS]
    answers: dict[str, list[ScoredAnswer | None]] = {}
    for cell in cells:
        answers[cell.name] = [None] * len(first)
    for item in work:
        if item.prompt < len(first) and item.cell.name in answers:
            answers[item.cell.name][item.prompt] = rows.get((item.key, item.draw))
    return Answers([_last_text(prompt) for prompt in first], answers)


def _last_text(prompt: ChatPrompt) -> str:
    return text_of(prompt.messages[-1].get("content"))


def answers_table(answers: Answers) -> str:
    """Return an HTML table with a column for each prompt."""
    columns = ("setting", *(escape(_shorten(text, MAX_PROMPT)) for text in answers.prompts))
    rows = []
    for name, texts in answers.rows.items():
        rows.append((escape(name), *(_cell(answer) for answer in texts)))
    return table(columns, rows, columns).replace("<table>", "<table class=answers>", 1)


def _cell(answer: ScoredAnswer | None) -> str:
    if answer is None:
        return "<span class=note>no answer</span>"
    gold = "no score" if answer.gold is None else f"gold {answer.gold:.2f}"
    note = gold if answer.kl is None else f"{gold}, log ratio {answer.kl:.1f}"
    return f"{escape(_shorten(answer.text, MAX_ANSWER))} <span class=note>({note})</span>"


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."
