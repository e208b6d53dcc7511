"""`infer-align bench serve` against vLLM's own `bench serve`: the same target, the same load, in turns.

The target is our server over a scripted engine whose delays are known, or any endpoint that is running already. vLLM counts a chunk
with an empty text as a token's, so its gaps between chunks have two more, near zero: of 16
tokens it counts 17 gaps where there are 15, and the means differ by 17/15 = 1.13 where medians agree.
    python benchmarks/serving/agreement.py [--base-url URL --model M --tokenizer PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.client import serving
from infer_align.demo import path

OUT = Console(width=max(120, Console().width))
ROUNDS = 3
CONCURRENCY, PROMPT_TOKENS, TOKENS = 4, 20, 16
# vLLM's module, not its command: the command asks for a distribution of the name vllm, which its CPU builds do not have.
VLLM = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
REPLY = (
    f'{{text = "{" ".join("x" * TOKENS)}", first_token_seconds = 0.05, seconds_per_token = 0.02}}'
)
CONFIG = f'[engine]\nkind = "fake"\nmodel = "tiny"\nreplies = [{REPLY}]\n'
METRICS = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2el"}


def ours(url: str, model: str, requests: int, out: Path) -> dict[str, float]:
    """What our command says: milliseconds, and requests and tokens per second."""
    load = [
        "--concurrency",
        str(CONCURRENCY),
        "--requests",
        str(requests),
        "--dataset",
        "synthetic",
    ]
    load += [
        "--input-tokens",
        str(PROMPT_TOKENS),
        "--output-tokens",
        str(TOKENS),
        "--body",
        '{"ignore_eos": true}',
    ]
    _run(
        [
            "-m",
            "infer_align_server",
            "bench",
            "serve",
            "--base-url",
            f"{url}/v1",
            "--model",
            model,
            *load,
            "--json",
            str(out),
        ]
    )
    found = json.loads(out.read_text())["targets"]["A"]
    figures = {
        f"{m} {f}": found["latency_ms"][m][f]["value"]
        for m in METRICS
        for f in ("mean", "p50", "p90", "p99")
    }
    rates = found["rates"]
    return figures | {
        "requests / s": rates["requests_per_second"]["value"],
        "tokens / s": rates["output_tokens_per_second"]["value"],
    }


def vllm(url: str, model: str, tokenizer: str, requests: int, out: Path) -> dict[str, float]:
    """What vLLM's says."""
    load = [
        "--max-concurrency",
        str(CONCURRENCY),
        "--num-prompts",
        str(requests),
        "--num-warmups",
        "4",
        "--ignore-eos",
    ]
    load += [
        "--dataset-name",
        "random",
        "--random-input-len",
        str(PROMPT_TOKENS),
        "--random-output-len",
        str(TOKENS),
    ]
    target = [
        "--backend",
        "openai-chat",
        "--endpoint",
        "/v1/chat/completions",
        "--base-url",
        url,
        "--model",
        model,
    ]
    kept = [
        "--percentile-metrics",
        ",".join(METRICS.values()),
        "--metric-percentiles",
        "50,90,99",
        "--save-result",
    ]
    _run(
        [
            "-c",
            VLLM,
            *target,
            "--tokenizer",
            tokenizer,
            *load,
            *kept,
            "--result-dir",
            str(out.parent),
            "--result-filename",
            out.name,
        ]
    )
    found = json.loads(out.read_text())
    figures = {
        f"{m} {f}": found[f"{f}_{theirs}_ms"]
        for m, theirs in METRICS.items()
        for f in ("mean", "p50", "p90", "p99")
    }
    return figures | {
        "requests / s": found["request_throughput"],
        "tokens / s": found["output_throughput"],
    }


def _run(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments[:4]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main(options: argparse.Namespace) -> None:
    """Measure in turns, compare the medians of the rounds, record."""
    seen: dict[str, list[dict[str, float]]] = {"ours": [], "vllm": []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = options.base_url
        if url is None:
            (folder / "fake.toml").write_text(CONFIG)
            server = (
                "-m",
                "infer_align_server",
                "serve",
                str(folder / "fake.toml"),
                "--set",
                "server.port={port}",
            )
            url = f"http://127.0.0.1:{stack.enter_context(serving(*server))[0]}"
        url = url.removesuffix("/").removesuffix("/v1")
        for _ in range(options.rounds):
            seen["vllm"].append(
                vllm(url, options.model, options.tokenizer, options.requests, folder / "vllm.json")
            )
            seen["ours"].append(ours(url, options.model, options.requests, folder / "ours.json"))
    rows: list[dict[str, Any]] = []
    table = Table("figure", "ours", "rounds", "vLLM's", "rounds", "ratio")
    for what in seen["ours"][0]:
        values = {side: [found[what] for found in seen[side]] for side in seen}
        mine, theirs = (statistics.median(values[side]) for side in ("ours", "vllm"))
        rows.append(
            {
                "what": what,
                "value": mine / theirs,
                "ours": mine,
                "baseline": theirs,
                "target": "1",
                "rounds": values,
            }
        )
        spread = {side: f"{min(found):.4g} - {max(found):.4g}" for side, found in values.items()}
        table.add_row(
            what,
            f"{mine:.4g}",
            spread["ours"],
            f"{theirs:.4g}",
            spread["vllm"],
            f"{mine / theirs:.3f}",
        )
    OUT.print(table)
    name = "bench_agreement" if options.base_url is None else "bench_agreement_vllm"
    setup = {
        "rounds": options.rounds,
        "requests": options.requests,
        "concurrency": CONCURRENCY,
        "tokens": TOKENS,
    }
    setup["target"] = (
        "our server over the scripted engine" if options.base_url is None else options.target
    )
    OUT.print(
        "written:",
        record(
            name, baseline="vLLM's bench serve on the same target", seed=0, rows=rows, setup=setup
        ),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--base-url")
    parser.add_argument("--target", default="vllm serve", help="what runs there, for the record")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokenizer", default=str(path("lm")))
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    main(parser.parse_args())
