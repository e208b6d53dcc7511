"""Fit a lookahead value: a small LM with one scalar head per reward, by gradients on TD(lambda) targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infer_align.fitting.regression import (
    Fitness,
    Replies,
    discounted,
    fitness,
    returns,
    split_by_prompt,
)
from infer_align.fitting.samples import Progress

LEARNING_RATE = 1e-3
BATCH = 64


@dataclass(frozen=True, slots=True)
class TokenizedReplies:
    """What the value LM reads: prompt and reply of each sample, and where the reply begins."""

    ids: Sequence[list[int]]
    starts: Sequence[int]
    replies: tuple[Replies, ...]  # one per reward; their tokens are the replies', without states


def fit_lookahead(
    lm: Any,
    reading: TokenizedReplies,
    *,
    gamma: float,
    lam: float,
    epochs: int,
    held_out: float,
    seed: int,
    progress: Progress,
) -> tuple[list[tuple[torch.Tensor, float]], list[Fitness]]:
    """Train `lm`, a transformers base model, in place; -> (weight [d], bias) and held-out fitness of each reward's head.

    Args:
        lm: starts from wherever it is; a copy of a small LM of the same tokenizer is a good beginning.
        reading: the samples.
        gamma: discount per token.
        lam: trace; below 1 the targets are made anew after each epoch, from the values so far.
        epochs: passes over the samples.
        held_out: share of the prompts that is kept for the fitness.
        seed: of the split and the order.
        progress: told after each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    held = split_by_prompt(reading.replies[0].prompts.tolist(), held_out, seed)
    centre = torch.stack([replies.rewards.mean() for replies in reading.replies])
    heads = torch.nn.Linear(lm.config.hidden_size, len(reading.replies))
    torch.nn.init.zeros_(heads.weight)  # the published start: no opinion
    torch.nn.init.zeros_(heads.bias)
    parameters = [*lm.requires_grad_(requires_grad=True).parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    training = torch.nonzero(~held).ravel()
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * (len(training) // BATCH + 1) + 1
    )
    targets = torch.stack(
        [discounted(replies, gamma) for replies in reading.replies], dim=-1
    )  # [N, H]
    for epoch in range(epochs):
        lm.train()
        order = training[torch.randperm(len(training), generator=generator)]
        for batch in torch.split(order, BATCH):
            members = batch.tolist()
            wanted = torch.cat([targets[reading.replies[0].reply == i] for i in members]) - centre
            loss = (_values(lm, heads, reading, members) - wanted).square().mean() / 2
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        lm.eval()
        with torch.no_grad():
            values = (
                torch.cat(
                    [
                        _values(lm, heads, reading, part.tolist())
                        for part in torch.split(torch.arange(len(held)), BATCH)
                    ]
                )
                + centre
            )
        if lam < 1:
            columns = [
                returns(values[:, h], replies, gamma, lam)
                for h, replies in enumerate(reading.replies)
            ]
            targets = torch.stack(columns, dim=-1)
        found = [
            _held_out(values[:, h], replies, held) for h, replies in enumerate(reading.replies)
        ]
        progress(
            f"epoch {epoch + 1}/{epochs}, held-out R² " + ", ".join(f"{f.r2:.3f}" for f in found)
        )
    weight, bias = heads.weight.detach(), heads.bias.detach() + centre
    return [(weight[h].clone(), float(bias[h])) for h in range(len(found))], found


def _values(
    lm: Any, heads: torch.nn.Linear, reading: TokenizedReplies, members: list[int]
) -> torch.Tensor:
    """Values after each reply token of these samples, sample after sample. -> [tokens, H]."""
    width = max(len(reading.ids[i]) for i in members)
    ids = torch.tensor([reading.ids[i] + [0] * (width - len(reading.ids[i])) for i in members])
    mask = torch.tensor(
        [[1] * len(reading.ids[i]) + [0] * (width - len(reading.ids[i])) for i in members]
    )
    states = lm(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    values: torch.Tensor = heads(states)
    return torch.cat(
        [values[row, reading.starts[i] : len(reading.ids[i])] for row, i in enumerate(members)]
    )


def _held_out(values: torch.Tensor, replies: Replies, held: torch.Tensor) -> Fitness:
    return fitness(values[held[replies.reply]], replies.select(held))
