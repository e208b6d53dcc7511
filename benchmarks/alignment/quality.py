"""`infer-align bench quality` on the embedded demo: everything that `align` can do, by the world's exact reward.

python benchmarks/alignment/quality.py [--prompts 64] [--draws 2]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.record import RESULTS, record
from benchmarks.serving.client import serving
from benchmarks.serving.run import DEMO
from infer_align_server import cli

GRID = Path(__file__).parent / "demo_grid.toml"
SEED = 5


def main(prompts: int, draws: int) -> None:
    """Measure, report (`results/quality.html`), record."""
    with serving(*DEMO) as (port, _), tempfile.TemporaryDirectory() as folder:
        out, notebook = Path(folder) / "quality.json", Path(folder) / "quality.jsonl"
        url = f"http://127.0.0.1:{port}/v1"
        asked = [
            "--base-url",
            url,
            "--prompts",
            "demo",
            "--limit",
            str(prompts),
            "--draws",
            str(draws),
            "--seed",
            str(SEED),
        ]
        kept = [
            "--report",
            str(RESULTS / "quality.html"),
            "--json",
            str(out),
            "--notebook",
            str(notebook),
        ]
        if cli.main(["bench", "quality", *asked, "--gold", "gold", "--grid", str(GRID), *kept]):
            raise SystemExit("it did not come to its end")
        found = json.loads(out.read_text())
    setup = {
        "prompts": prompts,
        "draws": draws,
        "gold": "the world's exact reward",
        "grid": GRID.name,
        "budget": "prompt, generated, reward and judge tokens",
    }
    setup |= {"refused": found["refused"], "advice": found["advice"]}
    baseline = "one sample, greedy, and best-of-n by the mean of five proxies at the same tokens"
    print(
        "written:",
        record("quality", baseline=baseline, seed=SEED, rows=found["settings"], setup=setup),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--draws", type=int, default=2)
    options = parser.parse_args()
    main(options.prompts, options.draws)
