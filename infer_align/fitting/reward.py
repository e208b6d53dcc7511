"""`infer-align fit reward`: fit a reward to preference pairs.

pairs ─ frozen encoder ─▶ vectors on disk ─ logistic heads ─▶ reward.safetensors ─▶ report

A fifth of the prompts is held out. The report is about their pairs, which no head was fitted to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from infer_align.errors import ConfigError
from infer_align.fitting.answer_vectors import encode_pairs
from infer_align.fitting.preference_heads import (
    FittedHeads,
    HeadSettings,
    Index,
    PairFeatures,
    Rows,
    fit_heads,
    hold_out,
)
from infer_align.fitting.preference_report import HeldOutReport, held_out_report
from infer_align.fitting.regression import Progress
from infer_align.preferences import PreferencePair, conversation_key, pair_remarks
from infer_align.rewards import _heads as heads
from infer_align.rewards._sentences import EncoderSettings, SentenceEncoder
from infer_align.types import Array

MIN_PAIRS = 40
# A share of the prompts is held out.
MIN_PROMPTS = 10
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class FittedRewardReport:
    """The result of a fit.

    Attributes:
        pairs: number of pairs that the reward was fitted to.
        prompts: number of their prompts.
        held_out: the quality on held-out pairs.
        plain: the held-out accuracy without the cleaning of labels; None without one.
        facts: further figures by name, such as the number of flipped labels.
        remarks: sentences about the data.
    """

    pairs: int
    prompts: int
    held_out: HeldOutReport
    plain: float | None
    facts: dict[str, Any]
    remarks: tuple[str, ...]

    def write(self, path: Path) -> None:
        """Write the report as JSON. Figures that do not exist are null."""
        text = json.dumps(with_nulls(asdict(self)), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class EncoderFit:
    """The settings of a fit on a frozen encoder."""

    encoder: EncoderSettings
    device: str
    views: tuple[heads.View, ...]
    heads: HeadSettings


def fit_on_encoder(
    pairs: Sequence[PreferencePair], settings: EncoderFit, out: Path, progress: Progress
) -> FittedRewardReport:
    """Fit heads on a frozen encoder, save them to `out`, and measure them on held-out pairs.

    The vectors of the answers are kept beside `out`, in a folder that ends with ".vectors".

    Raises:
        ConfigError: there are too few pairs, or the encoder or `out` is wrong.
    """
    check_pairs(pairs)
    if out.is_dir():
        raise ConfigError(
            f"--out: {str(out)!r} is a folder; name a file, such as {out}/r.safetensors."
        )
    progress("loading the encoder")
    encoder = SentenceEncoder(settings.encoder, settings.device, "--encoder")
    vectors = encode_pairs(encoder, pairs, out.with_suffix(".vectors"), progress)
    data = _Data.of(pairs, *vectors.features(settings.views, encoder.size))
    testing = hold_out(data.differences.prompts.tolist(), HELD_OUT_SHARE, settings.heads.seed)
    progress("fitting the heads")
    fitted = fit_heads(data.differences.select(~testing), settings.heads)
    held_out = data.measure(fitted, testing)
    plain = None
    if settings.heads.noise != "none":
        progress("fitting the heads without the cleaning of labels, to compare")
        trusting = replace(settings.heads, noise="none")
        unclean = fit_heads(data.differences.select(~testing), trusting)
        plain = data.measure(unclean, testing).accuracy.value
    facts = _facts(settings, fitted)
    report = FittedRewardReport(
        pairs=int((~testing).sum()),
        prompts=len(set(data.differences.prompts[~testing].tolist())),
        held_out=held_out,
        plain=plain,
        facts={**facts, "encoded_tokens": vectors.tokens, "encoding_seconds": vectors.seconds},
        remarks=remarks(pairs, vectors.truncated, encoder.max_length),
    )
    bias = data.bias(fitted, ~testing)
    heads.write(out, _reward(settings, encoder.digest(), fitted, bias, report))
    report.write(out.with_suffix(".report.json"))
    return report


def _reward(
    settings: EncoderFit, digest: str, fitted: FittedHeads, bias: Array, report: FittedRewardReport
) -> heads.Heads:
    """Return the heads with the facts that their file holds."""
    held_out = with_nulls(asdict(report.held_out))
    saved = {**_facts(settings, fitted), "held_out": held_out, "pairs": report.pairs}
    return heads.Heads(
        settings.encoder, digest, settings.views, fitted.weights, fitted.length, bias, saved
    )


@dataclass(frozen=True, slots=True)
class _Data:
    """The pairs as features."""

    differences: PairFeatures
    means: Array  # [C, F], the mean of the two answers
    length_means: Array  # [C, 2]
    characters: tuple[tuple[int, int], ...]  # of the chosen and of the rejected answer

    @classmethod
    def of(cls, pairs: Sequence[PreferencePair], chosen: Array, rejected: Array) -> _Data:
        first = heads.length_features([pair.chosen for pair in pairs])
        second = heads.length_features([pair.rejected for pair in pairs])
        differences = PairFeatures(chosen - rejected, first - second, prompt_numbers(pairs))
        characters = tuple((len(pair.chosen), len(pair.rejected)) for pair in pairs)
        return cls(differences, (chosen + rejected) / 2, (first + second) / 2, characters)

    def measure(self, fitted: FittedHeads, testing: Rows) -> HeldOutReport:
        """Return the quality of heads on some of the pairs."""
        pairs = self.differences.select(testing)
        lengths = [self.characters[row] for row in np.flatnonzero(testing)]
        return held_out_report(fitted.margins(pairs), lengths, pairs.prompts)

    def bias(self, fitted: FittedHeads, training: Rows) -> Array:
        """Return the bias of each head that makes its mean score 0 on some of the pairs: [K]."""
        bias: Array = -(fitted.weights @ self.means[training].mean(axis=0))
        bias -= fitted.length @ self.length_means[training].mean(axis=0)
        return bias


def _facts(settings: EncoderFit, fitted: FittedHeads) -> dict[str, Any]:
    return {
        "on": "encoder",
        "encoder": asdict(settings.encoder),
        "features": list(settings.views),
        **asdict(settings.heads),
        "penalty": fitted.penalty,
        "flipped_labels": fitted.cleaning.flipped,
        "weaker_pairs": fitted.cleaning.halved,
    }


def read_views(names: str) -> tuple[heads.View, ...]:
    """Return the features that are named, such as "answer,interaction".

    Raises:
        ConfigError: a name is unknown, or occurs twice.
    """
    allowed: tuple[heads.View, ...] = get_args(heads.View)
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in allowed or chosen.count(name) > 1:
            raise ConfigError(
                f"--features: {names!r} is not allowed; must be a list of {', '.join(allowed)}, "
                "each at most once."
            )
    return tuple(view for view in allowed if view in chosen)


def check_pairs(pairs: Sequence[PreferencePair]) -> None:
    """Refuse too few pairs.

    Raises:
        ConfigError: naming the number and what is needed.
    """
    if len(pairs) < MIN_PAIRS:
        raise ConfigError(
            f"pairs: {len(pairs)} are too few to fit a reward; give at least {MIN_PAIRS}."
        )
    prompts = len(set(prompt_numbers(pairs).tolist()))
    if prompts < MIN_PROMPTS:
        raise ConfigError(
            f"pairs: they answer {prompts} different prompts, which are too few, because a fifth "
            f"of the prompts is held out; give at least {MIN_PROMPTS}."
        )


def prompt_numbers(pairs: Sequence[PreferencePair]) -> Index:
    """Return a number for each pair that is equal for pairs of one prompt: [C]."""
    numbers: dict[str, int] = {}
    for pair in pairs:
        numbers.setdefault(conversation_key(pair.messages), len(numbers))
    return np.array([numbers[conversation_key(pair.messages)] for pair in pairs], dtype=np.int64)


def remarks(pairs: Sequence[PreferencePair], truncated: int, max_length: int) -> tuple[str, ...]:
    """Return sentences about pairs that are fitted, but that a reader should know about."""
    sentences = list(pair_remarks(pairs))
    if truncated:
        sentences.append(
            f"{truncated} of {2 * len(pairs)} answers with their conversation are longer than "
            f"{max_length} tokens: of the conversation the beginning is cut, of the answer the end"
        )
    return tuple(sentences)


def with_nulls(value: Any) -> Any:
    """Return JSON with null in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {name: with_nulls(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [with_nulls(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
