"""The cost model recovers known prices, predicts unseen settings, and plans with them."""

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
    leave_one_out_errors,
    roofline,
    seconds,
    throughput,
)
from infer_align_bench.extrapolation import (
    extrapolation_warnings,
    refuse_unmeasured,
    saturation_warnings,
)
from infer_align_server import cli

TRUE = Prices(2e-3, 5e-3, 1e-4, 1e-7, 2e-5, 1e-3, 4e-6, 1e-6, 3e-6)
GRID = [
    Setting(1, 1, 20, 20),
    Setting(8, 1, 20, 80),
    Setting(32, 1, 200, 20),
    Setting(4, 4, 20, 40, reward_tokens=4 * 60),
    Setting(16, 4, 300, 60, reward_tokens=4 * 360),
    Setting(2, 8, 50, 30, reward_tokens=8 * 80),
    Setting(8, 8, 100, 90, reward_tokens=8 * 190),
    Setting(1, 1, 20, 40, k=20),
    Setting(16, 1, 20, 40, k=20),
    Setting(16, 1, 60, 80, k=40),
    Setting(8, 4, 40, 50, k=20, reward_tokens=4 * 90),
    Setting(4, 2, 30, 30, judge_tokens=400),
    Setting(16, 2, 30, 60, reward_tokens=2 * 90, judge_tokens=900),
]
HELD_OUT = [
    Setting(24, 2, 80, 50, reward_tokens=2 * 130),
    Setting(6, 6, 150, 70, k=30, reward_tokens=6 * 220, judge_tokens=100),
]


def true_seconds(grid: list[Setting]) -> list[float]:
    return [seconds(TRUE, setting) for setting in grid]


def words(text: str) -> str:
    """Join the lines of a terminal's output."""
    return " ".join(text.split())


def test_exact_measurements_give_the_exact_prices() -> None:
    prices = fit(GRID, true_seconds(GRID))
    np.testing.assert_allclose(astuple(prices), astuple(TRUE), rtol=1e-5)


def test_noisy_measurements_still_predict() -> None:
    generator = np.random.default_rng(0)
    measured = [value * generator.normal(1, 0.03) for value in true_seconds(GRID)]
    prices = fit(GRID, measured)
    assert min(astuple(prices)) >= 0
    assert np.abs(errors(prices, HELD_OUT, true_seconds(HELD_OUT))).max() < 0.12
    assert np.median(np.abs(leave_one_out_errors(GRID, measured))) < 0.15


@given(st.lists(st.floats(0.001, 10), min_size=13, max_size=13))
@settings(max_examples=50, deadline=None)
def test_no_price_is_negative(measured: list[float]) -> None:
    assert min(astuple(fit(GRID, measured))) >= 0


def test_an_unused_feature_has_no_price() -> None:
    plain = [setting for setting in GRID if not setting.k and not setting.judge_tokens]
    prices = fit(plain, true_seconds(plain))
    assert prices.steer == prices.steered_step == prices.judge == 0


def test_two_measurements_are_too_few() -> None:
    with pytest.raises(ConfigError, match="three measured settings"):
        fit(GRID[:2], [1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 8),
        ("prompt_tokens", 200),
        ("output_tokens", 100),
        ("k", 40),
        ("reward_tokens", 900),
        ("judge_tokens", 500),
    ],
)
def test_more_work_takes_longer(name: str, value: int) -> None:
    base = Setting(16, 4, 100, 50, 20, 500, 100)
    assert seconds(TRUE, replace(base, **{name: value})) > seconds(TRUE, base)


def test_throughput_rises_with_concurrency_and_replicas() -> None:
    base = Setting(16, 4, 100, 50, 20, 500, 100)
    assert throughput(TRUE, replace(base, concurrency=32)) > throughput(TRUE, base)
    twice = replace(base, concurrency=32, replicas=2)
    assert throughput(TRUE, twice) == pytest.approx(2 * throughput(TRUE, base))
    assert amounts(twice) == amounts(base)


def test_capacity_is_the_highest_load_within_a_limit() -> None:
    request = Setting(1, 8, 200, 100, 0, 8 * 300)
    alone = seconds(TRUE, request)
    tight = capacity(TRUE, request, 100, alone * 1.5)
    loose = capacity(TRUE, request, 100, alone * 4)
    one_more = replace(request, concurrency=tight.concurrency + 1)
    assert tight.seconds <= alone * 1.5 < seconds(TRUE, one_more)
    assert loose.requests_per_second > tight.requests_per_second
    assert loose.replicas < tight.replicas
    assert tight.replicas == math.ceil(100 / tight.requests_per_second)
    assert capacity(TRUE, request, 100, max_sequences=16).concurrency == 2
    assert capacity(TRUE, request, 1e-12).replicas == 1
    with pytest.raises(ConfigError, match="is too short: a single request"):
        capacity(TRUE, request, 100, alone / 2)
    with pytest.raises(ConfigError, match="8 candidates do not fit into 4 sequences"):
        capacity(TRUE, request, 100, max_sequences=4)


def test_a_request_without_a_price_cannot_be_planned() -> None:
    with pytest.raises(ConfigError, match="give no price"):
        capacity(Prices(), Setting(1, 1, 5, 5), 10)


def test_a_data_sheet_gives_prices() -> None:
    prices = roofline(8e9, 2e12, 4e14, 131072)
    assert prices.step == pytest.approx(8e-3), "16 GB at 2 TB/s"
    assert prices.prefill == prices.sequence == pytest.approx(4e-5), "16 GFLOP at 400 TFLOP/s"
    assert prices.attention == pytest.approx(131072 / 2e12)
    assert prices.reward == 0


def write_result(path: Path, setting: Setting) -> str:
    """Write the file that `bench serve --json` would have written for a setting."""
    answered = 10
    align: dict[str, Any] = {}
    if setting.n > 1:
        align["best_of_n"] = {"n": int(setting.n)}
    if setting.k:
        align["vas"] = {"beta": {"x": 1}, "top_k": int(setting.k)}
    usage = {}
    if align:
        usage["engine_calls"] = int(setting.n * answered)
        usage["reward_tokens"] = int(setting.reward_tokens * answered)
    target = {
        "align": align or None,
        "requests": {"answered": answered},
        "tokens": {
            "prompt": setting.prompt_tokens * answered,
            "spent": setting.output_tokens * setting.n * answered,
            "align": usage,
        },
        "latency_ms": {"e2e": {"mean": {"value": seconds(TRUE, setting) * 1e3}}},
    }
    load = {"loop": "closed", "concurrency": setting.concurrency}
    path.write_text(json.dumps({"load": load, "targets": {"A": target}}))
    return str(path)


@pytest.fixture
def results(tmp_path: Path) -> list[str]:
    """Files of all settings without a judge."""
    grid = [setting for setting in GRID if not setting.judge_tokens]
    return [write_result(tmp_path / f"{i}.json", setting) for i, setting in enumerate(grid)]


@pytest.mark.slow
def test_the_command_plans_from_results(
    tmp_path: Path, results: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_result(tmp_path / "held_out.json", HELD_OUT[0])
    out = tmp_path / "plan.json"
    flags = ["--hold-out", held_out, "--rate", "50", "--latency", "3", "--json", str(out)]
    assert cli.main(["bench", "plan", *results, *flags]) == 0
    text = words(capsys.readouterr().out)
    plan = json.loads(out.read_text())
    assert np.abs(plan["errors"]["held out"]).max() < 0.05
    assert f"{plan['plan']['replicas']} replicas" in text
    assert "held out: mean" in text
    assert plan["prices_seconds"]["step"] == pytest.approx(TRUE.step, rel=0.05)
    assert plan["plan"]["replicas"] in [queue["replicas"] for queue in plan["simulated"]]


@pytest.mark.slow
def test_the_command_finds_the_replicas_for_a_percentile(
    tmp_path: Path, results: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    flags = ["--rate", "20", "--n", "4", "--prompt-tokens", "100", "--output-tokens", "50"]
    assert cli.main(["bench", "plan", *results, *flags, "--p99", "2", "--json", str(out)]) == 0
    text = words(capsys.readouterr().out)
    plan = json.loads(out.read_text())
    sufficient = []
    for queue in plan["simulated"]:
        if queue["p99"] <= 2 and not queue["growing"]:
            sufficient.append(queue["replicas"])
    assert f"{min(sufficient)} replicas for 99% within 2 s" in text
    assert min(sufficient) >= plan["plan"]["replicas"]
    assert any("sequences at once are extrapolated" in doubt for doubt in plan["doubts"])


def test_the_command_refuses_an_unmeasured_feature(
    results: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "plan", *results, "--judge-tokens", "500"]) == 2
    assert "judge_tokens: no result has judged requests" in words(capsys.readouterr().err)


def test_an_unmeasured_length_or_feature_is_refused() -> None:
    measured = [Setting(1, 1, 20, 20), Setting(4, 1, 20, 40), Setting(8, 1, 20, 80)]
    message = "prompt_tokens: 512 cannot be planned: all measured prompts have 20 to 20 tokens"
    with pytest.raises(ConfigError, match=message):
        refuse_unmeasured(measured, Setting(1, 1, 512, 40))
    refuse_unmeasured(measured, Setting(1, 1, 21, 40))
    for name in ("k", "reward_tokens", "judge_tokens"):
        with pytest.raises(ConfigError, match=f"{name}: no result has"):
            refuse_unmeasured(measured, replace(Setting(1, 1, 20, 40), **{name: 5}))


def test_extrapolation_gives_a_warning() -> None:
    measured = [
        Setting(1, 1, 20, 20, reward_tokens=9),
        Setting(4, 1, 20, 40, reward_tokens=9),
        Setting(8, 1, 20, 80, reward_tokens=9),
    ]
    planned = Setting(8, 4, 20, 400, reward_tokens=9)
    text = " ".join(extrapolation_warnings(Prices(step=1e-3), measured, planned))
    for part in (
        "reward_tokens: measured, but",
        "prompts were not varied",
        "output_tokens: 400",
        "n: 4 is",
        "32 sequences at once",
    ):
        assert part in text
    assert list(extrapolation_warnings(TRUE, GRID, Setting(8, 2, 100, 50))) == []


def test_a_queue_in_the_server_gives_a_warning() -> None:
    loads = [Setting(4, 1, 20, 40), Setting(8, 1, 20, 40), Setting(16, 1, 20, 40)]
    warnings = list(saturation_warnings(loads, [1.0, 1.1, 2.2]))
    assert len(warnings) == 1
    assert "16 requests in flight give no more requests / s than" in warnings[0]
    assert list(saturation_warnings(loads, [1.0, 1.1, 1.3])) == []
    other_request = replace(loads[1], n=2)
    assert list(saturation_warnings([loads[0], other_request], [1.0, 9.0])) == []


def test_an_endpoint_without_token_counts_has_no_prices() -> None:
    target = {
        "align": None,
        "requests": {"answered": 3},
        "tokens": {"prompt": 0, "spent": 9, "align": {}, "counted_by": "chunks"},
    }
    report = {"load": {"loop": "closed", "concurrency": 1}, "targets": {"A": target}}
    with pytest.raises(ConfigError, match="does not count its tokens"):
        from_report(report, "x.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [("x.json", "is not a result of"), ("missing.json", "cannot be read")],
)
def test_a_wrong_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "x.json").write_text("[]")
    assert cli.main(["bench", "plan", str(tmp_path / name)]) == 2
    assert message in words(capsys.readouterr().err)


def test_an_open_loop_has_no_prices() -> None:
    report = {"load": {"loop": "open"}, "targets": {"A": {}}}
    with pytest.raises(ConfigError, match="closed loops on one target"):
        from_report(report, "y.json")


@pytest.mark.parametrize(
    ("align", "n", "k"),
    [
        ({"best_of_n": {}}, 8, 0),
        ({"rps": {}}, 5, 0),
        ({"best_of_n": {"n": 2}, "rps": {}}, 10, 0),
        ({"vas": {"beta": {"x": 1}}}, 1, 20),
    ],
)
def test_missing_parameters_have_the_methods_defaults(
    align: dict[str, Any], n: int, k: int
) -> None:
    target = {
        "align": align,
        "requests": {"answered": 1},
        "tokens": {"prompt": 3, "spent": 40, "align": {}},
        "latency_ms": {"e2e": {"mean": {"value": 1.0}}},
    }
    report = {"load": {"loop": "closed", "concurrency": 1}, "targets": {"A": target}}
    setting, _ = from_report(report, "z.json")
    assert (setting.n, setting.k) == (n, k)
