"""What goes wrong with single answers, settings, scorers and whole endpoints while `bench quality` runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from infer_align_server import cli
from tests.bench.conftest import events, piece

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
SPENT = {
    "engine_calls": 1,
    "reward_tokens": 30,
    "judge_prompt_tokens": 4,
    "judge_completion_tokens": 1,
}
ANSWERED = {"methods": [], "usage": SPENT}


def number(_: Any, text: str) -> float:
    """The scorer."""
    return float(text.rsplit(maxsplit=1)[-1])


def chat(text: str, **more: Any) -> JSONResponse:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    return JSONResponse({"choices": [choice], "usage": usage, "align": ANSWERED, **more})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "grid.toml").write_text(GRID)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps("x" * n) + "\n" for n in (1, 5, 9, 2))
    )
    return tmp_path


@pytest.fixture
def bench(place: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    def run(
        url: str,
        *arguments: object,
        code: int,
        scorer: str = "tests.bench.quality.test_faults:number",
    ) -> tuple[str, str]:
        files = [
            "--prompts",
            place / "prompts.jsonl",
            "--grid",
            place / "grid.toml",
            "--report",
            place / "out.html",
        ]
        more = [
            "--base-url",
            url,
            "--gold",
            scorer,
            "--json",
            place / "out.json",
            "--concurrency",
            1,
            *files,
            *arguments,
        ]
        found = cli.main(["bench", "quality", *map(str, more)])
        said = capsys.readouterr()
        assert found == code, said.err
        return " ".join(said.out.split()), " ".join(said.err.split())

    return run


def made(place: Path) -> Any:
    return json.loads((place / "out.json").read_text())


def settings(place: Path) -> dict[str, Any]:
    return {one["name"]: one for one in made(place)["settings"]}


def rows(place: Path) -> list[str]:
    return (place / "out.jsonl").read_text().splitlines()[1:]


def test_a_prompt_that_is_too_long_is_one_answers_failure(
    peer: Any, bench: Bench, place: Path
) -> None:
    """For the aligned settings only: they are measured on the rest, and stand on no front."""

    def answer(body: dict[str, Any], _: int) -> Response:
        if "align" in body and len(body["messages"][0]["content"]) == 9:
            return JSONResponse(
                {"error": {"message": "too long", "code": "context_length_exceeded"}}, 400
            )
        return chat("x 4")

    out, err = bench(peer(answer).url, code=1)
    assert made(place)["refused"] == {}
    assert made(place)["complete"] is False
    assert made(place)["failed"] == {"best of 2": 1, "best of 3": 1, "judged": 1}
    best = settings(place)["best of 3"]
    assert (
        settings(place)["base"]["prompts"],
        best["prompts"],
        best["missing"],
        best["fronts"],
    ) == (4, 3, 1, [])
    assert best["minus_baseline"]["value"] == 0.0, "over the prompts that both have"
    assert {one["use"] for one in made(place)["advice"]["tokens"]} <= {"base", "cold"}
    assert (
        "best of 3: 1 answers failed; first: status 400 context_length_exceeded: too long; 1 prompts have no score"
        in out
    )
    assert "not complete: 3 answers could not be had" in err


def test_a_setting_is_refused_when_it_is_at_every_prompt(
    peer: Any, bench: Bench, place: Path
) -> None:
    def answer(body: dict[str, Any], _: int) -> Response:
        return (
            JSONResponse({"error": "no judge"}, 400)
            if "trust_judge" in body.get("align", {})
            else chat("x 4")
        )

    server = peer(answer)
    out, _ = bench(server.url, "--draws", 3, code=0)
    assert list(made(place)["refused"]) == ["judged"]
    assert made(place)["complete"] is True
    assert "judged: refused: status 400: no judge" in out
    assert sum("trust_judge" in body.get("align", {}) for body in server.bodies) == 3, (
        "then it is asked no more"
    )


def test_everything_that_is_spent_is_the_budget(peer: Any, bench: Bench, place: Path) -> None:
    bench(peer(lambda *_: chat("x 4")).url, code=0)
    found = settings(place)["best of 3"]
    assert (found["tokens"], found["generated"]["value"]) == (5 + 2 + 30 + 5, 2.0)


def test_an_endpoint_that_counts_nothing(peer: Any, bench: Bench, place: Path) -> None:
    bench(peer(lambda *_: chat("x 4", usage=None)).url, code=0)
    found = settings(place)["judged"]
    assert (found["tokens"], found["minus_equal"]) == (None, None)
    assert made(place)["advice"]["tokens"] == []
    assert made(place)["advice"]["seconds"]
    assert "No two settings can be compared" in (place / "out.html").read_text()


def test_one_answer_that_fails_does_not_end_the_run(peer: Any, bench: Bench, place: Path) -> None:
    broken = True

    def answer(body: dict[str, Any], _: int) -> Response:
        long = len(body["messages"][0]["content"])
        if broken and "temperature" in body and long == 1:
            return events(4.0, piece("x", "stop"))
        return chat(
            "oops" if broken and "trust_judge" in body.get("align", {}) and long == 9 else "x 4"
        )

    url = peer(answer).url
    out, _ = bench(url, "--timeout", 1.5, code=1)
    assert made(place)["failed"] == {"cold": 1, "judged": 1}
    assert "cold: 1 answers failed; first: " in out
    assert "no end within 1.5 s" in out
    assert "raised ValueError" in out
    assert len(rows(place)) == 18
    broken = False
    bench(url, "--timeout", 1.5, code=0)
    assert len(rows(place)) == 20, "the same command has asked again"


def test_an_endpoint_that_goes_away_is_given_up(peer: Any, bench: Bench, place: Path) -> None:
    server = peer(
        lambda _, index: chat("x 4") if index < 8 else JSONResponse({"error": "gone"}, 503)
    )
    _, err = bench(server.url, "--draws", 20, code=1)
    assert "given up: 20 requests failed one after the other" in err
    assert len(server.bodies) == 28
    assert len(rows(place)) == 8
    assert made(place)["complete"] is False


def test_a_key_that_a_server_quotes_is_not_kept(
    peer: Any, bench: Bench, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    monkeypatch.setenv("GOLD_KEY", "sk-secret-2")

    def answer(body: dict[str, Any], _: int) -> Response:
        denied = {"error": {"message": "no access with sk-secret-1", "code": "denied"}}
        return JSONResponse(denied, 403) if "temperature" in body else chat("x 4")

    url = peer(answer).url
    out, err = bench(url, code=1)
    assert "no access with ***" in out

    async def quoting(request: Any) -> Response:
        return JSONResponse(
            {"error": {"message": f"denied: {request.headers['authorization']}"}}, 403
        )

    gold = peer(answer, scores=quoting).url
    more_out, more_err = bench(
        url,
        "--gold-url",
        gold,
        "--gold-api-key-env",
        "GOLD_KEY",
        "--notebook",
        place / "n",
        scorer="helpful",
        code=1,
    )
    assert "denied: Bearer ***" in more_out
    kept = "".join(path.read_text() for path in place.iterdir() if path.is_file())
    for secret in ("sk-secret-1", "sk-secret-2"):
        assert secret not in out + err + more_out + more_err + kept
