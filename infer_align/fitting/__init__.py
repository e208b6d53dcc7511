"""`infer-align fit value`: fit a value that VAS can steer with, from prompts and any reward.

prompts ─ engine ─▶ replies ─ reward ─▶ samples.jsonl ─ states, TD(lambda) ─▶ value ─▶ report

The report has R² on held-out prompts, reward against KL over beta, and best-of-n beside it.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from infer_align.checkpoints.complete import check_complete
from infer_align.checkpoints.rope import fix_rope
from infer_align.config.fitting import FitConfig
from infer_align.demo.locate import locate
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.fitting import curve, regression
from infer_align.fitting.baseline import BestOfPoint, best_of_n
from infer_align.fitting.curve import Steered
from infer_align.fitting.head_fit import FittedHead, fit_head
from infer_align.fitting.lookahead import FittedValueHeads, TokenizedReplies, fit_heads
from infer_align.fitting.notes import explain
from infer_align.fitting.progress import Pace
from infer_align.fitting.regression import Progress
from infer_align.fitting.samples import group_prompts, read_states, sample_replies
from infer_align.fitting.samples_file import Conversation, SamplingConfig, ScoredReply
from infer_align.fitting.search import Trials, search_betas
from infer_align.methods.vas import DEFAULT_TOP_K
from infer_align.rewards import Reward
from infer_align.values import head, lookahead, tokenizer_digest
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import Lookahead, LookaheadValue

MIN_SAMPLES = 200
# A fifth of the prompts is held out.
MIN_PROMPTS = 10
HELD_OUT_SHARE = 0.2
# A rough KL, which only has to be of the right order, needs few replies.
PROBE_REPLIES = 16
# Estimate for the remaining time: some KL targets need a second try.
TRIES_PER_TARGET = 1.5


@dataclass(frozen=True, slots=True)
class FitReport:
    """The quality of a fitted value.

    Attributes:
        samples: number of samples, held-out ones included.
        method: "ridge" or "sgd" for a head; "lookahead" for a value LM, and "lookahead, ridge" for
            one that was not trained itself.
        ridge: the strength of a ridge fit, else None.
        held_out: prediction of the rewards of held-out replies.
        curve: reward against KL on held-out prompts, over beta.
        best_of_n: best-of-n on the same prompts, from the samples.
        suggested_beta: see `curve.suggest_beta`.
        vas: the steering parameters that were measured, with the suggested beta, for `align.vas`.
        notes: sentences about the suggestion that a user should read.
    """

    samples: int
    method: str
    ridge: float | None
    held_out: regression.Fitness
    curve: tuple[curve.BetaPoint, ...]
    best_of_n: tuple[BestOfPoint, ...]
    suggested_beta: float
    vas: dict[str, Any]
    notes: tuple[str, ...]


async def fit_value(
    engine: TransformersEngine,
    reward: Reward,
    prompts: Sequence[Conversation],
    sampling: SamplingConfig,
    config: FitConfig,
    out: Path,
    progress: Progress,
    earlier: Sequence[ScoredReply] = (),
) -> FitReport:
    """Sample and score replies, fit a value, save it to `out`, and search a beta.

    The samples and the report are saved next to `out`. A later run continues the samples.

    Args:
        engine: started; its model is not changed, but the value is added to the engine.
        reward: started; it scores the replies.
        prompts: the prompts to sample replies to.
        sampling: settings of the replies.
        config: settings of the fit.
        out: file of a head, or folder of a value LM.
        progress: called with a line of text after each step of the work.
        earlier: replies from `read_samples`, which the reward scores instead of new ones.

    Raises:
        InvalidRequest: there are too few samples, all rewards are equal, or the samples file has
            other settings.
        RewardFailed: a reply could not be scored.
        ConfigError: `out` cannot be written, or the value model does not fit the frozen model.
    """
    out = _checked_output(engine, reward, config, out)
    check_numbers(prompts, sampling.replies_per_prompt)
    samples_path = out.with_suffix(".samples.jsonl")
    samples = await sample_replies(
        engine, reward, prompts, sampling, samples_path, progress, earlier
    )
    _check_spread(samples)
    if config.kind == "head":
        fitted = _fit_head(engine, prompts, samples, config, sampling, out, progress)
        config, fitness = fitted.config, fitted.fitness
        await engine.add_value(out.stem, HeadValue(str(out)))
    else:
        heads = fit_value_lm(
            engine, prompts, {out.stem: samples}, config, sampling.seed, out, progress
        )
        (fitness,) = heads.fits
        config = replace(config, ridge=heads.ridges[0])
        await engine.add_value(out.stem, LookaheadValue(Lookahead(str(out))))
    held_out = _held_out_prompts(prompts, samples, sampling.seed)
    curve_prompts = [prompts[i] for i in held_out]
    steered = Steered(engine, reward, curve_prompts, out.stem, config, sampling)
    betas = await _search(steered, config, progress)
    report = _report(
        samples, fitness, betas, steered.groups, config, out.stem, best_of_n(samples, held_out)
    )
    _store_summary(out, sampling.reward, report)
    out.with_suffix(".report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report


async def _search(
    steered: Steered, config: FitConfig, progress: Progress
) -> list[curve.BetaSample]:
    """Search a beta for each KL target, and report the progress."""
    targets = {*config.kl_targets, config.kl_limit}
    # Some targets need a second try, and beta 0 is measured too.
    pace = Pace(1 + round(TRIES_PER_TARGET * len(targets)))

    async def probe(beta: float) -> float:
        sample = await steered.run(beta, min(PROBE_REPLIES, config.curve_replies))
        progress(f"beta {beta:g}: KL about {sample.kl:.2g} nats, from a few replies")
        return sample.kl

    async def run(beta: float) -> curve.BetaSample:
        sample = await steered.run(beta)
        pace.add()
        mean, _ = curve.clustered_mean(sample.rewards, steered.groups)
        progress(f"beta {beta:.4g}: reward {mean:.3f}, KL {sample.kl:.2f} nats{pace}")
        return sample

    progress(f"searching beta with {config.curve_replies} replies each")
    return await search_betas(Trials(probe, run), tuple(targets), config.largest_beta)


def _report(
    samples: Sequence[ScoredReply],
    fitness: regression.Fitness,
    betas: Sequence[curve.BetaSample],
    groups: curve.Groups,
    config: FitConfig,
    name: str,
    baseline: tuple[BestOfPoint, ...],
) -> FitReport:
    points = curve.make_points(betas, groups)
    suggested = curve.suggest_beta(betas, groups, config.kl_limit)
    vas: dict[str, Any] = {"beta": {name: suggested}}
    if config.min_p is not None:
        vas["min_p"] = config.min_p
    elif config.top_k != DEFAULT_TOP_K:
        vas["top_k"] = config.top_k
    return FitReport(
        samples=len(samples),
        method=config.method if config.kind == "head" else _lookahead_method(config),
        ridge=config.ridge if config.method == "ridge" else None,
        held_out=fitness,
        curve=points,
        best_of_n=baseline,
        suggested_beta=suggested,
        vas=vas,
        notes=tuple(explain(betas, groups, suggested, config, baseline)),
    )


def _lookahead_method(config: FitConfig) -> str:
    return "lookahead, ridge" if config.method == "ridge" else "lookahead"


def _store_summary(out: Path, reward: str, report: FitReport) -> None:
    """Write the suggestion and what it rests on into the metadata of the value."""
    point = next(point for point in report.curve if point.beta == report.suggested_beta)
    summary = {
        "reward": reward,
        "suggested_beta": point.beta,
        "kl": point.kl,
        "gain": point.gain,
        "gain_se": point.gain_se,
        "r2": report.held_out.r2,
        "vas": report.vas,
    }
    if out.is_dir():
        lookahead.store_summary(out, summary)
    else:
        head.store_summary(out, summary)


def _checked_output(
    engine: TransformersEngine, reward: Reward, config: FitConfig, out: Path
) -> Path:
    """Return `out` as an absolute path, or refuse what would only fail after hours of sampling."""
    if config.kind == "head" and out.is_dir():
        raise ConfigError(
            f"{out} is a folder. A head is a single file, such as {out / 'value.safetensors'}."
        )
    if config.kind == "lookahead" and out.is_file():
        raise ConfigError(f"{out} is a file. A lookahead value is a folder; use another path.")
    if reward.attributes:
        names = ", ".join(reward.attributes)
        raise InvalidRequest(
            f"reward: it has several objectives ({names}). A value needs a reward with a single "
            "score; use another reward.",
            param="reward",
        )
    _check_folder(out.absolute().parent)
    _check_form(config)
    if config.kind == "lookahead" and config.value_model is not None:
        _check_value_model(engine, config.value_model)
    return out.absolute()


def _check_folder(folder: Path) -> None:
    """Make the folder of the output, or refuse it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: the folder {str(folder)!r} cannot be made: {error.strerror}; use another path."
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--out: the folder {str(folder)!r} is not writable; use another path.")


def _check_form(config: FitConfig) -> None:
    """Refuse a form of steering that does not fit, before anything is sampled."""
    if config.min_p is not None and config.top_k != DEFAULT_TOP_K:
        raise ConfigError(
            f"--fit.min_p: takes the place of top_k, which is {config.top_k!r}; give only one of "
            "them."
        )
    if config.kind == "lookahead" and (config.min_p is not None or config.top_k == "all"):
        name = "top_k" if config.min_p is None else "min_p"
        raise ConfigError(
            f"--fit.{name}: {getattr(config, name)!r} values any number of tokens, which a "
            "lookahead value cannot do because it reads each of them; give a number as top_k."
        )


def _check_value_model(engine: TransformersEngine, name: str) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(locate(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"value_model: {name!r} cannot be loaded: {error}") from error
    if tokenizer_digest(tokenizer.get_vocab()) != engine.frozen.frozen(engine.model).tokenizer:
        raise ConfigError(
            f"value_model: the token ids of {name!r} differ from those of {engine.model!r}. "
            "Use a model with the same tokenizer."
        )


def check_numbers(prompts: Sequence[Conversation], replies_per_prompt: int) -> None:
    """Refuse too few prompts or replies, which would only fail after sampling them.

    Prompts that are equal count once, because they are held out together.

    Raises:
        InvalidRequest: names what there is and what is needed.
    """
    samples = len(prompts) * replies_per_prompt
    if samples < MIN_SAMPLES:
        raise InvalidRequest(
            f"samples: {samples} are too few to fit a value; give at least {MIN_SAMPLES}: "
            "more prompts, or more replies per prompt.",
            param="samples",
        )
    different = len(set(group_prompts(prompts)))
    if different < MIN_PROMPTS:
        raise InvalidRequest(
            f"prompts: {different} different ones are too few, because a fifth of them is held "
            f"out; give at least {MIN_PROMPTS}.",
            param="prompts",
        )


def _check_spread(samples: Sequence[ScoredReply]) -> None:
    if np.ptp([sample.reward for sample in samples]) == 0:
        raise InvalidRequest(
            "reward: every reply has the same score, so there is nothing to steer towards. "
            "Use another reward or other prompts.",
            param="reward",
        )


def _held_out_prompts(
    prompts: Sequence[Conversation], samples: Sequence[ScoredReply], seed: int
) -> list[int]:
    """Return the prompts that the value is not fitted to; of equal ones, the first."""
    groups = group_prompts(prompts)
    numbers = [groups[sample.prompt] for sample in samples]
    is_held_out = regression.split_by_prompt(numbers, HELD_OUT_SHARE, seed).tolist()
    return sorted(set(itertools.compress(numbers, is_held_out)))


def _fit_head(
    engine: TransformersEngine,
    prompts: Sequence[Conversation],
    samples: Sequence[ScoredReply],
    config: FitConfig,
    sampling: SamplingConfig,
    out: Path,
    progress: Progress,
) -> FittedHead:
    """Fit a head and save it to the file `out`."""
    replies, _, _ = read_states(engine.frozen, prompts, samples, progress)
    prompts_of_replies = replies.prompt_index.tolist()
    is_held_out = regression.split_by_prompt(prompts_of_replies, HELD_OUT_SHARE, sampling.seed)
    fitted = fit_head(
        replies, is_held_out, engine.frozen.vocabulary, config, sampling.seed, progress
    )
    frozen = engine.frozen.frozen(engine.model)
    head.write(out, fitted.tensors, frozen, {"reward": sampling.reward})
    return fitted


def fit_value_lm(
    engine: TransformersEngine,
    prompts: Sequence[Conversation],
    samples: Mapping[str, Sequence[ScoredReply]],
    config: FitConfig,
    seed: int,
    out: Path,
    progress: Progress,
) -> FittedValueHeads:
    """Fit one value LM with a head per reward and save it to the folder `out`.

    Args:
        engine: started.
        prompts: the prompts of the samples.
        samples: for the name of each head, the same replies scored by its reward.
        config: settings of the fit.
        seed: of the split into training and held-out prompts, and of the order of the samples.
        out: folder to write.
        progress: called with a line of text after each step of the work.

    Returns:
        The heads, in the order of `samples`.

    Raises:
        ValueError: the rewards have scored different replies.
    """
    first = next(iter(samples.values()))
    texts = [sample.text for sample in first]
    for name, scored in samples.items():
        if [sample.text for sample in scored] != texts:
            raise ValueError(f"samples: {name!r} has scored different replies than the first one")
    states, token_ids, reply_starts = read_states(engine.frozen, prompts, first, progress)
    replies = []
    for scored in samples.values():
        rewards = torch.tensor([sample.reward for sample in scored])
        replies.append(states.with_rewards(rewards))
    name = config.value_model or engine.config.model
    lm, loading = AutoModel.from_pretrained(
        locate(name), dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_complete("value_model", name, "value LM to start from", loading)
    fix_rope(lm, None)
    data = TokenizedReplies(token_ids, reply_starts, tuple(replies))
    fitted = fit_heads(lm, data, config, HELD_OUT_SHARE, seed, progress)
    named_heads = dict(zip(samples, fitted.heads, strict=True))
    lookahead.write(out, lm, named_heads, engine.frozen.frozen(engine.model), {})
    return fitted
