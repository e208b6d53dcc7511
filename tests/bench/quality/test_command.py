"""`infer-align bench quality` against our server over the fake engine, whose answers and scores are known."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse

from infer_align_server import cli
from tests.server.conftest import NUMBERS

ROOT = Path(__file__).parents[3]
# Candidate i says 3, 1, 9, 9, 5: the best of 1 and 2 is 3, of 3 and more 9. A reply has two tokens.
GRID = """
baseline = "base"
greedy = "greedy & <b>"
[[cells]]
name = "base"
[[cells]]
name = "greedy & <b>"
body = { temperature = 0 }
[[cells]]
name = "best of {n}"
align = { best_of_n = { n = "{n}" }, rewards = { number = 1.0 } }
over = { n = [2, 3, 5] }
equal_budget = true
[[cells]]
name = "shortest of 3"
align = { best_of_n = { n = 3 }, rewards = { brevity = 1.0 } }
[[cells]]
name = "unknown"
align = { no_such_method = {} }
"""
Bench = Callable[..., tuple[int, str, str]]


def gold(messages: Any, text: str) -> float:
    """The number, plus how long the question is: prompts differ, settings stand apart."""
    return float(text.rsplit(maxsplit=1)[-1]) + len(messages[-1]["content"])


def no_opinion(_: Any, __: str) -> float:
    return float("nan")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "grid.toml").write_text(GRID)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps("x" * n) + "\n" for n in (1, 5, 9, 2))
    )
    return tmp_path


@pytest.fixture
def bench(serve: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    live = serve(NUMBERS)

    def run(
        *arguments: object, scorer: str = "number", code: int | None = None
    ) -> tuple[int, str, str]:
        files = [
            "--prompts",
            place / "prompts.jsonl",
            "--grid",
            place / "grid.toml",
            "--report",
            place / "out.html",
        ]
        found = cli.main(
            [
                "bench",
                "quality",
                *map(str, ["--base-url", live.base_url, "--gold", scorer, *files, *arguments]),
            ]
        )
        said = capsys.readouterr()
        assert code is None or found == code, said.err
        return found, " ".join(said.out.split()), " ".join(said.err.split())

    return run


def rows(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()[1:]]


def test_a_report(bench: Bench, place: Path) -> None:
    _, out, _ = bench("--json", place / "out.json", code=0)
    made = json.loads((place / "out.json").read_text())
    by_name = {setting["name"]: setting for setting in made["settings"]}
    assert by_name["best of 3"]["gold"] == {"value": 9.0, "error": 0.0}
    assert by_name["best of 3"]["minus_baseline"]["value"] == 6.0
    assert (by_name["best of 5"]["tokens"], by_name["best of 5"]["generated"]["value"]) == (
        11.0,
        10.0,
    ), "the prompt has one"
    assert by_name["base"]["minus_baseline"] is None
    assert [one["use"] for one in made["advice"]["tokens"]] == ["base", "best of 3"]
    assert list(made["refused"]) == ["unknown"]
    page = (place / "out.html").read_text()
    means = {
        name: {row["gold"] for row in rows(place) if row["cell"] == name}
        for name in {row["cell"] for row in rows(place)}
    }
    assert means == {
        "base": {3.0},
        "greedy & <b>": {3.0},
        "best of 2": {3.0},
        "best of 3": {9.0},
        "best of 5": {9.0},
        "shortest of 3": {3.0},
    }
    assert {row["spent"] for row in rows(place) if row["cell"] == "best of 5"} == {10}
    assert {row["returned"] for row in rows(place)} == {2}
    assert made["complete"] is True
    assert "unknown: refused: status 400 unknown_field: align.no_such_method: no such key" in out
    assert "align.no_such_method: no such key" in page
    assert "By default: <b>best of 3</b> reaches 9.00" in page
    assert "Cheap: <b>best of 3</b>" in page
    assert 'name="viewport"' in page
    assert "0.19" in page, "the bound of best-of-2's KL"
    shortest = re.search(r"<td class=name>shortest of 3</td>.*?</tr>", page)
    assert shortest is not None
    assert "-6.00" in shortest.group(), "against the family at the same six tokens"


def test_the_page_stands_alone_and_names_are_text(bench: Bench, place: Path) -> None:
    bench(code=0)
    page = (place / "out.html").read_text()
    assert "<svg" in page
    assert "greedy &amp; &lt;b&gt;" in page
    assert "greedy & <b>" not in page
    for address in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert address.startswith("#"), address
    assert "<script" not in page
    assert "@import" not in page


def test_a_function_scores_and_pairs_take_out_the_prompts(bench: Bench, place: Path) -> None:
    _, out, _ = bench(scorer="tests.bench.quality.test_command:gold", code=0)
    assert re.search(r"best of 3 7\.00 \S+ 13\.2 ± 1\.8 \+6\.00 ± 0\.00", out), out


def test_it_goes_on_where_it_stopped(bench: Bench, place: Path, serve: Any) -> None:
    live = serve(NUMBERS)
    bench("--limit", 2, code=0)
    before = rows(place)
    sampled = live.engine.sampled
    bench("--limit", 2, code=0)
    assert live.engine.sampled == sampled, "all of it was there"
    with (place / "out.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    bench(code=0)
    lines = (place / "out.jsonl").read_text().splitlines()[1:]
    complete = [json.loads(line) for line in lines if line.endswith("}")]
    assert complete[: len(before)] == before
    assert len({(row["key"], row["draw"]) for row in complete}) == len(complete) == 4 * 6
    assert live.engine.sampled == sampled + 2 * (1 + 1 + 2 + 3 + 5 + 3)
    bench("--draws", 2, code=0)
    assert (
        sum(
            json.loads(line)["draw"]
            for line in (place / "out.jsonl").read_text().splitlines()[1:]
            if line.endswith("}")
        )
        == 4 * 6
    )


def test_a_notebook_of_another_question_is_refused(bench: Bench, place: Path) -> None:
    bench(code=0)
    _, _, err = bench("--seed", 3, scorer="brevity", code=2)
    assert "was made with another gold, seed" in err
    (place / "out.jsonl").write_text("hello\n")
    _, _, err = bench(code=2)
    assert "is no notebook of `bench quality`" in err


def test_the_order_does_not_favour_a_setting(bench: Bench, place: Path) -> None:
    bench("--concurrency", 1, code=0)
    order = [(row["prompt"], row["cell"]) for row in rows(place)]
    assert [prompt for prompt, _ in order] == sorted(prompt for prompt, _ in order), (
        "prompt by prompt"
    )
    firsts = [cell for i, (prompt, cell) in enumerate(order) if i == 0 or order[i - 1][0] != prompt]
    assert len(set(firsts)) > 1


@pytest.mark.parametrize(
    ("arguments", "scorer", "code", "message"),
    [
        ([], "nmber", 1, "no such reward; did you mean 'number'?"),
        ([], "no_such_module:f", 2, "--gold: 'no_such_module:f' cannot be imported"),
        ([], "tests.bench.quality.test_command:GRID", 2, "is not a function"),
        ([], "{oops", 2, "is not a JSON object"),
        (
            [],
            "tests.bench.quality.test_command:no_opinion",
            1,
            "no setting could be measured; first:",
        ),
        (["--prompts", "none.jsonl"], "number", 2, "none.jsonl cannot be read"),
        (["--limit", "1"], "number", 2, "--prompts: one prompt says nothing"),
        (["--grid", "none.toml"], "number", 2, "none.toml cannot be read"),
        (["--report", "no/such/place.html"], "number", 2, "no/such/place.html cannot be written"),
        (["--model", "nope"], "number", 1, "--model: 'nope' is not served"),
    ],
)
def test_what_is_wrong_is_named(
    bench: Bench, arguments: list[str], scorer: str, code: int, message: str
) -> None:
    _, _, err = bench(*arguments, scorer=scorer, code=code)
    assert message in err, err


def test_a_scorer_given_as_an_object(bench: Bench, place: Path) -> None:
    bench(
        "--limit",
        2,
        scorer='{"rewards": {"number": 0.5, "brevity": 1}, "ensemble": {"objective": "mean"}}',
        code=0,
    )
    assert {row["gold"] for row in rows(place) if row["cell"] == "best of 3"} == {0.5 * 9 - 2}


def test_every_setting_failing(serve: Any, bench: Bench, place: Path) -> None:
    replies = 'replies = [{text = "x 1", error = "the gears are stuck"}]'
    url = serve(
        f'[engine]\nkind = "fake"\n{replies}\n[rewards.number]\nkind = "rules"\nwords_weight = 1.0\n'
    ).base_url
    _, out, err = bench("--base-url", url, code=1)
    assert "no setting could be measured" in err
    assert "4 answers failed; first: status 502 engine_failed" in out
    assert "4 answers failed" in (place / "out.html").read_text()
    assert rows(place) == [], "what failed is tried again"


def test_an_endpoint_that_ignores_align(peer: Any, bench: Bench, place: Path, serve: Any) -> None:
    """Others answer 200 to fields they do not know: their plain answer must not pass for an aligned one."""
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "x 4"},
        "finish_reason": "stop",
    }
    url = peer(lambda *_: JSONResponse({"choices": [choice], "usage": usage})).url
    _, out, _ = bench("--base-url", url, "--gold-url", serve(NUMBERS).base_url, code=0)
    assert {(row["cell"], row["gold"]) for row in rows(place)} == {
        ("base", 4.0),
        ("greedy & <b>", 4.0),
    }
    assert "best of 5: refused: the endpoint ignored `align`" in out


def test_a_notebook_is_of_one_server(serve: Any, bench: Bench, place: Path) -> None:
    bench("--limit", 2, code=0)
    other = serve(NUMBERS.replace("candidate 3", "candidate 4"))
    _, _, err = bench("--limit", 2, "--base-url", other.base_url, code=2)
    assert "was made with another endpoint, gold endpoint" in err
    _, _, err = bench("--limit", 2, "--gold-url", other.base_url, code=2)
    assert "was made with another gold endpoint" in err
    bench("--limit", 2, "--base-url", other.base_url, "--notebook", place / "other.jsonl", code=0)
    assert {
        json.loads(line)["gold"] for line in (place / "other.jsonl").read_text().splitlines()[1:]
    } == {4.0, 9.0}


def test_a_prompt_that_stands_twice_is_asked_once(bench: Bench, place: Path) -> None:
    (place / "prompts.jsonl").write_text('"x"\n"yy"\n"x"\n')
    _, _, err = bench("--json", place / "out.json", code=0)
    assert "1 prompts stand twice" in err
    assert {one["prompts"] for one in json.loads((place / "out.json").read_text())["settings"]} == {
        2
    }


def test_an_interrupt_keeps_what_there_is(serve: Any, bench: Bench, place: Path) -> None:
    slow = serve(
        NUMBERS.replace('text = "candidate 3"', 'text = "candidate 3", first_token_seconds = 0.1')
    )
    files = [
        "--prompts",
        place / "prompts.jsonl",
        "--grid",
        place / "grid.toml",
        "--report",
        place / "out.html",
    ]
    command = [
        sys.executable,
        "-m",
        "infer_align_server",
        "bench",
        "quality",
        "--base-url",
        slow.base_url,
        "--gold",
        "number",
    ]
    paths = os.pathsep.join(
        str(ROOT / part) for part in (".", "kernels", "server", "clients/python")
    )
    with subprocess.Popen(
        [*map(str, [*command, *files]), "--draws", "50", "--concurrency", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
    ) as process:
        notebook = place / "out.jsonl"
        assert slow.until(
            lambda: notebook.exists() and len(notebook.read_text().splitlines()) > 12, 30
        )
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "the same command goes on from there" in " ".join(err.split())
    assert "Traceback" not in err
    assert "base" in out
    assert (
        "<td class=name>complete</td><td class=name>False</td>" in (place / "out.html").read_text()
    )
    assert len(rows(place)) >= 12
