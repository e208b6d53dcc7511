"""Best-of-n over real answers: one reward model, its ensemble, and wrong labels.

AlpacaEval published the answers of 57 models to several hundred instructions, each with the
probability that a judge prefers it, which is the gold here. On some of the instructions, reward
heads are fitted to pairs of answers whose labels are flipped at a rate. On others, the best of n
answers by those rewards is compared in gold. The claim (Coste et al., 2310.02743): with 25 % wrong
labels an ensemble selects better than one reward model, and does not fall with n.

The longer answer is right in most of these pairs. Every accuracy therefore stands beside that on
pairs of about one length, and "longest" is a baseline. The answer of the model "NullModel" is an
attack on judges: it is left out of the gold and ranked by each reward.

    python benchmarks/alignment/pools.py answer_pools.jsonl.xz --encoder all-MiniLM-L6-v2
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from rich.table import Table

from benchmarks.alignment.report import OUT, mean_se, row_figure
from benchmarks.record import RESULTS, record
from infer_align import objectives
from infer_align.diagnostics.attacks import beaten_share
from infer_align.diagnostics.pairs import have_same_length
from infer_align.fitting.preference_heads import FittedHeads, HeadSettings, PairFeatures, fit_heads
from infer_align.methods.best_of_n import expected_best, kl_upper_bound
from infer_align.methods.compose import par, rank
from infer_align.methods.select.scores import pessimistic
from infer_align.preferences import AnswerPool, read_pools
from infer_align.rewards._heads import View, answer_features, length_features
from infer_align.rewards._sentences import EncodedAnswer, EncoderSettings, SentenceEncoder
from infer_align.types import Array

NULL = "NullModel"
NOISE = (0.0, 0.25, 0.35)
MEMBERS = (1, 3, 5)
SIZES = (1, 2, 4, 8, 16, 32, 57)
WEIGHTS = (0.1, 0.5, 1.0, 4.0)  # of the variance in UWO
BETA = 0.1  # of pessimism, in standard deviations of the scores
SUBSETS = 40  # per prompt and size, for rules without a closed form
GAP = 0.05  # pairs whose gold differs by less have no label
TRAINING_ANSWERS = 20  # per prompt
TRAINING_PAIRS = 40  # per prompt
VIEWS: tuple[View, ...] = ("answer",)
# Tokens that the encoder reads of a prompt and an answer.
MAX_TOKENS = 160
CLAIM = "Coste et al. report win rates of 72.3 (single), 71.2 (mean) and 73.8 % (UWO) at 25 % noise"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One instruction with the answers that are used.

    Attributes:
        gold: [N] of the answers.
        features: [N, F].
        lengths: [N, 2], features of the lengths.
        characters: [N].
        attack: the features and length features of NullModel's answer, or None.
    """

    gold: Array
    features: Array
    lengths: Array
    characters: Array
    attack: tuple[Array, Array] | None


# --- data ---


def load_prompts(
    pools: Sequence[AnswerPool], encoder: SentenceEncoder, cache: Path, count: int | None
) -> list[Prompt]:
    """Encode the answers of some instructions; vectors that the cache holds are read.

    Args:
        pools: the instructions.
        encoder: the frozen encoder.
        cache: a folder.
        count: number of answers per instruction; None for all.
    """
    prompts: list[Prompt] = []
    for number, pool in enumerate(pools):
        prompts.append(_load_prompt(pool, encoder, cache, count))
        if number % 10 == 9:
            OUT.print(f"encoded {number + 1} of {len(pools)} prompts", highlight=False)
    return prompts


def _load_prompt(
    pool: AnswerPool, encoder: SentenceEncoder, cache: Path, count: int | None
) -> Prompt:
    if pool.gold is None or pool.models is None:
        raise ValueError(f"line {pool.line}: the answers have no gold or no model")
    human = [index for index, model in enumerate(pool.models) if model != NULL]
    if count is not None:
        # The same answers in every run, whatever else is in the file.
        generator = np.random.default_rng(pool.line)
        human = sorted(generator.permutation(human)[:count].tolist())
    attacks = [index for index, model in enumerate(pool.models) if model == NULL]
    chosen = human + (attacks if count is None else [])
    texts = [pool.answers[index] for index in chosen]
    encoded = _encode(pool, texts, encoder, cache)
    features = answer_features(encoded, VIEWS, encoder.size)
    lengths = length_features(texts)
    rows = len(human)
    attack = (features[rows:], lengths[rows:]) if len(chosen) > rows else None
    gold = np.array([pool.gold[index] for index in human])
    characters = np.array([float(len(text)) for text in texts[:rows]])
    return Prompt(gold, features[:rows], lengths[:rows], characters, attack)


def _encode(
    pool: AnswerPool, texts: Sequence[str], encoder: SentenceEncoder, cache: Path
) -> list[EncodedAnswer]:
    key = hashlib.sha256(repr((MAX_TOKENS, pool.messages, texts)).encode()).hexdigest()[:24]
    file = cache / f"{key}.npz"
    if not file.exists():
        encoded = encoder.encode([(pool.messages, text) for text in texts])
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(
            file,
            prompt=np.stack([each.prompt for each in encoded]).astype(np.float32),
            answer=np.stack([each.answer for each in encoded]).astype(np.float32),
        )
    with np.load(file) as saved:
        rows = zip(saved["prompt"].astype(float), saved["answer"].astype(float), strict=True)
        return [EncodedAnswer(prompt, answer, 0, 0) for prompt, answer in rows]


# --- fit ---


def training_pairs(prompts: Sequence[Prompt], noise: float, seed: int) -> PairFeatures:
    """Return pairs of answers, the better one first except where the label is flipped."""
    generator = np.random.default_rng([seed, 7])
    features: list[Array] = []
    lengths: list[Array] = []
    numbers: list[int] = []
    for number, prompt in enumerate(prompts):
        first, second = np.triu_indices(len(prompt.gold), 1)
        clear = np.abs(prompt.gold[first] - prompt.gold[second]) > GAP
        drawn = generator.permutation(np.flatnonzero(clear))[:TRAINING_PAIRS]
        for pair in drawn:
            better, worse = int(first[pair]), int(second[pair])
            if prompt.gold[better] < prompt.gold[worse]:
                better, worse = worse, better
            if generator.random() < noise:
                better, worse = worse, better
            features.append(prompt.features[better] - prompt.features[worse])
            lengths.append(prompt.lengths[better] - prompt.lengths[worse])
            numbers.append(number)
    return PairFeatures(np.array(features), np.array(lengths), np.array(numbers))


def scores_of(fitted: FittedHeads, features: Array, lengths: Array) -> Array:
    """Return the scores of N answers: [K, N]."""
    scores: Array = fitted.weights @ features.T + fitted.length @ lengths.T
    return scores


# --- selection ---


def objectives_of(scores: Array) -> dict[str, Array]:
    """Return the objective [N] of each way to use the members' scores [K, N]."""
    members = len(scores)
    named = {"mean": objectives.mean(scores)}
    if members > 1:
        named["wco"] = objectives.wco(scores)
        for weight in WEIGHTS:
            named[f"uwo {weight:g}"] = objectives.uwo(scores, weight)
        ranks = np.stack([rank(row) for row in scores])
        named["ranks"] = ranks.mean(axis=0)
        named["par"] = np.stack([par(row, row) for row in scores]).mean(axis=0)
    return named


def gold_curve(scores: Array, prompt: Prompt) -> dict[str, Array]:
    """Return the expected gold of the best of n answers for each n of SIZES, by selector."""
    curves: dict[str, Array] = {}
    singles = [_closed_form(row, prompt.gold) for row in scores]
    curves["single"] = np.mean(singles, axis=0)
    for name, objective in objectives_of(scores).items():
        curves[name] = _closed_form(objective, prompt.gold)
    curves["pessimistic mean"] = _sampled(objectives.mean(scores), prompt.gold, _pessimism)
    return curves


def _closed_form(objective: Array, gold: Array) -> Array:
    sizes = [min(n, len(gold)) for n in SIZES]
    return np.array([expected_best(objective, gold, n) for n in sizes])


def _sampled(objective: Array, gold: Array, rule: Callable[[Array], Array]) -> Array:
    """Return the mean gold of a rule's lottery over random subsets of each size."""
    generator = np.random.default_rng(11)
    means: list[float] = []
    for n in SIZES:
        total = 0.0
        for _ in range(SUBSETS):
            rows = generator.permutation(len(gold))[:n]
            total += float(rule(objective[rows]) @ gold[rows])
        means.append(total / SUBSETS)
    return np.array(means)


def _pessimism(scores: Array) -> Array:
    spread = float(scores.std()) or 1.0
    return pessimistic(scores / spread, BETA)


def pair_accuracy(objective: Array, prompt: Prompt) -> tuple[float, float]:
    """Return the share of right pairs, and that of the pairs of about one length."""
    first, second = np.triu_indices(len(prompt.gold), 1)
    gap = prompt.gold[first] - prompt.gold[second]
    clear = np.abs(gap) > GAP
    right = (objective[first] - objective[second]) * gap > 0
    same = have_same_length(prompt.characters[first], prompt.characters[second])
    matched = right[clear & same]
    return float(right[clear].mean()), float(matched.mean()) if matched.size else np.nan


# --- the run ---


def measure(
    training: Sequence[Prompt],
    testing: Sequence[Prompt],
    noise: float,
    seeds: Sequence[int],
    *,
    length_free: bool,
) -> list[dict[str, Any]]:
    """Return the rows of one rate of wrong labels: by ensemble size and selector.

    Args:
        training: the instructions of the fits.
        testing: other instructions.
        noise: the rate of wrong labels.
        seeds: of the labels and the fits.
        length_free: True to regress the length out of the features, a guard against padding.
    """
    fits: list[FittedHeads] = []
    for seed in seeds:
        pairs = training_pairs(training, noise, seed)
        settings = HeadSettings(members=MEMBERS[-1], seed=seed, length_free=length_free)
        fits.append(fit_heads(pairs, settings))
        OUT.print(f"noise {noise:g}, seed {seed}: fitted", highlight=False)
    rows: list[dict[str, Any]] = []
    for members in MEMBERS:
        measured = [_measure_fit(fitted, members, testing) for fitted in fits]
        facts = {"noise": noise, "members": members, "length_free": length_free}
        rows += _rows(facts, measured)
    return rows


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one fitted ensemble on P test prompts.

    Attributes:
        curves: selector -> [P, sizes].
        accuracies: [P, 2], of all pairs and of those of about one length.
        nulls: selector -> share of the answers that NullModel's answer beats, for each prompt
            that has one.
    """

    curves: dict[str, Array]
    accuracies: Array
    nulls: dict[str, list[float]]


def _measure_fit(fitted: FittedHeads, members: int, testing: Sequence[Prompt]) -> Measured:
    """Measure the first members of an ensemble."""
    by_prompt: dict[str, list[Array]] = {}
    right: list[tuple[float, float]] = []
    nulls: dict[str, list[float]] = {}
    for prompt in testing:
        scores = scores_of(fitted, prompt.features, prompt.lengths)[:members]
        for name, curve in gold_curve(scores, prompt).items():
            by_prompt.setdefault(name, []).append(curve)
        objective = objectives.mean(scores)
        right.append(pair_accuracy(objective, prompt))
        if prompt.attack is not None:
            attack = scores_of(fitted, *prompt.attack)[:members]
            for name, every in objectives_of(np.concatenate([scores, attack], axis=1)).items():
                nulls.setdefault(name, []).append(beaten_share(float(every[-1]), every[:-1]))
    curves = {name: np.array(each) for name, each in by_prompt.items()}
    return Measured(curves, np.array(right), nulls)


def _rows(facts: dict[str, Any], measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return one row per selector; standard errors are over prompts, of the mean over seeds."""
    rows: list[dict[str, Any]] = []
    over_seeds = np.nanmean([each.accuracies for each in measured], axis=0)
    single = np.array([each.curves["single"] for each in measured])
    for name in measured[0].curves:
        gold = np.array([each.curves[name] for each in measured])  # [S, P, sizes]
        row: dict[str, Any] = {**facts, "selector": name}
        for position, n in enumerate(SIZES):
            row[f"gold_{n}"], row[f"gold_{n}_se"] = mean_se(gold[:, :, position].mean(axis=0))
        last = gold[:, :, -1]
        row["seed_sd"] = float(last.mean(axis=1).std(ddof=1)) if len(gold) > 1 else None
        gap = (last - single[:, :, -1]).mean(axis=0)
        row["minus_single"], row["minus_single_se"] = mean_se(gap)
        row["accuracy"], row["accuracy_se"] = mean_se(over_seeds[:, 0])
        matched = over_seeds[~np.isnan(over_seeds[:, 1]), 1]
        row["accuracy_matched"], row["accuracy_matched_se"] = mean_se(matched)
        nulls = [share for each in measured for share in each.nulls.get(name, [])]
        row["null_beats"] = float(np.mean(nulls)) if nulls else None
        rows.append(row)
    return rows


def baselines(testing: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Return the rows that need no reward: chance, the longest and the shortest, the oracle."""
    named: dict[str, Callable[[Prompt], Array]] = {
        "longest": lambda prompt: prompt.characters,
        "shortest": lambda prompt: -prompt.characters,
        "oracle": lambda prompt: prompt.gold,
    }
    rows: list[dict[str, Any]] = []
    for name, objective in named.items():
        curves = np.array([_closed_form(objective(prompt), prompt.gold) for prompt in testing])
        right = np.array([pair_accuracy(objective(prompt), prompt) for prompt in testing])
        row: dict[str, Any] = {
            "noise": None,
            "members": 0,
            "length_free": False,
            "selector": name,
        }
        for position, n in enumerate(SIZES):
            row[f"gold_{n}"], row[f"gold_{n}_se"] = mean_se(curves[:, position])
        row["accuracy"], row["accuracy_se"] = mean_se(right[:, 0])
        matched = right[~np.isnan(right[:, 1]), 1]
        row["accuracy_matched"], row["accuracy_matched_se"] = mean_se(matched)
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the gold of the best of n by selector."""
    title = "Gold of the best of n: probability that a judge prefers the answer"
    columns = [
        "noise",
        "members",
        "selector",
        *(f"n = {n}" for n in SIZES),
        "pairs",
        "one length",
        "null",
    ]
    table = Table(*columns, title=title)
    for row in rows:
        noise = "" if row["noise"] is None else f"{row['noise']:.0%}"
        noise += ", length-free" if row["length_free"] else ""
        figures = [row_figure(row, f"gold_{n}") for n in SIZES]
        accuracy = [f"{row['accuracy']:.3f}", row_figure(row, "accuracy_matched")]
        null = "" if row.get("null_beats") is None else f"{row['null_beats']:.2f}"
        table.add_row(noise, str(row["members"]), row["selector"], *figures, *accuracy, null)
    OUT.print(table)


def plot(rows: Sequence[dict[str, Any]]) -> None:
    """Plot gold against the KL bound of best-of-n, for the largest ensemble."""
    mpl.use("Agg")
    drawn = ("single", "mean", "wco", "uwo 0.5", "longest")
    plot_figure, axes = plt.subplots(
        1, len(NOISE), figsize=(4.4 * len(NOISE), 3.8), layout="constrained", sharey=True
    )
    kl = [kl_upper_bound(n) for n in SIZES]
    for axis, noise in zip(axes, NOISE, strict=True):
        for row in rows:
            shown = row["selector"] in drawn and row["members"] in (0, MEMBERS[-1])
            if not shown or row["length_free"] or row["noise"] not in (None, noise):
                continue
            gold = [row[f"gold_{n}"] for n in SIZES]
            errors = [row[f"gold_{n}_se"] for n in SIZES]
            axis.errorbar(kl, gold, errors, marker="o", markersize=3, label=row["selector"])
        axis.set(xlabel="bound on the KL, nats", title=f"{noise:.0%} of the labels are wrong")
    axes[0].set(ylabel="gold win rate of the best of n")
    axes[0].legend(fontsize=7)
    plot_figure.savefig(RESULTS / "pools.png", dpi=100)
    plt.close(plot_figure)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pools", type=Path, help="answer pools, JSONL")
    parser.add_argument("--encoder", default="package:all_minilm_l6_v2/model.zip")
    parser.add_argument("--cache", type=Path, default=Path("pools-vectors"))
    parser.add_argument("--training", type=int, default=100, help="number of training prompts")
    parser.add_argument("--testing", type=int, default=64, help="number of test prompts")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of the fits")
    options = parser.parse_args()
    OUT.print(__doc__, highlight=False)
    torch.set_num_threads(1)
    pools, problems = read_pools(options.pools)
    for problem in problems:
        OUT.print(problem, highlight=False)
    order = np.random.default_rng(0).permutation(len(pools))
    encoder = SentenceEncoder(
        EncoderSettings(options.encoder, max_length=MAX_TOKENS), "cpu", "--encoder"
    )
    last = options.testing + options.training
    testing = [pools[index] for index in order[: options.testing]]
    training = [pools[index] for index in order[options.testing : last]]
    test_prompts = load_prompts(testing, encoder, options.cache, None)
    training_prompts = load_prompts(training, encoder, options.cache, TRAINING_ANSWERS)
    rows = baselines(test_prompts)
    for noise in NOISE:
        for length_free in (False, True):
            seeds = range(options.seeds)
            rows += measure(training_prompts, test_prompts, noise, seeds, length_free=length_free)
    show(rows)
    setup = {
        "training_prompts": len(training),
        "training_answers": TRAINING_ANSWERS,
        "training_pairs_per_prompt": TRAINING_PAIRS,
        "test_prompts": len(testing),
        "seeds": options.seeds,
        "encoder": options.encoder,
        "tokens": MAX_TOKENS,
        "features": [*VIEWS],
        "claim": CLAIM,
    }
    baseline = "one member of each ensemble, the longest answer, and the oracle, same answers"
    OUT.print("written:", record("pools", baseline=baseline, seed=0, rows=rows, setup=setup))
    plot(rows)


if __name__ == "__main__":
    main()
