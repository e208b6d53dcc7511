"""The proxy reward models: Bradley-Terry on noisy preferences between the model's own replies."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from benchmarks.demo.language import render
from infer_align.demo.bag import BagConfig, BagForSequenceClassification
from infer_align.demo.world import gold

_SCORING_BATCH = 1024


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """Data, shape and schedule of the ensemble."""

    members: int = 5
    pairs: int = 3200
    flipped: float = 0.25
    embedding_size: int = 32
    hidden_size: int = 64
    epochs: int = 10
    batch: int = 64
    learning_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one question, and the label of a preference."""

    question: str
    chosen: str  # by the label
    rejected: str
    flipped: bool  # True if the label is wrong: gold prefers the rejected reply


def pairs(
    question_replies: Sequence[tuple[str, Sequence[str]]], n: int, flipped: float, seed: int
) -> list[Pair]:
    """Return n pairs of neighbouring replies with different gold.

    Args:
        question_replies: questions with their replies.
        n: number of pairs.
        flipped: exact share of wrong labels.
        seed: seed of the choice among all pairs.

    Raises:
        ValueError: there are fewer than n pairs with different gold.
    """
    ordered: list[tuple[str, str, str]] = []
    for question, replies in question_replies:
        for first, second in zip(replies[::2], replies[1::2], strict=True):
            difference = gold(question, first) - gold(question, second)
            if difference > 0:
                ordered.append((question, first, second))
            elif difference < 0:
                ordered.append((question, second, first))
    # The order is random, so the first pairs can have the wrong labels.
    drawn = random.Random(seed).sample(ordered, n)
    wrong = round(flipped * n)
    labelled: list[Pair] = []
    for index, (question, better, worse) in enumerate(drawn):
        if index < wrong:
            labelled.append(Pair(question, chosen=worse, rejected=better, flipped=True))
        else:
            labelled.append(Pair(question, chosen=better, rejected=worse, flipped=False))
    return labelled


def train_member(
    config: RewardConfig, tokenizer: PreTrainedTokenizerFast, data: Sequence[Pair], seed: int
) -> BagForSequenceClassification:
    """Train one member of the ensemble.

    The seed decides its initial weights and the order of its data. It is trained without early
    stopping, so it fits the noise too.
    """
    torch.manual_seed(seed)
    model = new_bag(tokenizer, config.embedding_size, config.hidden_size)
    chosen = encode(tokenizer, [(pair.question, pair.chosen) for pair in data])
    rejected = encode(tokenizer, [(pair.question, pair.rejected) for pair in data])
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    model.train()
    for _ in range(config.epochs):
        for rows in batches(torch.randperm(len(data)).tolist(), config.batch):
            margin = logits(model, chosen, rows) - logits(model, rejected, rows)
            loss = -logsigmoid(margin).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    _standardize(model, [*chosen, *rejected])
    model.eval()
    return model


@torch.no_grad()
def _standardize(model: BagForSequenceClassification, encoded: Sequence[Tensor]) -> None:
    """Change the last layer so that the scores of `encoded` have mean 0 and standard deviation 1.

    Pairs determine a reward only up to an offset, and its scale depends on the length of the
    training. Without a common unit, these differences would dominate the variance of the members,
    and the worst case would always be the member with the lowest mean.
    """
    chunks = [logits(model, encoded, rows) for rows in batches(range(len(encoded)), _SCORING_BATCH)]
    scores = torch.cat(chunks)
    model.score.weight /= scores.std()
    model.score.bias.sub_(scores.mean()).div_(scores.std())


def new_bag(
    tokenizer: PreTrainedTokenizerFast,
    embedding_size: int,
    hidden_size: int,
    labels: Sequence[str] = ("reward",),
) -> BagForSequenceClassification:
    """Return an untrained reward model for this tokenizer, with one output per label."""
    return BagForSequenceClassification(
        BagConfig(
            vocab_size=len(tokenizer),
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            user_token_id=tokenizer.convert_tokens_to_ids("<|user|>"),
            assistant_token_id=tokenizer.convert_tokens_to_ids("<|assistant|>"),
            pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, exchanges: Sequence[tuple[str, str]]
) -> list[Tensor]:
    """Return the token ids of (question, reply) pairs as the chat template writes them."""
    texts: list[str] = []
    for question, reply in exchanges:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        texts.append(render(turns))
    return [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def batches(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Return the rows in their order, in slices of `size`."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def logits(
    model: BagForSequenceClassification, encoded: Sequence[Tensor], rows: Sequence[int]
) -> Tensor:
    """Return the outputs [len(rows), labels] of some encoded exchanges."""
    # Rows are padded with a negative id, which the mask hides.
    ids = pad_sequence([encoded[row] for row in rows], batch_first=True, padding_value=-1)
    output: Tensor = model(input_ids=ids.clamp(min=0), attention_mask=ids >= 0).logits
    return output


@torch.no_grad()
def score(
    members: Sequence[BagForSequenceClassification],
    tokenizer: PreTrainedTokenizerFast,
    exchanges: Sequence[tuple[str, str]],
) -> Tensor:
    """Return the rewards [K, n] of n (question, reply) pairs by K members with one label each."""
    encoded = encode(tokenizer, exchanges)
    by_length = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    scores = torch.empty(len(members), len(encoded))
    for rows in batches(by_length, _SCORING_BATCH):
        for index, member in enumerate(members):
            scores[index, rows] = logits(member, encoded, rows)[:, 0]
    return scores
