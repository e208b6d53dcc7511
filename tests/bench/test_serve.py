"""`infer-align bench serve`, as a person runs it: against our server, against endpoints of others' manners, and against none."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from infer_align_server import cli
from tests.bench.conftest import events, piece

ROOT = Path(__file__).parents[2]
# A reply repeats its prompt, a word per token: how long it takes is how long the question is.
ECHO = """
[engine]
kind = "fake"
replies = [{text = "{prompt}", first_token_seconds = 0.1, seconds_per_token = 0.03}]
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[presets.four]
best_of_n = {n = 4}
"""
QUICK = '[engine]\nkind = "fake"\nreplies = [{text = "one two three"}]\n[rewards.r]\nkind = "rules"\nwords_weight = 1.0\n'
USAGE = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 2}}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "out.json"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# --- the figures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run over a known distribution: of five prompts one has 1 word, three have 5, one has 13."""
    place = tmp_path_factory.mktemp("known")
    words = [["x"] * n for n in (1, 5, 5, 5, 13)]
    (place / "chats.jsonl").write_text("".join(json.dumps(" ".join(w)) + "\n" for w in words))
    arguments = ["bench", "serve", "--base-url", serve(ECHO).base_url, "--dataset", str(place / "chats.jsonl")]
    more = ["--requests", "50", "--concurrency", "10", "--json", str(place / "out.json"), "--plot", str(place / "out.png")]
    assert cli.main([*arguments, *more, "--goodput", "e2e:300,ttft:1000"]) == 0
    assert (place / "out.png").read_bytes().startswith(b"\x89PNG")
    return read(place / "out.json")


# A busy machine is late, never early. The classes are further apart than this; the slowest of all may be anything.
SLACK_MS = {"ttft": 110, "e2e": 110, "tpot": 40, "itl": 40}


@pytest.mark.parametrize(
    ("metric", "figure", "expected"),
    [
        ("ttft", "p50", 130), ("ttft", "p99", 130),
        ("e2e", "p50", 100 + 5 * 30), ("e2e", "p90", 100 + 13 * 30), ("e2e", "p99", 100 + 13 * 30),
        ("e2e", "mean", 100 + (1 + 15 + 13) / 5 * 30),
        ("tpot", "p50", 30), ("itl", "p50", 30),
    ],
)  # fmt: skip
def test_percentiles_of_a_known_distribution(known: Any, metric: str, figure: str, expected: float) -> None:
    found = known["targets"]["A"]["latency_ms"][metric][figure]
    assert expected - 2 <= found["value"] <= expected + (2000 if figure == "p99" else SLACK_MS[metric])
    assert found["low"] <= found["value"] <= found["high"]


def test_each_request_took_what_its_words_take(known: Any) -> None:
    samples = [s for s in known["samples"] if s["target"] == "A"]
    assert len(samples) == 50
    for sample in samples:
        words = (1, 5, 5, 5, 13)[sample["index"] % 5]
        assert sample["returned"] == sample["spent"] == sample["chunks"] == sample["prompt_tokens"] == words
        assert sample["ended"] - sample["started"] >= 0.098 + 0.03 * words


def test_rates_and_goodput_add_up(known: Any) -> None:
    found = known["targets"]["A"]
    seconds = max(s["ended"] for s in known["samples"]) - min(s["intended"] for s in known["samples"])
    tokens = 10 * (1 + 15 + 13)
    assert found["rates"]["requests_per_second"]["value"] == pytest.approx(50 / seconds)
    assert found["rates"]["output_tokens_per_second"]["value"] == pytest.approx(tokens / seconds)
    assert found["tokens"]["returned"] == found["tokens"]["spent"] == tokens
    assert found["tokens"]["counted_by"] == "usage"
    met = sum((s["ended"] - s["intended"]) * 1e3 <= 300 for s in known["samples"])
    assert found["goodput"]["share"]["value"] == pytest.approx(met / 50)
    assert found["goodput"]["requests_per_second"]["value"] == pytest.approx(met / seconds)
    assert found["requests"] == {"sent": 50, "answered": 50, "failed": 0}
    assert known["schema"] == "infer-align/bench-serve/1"
    assert known["load"]["loop"] == "closed"


def test_a_selection_spends_more_than_it_returns(serve: Any, bench: Any, kept: Path) -> None:
    align, url = '{"best_of_n": {"n": 4}}', serve(QUICK).base_url
    code, out, _ = bench("--base-url", url, "--requests", 10, "--align", align, "--against", url, "--json", kept)
    assert code == 0
    ours, plain = read(kept)["targets"].values()
    assert (ours["tokens"]["spent"], ours["tokens"]["returned"], ours["tokens"]["spent_per_returned"]) == (120, 30, 4.0)
    assert ours["tokens"]["align"]["engine_calls"] == 40
    assert (plain["tokens"]["spent"], plain["tokens"]["returned"], plain["align"]) == (30, 30, None)
    assert not ours["latency_ms"]["tpot"], "it came in one piece: there is no rate at which tokens came"
    assert "answers came in one piece" in out
    assert "40 engine calls" in out
    assert read(kept)["ratios"]["pairs"] == 10
    assert read(kept)["ratios"]["e2e"]["p50"]["value"] > 0


def test_the_same_prompts_and_seeds_go_to_both(serve: Any, bench: Any, kept: Path) -> None:
    live = serve(ECHO.replace("0.1", "0.0").replace("0.03", "0.0"))
    before = len(live.engine.bodies)
    code, out, _ = bench(
        "--base-url", live.base_url, "--requests", 8, "--warmup", 0, "--concurrency", 1, "--seed", 7,
        "--against-model", f"{live.service.model}@four", "--json", kept, "--max-tokens", 2, "--body", '{"stop": ["zzz"]}',
    )  # fmt: skip
    assert code == 0
    bodies = live.engine.bodies[before:]
    assert len(bodies) == 16
    assert all(body["max_tokens"] == 2 and body["stop"] == ["zzz"] for body in bodies)
    for i in range(0, 16, 2):
        assert bodies[i]["messages"] == bodies[i + 1]["messages"]
    assert "A / B, 8 pairs" in out
    assert [t["model"] for t in read(kept)["targets"].values()] == ["fake", "fake@four"]


# --- the open loop ------------------------------------------------------------------------------------------------------

STALL = 0.6


def stalls(at: int) -> Any:
    """An endpoint that stands still once: nobody is answered meanwhile."""

    def answer(_: dict[str, Any], index: int) -> Response:
        if index == at:
            time.sleep(STALL)
        return events(piece("x"), piece("y"), piece(None, "stop"), USAGE)

    return answer


def waited(samples: list[dict[str, Any]], since: str) -> int:
    """How many requests took over a sixth of the stall."""
    return sum(sample["ended"] - sample[since] > STALL / 6 for sample in samples)


def test_a_stall_is_felt_by_all_that_came_meanwhile(peer: Any, bench: Any, kept: Path) -> None:
    load = ["--requests", 100, "--warmup", 0, "--json", kept]
    assert bench("--base-url", peer(stalls(30)).url, *load)[0] == 0
    closed = read(kept)["samples"]
    assert bench("--base-url", peer(stalls(30)).url, *load, "--rate", 100)[0] == 0
    opened = read(kept)
    assert waited(closed, "intended") <= 10, "a closed loop asks nothing while it waits, and so hardly sees it"
    assert waited(opened["samples"], "intended") >= 25
    assert opened["targets"]["A"]["latency_ms"]["e2e"]["p90"]["value"] > STALL * 1e3 / 6


def test_waiting_in_the_client_counts_too(peer: Any, bench: Any, kept: Path) -> None:
    code, out, _ = bench(
        "--base-url", peer(stalls(30)).url, "--requests", 100, "--warmup", 0, "--rate", 100, "--max-in-flight", 1, "--json", kept
    )
    assert code == 0
    found = read(kept)
    assert waited(found["samples"], "started") <= 10, "measured from when it was sent, the stall would vanish"
    assert waited(found["samples"], "intended") >= 25
    assert found["targets"]["A"]["latency_ms"]["e2e"]["p90"]["value"] > STALL * 1e3 / 6
    assert "or --max-in-flight, was the limit" in out


# --- other endpoints ----------------------------------------------------------------------------------------------------


def test_an_endpoint_without_usage(peer: Any, bench: Any, kept: Path) -> None:
    url = peer(lambda *_: events(piece(None), piece("a b"), piece("c d"), piece("e", "stop"))).url
    code, out, _ = bench("--base-url", url, "--requests", 5, "--json", kept)
    assert code == 0
    tokens = read(kept)["targets"]["A"]["tokens"]
    assert (tokens["counted_by"], tokens["returned"], tokens["chunks"]) == ("chunks", 15, 15)
    assert "tokens counted by chunks" in out


def test_an_endpoint_that_ignores_align(peer: Any, bench: Any) -> None:
    url = peer(lambda *_: events(piece("x", "stop"), USAGE)).url
    _, out, _ = bench("--base-url", url, "--requests", 2, "--align", '{"best_of_n": {"n": 4}}')
    assert "this endpoint ignores it" in out
    _, out, _ = bench("--base-url", url, "--requests", 2)
    assert "ignores" not in out


def test_chunks_that_hold_several_tokens(peer: Any, bench: Any, kept: Path) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 8}}
    url = peer(lambda *_: events(piece("a b c d"), 0.02, piece("e f g h", "stop"), usage)).url
    code, out, _ = bench("--base-url", url, "--requests", 5, "--json", kept)
    assert code == 0
    figures = read(kept)["targets"]["A"]
    assert figures["tokens"]["tokens_per_chunk"] == 4
    assert "a chunk holds 4.00 tokens" in out
    assert figures["latency_ms"]["itl"]["mean"]["value"] == pytest.approx(7 * figures["latency_ms"]["tpot"]["mean"]["value"])


def test_answers_that_are_not_streamed(serve: Any, bench: Any, kept: Path) -> None:
    assert bench("--base-url", serve(QUICK).base_url, "--requests", 5, "--no-stream", "--json", kept)[0] == 0
    figures = read(kept)["targets"]["A"]
    assert figures["latency_ms"]["ttft"] == figures["latency_ms"]["itl"] == {}
    assert figures["tokens"]["returned"] == 15
    assert figures["latency_ms"]["e2e"]["p50"]["value"] > 0


def test_fields_can_be_left_out(peer: Any, bench: Any) -> None:
    server = peer(lambda *_: events(piece("x", "stop"), USAGE))
    code, _, _ = bench(
        "--base-url", server.url, "--requests", 2, "--warmup", 0, "--body", '{"seed": null, "stream_options": null}',
        "--dataset", "synthetic", "--input-tokens", "5-9", "--output-tokens", "3",
    )  # fmt: skip
    assert code == 0
    for body in server.bodies:
        assert set(body) == {"model", "messages", "stream", "max_tokens"}
        assert body["model"] == "tiny"
        assert body["max_tokens"] == 3
        assert 5 <= len(body["messages"][0]["content"].split()) <= 9


def test_an_endpoint_that_lists_no_models(peer: Any, bench: Any) -> None:
    server = peer(lambda *_: events(piece("x", "stop"), USAGE), JSONResponse({"detail": "Not Found"}, 404))
    assert bench("--base-url", server.url, "--model", "any", "--requests", 2)[0] == 0
    code, _, err = bench("--base-url", server.url, "--requests", 2)
    assert code == 1
    assert "no list of models; name one with --model" in err


# --- what goes wrong ----------------------------------------------------------------------------------------------------


def test_an_unreachable_target(bench: Any, kept: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    code, _, err = bench("--base-url", f"http://127.0.0.1:{port}/v1", "--json", kept)
    assert code == 1
    assert f"127.0.0.1:{port}/v1 cannot be reached" in err
    assert "is the server running?" in err
    assert not kept.exists()


def test_a_wrong_model_lists_what_is_served(peer: Any, bench: Any) -> None:
    server = peer(lambda *_: events(piece("x", "stop")))
    code, _, err = bench("--base-url", server.url, "--model", "tinny")
    assert code == 1
    assert "--model: 'tinny' is not served" in err
    assert "did you mean 'tiny'?" in err
    assert "It serves: large, tiny." in err
    assert server.bodies == []


SECRET = "sk-very-secret-key-123"


@pytest.mark.parametrize("given", [None, SECRET])
def test_a_refused_key(serve: Any, bench: Any, monkeypatch: pytest.MonkeyPatch, given: str | None, kept: Path) -> None:
    monkeypatch.setenv("THE_KEYS", "right")
    monkeypatch.delenv("MY_KEY", raising=False)
    if given:
        monkeypatch.setenv("MY_KEY", given)
    url = serve(QUICK + '[server]\napi_keys_env = "THE_KEYS"\n').base_url
    code, out, err = bench("--base-url", url, "--api-key-env", "MY_KEY")
    assert code == 1
    assert "status 401" in err
    assert ("the key in MY_KEY was refused" if given else "no key was sent, MY_KEY is not set") in err
    assert SECRET not in out + err
    monkeypatch.setenv("MY_KEY", "right")
    assert bench("--base-url", url, "--api-key-env", "MY_KEY", "--requests", 3, "--json", kept)[0] == 0


def test_a_key_that_a_server_quotes_is_not_shown(peer: Any, bench: Any, monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    said = {"error": {"message": f"Incorrect API key provided: {SECRET}.", "code": "invalid_api_key"}}
    server = peer(lambda *_: JSONResponse(said, 401))
    code, out, err = bench("--base-url", server.url, "--requests", 3, "--warmup", 0, "--json", kept)
    assert code == 1
    assert server.keys[0] == f"Bearer {SECRET}", "it was sent"
    assert "Incorrect API key provided: ***." in err
    assert SECRET not in out + err + kept.read_text()
    refusing = peer(lambda *_: events(), JSONResponse(said, 401))
    code, out, err = bench("--base-url", refusing.url)
    assert code == 1
    assert "***" in err
    assert SECRET not in out + err


def test_a_key_goes_to_its_own_server_only(peer: Any, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("THEIR_KEY", "sk-theirs")
    ours, theirs = (peer(lambda *_: events(piece("x", "stop"), USAGE)) for _ in range(2))
    assert bench("--base-url", ours.url, "--against", theirs.url, "--requests", 2, "--warmup", 0)[0] == 0
    assert (set(ours.keys), set(theirs.keys)) == ({f"Bearer {SECRET}"}, {None})
    assert bench("--base-url", ours.url, "--against", ours.url, "--requests", 2, "--warmup", 0)[0] == 0
    assert set(ours.keys) == {f"Bearer {SECRET}"}
    theirs.keys.clear()
    more = ["--against-api-key-env", "THEIR_KEY", "--requests", 2, "--warmup", 0]
    assert bench("--base-url", ours.url, "--against", theirs.url, *more)[0] == 0
    assert set(theirs.keys) == {"Bearer sk-theirs"}


def test_a_password_in_an_address_is_not_kept(peer: Any, bench: Any, kept: Path) -> None:
    url = peer(lambda *_: events(piece("x", "stop"), USAGE)).url.replace("://", "://me:hunter2@")
    code, out, err = bench("--base-url", url, "--requests", 2, "--json", kept)
    assert code == 0
    assert "hunter2" not in out + err + kept.read_text()
    code, out, err = bench("--base-url", url, "--model", "nope")
    assert code == 1
    assert "hunter2" not in out + err


def test_every_request_failing(serve: Any, bench: Any, kept: Path) -> None:
    url = serve(
        '[engine]\nkind = "fake"\nreplies = [{text = "x y", seconds_per_token = 0.02, error = "the gears are stuck"}]\n'
    ).base_url
    code, out, err = bench("--base-url", url, "--requests", 6, "--warmup", 0, "--json", kept)
    assert code == 1
    assert "no request to A was answered" in err
    assert "the gears are stuck" in err
    assert "6 x error event engine_failed" in out
    found = read(kept)["targets"]["A"]
    assert found["requests"] == {"sent": 6, "answered": 0, "failed": 6}
    assert found["errors"]["error event engine_failed"]["count"] == 6
    code, _, err = bench("--base-url", url, "--requests", 6)
    assert code == 1
    assert "every request of the warm-up failed at A: error event engine_failed" in err


def test_a_wrong_align_is_said_before_the_load(serve: Any, bench: Any) -> None:
    code, _, err = bench("--base-url", serve(QUICK).base_url, "--align", '{"best_of": {}}')
    assert code == 1
    assert "align.best_of: no such key; did you mean 'best_of_n'?" in err


def test_errors_are_counted_by_kind(peer: Any, bench: Any, kept: Path) -> None:
    def answer(_: dict[str, Any], index: int) -> Response:
        return [
            events(piece("x"), piece("y", "stop"), USAGE),
            JSONResponse({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, 429),
            events(piece("x"), end=False),
            events(piece("x"), 5.0, piece("y", "stop")),
            Response("<html>oops</html>", 502),
            JSONResponse({"hello": "there"}),
        ][index % 6]

    url = peer(answer).url
    code, out, _ = bench(
        "--base-url", url, "--requests", 12, "--warmup", 0, "--timeout", 0.5, "--json", kept, "--goodput", "e2e:60000"
    )
    assert code == 0, "some were answered"
    found = read(kept)["targets"]["A"]
    kinds = {"http 429 rate_limit_exceeded", "stream cut", "timeout", "http 502", "not an answer"}
    assert {kind: error["count"] for kind, error in found["errors"].items()} == dict.fromkeys(kinds, 2)
    assert found["requests"] == {"sent": 12, "answered": 2, "failed": 10}
    assert found["goodput"]["share"]["value"] == pytest.approx(2 / 12), "what fails meets no goal"
    assert "2 x http 429 rate_limit_exceeded: slow down" in out


WRONG = [
    (["--concurrency", "2", "--rate", "3"], 2, "--concurrency and --rate: one of them"),
    (["--max-in-flight", "2"], 2, "--max-in-flight: only with --rate"),
    (["--goodput", "tfft:200"], 2, "--goodput: 'tfft:200' is not allowed"),
    (["--goodput", "ttft:fast"], 2, "--goodput: 'ttft:fast' is not allowed"),
    (["--base-url", "localhost:8000"], 2, "--base-url: 'localhost:8000' is not allowed"),
    (["--dataset", "nowhere.jsonl"], 2, "prompts: nowhere.jsonl cannot be read"),
    (["--json", "no/such/folder/x.json"], 2, "no/such/folder/x.json cannot be written"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG)
def test_wrong_options(bench: Any, arguments: list[str], code: int, message: str) -> None:
    found, _, err = bench(*arguments)
    assert (found, message in err) == (code, True), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "--rate: '0' is not allowed"),
        (["--rate", "nan"], "--rate"),
        (["--concurrency", "-1"], "--concurrency"),
        (["--requests", "many"], "--requests: 'many' is not allowed"),
        (["--align", "[1]"], "--align: '[1]' is not a JSON object"),
        (["--align", "{"], "is not JSON"),
        (["--input-tokens", "9-5"], "must be like 64 or 32-128"),
        (["--warmup", "-2"], "--warmup"),
    ],
)
def test_wrong_flags(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "serve", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"message": []}', '{"messages": []}', '{"messages": "x"}', "3", "{"])
def test_a_wrong_line_is_named(bench: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(f'"fine"\n\n{content}\n')
    code, _, err = bench("--dataset", path)
    assert code == 2
    assert "chats.jsonl:3" in err.replace(" ", "")


@pytest.mark.parametrize("loop", [["--concurrency", "3"], ["--rate", "30"]])
@pytest.mark.parametrize("caught", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_there_is(serve: Any, kept: Path, caught: int, loop: list[str]) -> None:
    live = serve(ECHO)
    command = [sys.executable, "-m", "infer_align_server", "bench", "serve", "--base-url", live.base_url, "--json", str(kept)]
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "server", "clients/python"))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "error"}
    before = live.engine.sampled
    with subprocess.Popen(
        [*command, "--requests", "100000", "--warmup", "0", *loop],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
    ) as process:  # fmt: skip
        assert live.until(lambda: live.engine.sampled > before + 10, 30)
        process.send_signal(caught)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "interrupted:" in err
    assert "Traceback" not in err
    found = read(kept)
    assert found["interrupted"]
    assert found["abandoned"] > 0
    assert found["targets"]["A"]["requests"]["answered"] > 0
    assert "end to end, ms" in out
    assert live.idle(5), "what was given up is cancelled at the server too"


def test_the_signals_are_given_back(serve: Any, bench: Any) -> None:
    before = [signal.getsignal(caught) for caught in (signal.SIGINT, signal.SIGTERM)]
    assert bench("--base-url", serve(QUICK).base_url, "--requests", 2)[0] == 0
    assert [signal.getsignal(caught) for caught in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("aiohttp", ["serve"]),
        ("matplotlib", ["serve", "--plot", "x.png"]),
        ("matplotlib", ["quality", "--prompts", "demo", "--gold", "x", "--grid", "benchmarks/alignment/demo_grid.toml"]),
    ],
)
def test_a_missing_package_is_named_before_the_load(package: str, arguments: list[str]) -> None:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "server", "clients/python"))
    call = f"from infer_align_server import cli; sys.exit(cli.main({['bench', *arguments]}))"
    code = f"import sys; sys.modules[{package!r}] = None; {call}"
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f"{package} is not installed; install it with: pip install 'infer-align[bench]'" in done.stderr
