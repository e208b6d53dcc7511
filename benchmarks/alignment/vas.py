"""Value Augmented Sampling on the embedded demo, against best-of-n.

The claim (Han et al., 2405.06639): adding value estimates to a frozen model's logits raises the
reward of one answer, close to the best of up to 128 samples, at a fraction of their cost; values
can be combined, with weights that are set while decoding.

    python benchmarks/alignment/vas.py
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.alignment.best_of_n import UNCERTAINTY_WEIGHT
from benchmarks.alignment.report import (
    OUT,
    argument_parser,
    difference,
    figure,
    mean_se,
    row_figure,
    sign_of,
)
from benchmarks.alignment.vas_measure import (
    BETAS,
    BRIEF_WEIGHTS,
    COMPOSED_N,
    DRAWS,
    HEAD,
    HELPFUL_WEIGHTS,
    LOOKAHEAD,
    POOL,
    SIZES,
    TOP_K,
    Lab,
    Way,
    composed_ways,
    frozen_ways,
    headline_beta,
    headline_rows,
    label,
    mix_label,
    steered_ways,
)
from benchmarks.demo import measure
from benchmarks.demo.values import SAMPLING
from benchmarks.record import RESULTS, record
from infer_align import config
from infer_align.demo import path, world
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.fitting import HELD_OUT_SHARE
from infer_align.fitting.regression import split_by_prompt
from infer_align.methods.best_of_n import kl_upper_bound

# Number of questions in the world.
QUESTIONS = 320
# Rows of best-of-n in the printed table.
PRINTED_SIZES = (1, 2, 8, 16, 128)
REFERENCES = {"base": "one sample", "greedy": "greedy", "best_of_16": "best of 16"}
RELATIONS = {1: "exceeds", 0: "equals, within 2 standard errors,", -1: "DOES NOT REACH"}
Mask = NDArray[np.bool_]


def rows_of(ways: Mapping[str, Way], held_out: Mask) -> list[dict[str, Any]]:
    """Return one row per way: means with standard errors over prompts, and paired differences."""
    rows: list[dict[str, Any]] = []
    for way in ways.values():
        row: dict[str, Any] = {
            "answer": way.answer,
            "section": way.section,
            "tokens": float(way.tokens.mean()),
        }
        row["gold"], row["gold_se"] = mean_se(way.gold)
        row["kl"], kl_se = mean_se(way.kl)
        row["kl_se"] = kl_se if way.kl_is == "measured" else None
        row["kl_is"] = way.kl_is
        row["proxy"] = float(way.proxy.mean())
        row["words"] = None if way.words is None else _words(way)
        row["gold_held_out"], row["gold_held_out_se"] = mean_se(way.gold[held_out])
        for name, reference in REFERENCES.items():
            gap = way.gold - ways[reference].gold
            row[f"minus_{name}"], row[f"minus_{name}_se"] = mean_se(gap)
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table. A difference in bold is more than three standard errors from zero."""
    heads = ["answer", "tokens", "words", "KL, nats", "proxy", "gold"]
    heads += ["- base", "- greedy", "- best of 16"]
    title = "Gold reward of the answer and its differences, ± standard error; tokens per answer"
    table = Table(*heads, title=title)
    table.columns[0].no_wrap = True
    names = {f"best of {n}" for n in PRINTED_SIZES}
    printed = [row for row in rows if row["section"] != "best of n" or row["answer"] in names]
    sections = [row["section"] for row in printed]
    for row, next_section in zip(printed, [*sections[1:], sections[-1]], strict=True):
        table.add_row(*_cells(row), end_section=row["section"] != next_section)
    OUT.print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [
        row["answer"],
        f"{row['tokens']:.0f}",
        "" if row["words"] is None else f"{row['words']:.1f}",
        f"<= {row['kl']:.2f}" if row["kl_is"] == "at most" else figure(row["kl"], row["kl_se"]),
        f"{row['proxy']:.2f}",
        row_figure(row, "gold"),
    ]
    for name, reference in REFERENCES.items():
        gap = difference(row[f"minus_{name}"], row[f"minus_{name}_se"], significance=3.0)
        cells.append("" if row["answer"] == reference else gap)
    return cells


def show_grid(ways: Mapping[str, Way]) -> None:
    """Print gold and words of each pair of weights of two values."""
    heads = ["helpful", *(f"brief {brief:g}" for brief in BRIEF_WEIGHTS)]
    table = Table(*heads, title="Two values combined: gold ± s.e., words")
    for helpful in HELPFUL_WEIGHTS:
        cells: list[str] = []
        for brief in BRIEF_WEIGHTS:
            way = ways[mix_label(helpful, brief)]
            cells.append(f"{figure(*mean_se(way.gold))}, {_words(way):.1f} words")
        table.add_row(f"{helpful:g}", *cells)
    OUT.print(table)


def _words(way: Way) -> float:
    return math.nan if way.words is None else float(way.words.mean())


def verdicts(ways: Mapping[str, Way], names: Sequence[str], held_out: Mask) -> list[str]:
    """State in words which claims hold, for the betas that the proxy chose."""
    lines: list[str] = []
    for name in names:
        lines.append(_gain_verdict(ways[name], ways, held_out))
        lines.append(_best_of_n_verdict(ways[name], ways))
    return lines


def _gain_verdict(way: Way, ways: Mapping[str, Way], held_out: Mask) -> str:
    over_greedy = way.gold - ways["greedy"].gold
    base, base_se = mean_se(way.gold - ways["one sample"].gold)
    greedy, greedy_se = mean_se(over_greedy)
    unseen, unseen_se = mean_se(over_greedy[held_out])
    holds = base >= 3 * base_se and greedy >= 3 * greedy_se
    return (
        f"{way.answer}: raises gold over base and over greedy by at least 3 standard errors with "
        f"a proxy-trained value: "
        f"{'HOLDS' if holds else 'DOES NOT HOLD'} (base {base:+.2f} ± {base_se:.2f}, greedy "
        f"{greedy:+.2f} ± {greedy_se:.2f}; "
        f"greedy on the {held_out.sum()} questions that were not used for gradients {unseen:+.2f} "
        f"± {unseen_se:.2f})."
    )


def _best_of_n_verdict(way: Way, ways: Mapping[str, Way]) -> str:
    """Compare a way with best-of-16, and find the largest n that it reaches."""
    reference = ways["best of 16"]
    mean, error = mean_se(way.gold - reference.gold)
    reached = [n for n in SIZES[1:] if ways[f"best of {n}"].gold.mean() <= way.gold.mean()]
    share = way.tokens.mean() / reference.tokens.mean()
    return (
        f"{way.answer}: {RELATIONS[sign_of(mean, error)]} best-of-16's gold ({mean:+.2f} ± "
        f"{error:.2f}) "
        f"with {share:.1%} of its tokens; it is at or above best-of-{max(reached, default=1)}. "
        f"KL {way.kl.mean():.1f} nats, best-of-16's at most {kl_upper_bound(16):.1f}."
    )


def plot(ways: Mapping[str, Way]) -> None:
    """Plot reward against KL on the left, and gold against beta on the right."""
    mpl.use("Agg")
    plot_figure, (kl_axes, beta_axes) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    _plot_against_kl(kl_axes, ways)
    _plot_against_beta(beta_axes, ways)
    for axes in (kl_axes, beta_axes):
        axes.legend(fontsize=7)
    plot_figure.savefig(RESULTS / "vas.png", dpi=130)
    plt.close(plot_figure)


def _plot_against_kl(axes: Axes, ways: Mapping[str, Way]) -> None:
    """Plot gold (solid, with standard errors) and proxy (dashed) against KL."""
    one_sample = ways["one sample"]
    names = {
        HEAD: [label(HEAD, beta) for beta in BETAS],
        LOOKAHEAD: [label(LOOKAHEAD, beta) for beta in BETAS],
        "best of n, KL at most": [f"best of {n}" for n in SIZES[1:]],
    }
    for colour, (name, rows) in zip(("C0", "C1", "C2"), names.items(), strict=True):
        points = [one_sample, *(ways[row] for row in rows)]
        kl = [point.kl.mean() for point in points]
        proxy = [point.proxy.mean() for point in points]
        _plot_gold(axes, kl, points, color=colour, label=f"{name}: gold")
        dashes = {"color": colour, "linestyle": "--", "linewidth": 0.8, "label": f"{name}: proxy"}
        axes.plot(kl, proxy, **dashes)
    axes.set(
        xlabel="KL from the frozen model, nats per answer",
        ylabel="reward",
        title="Reward against KL",
    )


def _plot_against_beta(axes: Axes, ways: Mapping[str, Way]) -> None:
    for colour, value in (("C0", HEAD), ("C1", LOOKAHEAD)):
        sampled = [ways[label(value, beta)] for beta in BETAS]
        greedy = [ways[label(value, beta, greedy=True)] for beta in BETAS]
        _plot_gold(axes, BETAS, sampled, color=colour, label=f"{value}, sampled")
        _plot_gold(axes, BETAS, greedy, color=colour, linestyle=":", label=f"{value}, greedy")
    styles = {"one sample": "-", "greedy": "--", "best of 16": "-.", "best of 128": ":"}
    for name, style in styles.items():
        gold = ways[name].gold.mean()
        axes.axhline(gold, color="0.5", linewidth=0.8, linestyle=style, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BETAS, [f"{beta:g}" for beta in BETAS])
    axes.set(xlabel="beta", ylabel="gold reward", title="Gold against beta")


def _plot_gold(axes: Axes, x: Sequence[float], points: Sequence[Way], **style: Any) -> None:
    """Plot gold with its standard errors."""
    gold = np.array([mean_se(point.gold) for point in points])
    axes.errorbar(x, gold[:, 0], gold[:, 1], marker="o", markersize=3, linewidth=1, **style)


def introduce(held_out: Mask, seed: int) -> None:
    """Print the claim and the setup."""
    OUT.print(__doc__)
    OUT.print(
        f"{len(held_out)} questions; {DRAWS} answers to each at temperature 1, and one by greedy "
        f"decoding; best of n by the "
        f"unbiased estimator over {POOL} samples; VAS + best of {COMPOSED_N} over {COMPOSED_N}; "
        f"top {TOP_K} valued, tail kept; "
        f"seed {seed}.\n"
        "Standard errors are over questions, and differences are paired by question.\n"
        "Gold is the world's exact reward; the values were not fitted to it. The five reward "
        "models were trained on preferences "
        "by gold, of which a quarter is wrong.\n"
        f"Proxy is their uwo (weight {UNCERTAINTY_WEIGHT}): the helpful values were fitted to it, "
        f"and best-of-n selects by it.\n"
        "KL in nats is the sum over tokens of log pi - log pi_0 at temperature 1; for greedy "
        "decoding it is -log pi_0.\n"
        f"NOT held out: the world has only {QUESTIONS} questions, and the values were fitted to "
        f"replies to all of them "
        f"(seed {SAMPLING.seed}). {held_out.sum()} of these questions were not used for "
        f"gradients, although the head's epoch was "
        "chosen on them. Their gold is recorded separately, but they ask for the same facts of "
        "the same animals.\n"
        "The headline betas are chosen by the proxy, never by gold: for the sampled head by the "
        "report of its fit (values.json), "
        "for the others, which have no report, by the same rule on the proxy rewards below. The "
        "other rows are for inspection.\n",
        highlight=False,
    )


async def run(seed: int, n_prompts: int) -> None:
    """Answer the questions, print the tables, record the results, and plot them."""
    engine = config.load(None, ["engine.threads=1"]).load_engine()
    assert isinstance(engine, TransformersEngine)
    await engine.start()
    # The questions are in the order of the fit, so that its split can be reproduced.
    questions = world.prompts(QUESTIONS, SAMPLING.seed)[:n_prompts]
    split = split_by_prompt(range(QUESTIONS), HELD_OUT_SHARE, SAMPLING.seed)
    held_out = split.numpy()[:n_prompts]
    introduce(held_out, seed)
    lab = Lab(engine, measure.load(path("lm").parent), questions, seed)
    ways = {**await frozen_ways(lab), **await steered_ways(lab)}
    headline = headline_rows(ways)
    ways |= await composed_ways(lab, headline_beta())
    await engine.close()
    rows = rows_of(ways, held_out)
    show(rows)
    show_grid(ways)
    lines = verdicts(ways, headline, held_out)
    OUT.print("\n".join(lines), highlight=False)
    setup: dict[str, Any] = {
        "prompts": n_prompts,
        "held_out": int(held_out.sum()),
        "draws": DRAWS,
        "pool": POOL,
        "top_k": TOP_K,
        "uncertainty_weight": UNCERTAINTY_WEIGHT,
        "temperature": 1.0,
        "headlined": headline,
        "verdicts": lines,
    }
    baseline = "one sample, greedy, and best-of-n by the proxies that the values were fitted to"
    OUT.print("written:", record("vas", baseline=baseline, seed=seed, rows=rows, setup=setup))
    plot(ways)


def main() -> None:
    """Run from the command line."""
    options = argument_parser(__doc__, prompts=QUESTIONS).parse_args()
    torch.set_num_threads(1)
    asyncio.run(run(options.seed, options.prompts))


if __name__ == "__main__":
    main()
