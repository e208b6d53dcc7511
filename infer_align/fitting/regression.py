"""Fit value heads to returns: the arithmetic behind `infer-align fit value`, on tensors alone.

A sample is a reply with one reward at its end. Its k-th token a_k was chosen in state h_k; the value of (h_k, a_k) is regressed
on the TD(lambda) return from there. Only differences between tokens at the same state steer, as VAS centres the values over its
candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import gelu

from infer_align.methods.vas import lambda_returns

Progress = Callable[[str], None]
HeadTensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Replies:
    """N tokens of S replies, reply after reply."""

    hidden: torch.Tensor  # [N, d] the frozen model's state in which each token was chosen
    tokens: torch.Tensor  # [N]
    reply: torch.Tensor  # [N] which reply each belongs to, ascending
    rewards: torch.Tensor  # [S] of each reply
    prompts: torch.Tensor  # [S] which prompt each answers

    def select(self, replies: torch.Tensor) -> Replies:
        """These replies, in ascending order. replies: [S] bool."""
        kept = replies[self.reply]
        renumbered = torch.cumsum(replies.long(), 0) - 1
        return Replies(
            self.hidden[kept],
            self.tokens[kept],
            renumbered[self.reply[kept]],
            self.rewards[replies],
            self.prompts[replies],
        )

    def with_rewards(self, rewards: torch.Tensor) -> Replies:
        """The same replies by another reward, without their states. rewards: [S]."""
        return Replies(self.hidden[:, :0], self.tokens, self.reply, rewards, self.prompts)


def returns(values: torch.Tensor, replies: Replies, gamma: float, lam: float) -> torch.Tensor:
    """TD(lambda) targets of each token, its reply's reward coming at the reply's end. [N] -> [N]."""
    counts = torch.bincount(replies.reply, minlength=len(replies.rewards))
    starts = torch.cumsum(counts, 0) - counts
    # As numpy arrays: it would take a tensor of one index for a number.
    place = (
        replies.reply.numpy(),
        (torch.arange(len(replies.tokens)) - starts[replies.reply]).numpy(),
    )
    shape = (len(counts), int(counts.max()))
    padded, rewards = np.zeros(shape), np.zeros(shape)
    padded[place] = values.double().numpy()
    rewards[np.arange(len(counts)), counts.numpy() - 1] = replies.rewards.double().numpy()
    return torch.from_numpy(lambda_returns(padded, rewards, gamma, lam)[place]).float()


def discounted(replies: Replies, gamma: float) -> torch.Tensor:
    """What each token's reply earned, as seen from the token: the targets at lambda = 1. -> [N]."""
    return returns(torch.zeros(len(replies.tokens)), replies, gamma, 1.0)


def predict(head: HeadTensors, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Q(h, a) of each token. [N, d], [N] -> [N]."""
    u = (
        hidden @ head["P"].T
        if "P" in head
        else gelu(hidden @ head["W1"].T + head["c1"]) @ head["W2"].T
    )
    return (u * head["E"][tokens]).sum(-1) + head["b"][tokens]


def fit_ridge(
    replies: Replies,
    vocabulary: int,
    *,
    rank: int,
    ridge: float,
    gamma: float,
    lam: float,
    rounds: int = 4,
) -> HeadTensors:
    """A low-rank linear head by alternating least squares: no gradients, no learning rate.

    E-step: each token's row by ridge regression, drawn towards the row that fits all tokens; so a token that was never seen has
    that row. P-step: the projection by ridge regression with conjugate gradients. Started from the principal components of the
    states. With lam < 1 the targets are made anew from each round's values.

    Args:
        replies: the samples.
        vocabulary: V, the number of tokens to value.
        rank: r; at most d.
        ridge: strength, in samples: so many of them weigh as much as the prior.
        gamma: discount per token.
        lam: trace of the targets.
        rounds: of E-step and P-step.
    """
    mean, scale = replies.hidden.mean(0), replies.hidden.std(0).clamp(min=1e-6)
    h = (replies.hidden - mean) / scale
    _, _, components = torch.linalg.svd(
        h[torch.randperm(len(h), generator=_seeded(0))[:20_000]], full_matrices=False
    )
    projection = components[: min(rank, h.shape[1])]
    centre = float(replies.rewards.mean())
    targets = discounted(replies, gamma) - centre
    rows = torch.zeros(0)
    for step in range(rounds):
        u = torch.cat([h @ projection.T, torch.ones(len(h), 1)], dim=1)
        rows = _token_rows(u, replies.tokens, targets, vocabulary, ridge)
        values = (u * rows[replies.tokens]).sum(-1)
        if lam < 1:
            targets = returns(values + centre, replies, gamma, lam) - centre
        if step < rounds - 1:
            weights = rows[replies.tokens]
            projection = _projection(
                h, weights[:, :-1], targets - weights[:, -1], projection, ridge
            )
    folded = projection / scale
    return {
        "P": folded,
        "E": rows[:, :-1].contiguous(),
        "b": rows[:, -1] - rows[:, :-1] @ (folded @ mean) + centre,
    }


def _token_rows(
    u: torch.Tensor, tokens: torch.Tensor, targets: torch.Tensor, vocabulary: int, ridge: float
) -> torch.Tensor:
    """[V, r] ridge regressions of the targets on u, one per token, each drawn towards the common one."""
    r = u.shape[1]
    identity = ridge * torch.eye(r)
    common = torch.linalg.solve(u.T @ u + identity, u.T @ targets)
    rows: torch.Tensor = common.repeat(vocabulary, 1)
    residual = targets - u @ common
    order = torch.argsort(tokens, stable=True)
    seen, counts = torch.unique_consecutive(tokens[order], return_counts=True)
    for token, members in zip(seen.tolist(), torch.split(order, counts.tolist()), strict=True):
        part = u[members]
        rows[token] += torch.linalg.solve(part.T @ part + identity, part.T @ residual[members])
    return rows


def _projection(
    h: torch.Tensor,
    e: torch.Tensor,
    y: torch.Tensor,
    start: torch.Tensor,
    ridge: float,
    steps: int = 30,
) -> torch.Tensor:
    """argmin over P of sum (y - e . P h)^2 + ridge |P|^2, by conjugate gradients from `start`. [N, d], [N, r], [N] -> [r, d]."""

    def normal(p: torch.Tensor) -> torch.Tensor:
        return (e * ((h @ p.T) * e).sum(-1, keepdim=True)).T @ h + ridge * p

    p = start
    gradient = (e * y[:, None]).T @ h - normal(p)
    direction, norm = gradient, (gradient**2).sum()
    for _ in range(steps):
        if norm < 1e-12:
            break
        curved = normal(direction)
        step = norm / (direction * curved).sum()
        p = p + step * direction
        gradient = gradient - step * curved
        following = (gradient**2).sum()
        direction, norm = gradient + following / norm * direction, following
    return p


def fit_sgd(
    replies: Replies,
    held_out: Replies,
    vocabulary: int,
    *,
    rank: int,
    width: int,
    gamma: float,
    lam: float,
    epochs: int,
    seed: int,
    progress: Progress,
) -> HeadTensors:
    """An MLP head by AdamW on the squared error; the epoch that is best on the held-out replies is kept."""
    generator = _seeded(seed)
    d = replies.hidden.shape[1]
    mean, scale = replies.hidden.mean(0), replies.hidden.std(0).clamp(min=1e-6)
    head = {
        "W1": torch.randn(width, d, generator=generator) / d**0.5,
        "c1": torch.zeros(width),
        "W2": torch.randn(rank, width, generator=generator) / width**0.5,
        "E": torch.zeros(vocabulary, rank),
        "b": torch.zeros(vocabulary),
    }
    head["W1"] /= scale
    head["c1"] -= head["W1"] @ mean
    parameters = [tensor.requires_grad_() for tensor in head.values()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    centre = float(replies.rewards.mean())
    targets = discounted(replies, gamma) - centre
    wanted = discounted(held_out, gamma) - centre
    best, best_loss = _copy(head), float("inf")
    for epoch in range(epochs):
        order = torch.randperm(len(targets), generator=generator)
        for batch in torch.split(order, 256):
            loss = (
                predict(head, replies.hidden[batch], replies.tokens[batch]) - targets[batch]
            ).square().mean() / 2
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            held_out_loss = float(
                (predict(head, held_out.hidden, held_out.tokens) - wanted).square().mean()
            )
            progress(f"epoch {epoch + 1}/{epochs}, held-out mean squared error {held_out_loss:.4f}")
            if held_out_loss < best_loss:
                best, best_loss = _copy(head), held_out_loss
            if lam < 1:
                targets = (
                    returns(
                        predict(head, replies.hidden, replies.tokens) + centre, replies, gamma, lam
                    )
                    - centre
                )
    best["b"] += centre
    return best


def _copy(head: HeadTensors) -> HeadTensors:
    return {name: tensor.detach().clone() for name, tensor in head.items()}


@dataclass(frozen=True, slots=True)
class Fitness:
    """How well values predict rewards of replies that they were not fitted to."""

    r2: float  # of the reward by every token's value
    r2_last: float  # of the reward by the last token's value
    slope: float  # of the reward over the value: 1 is calibrated, less is overconfident
    deciles: tuple[
        tuple[float, float], ...
    ]  # mean value and mean reward in each tenth of the tokens by value


def fitness(values: torch.Tensor, replies: Replies) -> Fitness:
    """Held-out R^2 and calibration. values: [N]."""
    rewards = replies.rewards[replies.reply]
    last = torch.nonzero(
        torch.diff(replies.reply, append=torch.tensor([len(replies.rewards)]))
    ).ravel()
    v, y = values.double(), rewards.double()
    slope = float(
        ((v - v.mean()) * (y - y.mean())).sum() / (v - v.mean()).square().sum().clamp(min=1e-12)
    )
    order = torch.argsort(v)
    deciles = tuple(
        (float(v[part].mean()), float(y[part].mean()))
        for part in torch.tensor_split(order, 10)
        if len(part)
    )
    return Fitness(_r2(v, y), _r2(v[last], y[last]), slope, deciles)


def _r2(values: torch.Tensor, targets: torch.Tensor) -> float:
    """Share of the variance explained, a constant offset forgiven: VAS does not see it."""
    error = targets - values
    return (
        float(1 - error.var() / targets.var().clamp(min=1e-12))
        if len(targets) > 1
        else float("nan")
    )


def split_by_prompt(prompts: Sequence[int], share: float, seed: int) -> torch.Tensor:
    """[S] bool, True for the replies of a random share of the prompts: a prompt is held out with all its replies."""
    distinct = sorted(set(prompts))
    order = torch.randperm(len(distinct), generator=_seeded(seed)).tolist()
    chosen = {distinct[i] for i in order[: max(1, round(share * len(distinct)))]}
    return torch.tensor([prompt in chosen for prompt in prompts])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
