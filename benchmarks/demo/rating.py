"""The demo's multi-objective reward: one model with two outputs, fitted to exact ratings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import PreTrainedTokenizerFast

from benchmarks.demo.direction import ATTRIBUTES, best_reply, ratings
from benchmarks.demo.preference import batches, encode, logits, new_bag
from infer_align.demo.bag import BagForSequenceClassification
from infer_align.demo.world import random_question, reply

# Scale of the initial embeddings: here a word that is rare in the data should have little weight.
_INITIAL_SCALE = 0.1
# Largest angle of the rated replies. The server later selects among replies beyond the trained
# range.
_MAX_DEGREES = 60.0
# Drawn drafts and counts of flourishes of a directed reply: few, so that the replies are of any
# quality.
_DRAFTS = 2
_COUNTS = 8


@dataclass(frozen=True, slots=True)
class RatingConfig:
    """Data and schedule of the fit."""

    replies: int = 24_000
    embedding_size: int = 32
    hidden_size: int = 64
    epochs: int = 8
    batch: int = 64
    learning_rate: float = 3e-3
    seed: int = 0


def train_rater(
    config: RatingConfig, tokenizer: PreTrainedTokenizerFast
) -> BagForSequenceClassification:
    """Fit a model to `attribute_rewards` of replies of this world."""
    torch.manual_seed(config.seed)
    exchanges, targets = _rated_exchanges(config)
    encoded = encode(tokenizer, exchanges)
    model = new_bag(tokenizer, config.embedding_size, config.hidden_size, labels=ATTRIBUTES)
    for bag in (model.prompt, model.reply):
        bag.weight.data.mul_(_INITIAL_SCALE)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    steps_per_epoch = -(-len(exchanges) // config.batch)
    steps = config.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    model.train()
    for _ in range(config.epochs):
        for rows in batches(torch.randperm(len(exchanges)).tolist(), config.batch):
            loss = mse_loss(logits(model, encoded, rows), targets[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()
    return model


def _rated_exchanges(config: RatingConfig) -> tuple[list[tuple[str, str]], Tensor]:
    """Return (question, reply) pairs and their ratings [n, 2].

    Half of the replies follow a direction.
    """
    rng = random.Random(config.seed)
    exchanges: list[tuple[str, str]] = []
    targets: list[tuple[float, float]] = []
    for _ in range(config.replies):
        question = random_question(rng)
        degrees = rng.uniform(-_MAX_DEGREES, _MAX_DEGREES)
        if rng.random() < 0.5:
            text = reply(question, rng)
        else:
            text = best_reply(question, degrees, rng, _DRAFTS, _COUNTS)
        exchanges.append((str(question), text))
        targets.append(ratings(question, text))
    return exchanges, torch.tensor(targets)


@torch.no_grad()
def rate(
    model: BagForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    exchanges: Sequence[tuple[str, str]],
) -> Tensor:
    """Return predicted ratings [n, 2] of (question, reply) pairs."""
    encoded = encode(tokenizer, exchanges)
    chunks = [logits(model, encoded, rows) for rows in batches(range(len(encoded)), 1024)]
    return torch.cat(chunks)
