"""`infer-align bench quality` measures our server, whose answers and scores are known."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse

from infer_align_server import cli
from tests.bench.conftest import PATIENT_SECONDS, CommandResult, bench_process, read, words
from tests.server.conftest import NUMBERS

pytestmark = pytest.mark.slow

# The candidates are 3, 1, 9, 9, 5: the best of 1 and 2 is 3, of 3 and more it is 9. A reply has
# two tokens.
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
# Settings that the server answers, and the candidates that they draw for a prompt.
MEASURED_SETTINGS = 6
CANDIDATES = 1 + 1 + 2 + 3 + 5 + 3
FAILING = """
[engine]
kind = "fake"
replies = [{text = "x 1", error = "the gears are stuck"}]
[rewards.number]
kind = "rules"
words_weight = 1.0
"""
MODULE = "tests.bench.quality.test_command"
Bench = Callable[..., CommandResult]


def gold(messages: Any, text: str) -> float:
    """Score the number plus the length of the question, so that prompts differ."""
    return float(text.rsplit(maxsplit=1)[-1]) + len(messages[-1]["content"])


def no_score(_: Any, __: str) -> float:
    return float("nan")


def write_inputs(folder: Path) -> Path:
    """Write a grid and four prompts of different length into a folder, and return the folder."""
    (folder / "grid.toml").write_text(GRID)
    lines = [json.dumps("x" * length) for length in (1, 5, 9, 2)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_inputs(tmp_path)


def files(folder: Path) -> list[object]:
    return [
        "--prompts",
        folder / "prompts.jsonl",
        "--grid",
        folder / "grid.toml",
        "--report",
        folder / "out.html",
    ]


@pytest.fixture
def bench(serve: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run `infer-align bench quality`, and check its exit code."""
    live = serve(NUMBERS)

    def run(*arguments: object, scorer: str = "number", code: int = 0) -> CommandResult:
        target = ["--base-url", live.base_url, "--gold", scorer]
        command = ["bench", "quality", *target, *files(folder), *arguments]
        actual = cli.main([str(argument) for argument in command])
        output = capsys.readouterr()
        assert actual == code, output.err
        return actual, words(output.out), words(output.err)

    return run


@pytest.fixture(scope="module")
def measured(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of one run, for the tests that only read them."""
    folder = write_inputs(tmp_path_factory.mktemp("measured"))
    target = ["--base-url", serve(NUMBERS).base_url, "--gold", "number"]
    command = ["bench", "quality", *target, *files(folder), "--json", folder / "out.json"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert cli.main([str(argument) for argument in command]) == 0
    (folder / "out.txt").write_text(words(output.getvalue()))
    return folder


def row_lines(path: Path) -> list[str]:
    """Return the complete rows of a notebook, without its header."""
    return [line for line in path.read_text().splitlines()[1:] if line.endswith("}")]


def rows(folder: Path, name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in row_lines(folder / name)]


def gold_by_setting(folder: Path) -> dict[str, set[float]]:
    scores: dict[str, set[float]] = {}
    for row in rows(folder):
        scores.setdefault(row["cell"], set()).add(row["gold"])
    return scores


def test_a_report_has_the_figures_of_every_setting(measured: Path) -> None:
    report = read(measured / "out.json")
    out = (measured / "out.txt").read_text()
    settings = {setting["name"]: setting for setting in report["settings"]}
    best_of_3 = settings["best of 3"]
    best_of_5 = settings["best of 5"]
    assert best_of_3["gold"] == {"value": 9.0, "error": 0.0}
    assert best_of_3["minus_baseline"]["value"] == 6.0
    assert best_of_5["generated"]["value"] == 10.0
    assert best_of_5["tokens"] == 11.0, "the prompt has one token"
    assert settings["base"]["minus_baseline"] is None
    assert [choice["use"] for choice in report["advice"]["tokens"]] == ["base", "best of 3"]
    assert list(report["refused"]) == ["unknown"]
    assert report["complete"] is True
    assert "unknown: refused: status 400 unknown_field: align.no_such_method: no such key" in out


def test_a_notebook_has_every_answer(measured: Path) -> None:
    assert gold_by_setting(measured) == {
        "base": {3.0},
        "greedy & <b>": {3.0},
        "best of 2": {3.0},
        "best of 3": {9.0},
        "best of 5": {9.0},
        "shortest of 3": {3.0},
    }
    assert {row["spent"] for row in rows(measured) if row["cell"] == "best of 5"} == {10}
    assert {row["returned"] for row in rows(measured)} == {2}


def test_a_page_names_the_settings_to_use(measured: Path) -> None:
    page = (measured / "out.html").read_text()
    assert "align.no_such_method: no such key" in page
    assert "By default: <b>best of 3</b> reaches 9.00" in page
    assert "Cheap: <b>best of 3</b>" in page
    assert 'name="viewport"' in page
    assert "0.19" in page, "the KL bound of best-of-2"
    shortest = re.search(r"<td class=name>shortest of 3</td>.*?</tr>", page)
    assert shortest is not None
    assert "-6.00" in shortest.group(), "compared with the family at the same six tokens"


def test_answers_stand_side_by_side(measured: Path) -> None:
    page = (measured / "out.html").read_text()
    section = page[page.index("Answers side by side") :]
    header = "".join(f"<th class=name>{'x' * length}</th>" for length in (1, 5, 9, 2))
    assert header in section
    best = re.search(r"<td class=name>best of 3</td>(.*?)</tr>", section)
    assert best is not None
    assert best.group(1).count("candidate 9") == 4
    assert "gold 9.00" in best.group(1)
    unknown = re.search(r"<td class=name>unknown</td>(.*?)</tr>", section)
    assert unknown is not None
    assert unknown.group(1).count("no answer") == 4


def test_a_banner_says_where_the_gold_selects(bench: Bench, folder: Path, measured: Path) -> None:
    out = (measured / "out.txt").read_text()
    (warning,) = read(measured / "out.json")["warnings"]
    assert "'number' scores the answers" in warning
    assert "in: best of 2, best of 3, best of 5." in warning
    assert warning in out
    page = (measured / "out.html").read_text()
    assert page.index("class=warning>The gold also selects") < page.index("By default:")
    _, out, _ = bench("--notebook", folder / "other.jsonl", scorer=f"{MODULE}:gold")
    assert "warning" not in out


def test_a_page_needs_no_other_file_and_escapes_names(measured: Path) -> None:
    page = (measured / "out.html").read_text()
    assert "<svg" in page
    assert "greedy &amp; &lt;b&gt;" in page
    assert "greedy & <b>" not in page
    for address in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert address.startswith("#"), address
    assert "<script" not in page
    assert "@import" not in page


def test_pairs_remove_the_variation_of_the_prompts(bench: Bench) -> None:
    _, out, _ = bench(scorer=f"{MODULE}:gold")
    assert re.search(r"best of 3 7\.00 \S+ 13\.2 ± 1\.8 \+6\.00 ± 0\.00", out), out


def test_a_run_continues_from_its_notebook(bench: Bench, folder: Path, serve: Any) -> None:
    engine = serve(NUMBERS).engine
    bench("--limit", 2)
    first_rows = rows(folder)
    sampled = engine.sampled
    bench("--limit", 2)
    assert engine.sampled == sampled, "no answer was missing"
    with (folder / "out.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    bench()
    all_rows = rows(folder)
    assert all_rows[: len(first_rows)] == first_rows
    keys = {(row["key"], row["draw"]) for row in all_rows}
    assert len(keys) == len(all_rows) == 4 * MEASURED_SETTINGS
    assert engine.sampled == sampled + 2 * CANDIDATES
    bench("--draws", 2)
    assert sum(row["draw"] for row in rows(folder)) == 4 * MEASURED_SETTINGS


def test_a_notebook_of_another_measurement_is_refused(bench: Bench, folder: Path) -> None:
    bench()
    _, _, err = bench("--seed", 3, scorer="brevity", code=2)
    assert "was made with another gold, seed" in err
    (folder / "out.jsonl").write_text("hello\n")
    _, _, err = bench(code=2)
    assert "is not a notebook of `bench quality`" in err


def test_the_order_of_the_settings_is_random(bench: Bench, folder: Path) -> None:
    bench("--concurrency", 1)
    prompts = [row["prompt"] for row in rows(folder)]
    assert prompts == sorted(prompts), "prompt by prompt"
    first_settings = {}
    for row in rows(folder):
        first_settings.setdefault(row["prompt"], row["cell"])
    assert len(set(first_settings.values())) > 1


@pytest.mark.parametrize(
    ("arguments", "scorer", "code", "message"),
    [
        ([], "nmber", 1, "no such reward; did you mean 'number'?"),
        ([], "no_such_module:f", 2, "--gold: 'no_such_module:f' cannot be imported"),
        ([], f"{MODULE}:GRID", 2, "is not a function"),
        ([], "{oops", 2, "is not a JSON object"),
        ([], f"{MODULE}:no_score", 1, "no setting could be measured; first:"),
        (["--prompts", "none.jsonl"], "number", 2, "none.jsonl cannot be read"),
        (["--limit", "1"], "number", 2, "--prompts: 1 prompt is too few"),
        (["--grid", "none.toml"], "number", 2, "none.toml cannot be read"),
        (["--report", "no/such/place.html"], "number", 2, "no/such/place.html cannot be written"),
        (["--model", "nope"], "number", 1, "--model: 'nope' is not served"),
    ],
)
def test_a_wrong_argument_is_named(
    bench: Bench, arguments: list[str], scorer: str, code: int, message: str
) -> None:
    _, _, err = bench(*arguments, scorer=scorer, code=code)
    assert message in err


def test_a_scorer_may_be_an_object(bench: Bench, folder: Path) -> None:
    scorer = '{"rewards": {"number": 0.5, "brevity": 1}, "ensemble": {"objective": "mean"}}'
    bench("--limit", 2, scorer=scorer)
    assert gold_by_setting(folder)["best of 3"] == {0.5 * 9 - 2}


def test_a_run_without_answers_fails(serve: Any, bench: Bench, folder: Path) -> None:
    _, out, err = bench("--base-url", serve(FAILING).base_url, code=1)
    assert "no setting could be measured" in err
    assert "4 answers failed; first: status 502 engine_failed" in out
    assert "4 answers failed" in (folder / "out.html").read_text()
    assert rows(folder) == [], "a failed answer is requested again"


def test_an_endpoint_that_ignores_align_is_refused(
    peer: Any, bench: Bench, folder: Path, serve: Any
) -> None:
    """Other servers ignore unknown fields: their answer must not count as an aligned one."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "x 4"},
        "finish_reason": "stop",
    }
    answer = {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    url = peer(lambda *_: JSONResponse(answer)).url
    _, out, _ = bench("--base-url", url, "--gold-url", serve(NUMBERS).base_url)
    assert gold_by_setting(folder) == {"base": {4.0}, "greedy & <b>": {4.0}}
    assert "best of 5: refused: the endpoint ignored `align`" in out


def test_a_notebook_belongs_to_one_server(serve: Any, bench: Bench, folder: Path) -> None:
    bench("--limit", 2)
    other = serve(NUMBERS.replace("candidate 3", "candidate 4"))
    _, _, err = bench("--limit", 2, "--base-url", other.base_url, code=2)
    assert "was made with another endpoint, gold endpoint" in err
    _, _, err = bench("--limit", 2, "--gold-url", other.base_url, code=2)
    assert "was made with another gold endpoint" in err
    notebook = ["--notebook", folder / "other.jsonl"]
    bench("--limit", 2, "--base-url", other.base_url, *notebook)
    assert {row["gold"] for row in rows(folder, "other.jsonl")} == {4.0, 9.0}


def test_a_duplicate_prompt_is_left_out(bench: Bench, folder: Path) -> None:
    (folder / "prompts.jsonl").write_text('"x"\n"yy"\n"x"\n')
    _, _, err = bench("--json", folder / "out.json")
    assert "1 duplicate prompts are left out" in err
    settings = read(folder / "out.json")["settings"]
    assert {setting["prompts"] for setting in settings} == {2}


def test_an_interrupted_run_writes_a_report(serve: Any, folder: Path) -> None:
    reply = 'text = "candidate 3"'
    slow = serve(NUMBERS.replace(reply, f"{reply}, first_token_seconds = 0.1"))
    target = ["quality", "--base-url", slow.base_url, "--gold", "number", *files(folder)]
    notebook = folder / "out.jsonl"
    with bench_process(*target, "--draws", 50, "--concurrency", 2) as process:
        assert slow.until(
            lambda: notebook.exists() and len(row_lines(notebook)) >= 12, PATIENT_SECONDS
        )
        process.popen.send_signal(signal.SIGINT)
        status, out, err = process.finish()
    assert status == 130, err
    assert "run the same command again to continue from there" in words(err)
    assert "Traceback" not in err
    assert "base" in out
    page = (folder / "out.html").read_text()
    assert "<td class=name>complete</td><td class=name>False</td>" in page
    assert len(rows(folder)) >= 12
