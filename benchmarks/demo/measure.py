"""Measure the demo's models, each figure with its standard error over prompts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.demo.documents import document
from benchmarks.demo.effects import direction_effects, flat_exchanges, judge_effects
from benchmarks.demo.language import reply_losses
from benchmarks.demo.preference import score
from benchmarks.demo.sampling import Reply, sample
from infer_align.demo import LM, PREFERENCE, REWARDS
from infer_align.demo.bag import BagForSequenceClassification, register
from infer_align.demo.world import gold, prompts

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Models:
    """All models of a build."""

    tokenizer: PreTrainedTokenizerFast
    lm: LlamaForCausalLM
    members: tuple[BagForSequenceClassification, ...]
    rater: BagForSequenceClassification


@dataclass(frozen=True, slots=True)
class Metric:
    """A mean over n prompts or documents."""

    value: float
    standard_error: float
    n: int


@dataclass(frozen=True, slots=True)
class Pool:
    """N scored replies to each of P prompts; K members."""

    gold: Array  # [P, N]
    proxy: Array  # [K, P, N]
    tokens: Array  # [P, N], with the end of the turn
    greedy_gold: Array  # [P]
    greedy_tokens: Array  # [P]


def load(folder: Path) -> Models:
    """Load the models of a folder with transformers, in float32."""
    register()
    bags: list[BagForSequenceClassification] = []
    for name in (*REWARDS, PREFERENCE):
        bag = AutoModelForSequenceClassification.from_pretrained(folder / name)
        bags.append(bag.float().eval())
    return Models(
        AutoTokenizer.from_pretrained(folder / LM),
        AutoModelForCausalLM.from_pretrained(folder / LM, dtype=torch.float32).eval(),
        tuple(bags[:-1]),
        bags[-1],
    )


def draw_pool(models: Models, questions: Sequence[str], n: int, seed: int) -> Pool:
    """Sample n replies and the greedy one to each question, and score them."""
    sampled = sample(models.lm, models.tokenizer, questions, n, seed=seed)
    greedy = sample(models.lm, models.tokenizer, questions, 1, seed=seed, greedy=True)
    proxy = score(models.members, models.tokenizer, flat_exchanges(questions, sampled)).numpy()
    shape = (len(questions), n)
    return Pool(
        gold=_gold(questions, sampled),
        proxy=proxy.astype(np.float64).reshape(-1, *shape),
        tokens=_tokens(sampled),
        greedy_gold=_gold(questions, greedy)[:, 0],
        greedy_tokens=_tokens(greedy)[:, 0],
    )


def _gold(questions: Sequence[str], replies: Sequence[Sequence[Reply]]) -> Array:
    """Return the gold reward [P, N] of every reply."""
    exchanges = flat_exchanges(questions, replies)
    return np.array([gold(*exchange) for exchange in exchanges]).reshape(len(questions), -1)


def _tokens(replies: Sequence[Sequence[Reply]]) -> Array:
    """Return the length [P, N] of every reply."""
    lengths: list[list[int]] = []
    for row in replies:
        lengths.append([length for _, length in row])
    return np.array(lengths, dtype=np.float64)


def measure(
    models: Models, *, flipped: float, n_prompts: int, n_replies: int, seed: int
) -> dict[str, Metric]:
    """Return the figures of metrics.json.

    The prompts, replies and documents depend on the seed alone.
    """
    rng = random.Random(seed)
    documents = [document(rng) for _ in range(4 * n_prompts)]
    losses = reply_losses(models.lm, models.tokenizer, documents)
    questions = prompts(n_prompts, seed)
    pool = draw_pool(models, questions, n_replies, seed)
    clean = _pair_accuracy(pool)
    figures: dict[str, Sequence[float] | Array] = {
        "lm_loss_nats_per_token": losses,
        "base_gold": pool.gold.mean(1),
        "greedy_gold": pool.greedy_gold,
        "tokens_per_reply": pool.tokens.mean(1),
        "reward_pair_accuracy": clean,
        # The accuracy on labels that are as noisy as those of the training data.
        "reward_pair_accuracy_noisy": (1 - flipped) * clean + flipped * (1 - clean),
        "reward_member_correlation": _member_correlation(pool),
        **direction_effects(models.lm, models.tokenizer, models.rater, questions, seed),
        **judge_effects(models.lm, models.tokenizer, questions, seed),
    }
    return {name: _metric(values) for name, values in figures.items()}


def _pair_accuracy(pool: Pool) -> Array:
    """Return [P]: how often a member orders neighbouring replies as gold does."""
    gold_gap = pool.gold[:, ::2] - pool.gold[:, 1::2]
    proxy_gap = pool.proxy[:, :, ::2] - pool.proxy[:, :, 1::2]
    agrees = np.where(gold_gap != 0, proxy_gap * gold_gap > 0, np.nan)
    return np.asarray(np.nanmean(agrees, axis=(0, 2)))


def _member_correlation(pool: Pool) -> Array:
    """Return [P]: the mean correlation between two members' scores of the replies to one prompt."""
    member_pairs = np.triu_indices(len(pool.proxy), 1)
    means: list[float] = []
    for prompt in range(len(pool.gold)):
        correlations = np.atleast_2d(np.corrcoef(pool.proxy[:, prompt]))
        means.append(correlations[member_pairs].mean())
    return np.array(means)


def _metric(values: Sequence[float] | Array) -> Metric:
    numbers = np.asarray(values, dtype=np.float64)
    error = numbers.std(ddof=1) / math.sqrt(len(numbers))
    return Metric(float(numbers.mean()), float(error), len(numbers))


def read_metrics(file: Path) -> dict[str, Metric]:
    """Read the metrics of a metrics.json."""
    metrics = json.loads(file.read_text())["metrics"]
    return {name: Metric(**fields) for name, fields in metrics.items()}
