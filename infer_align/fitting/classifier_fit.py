"""`infer-align fit reward --on classifier`: fit sequence classifiers to preference pairs.

pairs ─ token ids ─▶ K members, each on its own bootstrap of prompts ─▶ K folders ─▶ report

A fifth of the prompts is held out for the report. An eighth of the others decides when a member
stops.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from infer_align.errors import ConfigError
from infer_align.fitting.classifier_base import ClassifierBase, load_base, save_member
from infer_align.fitting.classifier_training import (
    EncodedPair,
    History,
    MemberTraining,
    TrainingSettings,
    margins_of,
)
from infer_align.fitting.preference_heads import Index, hold_out
from infer_align.fitting.preference_report import held_out_report
from infer_align.fitting.progress import Pace
from infer_align.fitting.regression import Progress
from infer_align.fitting.reward import (
    HELD_OUT_SHARE,
    FittedRewardReport,
    check_pairs,
    prompt_numbers,
    remarks,
)
from infer_align.messages import normalize
from infer_align.preferences import PreferencePair
from infer_align.rewards._torch import pick_device
from infer_align.types import Array

VALIDATION_SHARE = 0.125
REPORT = "report.json"


@dataclass(frozen=True, slots=True)
class ClassifierFit:
    """The settings of a fit of classifiers.

    Attributes:
        base: the model to fine-tune; None to train a small one from scratch.
        members: number of classifiers.
        max_length: maximum number of tokens that they read.
        device: of torch, or "auto".
        training: of each member.
    """

    base: str | None
    members: int
    max_length: int
    device: str
    training: TrainingSettings


@dataclass(frozen=True, slots=True)
class FittedClassifiers:
    """The result of a fit.

    Attributes:
        report: the quality on held-out pairs.
        folders: of the members.
        add_special_tokens: the setting of that name that the reward needs.
    """

    report: FittedRewardReport
    folders: tuple[Path, ...]
    add_special_tokens: bool


@dataclass(frozen=True, slots=True)
class _Split:
    """The pairs of each purpose, as rows."""

    training: Index
    validation: Index
    testing: Index
    prompts: Index  # [C] of all pairs


def fit_classifiers(
    pairs: Sequence[PreferencePair], settings: ClassifierFit, out: Path, progress: Progress
) -> FittedClassifiers:
    """Train the members, write them into the folder `out`, and measure them on held-out pairs.

    Checkpoints are kept in a folder beside `out` that ends with ".training", until all is done.

    Raises:
        ConfigError: there are too few pairs, or the base or `out` is wrong.
    """
    check_pairs(pairs)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {str(out)!r} is a file; name a folder for the classifiers.")
    progress("loading the model")
    base = load_base(settings.base, pairs, settings.max_length)
    progress("reading the pairs")
    read = _read_pairs(base, pairs)
    check_pairs(read.pairs)
    split = _split(read.pairs, settings.training.seed)
    trainer = _Trainer(settings, base, read.encoded, split, out, progress)
    margins = _train_all(trainer)
    report = _report(settings, read, split, margins, trainer.histories)
    report.write(out / REPORT)
    shutil.rmtree(trainer.checkpoints, ignore_errors=True)
    folders = tuple(trainer.folder(number) for number in range(settings.members))
    return FittedClassifiers(report, folders, base.add_special_tokens)


@dataclass(frozen=True, slots=True)
class _ReadPairs:
    """The pairs that the classifier can read.

    Attributes:
        encoded: their token ids.
        remarks: sentences about the pairs.
    """

    pairs: list[PreferencePair]
    encoded: list[EncodedPair]
    remarks: tuple[str, ...]


def _read_pairs(base: ClassifierBase, pairs: Sequence[PreferencePair]) -> _ReadPairs:
    readable: list[PreferencePair] = []
    encoded: list[EncodedPair] = []
    truncated = 0
    problems: list[str] = []
    for pair in pairs:
        answers: list[list[int]] = []
        for text in (pair.chosen, pair.rejected):
            answer = {"role": "assistant", "content": text}
            read = base.encoder.encode(normalize([*pair.messages, answer]))
            answers.append(read.ids)
            truncated += bool(read.ids and read.note)
            if not read.ids:
                problems.append(f"line {pair.line}: {read.note}")
        if all(answers):
            readable.append(pair)
            encoded.append(EncodedPair(*answers))
    sentences = remarks(readable, 0, base.encoder.max_length)
    if truncated:
        sentences += (
            f"{truncated} of {2 * len(readable)} answers with their conversation are longer than "
            f"{base.encoder.max_length} tokens and are cut, as the reward will cut them",
        )
    if problems:
        count = len(pairs) - len(readable)
        sentences += (f"{count} pairs cannot be read by the model; first: {problems[0]}",)
    return _ReadPairs(readable, encoded, sentences)


def _split(pairs: Sequence[PreferencePair], seed: int) -> _Split:
    """Return the pairs of each purpose. Pairs of one prompt stay together."""
    prompts = prompt_numbers(pairs)
    testing = hold_out(prompts.tolist(), HELD_OUT_SHARE, seed)
    rest = np.flatnonzero(~testing)
    stopping = hold_out(prompts[rest].tolist(), VALIDATION_SHARE, seed + 1)
    return _Split(rest[~stopping], rest[stopping], np.flatnonzero(testing), prompts)


def _bootstrap(split: _Split, settings: ClassifierFit, number: int) -> Index:
    """Return the pairs that a member trains on. A single member trains on each pair once."""
    if settings.members == 1:
        return split.training
    groups = split.prompts[split.training]
    unique = np.unique(groups)
    random = np.random.default_rng([settings.training.seed, 3, number])
    drawn = random.choice(unique, len(unique))
    rows = [split.training[groups == prompt] for prompt in drawn]
    return np.concatenate(rows)


@dataclass(slots=True)
class _Trainer:
    """Trains the members, one after the other."""

    settings: ClassifierFit
    base: ClassifierBase
    encoded: Sequence[EncodedPair]
    split: _Split
    out: Path
    progress: Progress
    histories: list[History] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.out.with_name(f"{self.out.name}.training")

    def folder(self, number: int) -> Path:
        """Return the folder of a member."""
        return self.out / f"member-{number}"

    def train(self, number: int) -> Array:
        """Train and save one member; return its margins on the held-out pairs: [C]."""
        training = self.settings.training
        # The weights of a new head depend on this seed.
        torch.manual_seed(int(np.random.default_rng([training.seed, 4, number]).integers(2**31)))
        model = self.base.new_model().to(pick_device(self.settings.device))
        file = self.checkpoints / f"member-{number}.safetensors"
        digest = _digest(self.settings, self.encoded)
        member = MemberTraining(model, training, number, file, digest)
        rows = _bootstrap(self.split, self.settings, number)
        pace = Pace(training.epochs * len(rows))

        def report(epoch: int, done: int) -> None:
            pace.done = (epoch - 1) * len(rows) + done
            place = f"member {number + 1} of {self.settings.members}, epoch {epoch}"
            self.progress(f"{place}: {done} of {len(rows)} pairs{pace} for this member")

        self.histories.append(
            member.run(self._pairs(rows), self._pairs(self.split.validation), report)
        )
        save_member(self.base, member.model, self.folder(number))
        return margins_of(member.model, self._pairs(self.split.testing), training.batch_size)

    def _pairs(self, rows: Index) -> list[EncodedPair]:
        return [self.encoded[row] for row in rows.tolist()]


def _train_all(trainer: _Trainer) -> Array:
    """Train every member; return the margins on the held-out pairs: [K, C]."""
    threads = torch.get_num_threads()
    if trainer.settings.base is None:
        # The model is small: on a busy machine, threads that wait for each other take 100 times as
        # long.
        torch.set_num_threads(1)
    try:
        margins = [trainer.train(number) for number in range(trainer.settings.members)]
    finally:
        torch.set_num_threads(threads)
    return np.stack(margins)


def _digest(settings: ClassifierFit, encoded: Sequence[EncodedPair]) -> str:
    """Return a text that is equal for equal pairs, bases and settings."""
    facts = [asdict(settings), [[pair.chosen, pair.rejected] for pair in encoded]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _report(
    settings: ClassifierFit,
    read: _ReadPairs,
    split: _Split,
    margins: Array,
    histories: Sequence[History],
) -> FittedRewardReport:
    testing = split.testing
    lengths: list[tuple[int, int]] = []
    for row in testing.tolist():
        lengths.append((len(read.pairs[row].chosen), len(read.pairs[row].rejected)))
    best_epochs: list[int] = []
    losses: list[list[float]] = []
    for history in histories:
        best_epochs.append(history.best)
        losses.append(history.losses)
    facts = {
        "on": "classifier",
        **asdict(settings),
        "best_epochs": best_epochs,
        "validation_losses": losses,
        "validation_pairs": len(split.validation),
    }
    return FittedRewardReport(
        pairs=len(split.training),
        prompts=len(np.unique(split.prompts[split.training])),
        held_out=held_out_report(margins, lengths, split.prompts[testing]),
        plain=None,
        facts=facts,
        remarks=read.remarks,
    )
