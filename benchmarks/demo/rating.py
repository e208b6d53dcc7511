"""The demo's multi-objective reward: one bag with two outputs, fitted to ratings of the attributes that directions are about."""

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

__all__ = ["RatingConfig", "rate", "train_rater"]

_INITIAL_SCALE = 0.1  # of the embeddings: here a word that was hardly seen should weigh little
_WIDEST_DEGREES = 60.0  # of the directed replies that are rated: what is selected from later goes beyond the trained range
_FEW = 2, 8  # openings, counts


@dataclass(frozen=True, slots=True)
class RatingConfig:
    """Data and schedule."""

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
    """Outputs (helpfulness, verbosity) in the units of ``attribute_rewards``, fitted to replies as the world writes them."""
    torch.manual_seed(config.seed)
    rated, targets = _rated(config)
    encoded = encode(tokenizer, rated)
    model = new_bag(tokenizer, config.embedding_size, config.hidden_size, labels=ATTRIBUTES)
    for bag in (model.prompt, model.reply):
        bag.weight.data.mul_(_INITIAL_SCALE)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    steps = config.epochs * -(-len(rated) // config.batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    model.train()
    for _ in range(config.epochs):
        for rows in batches(torch.randperm(len(rated)).tolist(), config.batch):
            loss = mse_loss(logits(model, encoded, rows), targets[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()
    return model


def _rated(config: RatingConfig) -> tuple[list[tuple[str, str]], Tensor]:
    """(question, reply) and [n, 2] ratings; half of the replies follow some direction, the best of a few."""
    rng = random.Random(config.seed)
    exchanges, targets = [], []
    for _ in range(config.replies):
        question, degrees = random_question(rng), rng.uniform(-_WIDEST_DEGREES, _WIDEST_DEGREES)
        text = (
            reply(question, rng)
            if rng.random() < 0.5
            else best_reply(question, degrees, rng, *_FEW)
        )
        exchanges.append((str(question), text))
        targets.append(ratings(question, text))
    return exchanges, torch.tensor(targets)


@torch.no_grad()
def rate(
    model: BagForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    exchanges: Sequence[tuple[str, str]],
) -> Tensor:
    """Predicted ratings of each (question, reply), [n, 2]."""
    encoded = encode(tokenizer, exchanges)
    return torch.cat([logits(model, encoded, rows) for rows in batches(range(len(encoded)), 1024)])
