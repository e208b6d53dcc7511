"""Fit the demo's values: ``python -m benchmarks.demo.values [--out DIR]``, on the shipped model and reward models.

``helpful`` follows the five proxy reward models, ``brief`` the number of words; both as a head on the frozen model's states and
as a head of one lookahead value LM. Gold is not used: what is measured against it later was not fitted to it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from infer_align.demo import ASSETS, REWARDS, world
from infer_align.engines.transformers import Transformers
from infer_align.fitting import FitConfig, fit_value, fit_value_lm
from infer_align.fitting.samples import Conversation, SamplingConfig, sample_replies
from infer_align.rewards import Reward
from infer_align.rewards.classifier import Classifier
from infer_align.rewards.rules import Rules

SAMPLING = SamplingConfig(
    model="demo", reward="quality", objective="uwo", replies_per_prompt=16, max_tokens=64, seed=11
)
HEAD = FitConfig(kind="head", method="sgd", rank=32, epochs=8)
LOOKAHEAD = FitConfig(kind="lookahead", epochs=6)
REWARDS_OF: dict[str, Callable[[], Reward]] = {
    "helpful": lambda: Classifier(models=tuple(f"demo/{name}" for name in REWARDS)).load(),
    "brief": lambda: Rules(words_weight=-0.1).load(),
}


async def build(out: Path) -> None:
    """Sample, score by both rewards, fit two heads and one value LM with two heads, and write them to `out` with their reports."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    engine = Transformers(model="demo", threads=1).load()
    await engine.start()
    prompts: list[Conversation] = [
        [{"role": "user", "content": question}] for question in world.prompts(320, seed=11)
    ]
    reports, samples = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, load in REWARDS_OF.items():
            reward = load()
            await reward.start()
            how = replace(SAMPLING, reward=name)
            file = Path(scratch) / f"value-{name}.safetensors"
            reports[name] = await fit_value(engine, reward, prompts, how, HEAD, file, _say)
            # Read again rather than drawn again: the value LM is fitted to the same replies.
            samples[name] = await sample_replies(
                engine, reward, prompts, how, file.with_suffix(".samples.jsonl"), _say
            )
            (out / file.name).write_bytes(file.read_bytes())
            await reward.close()
    fitness = fit_value_lm(
        engine, prompts, samples, LOOKAHEAD, SAMPLING.seed, out / "value-lm", _say
    )
    await engine.close()
    report = {
        "sampling": asdict(SAMPLING),
        "head": {name: asdict(found) for name, found in reports.items()},
        "lookahead": {name: asdict(found) for name, found in zip(samples, fitness, strict=True)},
    }
    (out / "values.json").write_text(json.dumps(report, indent=1) + "\n")
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)


def _say(what: str) -> None:
    print(what, file=sys.stderr)


def main() -> None:
    """Build into the package, or elsewhere."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    asyncio.run(build(parser.parse_args().out))


if __name__ == "__main__":
    main()
