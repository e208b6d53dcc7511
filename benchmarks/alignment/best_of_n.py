"""Best-of-n on the embedded demo: the limits of selection by a proxy, and ensembles.

The claim (Coste et al., 2310.02743): harder selection by one learned reward first raises and then
lowers the true reward, and conservative objectives over an ensemble (worst case,
uncertainty-weighted) reduce this effect.

    python benchmarks/alignment/best_of_n.py                # the shipped reward models: table,
    JSON, plot python benchmarks/alignment/best_of_n.py --retrain 6    # 6 new sets of preferences,
    reward models and prompts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from rich.table import Table

from benchmarks.alignment.report import OUT, argument_parser, difference, mean_se, row_figure
from benchmarks.demo.build import BuildConfig, train_members
from benchmarks.demo.measure import Models, Pool, draw_pool, load
from benchmarks.record import RESULTS, record
from infer_align import objectives
from infer_align.demo import path
from infer_align.demo.world import prompts
from infer_align.methods.best_of_n import expected_best, kl_upper_bound
from infer_align.types import Array

UNCERTAINTY_WEIGHT = 0.5
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SAMPLES = 512
RETRAINED_SIZES = (8, 64, 512)
DEFAULT_REQUEST = ("uwo", 8)
ORACLE = "gold oracle"

# Objective -> the selectors, each [P * N], of [K, P * N] member scores. The result is the mean over
# the selectors.
SELECTORS: dict[str, Callable[[Array], Sequence[Array]]] = {
    "single": list,
    "mean": lambda scores: [objectives.mean(scores)],
    "wco": lambda scores: [objectives.wco(scores)],
    "uwo": lambda scores: [objectives.uwo(scores, UNCERTAINTY_WEIGHT)],
}


@dataclass(frozen=True, slots=True)
class Curve:
    """The expected value [P] of the selected answer for each n."""

    proxy: dict[int, Array]
    gold: dict[int, Array]


def curves(pool: Pool) -> dict[str, Curve]:
    """Return the curve of each objective, and of an oracle that selects by gold."""
    scores = pool.proxy.reshape(len(pool.proxy), -1)
    by_objective: dict[str, Curve] = {}
    for name, select in SELECTORS.items():
        by_objective[name] = _curve(select(scores), pool.gold)
    by_objective[ORACLE] = _curve([pool.gold.ravel()], pool.gold)
    return by_objective


def _curve(selectors: Sequence[Array], gold: Array) -> Curve:
    shaped = [selector.reshape(gold.shape) for selector in selectors]
    golds = [gold] * len(shaped)
    curve = Curve(proxy={}, gold={})
    for n in SIZES:
        curve.proxy[n] = _mean_expected_best(shaped, shaped, n)
        curve.gold[n] = _mean_expected_best(shaped, golds, n)
    return curve


def _mean_expected_best(selectors: Sequence[Array], values: Sequence[Array], n: int) -> Array:
    """Return [P]: the expected value of the best of n by a selector, as the mean over selectors.

    Args:
        selectors: [P, N] each.
        values: the value of every answer, [P, N] for each selector.
        n: number of answers to select from.
    """
    means: list[list[float]] = []
    for selector, value in zip(selectors, values, strict=True):
        means.append([expected_best(*row, n) for row in zip(selector, value, strict=True)])
    return np.asarray(np.mean(means, axis=0))


def rows_of(pool: Pool, by_objective: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """Return one row per way to answer.

    Differences to the single proxy at the same n and to greedy decoding are paired by prompt.
    """
    length = float(pool.tokens.mean())
    greedy_length = float(pool.greedy_tokens.mean())
    rows = [
        _row("one sample", 1, "base", length, pool.gold.mean(1)),
        _row("greedy", 1, "greedy", greedy_length, pool.greedy_gold),
    ]
    for n in SIZES[1:]:
        single = by_objective["single"].gold[n]
        for name, curve in by_objective.items():
            is_default = (name, n) == DEFAULT_REQUEST
            label = f"best of {n}, {name}" + (" (the default request)" if is_default else "")
            gold = curve.gold[n]
            row = _row(label, n, name, n * length, gold)
            row["proxy"] = float(curve.proxy[n].mean())
            row["kl_upper_bound"] = kl_upper_bound(n)
            row["minus_single"], row["minus_single_se"] = mean_se(gold - single)
            row["minus_greedy"], row["minus_greedy_se"] = mean_se(gold - pool.greedy_gold)
            rows.append(row)
    return rows


def _row(answer: str, n: int, objective: str, tokens: float, gold: Array) -> dict[str, Any]:
    mean, error = mean_se(gold)
    return {
        "answer": answer,
        "n": n,
        "objective": objective,
        "tokens": tokens,
        "proxy": None,
        "gold": mean,
        "gold_se": error,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table. A difference in bold is more than two standard errors from zero."""
    heads = ("answer", "tokens", "KL at most", "proxy", "gold", "gold - single", "gold - greedy")
    title = "Gold reward of the answer, ± standard error; tokens generated for one answer"
    table = Table(*heads, title=title)
    for row in rows:
        is_last = row["objective"] in {"greedy", ORACLE}
        table.add_row(*_cells(row), end_section=is_last)
    OUT.print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    answer = row["answer"]
    tokens = f"{row['tokens']:.0f}"
    gold = row_figure(row, "gold")
    if "kl_upper_bound" not in row:
        return [answer, tokens, "", "", gold]
    kl = f"{row['kl_upper_bound']:.2f}"
    minus_single = difference(row["minus_single"], row["minus_single_se"])
    minus_greedy = difference(row["minus_greedy"], row["minus_greedy_se"])
    if row["objective"] == "single":
        minus_single = ""
    return [answer, tokens, kl, f"{row['proxy']:.2f}", gold, minus_single, minus_greedy]


def plot(pool: Pool, by_objective: Mapping[str, Curve]) -> None:
    """Plot gold (solid, with standard errors) and proxy (dashed) against n."""
    mpl.use("Agg")
    plot_figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, name in zip(("C3", "C1", "C2", "C0"), SELECTORS, strict=True):
        curve = by_objective[name]
        gold = np.array([mean_se(curve.gold[n]) for n in SIZES])
        proxy = [curve.proxy[n].mean() for n in SIZES]
        points = {"color": colour, "marker": "o", "markersize": 3, "label": f"{name}: gold"}
        axes.errorbar(SIZES, gold[:, 0], gold[:, 1], **points)
        dashes = {"color": colour, "linestyle": "--", "linewidth": 0.8, "label": f"{name}: proxy"}
        axes.plot(SIZES, proxy, **dashes)
    axes.axhline(pool.greedy_gold.mean(), color="0.5", linewidth=0.8, label="greedy: gold")
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(n) for n in SIZES])
    axes.set(
        xlabel="n, answers drawn",
        ylabel="reward of the selected answer",
        title="Best-of-n by proxies trained on 25% wrong preferences",
    )
    axes.legend(fontsize=7, ncols=2)
    plot_figure.savefig(RESULTS / "best_of_n.png", dpi=130)


def introduce(seed: int, n_prompts: int) -> None:
    """Print the claim and the setup."""
    OUT.print(__doc__)
    OUT.print(
        f"{n_prompts} prompts x {SAMPLES} samples at temperature 1, seed {seed}; exact unbiased "
        f"estimator over all n-subsets. "
        "Standard errors are over prompts.\n"
        f"single: each of the 5 members alone, averaged; uwo: weight {UNCERTAINTY_WEIGHT}; "
        "KL at most: ln n - (n-1)/n nats from the frozen model."
    )


def measure_shipped(models: Models, seed: int, n_prompts: int) -> None:
    """Measure the served reward models."""
    introduce(seed, n_prompts)
    pool = draw_pool(models, prompts(n_prompts, seed), SAMPLES, seed)
    by_objective = curves(pool)
    rows = rows_of(pool, by_objective)
    show(rows)
    setup = {
        "prompts": n_prompts,
        "samples": SAMPLES,
        "uncertainty_weight": UNCERTAINTY_WEIGHT,
        "temperature": 1.0,
    }
    baseline = "one sample, greedy, and a single reward model at the same n"
    OUT.print("written:", record("best_of_n", baseline=baseline, seed=seed, rows=rows, setup=setup))
    plot(pool, by_objective)


def measure_retrained(models: Models, seed: int, n_prompts: int, sets: int) -> None:
    """Measure new reward models on new preferences and prompts; the language model stays."""
    rows: list[dict[str, Any]] = []
    for index in range(sets):
        set_seed = seed + 1000 * (index + 1)
        reward = replace(BuildConfig().reward, seed=set_seed)
        members = train_members(models.lm, models.tokenizer, reward)
        retrained = replace(models, members=tuple(members))
        pool = draw_pool(retrained, prompts(n_prompts, set_seed), SAMPLES, set_seed)
        by_objective = curves(pool)
        for name in SELECTORS:
            rows.append(_retrained_row(index, set_seed, name, pool, by_objective))
    show_retrained(rows)
    setup = {
        "prompts": n_prompts,
        "samples": SAMPLES,
        "uncertainty_weight": UNCERTAINTY_WEIGHT,
        "sets": sets,
    }
    baseline = "a single reward model"
    path = record("best_of_n_retrained", baseline=baseline, seed=seed, rows=rows, setup=setup)
    OUT.print("written:", path)


def _retrained_row(
    index: int, seed: int, name: str, pool: Pool, by_objective: Mapping[str, Curve]
) -> dict[str, Any]:
    gold = by_objective[name].gold
    single = by_objective["single"].gold
    means = {n: float(gold[n].mean()) for n in SIZES}
    best_n = max(SIZES, key=lambda n: means[n])
    fall, error = mean_se(gold[SIZES[-1]] - gold[best_n])
    row: dict[str, Any] = {
        "set": index,
        "seed": seed,
        "objective": name,
        "best_n": best_n,
        "fall": fall,
        "fall_se": error,
        **{f"gold_{n}": mean for n, mean in means.items()},
        "greedy_gold": float(pool.greedy_gold.mean()),
    }
    for n in RETRAINED_SIZES:
        row[f"minus_single_{n}"] = mean_se(gold[n] - single[n])
    return row


def show_retrained(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of the retrained reward models."""
    heads = ("set", "objective", "gold at n = 8", "64", "512", "best n", "gold(512) - gold(best n)")
    table = Table(*heads, title="Retrained reward models")
    for row in rows:
        gold = [f"{row[f'gold_{n}']:.2f}" for n in RETRAINED_SIZES]
        fall = f"{row['fall']:+.2f} ± {row['fall_se']:.2f}"
        table.add_row(str(row["set"]), row["objective"], *gold, str(row["best_n"]), fall)
    OUT.print(table)


def main() -> None:
    """Run from the command line."""
    parser = argument_parser(__doc__, prompts=64)
    parser.add_argument(
        "--retrain",
        type=int,
        default=0,
        metavar="SETS",
        help="measure this many sets of retrained reward models instead",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = load(path("lm").parent)
    if options.retrain:
        measure_retrained(models, options.seed, options.prompts, options.retrain)
    else:
        measure_shipped(models, options.seed, options.prompts)


if __name__ == "__main__":
    main()
