"""Selection on the embedded demo: shapes of rewards, lotteries, cycles, groups and length.

Four claims. (1) A reward on a wrong scale ruins a weighted sum, and shapes repair it (PAR, Fu et
al., 2502.18770). (2) Harder selection by one over-optimised proxy lowers the true reward, and
chi-squared pessimism does not fall (Huang et al., 2503.21878). (3) Where one candidate beats every
other one, the minimax lottery is that candidate (Swamy et al., 2401.04056), and maxmin serves the
worst group (Chakraborty et al., 2402.08925). (4) Comparing by quality and then by length shortens
answers without a scale to tune (HERON, 2306.00186).

    python benchmarks/alignment/selection.py

Every figure is made by the selection of the server's own flow, from scores that are drawn once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from rich.table import Table

from benchmarks.alignment.report import OUT, argument_parser, figure, mean_se, row_figure
from benchmarks.demo.effects import flat_exchanges
from benchmarks.demo.measure import Models, load
from benchmarks.demo.preference import score
from benchmarks.demo.sampling import Reply, sample
from benchmarks.record import RESULTS, record
from infer_align.config.align import parse_align
from infer_align.demo import path, world
from infer_align.flow.plan import Plan
from infer_align.flow.rules import Highest
from infer_align.flow.scorers import Scorer
from infer_align.flow.selection import select
from infer_align.methods import PlanDraft
from infer_align.rewards.rules import Rules
from infer_align.types import Array, Candidate, Draw, Scores, Selection

SAMPLES = 512
SIZES = (8, 16, 32, 64, 128, 256, 512)
# At most this many disjoint pools of n answers per question.
POOLS = 4
SEED = 61_409
WRONG_SCALE = 20.0
SHAPES: dict[str, dict[str, Any]] = {
    "plain sum": {"shape": "raw"},
    "standardize": {"shape": "standardize"},
    "rank": {"shape": "rank"},
    "par, all others": {"shape": "par"},
    "par, 10 references": {"shape": "par", "references": 10},
    "cap at 0.9": {"shape": "cap", "at": 0.9},
    "cap at 0.8": {"shape": "cap", "at": 0.8},
}
PROXY_RULES: dict[str, dict[str, Any]] = {
    "argmax": {},
    "tilted 0.5": {"select": {"rule": "tilted", "beta": 0.5}},
    "pessimistic 0.05": {"select": {"rule": "pessimistic", "beta": 0.05}},
    "pessimistic 0.1": {"select": {"rule": "pessimistic", "beta": 0.1}},
    "pessimistic 0.2": {"select": {"rule": "pessimistic", "beta": 0.2}},
    "cap at 0.9": {"compose": {"proxy": {"shape": "cap", "at": 0.9}}},
}
GROUP_RULES: dict[str, dict[str, Any]] = {
    "argmax": {},
    "win_rate": {"select": {"rule": "win_rate"}},
    "minimax": {"select": {"rule": "minimax"}},
    "maxmin": {"select": {"rule": "maxmin"}},
    "maxmin, regret": {"select": {"rule": "maxmin", "regret": True}},
}
# How many of a population belong to each group.
POPULATIONS = {
    "0.7/0.15/0.15": {"brief": 0.7, "ornate": 0.15, "polite": 0.15},
    "equal": {"brief": 1.0, "ornate": 1.0, "polite": 1.0},
}
LENGTH_RULES: dict[str, dict[str, Any]] = {
    "quality alone": {"rewards": {"quality": 1.0}},
    "sum, brevity 1": {"rewards": {"quality": 1.0, "brief": 1.0}},
    "sum, brevity 0.05": {"rewards": {"quality": 1.0, "brief": 0.05}},
    "lexicographic 0.25": {"select": {"rule": "lexicographic", "margin": 0.25}},
    "lexicographic 0.5": {"select": {"rule": "lexicographic", "margin": 0.5}},
    "shortest 0.25": {
        "rewards": {"quality": 1.0},
        "select": {"rule": "shortest", "within": 0.25},
    },
    "shortest 0.5": {
        "rewards": {"quality": 1.0},
        "select": {"rule": "shortest", "within": 0.5},
    },
}
GROUP_SIZE = 16
# Stands for every reward: the scores are made beforehand.
SCORED = Rules(words_weight=-1.0).load()
LENGTH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Answers:
    """N scored answers to each of P questions."""

    candidates: list[list[Candidate]]  # [P][N]
    gold: Array  # [P, N]
    members: Array  # [K, P, N]: the scores of the reward models
    tokens: Array  # [P, N]
    traits: Mapping[str, Array]  # group -> [P, N]: what it likes
    greedy_gold: Array  # [P]
    greedy_tokens: Array  # [P]

    def pools(self, n: int) -> Iterator[tuple[int, slice]]:
        """Yield disjoint pools of n answers: question and slice."""
        for question in range(len(self.gold)):
            for start in range(0, n * min(POOLS, SAMPLES // n), n):
                yield question, slice(start, start + n)


def draw(models: Models, questions: Sequence[str], seed: int) -> Answers:
    """Sample the answers and the greedy one to each question, and score them."""
    sampled = sample(models.lm, models.tokenizer, questions, SAMPLES, seed=seed)
    greedy = sample(models.lm, models.tokenizer, questions, 1, seed=seed, greedy=True)
    members = score(models.members, models.tokenizer, flat_exchanges(questions, sampled)).numpy()
    shape = (len(questions), SAMPLES)
    texts = [[text for text, _ in row] for row in sampled]
    lengths = np.array([[length for _, length in row] for row in sampled], dtype=np.float64)
    greedy_gold = [world.gold(q, row[0][0]) for q, row in zip(questions, greedy, strict=True)]
    gold = [[world.gold(q, text) for text in row] for q, row in zip(questions, texts, strict=True)]
    return Answers(
        candidates=[_candidates(row) for row in sampled],
        gold=np.array(gold),
        members=members.astype(np.float64).reshape(-1, *shape),
        tokens=lengths,
        traits=_traits(questions, texts, lengths),
        greedy_gold=np.array(greedy_gold),
        greedy_tokens=np.array([row[0][1] for row in greedy], dtype=np.float64),
    )


def _candidates(replies: Sequence[Reply]) -> list[Candidate]:
    made: list[Candidate] = []
    for i, (text, length) in enumerate(replies):
        made.append(Candidate(i, {"text": text}, completion_tokens=length))
    return made


def _traits(
    questions: Sequence[str], texts: Sequence[Sequence[str]], lengths: Array
) -> dict[str, Array]:
    ornate = np.zeros(lengths.shape)
    polite = np.zeros(lengths.shape)
    for p, question in enumerate(questions):
        parsed = world.read_question(question)
        if parsed is None:
            raise ValueError(f"not a question of the demo: {question}")
        for i, text in enumerate(texts[p]):
            traits = world.read(parsed, text)
            ornate[p, i] = traits.flourishes
            polite[p, i] = int(traits.polite) - int(traits.rude)
    return {"brief": -lengths, "ornate": ornate, "polite": polite}


def selected(
    answers: Answers, question: int, pool: slice, scores: Mapping[str, Array], plan: Plan
) -> Selection:
    """Return the selection of the flow among a pool of answers.

    Args:
        answers: all answers.
        question: its index.
        pool: of the answers to it.
        scores: reward -> [K, n] scores of its members in this pool.
        plan: from `plan_of`.
    """
    candidates = answers.candidates[question][pool]
    numbered = [replace(candidate, index=i) for i, candidate in enumerate(candidates)]
    notes = dict.fromkeys(scores, (None,) * len(numbered))
    return select(plan, numbered, Scores(members=dict(scores), notes=notes))


def plan_of(align: Mapping[str, Any], rewards: Sequence[str], n: int) -> Plan:
    """Return the plan of an `align` object; without its own `rewards` each has weight 1."""
    parsed = parse_align(dict(align))
    draft = PlanDraft((Draw({}, n),))
    for method in parsed.methods.values():
        draft = method.apply(draft)
    weights = parsed.rewards or dict.fromkeys(rewards, 1.0)
    return Plan(
        draft.draws,
        scorers=tuple(Scorer(name, SCORED, weight) for name, weight in weights.items()),
        composition=draft.composition,
        rule=draft.rule or Highest(),
        selects=True,
    )


def worth(selection: Selection, values: Array) -> float:
    """Return the expected value of the returned answer: [n] values of the pool."""
    if selection.distribution is not None:
        return float(np.array(selection.distribution) @ values)
    return float(values[selection.ranking[0]])


def by_question(answers: Answers, n: int, values: Sequence[float]) -> Array:
    """Return the mean over the pools of each question: [P]."""
    return np.asarray(np.reshape(values, (len(answers.gold), -1)).mean(1))


def wrong_scale(answers: Answers, n: int) -> Iterator[dict[str, Any]]:
    """Multiply each member by 20 in turn, and sum all five under every shape."""
    count = len(answers.members)
    names = [f"member-{k}" for k in range(count)]
    for name, shape in SHAPES.items():
        plan = plan_of({"compose": dict.fromkeys(names, shape)}, names, n)
        golds: list[Array] = []
        for wrong in range(count):
            factors = np.where(np.arange(count) == wrong, WRONG_SCALE, 1.0)
            values: list[float] = []
            for question, pool in answers.pools(n):
                rows = answers.members[:, question, pool] * factors[:, None]
                scores = {member: rows[[k]] for k, member in enumerate(names)}
                selection = selected(answers, question, pool, scores, plan)
                values.append(worth(selection, answers.gold[question, pool]))
            golds.append(by_question(answers, n, values))
        yield row(f"one of five x 20, {name}", "scale", n, answers, np.mean(golds, axis=0))


def one_proxy(answers: Answers, n: int) -> Iterator[dict[str, Any]]:
    """Select by each member alone, under every rule."""
    for name, align in PROXY_RULES.items():
        plan = plan_of(align, ["proxy"], n)
        golds: list[Array] = []
        for member in answers.members:
            values: list[float] = []
            for question, pool in answers.pools(n):
                scores = {"proxy": member[[question], pool]}
                selection = selected(answers, question, pool, scores, plan)
                values.append(worth(selection, answers.gold[question, pool]))
            golds.append(by_question(answers, n, values))
        yield row(f"one proxy, {name}", "proxy", n, answers, np.mean(golds, axis=0))


def baselines(answers: Answers, n: int) -> Iterator[dict[str, Any]]:
    """Select by all five members, and by gold itself."""
    plan = plan_of({}, ["quality"], n)
    for name in ("uwo of five", "gold oracle"):
        values: list[float] = []
        for question, pool in answers.pools(n):
            scores = {"quality": answers.members[:, question, pool]}
            if name == "gold oracle":
                scores = {"quality": answers.gold[[question], pool]}
            selection = selected(answers, question, pool, scores, plan)
            values.append(worth(selection, answers.gold[question, pool]))
        yield row(name, "baseline", n, answers, by_question(answers, n, values))


def groups(answers: Answers, n: int) -> Iterator[dict[str, Any]]:
    """Serve three groups that like different traits, in two populations."""
    for population, shares in POPULATIONS.items():
        shapes = {group: {"shape": "standardize"} for group in shares}
        made: dict[str, list[Selection]] = {}
        for name, rule in GROUP_RULES.items():
            plan = plan_of({**rule, "rewards": shares, "compose": shapes}, [], n)
            made[name] = []
            for question, pool in answers.pools(n):
                scores = {g: trait[[question], pool] for g, trait in answers.traits.items()}
                made[name].append(selected(answers, question, pool, scores, plan))
        for name, selections in made.items():
            yield {
                "answer": f"groups {population}, {name}",
                "section": "groups",
                "n": n,
                "tokens": n * float(answers.tokens.mean()),
                **_group_figures(answers, n, selections, list(shares)),
                **_pair_figures(answers, n, selections, made["minimax"]),
            }


def _group_figures(
    answers: Answers, n: int, selections: Sequence[Selection], names: Sequence[str]
) -> dict[str, float]:
    """Return the mean utility of each group with its standard error, and of the worst one."""
    figures: dict[str, float] = {}
    for name in names:
        utilities = [worth(selection, selection.composed[name]) for selection in selections]
        mean, error = mean_se(by_question(answers, n, utilities))
        figures |= {name: mean, f"{name}_se": error}
    figures["worst_group"] = min(figures[name] for name in names)
    return figures


def _pair_figures(
    answers: Answers, n: int, selections: Sequence[Selection], judged: Sequence[Selection]
) -> dict[str, float | None]:
    """Return how often a Condorcet winner exists and is returned, and the worst case of pairs.

    Args:
        answers: all answers.
        n: size of the pools.
        selections: of a rule, one per pool.
        judged: of the minimax lottery, which compares pairs in every pool.
    """
    winners = 0
    chosen = 0
    worst: list[float] = []
    pools = answers.pools(n)
    for (question, pool), selection, lottery in zip(pools, selections, judged, strict=True):
        if selection.pairwise and selection.worst_case is not None:
            worst.append(selection.worst_case)
        if lottery.condorcet is None:
            continue
        winners += 1
        candidates = answers.candidates[question][pool]
        # Copies of the winner are the winner.
        chosen += candidates[selection.ranking[0]].text == candidates[lottery.condorcet].text
    return {
        "condorcet_share": winners / len(selections),
        "condorcet_chosen": chosen / winners if winners else None,
        "worst_case_win": float(np.mean(worst)) if worst else None,
    }


def lengths(answers: Answers, n: int) -> Iterator[dict[str, Any]]:
    """Prefer quality, and brevity among answers of like quality."""
    for name, align in LENGTH_RULES.items():
        used = list(align.get("rewards", ("quality", "brief")))
        plan = plan_of(align, used, n)
        golds: list[float] = []
        sizes: list[float] = []
        for question, pool in answers.pools(n):
            quality = answers.members[:, question, pool]
            scores = {"quality": quality, "brief": answers.traits["brief"][[question], pool]}
            scored = {reward: scores[reward] for reward in used}
            selection = selected(answers, question, pool, scored, plan)
            golds.append(worth(selection, answers.gold[question, pool]))
            sizes.append(worth(selection, answers.tokens[question, pool]))
        made = row(f"length, {name}", "length", n, answers, by_question(answers, n, golds))
        size, error = mean_se(by_question(answers, n, sizes))
        yield {**made, "returned_tokens": size, "returned_tokens_se": error}


def row(answer: str, section: str, n: int, answers: Answers, gold: Array) -> dict[str, Any]:
    """Return one row; the difference to greedy decoding is paired by question."""
    mean, error = mean_se(gold)
    difference, difference_error = mean_se(gold - answers.greedy_gold)
    return {
        "answer": answer,
        "section": section,
        "n": n,
        "tokens": n * float(answers.tokens.mean()),
        "gold": mean,
        "gold_se": error,
        "minus_greedy": difference,
        "minus_greedy_se": difference_error,
        "by_question": gold,
    }


def measure(answers: Answers) -> list[dict[str, Any]]:
    """Return all rows."""
    greedy = row("greedy", "frozen", 1, answers, answers.greedy_gold)
    greedy["tokens"] = float(answers.greedy_tokens.mean())
    rows = [row("one sample", "frozen", 1, answers, answers.gold.mean(1)), greedy]
    for n in SIZES:
        rows += [*baselines(answers, n), *one_proxy(answers, n)]
    for n in (8, 64):
        rows += wrong_scale(answers, n)
    rows += groups(answers, GROUP_SIZE)
    rows += lengths(answers, LENGTH_SIZE)
    return rows


def falls(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return how far each rule over one proxy ends below its best n, with the standard error.

    The differences are paired by question. The gold of each question is taken out of the rows.
    """
    curves: dict[str, list[Array]] = {}
    for made in rows:
        gold = made.pop("by_question", None)
        if made["section"] == "proxy":
            curves.setdefault(made["answer"], []).append(gold)
    ends: dict[str, tuple[float, float]] = {}
    for name, curve in curves.items():
        best = max(curve, key=lambda gold: gold.mean())
        ends[name] = mean_se(best - curve[-1])
    return ends


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the tables."""
    table = Table("answer", "n", "tokens", "gold", "gold - greedy", "tokens returned")
    for made in rows:
        if made["section"] == "groups":
            continue
        minus = figure(made["minus_greedy"], made["minus_greedy_se"])
        cells = [made["answer"], str(made["n"]), f"{made['tokens']:.0f}", row_figure(made, "gold")]
        table.add_row(*cells, minus, row_figure(made, "returned_tokens"))
    OUT.print(table)
    heads = ("answer", *POPULATIONS["equal"], "worst group", "Condorcet", "chosen", "worst case")
    table = Table(*heads, title="Standardized utility of three groups")
    for made in rows:
        if made["section"] != "groups":
            continue
        cells = [row_figure(made, group) for group in POPULATIONS["equal"]]
        shares = [f"{made[name]:.2f}" for name in ("condorcet_share", "condorcet_chosen")]
        case = "" if made["worst_case_win"] is None else f"{made['worst_case_win']:.3f}"
        table.add_row(made["answer"], *cells, f"{made['worst_group']:.2f}", *shares, case)
    OUT.print(table)


def plot(rows: Sequence[Mapping[str, Any]]) -> None:
    """Plot gold against n for every rule over one proxy, with its baselines."""
    mpl.use("Agg")
    plot_figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for made in rows:
        if made["section"] in {"proxy", "baseline"} and made["answer"] != "gold oracle":
            curves.setdefault(made["answer"], []).append(made)
    for name, points in curves.items():
        gold = [point["gold"] for point in points]
        errors = [point["gold_se"] for point in points]
        axes.errorbar(SIZES, gold, errors, marker="o", markersize=3, label=name)
    axes.axhline(rows[1]["gold"], color="0.5", linewidth=0.8, label="greedy")
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(n) for n in SIZES])
    axes.set(
        xlabel="n, answers drawn",
        ylabel="gold reward of the returned answer",
        title="Selection by one reward model, trained on 25% wrong preferences",
    )
    axes.legend(fontsize=7, ncols=2)
    plot_figure.savefig(RESULTS / "selection.png", dpi=130)


def main() -> None:
    """Run from the command line."""
    parser = argument_parser(__doc__, prompts=128)
    parser.set_defaults(seed=SEED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    OUT.print(__doc__)
    questions = world.prompts(options.prompts, options.seed)
    answers = draw(load(path("lm").parent), questions, options.seed)
    rows = measure(answers)
    ends = falls(rows)
    show(rows)
    for name, end in ends.items():
        OUT.print(f"{name}: {figure(*end)} below its best n at n = {SIZES[-1]}")
    setup = {
        "prompts": options.prompts,
        "samples": SAMPLES,
        "temperature": 1.0,
        "pools_per_question": POOLS,
        "wrong_scale": WRONG_SCALE,
        "lotteries": "the expectation over their distribution",
        "fall_from_best_n": ends,
    }
    baseline = "one sample, greedy, the uwo of five members and the gold oracle at the same n"
    where = record("selection", baseline=baseline, seed=options.seed, rows=rows, setup=setup)
    OUT.print("written:", where)
    plot(rows)


if __name__ == "__main__":
    main()
