"""Readings of a judge on the embedded demo: the label it would write, and its label probabilities.

The claim (TrustJudge, 2509.21117): scores that are expectations over the judge's label
probabilities, and comparisons that add the probabilities of both orders, contradict each other and
themselves less, and agree better with the truth.

    python benchmarks/alignment/trust_judge.py
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.alignment.flow import Flow, serving, texts
from benchmarks.alignment.report import OUT, argument_parser, mean_se, row_figure, sign_of
from benchmarks.record import record
from infer_align.decoding.labels import LabelQuery
from infer_align.demo import world
from infer_align.methods.trust_judge import Readout
from infer_align.rewards.trust_judge import (
    Reading,
    conflict_ratio,
    expected_score,
    nontransitivity,
    relation,
)
from infer_align.rewards.trust_judge.prompts import (
    BETTER,
    SCALES,
    SCORE,
    SIDES,
    labels,
    pair_messages,
    score_messages,
)
from infer_align.rewards.trust_judge.readings import Relation, Rule, mass
from infer_align.types import Array, Messages

RULES: tuple[Rule, ...] = get_args(Rule)
SUBSETS = (3, 4, 5)
# With less probability than this on its labels, the judge has refused.
MIN_MASS = 0.5
SIGNS = {"larger": 1, "equal": 0, "smaller": -1}
WORDS = {1: "HOLDS", 0: "NO DIFFERENCE within two standard errors", -1: "THE OPPOSITE HOLDS"}
EXPECTED_100 = "expected, 1-100"
LIKELIEST_100 = "likeliest label, 1-100"
EXPECTED_5 = "expected, 1-5"
LIKELIEST_5 = "likeliest label, 1-5"

Pair = tuple[int, int]
Orders = tuple[Reading, Reading]  # both orders of a pair


@dataclass(frozen=True, slots=True)
class Judged:
    """All judgements of the N answers to one question."""

    gold: Array  # [N]
    # [N] polite, rude, flourishes. Answers with equal manners differ in facts alone.
    manners: Sequence[tuple[bool, bool, int]]
    scores: Mapping[str, Array]  # readout -> [N]; NaN if the judge refused
    relations: Mapping[Rule, Mapping[Pair, Relation]]
    refused: float  # share of all readings
    lean: (
        float  # share of readings that prefer the first answer, minus those that prefer the second
    )

    @property
    def pairs(self) -> list[Pair]:
        """Return all pairs of answers."""
        return list(combinations(range(len(self.gold)), 2))

    @property
    def truth(self) -> NDArray[np.float64]:
        """Return the sign of each pair by gold."""
        return self._signs(self.gold)

    def score_signs(self, readout: str) -> NDArray[np.float64]:
        """Return the sign of each pair by the scores of a readout."""
        return self._signs(self.scores[readout])

    def relation_signs(self, rule: Rule) -> NDArray[np.float64]:
        """Return the sign of each pair by the comparisons."""
        return np.array([float(SIGNS[self.relations[rule][pair]]) for pair in self.pairs])

    def conflicts(self, readout: str, rule: Rule) -> float:
        """Return the conflict ratio of scores and comparisons."""
        scores = dict(enumerate(self.scores[readout].tolist()))
        return conflict_ratio(scores, self.relations[rule])

    def _signs(self, values: Array) -> NDArray[np.float64]:
        return np.sign([values[i] - values[j] for i, j in self.pairs])


async def judge(flow: Flow, question: str, answers: Sequence[str]) -> Judged:
    """Score every answer on every scale, and compare every pair in both orders."""
    messages = [{"role": "user", "content": question}]
    single: dict[int, list[Reading]] = {}
    for scale in SCALES:
        single[scale] = await _read_scores(flow, messages, answers, scale)
    orders = await _read_comparisons(flow, messages, answers)
    compared = list(chain.from_iterable(orders.values()))
    readings = [*chain.from_iterable(single.values()), *compared]
    refused = [mass(reading.probs, dict(reading.probs)) < MIN_MASS for reading in readings]
    preferred = [reading.probs[0][0] for reading in compared]
    gold = [world.gold(question, text) for text in answers]
    return Judged(
        gold=np.array(gold),
        manners=[_manners(question, text) for text in answers],
        scores=_scores(single),
        relations={rule: _relations(orders, rule) for rule in RULES},
        refused=float(np.mean(refused)),
        lean=(preferred.count("A") - preferred.count("B")) / len(preferred),
    )


async def _read_scores(
    flow: Flow, messages: Messages, answers: Sequence[str], scale: int
) -> list[Reading]:
    """Read the score of every answer."""
    prompts = [score_messages(messages, text, scale) for text in answers]
    return await asyncio.gather(*(_read(flow, each, SCORE, labels(scale)) for each in prompts))


async def _read_comparisons(
    flow: Flow, messages: Messages, answers: Sequence[str]
) -> dict[Pair, Orders]:
    """Read the comparison of every pair in both orders."""
    pairs = list(combinations(range(len(answers)), 2))
    prompts: list[list[dict[str, Any]]] = []
    for i, j in pairs:
        prompts.append(pair_messages(messages, answers[i], answers[j]))
        prompts.append(pair_messages(messages, answers[j], answers[i]))
    readings = await asyncio.gather(*(_read(flow, each, BETTER, SIDES) for each in prompts))
    orders = zip(readings[::2], readings[1::2], strict=True)
    return dict(zip(pairs, orders, strict=True))


def _manners(question: str, answer: str) -> tuple[bool, bool, int]:
    parsed = world.read_question(question)
    assert parsed is not None
    traits = world.read(parsed, answer)
    return traits.polite, traits.rude, traits.flourishes


async def _read(
    flow: Flow, messages: list[dict[str, Any]], prefix: str, valid: tuple[str, ...]
) -> Reading:
    answer = await flow.engine.read_labels(LabelQuery(messages, prefix, valid))
    probs = [(label, math.exp(answer.logprobs[label])) for label in valid]
    probs.sort(key=lambda pair: -pair[1])
    return Reading(probs, math.log(probs[0][1]), 1)


def _relations(orders: Mapping[Pair, Orders], rule: Rule) -> dict[Pair, Relation]:
    return {pair: relation(*readings, rule) for pair, readings in orders.items()}


def _scores(single: Mapping[int, Sequence[Reading]]) -> dict[str, Array]:
    """Return the scores [N] by each readout; NaN if the judge refused."""
    scores: dict[str, Array] = {}
    for scale, readings in single.items():
        refused = [mass(reading.probs, labels(scale)) < MIN_MASS for reading in readings]
        likeliest = np.array([float(reading.probs[0][0]) for reading in readings])
        scores[f"likeliest label, 1-{scale}"] = np.where(refused, math.nan, likeliest)
        readouts: tuple[Readout, ...] = get_args(Readout) if scale == 100 else ("expected",)
        for readout in readouts:
            values = np.array([expected_score(each.probs, scale, readout) for each in readings])
            scores[f"{readout}, 1-{scale}"] = np.where(refused, math.nan, values)
    return scores


def score_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Return one row per readout of single scores."""
    rows: list[dict[str, Any]] = []
    for readout in judged[0].scores:
        row: dict[str, Any] = {"kind": "score", "readout": readout}
        signs = [each.score_signs(readout) for each in judged]
        _add_accuracy(row, judged, signs)
        rules: tuple[Rule, ...] = ("first_label", "likelihood")
        for rule in rules:
            _add(row, f"conflicts_{rule}", [each.conflicts(readout, rule) for each in judged])
        rows.append(row)
    return rows


def relation_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Return one row per rule of comparisons."""
    rows: list[dict[str, Any]] = []
    for rule in RULES:
        row: dict[str, Any] = {"kind": "relation", "readout": rule}
        _add_accuracy(row, judged, [each.relation_signs(rule) for each in judged])
        for k in SUBSETS:
            shares = [nontransitivity(each.relations[rule], k) for each in judged]
            _add(row, f"nontransitivity_{k}", shares)
        rows.append(row)
    return rows


def _add_accuracy(
    row: dict[str, Any], judged: Sequence[Judged], signs: Sequence[NDArray[np.float64]]
) -> None:
    pairs = zip(signs, judged, strict=True)
    _add(row, "accuracy", [_accuracy(sign, each.truth) for sign, each in pairs])
    _add(row, "ties", [float(np.mean(sign == 0)) for sign in signs])


def _add(row: dict[str, Any], name: str, per_question: Sequence[float]) -> None:
    row[name], row[f"{name}_se"] = _mean_se_of_known(per_question)


def _mean_se_of_known(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error of the values that are not NaN."""
    array = np.array(values)
    return mean_se(array[~np.isnan(array)])


def _accuracy(signs: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """Return the accuracy over pairs with different gold. A tie counts as half."""
    decided = (truth != 0) & ~np.isnan(signs)
    if not decided.any():
        return math.nan
    points = np.where(signs == 0, 0.5, signs == truth)
    return float(points[decided].mean())


def verdicts(judged: Sequence[Judged]) -> list[str]:
    """State in words which claims hold, paired by question."""
    lines: list[str] = []
    for claim, gap_of in _claims().items():
        gap, error = _mean_se_of_known([gap_of(each) for each in judged])
        lines.append(f"{claim}: {WORDS[sign_of(gap, error)]} ({gap:+.3f} ± {error:.3f}).")
    return lines


def _claims() -> dict[str, Callable[[Judged], float]]:
    """Return claim -> difference of two measures of a question, positive if the claim holds."""
    claims: dict[str, Callable[[Judged], float]] = {
        "Expected scores order answers better than the likeliest label, scale 100": lambda each: (
            _score_accuracy(each, EXPECTED_100) - _score_accuracy(each, LIKELIEST_100)
        ),
        "The same on the pairs that the likeliest label decides, scale 100": lambda each: (
            _accuracy_on_decided(each, EXPECTED_100) - _accuracy_on_decided(each, LIKELIEST_100)
        ),
        "Expected scores order answers better than the likeliest label, scale 5": lambda each: (
            _score_accuracy(each, EXPECTED_5) - _score_accuracy(each, LIKELIEST_5)
        ),
        "Likelihood over both orders is more accurate than the likeliest labels": lambda each: (
            _rule_accuracy(each, "likelihood") - _rule_accuracy(each, "first_label")
        ),
        "Expected 1-100 with likelihood conflicts less than the likeliest label 1-5 with first "
        "labels": lambda each: (
            each.conflicts(LIKELIEST_5, "first_label") - each.conflicts(EXPECTED_100, "likelihood")
        ),
        "With the SAME first-label comparisons, expected 1-100 conflicts less than the likeliest "
        "label 1-5": lambda each: (
            each.conflicts(LIKELIEST_5, "first_label") - each.conflicts(EXPECTED_100, "first_label")
        ),
    }
    for k in SUBSETS:
        claim = f"Likelihood is intransitive in fewer subsets of {k} than first labels"
        claims[claim] = _transitivity_gap(k)
    return claims


def _transitivity_gap(k: int) -> Callable[[Judged], float]:
    def gap(each: Judged) -> float:
        first_label = nontransitivity(each.relations["first_label"], k)
        return first_label - nontransitivity(each.relations["likelihood"], k)

    return gap


def _score_accuracy(each: Judged, readout: str) -> float:
    return _accuracy(each.score_signs(readout), each.truth)


def _rule_accuracy(each: Judged, rule: Rule) -> float:
    return _accuracy(each.relation_signs(rule), each.truth)


def _accuracy_on_decided(each: Judged, readout: str) -> float:
    """Return the accuracy on pairs with two different likeliest labels on the scale of 100."""
    likeliest = each.scores[LIKELIEST_100]
    decided = [likeliest[i] != likeliest[j] for i, j in each.pairs]
    return _accuracy(np.where(decided, each.score_signs(readout), math.nan), each.truth)


def facts_verdict(judged: Sequence[Judged]) -> str:
    """State how often the expected score prefers right facts among answers with equal manners."""
    points: list[float] = []
    for each in judged:
        signs = zip(each.pairs, each.score_signs(EXPECTED_100), each.truth, strict=True)
        for (i, j), sign, truth in signs:
            if each.manners[i] == each.manners[j] and truth != 0:
                points.append(0.5 if sign == 0 else float(sign == truth))
    mean, error = mean_se(np.array(points))
    return (
        f"Of the {len(points)} pairs that differ in facts alone, the expected score prefers the "
        f"right answer in "
        f"{mean:.2f} ± {error:.2f}."
    )


def show(scores: Sequence[dict[str, Any]], relations: Sequence[dict[str, Any]]) -> None:
    """Print both tables."""
    columns = ("accuracy", "ties", "conflicts_first_label", "conflicts_likelihood")
    heads = ["single scores", *(name.replace("_", ", ", 1) for name in columns)]
    _print_table(heads, "Single scores, ± s.e.", columns, scores)
    columns = ("accuracy", "ties", *(f"nontransitivity_{k}" for k in SUBSETS))
    heads = ["comparisons", *(name.replace("_", ", k = ") for name in columns)]
    _print_table(heads, "Comparisons in both orders, ± s.e.", columns, relations)


def _print_table(
    heads: Sequence[str], title: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]
) -> None:
    table = Table(*heads, title=title)
    for row in rows:
        cells = [row_figure(row, name) for name in columns]
        table.add_row(row["readout"], *cells)
    OUT.print(table)


def introduce(seed: int, n_prompts: int, n_answers: int) -> None:
    """Print the claim and the setup."""
    OUT.print(__doc__)
    OUT.print(
        f"{n_prompts} questions, {n_answers} answers each at temperature 1, seed {seed}. "
        "Standard errors are over questions, and differences are paired.\n"
        "The judge is the served model. It learned to judge from noisy scores in round numbers, "
        "and from noisy comparisons "
        "that prefer the answer that stands first.\n"
        "Accuracy: share of pairs ordered as gold orders them; a tie counts half. Conflicts: "
        "share of pairs whose scores "
        "contradict their comparison.\n"
        "A comparison that is a tie conflicts with any two different scores, so finer scores "
        "conflict more. "
        "Baseline: the likeliest label, and the likeliest labels of both orders.\n",
        highlight=False,
    )


async def run(seed: int, n_prompts: int, n_answers: int) -> None:
    """Judge the answers, print the tables, and record the results."""
    introduce(seed, n_prompts, n_answers)
    questions = world.prompts(n_prompts, seed)
    judged: list[Judged] = []
    async with serving() as flow:
        drawn = texts(await flow.ask_all(questions, seed, n=n_answers))
        for question, answers in zip(questions, drawn, strict=True):
            judged.append(await judge(flow, question, answers))
    scores = score_rows(judged)
    relations = relation_rows(judged)
    show(scores, relations)
    refused = float(np.mean([each.refused for each in judged]))
    lean = float(np.mean([each.lean for each in judged]))
    lines = [
        *verdicts(judged),
        f"Readings dropped as refused: {refused:.1%}. "
        f"The answer that stands first is preferred {lean:+.1%} more often.",
        facts_verdict(judged),
    ]
    OUT.print("\n".join(lines), highlight=False)
    setup = {
        "prompts": n_prompts,
        "answers": n_answers,
        "temperature": 1.0,
        "dropped": refused,
        "lean": lean,
        "verdicts": lines,
    }
    rows = [*scores, *relations]
    baseline = "the likeliest label, and the likeliest labels of both orders"
    path = record("trust_judge", baseline=baseline, seed=seed, rows=rows, setup=setup)
    OUT.print("written:", path)


def main() -> None:
    """Run from the command line."""
    parser = argument_parser(__doc__, prompts=96)
    parser.add_argument("--answers", type=int, default=6, help="answers to each question")
    options = parser.parse_args()
    asyncio.run(run(options.seed, options.prompts, options.answers))


if __name__ == "__main__":
    main()
