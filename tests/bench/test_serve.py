"""`infer-align bench serve` measures our server and endpoints that behave like other servers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from starlette.responses import JSONResponse

from infer_align.engines.fake import delay_factor
from infer_align_server import cli
from tests.bench.conftest import EACH, ECHO, FIRST, QUICK, SPREAD, USAGE, events, piece, read

pytestmark = pytest.mark.slow

REQUESTS = 120
DELAY_FACTORS = np.array([delay_factor(SPREAD, seed) for seed in range(REQUESTS)])
# Delays of each request on the server, in milliseconds. A measurement cannot be shorter.
SHORTEST_MS = {
    "ttft": (FIRST + EACH) * DELAY_FACTORS * 1e3,
    "e2e": (FIRST + 3 * EACH) * DELAY_FACTORS * 1e3,
}
# A timer of the server may end early by its resolution.
TIMER_MS = 2.0


# --- the figures ---


@pytest.fixture(scope="module")
def report(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Measure requests of three words with known delays."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "chats.jsonl").write_text('"one two three"\n"four five six"\n')
    arguments = ["--base-url", serve(ECHO).base_url, "--dataset", folder / "chats.jsonl"]
    arguments += ["--requests", REQUESTS, "--concurrency", 12]
    arguments += ["--json", folder / "out.json", "--plot", folder / "out.png"]
    arguments += ["--goodput", "e2e:300,ttft:1000"]
    assert cli.main(["bench", "serve", *map(str, arguments)]) == 0
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    return read(folder / "out.json")


def latencies_ms(sample: dict[str, Any]) -> dict[str, list[float]]:
    """Compute the latencies of one sample of a report."""
    due = sample["intended"]
    gaps = [gap * 1e3 for gap in sample["gaps"]]
    return {
        "ttft": [(sample["first"] - due) * 1e3],
        "e2e": [(sample["ended"] - due) * 1e3],
        "tpot": [sum(gaps) / 2],
        "itl": gaps,
    }


@pytest.mark.parametrize("metric", ["ttft", "e2e", "tpot", "itl"])
def test_percentiles_are_those_of_the_samples(report: Any, metric: str) -> None:
    figures = report["targets"]["A"]["latency_ms"][metric]
    values = []
    for sample in report["samples"]:
        values += latencies_ms(sample)[metric]
    expected = {f"p{q}": np.percentile(values, q) for q in (50, 90, 99)}
    expected["mean"] = np.mean(values)
    for name, value in expected.items():
        assert figures[name]["value"] == pytest.approx(value)
        assert figures[name]["low"] <= figures[name]["value"]
        unknown = figures[name]["high"] is None
        assert unknown == (name == "p99"), "120 requests do not bound a p99"


@pytest.mark.parametrize("metric", ["ttft", "e2e"])
def test_no_percentile_is_below_that_of_the_delays(report: Any, metric: str) -> None:
    figures = report["targets"]["A"]["latency_ms"][metric]
    shortest = SHORTEST_MS[metric]
    assert np.percentile(shortest, 90) > 1.3 * np.percentile(shortest, 50), "a wide distribution"
    for q in (50, 90, 99):
        assert figures[f"p{q}"]["value"] >= np.percentile(shortest, q) - TIMER_MS


def test_each_request_takes_the_delays_of_its_seed(report: Any) -> None:
    assert [sample["index"] for sample in report["samples"]] == list(range(REQUESTS))
    for sample, shortest in zip(report["samples"], SHORTEST_MS["e2e"], strict=True):
        for count in ("returned", "spent", "chunks", "prompt_tokens"):
            assert sample[count] == 3
        assert len(sample["gaps"]) == 2
        assert (sample["ended"] - sample["started"]) * 1e3 >= shortest - TIMER_MS


def test_rates_and_goodput_add_up(report: Any) -> None:
    target = report["targets"]["A"]
    seconds = target["seconds"]
    ((began, ended),) = target["slices"]
    assert seconds == pytest.approx(ended - began)
    assert max(sample["ended"] for sample in report["samples"]) <= ended <= report["seconds"]
    assert target["rates"]["requests_per_second"]["value"] == pytest.approx(120 / seconds)
    assert target["rates"]["output_tokens_per_second"]["value"] == pytest.approx(360 / seconds)
    assert target["tokens"]["returned"] == target["tokens"]["spent"] == 360
    assert target["tokens"]["counted_by"] == "usage"
    good = 0
    for sample in report["samples"]:
        latencies = latencies_ms(sample)
        good += latencies["e2e"][0] <= 300 and latencies["ttft"][0] <= 1000
    assert good < 120, "the slowest requests take longer than 300 ms"
    assert target["goodput"]["share"]["value"] == pytest.approx(good / 120)
    assert target["goodput"]["requests_per_second"]["value"] == pytest.approx(good / seconds)
    assert target["requests"] == {"sent": 120, "answered": 120, "failed": 0}
    assert report["schema"] == "infer-align/bench-serve/2"
    assert report["load"]["loop"] == "closed"


def test_the_tables_fit_into_80_columns(
    serve: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infer_align_bench.serve.OUT", Console(width=80))
    url = serve(QUICK).base_url
    load = ["--requests", "20", "--concurrency", "2"]
    assert cli.main(["bench", "serve", "--base-url", url, "--against", url, *load]) == 0
    output = capsys.readouterr().out
    rows = [line for line in output.splitlines() if line.startswith("end to end")]
    assert rows, output
    assert min(row.count("-") for row in rows) >= 4, "no cell is broken"
    assert "\u2026" not in output


def test_a_selection_generates_more_than_it_returns(serve: Any, bench: Any, out_path: Path) -> None:
    url = serve(QUICK).base_url
    target = ["--base-url", url, "--align", '{"best_of_n": {"n": 4}}', "--against", url]
    code, out, _ = bench(*target, "--requests", 10, "--json", out_path)
    assert code == 0
    report = read(out_path)
    selected, plain = report["targets"].values()
    counts = selected["tokens"]
    assert (counts["spent"], counts["returned"], counts["spent_per_returned"]) == (120, 30, 4.0)
    assert counts["align"]["engine_calls"] == 40
    assert (plain["tokens"]["spent"], plain["tokens"]["returned"]) == (30, 30)
    assert plain["align"] is None
    assert not selected["latency_ms"]["tpot"], "an answer in one chunk has no rate of tokens"
    assert "answers arrived in one chunk" in out
    assert "40 engine calls" in out
    ratios = report["ratios"]
    assert (ratios["pairs"], ratios["dropped"]) == (10, 0)
    assert ratios["generated_tokens"]["value"] == 4.0
    assert ratios["returned_tokens"]["value"] == 1.0
    rates = [item["rates"]["requests_per_second"]["value"] for item in (selected, plain)]
    assert ratios["requests_per_second"]["value"] == pytest.approx(rates[0] / rates[1])
    usage = report["samples"][0]["align"]
    assert (usage["engine_calls"], usage["candidate_tokens"]) == (4, 12)


def test_both_targets_get_the_same_prompts_and_seeds(
    serve: Any, bench: Any, out_path: Path
) -> None:
    live = serve(QUICK + "[presets.four]\nbest_of_n = {n = 4}\n")
    earlier = len(live.engine.bodies)
    target = ["--base-url", live.base_url, "--against-model", f"{live.service.model}@four"]
    load = ["--requests", 8, "--warmup", 0, "--concurrency", 1, "--seed", 7]
    body = ["--max-tokens", 2, "--body", '{"stop": ["zzz"]}']
    code, out, _ = bench(*target, *load, *body, "--json", out_path)
    assert code == 0
    bodies = live.engine.bodies[earlier:]
    assert len(bodies) == 16
    for sent in bodies:
        assert sent["max_tokens"] == 2
        assert sent["stop"] == ["zzz"]
    counts = Counter(json.dumps(sent["messages"]) for sent in bodies)
    assert list(counts.values()) == [2] * 8
    assert "A / B, 8 pairs" in out
    models = [target["model"] for target in read(out_path)["targets"].values()]
    assert models == ["fake", "fake@four"]


# --- other endpoints ---


def test_an_endpoint_without_usage_is_counted_by_chunks(
    peer: Any, bench: Any, out_path: Path
) -> None:
    chunks = (piece(None), piece("a b"), piece("c d"), piece("e", "stop"))
    url = peer(lambda *_: events(*chunks)).url
    code, out, _ = bench("--base-url", url, "--requests", 5, "--json", out_path)
    assert code == 0
    tokens = read(out_path)["targets"]["A"]["tokens"]
    assert (tokens["counted_by"], tokens["returned"], tokens["chunks"]) == ("chunks", 15, 15)
    assert "tokens counted by chunks" in out


def test_an_endpoint_that_ignores_align_gives_a_note(peer: Any, bench: Any) -> None:
    url = peer(lambda *_: events(piece("x", "stop"), USAGE)).url
    align = ["--align", '{"best_of_n": {"n": 4}}']
    _, out, _ = bench("--base-url", url, "--requests", 2, *align)
    assert "this endpoint ignores it" in out
    _, out, _ = bench("--base-url", url, "--requests", 2)
    assert "ignores" not in out


def test_chunks_may_hold_several_tokens(peer: Any, bench: Any, out_path: Path) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 8}}
    url = peer(lambda *_: events(piece("a b c d"), 0.02, piece("e f g h", "stop"), usage)).url
    code, out, _ = bench("--base-url", url, "--requests", 5, "--json", out_path)
    assert code == 0
    figures = read(out_path)["targets"]["A"]
    assert figures["tokens"]["tokens_per_chunk"] == 4
    assert "a chunk holds 4.00 tokens" in out
    gap = figures["latency_ms"]["itl"]["mean"]["value"]
    assert gap == pytest.approx(7 * figures["latency_ms"]["tpot"]["mean"]["value"])


def test_answers_need_not_be_streamed(serve: Any, bench: Any, out_path: Path) -> None:
    target = ["--base-url", serve(QUICK).base_url, "--no-stream"]
    code, _, _ = bench(*target, "--requests", 5, "--json", out_path)
    assert code == 0
    figures = read(out_path)["targets"]["A"]
    assert figures["latency_ms"]["ttft"] == figures["latency_ms"]["itl"] == {}
    assert figures["tokens"]["returned"] == 15
    assert figures["latency_ms"]["e2e"]["p50"]["value"] > 0


def test_null_removes_a_field(peer: Any, bench: Any) -> None:
    server = peer(lambda *_: events(piece("x", "stop"), USAGE))
    body = ["--body", '{"seed": null, "stream_options": null}']
    dataset = ["--dataset", "synthetic", "--input-tokens", "5-9", "--output-tokens", "3"]
    target = ["--base-url", server.url, "--requests", 2, "--warmup", 0]
    code, _, _ = bench(*target, *body, *dataset)
    assert code == 0
    for sent in server.bodies:
        assert set(sent) == {"model", "messages", "stream", "max_tokens"}
        assert sent["model"] == "tiny"
        assert sent["max_tokens"] == 3
        assert 5 <= len(sent["messages"][0]["content"].split()) <= 9


def test_an_endpoint_need_not_list_models(peer: Any, bench: Any) -> None:
    not_found = JSONResponse({"detail": "Not Found"}, 404)
    server = peer(lambda *_: events(piece("x", "stop"), USAGE), not_found)
    code, _, _ = bench("--base-url", server.url, "--model", "any", "--requests", 2)
    assert code == 0
    code, _, err = bench("--base-url", server.url, "--requests", 2)
    assert code == 1
    assert "no list of models; name one with --model" in err
