"""How a judge is read, on the embedded demo: the label it would say against what its probabilities expect.

The claim (TrustJudge, 2509.21117): scores that are expectations over the judge's label probabilities, and comparisons that add up
the probabilities of both orders, contradict each other less, contradict themselves less, and agree better with the truth.

    python benchmarks/alignment/trust_judge.py
"""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.alignment.flow import OUT, Flow, serving, shown, texts
from benchmarks.record import record
from infer_align.demo import world
from infer_align.rewards.trust_judge import (
    Reading,
    conflict_ratio,
    expected_score,
    nontransitivity,
    relation,
)
from infer_align.rewards.trust_judge.prompts import (
    BETTER,
    SCORE,
    SIDES,
    labels,
    pair_messages,
    score_messages,
)
from infer_align.rewards.trust_judge.readings import Relation, Rule
from infer_align.types import Array, LabelLogprobs, LabelQuery

SCALES = (5, 10, 100)
RULES: tuple[Rule, ...] = ("first_label", "likelihood", "perplexity")
SUBSETS = (3, 4, 5)
REFUSED = 0.5  # less probability than this on the labels: the judge said something else
SIGNS = {"larger": 1, "equal": 0, "smaller": -1}
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Judged:
    """All that the judge said about the answers to one question."""

    gold: Array  # [N]
    manner: Sequence[
        tuple[bool, bool, int]
    ]  # [N] polite, rude, flourishes: answers alike in them differ in facts alone
    scores: Mapping[str, Sequence[float]]  # readout -> [N]; NaN where it refused
    relations: Mapping[Rule, Mapping[Pair, Relation]]
    refused: float  # share of all readings
    lean: float  # how often the answer that stands first is said to be better, less how often the other is


async def judge(flow: Flow, question: str, answers: Sequence[str]) -> Judged:
    """Every answer scored on every scale, every pair compared in both orders."""
    messages = [{"role": "user", "content": question}]
    reads: dict[Any, Any] = {}
    for scale in SCALES:
        for i, text in enumerate(answers):
            reads[scale, i] = _read(
                flow, score_messages(messages, text, scale), SCORE, labels(scale)
            )
    for i, j in combinations(range(len(answers)), 2):
        reads[i, j, 1] = _read(flow, pair_messages(messages, answers[i], answers[j]), BETTER, SIDES)
        reads[i, j, 2] = _read(flow, pair_messages(messages, answers[j], answers[i]), BETTER, SIDES)
    said = dict(zip(reads, await asyncio.gather(*reads.values()), strict=True))
    pairs = {
        key[:2]: (said[key], said[*key[:2], 2]) for key in said if len(key) == 3 and key[2] == 1
    }
    firsts = [reading.probs[0][0] for both in pairs.values() for reading in both]
    return Judged(
        gold=np.array([world.gold(question, text) for text in answers]),
        manner=[_manner(question, text) for text in answers],
        scores=_scores(said, len(answers)),
        relations={
            rule: {pair: relation(*both, rule) for pair, both in pairs.items()} for rule in RULES
        },
        refused=float(
            np.mean([math.fsum(p for _, p in reading.probs) < REFUSED for reading in said.values()])
        ),
        lean=(firsts.count("A") - firsts.count("B")) / len(firsts),
    )


def _manner(question: str, answer: str) -> tuple[bool, bool, int]:
    asked = world.read_question(question)
    assert asked is not None
    traits = world.read(asked, answer)
    return traits.polite, traits.rude, traits.flourishes


async def _read(
    flow: Flow, messages: list[dict[str, Any]], prefix: str, wanted: tuple[str, ...]
) -> Reading:
    found: LabelLogprobs = await flow.engine.read_labels(LabelQuery(messages, prefix, wanted))
    probs = sorted(
        ((label, math.exp(found.logprobs[label])) for label in wanted), key=lambda pair: -pair[1]
    )
    return Reading(probs, math.log(probs[0][1]), 1)


def _scores(said: Mapping[Any, Reading], n: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for scale in SCALES:
        readings = [said[scale, i].probs for i in range(n)]
        mass = [math.fsum(p for _, p in probs) for probs in readings]
        found[f"likeliest label, 1-{scale}"] = [
            float(probs[0][0]) if m >= REFUSED else math.nan
            for probs, m in zip(readings, mass, strict=True)
        ]
        for readout in ("expected", "geval", "published") if scale == 100 else ("expected",):
            values = [
                expected_score(probs, scale, readout) if m >= REFUSED else math.nan
                for probs, m in zip(readings, mass, strict=True)
            ]
            found[f"{readout}, 1-{scale}"] = values
    return found


def score_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Each readout of the single scores."""
    made = []
    for name in judged[0].scores:
        row: dict[str, Any] = {"kind": "score", "readout": name}
        signs = [
            np.sign([one.scores[name][i] - one.scores[name][j] for i, j in _pairs(one)])
            for one in judged
        ]
        _add(
            row,
            "accuracy",
            [_accuracy(sign, _truth(one)) for sign, one in zip(signs, judged, strict=True)],
        )
        _add(row, "ties", [float(np.mean(sign == 0)) for sign in signs])
        for rule in ("first_label", "likelihood"):
            ratios = [
                conflict_ratio(dict(enumerate(one.scores[name])), one.relations[rule])
                for one in judged
            ]
            _add(row, f"conflicts_{rule}", ratios)
        made.append(row)
    return made


def relation_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Each rule of the comparisons."""
    made = []
    for rule in RULES:
        row: dict[str, Any] = {"kind": "relation", "readout": rule}
        signs = [
            np.array([SIGNS[one.relations[rule][pair]] for pair in _pairs(one)]) for one in judged
        ]
        _add(
            row,
            "accuracy",
            [_accuracy(sign, _truth(one)) for sign, one in zip(signs, judged, strict=True)],
        )
        _add(row, "ties", [float(np.mean(sign == 0)) for sign in signs])
        for k in SUBSETS:
            _add(
                row,
                f"nontransitivity_{k}",
                [nontransitivity(one.relations[rule], k) for one in judged],
            )
        made.append(row)
    return made


def _pairs(one: Judged) -> list[Pair]:
    return list(combinations(range(len(one.gold)), 2))


def _truth(one: Judged) -> NDArray[np.float64]:
    return np.sign([one.gold[i] - one.gold[j] for i, j in _pairs(one)])


def _accuracy(signs: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """Of the pairs that gold tells apart; a tie is half right."""
    decided = (truth != 0) & ~np.isnan(signs)
    return (
        float(np.where(signs == 0, 0.5, signs == truth)[decided].mean())
        if decided.any()
        else math.nan
    )


def _add(row: dict[str, Any], name: str, per_question: Sequence[float]) -> None:
    values = np.array(per_question)
    values = values[~np.isnan(values)]
    row[name], row[f"{name}_se"] = (
        float(values.mean()),
        float(values.std(ddof=1) / math.sqrt(len(values))),
    )


def verdicts(judged: Sequence[Judged]) -> list[str]:
    """The claims, paired by question."""
    claims = {
        "Expected scores order answers better than the likeliest label, scale 100": _gap(
            judged,
            lambda one: (
                _score_accuracy(one, "expected, 1-100")
                - _score_accuracy(one, "likeliest label, 1-100")
            ),
        ),
        "Even on the pairs that the likeliest label decides, scale 100": _gap(
            judged,
            lambda one: (
                _on_decided(one, "expected, 1-100") - _on_decided(one, "likeliest label, 1-100")
            ),
        ),
        "Expected scores order answers better than the likeliest label, scale 5": _gap(
            judged,
            lambda one: (
                _score_accuracy(one, "expected, 1-5") - _score_accuracy(one, "likeliest label, 1-5")
            ),
        ),
        "Likelihood over both orders is more accurate than what both said first": _gap(
            judged,
            lambda one: _rule_accuracy(one, "likelihood") - _rule_accuracy(one, "first_label"),
        ),
        "Expected 1-100 with likelihood conflicts less than the likeliest label 1-5 with first labels": _gap(
            judged,
            lambda one: (
                _conflicts(one, "likeliest label, 1-5", "first_label")
                - _conflicts(one, "expected, 1-100", "likelihood")
            ),
        ),
        "Against the SAME first-label comparisons, expected 1-100 conflicts less than the likeliest label 1-5": _gap(
            judged,
            lambda one: (
                _conflicts(one, "likeliest label, 1-5", "first_label")
                - _conflicts(one, "expected, 1-100", "first_label")
            ),
        ),
    }
    for k in SUBSETS:
        claims[f"Likelihood is intransitive in fewer subsets of {k} than first labels"] = _gap(
            judged,
            lambda one, k=k: (
                nontransitivity(one.relations["first_label"], k)
                - nontransitivity(one.relations["likelihood"], k)
            ),
        )
    words = {1: "HOLDS", 0: "NO DIFFERENCE within two standard errors", -1: "THE OPPOSITE HOLDS"}
    return [
        f"{claim}: {words[(gap > 2 * error) - (gap < -2 * error)]} ({gap:+.3f} ± {error:.3f})."
        for claim, (gap, error) in claims.items()
    ]


def _gap(judged: Sequence[Judged], of: Any) -> tuple[float, float]:
    values = np.array([of(one) for one in judged])
    values = values[~np.isnan(values)]
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def _score_accuracy(one: Judged, name: str) -> float:
    return _accuracy(
        np.sign([one.scores[name][i] - one.scores[name][j] for i, j in _pairs(one)]), _truth(one)
    )


def _on_decided(one: Judged, name: str) -> float:
    """Accuracy on the pairs to which the likeliest label of the scale of 100 gives two different scores."""
    likeliest = one.scores["likeliest label, 1-100"]
    decided = [likeliest[i] != likeliest[j] for i, j in _pairs(one)]
    signs = np.sign([one.scores[name][i] - one.scores[name][j] for i, j in _pairs(one)])
    return _accuracy(np.where(decided, signs, math.nan), _truth(one))


def _on_facts(judged: Sequence[Judged]) -> str:
    """How often the expected score tells right from wrong where nothing else tells the answers apart."""
    right = []
    for one in judged:
        for i, j in _pairs(one):
            if one.manner[i] == one.manner[j] and one.gold[i] != one.gold[j]:
                sign = np.sign(one.scores["expected, 1-100"][i] - one.scores["expected, 1-100"][j])
                right.append(
                    0.5 if sign == 0 else float(sign == np.sign(one.gold[i] - one.gold[j]))
                )
    error = np.std(right, ddof=1) / math.sqrt(len(right))
    return f"Of the {len(right)} pairs that differ in facts alone it puts the right one first in {np.mean(right):.2f} ± {error:.2f}."


def _rule_accuracy(one: Judged, rule: Rule) -> float:
    return _accuracy(
        np.array([float(SIGNS[one.relations[rule][pair]]) for pair in _pairs(one)]), _truth(one)
    )


def _conflicts(one: Judged, name: str, rule: Rule) -> float:
    return conflict_ratio(dict(enumerate(one.scores[name])), one.relations[rule])


def show(scores: Sequence[dict[str, Any]], relations: Sequence[dict[str, Any]]) -> None:
    """Both tables."""
    columns = ("accuracy", "ties", "conflicts_first_label", "conflicts_likelihood")
    table = Table(
        "single scores",
        *(name.replace("_", ", ", 1) for name in columns),
        title="Single scores, ± s.e.",
    )
    for row in scores:
        table.add_row(row["readout"], *(shown(row[name], row[f"{name}_se"]) for name in columns))
    OUT.print(table)
    measures = ("accuracy", "ties", *(f"nontransitivity_{k}" for k in SUBSETS))
    table = Table(
        "comparisons",
        *(name.replace("_", ", k = ") for name in measures),
        title="Comparisons in both orders, ± s.e.",
    )
    for row in relations:
        table.add_row(row["readout"], *(shown(row[name], row[f"{name}_se"]) for name in measures))
    OUT.print(table)


async def run(seed: int, n_prompts: int, n_answers: int) -> None:
    """Draw, judge, tabulate, record."""
    OUT.print(__doc__)
    OUT.print(
        f"""{n_prompts} questions, {n_answers} answers each at temperature 1, seed {seed}; standard errors over questions,
differences paired.
The judge is the served model, which learned to judge from noisy scores in round numbers and from noisy comparisons that lean to
the answer that stands first. Accuracy: pairs ordered as gold orders them, a tie counts half. Conflicts: pairs whose scores say
otherwise than their comparison; a comparison that is a tie conflicts with any two different scores, so finer scores conflict more.
Baseline: the label that the judge would say, and what it said first in both orders.
""",
        highlight=False,
    )
    questions = world.prompts(n_prompts, seed)
    async with serving() as flow:
        answers = texts(await flow.ask_all(questions, seed, n=n_answers))
        judged = [
            await judge(flow, question, drawn)
            for question, drawn in zip(questions, answers, strict=True)
        ]
    scores, relations, said = score_rows(judged), relation_rows(judged), verdicts(judged)
    show(scores, relations)
    refused, lean = (
        float(np.mean([getattr(one, name) for one in judged])) for name in ("refused", "lean")
    )
    said.append(
        f"Readings dropped as refused: {refused:.1%}. The answer that stands first is called better {lean:+.1%} more often."
    )
    said.append(_on_facts(judged))
    OUT.print("\n".join(said), highlight=False)
    setup = {
        "prompts": n_prompts,
        "answers": n_answers,
        "temperature": 1.0,
        "dropped": refused,
        "lean": lean,
        "verdicts": said,
    }
    baseline = "the likeliest label, and the label said first in both orders"
    OUT.print(
        f"written: {record('trust_judge', baseline=baseline, seed=seed, rows=[*scores, *relations], setup=setup)}"
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--answers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=2024)
    options = parser.parse_args()
    asyncio.run(run(options.seed, options.prompts, options.answers))


if __name__ == "__main__":
    main()
