"""`bench quality` continues after failures of answers, settings, scorers and endpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from infer_align_server import cli
from tests.bench.conftest import events, piece, read, words

pytestmark = pytest.mark.slow

GRID = """
baseline = "base"
[[cells]]
name = "base"
[[cells]]
name = "cold"
body = { temperature = 0.5 }
[[cells]]
name = "best of {n}"
align = { best_of_n = { n = "{n}" } }
over = { n = [2, 3] }
equal_budget = true
[[cells]]
name = "judged"
align = { trust_judge = {}, best_of_n = { n = 2 } }
"""
Bench = Callable[..., tuple[str, str]]
ALIGN_USAGE = {
    "engine_calls": 1,
    "reward_tokens": 30,
    "judge_prompt_tokens": 4,
    "judge_completion_tokens": 1,
}
# Longer than any timeout of a test: the client gives up first.
ENDLESS = 600.0


def number(_: Any, text: str) -> float:
    """Score the number at the end of an answer."""
    return float(text.rsplit(maxsplit=1)[-1])


def chat(text: str, **fields: Any) -> JSONResponse:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    answer = {
        "choices": [choice],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2},
        "align": {"methods": [], "usage": ALIGN_USAGE},
    }
    return JSONResponse({**answer, **fields})


def judged(body: dict[str, Any]) -> bool:
    return "trust_judge" in body.get("align", {})


def prompt_length(body: dict[str, Any]) -> int:
    return len(body["messages"][0]["content"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a grid and four prompts of different length."""
    (tmp_path / "grid.toml").write_text(GRID)
    lines = [json.dumps("x" * length) for length in (1, 5, 9, 2)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def bench(folder: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run `infer-align bench quality`, one request at a time, and check its exit code."""

    def run(
        url: str,
        *arguments: object,
        code: int,
        scorer: str = "tests.bench.quality.test_faults:number",
    ) -> tuple[str, str]:
        command = ["bench", "quality", "--base-url", url, "--gold", scorer, "--concurrency", 1]
        command += ["--prompts", folder / "prompts.jsonl", "--grid", folder / "grid.toml"]
        command += ["--report", folder / "out.html", "--json", folder / "out.json", *arguments]
        actual = cli.main([str(argument) for argument in command])
        output = capsys.readouterr()
        assert actual == code, output.err
        return words(output.out), words(output.err)

    return run


def report(folder: Path) -> Any:
    return read(folder / "out.json")


def settings(folder: Path) -> dict[str, Any]:
    return {setting["name"]: setting for setting in report(folder)["settings"]}


def rows(folder: Path) -> list[str]:
    return (folder / "out.jsonl").read_text().splitlines()[1:]


def test_a_prompt_may_be_too_long_for_some_settings(peer: Any, bench: Bench, folder: Path) -> None:
    """Such settings are measured on the other prompts, and are on no front."""
    too_long = {"error": {"message": "too long", "code": "context_length_exceeded"}}

    def reply(body: dict[str, Any], _: int) -> Response:
        if "align" in body and prompt_length(body) == 9:
            return JSONResponse(too_long, 400)
        return chat("x 4")

    out, err = bench(peer(reply).url, code=1)
    assert report(folder)["refused"] == {}
    assert report(folder)["complete"] is False
    assert report(folder)["failed"] == {"best of 2": 1, "best of 3": 1, "judged": 1}
    assert settings(folder)["base"]["prompts"] == 4
    best = settings(folder)["best of 3"]
    assert (best["prompts"], best["missing"], best["fronts"]) == (3, 1, [])
    assert best["minus_baseline"]["value"] == 0.0, "over the prompts that both have"
    choices = {choice["use"] for choice in report(folder)["advice"]["tokens"]}
    assert choices <= {"base", "cold"}
    failure = "status 400 context_length_exceeded: too long"
    assert f"best of 3: 1 answers failed; first: {failure}; 1 prompts have no score" in out
    assert "not complete: 3 answers could not be received" in err


def test_a_setting_that_fails_for_every_prompt_is_refused(
    peer: Any, bench: Bench, folder: Path
) -> None:
    def reply(body: dict[str, Any], _: int) -> Response:
        if judged(body):
            return JSONResponse({"error": "no judge"}, 400)
        return chat("x 4")

    server = peer(reply)
    out, _ = bench(server.url, "--draws", 3, code=0)
    assert list(report(folder)["refused"]) == ["judged"]
    assert report(folder)["complete"] is True
    assert "judged: refused: status 400: no judge" in out
    assert sum(judged(body) for body in server.bodies) == 3, "then it is requested no more"


def test_the_cost_includes_all_tokens(peer: Any, bench: Bench, folder: Path) -> None:
    bench(peer(lambda *_: chat("x 4")).url, code=0)
    best = settings(folder)["best of 3"]
    assert best["tokens"] == 5 + 2 + 30 + 5
    assert best["generated"]["value"] == 2.0


def test_an_endpoint_without_usage_has_no_token_costs(
    peer: Any, bench: Bench, folder: Path
) -> None:
    bench(peer(lambda *_: chat("x 4", usage=None)).url, code=0)
    setting = settings(folder)["judged"]
    assert (setting["tokens"], setting["minus_equal"]) == (None, None)
    assert report(folder)["advice"]["tokens"] == []
    assert report(folder)["advice"]["seconds"]
    assert "No two settings can be compared" in (folder / "out.html").read_text()


def test_a_failed_answer_does_not_end_the_run(peer: Any, bench: Bench, folder: Path) -> None:
    broken = True

    def reply(body: dict[str, Any], _: int) -> Response:
        if broken and "temperature" in body and prompt_length(body) == 1:
            return events(ENDLESS, piece("x", "stop"))
        if broken and judged(body) and prompt_length(body) == 9:
            return chat("oops")
        return chat("x 4")

    url = peer(reply).url
    out, _ = bench(url, "--timeout", 3, code=1)
    assert report(folder)["failed"] == {"cold": 1, "judged": 1}
    assert "cold: 1 answers failed; first: " in out
    assert "no end within 3 s" in out
    assert "raised ValueError" in out
    assert len(rows(folder)) == 18
    broken = False
    bench(url, code=0)
    assert len(rows(folder)) == 20, "the second run measures the missing answers"


def test_an_endpoint_that_stops_answering_is_given_up(
    peer: Any, bench: Bench, folder: Path
) -> None:
    def reply(_: dict[str, Any], index: int) -> Response:
        return chat("x 4") if index < 8 else JSONResponse({"error": "gone"}, 503)

    server = peer(reply)
    _, err = bench(server.url, "--draws", 20, code=1)
    assert "given up: 20 requests failed one after the other" in err
    assert len(server.bodies) == 28
    assert len(rows(folder)) == 8
    assert report(folder)["complete"] is False


def test_a_key_that_a_server_quotes_is_not_written(
    peer: Any, bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = ("sk-secret-1", "sk-secret-2")
    monkeypatch.setenv("OPENAI_API_KEY", secrets[0])
    monkeypatch.setenv("GOLD_KEY", secrets[1])

    def reply(body: dict[str, Any], _: int) -> Response:
        if "temperature" not in body:
            return chat("x 4")
        denied = {"error": {"message": f"no access with {secrets[0]}", "code": "denied"}}
        return JSONResponse(denied, 403)

    async def scores(request: Request) -> Response:
        message = f"denied: {request.headers['authorization']}"
        return JSONResponse({"error": {"message": message}}, 403)

    url = peer(reply).url
    out, err = bench(url, code=1)
    assert "no access with ***" in out
    scoring = ["--gold-url", peer(reply, scores=scores).url, "--gold-api-key-env", "GOLD_KEY"]
    notebook = ["--notebook", folder / "other.jsonl"]
    scored_out, scored_err = bench(url, *scoring, *notebook, scorer="helpful", code=1)
    assert "denied: Bearer ***" in scored_out
    texts = [out, err, scored_out, scored_err]
    texts += [path.read_text() for path in folder.iterdir() if path.is_file()]
    for secret in secrets:
        assert secret not in "".join(texts)
