"""Compare `infer-align bench serve` with vLLM's `bench serve`.

Both measure the same target with the same load, in turns. The target is our server over a scripted
engine whose delays are known, or any endpoint that is running.

vLLM counts a chunk with an empty text as a token, so that it has two more gaps between chunks, near
zero: of 16 tokens it counts 17 gaps instead of 15. Medians agree, and means differ by 17/15 = 1.13.

    python benchmarks/serving/agreement.py [--base-url URL --model M --tokenizer PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.answers import WrongAnswerError, check_target
from benchmarks.serving.client import serving
from benchmarks.serving.rows import Row, ratio_row
from infer_align import demo

OUT = Console(width=max(120, Console().width))
ROUNDS = 3
CONCURRENCY = 4
PROMPT_TOKENS = 20
TOKENS = 16
# vLLM's module instead of its command: the command needs a distribution with the name vllm, which
# its CPU builds do not have.
VLLM_BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
CONFIG = f"""
[engine]
kind = "fake"
model = "tiny"
[[engine.replies]]
text = "{" ".join("x" * TOKENS)}"
first_token_seconds = 0.05
seconds_per_token = 0.02
"""
# vLLM's name of each of our latencies.
METRICS = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2el"}
FIGURES = ("mean", "p50", "p90", "p99")
# Figures of one round, by name: milliseconds, requests and tokens per second.
Figures = dict[str, float]


def measure_with_ours(url: str, model: str, requests: int, out: Path) -> Figures:
    """Measure with `infer-align bench serve`."""
    arguments = {
        "--base-url": f"{url}/v1",
        "--model": model,
        "--concurrency": CONCURRENCY,
        "--requests": requests,
        "--dataset": "synthetic",
        "--input-tokens": PROMPT_TOKENS,
        "--output-tokens": TOKENS,
        "--body": '{"ignore_eos": true}',
        "--json": out,
    }
    _run_python(["-m", "infer_align_server", "bench", "serve", *_flags(arguments)])
    target = json.loads(out.read_text())["targets"]["A"]
    check_target(target, TOKENS)
    figures = {}
    for metric in METRICS:
        for figure in FIGURES:
            figures[f"{metric} {figure}"] = target["latency_ms"][metric][figure]["value"]
    figures["requests / s"] = target["rates"]["requests_per_second"]["value"]
    figures["tokens / s"] = target["rates"]["output_tokens_per_second"]["value"]
    return figures


def measure_with_vllm(url: str, model: str, tokenizer: str, requests: int, out: Path) -> Figures:
    """Measure with vLLM's `bench serve`."""
    arguments = {
        "--backend": "openai-chat",
        "--endpoint": "/v1/chat/completions",
        "--base-url": url,
        "--model": model,
        "--tokenizer": tokenizer,
        "--max-concurrency": CONCURRENCY,
        "--num-prompts": requests,
        "--num-warmups": 4,
        "--dataset-name": "random",
        "--random-input-len": PROMPT_TOKENS,
        "--random-output-len": TOKENS,
        "--percentile-metrics": ",".join(METRICS.values()),
        "--metric-percentiles": "50,90,99",
        "--result-dir": out.parent,
        "--result-filename": out.name,
    }
    _run_python(["-c", VLLM_BENCH, *_flags(arguments), "--ignore-eos", "--save-result"])
    result = json.loads(out.read_text())
    if result["completed"] != requests or result["total_output_tokens"] != requests * TOKENS:
        raise WrongAnswerError(
            f"{result['completed']} of {requests} requests were answered, with "
            f"{result['total_output_tokens']} tokens; must be {requests * TOKENS}"
        )
    figures = {}
    for metric, vllm_metric in METRICS.items():
        for figure in FIGURES:
            figures[f"{metric} {figure}"] = result[f"{figure}_{vllm_metric}_ms"]
    figures["requests / s"] = result["request_throughput"]
    figures["tokens / s"] = result["output_throughput"]
    return figures


def _flags(arguments: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in arguments.items():
        flags += [name, str(value)]
    return flags


def _run_python(arguments: list[str]) -> None:
    process = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False
    )
    if process.returncode:
        output = f"{process.stdout[-2000:]}{process.stderr[-2000:]}"
        raise SystemExit(f"{arguments[:4]} failed:\n{output}")


@contextmanager
def scripted_server(folder: Path) -> Iterator[str]:
    """Run our server over the scripted engine, and yield its URL."""
    config = folder / "fake.toml"
    config.write_text(CONFIG)
    command = ("-m", "infer_align_server", "serve", str(config), "--set", "server.port={port}")
    with serving(*command) as (port, _):
        yield f"http://127.0.0.1:{port}"


def measure(
    url: str, options: argparse.Namespace, folder: Path
) -> tuple[list[Figures], list[Figures]]:
    """Measure in turns; return the rounds of our command and of vLLM's."""
    url = url.removesuffix("/").removesuffix("/v1")
    our_rounds = []
    vllm_rounds = []
    for _ in range(options.rounds):
        vllm_rounds.append(
            measure_with_vllm(
                url, options.model, options.tokenizer, options.requests, folder / "vllm.json"
            )
        )
        our_rounds.append(
            measure_with_ours(url, options.model, options.requests, folder / "ours.json")
        )
    return our_rounds, vllm_rounds


def compare(our_rounds: Sequence[Figures], vllm_rounds: Sequence[Figures]) -> list[Row]:
    """Compare the medians of the rounds, figure by figure."""
    rows = []
    for name in our_rounds[0]:
        ours = [figures[name] for figures in our_rounds]
        vllm = [figures[name] for figures in vllm_rounds]
        row = ratio_row(name, statistics.median(ours), statistics.median(vllm), "1")
        rows.append({**row, "rounds": {"ours": ours, "vllm": vllm}})
    return rows


def print_comparison(rows: Sequence[Row]) -> None:
    """Print medians, the spread of their rounds, and ratios."""
    table = Table("figure", "ours", "rounds", "vLLM's", "rounds", "ratio")
    for row in rows:
        spreads = {}
        for side, values in row["rounds"].items():
            spreads[side] = f"{min(values):.4g} - {max(values):.4g}"
        table.add_row(
            row["what"],
            f"{row['ours']:.4g}",
            spreads["ours"],
            f"{row['baseline']:.4g}",
            spreads["vllm"],
            f"{row['value']:.3f}",
        )
    OUT.print(table)


def main() -> None:
    """Measure, compare and write the result."""
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.base_url is None:
            with scripted_server(folder) as url:
                rows = compare(*measure(url, options, folder))
        else:
            rows = compare(*measure(options.base_url, options, folder))
    print_comparison(rows)
    scripted = options.base_url is None
    path = record(
        "bench_agreement" if scripted else "bench_agreement_vllm",
        baseline="vLLM's bench serve on the same target",
        seed=0,
        rows=rows,
        setup={
            "rounds": options.rounds,
            "requests": options.requests,
            "concurrency": CONCURRENCY,
            "tokens": TOKENS,
            "target": "our server over the scripted engine" if scripted else options.target,
        },
    )
    OUT.print("written:", path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base-url", help="a running endpoint; default: our server over the scripted engine"
    )
    parser.add_argument(
        "--target",
        default="vllm serve",
        help="description of that endpoint in the result; default: %(default)s",
    )
    parser.add_argument("--model", default="tiny", help="default: %(default)s")
    parser.add_argument(
        "--tokenizer",
        default=str(demo.path("lm")),
        help="tokenizer of vLLM's random prompts; default: that of the embedded demo",
    )
    parser.add_argument(
        "--requests", type=int, default=200, help="requests of a round; default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
