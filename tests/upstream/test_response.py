"""Error bodies and Retry-After headers are read in every format that servers use."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from infer_align.upstream.response import ErrorBody, parse_error, parse_retry_after


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"error": {"message": "m", "param": "p", "code": "c"}}', ErrorBody("m", "p", "c")),
        ('{"error": {"message": "m", "param": ["p"], "code": 7}}', ErrorBody("m")),
        ('{"error": "m"}', ErrorBody("m")),
        ('{"message": "m"}', ErrorBody("m")),
        ('{"detail": "m"}', ErrorBody("m")),
        (
            '{"detail": [{"loc": ["body", "messages", 0], "msg": "m"}, {"msg": "n"}, {"a": 1}]}',
            ErrorBody('messages.0: m; n; {"a": 1}'),
        ),
        ('{"error": {"message": {"a": null}}}', ErrorBody('{"a": null}')),
        ("[1]", ErrorBody("[1]")),
        ("{}", ErrorBody("")),
        ("<html>", ErrorBody("")),
        ("[" * 100_000, ErrorBody("")),
    ],
)
def test_an_error_body_is_parsed(text: str, error: ErrorBody) -> None:
    assert parse_error(text) == error


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("-3", 0.0), ("1e300", 86_400.0)])
def test_retry_after_in_seconds_is_limited_to_a_day(header: str, seconds: float) -> None:
    assert parse_retry_after(header) == seconds


def test_retry_after_may_be_a_date() -> None:
    date = datetime.now(UTC) + timedelta(hours=2)
    seconds = parse_retry_after(format_datetime(date, usegmt=True))
    assert seconds is not None
    assert 3600 < seconds <= 7200


@pytest.mark.parametrize("header", [None, "", "soon", "nan days"])
def test_an_unreadable_retry_after_is_ignored(header: str | None) -> None:
    assert parse_retry_after(header) is None
