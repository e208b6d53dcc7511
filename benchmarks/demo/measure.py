"""What the demo's models are like, each figure with its standard error over prompts."""

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
from benchmarks.demo.effects import direction_effects, judge_effects
from benchmarks.demo.language import reply_losses
from benchmarks.demo.preference import score
from benchmarks.demo.sampling import sample
from infer_align.demo import LM, PREFERENCE, REWARDS
from infer_align.demo.bag import BagForSequenceClassification, register
from infer_align.demo.world import gold, prompts

__all__ = ["Metric", "Models", "Pool", "draw", "load", "measure", "read_metrics"]

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Models:
    """Everything the build makes."""

    tokenizer: PreTrainedTokenizerFast
    lm: LlamaForCausalLM
    members: tuple[BagForSequenceClassification, ...]
    rater: BagForSequenceClassification


@dataclass(frozen=True, slots=True)
class Metric:
    """A mean over ``n`` prompts or documents."""

    value: float
    standard_error: float
    n: int


@dataclass(frozen=True, slots=True)
class Pool:
    """N sampled replies to each of P prompts, scored; K members."""

    gold: Array  # [P, N]
    proxy: Array  # [K, P, N]
    tokens: Array  # [P, N], the end of turn included
    greedy_gold: Array  # [P]
    greedy_tokens: Array  # [P]


def load(folder: Path) -> Models:
    """The models in ``folder`` as any user of transformers would load them, in float32."""
    register()
    bags = [
        AutoModelForSequenceClassification.from_pretrained(folder / name).float().eval()
        for name in (*REWARDS, PREFERENCE)
    ]
    return Models(
        AutoTokenizer.from_pretrained(folder / LM),
        AutoModelForCausalLM.from_pretrained(folder / LM, dtype=torch.float32).eval(),
        tuple(bags[:-1]),
        bags[-1],
    )


def draw(models: Models, questions: Sequence[str], n: int, seed: int) -> Pool:
    """Sample ``n`` replies and the greedy one to each question, and score them by gold and by every member."""
    sampled = sample(models.lm, models.tokenizer, questions, n, seed=seed)
    greedy = sample(models.lm, models.tokenizer, questions, 1, seed=seed, greedy=True)
    exchanges = [
        (q, text) for q, replies in zip(questions, sampled, strict=True) for text, _ in replies
    ]
    proxy = score(models.members, models.tokenizer, exchanges).numpy()
    shape = (len(questions), n)
    return Pool(
        gold=np.array([gold(question, text) for question, text in exchanges]).reshape(shape),
        proxy=proxy.astype(np.float64).reshape(-1, *shape),
        tokens=np.array([[spent for _, spent in replies] for replies in sampled], dtype=np.float64),
        greedy_gold=np.array(
            [gold(q, replies[0][0]) for q, replies in zip(questions, greedy, strict=True)]
        ),
        greedy_tokens=np.array([replies[0][1] for replies in greedy], dtype=np.float64),
    )


def measure(
    models: Models, *, flipped: float, n_prompts: int, n_replies: int, seed: int
) -> dict[str, Metric]:
    """The figures of metrics.json on prompts, replies and documents that depend on ``seed`` alone."""
    rng = random.Random(seed)
    losses = reply_losses(
        models.lm, models.tokenizer, [document(rng) for _ in range(4 * n_prompts)]
    )
    questions = prompts(n_prompts, seed)
    pool = draw(models, questions, n_replies, seed)
    effects = direction_effects(models.lm, models.tokenizer, models.rater, questions, seed)
    effects |= judge_effects(models.lm, models.tokenizer, questions, seed)
    clean = _pair_accuracy(pool)
    return {
        "lm_loss_nats_per_token": _metric(losses),
        "base_gold": _metric(pool.gold.mean(1)),
        "greedy_gold": _metric(pool.greedy_gold),
        "tokens_per_reply": _metric(pool.tokens.mean(1)),
        "reward_pair_accuracy": _metric(clean),
        # What the member would score on labels as noisy as those it was trained on.
        "reward_pair_accuracy_noisy": _metric((1 - flipped) * clean + flipped * (1 - clean)),
        "reward_member_correlation": _metric(_member_correlation(pool)),
    } | {name: _metric(values) for name, values in effects.items()}


def _pair_accuracy(pool: Pool) -> Array:
    """[P]: how often a member agrees with gold on neighbouring replies between which gold decides."""
    gold_gap = pool.gold[:, ::2] - pool.gold[:, 1::2]
    proxy_gap = pool.proxy[:, :, ::2] - pool.proxy[:, :, 1::2]
    agree = np.where(gold_gap != 0, proxy_gap * gold_gap > 0, np.nan)
    return np.asarray(np.nanmean(agree, axis=(0, 2)))


def _member_correlation(pool: Pool) -> Array:
    """[P]: mean correlation between two members' scores of the replies to one prompt."""
    members = len(pool.proxy)
    pairs = np.triu_indices(members, 1)
    return np.array(
        [
            np.atleast_2d(np.corrcoef(pool.proxy[:, row]))[pairs].mean()
            for row in range(len(pool.gold))
        ]
    )


def _metric(values: Sequence[float] | Array) -> Metric:
    numbers = np.asarray(values, dtype=np.float64)
    return Metric(
        float(numbers.mean()), float(numbers.std(ddof=1) / math.sqrt(len(numbers))), len(numbers)
    )


def read_metrics(file: Path) -> dict[str, Metric]:
    """The metrics of a metrics.json."""
    return {
        name: Metric(**fields) for name, fields in json.loads(file.read_text())["metrics"].items()
    }
