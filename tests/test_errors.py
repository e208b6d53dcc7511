"""The tree of errors: every class has its own status and code, and messages quote little."""

from __future__ import annotations

import inspect

import pytest

from infer_align import errors
from infer_align.errors import AlignError, nearest, quote

CLASSES = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, AlignError)
]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_is_drawn_in_the_docstring_with_its_status(cls: type[AlignError]) -> None:
    drawn = next(line for line in (errors.__doc__ or "").splitlines() if cls.__name__ in line)
    if cls.__name__ not in {"AlignError", "ConfigError"}:
        assert str(cls.status) in drawn
    assert cls.__doc__


def test_codes_are_distinct() -> None:
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)


def test_an_error_can_know_better_than_its_class() -> None:
    error = errors.EngineFailed(
        "upstream is busy", status=429, retry_after=3, code="busy", param="x"
    )
    assert (error.status, error.code, error.param, error.retry_after, str(error)) == (
        429,
        "busy",
        "x",
        3,
        "upstream is busy",
    )
    assert errors.EngineFailed("x").status == 502


def test_nearest() -> None:
    assert nearest("best_of_m", ["best_of_n", "budget"]) == "did you mean 'best_of_n'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b."
    assert nearest("zzz", []) == "known: none."
    assert nearest("x" * 10_000_000, ["a"]) == "known: a."


def test_shown_is_short() -> None:
    assert quote("a") == "'a'"
    assert len(quote("a" * 1000)) == 80


def test_quoted_values_have_the_names_of_json():
    assert [quote(None), quote(True)] == ["null", "true"]
    assert quote([None, {"a": True, "b": [False, "None", 1.5]}]) == (
        "[null, {'a': true, 'b': [false, 'None', 1.5]}]"
    )
    assert (quote([]), quote({}), quote((1, 2))) == ("[]", "{}", "(1, 2)")


def test_a_deep_value_is_quoted():
    deep: object = None
    for _ in range(500):
        deep = [deep]
    assert quote(deep) == "[" * 77 + "..."
