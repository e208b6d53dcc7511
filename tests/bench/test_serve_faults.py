"""`infer-align bench serve` reports wrong targets, keys and options, and keeps interrupted runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from starlette.responses import JSONResponse, Response

from benchmarks.serving.ports import free_port
from infer_align_bench.failures import classify_failure
from tests.bench.conftest import (
    ECHO,
    FIRST,
    PATIENT_SECONDS,
    QUICK,
    USAGE,
    bench_process,
    events,
    piece,
    read,
    words,
)
from tests.bench.programs import without_matplotlib, without_uvloop
from tests.server.processes import run

pytestmark = pytest.mark.slow

SECRET = "sk-very-secret-key-123"
FAILING = """
[engine]
kind = "fake"
replies = [{text = "x y", seconds_per_token = 0.02, error = "the gears are stuck"}]
"""
# Longer than any timeout of a test: the client gives up first.
ENDLESS = 600.0


def answered(*_: Any) -> Response:
    return events(piece("x", "stop"), USAGE)


def test_an_unreachable_target_is_named(bench: Any, out_path: Path) -> None:
    port = free_port()
    code, _, err = bench("--base-url", f"http://127.0.0.1:{port}/v1", "--json", out_path)
    assert code == 1
    assert f"127.0.0.1:{port}/v1 cannot be reached" in err
    assert "cannot be reached: connection refused; is the server running?" in err
    assert not out_path.exists()


def test_a_wrong_model_lists_the_served_ones(peer: Any, bench: Any) -> None:
    server = peer(answered)
    code, _, err = bench("--base-url", server.url, "--model", "tinny")
    assert code == 1
    assert "--model: 'tinny' is not served" in err
    assert "did you mean 'tiny'?" in err
    assert "It serves: large, tiny." in err
    assert server.bodies == []


@pytest.mark.parametrize("key", [None, SECRET])
def test_a_refused_key_is_named_but_not_printed(
    serve: Any, bench: Any, monkeypatch: pytest.MonkeyPatch, key: str | None, out_path: Path
) -> None:
    monkeypatch.setenv("THE_KEYS", "right")
    monkeypatch.delenv("MY_KEY", raising=False)
    if key:
        monkeypatch.setenv("MY_KEY", key)
    url = serve(QUICK + '[server]\napi_keys_env = "THE_KEYS"\n').base_url
    target = ["--base-url", url, "--api-key-env", "MY_KEY"]
    code, out, err = bench(*target)
    assert code == 1
    assert "status 401" in err
    problem = "the key in MY_KEY was refused" if key else "no key was sent, MY_KEY is not set"
    assert problem in err
    assert SECRET not in out + err
    monkeypatch.setenv("MY_KEY", "right")
    code, _, _ = bench(*target, "--requests", 3, "--json", out_path)
    assert code == 0


def test_a_key_that_a_server_quotes_is_not_printed(
    peer: Any, bench: Any, monkeypatch: pytest.MonkeyPatch, out_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    message = f"Incorrect API key provided: {SECRET}."
    refusal = JSONResponse({"error": {"message": message, "code": "invalid_api_key"}}, 401)
    server = peer(lambda *_: refusal)
    load = ["--requests", 3, "--warmup", 0, "--json", out_path]
    code, out, err = bench("--base-url", server.url, *load)
    assert code == 1
    assert server.keys[0] == f"Bearer {SECRET}"
    assert "Incorrect API key provided: ***." in err
    assert SECRET not in out + err + out_path.read_text()
    code, out, err = bench("--base-url", peer(answered, refusal).url)
    assert code == 1
    assert "***" in err
    assert SECRET not in out + err


def test_a_key_goes_to_its_own_server_only(
    peer: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("SECOND_KEY", "sk-second")
    first = peer(answered)
    second = peer(answered)
    load = ["--requests", 2, "--warmup", 0]
    code, _, _ = bench("--base-url", first.url, "--against", second.url, *load)
    assert code == 0
    assert set(first.keys) == {f"Bearer {SECRET}"}
    assert set(second.keys) == {None}
    code, _, _ = bench("--base-url", first.url, "--against", first.url, *load)
    assert code == 0
    assert set(first.keys) == {f"Bearer {SECRET}"}
    second.keys.clear()
    key = ["--against-api-key-env", "SECOND_KEY"]
    code, _, _ = bench("--base-url", first.url, "--against", second.url, *key, *load)
    assert code == 0
    assert set(second.keys) == {"Bearer sk-second"}


def test_a_password_in_an_address_is_not_printed(peer: Any, bench: Any, out_path: Path) -> None:
    url = peer(answered).url.replace("://", "://me:hunter2@")
    code, out, err = bench("--base-url", url, "--requests", 2, "--json", out_path)
    assert code == 0
    assert "hunter2" not in out + err + out_path.read_text()
    code, out, err = bench("--base-url", url, "--model", "nope")
    assert code == 1
    assert "hunter2" not in out + err


def test_a_run_without_answers_fails(serve: Any, bench: Any, out_path: Path) -> None:
    url = serve(FAILING).base_url
    code, out, err = bench("--base-url", url, "--requests", 6, "--warmup", 0, "--json", out_path)
    assert code == 1
    assert "no request to A was answered" in err
    assert "the gears are stuck" in err
    assert "6 x error event engine_failed" in out
    target = read(out_path)["targets"]["A"]
    assert target["requests"] == {"sent": 6, "answered": 0, "failed": 6}
    assert target["errors"]["error event engine_failed"]["count"] == 6


def test_a_warm_up_without_answers_fails(serve: Any, bench: Any) -> None:
    code, _, err = bench("--base-url", serve(FAILING).base_url, "--requests", 6)
    assert code == 1
    assert "every request of the warm-up failed at A: error event engine_failed" in err


def test_a_wrong_align_fails_before_the_load(serve: Any, bench: Any) -> None:
    code, _, err = bench("--base-url", serve(QUICK).base_url, "--align", '{"best_of": {}}')
    assert code == 1
    assert "align.best_of: no such key; did you mean 'best_of_n'?" in err


def test_errors_are_counted_by_kind(peer: Any, bench: Any, out_path: Path) -> None:
    def reply(_: dict[str, Any], index: int) -> Response:
        busy = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
        replies = [
            lambda: events(piece("x"), piece("y", "stop"), USAGE),
            lambda: JSONResponse(busy, 429),
            lambda: events(piece("x"), end=False),
            lambda: events(piece("x"), ENDLESS, piece("y", "stop")),
            lambda: Response("<html>oops</html>", 502),
            lambda: JSONResponse({"hello": "there"}),
        ]
        return replies[index % 6]()

    # All requests run at the same time, so that the two timeouts pass together.
    load = ["--requests", 12, "--concurrency", 12, "--warmup", 0, "--timeout", 5]
    output = ["--json", out_path, "--goodput", "e2e:60000"]
    code, out, _ = bench("--base-url", peer(reply).url, *load, *output)
    assert code == 0, "some were answered"
    target = read(out_path)["targets"]["A"]
    counts = {kind: error["count"] for kind, error in target["errors"].items()}
    assert counts == {
        "http 429 rate_limit_exceeded": 2,
        "stream cut": 2,
        "timeout": 2,
        "http 502": 2,
        "not an answer": 2,
    }
    assert target["requests"] == {"sent": 12, "answered": 2, "failed": 10}
    assert target["goodput"]["share"]["value"] == pytest.approx(2 / 12), "a failure meets no goal"
    assert "2 x http 429 rate_limit_exceeded: slow down" in out


def test_failures_count_in_the_rates_but_not_in_the_ratios(
    peer: Any, bench: Any, out_path: Path
) -> None:
    """Every second request of A fails: its pair is dropped, but its time counts."""

    def flaky(body: dict[str, Any], _: int) -> Response:
        if body["seed"] % 2:
            return answered()
        return events(piece("x"), end=False)

    first = peer(flaky)
    second = peer(answered)
    load = ["--requests", 40, "--warmup", 0, "--json", out_path, "--goodput", "e2e:60000"]
    code, out, _ = bench("--base-url", first.url, "--against", second.url, *load)
    assert code == 0
    report = read(out_path)
    ratios = report["ratios"]
    assert (ratios["pairs"], ratios["dropped"]) == (20, 20)
    seconds = {name: target["seconds"] for name, target in report["targets"].items()}
    expected = (20 / seconds["A"]) / (40 / seconds["B"])
    assert ratios["requests_per_second"]["value"] == pytest.approx(expected)
    assert ratios["goodput"]["value"] == pytest.approx(expected)
    assert "20 pairs are not in the ratios" in out


def test_an_unmeasured_goal_is_not_met(serve: Any, bench: Any, out_path: Path) -> None:
    load = ["--base-url", serve(QUICK).base_url, "--requests", 5, "--json", out_path]
    selection = ["--align", '{"best_of_n": {"n": 2}}', "--goodput", "tpot:60000"]
    code, out, _ = bench(*load, *selection)
    assert code == 0
    goodput = read(out_path)["targets"]["A"]["goodput"]
    assert goodput["share"]["value"] == 0
    assert goodput["share"]["high"] == pytest.approx(0.434, abs=1e-3), "five requests are few"
    assert goodput["unmeasured"] == {"tpot": 5}
    assert "5 answers have no tpot" in out
    code, _, err = bench(*load, "--no-stream", "--goodput", "ttft:60000")
    assert code == 2
    assert "ttft and tpot need streaming" in err


def test_the_warm_up_sends_no_measured_request(peer: Any, bench: Any, tmp_path: Path) -> None:
    text = {"type": "text", "text": "beta"}
    chat = {"messages": [{"role": "user", "content": [text]}]}
    dataset = tmp_path / "chats.jsonl"
    dataset.write_text(f'"alpha"\n{json.dumps(chat)}\n')
    server = peer(answered)
    load = ["--requests", 4, "--warmup", 4, "--dataset", dataset]
    code, _, _ = bench("--base-url", server.url, *load)
    assert code == 0
    warmup = server.bodies[:4]
    measured = server.bodies[4:]
    warmup_texts = {json.dumps(body["messages"]) for body in warmup}
    assert warmup_texts.isdisjoint(json.dumps(body["messages"]) for body in measured)
    assert all("Warm-up" in text for text in warmup_texts)
    assert {body["seed"] for body in warmup}.isdisjoint(body["seed"] for body in measured)


def test_an_address_without_v1_gets_a_suggestion(serve: Any, bench: Any) -> None:
    root = serve(QUICK).root
    code, _, err = bench("--base-url", root)
    assert code == 1
    assert f"did you mean --base-url {root}/v1?" in err


KEY: Any = SimpleNamespace(ssl=True, host="h", port=1, is_ssl=False)
NO_NAME = OSError(-2, "Name or service not known")
REFUSED = ConnectionRefusedError(111, "x")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (aiohttp.ClientConnectorError(KEY, REFUSED), "connection refused"),
        (aiohttp.ClientConnectorError(KEY, OSError(113, "x")), "connection failed"),
        (aiohttp.ClientConnectorError(KEY, OSError(24, "x")), "client out of files"),
        (aiohttp.ClientConnectorDNSError(KEY, NO_NAME), "name not found"),
        (aiohttp.ConnectionTimeoutError("x"), "connect timeout"),
        (TimeoutError(), "timeout"),
        (aiohttp.ClientConnectorSSLError(KEY, OSError(1, "x")), "TLS failed"),
        (aiohttp.ServerDisconnectedError(), "connection lost"),
        (aiohttp.ClientPayloadError("x"), "connection lost"),
        (ConnectionResetError(104, "x"), "connection lost"),
        (aiohttp.InvalidURL("x"), "bad HTTP"),
    ],
)
def test_an_exception_has_a_kind(error: Exception, kind: str) -> None:
    assert classify_failure(error, 30.0)[0] == kind
    assert "ssl:" not in classify_failure(error, 30.0)[1]


# With at most three requests in flight, a fourth request shows that the client has an answer.
LOOPS = [["--concurrency", "3"], ["--rate", "30", "--max-in-flight", "3"]]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_writes_its_answers(
    serve: Any, out_path: Path, number: int, loop: list[str]
) -> None:
    live = serve(ECHO)
    earlier = live.engine.sampled
    target = ["serve", "--base-url", live.base_url, "--json", out_path]
    load = ["--requests", 100_000, "--warmup", 0, *loop]
    with bench_process(*target, *load, PYTHONWARNINGS="error") as process:
        assert live.until(lambda: live.engine.sampled > earlier + 10, PATIENT_SECONDS)
        process.popen.send_signal(number)
        status, out, err = process.finish()
    assert status == 130, err
    assert "interrupted:" in err
    assert "Traceback" not in err
    report = read(out_path)
    assert report["interrupted"]
    assert report["abandoned"] > 0
    assert report["targets"]["A"]["requests"]["answered"] > 0
    assert "end to end, ms" in out
    assert live.idle(PATIENT_SECONDS), "the server cancels the abandoned requests too"


def test_an_interrupted_warm_up_keeps_an_older_result(serve: Any, out_path: Path) -> None:
    out_path.write_text("of yesterday")
    live = serve(ECHO.replace(str(FIRST), str(ENDLESS)))
    with bench_process("serve", "--base-url", live.base_url, "--json", out_path) as process:
        assert live.until(lambda: live.engine.running > 0, PATIENT_SECONDS)
        process.popen.send_signal(signal.SIGINT)
        status, _, err = process.finish()
    assert status == 130, err
    assert "nothing was measured, nothing is written" in words(err)
    assert out_path.read_text() == "of yesterday"


def test_the_signal_handlers_are_restored(serve: Any, bench: Any) -> None:
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in signals]
    code, _, _ = bench("--base-url", serve(QUICK).base_url, "--requests", 2)
    assert code == 0
    assert [signal.getsignal(number) for number in signals] == handlers


QUALITY = ["quality", "--prompts", "demo", "--gold", "x"]
QUALITY += ["--grid", "benchmarks/alignment/demo_grid.toml"]


@pytest.mark.parametrize("arguments", [["serve", "--plot", "x.png"], QUALITY])
def test_a_missing_package_is_named_before_the_load(arguments: list[str]) -> None:
    process = run("bench", *arguments, program=without_matplotlib)
    assert process.returncode == 2, process.stderr
    advice = "matplotlib is not installed; install it with: pip install 'infer-align[bench]'"
    assert advice in process.stderr


def test_without_uvloop_asyncios_own_loop_runs(serve: Any) -> None:
    arguments = ["bench", "serve", "--base-url", serve(QUICK).base_url, "--requests", "2"]
    process = run(*arguments, program=without_uvloop)
    assert process.returncode == 0, process.stderr
    assert "2 of 2 requests answered" in words(process.stdout)
