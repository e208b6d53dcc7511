"""What is a reward worth that `fit reward` fits to real pairs? Five folds over prompts, with noise.

Heads on a frozen encoder are fitted to four fifths of the prompts of HH-RLHF and choose between the
answers of the rest, so each pair is judged once by heads that have not seen its prompt. "The
shorter answer wins" stands beside them, and so do the pairs whose answers are about equally long. A
share of the training labels is then flipped; the held-out labels stay as people gave them.

    python benchmarks/alignment/preference_pairs.py hh_harmless_test.jsonl.gz
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.alignment.report import OUT
from benchmarks.record import record
from infer_align.fitting.answer_vectors import encode_pairs
from infer_align.fitting.preference_heads import (
    HeadSettings,
    Index,
    Noise,
    PairFeatures,
    Rows,
    fit_heads,
)
from infer_align.fitting.preference_report import HeldOutReport, PairAccuracy, held_out_report
from infer_align.fitting.reward import prompt_numbers
from infer_align.preferences import PreferencePair, read_preferences
from infer_align.rewards._heads import length_features
from infer_align.rewards._sentences import EncoderSettings, SentenceEncoder
from infer_align.types import Array

ENCODER = EncoderSettings("package:all_minilm_l6_v2/model.zip", layer=4)
FOLDS = 5
# The rate of flipped training labels, and how the fit looks for them.
NOISES: tuple[tuple[float, Noise], ...] = (
    (0.0, "none"),
    (0.25, "none"),
    (0.25, "vote"),
    (0.25, "exchange"),
    (0.35, "none"),
    (0.35, "vote"),
    (0.35, "exchange"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One way to fit.

    Attributes:
        flipped: share of the training labels that are flipped.
        settings: of the heads. Its noise rate is the share of flipped labels.
    """

    flipped: float
    settings: HeadSettings


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs as features.

    Attributes:
        features: chosen minus rejected.
        characters: of each chosen and rejected answer.
    """

    features: PairFeatures
    characters: list[tuple[int, int]]

    @classmethod
    def encode(cls, pairs: Sequence[PreferencePair], cache: Path) -> Pairs:
        """Encode the answers; vectors that the cache holds are read."""
        encoder = SentenceEncoder(ENCODER, "cpu", "encoder")
        vectors = encode_pairs(encoder, pairs, cache, lambda text: OUT.print(text, end="\r"))
        chosen, rejected = vectors.features(("answer",), encoder.size)
        lengths = length_features([pair.chosen for pair in pairs])
        lengths = lengths - length_features([pair.rejected for pair in pairs])
        characters = [(len(pair.chosen), len(pair.rejected)) for pair in pairs]
        return cls(PairFeatures(chosen - rejected, lengths, prompt_numbers(pairs)), characters)


def folds(prompts: Index, seed: int) -> list[Rows]:
    """Return the held-out pairs of each fold. Pairs of one prompt are in one fold."""
    unique, positions = np.unique(prompts, return_inverse=True)
    fold = np.random.default_rng([seed, 5]).permutation(len(unique)) % FOLDS
    return [fold[positions] == number for number in range(FOLDS)]


def flip(pairs: PairFeatures, rate: float, seed: int) -> PairFeatures:
    """Return the pairs with a share of their labels flipped, drawn at random."""
    generator = np.random.default_rng([seed, 7])
    signs = np.where(generator.random(len(pairs.prompts)) < rate, -1.0, 1.0)[:, None]
    return PairFeatures(pairs.features * signs, pairs.lengths * signs, pairs.prompts)


def cross_validate(pairs: Pairs, case: Case, seed: int) -> HeldOutReport:
    """Judge each pair by the heads of the folds that do not hold its prompt."""
    every = pairs.features
    noisy = flip(every, case.flipped, seed)
    margins: Array = np.zeros((case.settings.members, len(every.prompts)))
    for held_out in folds(every.prompts, seed):
        fitted = fit_heads(noisy.select(~held_out), case.settings)
        margins[:, held_out] = fitted.margins(every.select(held_out))
    return held_out_report(margins, pairs.characters, every.prompts)


def cases(members: int, seed: int) -> list[Case]:
    """Return all ways to fit: one head, the ensemble, without length, and under noise."""
    listed = [Case(0.0, HeadSettings(1, seed))]
    for length_free in (False, True):
        for flipped, noise in NOISES:
            rate = flipped or HeadSettings().noise_rate
            settings = HeadSettings(members, seed, length_free, noise, rate)
            listed.append(Case(flipped, settings))
    return listed


def row_of(case: Case, report: HeldOutReport, seconds: float) -> dict[str, Any]:
    """Return the recorded row of a case. Each accuracy has its interval of 95 %."""
    return {
        "flipped": case.flipped,
        "members": case.settings.members,
        "length_free": case.settings.length_free,
        "noise": case.settings.noise,
        "accuracy": asdict(report.accuracy),
        "length_matched": asdict(report.length_matched),
        "shorter_wins": asdict(report.shorter_wins),
        "disagreement": report.disagreement,
        "length_correlation": report.length_correlation,
        "calibration_error": report.calibration.expected_error,
        "cpu_seconds": seconds,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table."""
    heads = ("flipped", "members", "length-free", "cleaning", "accuracy", "equal length")
    table = Table(*heads, "shorter wins", "r with length", title="Held-out pairs, 95 % intervals")
    for row in rows:
        accuracies = [
            _interval(PairAccuracy(**row[name]))
            for name in ("accuracy", "length_matched", "shorter_wins")
        ]
        table.add_row(
            f"{row['flipped']:.2f}",
            str(row["members"]),
            "yes" if row["length_free"] else "no",
            row["noise"],
            *accuracies,
            f"{row['length_correlation']:+.2f}",
        )
    OUT.print(table)


def _interval(accuracy: PairAccuracy) -> str:
    return f"{accuracy.value:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f})"


def run(options: argparse.Namespace) -> None:
    """Measure, print and record."""
    OUT.print(__doc__, highlight=False)
    read = read_preferences(options.pairs)
    pairs = Pairs.encode(read.pairs[: options.limit], options.cache)
    rows: list[dict[str, Any]] = []
    for case in cases(options.members, options.seed):
        start = process_time()
        report = cross_validate(pairs, case, options.seed)
        rows.append(row_of(case, report, process_time() - start))
        OUT.print(f"{len(rows)} of {1 + 2 * len(NOISES)} cases", highlight=False)
    show(rows)
    setup = {
        "pairs": len(pairs.characters),
        "prompts": len(np.unique(pairs.features.prompts)),
        "lines_without_a_pair": len(read.problems),
        "folds": FOLDS,
        "encoder": asdict(ENCODER),
    }
    baseline = '"the shorter answer wins" on the same pairs'
    path = record("preference_pairs", baseline=baseline, seed=options.seed, rows=rows, setup=setup)
    OUT.print("written:", path)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pairs", type=Path, help="file of preference pairs, such as HH-RLHF's")
    parser.add_argument("--cache", type=Path, default=Path("preference_pairs.vectors"))
    parser.add_argument("--members", type=int, default=5, help="members of the ensemble")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--limit", type=int, help="use so many pairs only, for a trial")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
