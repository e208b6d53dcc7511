"""Rebuild the embedded demo: `python -m benchmarks.demo.build [--out DIR]`.

It takes minutes on one CPU core and downloads nothing.

The same configuration on the same versions and machine gives the same files. Elsewhere the last
bits of floating-point numbers may differ, so metrics.json holds a standard error for each figure.
"""

from __future__ import annotations

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

_QUESTIONS = 320


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """The complete configuration of a build."""

    language: LanguageConfig = field(default_factory=LanguageConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rating: RatingConfig = field(default_factory=RatingConfig)
    measured_prompts: int = 128
    measured_replies: int = 64
    measured_seed: int = 1


def build(config: BuildConfig, out: Path) -> None:
    """Train all models and write them to a folder, with metrics.json."""
    # With more threads, the order of sums in a matrix product would depend on the machine.
    torch.set_num_threads(1)
    start = time.monotonic()
    tokenizer = build_tokenizer(config.language.max_length)
    lm = train(
        config.language,
        tokenizer,
        document,
        lambda step, loss: _print(f"lm  step {step:5d}  loss {loss:.3f}"),
    )
    lm.save_pretrained(out / LM)
    tokenizer.save_pretrained(out / LM)
    bags = dict(zip(REWARDS, train_members(lm, tokenizer, config.reward), strict=True))
    _print(f"{PREFERENCE}  {config.rating.replies} ratings, {config.rating.epochs} epochs")
    bags[PREFERENCE] = train_rater(config.rating, tokenizer)
    for name, bag in bags.items():
        bag.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    _write_metrics(config, out)
    # safetensors makes files that only their owner can read.
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)
    _print(f"built {out} in {time.monotonic() - start:.0f} s")


def labelled_pairs(
    lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: RewardConfig, seed: int
) -> list[Pair]:
    """Return `config.pairs` noisy preferences between the language model's own replies."""
    # An eighth more pairs than needed are sampled, because the replies of some have equal gold.
    pairs_per_question = -(-config.pairs * 9 // (8 * _QUESTIONS))
    questions = prompts(_QUESTIONS, seed)
    sampled = sample(lm, tokenizer, questions, 2 * pairs_per_question, seed=seed)
    question_replies: list[tuple[str, list[str]]] = []
    for question, replies in zip(questions, sampled, strict=True):
        question_replies.append((question, [text for text, _ in replies]))
    return pairs(question_replies, config.pairs, config.flipped, seed)


def train_members(
    lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: RewardConfig
) -> list[BagForSequenceClassification]:
    """Train the ensemble on the same pairs, each member with its own initial weights and order."""
    data = labelled_pairs(lm, tokenizer, config, config.seed)
    members: list[BagForSequenceClassification] = []
    for index in range(config.members):
        _print(f"reward-{index}  {len(data)} pairs, {config.epochs} epochs")
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
        _print(f"{name:28s} {metric.value:8.4f} +- {metric.standard_error:.4f}")


def documents_digest() -> str:
    """Return a fingerprint of the training data.

    It changes with the world's words, facts and odds.
    """
    rng = random.Random(0)
    documents = [document(rng) for _ in range(2000)]
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()


def _print(line: str) -> None:
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
        help="folder of the built files; default: the shipped assets",
    )
    build(BuildConfig(), parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
