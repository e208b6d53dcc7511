"""`bench plan` with a table of prices: clusters, judges and adaptive requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infer_align.errors import ConfigError
from infer_align_bench.cost import Setting, capacity, seconds
from infer_align_bench.price_table import load, parse, shipped
from infer_align_server import cli

ROWS = [
    {"concurrency": 1, "tokens_per_second": 100},
    {"concurrency": 11, "tokens_per_second": 550},
    {"concurrency": 21, "tokens_per_second": 700},
    {"concurrency": 1, "k": 20, "tokens_per_second": 50},
    {"concurrency": 11, "k": 20, "tokens_per_second": 500, "role": "held out"},
]
TABLE: dict[str, Any] = {
    "device": "a device",
    "output_tokens": 10,
    "prices_seconds": {"prefill": 1e-4, "judge": 2e-4},
    "measured": ROWS,
}
SMALL = ["--rate", "40", "--n", "2", "--prompt-tokens", "100", "--output-tokens", "20"]


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    return str(path)


def planned(table: str, tmp_path: Path, *flags: str) -> dict[str, Any]:
    out = tmp_path / "plan.json"
    arguments = ["bench", "plan", "--prices", table, *SMALL, *flags, "--json", str(out)]
    assert cli.main(arguments) == 0
    plan: dict[str, Any] = json.loads(out.read_text())
    return plan


def test_steps_are_read_from_the_table_and_between_its_rows() -> None:
    prices = parse(TABLE).prices
    assert dict(prices.steps) == pytest.approx({1: 0.01, 11: 0.02, 21: 0.03})
    assert seconds(prices, Setting(1, 1, 0, 10)) == pytest.approx(0.1)
    assert seconds(prices, Setting(3, 2, 0, 10)) == pytest.approx(0.15)
    assert seconds(prices, Setting(1, 1, 50, 10)) == pytest.approx(0.105)
    assert seconds(prices, Setting(1, 1, 50, 10, cached_tokens=30)) == pytest.approx(0.102)
    assert seconds(prices, Setting(1, 1, 0, 10, k=5)) == pytest.approx(0.2)


def test_errors_are_those_of_rows_that_were_not_fitted() -> None:
    errors = parse(TABLE).errors
    # 0.02 + 0.01 seconds a step are predicted, 0.022 were measured.
    assert errors["held out"] == pytest.approx([0.03 / 0.022 - 1])
    # On the line between 1 and 21 sequences.
    assert errors["left out, one batch size at a time"] == pytest.approx([0.0])


def test_the_shipped_tables_can_be_read_and_name_their_source() -> None:
    assert "h200-8b" in shipped()
    for name in shipped():
        table = load(name)
        assert table.device
        assert table.source
        assert max(map(abs, table.errors["held out"])) < 0.02
        assert capacity(table.prices, Setting(1, 8, 512, 128), 100.0).replicas > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measured": []}, "rows without steering"),
        ({"output_tokens": 0}, "must be over 0"),
        ({"prices_seconds": {"stepp": 1}}, "prices_seconds may hold"),
        ({"measured": [{"concurrency": 1}]}, "tokens_per_second"),
        ({"measured": 3}, "TypeError"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**TABLE, **change}))
    with pytest.raises(ConfigError, match=message):
        load(str(path))


def test_an_unknown_table_names_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="h200-8b"):
        load("h200-8")


@pytest.mark.slow
def test_affine_routing_needs_fewer_replicas(table: str, tmp_path: Path) -> None:
    prefix = ["--prefix-tokens", "90", "--prefixes", "400", "--cache-tokens", "9000"]
    least = planned(table, tmp_path, *prefix)
    affine = planned(table, tmp_path, *prefix, "--routing", "affine")
    assert affine["cluster"]["hit_share"] > least["cluster"]["hit_share"]
    assert affine["cluster"]["hit_share_without_affinity"] == least["cluster"]["hit_share"]
    assert affine["plan"]["replicas"] <= least["plan"]["replicas"]
    assert planned(table, tmp_path)["plan"]["replicas"] >= least["plan"]["replicas"]


@pytest.mark.slow
def test_judges_have_a_pool_of_their_own(table: str, tmp_path: Path) -> None:
    flags = ["--judge-tokens", "500"]
    shared = planned(table, tmp_path, *flags)
    pool = planned(table, tmp_path, *flags, "--judge-pool", "0.5")
    # 40 requests / s x 500 tokens x 0.2 ms at half the load.
    assert pool["cluster"]["judges"] == 8
    assert pool["plan"]["replicas"] < shared["plan"]["replicas"]
    alone = planned(table, tmp_path)
    for with_judges, without in zip(pool["simulated"], alone["simulated"], strict=True):
        # Judging takes 0.1 seconds or more.
        assert with_judges["p50"] > without["p50"] + 0.09


@pytest.mark.slow
def test_adaptive_requests_cost_their_mean(table: str, tmp_path: Path, capsys: Any) -> None:
    fixed = planned(table, tmp_path, "--n", "8")
    flags = ["--n", "8", "--mean-n", "4", "--batch", "2", "--p99", "9"]
    adaptive = planned(table, tmp_path, *flags)
    assert adaptive["plan"]["replicas"] < fixed["plan"]["replicas"]
    text = " ".join(capsys.readouterr().out.split())
    assert "n = 4 on average, at most 8" in text
    assert "replicas for 99% within 9 s" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--routing", "affine"], "needs --prefix-tokens"),
        (["--prefix-tokens", "200"], "is over --prompt-tokens"),
        (["--prefix-tokens", "50"], "--cache-tokens: 0 does not hold one prefix"),
        (["--judge-pool", "0.5"], "give --judge-tokens"),
        (["--judge-pool", "1.5", "--judge-tokens", "5"], "must be a mean load below 1"),
        (["--mean-n", "9"], "--mean-n: 9 is not possible"),
        (["--rate", "1e-300"], "--rate: 1e-300 is not allowed; must be at least 1e-06"),
        (["--prefixes", "1000000000000"], "must be at most 10000000"),
        (["--judge-pool", "0.5", "--judge-tokens", "1" + "0" * 15], "at most 1000000 are simul"),
    ],
)
def test_options_that_contradict_each_other_are_named(
    table: str, capsys: Any, flags: list[str], message: str
) -> None:
    assert cli.main(["bench", "plan", "--prices", table, *SMALL, *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_results_and_a_table_exclude_each_other(table: str, capsys: Any) -> None:
    assert cli.main(["bench", "plan", "--prices", table, "some.json"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert cli.main(["bench", "plan"]) == 2
    assert "needs results of `bench serve --json`" in capsys.readouterr().err
