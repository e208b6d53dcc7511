"""A function as a reward: what it returns, raises, and how it is found."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest

from infer_align.errors import ConfigError
from infer_align.rewards.callable import CallableReward, FromCallable
from infer_align.types import Candidate

pytestmark = pytest.mark.anyio


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(i, {"message": {"content": text}}) for i, text in enumerate(texts)]


async def test_the_function_sees_the_conversation_and_the_text():
    def count(messages, text):
        """Letters of both.

        And more.
        """
        return len(messages[-1]["content"]) * 100 + len(text)

    reward = CallableReward(count)
    marks = await reward.score([{"role": "user", "content": "abc"}], candidates("x", "xyz"))
    assert marks.values.tolist() == [[[301, 303]]]
    assert reward.description == "Letters of both."


async def test_what_fails_is_not_scored_and_says_why():
    def picky(messages, text):
        return {"ok": 1.0, "nan": math.nan, "word": "high", "none": None}[text]

    marks = await CallableReward(picky).score(
        [], candidates("ok", "nan", "word", "none", "missing")
    )
    assert np.isnan(marks.values[0, 0]).tolist() == [False, True, True, True, True]
    assert marks.notes[:2] == (None, None)
    assert [note.partition(":")[0] for note in marks.notes[2:]] == [
        "ValueError",
        "TypeError",
        "KeyError",
    ]


async def test_numbers_of_any_kind():
    kinds = {"int": 3, "bool": True, "numpy": np.float32(0.5), "string": "2.5"}
    marks = await CallableReward(lambda _, text: kinds[text]).score([], candidates(*kinds))
    assert marks.values.tolist() == [[[3.0, 1.0, 0.5, 2.5]]]


async def test_slow_functions_run_side_by_side_and_off_the_event_loop():
    barrier = threading.Barrier(3, timeout=20)  # three calls have to be in it at once

    def wait(messages, text):
        barrier.wait()
        return threading.current_thread() is not threading.main_thread()

    marks = await CallableReward(wait).score([], candidates("a", "b", "c"))
    assert marks.values.tolist() == [[[1, 1, 1]]]


async def test_found_by_name():
    reward = FromCallable("operator:indexOf", timeout_seconds=3).load()
    assert reward.timeout_seconds == 3
    marks = await reward.score(["x", "hello"], candidates("hello"))
    assert marks.values.tolist() == [[[1]]]


@pytest.mark.parametrize(
    "function",
    [
        "no_such_package:f",
        "math:no_such",
        "math",
        "",
        ":sqrt",
        "math:pi",
        "infer_align.flow.run:align",
        "broken_at_import:f",
    ],
)
def test_what_is_no_function_is_refused(function, tmp_path, monkeypatch):
    (tmp_path / "broken_at_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"callable\.function"):
        FromCallable(function).load()
