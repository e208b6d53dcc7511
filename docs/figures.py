"""Make the tables of recorded speeds and costs, and list all tables of recorded results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial

import effects
import language
from tables import RESULTS, Columns, Row, number, recorded, result_table, table, text

# The figures of a gateway, and the digits after the point.
GATEWAY_FIGURES = {
    "requests per second, ratio": 2,
    "added p50, ms": 1,
    "added p99, ms": 1,
    "CPU of the gateway per request, us": 0,
}
BOUND = re.compile(r"at (?P<kind>least|most) (?P<limit>[\d.]+)\b")


def aim(row: Row) -> str:
    """Return the aim of a row, with a mark in bold if the recorded value misses it."""
    target = str(row["target"])
    bound = BOUND.match(target)
    if bound is None:
        return target
    limit = float(bound["limit"])
    missed = row["value"] < limit
    if bound["kind"] == "most":
        missed = row["value"] > limit
    return f"{target}: **missed**" if missed else target


def ratios(name: str) -> Callable[[], str]:
    """Return a table of figures beside their baselines."""
    columns: Columns = [
        ("what", text("what")),
        ("value", lambda row: f"{row['value']:.3g}"),
        ("ours", lambda row: f"{row['ours']:.4g}"),
        ("baseline", lambda row: f"{row['baseline']:.4g}"),
        ("aim", aim),
    ]
    return lambda: result_table(name, columns)


def forward_forms() -> str:
    """Return the speed of each form of the small model's forward pass, and whether it may serve."""
    columns: Columns = [
        ("form", text("what")),
        ("tokens per second", number("ours", 1)),
        ("times float32", number("value", 2)),
        ("likeliest token as in float32", number("agrees", 3)),
        ("a row's logits move by", number("row_moves_by", 1)),
    ]
    return result_table("forward_forms", columns)


def scenarios() -> str:
    """Return the figure of each scenario beside the undisturbed one."""
    columns: Columns = [
        ("scenario", text("what")),
        ("figure", number("ours", 0)),
        ("undisturbed", number("baseline", 0)),
        ("", text("target")),
    ]
    return result_table("scenarios", columns)


def gateways() -> str:
    """Return what each gateway costs in front of an upstream, by the number of connections."""
    result = recorded("gateways")
    if result is None:
        return "Not recorded yet: benchmarks/results/gateways.json.\n"
    figures: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        where, _, what = row["what"].partition(": ")
        figures.setdefault(where, {})[what] = row["value"]
    rows = []
    for where, values in figures.items():
        gateway, _, connections = where.rpartition(", c = ")
        cells = [f"{values[what]:.{digits}f}" for what, digits in GATEWAY_FIGURES.items()]
        rows.append([gateway, connections, *cells])
    return table(["gateway", "connections", *GATEWAY_FIGURES], rows)


def trace() -> str:
    """Return the recorded trace of a best-of-8 as a block of text."""
    result = recorded("telemetry")
    if result is None:
        return "Not recorded yet: benchmarks/results/telemetry.json.\n"
    return "```text\n" + "\n".join(result["setup"]["trace"]) + "\n```\n"


def telemetry_cost() -> str:
    """Return the times of requests with traces beside those without."""
    columns: Columns = [
        ("what", text("what")),
        ("ratio", number("value", 3)),
        ("with it", number("ours", 3)),
        ("taken out", number("baseline", 3)),
        ("aim", aim),
    ]
    return result_table("telemetry", columns)


def gpu_expected(*, in_vllm: bool) -> str:
    """Return the computed range of each target on a GPU: of the kernels, or in vLLM."""

    def expected(row: Row) -> str:
        digits = 3 if row["unit"] == "x plain" else 1
        if row["unit"] in {"us", "launches"}:
            digits = 0
        return f"{row['low']:.{digits}f} to {row['high']:.{digits}f} {row['unit']}"

    def judged(row: Row) -> str:
        return f"**{row['verdict']}**" if row["verdict"] == "missed" else str(row["verdict"])

    columns: Columns = [
        ("target", text("what")),
        ("floor, us", number("floor_us", 1)),
        ("computed", expected),
        ("aim", text("target")),
        ("verdict", judged),
        ("what decides", text("bound")),
    ]
    if in_vllm:
        del columns[1]
    return result_table("gpu_expected", columns, lambda row: (row["unit"] == "x plain") == in_vllm)


def results() -> str:
    """Return every recorded result with its baseline, commit, seed and machine."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        seed = "none" if result["seed"] is None else str(result["seed"])
        commit = f"`{result['commit']}`"
        rows.append([f"`{path.name}`", result["baseline"], commit, seed, result["machine"]])
    return table(["result", "baseline of the same run", "commit", "seed", "machine"], rows)


def cost_model() -> str:
    """Return the cost model's predictions beside the measured times."""

    def percent(row: Row) -> str:
        return f"{row['error']:+.0%}"

    columns: Columns = [
        ("under way", number("concurrency", 0)),
        ("n", number("n", 0)),
        ("prompt", number("prompt_tokens", 0)),
        ("tokens", number("output_tokens", 0)),
        ("k", number("k", 0)),
        ("judge", number("judge_tokens", 0)),
        ("measured, ms", number("measured_ms", 1)),
        ("predicted, ms", number("predicted_ms", 1)),
        ("error", percent),
        ("", text("role")),
    ]
    return result_table("cost_model", columns)


def cost_model_errors() -> str:
    """Return the errors of the cost model, and which of its prices a held-out setting checked."""
    result = recorded("cost_model")
    if result is None:
        return "Not recorded yet: benchmarks/results/cost_model.json.\n"
    errors = result["setup"]["errors"]
    held_out = [row for row in result["rows"] if row["role"] == "held out"]
    checks = {"prompt_tokens": False, "judge_tokens": False, "k": any(r["k"] for r in held_out)}
    checks.update(result["setup"].get("validated", {}))

    def verdict(name: str) -> str:
        return "validated" if checks[name] else "not validated"

    rows = [
        ["settings held out", str(len(held_out))],
        ["mean error of those", f"{errors['held_out_mean']:.1%}"],
        ["worst error of those", f"{errors['held_out_worst']:.1%}"],
        ["mean error, each left out in turn", f"{errors['left_out_mean']:.1%}"],
        ["prompts of several lengths", verdict("prompt_tokens")],
        ["steering", verdict("k")],
        ["the judge", verdict("judge_tokens")],
    ]
    return table(["the cost model on the demo", ""], rows)


TABLES: dict[str, Callable[[], str]] = {
    **effects.TABLES,
    **language.TABLES,
    "results": results,
    "cost-model": cost_model,
    "cost-model-errors": cost_model_errors,
    "vas-speed": ratios("vas_speed"),
    "guidance-cost": ratios("guidance_cost"),
    "serving-results": ratios("serving"),
    "vllm-results": ratios("vllm"),
    "vllm-small-model": ratios("vllm_small_model"),
    "upstream-results": ratios("upstream"),
    "small-model": ratios("small_model"),
    "forward-forms": forward_forms,
    "gateways": gateways,
    "gpu-kernels": partial(gpu_expected, in_vllm=False),
    "gpu-vllm": partial(gpu_expected, in_vllm=True),
    "scenarios": scenarios,
    "threads": ratios("threads"),
    "telemetry-cost": telemetry_cost,
    "trace": trace,
    "judge-results": ratios("judge_speed"),
    "bench-agreement": ratios("bench_agreement"),
    "bench-agreement-vllm": ratios("bench_agreement_vllm"),
}
