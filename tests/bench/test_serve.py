"""`infer-align bench serve`, as a person runs it: against our server, against endpoints of others' manners, and against none."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from starlette.responses import JSONResponse, Response

from infer_align.engines.fake import slowness
from infer_align_server import cli
from tests.bench.conftest import EACH, ECHO, FIRST, QUICK, SPREAD, USAGE, events, piece, read

ROOT = Path(__file__).parents[2]


# --- the figures ---


@pytest.fixture(scope="module")
def known(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run over a known distribution: three words, each request slower or faster by its seed."""
    place = tmp_path_factory.mktemp("known")
    (place / "chats.jsonl").write_text('"one two three"\n"four five six"\n')
    arguments = [
        "bench",
        "serve",
        "--base-url",
        serve(ECHO).base_url,
        "--dataset",
        str(place / "chats.jsonl"),
    ]
    more = [
        "--requests",
        "120",
        "--concurrency",
        "12",
        "--json",
        str(place / "out.json"),
        "--plot",
        str(place / "out.png"),
    ]
    assert cli.main([*arguments, *more, "--goodput", "e2e:300,ttft:1000"]) == 0
    assert (place / "out.png").read_bytes().startswith(b"\x89PNG")
    return read(place / "out.json")


SLOW = np.array([slowness(SPREAD, seed) for seed in range(120)])
KNOWN_MS = {
    "ttft": (FIRST + EACH) * SLOW * 1e3,
    "e2e": (FIRST + 3 * EACH) * SLOW * 1e3,
    "tpot": EACH * SLOW * 1e3,
}
KNOWN_MS["itl"] = np.repeat(KNOWN_MS["tpot"], 2)


@pytest.mark.parametrize("metric", ["ttft", "e2e", "tpot", "itl"])
def test_percentiles_are_those_of_a_known_distribution(known: Any, metric: str) -> None:
    """The delays are known exactly; a busy machine adds to them, and takes nothing away."""
    found = known["targets"]["A"]["latency_ms"][metric]
    expected = KNOWN_MS[metric]
    exact = {"mean": expected.mean(), **{f"p{q}": np.percentile(expected, q) for q in (50, 90, 99)}}
    assert exact["p90"] > 1.3 * exact["p50"], "the classes stand apart"
    for name, value in exact.items():
        assert (
            value - (2 if metric in {"ttft", "e2e"} else 12) <= found[name]["value"] <= value + 40
        ), name
        assert found[name]["low"] <= found[name]["value"]
        assert (found[name]["high"] is None) == (name == "p99"), (
            "the upper end of a p99 of 120 requests is not known"
        )


def test_each_request_took_what_its_seed_says(known: Any) -> None:
    samples = [s for s in known["samples"] if s["target"] == "A"]
    assert [s["index"] for s in samples] == list(range(120))
    for sample, expected in zip(samples, KNOWN_MS["e2e"], strict=True):
        assert (
            sample["returned"]
            == sample["spent"]
            == sample["chunks"]
            == sample["prompt_tokens"]
            == 3
        )
        assert len(sample["gaps"]) == 2
        assert (sample["ended"] - sample["started"]) * 1e3 >= expected - 2


def test_rates_and_goodput_add_up(known: Any) -> None:
    found = known["targets"]["A"]
    seconds = found["seconds"]
    assert seconds == pytest.approx(max(s["ended"] for s in known["samples"]), rel=0.01)
    assert found["rates"]["requests_per_second"]["value"] == pytest.approx(120 / seconds)
    assert found["rates"]["output_tokens_per_second"]["value"] == pytest.approx(360 / seconds)
    assert found["tokens"]["returned"] == found["tokens"]["spent"] == 360
    assert found["tokens"]["counted_by"] == "usage"
    met = sum((s["ended"] - s["intended"]) * 1e3 <= 300 for s in known["samples"])
    assert 0 < met < 120
    assert found["goodput"]["share"]["value"] == pytest.approx(met / 120)
    assert found["goodput"]["requests_per_second"]["value"] == pytest.approx(met / seconds)
    assert found["requests"] == {"sent": 120, "answered": 120, "failed": 0}
    assert known["schema"] == "infer-align/bench-serve/2"
    assert known["load"]["loop"] == "closed"


def test_a_table_fits_into_80_columns(
    serve: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infer_align_bench.serve.OUT", Console(width=80))
    url = serve(QUICK).base_url
    assert (
        cli.main(
            [
                "bench",
                "serve",
                "--base-url",
                url,
                "--against",
                url,
                "--requests",
                "20",
                "--concurrency",
                "2",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("end to end")], lines
    assert all(line.count("-") >= 4 for line in lines if line.startswith("end to end")), (
        "no cell was broken"
    )
    assert "\u2026" not in "".join(lines)


def test_a_selection_spends_more_than_it_returns(serve: Any, bench: Any, kept: Path) -> None:
    align, url = '{"best_of_n": {"n": 4}}', serve(QUICK).base_url
    code, out, _ = bench(
        "--base-url", url, "--requests", 10, "--align", align, "--against", url, "--json", kept
    )
    assert code == 0
    ours, plain = read(kept)["targets"].values()
    assert (
        ours["tokens"]["spent"],
        ours["tokens"]["returned"],
        ours["tokens"]["spent_per_returned"],
    ) == (120, 30, 4.0)
    assert ours["tokens"]["align"]["engine_calls"] == 40
    assert (plain["tokens"]["spent"], plain["tokens"]["returned"], plain["align"]) == (30, 30, None)
    assert not ours["latency_ms"]["tpot"], (
        "it came in one piece: there is no rate at which tokens came"
    )
    assert "answers came in one piece" in out
    assert "40 engine calls" in out
    assert read(kept)["ratios"]["pairs"] == 10
    ratios = read(kept)["ratios"]
    assert (
        ratios["generated_tokens"]["value"],
        ratios["returned_tokens"]["value"],
        ratios["dropped"],
    ) == (4.0, 1.0, 0)
    rates = [of["rates"]["requests_per_second"]["value"] for of in (ours, plain)]
    assert ratios["requests_per_second"]["value"] == pytest.approx(rates[0] / rates[1])
    assert {"engine_calls": 4, "candidate_tokens": 12}.items() <= read(kept)["samples"][0][
        "align"
    ].items()


def test_the_same_prompts_and_seeds_go_to_both(serve: Any, bench: Any, kept: Path) -> None:
    live = serve(QUICK + "[presets.four]\nbest_of_n = {n = 4}\n")
    before = len(live.engine.bodies)
    code, out, _ = bench(
        "--base-url",
        live.base_url,
        "--requests",
        8,
        "--warmup",
        0,
        "--concurrency",
        1,
        "--seed",
        7,
        "--against-model",
        f"{live.service.model}@four",
        "--json",
        kept,
        "--max-tokens",
        2,
        "--body",
        '{"stop": ["zzz"]}',
    )
    assert code == 0
    bodies = live.engine.bodies[before:]
    assert len(bodies) == 16
    assert all(body["max_tokens"] == 2 and body["stop"] == ["zzz"] for body in bodies)
    said = [json.dumps(body["messages"]) for body in bodies]
    assert len(set(said)) == 8
    assert all(said.count(one) == 2 for one in said)
    assert "A / B, 8 pairs" in out
    assert [t["model"] for t in read(kept)["targets"].values()] == ["fake", "fake@four"]


# --- the open loop ---

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
    assert waited(closed, "intended") <= 10, (
        "a closed loop asks nothing while it waits, and so hardly sees it"
    )
    assert waited(opened["samples"], "intended") >= 25
    assert opened["targets"]["A"]["latency_ms"]["e2e"]["p90"]["value"] > STALL * 1e3 / 6


def test_waiting_in_the_client_counts_too(peer: Any, bench: Any, kept: Path) -> None:
    code, out, _ = bench(
        "--base-url",
        peer(stalls(30)).url,
        "--requests",
        100,
        "--warmup",
        0,
        "--rate",
        100,
        "--max-in-flight",
        1,
        "--json",
        kept,
    )
    assert code == 0
    found = read(kept)
    assert waited(found["samples"], "started") <= 10, (
        "measured from when it was sent, the stall would vanish"
    )
    assert waited(found["samples"], "intended") >= 25
    assert found["targets"]["A"]["latency_ms"]["e2e"]["p90"]["value"] > STALL * 1e3 / 6
    assert "or --max-in-flight, was the limit" in out


# --- other endpoints ---


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
    assert figures["latency_ms"]["itl"]["mean"]["value"] == pytest.approx(
        7 * figures["latency_ms"]["tpot"]["mean"]["value"]
    )


def test_answers_that_are_not_streamed(serve: Any, bench: Any, kept: Path) -> None:
    assert (
        bench("--base-url", serve(QUICK).base_url, "--requests", 5, "--no-stream", "--json", kept)[
            0
        ]
        == 0
    )
    figures = read(kept)["targets"]["A"]
    assert figures["latency_ms"]["ttft"] == figures["latency_ms"]["itl"] == {}
    assert figures["tokens"]["returned"] == 15
    assert figures["latency_ms"]["e2e"]["p50"]["value"] > 0


def test_fields_can_be_left_out(peer: Any, bench: Any) -> None:
    server = peer(lambda *_: events(piece("x", "stop"), USAGE))
    code, _, _ = bench(
        "--base-url",
        server.url,
        "--requests",
        2,
        "--warmup",
        0,
        "--body",
        '{"seed": null, "stream_options": null}',
        "--dataset",
        "synthetic",
        "--input-tokens",
        "5-9",
        "--output-tokens",
        "3",
    )
    assert code == 0
    for body in server.bodies:
        assert set(body) == {"model", "messages", "stream", "max_tokens"}
        assert body["model"] == "tiny"
        assert body["max_tokens"] == 3
        assert 5 <= len(body["messages"][0]["content"].split()) <= 9


def test_an_endpoint_that_lists_no_models(peer: Any, bench: Any) -> None:
    server = peer(
        lambda *_: events(piece("x", "stop"), USAGE), JSONResponse({"detail": "Not Found"}, 404)
    )
    assert bench("--base-url", server.url, "--model", "any", "--requests", 2)[0] == 0
    code, _, err = bench("--base-url", server.url, "--requests", 2)
    assert code == 1
    assert "no list of models; name one with --model" in err
