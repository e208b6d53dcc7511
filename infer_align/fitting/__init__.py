"""`infer-align fit value`: from prompts and any configured reward to a value that VAS can steer with.

prompts ─ engine ─▶ replies ─ reward ─▶ samples.jsonl ─ states, TD(lambda) targets ─▶ value ─▶ report
                                                          held-out R², reward against KL over beta
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

from infer_align.demo.locate import locate
from infer_align.engines.transformers import TransformersEngine
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.fitting import curve, regression
from infer_align.fitting.lookahead import TokenizedReplies, fit_lookahead
from infer_align.fitting.samples import (
    Conversation,
    Progress,
    SamplingConfig,
    ScoredReply,
    read_states,
    sample_replies,
)
from infer_align.rewards import Reward
from infer_align.values import head, lookahead, tokenizer_digest
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import Lookahead, LookaheadValue

FEWEST_SAMPLES = 200
FEWEST_PROMPTS = 10  # a fifth of them is held out
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class FitConfig:
    """How a value is fitted."""

    kind: Literal["head", "lookahead"] = field(
        default="head",
        metadata={
            "description": "a head on the frozen model's states, or a value LM that looks one token ahead"
        },
    )
    method: Literal["ridge", "sgd"] = field(
        default="sgd",
        metadata={"description": "of a head: closed form (linear), or an MLP by gradients"},
    )
    rank: int = field(default=64, metadata={"ge": 1, "description": "rank of a head"})
    ridge: float = field(
        default=100.0,
        metadata={"gt": 0, "description": "samples that weigh as much as the prior (ridge)"},
    )
    width: int = field(
        default=128, metadata={"ge": 1, "description": "hidden units of the MLP (sgd)"}
    )
    epochs: int = field(
        default=8, metadata={"ge": 1, "description": "passes over the samples (sgd, lookahead)"}
    )
    gamma: float = field(
        default=1.0, metadata={"gt": 0, "le": 1, "description": "discount per token"}
    )
    lam: float = field(
        default=1.0,
        metadata={"ge": 0, "le": 1, "description": "trace of the targets; 1 is the plain reward"},
    )
    value_model: str | None = field(
        default=None,
        metadata={
            "description": "what a lookahead value starts from; default: a copy of the frozen model"
        },
    )
    largest_beta: float = field(
        default=16.0, metadata={"gt": 0, "description": "end of the grid that is tried"}
    )
    curve_replies: int = field(
        default=100,
        metadata={
            "ge": 2,
            "description": "replies that each beta is tried with, to the held-out prompts in turn",
        },
    )


@dataclass(frozen=True, slots=True)
class FitReport:
    """What is known of a fitted value."""

    samples: int
    held_out: regression.Fitness
    curve: tuple[curve.BetaPoint, ...]
    suggested_beta: float


async def fit_value(
    engine: TransformersEngine,
    reward: Reward,
    prompts: Sequence[Conversation],
    sampling: SamplingConfig,
    fitting: FitConfig,
    out: Path,
    progress: Progress,
) -> FitReport:
    """Sample, score, fit, save to `out`, and try it over beta. The samples are kept beside it and continued by a later run.

    Args:
        engine: started; its model stays as it is.
        reward: started.
        prompts: what replies are sampled to.
        sampling: how they are sampled.
        fitting: how the value is fitted.
        out: a head's file, or a value LM's folder.
        progress: told what is being done.

    Raises:
        InvalidRequest: too few samples, a reply that cannot be scored, rewards that are all the same, or samples made otherwise.
        ConfigError: `out` cannot be written, or the value model does not fit the frozen model.
    """
    out = _ready(engine, reward, fitting, out)
    samples = await sample_replies(
        engine, reward, prompts, sampling, out.with_suffix(".samples.jsonl"), progress
    )
    _check(samples)
    unseen = [prompts[i] for i in _held_out(samples, sampling.seed)]
    if fitting.kind == "head":
        fitness = _fit_head(engine, prompts, samples, fitting, sampling, out, progress)
        await engine.add_value(out.stem, HeadValue(str(out)))
    else:
        (fitness,) = fit_value_lm(
            engine, prompts, {out.stem: samples}, fitting, sampling.seed, out, progress
        )
        await engine.add_value(out.stem, LookaheadValue(Lookahead(str(out))))
    tried = [*itertools.islice(itertools.cycle(unseen), fitting.curve_replies)]
    betas = [*curve.beta_grid(fitting.largest_beta)]
    points = await curve.reward_kl_curve(engine, reward, tried, out.stem, betas, sampling, progress)
    report = FitReport(len(samples), fitness, points, curve.suggest_beta(points))
    out.with_suffix(".report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report


def _ready(engine: TransformersEngine, reward: Reward, fitting: FitConfig, out: Path) -> Path:
    """`out`, absolute; and what would otherwise fail after hours of sampling fails now."""
    if fitting.kind == "head" and out.is_dir():
        raise ConfigError(
            f"{out} is a folder; a head is one file, such as {out / 'value.safetensors'}."
        )
    if fitting.kind == "lookahead" and out.is_file():
        raise ConfigError(f"{out} is a file; a lookahead value is a folder: name another.")
    if reward.attributes:
        raise InvalidRequest(
            f"reward: it has several objectives ({', '.join(reward.attributes)}); a value is fitted to one number.",
            param="reward",
        )
    if fitting.kind == "lookahead":
        _check_value_model(engine, fitting.value_model)
    return out.absolute()


def _check_value_model(engine: TransformersEngine, name: str | None) -> None:
    if name is None:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(locate(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"value_model: {name!r} cannot be loaded: {error}") from error
    if tokenizer_digest(tokenizer.get_vocab()) != engine.frozen.frozen(engine.model).tokenizer:
        raise ConfigError(
            f"value_model: the token ids of {name!r} are not those of {engine.model!r}; take one with its tokenizer."
        )


def _held_out(samples: Sequence[ScoredReply], seed: int) -> list[int]:
    """Prompts that the value is not fitted to."""
    held = regression.split_by_prompt([s.prompt for s in samples], HELD_OUT_SHARE, seed).tolist()
    return sorted({s.prompt for s, out in zip(samples, held, strict=True) if out})


def _check(samples: Sequence[ScoredReply]) -> None:
    if len(samples) < FEWEST_SAMPLES:
        raise InvalidRequest(
            f"samples: {len(samples)} are too few to fit a value; give at least {FEWEST_SAMPLES}: "
            "more prompts, or more replies each.",
            param="samples",
        )
    prompts = len({s.prompt for s in samples})
    if prompts < FEWEST_PROMPTS:
        raise InvalidRequest(
            f"prompts: {prompts} are too few, as the value is tried on a fifth of them; give at least {FEWEST_PROMPTS}.",
            param="prompts",
        )
    if np.ptp([s.reward for s in samples]) == 0:
        raise InvalidRequest(
            "reward: every reply has the same score, so there is nothing to steer towards.",
            param="reward",
        )


def _fit_head(
    engine: TransformersEngine,
    prompts: Sequence[Conversation],
    samples: Sequence[ScoredReply],
    how: FitConfig,
    sampling: SamplingConfig,
    out: Path,
    progress: Progress,
) -> regression.Fitness:
    replies, _, _ = read_states(engine.frozen, prompts, samples, progress)
    held = regression.split_by_prompt(replies.prompts.tolist(), HELD_OUT_SHARE, sampling.seed)
    training, testing = replies.select(~held), replies.select(held)
    vocabulary = engine.frozen.vocabulary
    if how.method == "ridge":
        tensors = regression.fit_ridge(
            training, vocabulary, rank=how.rank, ridge=how.ridge, gamma=how.gamma, lam=how.lam
        )
    else:
        tensors = regression.fit_sgd(
            training,
            testing,
            vocabulary,
            rank=how.rank,
            width=how.width,
            gamma=how.gamma,
            lam=how.lam,
            epochs=how.epochs,
            seed=sampling.seed,
            progress=progress,
        )
    head.write(out, tensors, engine.frozen.frozen(engine.model), {"reward": sampling.reward})
    return regression.fitness(regression.predict(tensors, testing.hidden, testing.tokens), testing)


def fit_value_lm(
    engine: TransformersEngine,
    prompts: Sequence[Conversation],
    samples: Mapping[str, Sequence[ScoredReply]],
    how: FitConfig,
    seed: int,
    out: Path,
    progress: Progress,
) -> list[regression.Fitness]:
    """One value LM with a head per reward, saved to the folder `out`; `samples` are the same replies under each of the rewards."""
    first = next(iter(samples.values()))
    if any([s.text for s in scored] != [s.text for s in first] for scored in samples.values()):
        raise ValueError("samples: the rewards have scored different replies")
    states, ids, starts = read_states(engine.frozen, prompts, first, progress)
    replies = tuple(
        states.with_rewards(torch.tensor([s.reward for s in scored])) for scored in samples.values()
    )
    lm = AutoModel.from_pretrained(
        locate(how.value_model or engine.config.model), dtype=torch.float32
    )
    heads, found = fit_lookahead(
        lm,
        TokenizedReplies(ids, starts, replies),
        gamma=how.gamma,
        lam=how.lam,
        epochs=how.epochs,
        held_out=HELD_OUT_SHARE,
        seed=seed,
        progress=progress,
    )
    named = dict(zip(samples, heads, strict=True))
    lookahead.write(out, lm, named, engine.frozen.frozen(engine.model), {})
    return found
