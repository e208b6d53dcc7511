"""`infer-align fit value`: fit a value that VAS can steer with, from prompts and any reward.

prompts ─ engine ─▶ replies ─ reward ─▶ samples.jsonl ─ states, TD(lambda) ─▶ value ─▶ report

The report has R² on held-out prompts, and reward against KL over beta.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from infer_align.checkpoints.complete import check_complete
from infer_align.checkpoints.rope import fix_rope
from infer_align.demo.locate import locate
from infer_align.engines.transformers import TransformersEngine
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.fitting import curve, regression
from infer_align.fitting.lookahead import TokenizedReplies, fit_lookahead
from infer_align.fitting.regression import Progress
from infer_align.fitting.samples import (
    Conversation,
    SamplingConfig,
    ScoredReply,
    read_states,
    sample_replies,
)
from infer_align.rewards import Reward
from infer_align.values import head, lookahead, tokenizer_digest
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import Lookahead, LookaheadValue

MIN_SAMPLES = 200
# A fifth of the prompts is held out.
MIN_PROMPTS = 10
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class FitConfig:
    """The kind of a value and the settings of its fit."""

    kind: Literal["head", "lookahead"] = field(
        default="head",
        metadata={
            "description": '"head": a head on the hidden states of the frozen model. '
            '"lookahead": a value LM that reads each candidate token.'
        },
    )
    method: Literal["ridge", "sgd"] = field(
        default="sgd",
        metadata={
            "description": '"ridge": fit a linear head in closed form. '
            '"sgd": fit an MLP head by gradient descent.'
        },
    )
    rank: int = field(default=64, metadata={"ge": 1, "description": "Rank of a head."})
    ridge: float = field(
        default=100.0,
        metadata={
            "gt": 0,
            "description": "Weight of the prior of a ridge fit, as a number of samples.",
        },
    )
    width: int = field(
        default=128, metadata={"ge": 1, "description": "Number of hidden units of an MLP head."}
    )
    epochs: int = field(
        default=8,
        metadata={"ge": 1, "description": "Passes over the samples (sgd and lookahead)."},
    )
    gamma: float = field(
        default=1.0, metadata={"gt": 0, "le": 1, "description": "Discount per token."}
    )
    lam: float = field(
        default=1.0,
        metadata={
            "ge": 0,
            "le": 1,
            "description": "Trace decay of the TD(lambda) targets; 1 fits the reward itself.",
        },
    )
    value_model: str | None = field(
        default=None,
        metadata={
            "description": "Model that a lookahead value starts from. "
            "Default: a copy of the frozen model."
        },
    )
    largest_beta: float = field(
        default=16.0, metadata={"gt": 0, "description": "Largest beta of the reported curve."}
    )
    curve_replies: int = field(
        default=100,
        metadata={
            "ge": 2,
            "description": "Number of replies per beta of the reported curve. "
            "The held-out prompts are used in turn.",
        },
    )


@dataclass(frozen=True, slots=True)
class FitReport:
    """The quality of a fitted value.

    Attributes:
        samples: number of samples, held-out ones included.
        held_out: prediction of the rewards of held-out replies.
        curve: reward against KL on held-out prompts, over beta.
        suggested_beta: see `curve.suggest_beta`.
    """

    samples: int
    held_out: regression.Fitness
    curve: tuple[curve.BetaPoint, ...]
    suggested_beta: float


async def fit_value(
    engine: TransformersEngine,
    reward: Reward,
    prompts: Sequence[Conversation],
    sampling: SamplingConfig,
    config: FitConfig,
    out: Path,
    progress: Progress,
) -> FitReport:
    """Sample and score replies, fit a value, save it to `out`, and measure it over beta.

    The samples and the report are saved next to `out`. A later run continues the samples.

    Args:
        engine: started; its model is not changed, but the value is added to the engine.
        reward: started; it scores the replies.
        prompts: the prompts to sample replies to.
        sampling: settings of the replies.
        config: settings of the fit.
        out: file of a head, or folder of a value LM.
        progress: called with a line of text after each step of the work.

    Raises:
        InvalidRequest: there are too few samples, a reply cannot be scored, all rewards are equal,
            or the samples file has other settings.
        ConfigError: `out` cannot be written, or the value model does not fit the frozen model.
    """
    out = _checked_output(engine, reward, config, out)
    samples_path = out.with_suffix(".samples.jsonl")
    samples = await sample_replies(engine, reward, prompts, sampling, samples_path, progress)
    _check_samples(samples)
    if config.kind == "head":
        fitness = _fit_head(engine, prompts, samples, config, sampling, out, progress)
        await engine.add_value(out.stem, HeadValue(str(out)))
    else:
        (fitness,) = fit_value_lm(
            engine, prompts, {out.stem: samples}, config, sampling.seed, out, progress
        )
        await engine.add_value(out.stem, LookaheadValue(Lookahead(str(out))))
    held_out = [prompts[i] for i in _held_out_prompts(samples, sampling.seed)]
    curve_prompts = list(itertools.islice(itertools.cycle(held_out), config.curve_replies))
    betas = list(curve.beta_grid(config.largest_beta))
    points = await curve.reward_kl_curve(
        engine, reward, curve_prompts, out.stem, betas, sampling, progress
    )
    report = FitReport(len(samples), fitness, points, curve.suggest_beta(points))
    out.with_suffix(".report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report


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
    if config.kind == "lookahead" and config.value_model is not None:
        _check_value_model(engine, config.value_model)
    return out.absolute()


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


def _check_samples(samples: Sequence[ScoredReply]) -> None:
    if len(samples) < MIN_SAMPLES:
        raise InvalidRequest(
            f"samples: {len(samples)} are too few to fit a value; give at least {MIN_SAMPLES}: "
            "more prompts, or more replies per prompt.",
            param="samples",
        )
    prompts = len({sample.prompt for sample in samples})
    if prompts < MIN_PROMPTS:
        raise InvalidRequest(
            f"prompts: {prompts} are too few, because a fifth of them is held out; give at least "
            f"{MIN_PROMPTS}.",
            param="prompts",
        )
    if np.ptp([sample.reward for sample in samples]) == 0:
        raise InvalidRequest(
            "reward: every reply has the same score, so there is nothing to steer towards. "
            "Use another reward or other prompts.",
            param="reward",
        )


def _held_out_prompts(samples: Sequence[ScoredReply], seed: int) -> list[int]:
    """Return the prompts that the value is not fitted to."""
    prompts = [sample.prompt for sample in samples]
    held = regression.split_by_prompt(prompts, HELD_OUT_SHARE, seed).tolist()
    return sorted(set(itertools.compress(prompts, held)))


def _fit_head(
    engine: TransformersEngine,
    prompts: Sequence[Conversation],
    samples: Sequence[ScoredReply],
    config: FitConfig,
    sampling: SamplingConfig,
    out: Path,
    progress: Progress,
) -> regression.Fitness:
    """Fit a head, save it to the file `out`, and return its fitness."""
    replies, _, _ = read_states(engine.frozen, prompts, samples, progress)
    held = regression.split_by_prompt(replies.prompt_index.tolist(), HELD_OUT_SHARE, sampling.seed)
    training = replies.select(~held)
    testing = replies.select(held)
    if config.method == "ridge":
        tensors = regression.fit_ridge(
            training,
            engine.frozen.vocabulary,
            rank=config.rank,
            ridge=config.ridge,
            gamma=config.gamma,
            lam=config.lam,
        )
    else:
        tensors = regression.fit_sgd(
            training,
            testing,
            engine.frozen.vocabulary,
            rank=config.rank,
            width=config.width,
            gamma=config.gamma,
            lam=config.lam,
            epochs=config.epochs,
            seed=sampling.seed,
            progress=progress,
        )
    head.write(out, tensors, engine.frozen.frozen(engine.model), {"reward": sampling.reward})
    predictions = regression.predict(tensors, testing.hidden, testing.tokens)
    return regression.fitness(predictions, testing)


def fit_value_lm(
    engine: TransformersEngine,
    prompts: Sequence[Conversation],
    samples: Mapping[str, Sequence[ScoredReply]],
    config: FitConfig,
    seed: int,
    out: Path,
    progress: Progress,
) -> list[regression.Fitness]:
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
        The held-out fitness of each head, in the order of `samples`.

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
    heads, fits = fit_lookahead(
        lm,
        TokenizedReplies(token_ids, reply_starts, tuple(replies)),
        gamma=config.gamma,
        lam=config.lam,
        epochs=config.epochs,
        held_out=HELD_OUT_SHARE,
        seed=seed,
        progress=progress,
    )
    named_heads = dict(zip(samples, heads, strict=True))
    lookahead.write(out, lm, named_heads, engine.frozen.frozen(engine.model), {})
    return fits
