"""Adaptive numbers of draws: tokens spent for the same reward as best-of-n.

The claim (BEACON, 2510.15945): drawing until one more batch is not worth its cost reaches the
reward of best-of-n with fewer draws. Pools of answers are drawn once. The stop rule of
`align.adaptive` then runs on them, and best-of-n is exact on the same pools. A live run confirms
that the server draws what the simulation says.

    python benchmarks/alignment/adaptive.py         # the demo: alike, with a ceiling, mixed
    python benchmarks/alignment/adaptive.py --real  # SmolLM2-135M-Instruct, sentiment
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from time import monotonic
from typing import Any, TypeAlias

import numpy as np
from rich.table import Table

from benchmarks.alignment.flow import Flow, serving
from benchmarks.alignment.guidance_real import prompts as instructions
from benchmarks.alignment.report import OUT, argument_parser, mean_se, row_figure
from benchmarks.demo.direction import direction_at
from benchmarks.demo.measure import draw_pool, load
from benchmarks.demo.sampling import sample
from benchmarks.record import record
from infer_align.demo import path, world
from infer_align.flow.response import Response
from infer_align.methods.adaptive import Adaptive, ExpectedGain
from infer_align.methods.best_of_n import expected_best
from infer_align.methods.dpa import system_prompt
from infer_align.objectives import Ensemble
from infer_align.quickstart import CONFIG
from infer_align.types import Array

MAX_N = 64
BATCH = 4
COSTS = (0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03)
SIZES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
RESAMPLES = 500
# The price of a batch that the live run pays, and its number of prompts.
LIVE_COST = 0.1
LIVE_PROMPTS = 16
LIVE_PROMPTS_REAL = 3
# An answer with all facts, not rude: "good enough". Easy prompts reach it often, hard ones seldom.
CEILING = 2.0
# With this direction in the prompt the model's answers are mostly good.
EASY_DEGREES = -20.0
BAR = 0.15


@dataclass(frozen=True, slots=True)
class Pool:
    """R runs of MAX_N answers to each of P prompts. Every array is [P, R, MAX_N]."""

    objective: Array  # what selects
    value: Array  # what judges the selected answer
    tokens: Array


# The pools by name, and the figures of the live run.
Measured: TypeAlias = tuple[dict[str, Pool], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Spent:
    """What each prompt spends and reaches, as means over runs. Every array is [P]."""

    value: Array
    tokens: Array
    draws: Array


def draw_demo_pool(questions: Sequence[str], seed: int, runs: int) -> Pool:
    """Draw answers of the demo's model. The five proxies select (uwo), the exact reward judges."""
    drawn = draw_pool(load(path("lm").parent), questions, runs * MAX_N, seed)
    shape = (len(questions), runs, MAX_N)
    members = drawn.proxy.reshape(len(drawn.proxy), -1)
    objective = Ensemble().reduce(members)
    return Pool(objective.reshape(shape), drawn.gold.reshape(shape), drawn.tokens.reshape(shape))


def draw_easy_pool(questions: Sequence[str], seed: int, runs: int) -> Pool:
    """Draw answers to the same questions with a direction in the prompt, which makes them easy."""
    models = load(path("lm").parent)
    system = system_prompt(direction_at(EASY_DEGREES))
    replies = sample(models.lm, models.tokenizer, questions, runs * MAX_N, seed=seed, system=system)
    shape = (len(questions), runs, MAX_N)
    values: list[float] = []
    tokens: list[int] = []
    for question, answers in zip(questions, replies, strict=True):
        values += [world.gold(question, text) for text, _ in answers]
        tokens += [length for _, length in answers]
    value = np.array(values).reshape(shape)
    return Pool(value, value, np.array(tokens, dtype=np.float64).reshape(shape))


def mixed(hard: Pool, easy: Pool) -> Pool:
    """Return the first half of the prompts of one pool, and the second half of the other's."""
    half = len(hard.value) // 2
    pairs = zip(astuple(hard), astuple(easy), strict=True)
    return Pool(*(np.concatenate([a[:half], b[half:]]) for a, b in pairs))


async def draw_served_pool(
    flow: Flow, questions: Sequence[str], seed: int, runs: int, **body: Any
) -> Pool:
    """Draw answers through the served flow. The objective of its selection judges too."""
    objective: list[list[tuple[float, ...]]] = [[] for _ in questions]
    tokens: list[list[list[int]]] = [[] for _ in questions]
    for run in range(runs):
        responses = await flow.ask_all(questions, seed + run, {"best_of_n": {"n": MAX_N}}, **body)
        for p, response in enumerate(responses):
            objective[p].append(response.selection.objective)
            tokens[p].append([each.completion_tokens for each in response.candidates])
        OUT.print(f"run {run + 1} of {runs} is drawn", highlight=False)
    scores = np.array(objective)
    return Pool(scores, scores, np.array(tokens, dtype=np.float64))


def best_of(pool: Pool, n: int) -> Spent:
    """Return the expected value of the best of n over all subsets of the pool, and its tokens."""
    values: list[float] = []
    for objective, value in zip(pool.objective, pool.value, strict=True):
        values.append(expected_best(objective.ravel(), value.ravel(), n))
    lengths = pool.tokens.mean(axis=(1, 2))
    return Spent(np.array(values), n * lengths, np.full(len(values), float(n)))


def adaptive(pool: Pool) -> dict[float, Spent]:
    """Return what the stop rule spends and reaches at each cost."""
    shape = pool.objective.shape[:2]
    figures = {cost: np.zeros((3, *shape)) for cost in COSTS}
    for where in np.ndindex(shape):
        gains = _gains(pool.objective[where])
        for cost in COSTS:
            n = _draws(gains, cost)
            best = int(np.argmax(pool.objective[where][:n]))
            tokens = pool.tokens[where][:n].sum()
            figures[cost][:, *where] = pool.value[where][best], tokens, n
    return {cost: Spent(*array.mean(axis=2)) for cost, array in figures.items()}


def _gains(objective: Array) -> dict[int, float]:
    """Return the expected gain after each batch but the last, by the number of draws."""
    rule = ExpectedGain(MAX_N, BATCH, 0.0)
    return {n: rule.gain(objective[:n]) for n in range(BATCH, MAX_N, BATCH)}


def _draws(gains: Mapping[int, float], cost: float) -> int:
    """Return the number of draws at a cost."""
    return next((n for n, gain in gains.items() if gain < cost), MAX_N)


def rows_of(name: str, pool: Pool, seed: int) -> list[dict[str, Any]]:
    """Return the rows of best-of-n and of every cost, compared by prompt."""
    fixed = [best_of(pool, n) for n in SIZES]
    rows = [_row(name, f"best of {n}", each) for n, each in zip(SIZES, fixed, strict=True)]
    for cost, spent in adaptive(pool).items():
        row = _row(name, f"adaptive, cost {cost:g}", spent)
        at_same = _value_at(float(spent.tokens.mean()), fixed)
        row["minus_budget"], row["minus_budget_se"] = mean_se(spent.value - at_same)
        row["saved"], row["saved_se"] = _saved_share(spent, fixed, seed)
        rows.append(row)
    return rows


def _row(name: str, answer: str, spent: Spent) -> dict[str, Any]:
    value, error = mean_se(spent.value)
    return {
        "set": name,
        "answer": answer,
        "draws": float(spent.draws.mean()),
        "draws_sd": float(spent.draws.std()),
        "tokens": float(spent.tokens.mean()),
        "value": value,
        "value_se": error,
    }


def _value_at(tokens: float, fixed: Sequence[Spent]) -> Array:
    """Return the value [P] of best-of-n at a mean number of tokens, by interpolation."""
    costs = [float(each.tokens.mean()) for each in fixed]
    upper = min(max(1, int(np.searchsorted(costs, tokens))), len(fixed) - 1)
    share = (tokens - costs[upper - 1]) / (costs[upper] - costs[upper - 1])
    return np.asarray((1 - share) * fixed[upper - 1].value + share * fixed[upper].value)


def _saved_share(spent: Spent, fixed: Sequence[Spent], seed: int) -> tuple[float, float]:
    """Return the share of tokens saved at equal value, and its error by resampling prompts."""
    rng = np.random.default_rng(seed)
    prompts = len(spent.value)
    values = np.stack([each.value for each in fixed])
    tokens = np.stack([each.tokens for each in fixed])
    shares: list[float] = []
    for resample in range(RESAMPLES + 1):
        chosen = np.arange(prompts) if resample == 0 else rng.integers(prompts, size=prompts)
        reached = np.maximum.accumulate(values[:, chosen].mean(axis=1))
        needed = np.interp(spent.value[chosen].mean(), reached, tokens[:, chosen].mean(axis=1))
        shares.append(1.0 - float(spent.tokens[chosen].mean() / needed))
    return shares[0], float(np.std(shares[1:], ddof=1))


async def confirm(flow: Flow, questions: Sequence[str], seed: int, **body: Any) -> dict[str, Any]:
    """Answer some questions live, one at a time, with `adaptive` and with best-of-n.

    Returns:
        How often the server drew as many candidates as the rule on all of them, and what both cost.
    """
    requests = {
        "adaptive": {"adaptive": {"max_n": MAX_N, "batch": BATCH, "cost": LIVE_COST}},
        "fixed": {"best_of_n": {"n": MAX_N}},
    }
    seconds: dict[str, list[float]] = {name: [] for name in requests}
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    equal = 0
    for index, question in enumerate(questions[:LIVE_PROMPTS]):
        drawn: dict[str, Response] = {}
        for name, align in requests.items():
            started = monotonic()
            drawn[name] = await flow.ask(question, seed + index, align, **body)
            seconds[name].append(monotonic() - started)
            tokens[name].append(sum(each.completion_tokens for each in drawn[name].candidates))
        gains = _gains(np.array(drawn["fixed"].selection.objective))
        equal += len(drawn["adaptive"].candidates) == _draws(gains, LIVE_COST)
    return {
        "prompts": min(LIVE_PROMPTS, len(questions)),
        "cost": LIVE_COST,
        "same_draws_as_simulated": equal,
        **{f"{name}_seconds": float(np.median(times)) for name, times in seconds.items()},
        **{f"{name}_tokens": float(np.mean(counts)) for name, counts in tokens.items()},
    }


def with_ceiling(pool: Pool) -> Pool:
    """Return the pool with a reward that is exact up to "good enough", and constant above."""
    capped = np.minimum(pool.value, CEILING)
    return Pool(capped, capped, pool.tokens)


def verdict(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """State in words what the default cost and the best one save."""
    priced = [row for row in rows if "saved" in row]
    default = next(row for row in priced if row["answer"] == f"adaptive, cost {Adaptive().cost:g}")
    best = max(priced, key=lambda row: row["saved"])
    is_met = default["saved"] - 2 * default["saved_se"] >= BAR
    word = "met by two standard errors" if is_met else "not shown by two standard errors"
    return (
        f"{name}: the default cost saves {default['saved']:.0%} ± {default['saved_se']:.0%} of the "
        f"tokens at equal value (at least {BAR:.0%}: {word}). The best of all costs, picked "
        f"afterwards: {best['answer']}, {best['saved']:.0%} ± {best['saved_se']:.0%}."
    )


def show(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of one set."""
    heads = ("answer", "draws", "tokens", "value", "- best-of-n at the same tokens", "saved")
    table = Table(*heads, title=f"{name}; ± standard error over prompts")
    for row in rows:
        saved = f"{row['saved']:+.0%} ± {row['saved_se']:.0%}" if "saved" in row else ""
        minus = f"{row['minus_budget']:+.3f} ± {row['minus_budget_se']:.3f}" if saved else ""
        draws = f"{row['draws']:.1f}"
        tokens = f"{row['tokens']:.0f}"
        table.add_row(row["answer"], draws, tokens, row_figure(row, "value"), minus, saved)
    OUT.print(table)


async def measure_demo(seed: int, n_prompts: int, runs: int) -> Measured:
    """Draw the pool of the demo, and confirm it."""
    questions = world.prompts(n_prompts, seed)
    pool = draw_demo_pool(questions, seed, runs)
    async with serving() as flow:
        live = await confirm(flow, questions, seed)
    easy = with_ceiling(draw_easy_pool(questions, seed, runs))
    hard = with_ceiling(pool)
    pools = {
        "five proxies": pool,
        f"exact reward up to {CEILING:g}": hard,
        f"exact reward up to {CEILING:g}, half of the prompts easy": mixed(hard, easy),
    }
    return pools, live


async def measure_real(seed: int, n_prompts: int, runs: int) -> Measured:
    """Draw the pool of the real small model, and confirm it."""
    questions = instructions(None, n_prompts)
    body = {"max_tokens": 24, "temperature": 0.8}
    async with serving(CONFIG) as flow:
        pool = await draw_served_pool(flow, questions, seed, runs, **body)
        live = await confirm(flow, questions[:LIVE_PROMPTS_REAL], seed, **body)
    return {"SmolLM2-135M-Instruct, sentiment": pool}, live


def main() -> None:
    """Run from the command line."""
    parser = argument_parser(__doc__, prompts=64)
    parser.add_argument("--real", action="store_true", help="measure the real small model")
    parser.add_argument("--runs", type=int, default=4, help="runs of 64 draws for each prompt")
    options = parser.parse_args()
    OUT.print(__doc__)
    measure = measure_real if options.real else measure_demo
    pools, live = asyncio.run(measure(options.seed, options.prompts, options.runs))
    rows: list[dict[str, Any]] = []
    verdicts: list[str] = []
    for name, pool in pools.items():
        of_set = rows_of(name, pool, options.seed)
        show(name, of_set)
        verdicts.append(verdict(name, of_set))
        rows += of_set
    OUT.print("\n".join(verdicts), highlight=False)
    OUT.print(f"live: {live}", highlight=False)
    setup = {
        "prompts": options.prompts,
        "runs": options.runs,
        "max_n": MAX_N,
        "batch": BATCH,
        "live": live,
        "verdicts": verdicts,
    }
    name = "adaptive_real" if options.real else "adaptive"
    baseline = "best-of-n at every n, on the same pools"
    written = record(name, baseline=baseline, seed=options.seed, rows=rows, setup=setup)
    OUT.print("written:", written)


if __name__ == "__main__":
    main()
