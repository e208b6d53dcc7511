"""Fit the demo's values on the shipped models: `python -m benchmarks.demo.values [--out DIR]`.

"helpful" is fitted to the five proxy reward models, "brief" to the number of words. Each is fitted
twice: as a head on the frozen model's states, and as a head of one lookahead value LM. Gold is not
used, so that it can measure the values.

With `--fingerprint`, nothing is fitted: the heads of the folder get the fingerprint of the shipped
model. Their tensors do not change.
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
from typing import Any

import torch

from infer_align.config.fitting import FitConfig
from infer_align.demo import ASSETS, REWARDS, world
from infer_align.engines.transformers import Transformers
from infer_align.fitting import fit_value, fit_value_lm
from infer_align.fitting.samples import sample_replies
from infer_align.fitting.samples_file import Conversation, SamplingConfig
from infer_align.rewards import Reward
from infer_align.rewards.classifier import Classifier
from infer_align.rewards.rules import Rules
from infer_align.values import head

SAMPLING = SamplingConfig(
    model="demo", reward="quality", objective="uwo", replies_per_prompt=16, max_tokens=64, seed=11
)
HEAD = FitConfig(kind="head", method="sgd", rank=32, epochs=8)
LOOKAHEAD = FitConfig(kind="lookahead", epochs=6)


def _load_helpful() -> Reward:
    return Classifier(models=tuple(f"demo/{name}" for name in REWARDS)).load()


def _load_brief() -> Reward:
    return Rules(words_weight=-0.1).load()


# Name of a value -> loader of the reward that it is fitted to.
REWARD_LOADERS: dict[str, Callable[[], Reward]] = {
    "helpful": _load_helpful,
    "brief": _load_brief,
}


async def build(out: Path) -> None:
    """Sample and score replies, fit all values, and write them to a folder with values.json."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    engine = Transformers(model="demo", threads=1).load()
    await engine.start()
    questions = world.prompts(320, seed=SAMPLING.seed)
    prompts: list[Conversation] = [[{"role": "user", "content": text}] for text in questions]
    heads: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, load in REWARD_LOADERS.items():
            reward = load()
            await reward.start()
            sampling = replace(SAMPLING, reward=name)
            file = Path(scratch) / f"value-{name}.safetensors"
            fit = await fit_value(engine, reward, prompts, sampling, HEAD, file, _print)
            heads[name] = asdict(fit)
            # The file of samples is complete, so that this reads it: the value LM is fitted to the
            # same replies.
            samples_file = file.with_suffix(".samples.jsonl")
            samples[name] = await sample_replies(
                engine, reward, prompts, sampling, samples_file, _print
            )
            (out / file.name).write_bytes(file.read_bytes())
            await reward.close()
    value_lm = out / "value-lm"
    fitted = fit_value_lm(engine, prompts, samples, LOOKAHEAD, SAMPLING.seed, value_lm, _print)
    await engine.close()
    lookahead = {name: asdict(fit) for name, fit in zip(samples, fitted.fits, strict=True)}
    report = {"sampling": asdict(SAMPLING), "head": heads, "lookahead": lookahead}
    (out / "values.json").write_text(json.dumps(report, indent=1) + "\n")
    # safetensors makes files that only their owner can read.
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)


async def add_fingerprints(folder: Path) -> None:
    """Write the fingerprint of the demo's model into the metadata of the heads in a folder."""
    engine = Transformers(model="demo", threads=1).load()
    await engine.start()
    frozen = engine.frozen.frozen("demo")
    await engine.close()
    for name in REWARD_LOADERS:
        file = folder / f"value-{name}.safetensors"
        tensors, metadata = head.read(str(file))
        head.write(file, tensors, frozen, metadata)
        file.chmod(0o644)


def _print(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=ASSETS,
        help="folder of the built files; default: the shipped assets",
    )
    parser.add_argument(
        "--fingerprint", action="store_true", help="only add the model's fingerprint to the heads"
    )
    options = parser.parse_args()
    task = add_fingerprints(options.out) if options.fingerprint else build(options.out)
    asyncio.run(task)


if __name__ == "__main__":
    main()
