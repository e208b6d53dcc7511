"""Fit a lookahead value: a small LM with one scalar head per reward, trained on TD(lambda) targets.

Shapes: N tokens of all replies, H heads, d hidden size of the LM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from infer_align.fitting.regression import (
    Fitness,
    Progress,
    Replies,
    discounted,
    fitness,
    returns,
    split_by_prompt,
)

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
BATCH = 64


@dataclass(frozen=True, slots=True)
class TokenizedReplies:
    """The input of the value LM: the tokens of each prompt with its reply, scored by H rewards.

    Attributes:
        token_ids: prompt and reply of each sample.
        reply_starts: index of the first reply token of each sample.
        replies: the same replies under each reward, without states.
    """

    token_ids: Sequence[list[int]]
    reply_starts: Sequence[int]
    replies: tuple[Replies, ...]


def fit_lookahead(
    lm: Any,
    data: TokenizedReplies,
    *,
    gamma: float,
    lam: float,
    epochs: int,
    held_out: float,
    seed: int,
    progress: Progress,
) -> tuple[list[tuple[torch.Tensor, float]], list[Fitness]]:
    """Train a value LM in place, with one head per reward.

    Args:
        lm: a transformers base model. Training starts from its weights; a copy of a small LM with
            the frozen model's tokenizer is a good start.
        data: the samples.
        gamma: discount per token.
        lam: trace decay, 0..1; below 1, each epoch computes new targets from its values.
        epochs: passes over the samples, at least 1.
        held_out: share of the prompts that is used only for the fitness.
        seed: of the split and of the order of the samples.
        progress: called with a line of text after each epoch.

    Returns:
        The (weight [d], bias) of each head, and the held-out fitness of each head.
    """
    generator = torch.Generator().manual_seed(seed)
    held = split_by_prompt(data.replies[0].prompt_index.tolist(), held_out, seed)
    training = torch.nonzero(~held).ravel()
    reward_means = torch.stack([replies.rewards.mean() for replies in data.replies])
    heads = _zero_heads(lm.config.hidden_size, len(data.replies))
    trainer = _Trainer(lm, heads, epochs * (len(training) // BATCH + 1) + 1)
    targets = _stack_columns([discounted(replies, gamma) for replies in data.replies])
    fits: list[Fitness] = []
    for epoch in range(epochs):
        order = training[torch.randperm(len(training), generator=generator)]
        trainer.run_epoch(data, targets - reward_means, order)
        values = _all_values(lm, heads, data) + reward_means
        fits = []
        new_targets = []
        for h, replies in enumerate(data.replies):
            held_out_values = values[held[replies.reply_index], h]
            fits.append(fitness(held_out_values, replies.select(held)))
            if lam < 1:
                new_targets.append(returns(values[:, h], replies, gamma, lam))
        if lam < 1:
            targets = _stack_columns(new_targets)
        r2 = ", ".join(f"{fit.r2:.3f}" for fit in fits)
        progress(f"epoch {epoch + 1}/{epochs}, held-out R² {r2}")
    weights = heads.weight.detach()
    biases = heads.bias.detach() + reward_means
    fitted = [(weights[h].clone(), float(biases[h])) for h in range(len(data.replies))]
    return fitted, fits


class _Trainer:
    """AdamW with a one-cycle learning rate over the LM and its heads."""

    def __init__(self, lm: Any, heads: torch.nn.Linear, steps: int) -> None:
        self._lm = lm
        self._heads = heads
        lm_parameters = lm.requires_grad_(requires_grad=True).parameters()
        self._parameters = [*lm_parameters, *heads.parameters()]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, LEARNING_RATE, total_steps=steps
        )

    def run_epoch(self, data: TokenizedReplies, targets: torch.Tensor, order: torch.Tensor) -> None:
        """Take one step per batch of the samples, in this order. targets: [N, H]."""
        lengths = torch.bincount(data.replies[0].reply_index, minlength=len(data.token_ids))
        targets_of_replies = torch.split(targets, lengths.tolist())
        self._lm.train()
        for batch in torch.split(order, BATCH):
            members = batch.tolist()
            batch_targets = torch.cat([targets_of_replies[i] for i in members])
            values = _values(self._lm, self._heads, data, members)
            loss = (values - batch_targets).square().mean() / 2
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM)
            self._optimizer.step()
            self._schedule.step()


def _zero_heads(hidden_size: int, count: int) -> torch.nn.Linear:
    """Create heads that start at 0, as published."""
    heads = torch.nn.Linear(hidden_size, count)
    torch.nn.init.zeros_(heads.weight)
    torch.nn.init.zeros_(heads.bias)
    return heads


def _stack_columns(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack H columns of [N] to [N, H]."""
    return torch.stack(list(columns), dim=-1)


def _all_values(lm: Any, heads: torch.nn.Linear, data: TokenizedReplies) -> torch.Tensor:
    """Compute the values of all samples, without gradients. -> [N, H]."""
    lm.eval()
    values = []
    with torch.no_grad():
        for batch in torch.split(torch.arange(len(data.token_ids)), BATCH):
            values.append(_values(lm, heads, data, batch.tolist()))
    return torch.cat(values)


def _values(
    lm: Any, heads: torch.nn.Linear, data: TokenizedReplies, members: list[int]
) -> torch.Tensor:
    """Compute the value after each reply token of some samples, one sample after the other.

    -> [tokens of these replies, H].
    """
    sequences = [torch.tensor(data.token_ids[i]) for i in members]
    ids = pad_sequence(sequences, batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    states = lm(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    values: torch.Tensor = heads(states)
    parts = []
    for row, i in enumerate(members):
        parts.append(values[row, data.reply_starts[i] : len(data.token_ids[i])])
    return torch.cat(parts)
