"""`infer-align bench serve` when something is wrong: the target, the key, the options, or the person at the keyboard."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from starlette.responses import JSONResponse, Response

from infer_align_bench.endpoint import failure
from infer_align_server import cli
from tests.bench.conftest import ECHO, FIRST, QUICK, USAGE, events, piece, read

ROOT = Path(__file__).parents[2]


def test_an_unreachable_target(bench: Any, kept: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    code, _, err = bench("--base-url", f"http://127.0.0.1:{port}/v1", "--json", kept)
    assert code == 1
    assert f"127.0.0.1:{port}/v1 cannot be reached" in err
    assert "cannot be reached: connection refused; is the server running?" in err
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
def test_a_refused_key(
    serve: Any, bench: Any, monkeypatch: pytest.MonkeyPatch, given: str | None, kept: Path
) -> None:
    monkeypatch.setenv("THE_KEYS", "right")
    monkeypatch.delenv("MY_KEY", raising=False)
    if given:
        monkeypatch.setenv("MY_KEY", given)
    url = serve(QUICK + '[server]\napi_keys_env = "THE_KEYS"\n').base_url
    code, out, err = bench("--base-url", url, "--api-key-env", "MY_KEY")
    assert code == 1
    assert "status 401" in err
    assert (
        "the key in MY_KEY was refused" if given else "no key was sent, MY_KEY is not set"
    ) in err
    assert SECRET not in out + err
    monkeypatch.setenv("MY_KEY", "right")
    assert (
        bench("--base-url", url, "--api-key-env", "MY_KEY", "--requests", 3, "--json", kept)[0] == 0
    )


def test_a_key_that_a_server_quotes_is_not_shown(
    peer: Any, bench: Any, monkeypatch: pytest.MonkeyPatch, kept: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    said = {
        "error": {"message": f"Incorrect API key provided: {SECRET}.", "code": "invalid_api_key"}
    }
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


def test_a_key_goes_to_its_own_server_only(
    peer: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("THEIR_KEY", "sk-theirs")
    ours, theirs = (peer(lambda *_: events(piece("x", "stop"), USAGE)) for _ in range(2))
    assert (
        bench("--base-url", ours.url, "--against", theirs.url, "--requests", 2, "--warmup", 0)[0]
        == 0
    )
    assert (set(ours.keys), set(theirs.keys)) == ({f"Bearer {SECRET}"}, {None})
    assert (
        bench("--base-url", ours.url, "--against", ours.url, "--requests", 2, "--warmup", 0)[0] == 0
    )
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
        "--base-url",
        url,
        "--requests",
        12,
        "--warmup",
        0,
        "--timeout",
        0.5,
        "--json",
        kept,
        "--goodput",
        "e2e:60000",
    )
    assert code == 0, "some were answered"
    found = read(kept)["targets"]["A"]
    kinds = {"http 429 rate_limit_exceeded", "stream cut", "timeout", "http 502", "not an answer"}
    assert {kind: error["count"] for kind, error in found["errors"].items()} == dict.fromkeys(
        kinds, 2
    )
    assert found["requests"] == {"sent": 12, "answered": 2, "failed": 10}
    assert found["goodput"]["share"]["value"] == pytest.approx(2 / 12), "what fails meets no goal"
    assert "2 x http 429 rate_limit_exceeded: slow down" in out


def test_failures_are_in_the_rates_and_out_of_the_ratios_by_name(
    peer: Any, bench: Any, kept: Path
) -> None:
    """Every second request of A fails, and takes its time: A's rate is half of B's, and the pairs that are lost are counted."""

    def flaky(body: dict[str, Any], _: int) -> Response:
        return (
            events(0.02, piece("x", "stop"), USAGE)
            if body["seed"] % 2
            else events(0.02, piece("x"), end=False)
        )

    ours, theirs = peer(flaky), peer(lambda *_: events(0.02, piece("x", "stop"), USAGE))
    load = ["--requests", 40, "--warmup", 0, "--json", kept, "--goodput", "e2e:5000"]
    code, out, _ = bench("--base-url", ours.url, "--against", theirs.url, *load)
    assert code == 0
    ratios = read(kept)["ratios"]
    assert (ratios["pairs"], ratios["dropped"]) == (20, 20)
    assert ratios["requests_per_second"]["value"] == pytest.approx(0.5, abs=0.15)
    assert ratios["goodput"]["value"] == pytest.approx(ratios["requests_per_second"]["value"])
    assert "20 pairs are not in the ratios" in out


def test_a_goal_that_is_not_measured_is_not_met(serve: Any, bench: Any, kept: Path) -> None:
    url = serve(QUICK).base_url
    load = ["--base-url", url, "--requests", 5, "--json", kept]
    code, out, _ = bench(*load, "--align", '{"best_of_n": {"n": 2}}', "--goodput", "tpot:60000")
    assert code == 0
    found = read(kept)["targets"]["A"]["goodput"]
    assert found["share"]["value"] == 0
    assert found["share"]["high"] == pytest.approx(0.434, abs=1e-3), "five say little"
    assert found["unmeasured"] == {"tpot": 5}
    assert "5 answers have no tpot" in out
    code, _, err = bench(*load, "--no-stream", "--goodput", "ttft:60000")
    assert code == 2
    assert "ttft and tpot need streaming" in err


def test_the_warm_up_asks_nothing_that_is_measured(peer: Any, bench: Any, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(
        '"alpha"\n{"messages": [{"role": "user", "content": [{"type": "text", "text": "beta"}]}]}\n'
    )
    server = peer(lambda *_: events(piece("x", "stop"), USAGE))
    assert (
        bench(
            "--base-url",
            server.url,
            "--requests",
            4,
            "--warmup",
            4,
            "--dataset",
            tmp_path / "chats.jsonl",
        )[0]
        == 0
    )
    warm, measured = server.bodies[:4], server.bodies[4:]
    said = [{json.dumps(body["messages"]) for body in bodies} for bodies in (warm, measured)]
    assert not said[0] & said[1]
    assert all("Warm-up" in one for one in said[0])
    assert not {body["seed"] for body in warm} & {body["seed"] for body in measured}


def test_an_address_without_v1_is_mended(serve: Any, bench: Any) -> None:
    root = serve(QUICK).root
    code, _, err = bench("--base-url", root)
    assert code == 1
    assert f"did you mean --base-url {root}/v1?" in err


def test_kinds_of_failure() -> None:
    key: Any = SimpleNamespace(ssl=True, host="h", port=1, is_ssl=False)
    for error, kind in (
        (aiohttp.ClientConnectorError(key, ConnectionRefusedError(111, "x")), "connection refused"),
        (aiohttp.ClientConnectorError(key, OSError(113, "x")), "connection failed"),
        (aiohttp.ClientConnectorError(key, OSError(24, "x")), "client out of files"),
        (
            aiohttp.ClientConnectorDNSError(key, OSError(-2, "Name or service not known")),
            "name not found",
        ),
        (aiohttp.ConnectionTimeoutError("x"), "connect timeout"),
        (TimeoutError(), "timeout"),
        (aiohttp.ClientConnectorSSLError(key, OSError(1, "x")), "TLS failed"),
        (aiohttp.ServerDisconnectedError(), "connection lost"),
        (aiohttp.ClientPayloadError("x"), "connection lost"),
        (ConnectionResetError(104, "x"), "connection lost"),
        (aiohttp.InvalidURL("x"), "bad HTTP"),
    ):
        assert failure(error, 30.0)[0] == kind, error
        assert "ssl:" not in failure(error, 30.0)[1]


WRONG = [
    (["--concurrency", "2", "--rate", "3"], 2, "--concurrency and --rate: one of them"),
    (["--max-in-flight", "2"], 2, "--max-in-flight: only with --rate"),
    (["--goodput", "tfft:200"], 2, "--goodput: 'tfft:200' is not allowed"),
    (["--goodput", "ttft:fast"], 2, "--goodput: 'ttft:fast' is not allowed"),
    (["--base-url", "localhost:8000"], 2, "--base-url: 'localhost:8000' is not allowed"),
    (["--dataset", "nowhere.jsonl"], 2, "prompts: nowhere.jsonl cannot be read"),
    (["--dataset", "synthetik"], 2, "did you mean 'synthetic'?"),
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
        (["--seed", "-1"], "--seed: '-1' is not allowed"),
    ],
)
def test_wrong_flags(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "serve", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ['{"message": []}', '{"messages": []}', '{"messages": "x"}', "3", "{"]
)
def test_a_wrong_line_is_named(bench: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(f'"fine"\n\n{content}\n')
    code, _, err = bench("--dataset", path)
    assert code == 2
    assert "chats.jsonl:3" in err.replace(" ", "")


@pytest.mark.parametrize("loop", [["--concurrency", "3"], ["--rate", "30"]])
@pytest.mark.parametrize("caught", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_there_is(
    serve: Any, kept: Path, caught: int, loop: list[str]
) -> None:
    live = serve(ECHO)
    command = [
        sys.executable,
        "-m",
        "infer_align_server",
        "bench",
        "serve",
        "--base-url",
        live.base_url,
        "--json",
        str(kept),
    ]
    paths = os.pathsep.join(
        str(ROOT / part) for part in (".", "kernels", "server", "clients/python")
    )
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "error"}
    before = live.engine.sampled
    with subprocess.Popen(
        [*command, "--requests", "100000", "--warmup", "0", *loop],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    ) as process:
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


def test_an_interrupt_in_the_warm_up_keeps_an_older_result(serve: Any, kept: Path) -> None:
    kept.write_text("of yesterday")
    live = serve(ECHO.replace(str(FIRST), "30.0"))
    command = [
        sys.executable,
        "-m",
        "infer_align_server",
        "bench",
        "serve",
        "--base-url",
        live.base_url,
        "--json",
        str(kept),
    ]
    paths = os.pathsep.join(
        str(ROOT / part) for part in (".", "kernels", "server", "clients/python")
    )
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        cwd=ROOT,
    ) as process:
        assert live.until(lambda: live.engine.running > 0, 30)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "nothing was measured, nothing is written" in err
    assert kept.read_text() == "of yesterday"


def test_the_signals_are_given_back(serve: Any, bench: Any) -> None:
    before = [signal.getsignal(caught) for caught in (signal.SIGINT, signal.SIGTERM)]
    assert bench("--base-url", serve(QUICK).base_url, "--requests", 2)[0] == 0
    assert [signal.getsignal(caught) for caught in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("aiohttp", ["serve"]),
        ("matplotlib", ["serve", "--plot", "x.png"]),
        (
            "matplotlib",
            [
                "quality",
                "--prompts",
                "demo",
                "--gold",
                "x",
                "--grid",
                "benchmarks/alignment/demo_grid.toml",
            ],
        ),
    ],
)
def test_a_missing_package_is_named_before_the_load(package: str, arguments: list[str]) -> None:
    paths = os.pathsep.join(
        str(ROOT / part) for part in (".", "kernels", "server", "clients/python")
    )
    call = f"from infer_align_server import cli; sys.exit(cli.main({['bench', *arguments]}))"
    code = f"import sys; sys.modules[{package!r}] = None; {call}"
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert (
        f"{package} is not installed; install it with: pip install 'infer-align[bench]'"
        in done.stderr
    )
