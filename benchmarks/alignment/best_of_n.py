"""Best-of-n on the embedded demo: where choosing by a proxy stops helping, and what an ensemble changes.

The claim (Coste et al., 2310.02743): selecting harder by one learned reward first raises and then lowers the reward that
people really have, and conservative objectives over an ensemble (worst case, uncertainty-weighted) mitigate it.

    python benchmarks/alignment/best_of_n.py                # the shipped reward models: table, JSON, plot
    python benchmarks/alignment/best_of_n.py --retrain 6    # is it luck? fresh preferences, reward models and prompts, 6 times
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

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
DEFAULT_REQUEST = ("uwo", 8)
OUT = Console(width=max(120, Console().width))

# What selects: [K, P * N] member scores -> selectors, each [P * N]. "single" is the average over which member one trusts.
SELECTORS: dict[str, Callable[[Array], Sequence[Array]]] = {
    "single": list,
    "mean": lambda scores: [objectives.mean(scores)],
    "wco": lambda scores: [objectives.wco(scores)],
    "uwo": lambda scores: [objectives.uwo(scores, UNCERTAINTY_WEIGHT)],
}


@dataclass(frozen=True, slots=True)
class Curve:
    """Best-of-n by one objective: expected value of the pick, for each prompt [P] at each n."""

    proxy: dict[int, Array]
    gold: dict[int, Array]


def curves(pool: Pool) -> dict[str, Curve]:
    """The curve of each objective, and of the oracle that selects by gold itself."""
    flat = pool.proxy.reshape(len(pool.proxy), -1)
    found = {name: _curve(selectors(flat), pool.gold) for name, selectors in SELECTORS.items()}
    return found | {"gold oracle": _curve([pool.gold.ravel()], pool.gold)}


def _curve(selectors: Sequence[Array], gold: Array) -> Curve:
    shaped = [selector.reshape(gold.shape) for selector in selectors]

    def pick(judges: Sequence[Array], n: int) -> Array:
        values = [
            [expected_best(*row, n) for row in zip(*pair, strict=True)]
            for pair in zip(shaped, judges, strict=True)
        ]
        return np.asarray(np.mean(values, axis=0))

    return Curve(
        {n: pick(shaped, n) for n in SIZES}, {n: pick([gold] * len(shaped), n) for n in SIZES}
    )


def rows(pool: Pool, found: dict[str, Curve]) -> list[dict[str, Any]]:
    """One row for each way to answer; differences, to the single proxy at the same n and to greedy, are paired by prompt."""
    length = float(pool.tokens.mean())
    made = [
        _row("one sample", 1, "base", length, pool.gold.mean(1)),
        _row("greedy", 1, "greedy", float(pool.greedy_tokens.mean()), pool.greedy_gold),
    ]
    for n in SIZES[1:]:
        for name, curve in found.items():
            label = f"best of {n}, {name}" + (
                " (the default request)" if (name, n) == DEFAULT_REQUEST else ""
            )
            row = _row(label, n, name, n * length, curve.gold[n])
            row["proxy"] = float(curve.proxy[n].mean())
            row["kl_upper_bound"] = kl_upper_bound(n)
            row["minus_single"], row["minus_single_se"] = _mean_se(
                curve.gold[n] - found["single"].gold[n]
            )
            row["minus_greedy"], row["minus_greedy_se"] = _mean_se(curve.gold[n] - pool.greedy_gold)
            made.append(row)
    return made


def _row(answer: str, n: int, objective: str, tokens: float, gold: Array) -> dict[str, Any]:
    mean, error = _mean_se(gold)
    return {
        "answer": answer,
        "n": n,
        "objective": objective,
        "tokens": tokens,
        "proxy": None,
        "gold": mean,
        "gold_se": error,
    }


def _mean_se(values: Array) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def show(made: Sequence[dict[str, Any]]) -> None:
    """The table; a difference in bold is more than two standard errors from zero."""
    heads = ("answer", "tokens", "KL at most", "proxy", "gold", "gold - single", "gold - greedy")
    table = Table(
        *heads, title="Gold reward of the answer, ± standard error; tokens spent for one answer"
    )
    for row in made:
        cells = [
            row["answer"],
            f"{row['tokens']:.0f}",
            "",
            "",
            f"{row['gold']:.2f} ± {row['gold_se']:.2f}",
        ]
        if "kl_upper_bound" in row:
            cells[2:4] = f"{row['kl_upper_bound']:.2f}", f"{row['proxy']:.2f}"
            cells += [
                _difference(row, "minus_single") if row["objective"] != "single" else "",
                _difference(row, "minus_greedy"),
            ]
        table.add_row(*cells, end_section=row["objective"] in {"greedy", "gold oracle"})
    OUT.print(table)


def _difference(row: dict[str, Any], name: str) -> str:
    value, error = row[name], row[f"{name}_se"]
    return f"[{'bold' if abs(value) > 2 * error else 'dim'}]{value:+.2f} ± {error:.2f}[/]"


def plot(pool: Pool, found: dict[str, Curve]) -> None:
    """Gold (solid, with standard errors) and proxy (dashed) against n."""
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, (name, curve) in zip(
        ("C3", "C1", "C2", "C0"),
        [item for item in found.items() if item[0] in SELECTORS],
        strict=True,
    ):
        gold = np.array([_mean_se(curve.gold[n]) for n in SIZES])
        axes.errorbar(
            SIZES,
            gold[:, 0],
            gold[:, 1],
            color=colour,
            marker="o",
            markersize=3,
            label=f"{name}: gold",
        )
        axes.plot(
            SIZES,
            [curve.proxy[n].mean() for n in SIZES],
            color=colour,
            linestyle="--",
            linewidth=0.8,
            label=f"{name}: proxy",
        )
    axes.axhline(pool.greedy_gold.mean(), color="0.5", linewidth=0.8, label="greedy: gold")
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(n) for n in SIZES])
    axes.set(
        xlabel="n, answers drawn",
        ylabel="reward of the chosen answer",
        title="Best-of-n by proxies trained on 25% wrong preferences",
    )
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(RESULTS / "best_of_n.png", dpi=130)


def shipped(models: Models, seed: int, n_prompts: int) -> None:
    """Measure the reward models that are served."""
    OUT.print(__doc__)
    OUT.print(
        f"{n_prompts} prompts x {SAMPLES} samples at temperature 1, seed {seed}; exact unbiased estimator over all n-subsets;\n"
        f"standard errors over prompts. single: each of the 5 members alone, averaged; uwo weight {UNCERTAINTY_WEIGHT};\n"
        "KL at most: ln n - (n-1)/n nats from the frozen model."
    )
    pool = draw_pool(models, prompts(n_prompts, seed), SAMPLES, seed)
    found = curves(pool)
    made = rows(pool, found)
    show(made)
    setup = {
        "prompts": n_prompts,
        "samples": SAMPLES,
        "uncertainty_weight": UNCERTAINTY_WEIGHT,
        "temperature": 1.0,
    }
    baseline = "one sample, greedy, and a single reward model at the same n"
    OUT.print(
        f"written: {record('best_of_n', baseline=baseline, seed=seed, rows=made, setup=setup)}"
    )
    plot(pool, found)


def retrained(models: Models, seed: int, n_prompts: int, sets: int) -> None:
    """The same with everything but the language model made afresh, to see what replicates."""
    table = Table(
        "set",
        "objective",
        "gold at n = 8",
        "64",
        "512",
        "best n",
        "gold(512) - gold(best n)",
        title="Fresh reward models",
    )
    made = []
    for index in range(sets):
        fresh = seed + 1000 * (index + 1)
        members = train_members(
            models.lm, models.tokenizer, replace(BuildConfig().reward, seed=fresh)
        )
        pool = draw_pool(
            replace(models, members=tuple(members)), prompts(n_prompts, fresh), SAMPLES, fresh
        )
        found = curves(pool)
        for name in SELECTORS:
            gold = found[name].gold
            peak = max(SIZES, key=lambda n, gold=gold: float(gold[n].mean()))  # type: ignore[misc]
            fall, error = _mean_se(gold[SIZES[-1]] - gold[peak])
            table.add_row(
                str(index),
                name,
                *(f"{gold[n].mean():.2f}" for n in (8, 64, 512)),
                str(peak),
                f"{fall:+.2f} ± {error:.2f}",
            )
            against = {
                f"minus_single_{n}": _mean_se(gold[n] - found["single"].gold[n])
                for n in (8, 64, 512)
            }
            made.append(
                {
                    "set": index,
                    "seed": fresh,
                    "objective": name,
                    "best_n": peak,
                    "fall": fall,
                    "fall_se": error,
                }
                | {f"gold_{n}": float(gold[n].mean()) for n in SIZES}
                | {"greedy_gold": float(pool.greedy_gold.mean())}
                | against
            )
    OUT.print(table)
    setup = {
        "prompts": n_prompts,
        "samples": SAMPLES,
        "uncertainty_weight": UNCERTAINTY_WEIGHT,
        "sets": sets,
    }
    OUT.print(
        f"written: {record('best_of_n_retrained', baseline='a single reward model', seed=seed, rows=made, setup=setup)}"
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument(
        "--retrain",
        type=int,
        default=0,
        metavar="SETS",
        help="train so many fresh ensembles instead",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = load(path("lm").parent)
    if options.retrain:
        retrained(models, options.seed, options.prompts, options.retrain)
    else:
        shipped(models, options.seed, options.prompts)


if __name__ == "__main__":
    main()
