"""Fit value heads to returns: the arithmetic behind `infer-align fit value`, on tensors alone.

A sample is a reply with one reward at its end. Its k-th token a_k was chosen in state h_k. The
value of (h_k, a_k) is regressed on the TD(lambda) return from that token onwards. Steering depends
only on differences between tokens in the same state, because VAS centres the values over its
candidates.

Shapes: N tokens, S replies, d hidden size, V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch.nn.functional import gelu

from infer_align.methods.vas import lambda_returns
from infer_align.types import Array

Progress = Callable[[str], None]
HeadTensors = dict[str, torch.Tensor]

# The principal components are computed from at most this many states.
COMPONENT_STATES = 20_000
# A round improves the projection only approximately, since the next round changes its target.
CG_ITERATIONS = 30
CG_RESIDUAL = 1e-6
SGD_BATCH = 256
SGD_LEARNING_RATE = 3e-3
SGD_WEIGHT_DECAY = 0.01
# Lower bound of variances and standard deviations that are divided by.
TINY_DEVIATION = 1e-6
TINY_VARIANCE = 1e-12


@dataclass(frozen=True, slots=True)
class Replies:
    """N tokens of S replies, one reply after the other.

    Attributes:
        hidden: [N, d] the frozen model's state in which each token was chosen.
        tokens: [N] token ids.
        reply_index: [N] the reply of each token, ascending.
        rewards: [S] the reward of each reply.
        prompt_index: [S] the prompt of each reply.
    """

    hidden: torch.Tensor
    tokens: torch.Tensor
    reply_index: torch.Tensor
    rewards: torch.Tensor
    prompt_index: torch.Tensor

    def select(self, mask: torch.Tensor) -> Replies:
        """Return the replies where the mask is True, in ascending order. mask: [S] bool."""
        token_mask = mask[self.reply_index]
        new_index = torch.cumsum(mask.long(), 0) - 1
        return Replies(
            hidden=self.hidden[token_mask],
            tokens=self.tokens[token_mask],
            reply_index=new_index[self.reply_index[token_mask]],
            rewards=self.rewards[mask],
            prompt_index=self.prompt_index[mask],
        )

    def with_rewards(self, rewards: torch.Tensor) -> Replies:
        """Return the same replies with other rewards and without states. rewards: [S]."""
        no_states = self.hidden[:, :0]
        return Replies(no_states, self.tokens, self.reply_index, rewards, self.prompt_index)


def returns(values: torch.Tensor, replies: Replies, gamma: float, lam: float) -> torch.Tensor:
    """Compute each token's TD(lambda) target; a reply's reward is at its end. [N] -> [N]."""
    counts = torch.bincount(replies.reply_index, minlength=len(replies.rewards))
    starts = torch.cumsum(counts, 0) - counts
    positions = torch.arange(len(replies.tokens)) - starts[replies.reply_index]
    # numpy would read a torch tensor with one element as a plain number, not as an index array.
    cells = (replies.reply_index.numpy(), positions.numpy())
    shape = (len(counts), int(counts.max()))
    padded_values = np.zeros(shape)
    padded_values[cells] = values.double().numpy()
    padded_rewards = np.zeros(shape)
    last_positions = counts.numpy() - 1
    padded_rewards[np.arange(len(counts)), last_positions] = replies.rewards.double().numpy()
    padded_returns = lambda_returns(padded_values, padded_rewards, gamma, lam)
    return torch.from_numpy(padded_returns[cells]).float()


def discounted(replies: Replies, gamma: float) -> torch.Tensor:
    """Compute the discounted reward of each token's reply: the target at lambda = 1. -> [N]."""
    return returns(torch.zeros(len(replies.tokens)), replies, gamma, 1.0)


def predict(head: HeadTensors, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Compute Q(h, a) of each token. [N, d], [N] -> [N]."""
    if "P" in head:
        features = hidden @ head["P"].T
    else:
        features = gelu(hidden @ head["W1"].T + head["c1"]) @ head["W2"].T
    return (features * head["E"][tokens]).sum(-1) + head["b"][tokens]


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
    """Fit a low-rank linear head by alternating least squares, without a learning rate.

    Each round has two steps. The first fits the row of each token by ridge regression towards the
    row that fits all tokens together, so a token without samples gets that common row. The second
    fits the projection by ridge regression, with conjugate gradients. The projection starts as the
    principal components of the states. With lam < 1, each round computes new targets from its
    values.

    Args:
        replies: the samples.
        vocabulary: V, the number of tokens that get a value.
        rank: r, at most d; a larger rank counts as d.
        ridge: weight of the prior, as a number of samples.
        gamma: discount per token.
        lam: trace decay of the targets, 0..1.
        rounds: number of rounds.

    Returns:
        P [r, d], E [V, r] and b [V].
    """
    mean, scale = mean_and_scale(replies.hidden)
    states = (replies.hidden - mean) / scale
    projection = _principal_components(states, rank)
    reward_mean = float(replies.rewards.mean())
    targets = discounted(replies, gamma) - reward_mean
    rows = torch.zeros(0)
    for round_index in range(rounds):
        features = torch.cat([states @ projection.T, torch.ones(len(states), 1)], dim=1)
        rows = _fit_token_rows(features, replies.tokens, targets, vocabulary, ridge)
        sample_rows = rows[replies.tokens]
        if lam < 1:
            values = (features * sample_rows).sum(-1)
            targets = returns(values + reward_mean, replies, gamma, lam) - reward_mean
        if round_index < rounds - 1:
            embeddings, biases = sample_rows[:, :-1], sample_rows[:, -1]
            projection = _fit_projection(states, embeddings, targets - biases, projection, ridge)
    # Fold the standardization of the states into the projection and the biases.
    folded = projection / scale
    return {
        "P": folded,
        "E": rows[:, :-1].contiguous(),
        "b": rows[:, -1] - rows[:, :-1] @ (folded @ mean) + reward_mean,
    }


def mean_and_scale(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the standard deviation of each dimension. [N, d] -> [d], [d]."""
    return hidden.mean(0), hidden.std(0).clamp(min=TINY_DEVIATION)


def _principal_components(states: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the first principal components of a random part of the states. [N, d] -> [r, d]."""
    order = torch.randperm(len(states), generator=_generator(0))
    part = states[order[:COMPONENT_STATES]]
    components: torch.Tensor = torch.linalg.svd(part, full_matrices=False).Vh
    return components[: min(rank, states.shape[1])]


def _fit_token_rows(
    features: torch.Tensor,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: int,
    ridge: float,
) -> torch.Tensor:
    """Fit one ridge regression per token, each drawn towards the common one.

    [N, r + 1] features, [N] tokens, [N] targets -> [V, r + 1].
    """
    prior = ridge * torch.eye(features.shape[1])
    common = torch.linalg.solve(features.T @ features + prior, features.T @ targets)
    rows: torch.Tensor = common.repeat(vocabulary, 1)
    residuals = targets - features @ common
    order = torch.argsort(tokens, stable=True)
    distinct, counts = torch.unique_consecutive(tokens[order], return_counts=True)
    groups = torch.split(order, counts.tolist())
    for token, members in zip(distinct.tolist(), groups, strict=True):
        part = features[members]
        rows[token] += torch.linalg.solve(part.T @ part + prior, part.T @ residuals[members])
    return rows


def _fit_projection(
    states: torch.Tensor,
    embeddings: torch.Tensor,
    targets: torch.Tensor,
    start: torch.Tensor,
    ridge: float,
) -> torch.Tensor:
    """Minimize sum (y - e . P h)^2 + ridge |P|^2 over P, by conjugate gradients from `start`.

    [N, d] states h, [N, r] embeddings e, [N] targets y, [r, d] start -> [r, d].
    """

    def normal_matrix(flat: Array) -> Array:
        """Apply the matrix of the normal equations to a flattened projection."""
        projection = torch.from_numpy(flat).view(start.shape)
        predictions = ((states @ projection.T) * embeddings).sum(-1, keepdim=True)
        product = (embeddings * predictions).T @ states + ridge * projection
        return product.numpy().ravel()

    right_side = ((embeddings * targets[:, None]).T @ states).numpy().ravel()
    size = start.numel()
    operator = LinearOperator((size, size), matvec=normal_matrix, dtype=right_side.dtype)
    solution, _ = cg(
        operator,
        right_side,
        x0=start.numpy().ravel(),
        rtol=0.0,
        atol=CG_RESIDUAL,
        maxiter=CG_ITERATIONS,
    )
    return torch.from_numpy(solution).view(start.shape)


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
    """Fit an MLP head by AdamW on the squared error and return its best epoch.

    The best epoch has the smallest squared error on the held-out replies.

    Args:
        replies: the samples to train on.
        held_out: the samples that choose the epoch.
        vocabulary: V, the number of tokens that get a value.
        rank: r, the size of the features.
        width: hidden units of the MLP.
        gamma: discount per token.
        lam: trace decay of the targets, 0..1.
        epochs: passes over the samples.
        seed: of the first weights and of the order of the samples.
        progress: called with a line of text after each epoch.

    Returns:
        W1 [width, d], c1 [width], W2 [r, width], E [V, r] and b [V].
    """
    generator = _generator(seed)
    head = _initial_mlp(replies.hidden, vocabulary, rank, width, generator)
    parameters = [tensor.requires_grad_() for tensor in head.values()]
    optimizer = torch.optim.AdamW(parameters, lr=SGD_LEARNING_RATE, weight_decay=SGD_WEIGHT_DECAY)
    reward_mean = float(replies.rewards.mean())
    targets = discounted(replies, gamma) - reward_mean
    held_out_targets = discounted(held_out, gamma) - reward_mean
    best = _copy(head)
    best_error = float("inf")
    for epoch in range(epochs):
        order = torch.randperm(len(targets), generator=generator)
        _train_epoch(head, optimizer, replies, targets, order)
        with torch.no_grad():
            predictions = predict(head, held_out.hidden, held_out.tokens)
            error = float((predictions - held_out_targets).square().mean())
            progress(f"epoch {epoch + 1}/{epochs}, held-out mean squared error {error:.4f}")
            if error < best_error:
                best = _copy(head)
                best_error = error
            if lam < 1:
                values = predict(head, replies.hidden, replies.tokens) + reward_mean
                targets = returns(values, replies, gamma, lam) - reward_mean
    best["b"] += reward_mean
    return best


def _initial_mlp(
    hidden: torch.Tensor, vocabulary: int, rank: int, width: int, generator: torch.Generator
) -> HeadTensors:
    """Draw the first weights; the first layer standardizes the states."""
    d = hidden.shape[1]
    head = {
        "W1": torch.randn(width, d, generator=generator) / d**0.5,
        "c1": torch.zeros(width),
        "W2": torch.randn(rank, width, generator=generator) / width**0.5,
        "E": torch.zeros(vocabulary, rank),
        "b": torch.zeros(vocabulary),
    }
    mean, scale = mean_and_scale(hidden)
    head["W1"] /= scale
    head["c1"] -= head["W1"] @ mean
    return head


def _train_epoch(
    head: HeadTensors,
    optimizer: torch.optim.Optimizer,
    replies: Replies,
    targets: torch.Tensor,
    order: torch.Tensor,
) -> None:
    for batch in torch.split(order, SGD_BATCH):
        predictions = predict(head, replies.hidden[batch], replies.tokens[batch])
        loss = (predictions - targets[batch]).square().mean() / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _copy(head: HeadTensors) -> HeadTensors:
    return {name: tensor.detach().clone() for name, tensor in head.items()}


@dataclass(frozen=True, slots=True)
class Fitness:
    """The quality of values on replies that they were not fitted to.

    Attributes:
        r2: R^2 between the reward and the value of every token.
        r2_last: R^2 between the reward and the value of the last token of each reply.
        slope: regression slope of the reward over the value. 1 is calibrated; less than 1 is
            overconfident.
        deciles: mean value and mean reward in each tenth of the tokens, by ascending value.
    """

    r2: float
    r2_last: float
    slope: float
    deciles: tuple[tuple[float, float], ...]


def fitness(values: torch.Tensor, replies: Replies) -> Fitness:
    """Compute R^2 and calibration of the values of held-out replies. values: [N]."""
    v = values.double()
    y = replies.rewards[replies.reply_index].double()
    centred = v - v.mean()
    variation = centred.square().sum().clamp(min=TINY_VARIANCE)
    slope = float((centred * (y - y.mean())).sum() / variation)
    reply_count = torch.tensor([len(replies.rewards)])
    last = torch.nonzero(torch.diff(replies.reply_index, append=reply_count)).ravel()
    deciles = []
    for part in torch.tensor_split(torch.argsort(v), 10):
        if len(part):
            deciles.append((float(v[part].mean()), float(y[part].mean())))
    return Fitness(_r2(v, y), _r2(v[last], y[last]), slope, tuple(deciles))


def _r2(values: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the explained share of the variance, or NaN for fewer than two values.

    A constant error does not count, because it does not change how VAS steers.
    """
    if len(targets) < 2:
        return float("nan")
    error = targets - values
    return float(1 - error.var() / targets.var().clamp(min=TINY_VARIANCE))


def split_by_prompt(prompts: Sequence[int], share: float, seed: int) -> torch.Tensor:
    """Choose a random share of the prompts and mark all replies to them. -> [S] bool.

    Args:
        prompts: [S] the prompt of each reply.
        share: part of the distinct prompts to choose, 0..1; at least one prompt is chosen.
        seed: of the choice.
    """
    distinct = sorted(set(prompts))
    order = torch.randperm(len(distinct), generator=_generator(seed)).tolist()
    count = max(1, round(share * len(distinct)))
    chosen = {distinct[i] for i in order[:count]}
    return torch.tensor([prompt in chosen for prompt in prompts])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
