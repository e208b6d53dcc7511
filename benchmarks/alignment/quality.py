"""Run `infer-align bench quality` on the embedded demo, by the world's exact reward.

python benchmarks/alignment/quality.py [--prompts 64] [--draws 2]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, record
from benchmarks.serving.client import DEMO, serving
from infer_align_server import cli

GRID = Path(__file__).parent / "demo_grid.toml"
SEED = 5


def main(prompts: int, draws: int) -> None:
    """Measure, write the report `results/quality.html`, and record the results."""
    with serving(*DEMO) as (port, _):
        result = measure(f"http://127.0.0.1:{port}/v1", prompts, draws)
    setup = {
        "prompts": prompts,
        "draws": draws,
        "gold": "the world's exact reward",
        "grid": GRID.name,
        "budget": "prompt, generated, reward and judge tokens",
        "refused": result["refused"],
        "advice": result["advice"],
    }
    baseline = "one sample, greedy, and best-of-n by the mean of five proxies at the same tokens"
    rows = result["settings"]
    print("written:", record("quality", baseline=baseline, seed=SEED, rows=rows, setup=setup))


def measure(url: str, prompts: int, draws: int) -> dict[str, Any]:
    """Run the bench against a server and return its JSON result."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quality.json"
        options = {
            "--base-url": url,
            "--prompts": "demo",
            "--limit": prompts,
            "--draws": draws,
            "--seed": SEED,
            "--gold": "gold",
            "--grid": GRID,
            "--report": RESULTS / "quality.html",
            "--json": out,
            "--notebook": Path(folder) / "quality.jsonl",
        }
        arguments = ["bench", "quality"]
        for name, value in options.items():
            arguments += [name, str(value)]
        if cli.main(arguments):
            raise SystemExit("the bench failed; its output says why")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=64, help="number of questions")
    parser.add_argument("--draws", type=int, default=2, help="draws of each question and setting")
    options = parser.parse_args()
    main(options.prompts, options.draws)
