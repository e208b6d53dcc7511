"""Rebuild the embedded demo: ``python -m benchmarks.demo.build [--out DIR]``. Minutes on one CPU core, no downloads.

The same configuration on the same versions and machine gives the same files; elsewhere floating point may differ in the
last bits, so metrics.json says how far the figures are certain.
"""

import argparse
import hashlib
import json
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.demo.documents import document
from benchmarks.demo.language import LanguageConfig, train
from benchmarks.demo.measure import load, measure
from benchmarks.demo.preference import Pair, RewardConfig, pairs, train_member
from benchmarks.demo.rating import RatingConfig, train_rater
from benchmarks.demo.sampling import sample
from benchmarks.demo.tokenizer import build_tokenizer
from infer_align.demo import ASSETS, LM, PREFERENCE, REWARDS
from infer_align.demo.bag import BagForSequenceClassification
from infer_align.demo.world import prompts

__all__ = ["BuildConfig", "build", "main"]


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """All that decides what the build makes."""

    language: LanguageConfig = field(default_factory=LanguageConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rating: RatingConfig = field(default_factory=RatingConfig)
    measured_prompts: int = 128
    measured_replies: int = 64
    measured_seed: int = 1


def build(config: BuildConfig, out: Path) -> None:
    """Train everything and write it to ``out``: the language model, the reward models, metrics.json."""
    torch.set_num_threads(
        1
    )  # the sum order of a parallel matrix product would depend on the machine
    started = time.monotonic()
    tokenizer = build_tokenizer(config.language.max_length)
    lm = train(
        config.language,
        tokenizer,
        document,
        lambda step, loss: _say(f"lm  step {step:5d}  loss {loss:.3f}"),
    )
    lm.save_pretrained(out / LM)
    tokenizer.save_pretrained(out / LM)
    bags = dict(zip(REWARDS, train_members(lm, tokenizer, config.reward), strict=True))
    _say(f"{PREFERENCE}  {config.rating.replies} ratings, {config.rating.epochs} epochs")
    bags[PREFERENCE] = train_rater(config.rating, tokenizer)
    for name, bag in bags.items():
        bag.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    _write_metrics(config, out)
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes them for the owner only
    _say(f"built {out} in {time.monotonic() - started:.0f} s")


def labelled_pairs(
    lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: RewardConfig, seed: int
) -> list[Pair]:
    """``config.pairs`` noisy preferences between the language model's own replies."""
    per_prompt = 2 * -(
        -config.pairs * 9 // (8 * 320)
    )  # an eighth more than needed: gold cannot decide them all
    questions = prompts(320, seed)
    sampled = sample(lm, tokenizer, questions, per_prompt, seed=seed)
    replies = [[text for text, _ in row] for row in sampled]
    return pairs(list(zip(questions, replies, strict=True)), config.pairs, config.flipped, seed)


def train_members(
    lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: RewardConfig
) -> list[BagForSequenceClassification]:
    """The ensemble: the same pairs for every member, its own initialisation and order."""
    data = labelled_pairs(lm, tokenizer, config, config.seed)
    members = []
    for index in range(config.members):
        _say(f"reward-{index}  {len(data)} pairs, {config.epochs} epochs")
        members.append(train_member(config, tokenizer, data, config.seed + index))
    return members


def _write_metrics(config: BuildConfig, out: Path) -> None:
    metrics = measure(
        load(out),
        flipped=config.reward.flipped,
        n_prompts=config.measured_prompts,
        n_replies=config.measured_replies,
        seed=config.measured_seed,
    )
    report = {
        "config": asdict(config),
        "documents_sha256": documents_digest(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
    }
    (out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    for name, metric in metrics.items():
        _say(f"{name:28s} {metric.value:8.4f} +- {metric.standard_error:.4f}")


def documents_digest() -> str:
    """Fingerprint of what the language model learns from: it changes with the world's words, facts and odds."""
    rng = random.Random(0)
    return hashlib.sha256(json.dumps([document(rng) for _ in range(2000)]).encode()).hexdigest()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo.build", description="Rebuild the embedded demo."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ASSETS,
        help="default: the shipped assets",
    )
    build(BuildConfig(), parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
