"""The proxy reward models: noisy preferences over the language model's own replies, and Bradley-Terry on them."""

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

__all__ = [
    "Pair",
    "RewardConfig",
    "batches",
    "encode",
    "logits",
    "new_bag",
    "pairs",
    "score",
    "train_member",
]

_SCORED_AT_ONCE = 1024


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
    """Two replies to one question; ``chosen`` is the one a labeller marked, ``flipped`` if gold prefers the other."""

    question: str
    chosen: str
    rejected: str
    flipped: bool


def pairs(
    question_replies: Sequence[tuple[str, Sequence[str]]], n: int, flipped: float, seed: int
) -> list[Pair]:
    """``n`` pairs of neighbouring replies that gold tells apart; exactly the share ``flipped`` has the wrong label.

    Raises ``ValueError`` when there are fewer than ``n``.
    """
    rng = random.Random(seed)
    made = [
        (
            question,
            *(
                (first, second)
                if gold(question, first) > gold(question, second)
                else (second, first)
            ),
        )
        for question, replies in question_replies
        for first, second in zip(replies[::2], replies[1::2], strict=True)
        if gold(question, first) != gold(question, second)
    ]
    made = rng.sample(made, n)
    wrong = round(flipped * n)  # the order is random already, so the first ones will do
    return [
        Pair(question, worse, better, flipped=True)
        if index < wrong
        else Pair(question, better, worse, flipped=False)
        for index, (question, better, worse) in enumerate(made)
    ]


def train_member(
    config: RewardConfig, tokenizer: PreTrainedTokenizerFast, data: Sequence[Pair], seed: int
) -> BagForSequenceClassification:
    """One member: its own initialisation and order of the data. No early stopping: it fits the noise too."""
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
    """Fold mean 0 and standard deviation 1 over ``encoded`` into the last layer.

    Pairs fix a reward only up to an offset, and its scale says how long it was trained; without a common unit the
    members' variance is mostly that, and the worst case is whoever has the lowest mean.
    """
    scores = torch.cat(
        [logits(model, encoded, rows) for rows in batches(range(len(encoded)), _SCORED_AT_ONCE)]
    )
    model.score.weight /= scores.std()
    model.score.bias.sub_(scores.mean()).div_(scores.std())


def new_bag(
    tokenizer: PreTrainedTokenizerFast,
    embedding_size: int,
    hidden_size: int,
    labels: Sequence[str] = ("reward",),
) -> BagForSequenceClassification:
    """An untrained bag for this tokenizer, with one output for each label."""
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
    """Token ids of each (question, reply) as the chat template writes it."""
    texts = [
        render([{"role": "user", "content": question}, {"role": "assistant", "content": reply}])
        for question, reply in exchanges
    ]
    return [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def batches(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """``rows`` in their order, ``size`` at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def logits(
    model: BagForSequenceClassification, encoded: Sequence[Tensor], rows: Sequence[int]
) -> Tensor:
    """Outputs [len(rows), labels]; right-padded with a negative id that the mask hides."""
    ids = pad_sequence([encoded[row] for row in rows], batch_first=True, padding_value=-1)
    found: Tensor = model(input_ids=ids.clamp(min=0), attention_mask=ids >= 0).logits
    return found


@torch.no_grad()
def score(
    members: Sequence[BagForSequenceClassification],
    tokenizer: PreTrainedTokenizerFast,
    exchanges: Sequence[tuple[str, str]],
) -> Tensor:
    """Reward of each (question, reply) by each one-label member, [K, len(exchanges)]."""
    encoded = encode(tokenizer, exchanges)
    by_length = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    scores = torch.empty(len(members), len(encoded))
    for rows in batches(by_length, _SCORED_AT_ONCE):
        for index, member in enumerate(members):
            scores[index, rows] = logits(member, encoded, rows)[:, 0]
    return scores
