"""Files of answers become questions with ratings and pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from infer_align_server.check_rewards.questions import QuestionSet, read_questions


def read(
    folder: Path, source: str, records: list[Any], limit: int | None = None, **options: Any
) -> QuestionSet:
    path = folder / "file.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    pairs, pools = (path, None) if source == "pairs" else (None, path)
    return read_questions(pairs, pools, limit, options.get("answers"), options.get("models", ()))


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_pairs_of_one_prompt_are_one_question(tmp_path: Path) -> None:
    records = [pair("Why?", "a", "b"), pair("Who?", "x", "y"), pair("Why?", "a", "c")]
    content = read(tmp_path, "pairs", records)
    first, second = content.questions
    assert (first.answers, first.question) == (("a", "b", "c"), "Why?")
    assert first.pairs.tolist() == [[0, 1], [0, 2]]
    assert first.ratings.tolist() == [1, 0, 0]
    assert second.answers == ("x", "y")


def test_an_answer_that_wins_and_loses_has_no_rating(tmp_path: Path) -> None:
    (question,) = read(
        tmp_path, "pairs", [pair("Why?", "a", "b"), pair("Why?", "b", "c")]
    ).questions
    assert np.isnan(question.ratings).all()
    assert len(question.pairs) == 2
    assert not question.has_ratings


def test_ratings_that_hardly_differ_make_no_pair(tmp_path: Path) -> None:
    answers = [
        {"text": text, "rating": rating} for text, rating in (("a", 0), ("b", 4), ("c", 100))
    ]
    (question,) = read(tmp_path, "pools", [{"prompt": "Why?", "answers": answers}]).questions
    assert {tuple(row) for row in question.pairs.tolist()} == {(2, 0), (2, 1)}


def test_a_limit_is_spread_over_the_file(tmp_path: Path) -> None:
    records = [pair(f"{i}?", "a", "b") for i in range(10)]
    content = read(tmp_path, "pairs", records, limit=3)
    assert [question.question for question in content.questions] == ["0?", "3?", "6?"]
    assert content.total == 10
    assert len(read(tmp_path, "pairs", records, limit=99).questions) == 10


def test_answers_are_drawn_once_and_attacks_are_left_out(tmp_path: Path) -> None:
    answers = [{"text": f"t{i}", "rating": i, "model": "m"} for i in range(9)]
    answers.append({"text": "cheat", "rating": 99, "model": "attack"})
    record = {"prompt": "Why?", "answers": answers}
    (question,) = read(tmp_path, "pools", [record], answers=4, models=("attack",)).questions
    (again,) = read(tmp_path, "pools", [record], answers=4, models=("attack",)).questions
    assert question.answers == again.answers
    assert len(question.answers) == 4
    assert question.intruders == {"attack": "cheat"}
    assert [f"t{rating:.0f}" for rating in question.ratings] == list(question.answers)


def test_pools_without_ratings_are_read(tmp_path: Path) -> None:
    (question,) = read(tmp_path, "pools", [{"prompt": "Why?", "answers": ["a", "b"]}]).questions
    assert all(math.isnan(rating) for rating in question.ratings)
    assert question.pairs.shape == (0, 2)
