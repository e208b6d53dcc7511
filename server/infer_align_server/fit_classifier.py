"""`infer-align fit reward --on classifier`: the options of a fit of sequence classifiers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer_align.errors import ConfigError

if TYPE_CHECKING:
    from infer_align.fitting.classifier_fit import FittedClassifiers
    from infer_align.preferences import PreferencePair

DEFAULT_OUT = Path("reward")
DEFAULT_MAX_LENGTH = 512
# A model with random weights needs larger steps than one that is fine-tuned.
FINE_TUNING_RATE = 2e-5
SCRATCH_RATE = 5e-4
# The options of each way to fit, with the values that mean "not given".
ENCODER_OPTIONS: dict[str, Any] = {
    "encoder": None,
    "pooling": "mean",
    "layer": None,
    "features": "answer",
    "length_free": False,
    "noise": "none",
}
CLASSIFIER_OPTIONS: dict[str, Any] = {
    "base": None,
    "epochs": None,
    "batch_size": None,
    "learning_rate": None,
    "patience": None,
}


def add_arguments(parser: argparse.ArgumentParser, positive_integer: Callable[[str], int]) -> None:
    """Add the arguments of a fit of classifiers."""
    parser.add_argument(
        "--on",
        choices=("encoder", "classifier"),
        default="encoder",
        help='"encoder": heads on a frozen text encoder, in minutes on a CPU. "classifier": train '
        "whole sequence classifiers; better with many pairs and a GPU. Default: %(default)s.",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="With --on classifier: the model to fine-tune, by path, hub id or "
        "package:<name>/<file>. Default: a small model from scratch.",
    )
    parser.add_argument(
        "--epochs",
        type=positive_integer,
        help="With --on classifier: largest number of passes over the pairs. Default: 4.",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_integer,
        help="With --on classifier: pairs per step. Default: 16.",
    )
    parser.add_argument(
        "--learning-rate",
        type=_learning_rate,
        help="With --on classifier: learning rate of AdamW. Default: 2e-5 with --base, 5e-4 from "
        "scratch.",
    )
    parser.add_argument(
        "--patience",
        type=positive_integer,
        help="With --on classifier: stop after this many epochs without a gain on pairs that a "
        "member does not train on. Default: 2.",
    )


def _learning_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; must be a number above 0 and at most 1"
        )
    return rate


def check_options(options: argparse.Namespace) -> None:
    """Refuse options of the other way to fit.

    Raises:
        ConfigError: naming the option.
    """
    excluded = ENCODER_OPTIONS if options.on == "classifier" else CLASSIFIER_OPTIONS
    way = "encoder" if options.on == "classifier" else "classifier"
    for name, default in excluded.items():
        if getattr(options, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option}: is for --on {way}, but this is --on {options.on}; leave it out."
            )


def fit(
    options: argparse.Namespace,
    pairs: Sequence[PreferencePair],
    out: Path,
    progress: Callable[[str], None],
) -> FittedClassifiers:
    """Fit classifiers by the options, and write them into the folder `out`.

    Raises:
        ConfigError: the pairs, the base or the folder are wrong.
    """
    from infer_align.fitting.classifier_fit import ClassifierFit, fit_classifiers
    from infer_align.fitting.classifier_training import TrainingSettings

    rate = SCRATCH_RATE if options.base is None else FINE_TUNING_RATE
    defaults = TrainingSettings()
    training = TrainingSettings(
        options.epochs or defaults.epochs,
        options.batch_size or defaults.batch_size,
        options.learning_rate or rate,
        options.patience or defaults.patience,
        options.seed,
    )
    max_length = options.max_length or DEFAULT_MAX_LENGTH
    settings = ClassifierFit(options.base, options.members, max_length, options.device, training)
    return fit_classifiers(pairs, settings, out, progress)


def section(fitted: FittedClassifiers) -> str:
    """Return the section of the configuration that uses the classifiers."""
    paths = json.dumps([str(folder.absolute()) for folder in fitted.folders])
    lines = ["[rewards.preference]", 'kind = "classifier"', f"models = {paths}"]
    if fitted.add_special_tokens:
        lines.append("add_special_tokens = true")
    return "\n".join(lines)
