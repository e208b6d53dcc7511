r"""Estimate how far a value steers for its KL, by the number of replies and the target of its fit.

Small steps need no sampling. With A the centred value of a token, and b what is expected of the
reply so far, the gain of steering by beta and its divergence are, to the first order in beta,

    gain = beta E[sum_t A_t (R - b_t)]        KL = beta^2 / 2 E[sum_t Var A_t]

so `gain at 1 nat` = sqrt(2) E[sum_t A_t (R - b_t)] / sqrt(E[sum_t Var A_t]), on replies of the
frozen model to prompts that the value was not fitted to. It grows as the square root of KL.

The replies are those of `infer-align fit value`, which keeps them in OUT.samples.jsonl. The heads
are fitted to the first replies of each prompt, and to these targets of each token:

    reward        the reward of the reply, as `fit value` does
    lam 0.9       TD(lambda) returns
    prefix        the reward of the reply less that of the text before the token
    prefix, 8     the change of the reward over the next 8 tokens: a short horizon
    prefix, .95   all later changes, each discounted by .95 per token
    mean          the mean of the heads of `reward` and of all horizons

    infer-align fit value config.toml --reward NAME --prompts prompts.jsonl --out v.safetensors \
        --replies 16 --max-tokens 40
    python benchmarks/alignment/vas_fits.py --config config.toml --trait simple \
        --prompts-file prompts.jsonl --samples v.samples.jsonl --replies 4,8,16 --write heads

With --write, the heads are saved, so that `vas_real.py` can steer by them at equal KL.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.alignment.flow import serving
from benchmarks.alignment.real import MEASURES
from benchmarks.alignment.report import OUT, argument_parser, difference
from benchmarks.record import record
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.fitting import regression
from infer_align.fitting.regression import HeadTensors, Replies
from infer_align.fitting.samples import read_prompts, read_states
from infer_align.fitting.samples_file import read_samples
from infer_align.types import Array
from infer_align.values import head

TOP_K = 20
RANK = 64
FOLDS = 3
BOOTSTRAPS = 500
# A cheap head of this rank and strength expects the reward of a reply from its beginning.
BASELINE_RANK, BASELINE_RIDGE = 16, 300.0
STATES_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Pool:
    """All replies, what the frozen model preferred, and the reward of each prefix.

    Attributes:
        replies: S replies of N tokens.
        candidates: [N, k] the likeliest tokens in each state.
        logprobs: [N, k] their log-probabilities.
        before: [N] reward of the text before each token; before the first, the mean reward.
        after: [N] reward of the text after each token.
    """

    replies: Replies
    candidates: torch.Tensor
    logprobs: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """What a value is fitted to.

    Attributes:
        name: of the rows.
        values: [N] the target of each token; None for TD(lambda) returns.
        lam: trace decay.
    """

    name: str
    values: torch.Tensor | None
    lam: float = 1.0


@dataclass(frozen=True, slots=True)
class Slopes:
    """Means over the replies to each prompt: [P] of sum_t A_t (R - b_t), and of sum_t Var A_t."""

    gains: Array
    variances: Array

    def gain(self, rows: Array | slice = slice(None)) -> float:
        """Return the gain at 1 nat; `rows` chooses prompts, with repetition."""
        variance = float(self.variances[rows].sum())
        if variance <= 0:
            return 0.0
        count = len(self.gains[rows])
        return math.sqrt(2 / count) * float(self.gains[rows].sum()) / math.sqrt(variance)


def prefix_rewards(
    replies: Replies, decode: Callable[[list[int]], str], measure: Callable[[str], float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reward of the text before and after each token: [N] each."""
    mean = float(replies.rewards.mean())
    before: list[float] = []
    after: list[float] = []
    lengths = torch.bincount(replies.reply_index).tolist()
    rows = torch.split(replies.tokens, lengths)
    for tokens, reward in zip(rows, replies.rewards.tolist(), strict=True):
        ids = tokens.tolist()
        scores = [measure(decode(ids[:end])) for end in range(1, len(ids))]
        before += [mean, *scores]
        after += [*scores, reward]
    return torch.tensor(before), torch.tensor(after)


def likeliest(engine: TransformersEngine, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the likeliest tokens of each state and their log-probabilities: [N, k] each."""
    weight = engine.frozen.lm.get_output_embeddings().weight.float()
    tokens: list[torch.Tensor] = []
    logprobs: list[torch.Tensor] = []
    for states in torch.split(hidden, STATES_AT_ONCE):
        logits = states @ weight.T
        top, ids = torch.topk(logits, TOP_K)
        tokens.append(ids)
        logprobs.append(top - torch.logsumexp(logits, dim=1, keepdim=True))
    return torch.cat(tokens), torch.cat(logprobs)


def targets_of(pool: Pool) -> list[Target]:
    """Return the targets to compare, the reward first."""
    rewards = pool.replies.rewards[pool.replies.reply_index]
    targets = [Target("reward", rewards), Target("lam 0.9", None, 0.9)]
    targets.append(Target("prefix", rewards - pool.before))
    targets += [Target(f"prefix, {h}", horizon(pool, h)) for h in (8, 24)]
    targets.append(Target("prefix, .95", discounted_changes(pool, 0.95)))
    return targets


def horizon(pool: Pool, tokens: int) -> torch.Tensor:
    """Return the change of the prefix's reward over the next tokens: [N]."""
    index = pool.replies.reply_index
    lengths = torch.bincount(index)
    last = torch.cumsum(lengths, 0) - 1
    end = torch.minimum(torch.arange(len(index)) + tokens - 1, last[index])
    return pool.after[end] - pool.before


def discounted_changes(pool: Pool, gamma: float) -> torch.Tensor:
    """Return the sum of the later changes of the prefix's reward, discounted per token: [N]."""
    index = pool.replies.reply_index.tolist()
    changes = (pool.after - pool.before).tolist()
    sums = [0.0] * len(index)
    running = 0.0
    for t in range(len(index) - 1, -1, -1):
        is_last = t + 1 == len(index) or index[t + 1] != index[t]
        running = changes[t] + (0.0 if is_last else gamma * running)
        sums[t] = running
    return torch.tensor(sums)


def fit(
    pool: Pool, target: Target, used: torch.Tensor, vocabulary: int, rank: int, ridge: float
) -> HeadTensors:
    """Fit a linear head to some replies. used: [S] bool."""
    replies = pool.replies
    if target.values is None:
        chosen = replies.select(used)
    else:
        # Each token is a reply of its own, so that its target can differ.
        mask = used[replies.reply_index]
        chosen = Replies(
            replies.hidden[mask],
            replies.tokens[mask],
            torch.arange(int(mask.sum())),
            target.values[mask],
            replies.prompt_index[replies.reply_index][mask],
        )
    return regression.fit_ridge(
        chosen, vocabulary, rank=rank, ridge=ridge, gamma=1.0, lam=target.lam
    )


def candidate_values(pool: Pool, tensors: HeadTensors) -> torch.Tensor:
    """Return the values of the likeliest tokens of each state: [N, k]."""
    parts: list[torch.Tensor] = []
    ids = torch.split(pool.candidates, STATES_AT_ONCE)
    for states, tokens in zip(torch.split(pool.replies.hidden, STATES_AT_ONCE), ids, strict=True):
        features = states @ tensors["P"].T
        values = torch.einsum("nkr,nr->nk", tensors["E"][tokens], features)
        parts.append(values + tensors["b"][tokens])
    return torch.cat(parts)


def slopes(
    pool: Pool, values: torch.Tensor, baseline: torch.Tensor, groups: torch.Tensor
) -> Slopes:
    """Return the means of each prompt.

    Args:
        pool: the replies.
        values: [N, k] values of the likeliest tokens, of heads that the prompt did not fit.
        baseline: [N] expected reward before each token.
        groups: [S] number of the prompt of each reply, from 0.
    """
    replies = pool.replies
    weights = pool.logprobs.exp()
    centred = values - values.mean(dim=1, keepdim=True)
    mean = (weights * centred).sum(dim=1)
    # The other tokens keep their logits: their centred value is 0.
    variance = (weights * centred**2).sum(dim=1) - mean**2
    is_drawn = pool.candidates == replies.tokens[:, None]
    advantage = (centred * is_drawn).sum(dim=1) - mean
    gains = advantage * (replies.rewards[replies.reply_index] - baseline)
    prompts = groups[replies.reply_index]
    count = int(groups.max()) + 1
    numbers = torch.bincount(groups, minlength=count)
    return Slopes(
        (torch.bincount(prompts, gains.double(), count) / numbers).numpy(),
        (torch.bincount(prompts, variance.double(), count) / numbers).numpy(),
    )


class Comparison:
    """Cross-validated values of several targets on one pool."""

    def __init__(self, pool: Pool, vocabulary: int, ridge: float, seed: int) -> None:
        self._pool = pool
        self._vocabulary = vocabulary
        self._ridge = ridge
        _, groups = torch.unique(pool.replies.prompt_index, return_inverse=True)
        self._groups = groups
        order = torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(seed))
        self._folds = (order % FOLDS)[groups]  # [S]
        # [S] number of the reply among those of its prompt
        self._ranks = torch.tensor(
            [int((groups[:i] == groups[i]).sum()) for i in range(len(groups))]
        )
        reward = targets_of(pool)[0]
        values = self._values(reward, len(groups), BASELINE_RANK, BASELINE_RIDGE)
        weights = torch.softmax(pool.logprobs, dim=1)
        self._baseline = (weights * values).sum(dim=1)

    def values(self, target: Target, replies: int) -> torch.Tensor:
        """Return the values by heads that were fitted to other prompts: [N, k].

        Args:
            target: of the fits.
            replies: number of replies per prompt of the fits.
        """
        return self._values(target, replies, RANK, self._ridge)

    def slopes(self, values: torch.Tensor) -> Slopes:
        """Return the means of each prompt for some values of the likeliest tokens."""
        return slopes(self._pool, values, self._baseline, self._groups)

    def fit_all(self, target: Target, replies: int) -> HeadTensors:
        """Fit a head to the replies to all prompts."""
        used = self._ranks < replies
        return fit(self._pool, target, used, self._vocabulary, RANK, self._ridge)

    def _values(self, target: Target, replies: int, rank: int, ridge: float) -> torch.Tensor:
        values = torch.zeros(self._pool.candidates.shape)
        for fold in range(FOLDS):
            used = (self._folds != fold) & (self._ranks < replies)
            tensors = fit(self._pool, target, used, self._vocabulary, rank, ridge)
            judged = (self._folds == fold)[self._pool.replies.reply_index]
            values[judged] = candidate_values(self._pool, tensors)[judged]
        return values


def row_of(name: str, replies: int, samples: int, measured: Slopes, reference: Slopes) -> Any:
    """Return the row of a fit, with its difference to the reference, paired by prompt."""
    generator = np.random.default_rng(0)
    count = len(measured.gains)
    gains: list[float] = []
    gaps: list[float] = []
    for _ in range(BOOTSTRAPS):
        rows = generator.integers(0, count, count)
        gains.append(measured.gain(rows))
        gaps.append(gains[-1] - reference.gain(rows))
    return {
        "target": name,
        "replies": replies,
        "samples": samples,
        "gain_at_1_nat": measured.gain(),
        "gain_at_1_nat_se": float(np.std(gains)),
        "difference": measured.gain() - reference.gain(),
        "difference_se": float(np.std(gaps)),
    }


def compare(
    pool: Pool,
    comparison: Comparison,
    sizes: Sequence[int],
    save: Callable[[int, HeadTensors], None] | None,
) -> list[dict[str, Any]]:
    """Return a row for each size with the reward as target, and for each target."""
    reward, *targets = targets_of(pool)
    prompts = len(torch.unique(pool.replies.prompt_index))
    first = comparison.values(reward, sizes[0])
    reference = comparison.slopes(first)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        values = first if size == sizes[0] else comparison.values(reward, size)
        rows.append(row_of("reward", size, size * prompts, comparison.slopes(values), reference))
        if save is not None:
            save(size, comparison.fit_all(reward, size))
        OUT.print(rows[-1], highlight=False)
    total = first
    for target in targets:
        values = comparison.values(target, sizes[0])
        if target.values is not None:
            total = total + values
        measured = comparison.slopes(values)
        rows.append(row_of(target.name, sizes[0], sizes[0] * prompts, measured, reference))
        OUT.print(rows[-1], highlight=False)
    measured = comparison.slopes(total)
    rows.append(row_of("mean", sizes[0], sizes[0] * prompts, measured, reference))
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table. A difference in bold is more than two standard errors from zero."""
    table = Table("target", "replies per prompt", "samples", "gain at 1 nat", "- first row")
    for row in rows:
        gain = f"{row['gain_at_1_nat']:.4f} ± {row['gain_at_1_nat_se']:.4f}"
        gap = difference(row["difference"], row["difference_se"])
        table.add_row(row["target"], str(row["replies"]), str(row["samples"]), gain, gap)
    OUT.print(table)


async def run(options: argparse.Namespace) -> None:
    """Read the replies, compare the fits, print and record."""
    OUT.print(__doc__, highlight=False, markup=False)
    started = monotonic()
    sizes = [int(size) for size in options.replies.split(",")]
    async with serving(options.config) as flow:
        engine = flow.engine
        if not isinstance(engine, TransformersEngine):
            raise SystemExit("--config: its engine must be of the kind transformers")
        pool = read_pool(engine, options)
    comparison = Comparison(pool, engine.frozen.vocabulary, options.ridge, options.seed)
    frozen = engine.frozen.frozen(engine.model)

    def save(size: int, tensors: HeadTensors) -> None:
        path = options.write / f"{options.trait}-{size}.safetensors"
        head.write(path, tensors, frozen, {"reward": options.trait})

    rows = compare(pool, comparison, sizes, None if options.write is None else save)
    show(rows)
    setup = {
        "trait": options.trait,
        "prompts": len(torch.unique(pool.replies.prompt_index)),
        "folds": FOLDS,
        "ridge": options.ridge,
        "rank": RANK,
        "top_k": TOP_K,
        "mean_reward": float(pool.replies.rewards.mean()),
        "sd_of_rewards": float(pool.replies.rewards.std()),
    }
    baseline = "the head fitted to the reward of the fewest replies, on the same prompts"
    name = options.record or f"vas_fits_{options.trait}"
    path = record(name, baseline=baseline, seed=options.seed, rows=rows, setup=setup)
    OUT.print(f"written: {path}, {monotonic() - started:.0f} s")


def read_pool(engine: TransformersEngine, options: argparse.Namespace) -> Pool:
    """Return the replies of the samples file to the first prompts, with their rewards."""
    prompts = read_prompts(options.prompts_file)
    _, every = read_samples(options.samples, prompts)
    samples = [sample for sample in every if sample.prompt < options.prompts]
    read, _, _ = read_states(engine.frozen, prompts, samples, OUT.print)
    measure = limited_ease if options.trait == "simple" else MEASURES[options.trait]
    rewards = torch.tensor([measure(sample.text) for sample in samples])
    replies = replace(read, rewards=rewards)
    tokens, logprobs = likeliest(engine, replies.hidden)
    tokenizer = engine.frozen.tokenizer

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    before, after = prefix_rewards(replies, decode, measure)
    return Pool(replies, tokens, logprobs, before, after)


def limited_ease(text: str) -> float:
    """Return the reading ease over 100, within -0.5 and 1.2: that of one word has no limit."""
    return min(max(MEASURES["simple"](text) / 100, -0.5), 1.2)


def main() -> None:
    """Run from the command line."""
    parser = argument_parser(__doc__, prompts=150)
    parser.add_argument("--config", type=Path, help="configuration; default: the demo")
    parser.add_argument("--trait", choices=[*MEASURES], required=True, help="the reward")
    parser.add_argument("--prompts-file", type=Path, required=True, help="prompts of the replies")
    parser.add_argument("--samples", type=Path, required=True, help="samples of `fit value`")
    parser.add_argument("--replies", default="4,8,16", help="replies per prompt of the fits")
    parser.add_argument("--ridge", type=float, default=300.0, help="strength of the fits")
    parser.add_argument("--write", type=Path, help="folder for the heads of each size")
    parser.add_argument("--record", help="name of the record; default: vas_fits_TRAIT")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
