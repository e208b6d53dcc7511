"""Profiles on the embedded demo: how many choices it takes to know a user, asked or at random.

Sixty synthetic users weigh six traits of the demo's answers. They differ from the population, and
they choose with noise (Bradley-Terry). A profile starts at the population's weights, sees a number
of choices, and then selects one of 16 answers to questions that it has not seen. A share of 0 is a
random answer, 1 is the selection by the user's true weights.

    python benchmarks/alignment/profiles.py

Two users of another kind want exactly three flourishes: no weight of a linear trait says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from rich.table import Table
from scipy.special import expit

from benchmarks.alignment.flow import serving, texts
from benchmarks.alignment.report import OUT, argument_parser, figure
from benchmarks.record import record
from infer_align.demo import world
from infer_align.profiles import fit, next_question
from infer_align.profiles.weights import learn
from infer_align.types import Array

TRAITS = ("right", "wrong", "polite", "rude", "flourishes", "words")
# Weights of the population for traits of variance 1, and how far users differ from them.
POPULATION = np.array([1.0, -0.7, 0.4, -0.7, 0.2, -0.2])
DEVIATION = 0.7
USERS = 60
POOL = 16
COUNTS = (0, 1, 2, 4, 8, 16)
WANTED_FLOURISHES = 3
# Learns weights [T] from differences [C, T].
Learner = Callable[[Array], tuple[Array, Array]]


@dataclass(frozen=True, slots=True)
class Pools:
    """The traits of the drawn answers, of variance 1 within a question."""

    asked: Array  # [P, POOL, T] of the questions whose answers are compared
    fresh: Array  # [Q, POOL, T] of the questions that are answered then


async def main() -> None:
    """Draw answers, measure all users, and write the result."""
    options = argument_parser(__doc__, prompts=96).parse_args()
    questions = world.prompts(options.prompts, options.seed)
    async with serving() as flow:
        responses = await flow.ask_all(questions, options.seed, n=POOL)
    raw = np.array(
        [
            [traits(question, text) for text in answers]
            for question, answers in zip(questions, texts(responses), strict=True)
        ]
    )
    deviations = np.sqrt(raw.var(axis=1).mean(axis=0))
    half = options.prompts // 3
    pools = Pools(raw[:half] / deviations, raw[half:] / deviations)
    rows = measure(pools, options.seed)
    rows += nonlinear(pools, deviations, options.seed)
    show(rows)
    record(
        "profiles",
        baseline="the population's weights (0 choices), a random answer (share 0) and the user's "
        "true weights (share 1), for the same users and answers",
        seed=options.seed,
        rows=rows,
        setup={
            "prompts": options.prompts,
            "answers_per_prompt": POOL,
            "users": USERS,
            "traits": list(TRAITS),
            "population": POPULATION.tolist(),
            "deviation": DEVIATION,
        },
    )


def traits(question: str, text: str) -> tuple[float, ...]:
    """Return the six traits of an answer."""
    parsed = world.read_question(question)
    assert parsed is not None
    read = world.read(parsed, text)
    words = float(len(text.split()))
    facts = float(read.right), float(read.wrong)
    return (*facts, float(read.polite), float(read.rude), float(read.flourishes), words)


def measure(pools: Pools, seed: int) -> list[dict[str, Any]]:
    """Return one row for each way of learning and asking, and each number of choices."""
    generator = np.random.default_rng(seed)
    users = POPULATION + DEVIATION * generator.normal(size=(USERS, len(TRAITS)))
    rows: list[dict[str, Any]] = []
    for learner_name, learner in (("fit", by_fit), ("as served", as_served)):
        for way in ("random", "asked"):
            shares = np.zeros((USERS, len(COUNTS), 2))
            for i, weights in enumerate(users):
                user_generator = np.random.default_rng([seed, i])
                utility = pools.asked @ weights, pools.fresh @ weights
                shares[i] = learning_curve(pools, utility, learner, way, user_generator)
            rows += curve_rows(f"{learner_name}, {way}", shares)
    return rows


def nonlinear(pools: Pools, deviations: Array, seed: int) -> list[dict[str, Any]]:
    """Return rows for users who want exactly three flourishes."""
    position = TRAITS.index("flourishes")
    rows: list[dict[str, Any]] = []

    def distance(traits_of: Array) -> Array:
        return -np.abs(traits_of[..., position] * deviations[position] - WANTED_FLOURISHES)

    extended = Pools(
        np.concatenate([pools.asked, distance(pools.asked)[..., None]], axis=-1),
        np.concatenate([pools.fresh, distance(pools.fresh)[..., None]], axis=-1),
    )
    utility = 2 * distance(pools.asked), 2 * distance(pools.fresh)
    for name, used in (("linear traits", pools), ("with the distance", extended)):
        shares = np.zeros((USERS, len(COUNTS), 2))
        for i in range(USERS):
            generator = np.random.default_rng([seed, i])
            shares[i] = learning_curve(used, utility, by_fit, "asked", generator)
        rows += curve_rows(f"three flourishes, {name}", shares)
    return rows


def by_fit(differences: Array) -> tuple[Array, Array]:
    """Learn with the population's own distribution as the prior."""
    further = differences.shape[1] - len(POPULATION)
    mean = np.concatenate([POPULATION, np.zeros(further)])
    return fit(differences, mean, DEVIATION**2 * np.eye(len(mean)))


def as_served(differences: Array) -> tuple[Array, Array]:
    """Learn as the server does by default: a wider prior, bounds, and signs that stay."""
    learned = learn(
        differences,
        POPULATION,
        np.ones(len(POPULATION)),
        deviation=1.0,
        bound=3.0,
        keeps_sign=np.ones(len(POPULATION), dtype=bool),
    )
    return learned.strengths, learned.covariance


def learning_curve(
    pools: Pools, utility: tuple[Array, Array], learner: Learner, way: str, generator: Generator
) -> Array:
    """Return the gain over a random answer after each number of choices, and the gain of knowing.

    Args:
        pools: traits of the answers.
        utility: of the user for the asked and for the fresh answers: [P, POOL] and [Q, POOL].
        learner: learns the weights.
        way: "random" or "asked".
        generator: of the user's noise and the random questions.

    Returns:
        [counts, 2].
    """
    differences = np.zeros((0, pools.asked.shape[-1]))
    curve = np.zeros((len(COUNTS), 2))
    mean_gain = utility[1].mean()
    known_gain = utility[1].max(axis=1).mean() - mean_gain
    for count in range(max(COUNTS) + 1):
        weights, covariance = learner(differences)
        if count in COUNTS:
            picks = (pools.fresh @ weights).argmax(axis=1)
            gain = np.take_along_axis(utility[1], picks[:, None], axis=1).mean() - mean_gain
            curve[COUNTS.index(count)] = gain, known_gain
        pool = pools.asked[count % len(pools.asked)]
        worth = utility[0][count % len(pools.asked)]
        if way == "asked":
            i, j = next_question(pool, weights, covariance)
        else:
            i, j = generator.choice(POOL, 2, replace=False)
        if generator.random() > expit(worth[i] - worth[j]):
            i, j = j, i
        differences = np.concatenate([differences, (pool[i] - pool[j])[None]])
    return curve


def curve_rows(name: str, gains: Array) -> list[dict[str, Any]]:
    """Return the share of the gain of knowing the user, with the jackknife's standard error."""
    rows: list[dict[str, Any]] = []
    for c, count in enumerate(COUNTS):
        gain, best = gains[:, c, 0], gains[:, c, 1]
        share = gain.sum() / best.sum()
        without = (gain.sum() - gain) / (best.sum() - best)
        error = np.sqrt((len(gain) - 1) * without.var())
        worse = float((gains[:, c, 0] < gains[:, 0, 0] - 1e-9).mean())
        rows.append(
            {
                "way": name,
                "choices": count,
                "share": float(share),
                "share_se": float(error),
                "users_below_population": worse,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print one line for each way."""
    table = Table("share of the gain of knowing the user", *[str(count) for count in COUNTS])
    for name in dict.fromkeys(row["way"] for row in rows):
        cells = [figure(row["share"], row["share_se"]) for row in rows if row["way"] == name]
        table.add_row(name, *cells)
    OUT.print(table)


if __name__ == "__main__":
    asyncio.run(main())
