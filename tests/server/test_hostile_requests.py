"""Requests that try to grow, to write log lines or headers; and the promises of SECURITY.md."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from infer_align_server.logs import JsonFormatter
from tests.server.conftest import USER, Live

ROOT = Path(__file__).parents[2]
PROMISES = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/rerank", "/v1/align/verify"])
def test_a_compressed_body_is_not_unpacked(numbers: Live, path: str) -> None:
    bomb = gzip.compress(b'{"messages": "' + b" " * 50_000_000 + b'"}')
    assert len(bomb) < 100_000
    answer = numbers.post(bomb, path, headers={"content-encoding": "gzip"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("field", ["model", "query"])
def test_no_field_adds_a_line_to_the_log(
    numbers: Live, caplog: pytest.LogCaptureFixture, field: str
) -> None:
    hostile = 'x"}\n{"event": "drain started"}\r\n\u2028'
    body = {"messages": USER, "query": "q", "documents": ["a"], field: hostile}
    with caplog.at_level(logging.DEBUG):
        for path in ("/v1/chat/completions", "/v1/rerank"):
            assert numbers.post(body, path).status_code in {200, 400, 404, 424}
    formatter = JsonFormatter()
    for record in caplog.records:
        line = formatter.format(record)
        assert len(line.splitlines()) == 1
        assert json.loads(line)["event"] != "drain started"


@pytest.mark.parametrize("sent", ["a b", "x\u00e9", "a;b", "a" * 129, "<script>"])
def test_a_request_id_cannot_add_a_header(numbers: Live, sent: str) -> None:
    answer = numbers.get("/health", headers={"x-request-id": sent.encode("latin-1")})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize(("path", "name"), PROMISES, ids=str)
def test_every_promise_has_the_test_that_it_names(path: str, name: str) -> None:
    assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_the_page_names_promises() -> None:
    rows: Any = re.findall(r"^\| (?!promise|---)", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert 0 < len(rows) <= len(PROMISES)
