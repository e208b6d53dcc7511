"""A Python function as a reward is found by name, and its exceptions become notes."""

from __future__ import annotations

import importlib
import math
import sys
import threading

import numpy as np
import pytest

from infer_align.errors import ConfigError
from infer_align.rewards.callable import CallableReward, FromCallable
from infer_align.types import Candidate

pytestmark = pytest.mark.anyio


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(i, {"message": {"content": text}}) for i, text in enumerate(texts)]


async def test_the_function_gets_the_conversation_and_the_text():
    def count(messages, text):
        """Count the letters.

        Of both texts.
        """
        return len(messages[-1]["content"]) * 100 + len(text)

    reward = CallableReward(count)
    scores = await reward.score([{"role": "user", "content": "abc"}], candidates("x", "xyz"))
    assert scores.values.tolist() == [[[301, 303]]]
    assert reward.description == "Count the letters."


async def test_a_failed_call_is_not_scored_and_its_note_says_why():
    def picky(messages, text):
        return {"ok": 1.0, "nan": math.nan, "word": "high", "none": None}[text]

    scores = await CallableReward(picky).score(
        [], candidates("ok", "nan", "word", "none", "missing")
    )
    assert np.isnan(scores.values[0, 0]).tolist() == [False, True, True, True, True]
    assert scores.notes[:2] == (None, None)
    assert [note.partition(":")[0] for note in scores.notes[2:]] == [
        "ValueError",
        "TypeError",
        "KeyError",
    ]


async def test_any_value_that_float_accepts_is_a_score():
    kinds = {"int": 3, "bool": True, "numpy": np.float32(0.5), "string": "2.5"}
    scores = await CallableReward(lambda _, text: kinds[text]).score([], candidates(*kinds))
    assert scores.values.tolist() == [[[3.0, 1.0, 0.5, 2.5]]]


async def test_calls_run_concurrently_and_off_the_event_loop():
    # The barrier opens when all three calls are inside at once.
    barrier = threading.Barrier(3, timeout=60)

    def wait(messages, text):
        barrier.wait()
        return threading.current_thread() is not threading.main_thread()

    scores = await CallableReward(wait).score([], candidates("a", "b", "c"))
    assert scores.values.tolist() == [[[1, 1, 1]]]


async def test_a_function_is_imported_by_name():
    reward = FromCallable("operator:indexOf", timeout_seconds=3).load()
    assert reward.timeout_seconds == 3
    scores = await reward.score(["x", "hello"], candidates("hello"))
    assert scores.values.tolist() == [[[1]]]


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
def test_anything_but_a_plain_function_is_refused(function, tmp_path, monkeypatch):
    (tmp_path / "broken_at_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"callable\.function"):
        FromCallable(function).load()


@pytest.mark.parametrize("parameters", ["text", "a, b, c", "", "messages, *, text"])
def test_a_function_with_other_parameters_is_refused(parameters, working_directory):
    name = f"other_{len(parameters)}"
    (working_directory / f"{name}.py").write_text(f"def f({parameters}): return 1.0")
    with pytest.raises(ConfigError, match=r"but it is called as function\(messages, text\)"):
        FromCallable(f"{name}:f").load()


@pytest.mark.parametrize("parameters", ["m, t", "*all", "m, t, more=1", "m, t, **rest"])
def test_a_function_that_takes_two_values_is_loaded(parameters, working_directory):
    name = f"two_{len(parameters)}"
    (working_directory / f"{name}.py").write_text(f"def f({parameters}): return 1.0")
    assert FromCallable(f"{name}:f").load().description == ""


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    """An empty working directory; what it adds to the search path is removed again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.invalidate_caches()
    yield tmp_path
    for name, module in [*sys.modules.items()]:
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


async def test_a_module_of_the_working_directory_is_found(working_directory):
    (working_directory / "own_helpers.py").write_text("def length(text): return len(text)")
    (working_directory / "own_rewards.py").write_text(
        "class Short:\n"
        "    @staticmethod\n"
        "    def score(messages, text):\n"
        "        from own_helpers import length\n"
        "        return -length(text)\n"
    )
    reward = FromCallable("own_rewards:Short.score").load()
    scores = await reward.score([], candidates("ab", "abc"))
    assert scores.values.tolist() == [[[-2, -3]]]
    (working_directory / "own_package").mkdir()
    (working_directory / "own_package" / "words.py").write_text(
        "def count(messages, text):\n    '''Count the words.'''\n    return len(text.split())\n"
    )
    assert FromCallable("own_package.words:count").load().description == "Count the words."


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module:f", r"no module 'no_such_module' in the working directory.*PYTHONPATH"),
        ("math.nothing:f", r"no module 'math.nothing'"),
        ("needs_more:f", r"importing 'needs_more' failed.*Install 'no_such_dependency'"),
        ("broken:f", r"importing 'broken' failed: ZeroDivisionError"),
        ("wrong_syntax:f", r"importing 'wrong_syntax' failed: SyntaxError"),
        ("leaves:f", r"importing 'leaves' failed: SystemExit: 3"),
        ("leaves.py:f", r"write it as 'module:function'"),
        ("./leaves:f", r"write it as 'module:function'"),
        ("/srv/leaves.py:f", r"write it as 'module:function'"),
        ("math.sqrt", r"write it as 'module:function'"),
        ("math:sqrtt", r"has no 'sqrtt'; did you mean 'sqrt'"),
    ],
)
def test_the_message_names_the_fix(function, message, working_directory):
    (working_directory / "needs_more.py").write_text("import no_such_dependency")
    (working_directory / "broken.py").write_text("1 / 0")
    (working_directory / "wrong_syntax.py").write_text("def f(:")
    (working_directory / "leaves.py").write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match=message):
        FromCallable(function).load()


async def test_a_function_that_exits_fails_for_its_candidate_alone():
    def leave(messages, text):
        return 1.0 if text == "stay" else sys.exit("good bye")

    scores = await CallableReward(leave).score([], candidates("stay", "go"))
    assert np.isnan(scores.values[0, 0]).tolist() == [False, True]
    assert scores.notes == (None, "SystemExit: good bye")
