"""Fit a lookahead value: a small LM with one scalar head per reward, on TD(lambda) targets.

Either the LM and its heads are trained together, or the LM stays as it is and its heads are fitted
in closed form. The second way needs one pass over the replies in place of many epochs.

Shapes: N tokens of all replies, H heads, d hidden size of the LM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from infer_align.config.fitting import FitConfig
from infer_align.fitting.head_fit import RIDGES, VALIDATION_SHARE
from infer_align.fitting.regression import (
    Fitness,
    Progress,
    Replies,
    discounted,
    fitness,
    mean_and_scale,
    returns,
    split_by_prompt,
)

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
BATCH = 64
# With lam < 1, each round computes new targets from its values.
ROUNDS = 4


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


@dataclass(frozen=True, slots=True)
class FittedValueHeads:
    """The heads of a value LM, one per reward.

    Attributes:
        heads: weight [d] and bias of each.
        fits: the held-out fitness of each.
        ridges: the strength of each ridge fit; None for heads that were trained with the LM.
    """

    heads: list[tuple[torch.Tensor, float]]
    fits: list[Fitness]
    ridges: list[float | None]


def fit_heads(
    lm: Any,
    data: TokenizedReplies,
    config: FitConfig,
    held_out: float,
    seed: int,
    progress: Progress,
) -> FittedValueHeads:
    """Fit the heads of a value LM: by ridge regression, or else by training the LM with them."""
    if config.method == "ridge":
        return fit_frozen_lookahead(
            lm,
            data,
            ridge=config.ridge,
            gamma=config.gamma,
            lam=config.lam,
            held_out=held_out,
            seed=seed,
            progress=progress,
        )
    return fit_lookahead(
        lm,
        data,
        gamma=config.gamma,
        lam=config.lam,
        epochs=config.epochs,
        held_out=held_out,
        seed=seed,
        progress=progress,
    )


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
) -> FittedValueHeads:
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
    """
    generator = torch.Generator().manual_seed(seed)
    is_held_out = split_by_prompt(data.replies[0].prompt_index.tolist(), held_out, seed)
    training = torch.nonzero(~is_held_out).ravel()
    # Heads start at 0 and learn the distance to the mean reward, which becomes part of the bias.
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
            held_out_values = values[is_held_out[replies.reply_index], h]
            fits.append(fitness(held_out_values, replies.select(is_held_out)))
            if lam < 1:
                new_targets.append(returns(values[:, h], replies, gamma, lam))
        if lam < 1:
            targets = _stack_columns(new_targets)
        r2 = ", ".join(f"{fit.r2:.3f}" for fit in fits)
        progress(f"epoch {epoch + 1}/{epochs}, held-out R² {r2}")
    weights = heads.weight.detach()
    biases = heads.bias.detach() + reward_means
    fitted = [(weights[h].clone(), float(biases[h])) for h in range(len(data.replies))]
    return FittedValueHeads(fitted, fits, [None] * len(fitted))


def fit_frozen_lookahead(
    lm: Any,
    data: TokenizedReplies,
    *,
    ridge: float | None,
    gamma: float,
    lam: float,
    held_out: float,
    seed: int,
    progress: Progress,
) -> FittedValueHeads:
    """Fit one head per reward by ridge regression on the states of a value LM that stays as it is.

    Args:
        lm: a transformers base model.
        data: the samples.
        ridge: weight of the prior, as a number of samples; None chooses it for each head, by R² on
            a part of the training prompts.
        gamma: discount per token.
        lam: trace decay of the targets, 0..1.
        held_out: share of the prompts that is used only for the fitness.
        seed: of the splits.
        progress: called with a line of text after each head.
    """
    progress(f"reading {len(data.token_ids)} replies with the value LM")
    states = _all_states(lm, data)
    is_held_out = split_by_prompt(data.replies[0].prompt_index.tolist(), held_out, seed)
    fitted = FittedValueHeads([], [], [])
    for replies in data.replies:
        with_states = replace(replies, hidden=states)
        training, testing = with_states.select(~is_held_out), with_states.select(is_held_out)
        strength = ridge or _best_ridge(training, gamma, lam, seed)
        weight, bias = _fit_linear(training, strength, gamma, lam)
        fit = fitness(testing.hidden @ weight + bias, testing)
        fitted.heads.append((weight, bias))
        fitted.fits.append(fit)
        fitted.ridges.append(strength)
        progress(f"fit by ridge {strength:g}: held-out R² {fit.r2:.3f}")
    return fitted


def _best_ridge(training: Replies, gamma: float, lam: float, seed: int) -> float:
    """Return the strength that predicts a part of the training prompts best."""
    validation = split_by_prompt(training.prompt_index.tolist(), VALIDATION_SHARE, seed)
    fitted, judged = training.select(~validation), training.select(validation)
    scores: list[float] = []
    for strength in RIDGES:
        weight, bias = _fit_linear(fitted, strength, gamma, lam)
        scores.append(fitness(judged.hidden @ weight + bias, judged).r2)
    return RIDGES[scores.index(max(scores))]


def _fit_linear(
    replies: Replies, ridge: float, gamma: float, lam: float
) -> tuple[torch.Tensor, float]:
    """Fit the weight [d] and the bias of one head to the states after the tokens."""
    mean, scale = mean_and_scale(replies.hidden)
    states = (replies.hidden - mean) / scale
    reward_mean = float(replies.rewards.mean())
    matrix = states.T @ states + ridge * torch.eye(states.shape[1])
    targets = discounted(replies, gamma)
    rounds = 1 if lam == 1 else ROUNDS
    weight = torch.zeros(states.shape[1])
    for _ in range(rounds):
        weight = torch.linalg.solve(matrix, states.T @ (targets - reward_mean))
        targets = returns(states @ weight + reward_mean, replies, gamma, lam)
    folded = weight / scale
    return folded, reward_mean - float(folded @ mean)


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


def _all_states(lm: Any, data: TokenizedReplies) -> torch.Tensor:
    """Compute the states after the reply tokens of all samples, without gradients. -> [N, d]."""
    lm.eval()
    parts: list[torch.Tensor] = []
    with torch.no_grad():
        for batch in torch.split(torch.arange(len(data.token_ids)), BATCH):
            members = batch.tolist()
            parts += _reply_parts(_padded_states(lm, data, members), data, members)
    return torch.cat(parts)


def _padded_states(lm: Any, data: TokenizedReplies, members: list[int]) -> torch.Tensor:
    """Compute the states of some samples as one batch. -> [samples, longest length, d]."""
    sequences = [torch.tensor(data.token_ids[i]) for i in members]
    ids = pad_sequence(sequences, batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    states = lm(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return torch.as_tensor(states)


def _reply_parts(
    padded: torch.Tensor, data: TokenizedReplies, members: list[int]
) -> list[torch.Tensor]:
    """Return the part of each row that belongs to the tokens of the reply."""
    parts: list[torch.Tensor] = []
    for row, i in enumerate(members):
        parts.append(padded[row, data.reply_starts[i] : len(data.token_ids[i])])
    return parts


def _values(
    lm: Any, heads: torch.nn.Linear, data: TokenizedReplies, members: list[int]
) -> torch.Tensor:
    """Compute the value after each reply token of some samples, one sample after the other.

    -> [tokens of these replies, H].
    """
    values: torch.Tensor = heads(_padded_states(lm, data, members))
    return torch.cat(_reply_parts(values, data, members))
