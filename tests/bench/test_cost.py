"""The cost model finds the prices that made the figures, and predicts what it has not seen."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align.errors import ConfigError
from infer_align_bench.cost import (
    Prices,
    Setting,
    amounts,
    capacity,
    errors,
    fit,
    from_report,
    left_out,
    roofline,
    seconds,
    throughput,
)
from infer_align_bench.doubt import doubted, refuse_unmeasured, saturated
from infer_align_server import cli

TRUE = Prices(2e-3, 5e-3, 1e-4, 1e-7, 2e-5, 1e-3, 4e-6, 1e-6, 3e-6)
GRID = [
    Setting(c, n, p, length, k, r * n * (p + length), j)
    for c, n, p, length, k, r, j in [
        (1, 1, 20, 20, 0, 0, 0),
        (8, 1, 20, 80, 0, 0, 0),
        (32, 1, 200, 20, 0, 0, 0),
        (4, 4, 20, 40, 0, 1, 0),
        (16, 4, 300, 60, 0, 1, 0),
        (2, 8, 50, 30, 0, 1, 0),
        (8, 8, 100, 90, 0, 1, 0),
        (1, 1, 20, 40, 20, 0, 0),
        (16, 1, 20, 40, 20, 0, 0),
        (16, 1, 60, 80, 40, 0, 0),
        (8, 4, 40, 50, 20, 1, 0),
        (4, 2, 30, 30, 0, 0, 400),
        (16, 2, 30, 60, 0, 1, 900),
    ]
]
HELD = [Setting(24, 2, 80, 50, 0, 2 * 130, 0), Setting(6, 6, 150, 70, 30, 6 * 220, 100)]


def test_exact_figures_give_the_prices_back() -> None:
    found = fit(GRID, [seconds(TRUE, setting) for setting in GRID])
    np.testing.assert_allclose(astuple(found), astuple(TRUE), rtol=1e-5)


def test_noisy_figures_still_predict() -> None:
    chance = np.random.default_rng(0)
    measured = [seconds(TRUE, setting) * chance.normal(1, 0.03) for setting in GRID]
    found = fit(GRID, measured)
    assert all(price >= 0 for price in astuple(found))
    assert max(abs(e) for e in errors(found, HELD, [seconds(TRUE, s) for s in HELD])) < 0.12
    assert np.median(np.abs(left_out(GRID, measured))) < 0.15


@given(st.lists(st.floats(0.001, 10), min_size=13, max_size=13))
@settings(max_examples=5, deadline=None)
def test_no_price_is_negative_whatever_is_measured(measured: list[float]) -> None:
    assert all(price >= 0 for price in astuple(fit(GRID, measured)))


def test_what_is_never_asked_has_no_price() -> None:
    plain = [setting for setting in GRID if not setting.k and not setting.judge_tokens]
    found = fit(plain, [seconds(TRUE, setting) for setting in plain])
    assert found.steer == found.steered_step == found.judge == 0
    with pytest.raises(ConfigError, match="three measured settings"):
        fit(GRID[:2], [1.0, 1.0])


def test_it_moves_as_it_must() -> None:
    base = Setting(16, 4, 100, 50, 20, 500, 100)
    for name, more in {
        "n": 8,
        "prompt_tokens": 200,
        "output_tokens": 100,
        "k": 40,
        "reward_tokens": 900,
        "judge_tokens": 500,
    }.items():
        assert seconds(TRUE, replace(base, **{name: more})) > seconds(TRUE, base), name
    assert throughput(TRUE, replace(base, concurrency=32)) > throughput(TRUE, base)
    twice = replace(base, concurrency=32, replicas=2)
    assert throughput(TRUE, twice) == pytest.approx(2 * throughput(TRUE, base))
    assert amounts(twice) == amounts(base)


def test_capacity_is_the_most_that_a_limit_allows() -> None:
    asked = Setting(1, 8, 200, 100, 0, 8 * 300)
    alone = seconds(TRUE, asked)
    tight, loose = capacity(TRUE, asked, 100, alone * 1.5), capacity(TRUE, asked, 100, alone * 4)
    assert (
        tight.seconds
        <= alone * 1.5
        < seconds(TRUE, replace(asked, concurrency=tight.concurrency + 1))
    )
    assert loose.requests_per_second > tight.requests_per_second
    assert loose.replicas < tight.replicas
    assert tight.replicas == math.ceil(100 / tight.requests_per_second)
    assert capacity(TRUE, asked, 100, most_sequences=16).concurrency == 2
    with pytest.raises(ConfigError, match="cannot be kept: a request alone takes"):
        capacity(TRUE, asked, 100, alone / 2)
    with pytest.raises(ConfigError, match="8 candidates do not fit into 4 sequences"):
        capacity(TRUE, asked, 100, most_sequences=4)


def test_a_data_sheet() -> None:
    prices = roofline(8e9, 2e12, 4e14, 131072)
    assert prices.step == pytest.approx(8e-3), "16 GB at 2 TB/s"
    assert prices.prefill == prices.sequence == pytest.approx(4e-5), "16 GFLOP at 400 TFLOP/s"
    assert prices.attention == pytest.approx(131072 / 2e12)
    assert prices.reward == 0


def result(path: Path, setting: Setting, align: dict[str, Any] | None) -> str:
    """What `bench serve --json` would have written."""
    sent = 10
    usage = (
        {"engine_calls": int(setting.n * sent), "reward_tokens": int(setting.reward_tokens * sent)}
        if align
        else {}
    )
    tokens = {
        "prompt": setting.prompt_tokens * sent,
        "spent": setting.output_tokens * setting.n * sent,
        "align": usage,
    }
    target = {
        "align": align,
        "requests": {"answered": sent},
        "tokens": tokens,
        "latency_ms": {"e2e": {"mean": {"value": seconds(TRUE, setting) * 1e3}}},
    }
    path.write_text(
        json.dumps(
            {
                "load": {"loop": "closed", "concurrency": setting.concurrency},
                "targets": {"A": target},
            }
        )
    )
    return str(path)


def aligned(setting: Setting) -> dict[str, Any] | None:
    align: dict[str, Any] = {"best_of_n": {"n": int(setting.n)}} if setting.n > 1 else {}
    return (
        align | ({"vas": {"beta": {"x": 1}, "top_k": int(setting.k)}} if setting.k else {})
    ) or None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = [setting for setting in GRID if not setting.judge_tokens]
    files = [
        result(tmp_path / f"{i}.json", setting, aligned(setting)) for i, setting in enumerate(grid)
    ]
    held = result(tmp_path / "held.json", HELD[0], aligned(HELD[0]))
    out = tmp_path / "plan.json"
    assert (
        cli.main(
            [
                "bench",
                "plan",
                *files,
                "--hold-out",
                held,
                "--rate",
                "50",
                "--latency",
                "3",
                "--json",
                str(out),
            ]
        )
        == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    made = json.loads(out.read_text())
    assert max(abs(error) for error in made["errors"]["held out"]) < 0.05
    assert f"{made['plan']['replicas']} replicas" in said
    assert "held out: mean" in said
    assert made["prices_seconds"]["step"] == pytest.approx(TRUE.step, rel=0.05)
    assert made["plan"]["replicas"] in [queue["replicas"] for queue in made["simulated"]]
    assert cli.main(["bench", "plan", *files, "--judge-tokens", "500"]) == 2
    assert "judge_tokens: no result holds judged requests" in " ".join(
        capsys.readouterr().err.split()
    )
    arguments = [
        *files,
        "--rate",
        "20",
        "--n",
        "4",
        "--prompt-tokens",
        "100",
        "--output-tokens",
        "50",
        "--p99",
        "2",
        "--json",
        str(out),
    ]
    assert cli.main(["bench", "plan", *arguments]) == 0
    said = " ".join(capsys.readouterr().out.split())
    made = json.loads(out.read_text())
    needed = min(
        queue["replicas"]
        for queue in made["simulated"]
        if queue["p99"] <= 2 and not queue["growing"]
    )
    assert f"{needed} replicas for 99% within 2 s" in said
    assert needed >= made["plan"]["replicas"]
    assert any("sequences at once are extrapolated" in doubt for doubt in made["doubts"])


def test_what_measurements_do_not_hold_is_refused() -> None:
    alike = [Setting(c, 1, 20, length) for c, length in ((1, 20), (4, 40), (8, 80))]
    with pytest.raises(
        ConfigError,
        match="prompt_tokens: 512 cannot be planned: all measured prompts have 20 to 20 tokens",
    ):
        refuse_unmeasured(alike, Setting(1, 1, 512, 40))
    refuse_unmeasured(alike, Setting(1, 1, 21, 40))
    for name in ("k", "reward_tokens", "judge_tokens"):
        with pytest.raises(ConfigError, match=f"{name}: no result holds"):
            refuse_unmeasured(alike, replace(Setting(1, 1, 20, 40), **{name: 5}))


def test_what_goes_beyond_them_is_said() -> None:
    alike = [
        Setting(c, 1, 20, length, reward_tokens=9) for c, length in ((1, 20), (4, 40), (8, 80))
    ]
    said = " ".join(doubted(Prices(step=1e-3), alike, Setting(8, 4, 20, 400, reward_tokens=9)))
    for part in (
        "reward_tokens: measured, but",
        "prompts were not varied",
        "output_tokens: 400",
        "n: 4 is",
        "32 sequences at once",
    ):
        assert part in said
    assert list(doubted(TRUE, GRID, Setting(8, 2, 100, 50))) == []


def test_a_queue_in_the_server_is_seen() -> None:
    full = [Setting(c, 1, 20, 40) for c in (4, 8, 16)]
    said = list(saturated(full, [1.0, 1.1, 2.2]))
    assert len(said) == 1
    assert "16 under way bring no more requests / s than" in said[0]
    assert list(saturated(full, [1.0, 1.1, 1.3])) == []
    assert list(saturated([full[0], replace(full[1], n=2)], [1.0, 9.0])) == [], (
        "another kind of request"
    )


def test_an_endpoint_that_counts_no_tokens() -> None:
    target = {
        "align": None,
        "requests": {"answered": 3},
        "tokens": {"prompt": 0, "spent": 9, "align": {}, "counted_by": "chunks"},
    }
    with pytest.raises(ConfigError, match="does not count its tokens"):
        from_report(
            {"load": {"loop": "closed", "concurrency": 1}, "targets": {"A": target}}, "x.json"
        )
    with pytest.raises(ConfigError, match="no price was found"):
        capacity(Prices(), Setting(1, 1, 5, 5), 10)


def test_wrong_results_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("[]")
    for path, message in (
        (tmp_path / "x.json", "is no result of"),
        (tmp_path / "none.json", "cannot be read"),
    ):
        assert cli.main(["bench", "plan", str(path)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    opened = {"load": {"loop": "open"}, "targets": {"A": {}}}
    with pytest.raises(ConfigError, match="closed loops on one target"):
        from_report(opened, "y.json")
