"""Value Augmented Sampling on the embedded demo: what steering every token earns, what it costs, and against best-of-n.

The claim (Han et al., 2405.06639): adding value estimates to a frozen model's logits raises the reward of one answer, close to
choosing the best of up to 128 samples, at a fraction of their cost; values compose, their weights set while decoding.

    python benchmarks/alignment/vas.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.alignment.best_of_n import UNCERTAINTY_WEIGHT
from benchmarks.demo import measure
from benchmarks.demo.preference import score
from benchmarks.demo.values import SAMPLING
from benchmarks.record import RESULTS, record
from infer_align import config, objectives
from infer_align.demo import path, world
from infer_align.engines.transformers import TransformersEngine
from infer_align.fitting import HELD_OUT_SHARE
from infer_align.fitting.curve import BetaPoint, suggest_beta
from infer_align.fitting.regression import split_by_prompt
from infer_align.fitting.samples import draw_candidates
from infer_align.methods.best_of_n import expected_best, kl_upper_bound
from infer_align.types import Array, Candidate, Draw, Steering

QUESTIONS = 320  # all there are
HEAD, LOOKAHEAD, BRIEF = "helpful", "helpful-lookahead", "brief"
NAMES = {HEAD: "VAS head", LOOKAHEAD: "VAS lookahead"}
BETAS = (1.0, 2.0, 4.0, 8.0, 16.0)
HELPFUL_WEIGHTS, BRIEF_WEIGHTS = (0.0, 4.0, 16.0), (0.0, 2.0, 8.0)
TAIL_BETA = 4.0
MASK_ALONE = 1e-6  # a weight of exactly 0 is the frozen model, mask or not
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
SHOWN = (1, 2, 8, 16, 128)
POOL = 128
DRAWS = 2
COMPOSED_N = 8
COMPOSED_BETAS = (2.0, 4.0)  # and the headlined one
MAX_TOKENS = 96
REFERENCES = {"base": "one sample", "greedy": "greedy", "best_of_16": "best of 16"}
OUT = Console(width=max(136, Console().width))


@dataclass(frozen=True, slots=True)
class Way:
    """One way to answer, by its mean on each prompt: arrays are [P]."""

    answer: str
    section: str
    gold: Array
    proxy: Array
    kl: Array  # nats from the frozen model, a whole answer
    tokens: Array
    words: Array | None = None
    kl_is: Literal["measured", "at most"] = "measured"


@dataclass(frozen=True, slots=True)
class Answers:
    """n answers to each of P prompts: arrays are [P, n]."""

    gold: Array
    proxy: Array
    kl: Array
    tokens: Array
    words: Array

    def way(self, answer: str, section: str) -> Way:
        """Any one of them."""
        return Way(
            answer,
            section,
            *(a.mean(1) for a in (self.gold, self.proxy, self.kl, self.tokens, self.words)),
        )

    def best(self, n: int, answer: str, section: str) -> Way:
        """The best of n by the proxy. Its KL: what steering moved the pick by, and at most ln n - (n-1)/n for picking."""
        gold, proxy, kl, words = (
            _best(self.proxy, judge, n) for judge in (self.gold, self.proxy, self.kl, self.words)
        )
        return Way(
            answer,
            section,
            gold,
            proxy,
            kl + kl_upper_bound(n),
            n * self.tokens.mean(1),
            words,
            "at most",
        )


@dataclass(frozen=True, slots=True)
class Lab:
    """The served engine, the world's questions, and the models that judge by proxy."""

    engine: TransformersEngine
    models: measure.Models
    questions: Sequence[str]
    seed: int

    async def ask(
        self,
        beta: Mapping[str, float],
        n: int = DRAWS,
        *,
        greedy: bool = False,
        tail: Literal["keep", "mask"] = "keep",
    ) -> Answers:
        """n answers to every question, steered by `beta`; greedy: one at temperature 0. The same seeds for whatever beta."""
        n, steering = 1 if greedy else n, Steering(beta, 20, tail) if beta else None
        body = {"max_tokens": MAX_TOKENS, "temperature": float(not greedy), "logprobs": True}
        wanted = [
            Draw(
                {**body, "messages": [{"role": "user", "content": question}]},
                n,
                tuple(self.seed * 1_000_003 + i * n + j for j in range(n)),
                steering=steering,
            )
            for i, question in enumerate(self.questions)
        ]
        drawn = await asyncio.gather(*(draw_candidates(self.engine, one) for one in wanted))
        exchanges = [
            (q, c.text)
            for q, candidates in zip(self.questions, drawn, strict=True)
            for c in candidates
        ]
        members = (
            score(self.models.members, self.models.tokenizer, exchanges).numpy().astype(np.float64)
        )
        flat = [candidate for candidates in drawn for candidate in candidates]
        columns = (
            [world.gold(*exchange) for exchange in exchanges],
            objectives.uwo(members.reshape(-1, len(exchanges)), UNCERTAINTY_WEIGHT),
            [_kl(candidate, greedy=greedy) for candidate in flat],
            [candidate.completion_tokens for candidate in flat],
            [len(text.split()) for _, text in exchanges],
        )
        return Answers(
            *(np.asarray(column, dtype=np.float64).reshape(len(drawn), n) for column in columns)
        )


def _kl(candidate: Candidate, *, greedy: bool) -> float:
    """Its part in the KL: log pi - log pi_0 of the answer. Greedy decoding gives it with certainty, so there log pi is 0."""
    entries = candidate.choice["logprobs"]["content"]
    aligned = (
        0.0 if greedy else sum(entry.get("aligned_logprob", entry["logprob"]) for entry in entries)
    )
    return float(aligned - sum(entry["logprob"] for entry in entries))


def _best(selector: Array, judge: Array, n: int) -> Array:
    return np.array([expected_best(*rows, n) for rows in zip(selector, judge, strict=True)])


async def frozen(lab: Lab) -> dict[str, Way]:
    """What needs no value: one sample, greedy, best-of-n by the proxies."""
    pool = measure.draw_pool(lab.models, lab.questions, POOL, lab.seed)
    proxy = objectives.uwo(pool.proxy.reshape(len(pool.proxy), -1), UNCERTAINTY_WEIGHT).reshape(
        pool.gold.shape
    )
    tokens = pool.tokens.mean(1)
    # The pool keeps no texts, hence other samples for the words.
    words = (await lab.ask({})).words.mean(1)
    one = Way(
        "one sample",
        "frozen",
        pool.gold.mean(1),
        proxy.mean(1),
        np.zeros(len(tokens)),
        tokens,
        words,
    )
    ways = {one.answer: one, "greedy": (await lab.ask({}, greedy=True)).way("greedy", "frozen")}
    for n in SIZES[1:]:
        gold, chosen = (_best(proxy, judge, n) for judge in (pool.gold, proxy))
        bound = np.full(len(tokens), kl_upper_bound(n))
        ways[f"best of {n}"] = Way(
            f"best of {n}", "best of n", gold, chosen, bound, n * tokens, kl_is="at most"
        )
    return ways


async def steered(lab: Lab) -> dict[str, Way]:
    """VAS by beta, sampled and greedy, for both kinds of value; and what the tail does."""
    ways = {}
    for value, kind in NAMES.items():
        for greedy in (False, True):
            for beta in BETAS:
                name = label(value, beta, greedy=greedy)
                ways[name] = (await lab.ask({value: beta}, greedy=greedy)).way(
                    name, kind + ", greedy" * greedy
                )
    for beta, name in (
        (MASK_ALONE, "mask alone, top 20"),
        (TAIL_BETA, f"{label(HEAD, TAIL_BETA)}, mask"),
    ):
        ways[name] = (await lab.ask({HEAD: beta}, tail="mask")).way(name, "tail")
    return ways


def label(value: str, beta: float, *, greedy: bool = False) -> str:
    """What a row is called."""
    return f"{NAMES[value]}, beta {beta:g}{', greedy' * greedy}"


def mix(helpful: float, brief: float) -> str:
    """What a row of two values is called; with one of them alone it is that value's row."""
    if not brief:
        return label(HEAD, helpful) if helpful else "one sample"
    return f"VAS head {helpful:g} + brief {brief:g}"


async def composed(lab: Lab, headline: float) -> dict[str, Way]:
    """Two values at once on a grid of weights, and VAS with best-of-n over what it draws."""
    ways = {}
    for helpful, brief in product(HELPFUL_WEIGHTS, BRIEF_WEIGHTS[1:]):
        name = mix(helpful, brief)
        ways[name] = (await lab.ask({HEAD: helpful, BRIEF: brief})).way(name, "two values")
    for beta in dict.fromkeys((*COMPOSED_BETAS, headline)):
        name = f"{label(HEAD, beta)}, best of {COMPOSED_N}"
        ways[name] = (await lab.ask({HEAD: beta}, COMPOSED_N)).best(
            COMPOSED_N, name, "VAS + best of n"
        )
    return ways


def headlined(ways: Mapping[str, Way]) -> list[str]:
    """The row of each value and decoding that is headlined: its beta is chosen by the proxy reward, never by gold."""
    names = [label(HEAD, report_beta())]
    for value, greedy in ((HEAD, True), (LOOKAHEAD, False), (LOOKAHEAD, True)):
        found = [(beta, ways[label(value, beta, greedy=greedy)]) for beta in BETAS]
        names.append(
            label(
                value,
                suggest_beta([BetaPoint(b, *mean_se(w.proxy), *mean_se(w.kl)) for b, w in found]),
                greedy=greedy,
            )
        )
    return names


def report_beta() -> float:
    """What the head's fit suggested, from the proxy reward of steered answers; the nearest that is drawn here."""
    found = float(json.loads(path("values.json").read_text())["head"][HEAD]["suggested_beta"])
    return min(BETAS, key=lambda beta: abs(beta - found))


def rows(ways: Mapping[str, Way], held: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """The record: means with their standard errors over prompts, and differences paired by prompt."""
    made = []
    for way in ways.values():
        gold, gold_se = mean_se(way.gold)
        kl, kl_se = mean_se(way.kl)
        row = {
            "answer": way.answer,
            "section": way.section,
            "tokens": float(way.tokens.mean()),
            "gold": gold,
            "gold_se": gold_se,
        }
        row |= {
            "kl": kl,
            "kl_se": kl_se if way.kl_is == "measured" else None,
            "kl_is": way.kl_is,
            "proxy": float(way.proxy.mean()),
        }
        row["words"] = None if way.words is None else _words(way)
        row["gold_held_out"], row["gold_held_out_se"] = mean_se(way.gold[held])
        for name, reference in REFERENCES.items():
            row[f"minus_{name}"], row[f"minus_{name}_se"] = mean_se(way.gold - ways[reference].gold)
        made.append(row)
    return made


def mean_se(values: Array) -> tuple[float, float]:
    """Mean and standard error of [P] values."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def show(made: Sequence[dict[str, Any]]) -> None:
    """The table; a difference in bold is more than three standard errors from zero."""
    heads = (
        "answer",
        "tokens",
        "words",
        "KL, nats",
        "proxy",
        "gold",
        "- base",
        "- greedy",
        "- best of 16",
    )
    table = Table(
        *heads,
        title="Gold reward of the answer and its differences, ± standard error; tokens spent for one answer",
    )
    table.columns[0].no_wrap = True
    shown = [
        row
        for row in made
        if row["section"] != "best of n" or row["answer"] in {f"best of {n}" for n in SHOWN}
    ]
    for i, row in enumerate(shown):
        kl = (
            f"<= {row['kl']:.2f}"
            if row["kl_is"] == "at most"
            else f"{row['kl']:.2f} ± {row['kl_se']:.2f}"
        )
        cells = [
            row["answer"],
            f"{row['tokens']:.0f}",
            "" if row["words"] is None else f"{row['words']:.1f}",
            kl,
        ]
        cells += [f"{row['proxy']:.2f}", f"{row['gold']:.2f} ± {row['gold_se']:.2f}"]
        cells += [
            "" if row["answer"] == reference else difference(row, name)
            for name, reference in REFERENCES.items()
        ]
        table.add_row(
            *cells, end_section=row["section"] != shown[min(i + 1, len(shown) - 1)]["section"]
        )
    OUT.print(table)


def difference(row: dict[str, Any], name: str) -> str:
    """A paired difference, for the terminal."""
    value, error = row[f"minus_{name}"], row[f"minus_{name}_se"]
    return f"[{'bold' if abs(value) > 3 * error else 'dim'}]{value:+.2f} ± {error:.2f}[/]"


def show_grid(ways: Mapping[str, Way]) -> None:
    """Two values at once: gold and words of each pair of weights."""
    table = Table(
        "helpful",
        *(f"brief {brief:g}" for brief in BRIEF_WEIGHTS),
        title="Two values composed: gold ± s.e., words",
    )
    for helpful in HELPFUL_WEIGHTS:
        cells = [ways[mix(helpful, brief)] for brief in BRIEF_WEIGHTS]
        said = [
            f"{way.gold.mean():.2f} ± {mean_se(way.gold)[1]:.2f}, {_words(way):.1f} words"
            for way in cells
        ]
        table.add_row(f"{helpful:g}", *said)
    OUT.print(table)


def _words(way: Way) -> float:
    return math.nan if way.words is None else float(way.words.mean())


def verdicts(ways: Mapping[str, Way], names: Sequence[str], held: NDArray[np.bool_]) -> list[str]:
    """Which claims hold, in words, for the betas that the proxy chose."""
    said = []
    for way in (ways[name] for name in names):
        raised = [mean_se(way.gold - ways[name].gold) for name in ("one sample", "greedy")]
        holds = all(mean >= 3 * error for mean, error in raised)
        (base, base_se), (greedy, greedy_se) = raised
        unseen, unseen_se = mean_se((way.gold - ways["greedy"].gold)[held])
        said.append(
            f"{way.answer}: raises gold over base and over greedy by at least 3 standard errors with a proxy-trained value: "
            f"{'HOLDS' if holds else 'DOES NOT HOLD'} (base {base:+.2f} ± {base_se:.2f}, greedy {greedy:+.2f} ± {greedy_se:.2f}; "
            f"greedy on the {held.sum()} questions kept from the fit {unseen:+.2f} ± {unseen_se:.2f})."
        )
        said.append(against_best_of_n(way, ways))
    return said


def against_best_of_n(way: Way, ways: Mapping[str, Way]) -> str:
    """The true relation to best-of-n: the difference to 16, the tokens, and which n it is worth."""
    reference = ways["best of 16"]
    mean, error = mean_se(way.gold - reference.gold)
    relation = (
        "exceeds"
        if mean > 2 * error
        else "equals, within 2 standard errors,"
        if mean >= -2 * error
        else "DOES NOT REACH"
    )
    worth = max(
        (n for n in SIZES[1:] if ways[f"best of {n}"].gold.mean() <= way.gold.mean()), default=1
    )
    share = way.tokens.mean() / reference.tokens.mean()
    return (
        f"{way.answer}: {relation} best-of-16's gold ({mean:+.2f} ± {error:.2f}) with {share:.1%} of its tokens; it is at or above "
        f"best-of-{worth}. KL {way.kl.mean():.1f} nats, best-of-16's at most {kl_upper_bound(16):.1f}."
    )


def plot(ways: Mapping[str, Way]) -> None:
    """Left: gold (solid, with standard errors) and proxy (dashed) against KL. Right: gold against beta."""
    mpl.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    by_n = [ways["one sample"], *(ways[f"best of {n}"] for n in SIZES[1:])]
    curves = {
        value: [ways["one sample"], *(ways[label(value, beta)] for beta in BETAS)]
        for value in (HEAD, LOOKAHEAD)
    }
    for colour, (name, points) in zip(
        ("C0", "C1", "C2"), (curves | {"best of n, KL at most": by_n}).items(), strict=True
    ):
        kls = [point.kl.mean() for point in points]
        errors(left, kls, points, color=colour, label=f"{name}: gold")
        left.plot(
            kls,
            [point.proxy.mean() for point in points],
            color=colour,
            linestyle="--",
            linewidth=0.8,
            label=f"{name}: proxy",
        )
    left.set(
        xlabel="KL from the frozen model, nats an answer",
        ylabel="reward",
        title="Reward against KL",
    )
    for colour, value in zip(("C0", "C1"), curves, strict=True):
        errors(right, BETAS, curves[value][1:], color=colour, label=f"{value}, sampled")
        greedy = [ways[label(value, beta, greedy=True)] for beta in BETAS]
        errors(right, BETAS, greedy, color=colour, linestyle=":", label=f"{value}, greedy")
    for name, style in (
        ("one sample", "-"),
        ("greedy", "--"),
        ("best of 16", "-."),
        ("best of 128", ":"),
    ):
        right.axhline(
            ways[name].gold.mean(), color="0.5", linewidth=0.8, linestyle=style, label=name
        )
    right.set_xscale("log", base=2)
    right.set_xticks(BETAS, [f"{beta:g}" for beta in BETAS])
    right.set(xlabel="beta", ylabel="gold reward", title="Gold against beta")
    for axes in (left, right):
        axes.legend(fontsize=7)
    figure.savefig(RESULTS / "vas.png", dpi=130)
    plt.close(figure)


def errors(axes: Axes, x: Sequence[float], points: Sequence[Way], **style: Any) -> None:
    """Gold with its standard errors."""
    gold = np.array([mean_se(point.gold) for point in points])
    axes.errorbar(x, gold[:, 0], gold[:, 1], marker="o", markersize=3, linewidth=1, **style)


def introduce(held: NDArray[np.bool_], seed: int) -> None:
    """What is claimed, and what was done to see."""
    OUT.print(__doc__)
    kept = int(held.sum())
    OUT.print(
        f"""{len(held)} questions; {DRAWS} answers to each at temperature 1, one by greedy decoding; best of n by the unbiased
estimator over {POOL} samples; VAS + best of {COMPOSED_N} over {COMPOSED_N}; top 20 valued, tail kept; seed {seed}.
Standard errors are over questions, differences paired by question.
Gold is the world's exact reward, which the values never saw; the five reward
models saw preferences by it of which a quarter is wrong. Proxy: their uwo (weight {UNCERTAINTY_WEIGHT}), which the helpful
values were fitted to and best-of-n selects by. KL in nats: the sum over tokens of log pi - log pi_0 at temperature 1;
greedy decoding is certain of its answer, so there it is -log pi_0.
NOT held out: the world has only {QUESTIONS} questions, and the values were made from replies to all of them (seed
{SAMPLING.seed}). {kept} of these were kept from the gradients, though the head's epoch was chosen on them; their gold is recorded
apart, but they ask for the same facts of the same animals.
The headlined betas are chosen by the proxy, never by gold: for the sampled head by its fit's report (values.json); for
the others, which have no report, by the same rule on the proxy rewards below. The other rows are there to be looked at.
""",
        highlight=False,
    )


async def run(seed: int, n_prompts: int) -> None:
    """Draw, tabulate, judge, record, plot."""
    engine = config.load(None, ["engine.threads=1"]).load_engine()
    assert isinstance(engine, TransformersEngine)
    await engine.start()
    # The order in which the fit saw them, so that its split can be made again.
    questions = world.prompts(QUESTIONS, SAMPLING.seed)[:n_prompts]
    held = split_by_prompt(range(QUESTIONS), HELD_OUT_SHARE, SAMPLING.seed).numpy()[:n_prompts]
    introduce(held, seed)
    lab = Lab(engine, measure.load(path("lm").parent), questions, seed)
    ways = await frozen(lab) | await steered(lab)
    names = headlined(ways)
    ways |= await composed(lab, report_beta())
    await engine.close()
    made = rows(ways, held)
    show(made)
    show_grid(ways)
    said = verdicts(ways, names, held)
    OUT.print("\n".join(said), highlight=False)
    setup: dict[str, Any] = {
        "prompts": n_prompts,
        "held_out": int(held.sum()),
        "draws": DRAWS,
        "pool": POOL,
        "top_k": 20,
    }
    setup |= {
        "uncertainty_weight": UNCERTAINTY_WEIGHT,
        "temperature": 1.0,
        "headlined": names,
        "verdicts": said,
    }
    baseline = "one sample, greedy, and best-of-n by the proxies that the values were fitted to"
    OUT.print(f"written: {record('vas', baseline=baseline, seed=seed, rows=made, setup=setup)}")
    plot(ways)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=QUESTIONS)
    parser.add_argument("--seed", type=int, default=2024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    asyncio.run(run(options.seed, options.prompts))


if __name__ == "__main__":
    main()
