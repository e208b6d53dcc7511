"""Fill the tables in README.md and docs/*.md from the code; with --check, only say whether they are up to date.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of TABLES.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from infer_align.config import config, registry
from infer_align.methods.dpa import Prompting
from infer_align.objectives import Ensemble
from infer_align.types import Budget
from infer_align_bench.cost import Setting, capacity, roofline, seconds
from infer_align_bench.simulate import simulate
from infer_align_server.openapi import STATUSES

ROOT = Path(__file__).parent.parent
# An 8B model in bfloat16 and three rewards of 0.6B on one H100, at 70% of its bandwidth and half of its arithmetic.
H100 = roofline(8e9, 0.7 * 3.35e12, 0.5 * 989e12, 2 * 32 * 8 * 128 * 2, 3 * 0.6e9)
MARKER = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def methods() -> str:
    """Each key of `align` that a method or the selection reads, with its parameters."""
    found = {name: registry.methods.get(name) for name in registry.methods.names()}
    return _parameters({**found, "ensemble": Ensemble, "budget": Budget}, "key")


def rewards() -> str:
    """Each kind of reward, with the fields of its section."""
    return _parameters(
        {name: registry.rewards.get(name) for name in registry.rewards.names()}, "kind"
    )


def engines() -> str:
    """Each kind of engine, with the fields of its section."""
    return _parameters(
        {name: registry.engines.get(name) for name in registry.engines.names()}, "kind"
    )


def values() -> str:
    """Each kind of value, with the fields of its section."""
    return _parameters(
        {name: registry.values.get(name) for name in registry.values.names()}, "kind"
    )


def vas_results() -> str:
    """What steering does on the demo, as last measured."""
    result = json.loads((ROOT / "benchmarks/results/vas.json").read_text())
    columns = ["answer", "tokens spent", "gold", "± s.e.", "KL, nats", "proxy"]
    rows = [
        [
            row["answer"],
            f"{row['tokens']:.0f}",
            *(_score(row.get(key)) for key in ("gold", "gold_se", "kl", "proxy")),
        ]
        for row in result["rows"]
    ]
    return _table(columns, rows)


def early_stop() -> str:
    """What stopping losers early saves and costs on the demo, as last measured."""
    rows = []
    for row in json.loads((ROOT / "benchmarks/results/early_stop.json").read_text())["rows"]:
        gaps = [
            f"{row[f'minus_{key}']:+.2f} ± {row[f'minus_{key}_se']:.2f}"
            for key in ("budget", "whole")
        ]
        plain = "after" not in row["answer"] and row["answer"] != "greedy"
        cells = [row["answer"], f"{row['tokens']:.0f}", f"{row['gold']:.2f} ± {row['gold_se']:.2f}"]
        rows.append([*cells, "" if plain else gaps[0], gaps[1]])
    return _table(
        ["answer", "tokens spent", "gold", "- best-of-n at the same tokens", "- best of 32"], rows
    )


def vas_speed() -> str:
    """What steering costs, as last measured."""
    return _ratios("vas_speed")


def server() -> str:
    """The [server] section."""
    return _fields(config.Server)


def dpa() -> str:
    """The [dpa] section."""
    return _fields(Prompting)


def limits() -> str:
    """The [limits] section."""
    return _fields(config.Limits)


def demo_results() -> str:
    """What best-of-n does on the demo, as last measured."""
    result = json.loads((ROOT / "benchmarks/results/best_of_n.json").read_text())
    columns = ["answer", "tokens spent", "proxy", "gold", "± s.e."]
    rows = [
        [
            row["answer"],
            f"{row['tokens']:.0f}",
            _score(row["proxy"]),
            _score(row["gold"]),
            _score(row["gold_se"]),
        ]
        for row in result["rows"]
        if row["n"] in {1, 8, 64, 512}
    ]
    return _table(columns, rows)


def demo_replication() -> str:
    """The same with fresh reward models, prompts and samples."""
    result = json.loads((ROOT / "benchmarks/results/best_of_n_retrained.json").read_text())
    shown = ("1", "8", "64", "512")
    rows = [
        [
            str(row["set"]),
            row["objective"],
            str(row["best_n"]),
            *(f"{row[f'gold_{n}']:.2f}" for n in shown),
        ]
        for row in result["rows"]
        if row["objective"] in {"single", "uwo"}
    ]
    return _table(["set", "objective", "best n", *(f"gold at n = {n}" for n in shown)], rows)


def dpa_results() -> str:
    """How answers follow the angle on the demo, as last measured."""
    result = json.loads((ROOT / "benchmarks/results/dpa.json").read_text())
    columns = [
        "answer",
        "trained",
        "helpfulness",
        "± s.e.",
        "verbosity",
        "± s.e.",
        "v . r",
        "gold",
        "± s.e.",
    ]
    keys = (
        "helpfulness",
        "helpfulness_se",
        "verbosity",
        "verbosity_se",
        "projected",
        "gold",
        "gold_se",
    )
    rows = [
        [r["answer"], "yes" if r["trained"] else "", *(_score(r.get(key)) for key in keys)]
        for r in result["rows"]
    ]
    return _table(columns, [row for row in rows if not row[0].endswith("degrees, greedy")])


def rps_results() -> str:
    """What neighbouring directions earn on the demo, as last measured."""
    result = json.loads((ROOT / "benchmarks/results/rps.json").read_text())
    rows = [
        [
            *(str(r["target"]), "yes" if r["trained"] else "", r["answer"], _score(r["projected"])),
            *(f"{r['minus_baseline']:+.3f}", f"{r['minus_baseline_se']:.3f}"),
            " / ".join(f"{100 * r[word]:.0f}" for word in ("win", "tie", "loss")),
        ]
        for r in result["rows"]
    ]
    return _table(
        [
            "target",
            "trained",
            "answer",
            "v . r",
            "minus best of 5",
            "± s.e.",
            "win / tie / loss, %",
        ],
        rows,
    )


def judge_scores() -> str:
    """How a judge's single scores are read, as last measured on the demo."""
    return _judged("score", ("accuracy", "ties", "conflicts_first_label", "conflicts_likelihood"))


def judge_relations() -> str:
    """How a judge's comparisons are read, as last measured on the demo."""
    return _judged(
        "relation",
        ("accuracy", "ties", "nontransitivity_3", "nontransitivity_4", "nontransitivity_5"),
    )


def _judged(kind: str, columns: tuple[str, ...]) -> str:
    result = json.loads((ROOT / "benchmarks/results/trust_judge.json").read_text())
    rows = [
        [row["readout"], *(f"{row[name]:.3f} ± {row[f'{name}_se']:.3f}" for name in columns)]
        for row in result["rows"]
        if row["kind"] == kind
    ]
    return _table(
        ["readout", *(name.replace("_", ", ", 1).replace("_", " ") for name in columns)], rows
    )


def composition_results() -> str:
    """Methods together on the demo, as last measured."""
    result = json.loads((ROOT / "benchmarks/results/compositions.json").read_text())
    keys = ("gold", "projected", "verbosity")
    rows = [
        [
            r["section"],
            r["answer"],
            f"{r['tokens']:.0f}",
            *(f"{r[k]:.2f} ± {r[f'{k}_se']:.2f}" if k in r else "" for k in keys),
        ]
        for r in result["rows"]
    ]
    return _table(["", "answer", "tokens spent", "gold", "v . r", "verbosity"], rows)


def ratios(name: str) -> Callable[[], str]:
    """A recorded result whose rows are figures beside their baselines."""
    return lambda: _ratios(name)


def cost_model() -> str:
    """How far the cost model was from what was measured, for settings that it had not seen."""
    if (result := _recorded("cost_model")) is None:
        return "Not recorded yet: `python benchmarks/serving/cost_model.py`.\n"
    keys = ("concurrency", "n", "prompt_tokens", "output_tokens", "k", "judge_tokens")
    rows = [
        [
            *(f"{row[key]:.0f}" if key in row else "" for key in keys),
            f"{row['measured_ms']:.1f}",
            f"{row['predicted_ms']:.1f}",
            f"{row['error']:+.0%}",
            row["role"],
        ]
        for row in result["rows"]
    ]
    return _table(
        [
            "under way",
            "n",
            "prompt",
            "tokens",
            "k",
            "judge",
            "measured, ms",
            "predicted, ms",
            "error",
            "",
        ],
        rows,
    )


def cost_model_errors() -> str:
    """Its errors in one line each, and which of its prices a setting that was held out has put to the test."""
    if (result := _recorded("cost_model")) is None:
        return "Not recorded yet: `python benchmarks/serving/cost_model.py`.\n"
    setup, held = result["setup"], [row for row in result["rows"] if row["role"] == "held out"]
    tested = setup.get(
        "validated",
        {"prompt_tokens": False, "judge_tokens": False, "k": any(row["k"] for row in held)},
    )
    rows = [
        ["settings held out", str(len(held))],
        ["mean error of those", f"{setup['errors']['held_out_mean']:.1%}"],
        ["worst error of those", f"{setup['errors']['held_out_worst']:.1%}"],
        ["mean error, each left out in turn", f"{setup['errors']['left_out_mean']:.1%}"],
        ["prompts of several lengths", "validated" if tested["prompt_tokens"] else "not validated"],
        ["steering", "validated" if tested["k"] else "not validated"],
        ["the judge", "validated" if tested["judge_tokens"] else "not validated"],
    ]
    return _table(["the cost model on the demo", ""], rows)


def scaling_queue() -> str:
    """What bursts do to latency: the queue of docs/scaling.md, simulated."""
    asked = Setting(1, 8, 512, 256, reward_tokens=8 * (512 + 256))
    planned = capacity(H100, asked, 1000, most_sequences=512)

    def alone(under_way: int) -> float:
        return seconds(H100, replace(asked, concurrency=under_way))

    rows = []
    for share in (0.99, 0.95, 0.9, 0.8, 0.7):
        count = math.ceil(planned.replicas / share)
        found = simulate(alone, 1000, count, planned.concurrency)
        used = 1000 / planned.requests_per_second / count
        rows.append(
            [
                str(count),
                f"{used:.0%}",
                f"{found.p50:.1f}",
                f"{found.p99:.1f}",
                f"{found.waited:.0%}",
            ]
        )
    return _table(
        ["GPUs", "of their throughput used", "p50, s", "p99, s", "requests that wait"], rows
    )


def scaling() -> str:
    """GPUs for 1,000 requests per second, by the cost model and the assumptions of docs/scaling.md."""
    one, eight = Setting(1, 1, 512, 256), Setting(1, 8, 512, 256, reward_tokens=8 * (512 + 256))
    cases = [
        ("one answer", one, math.inf),
        ("best of 8", eight, math.inf),
        ("best of 8, 10 s on average at most", eight, 10.0),
        ("best of 8, rewards on other GPUs", replace(eight, reward_tokens=0), math.inf),
        ("best of 4", replace(eight, n=4, reward_tokens=4 * (512 + 256)), math.inf),
        (
            "best of 8, answers of 64 tokens",
            replace(eight, output_tokens=64, reward_tokens=8 * (512 + 64)),
            math.inf,
        ),
    ]
    rows = []
    for name, setting, limit in cases:
        found = capacity(H100, setting, 1000, limit, 512)
        rows.append(
            [
                name,
                str(found.concurrency),
                f"{found.seconds:.1f}",
                f"{found.requests_per_second:.2f}",
                str(found.replicas),
            ]
        )
    return _table(
        [
            "request",
            "under way on a GPU",
            "seconds a request",
            "requests / s of a GPU",
            "GPUs for 1,000 / s",
        ],
        rows,
    )


def quality() -> str:
    """Every setting of the demo's grid, as last measured."""
    if (result := _recorded("quality")) is None:
        return "Not recorded yet: `python benchmarks/alignment/quality.py`.\n"
    rows = []
    for row in result["rows"]:
        means = [row[name] for name in ("gold", "minus_baseline", "minus_greedy", "minus_equal")]
        shown = [
            "" if mean is None else f"{mean['value']:.2f} ± {mean['error']:.2f}" for mean in means
        ]
        name = f"**{row['name']}**" if "tokens" in row["fronts"] else row["name"]
        late = f" ± {row['seconds_error']:.1g}" if row.get("seconds_error") else ""
        rows.append(
            [
                name,
                f"{row['tokens']:.0f}",
                f"{row['seconds']:.2g}{late}",
                _score(row["kl_bound"]),
                *shown,
            ]
        )
    # Before rows held "generated", their tokens were those alone: the judge's and the rewards' were free.
    counted = "tokens" if "generated" in result["rows"][0] else "generated tokens"
    return _table(
        [
            "setting",
            counted,
            "seconds",
            "KL at most",
            "gold",
            "- baseline",
            "- greedy",
            "- equal budget",
        ],
        rows,
    )


def results() -> str:
    """Every recorded result, and what it takes to doubt it."""
    rows = []
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        found = json.loads(path.read_text())
        seed = "none" if found["seed"] is None else str(found["seed"])
        rows.append(
            [f"`{path.name}`", found["baseline"], f"`{found['commit']}`", seed, found["machine"]]
        )
    return _table(["result", "baseline of the same run", "commit", "seed", "machine"], rows)


def statuses() -> str:
    """What each status means."""
    return _table(["status", "when"], [[str(status), text] for status, text in STATUSES.items()])


TABLES: dict[str, Callable[[], str]] = {
    "methods": methods,
    "rewards": rewards,
    "engines": engines,
    "values": values,
    "vas-results": vas_results,
    "vas-speed": vas_speed,
    "early-stop": early_stop,
    "server": server,
    "limits": limits,
    "statuses": statuses,
    "dpa": dpa,
    "demo-results": demo_results,
    "demo-replication": demo_replication,
    "dpa-results": dpa_results,
    "rps-results": rps_results,
    "judge-scores": judge_scores,
    "judge-relations": judge_relations,
    "composition-results": composition_results,
    "serving-results": ratios("serving"),
    "vllm-results": ratios("vllm"),
    "upstream-results": ratios("upstream"),
    "judge-results": ratios("judge_speed"),
    "results": results,
    "cost-model": cost_model,
    "quality": quality,
    "scaling": scaling,
    "scaling-queue": scaling_queue,
    "cost-model-errors": cost_model_errors,
    "bench-agreement": ratios("bench_agreement"),
    "bench-agreement-vllm": ratios("bench_agreement_vllm"),
}


def _recorded(name: str) -> dict[str, Any] | None:
    path = ROOT / f"benchmarks/results/{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def _ratios(name: str) -> str:
    if not (ROOT / f"benchmarks/results/{name}.json").exists():
        return f"Not recorded yet: benchmarks/results/{name}.json.\n"
    result = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    rows = [
        [r["what"], f"{r['value']:.3g}", f"{r['ours']:.4g}", f"{r['baseline']:.4g}", r["target"]]
        for r in result["rows"]
    ]
    return _table(["what", "value", "ours", "baseline", "aim"], rows)


def _parameters(classes: dict[str, type[Any]], head: str) -> str:
    rows = []
    for name, cls in classes.items():
        rows.append([f"`{name}`", "", (cls.__doc__ or "").partition("\n")[0]])
        rows += [
            ["", f"`{f.name}` ({_default(f)})", f.metadata.get("description", "")]
            for f in dataclasses.fields(cls)
        ]
    return _table([head, "parameter (default)", "what it does"], rows)


def _fields(cls: type[Any]) -> str:
    rows = [
        [f"`{f.name}`", _default(f), f.metadata.get("description", "")]
        for f in dataclasses.fields(cls)
    ]
    return _table(["name", "default", "what it does"], rows)


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is not dataclasses.MISSING:
        return f"`{json.dumps(f.default, default=repr)}`"
    return (
        "required"
        if f.default_factory is dataclasses.MISSING
        else f"`{json.dumps(f.default_factory())}`"
    )


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [
        head,
        ["---"] * len(head),
        *([cell.replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> int:
    """Write the tables, or check them."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        filled = MARKER.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)
        if filled != text:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.write_text(filled)
    if stale and "--check" in sys.argv:
        print("out of date:", *stale, "- run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
