"""`infer-align fit value`: from prompts and any configured reward to a value that VAS can steer with; the frozen model is untouched.

    prompts ─ engine ─▶ replies ─ reward ─▶ samples.jsonl ─ frozen states, TD(lambda) targets ─▶ value ─▶ report
                                                                                    held-out R², reward against KL over beta
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from infer_align.engines.transformers import TransformersEngine
from infer_align.errors import InvalidRequest
from infer_align.objectives import Ensemble
from infer_align.request import SEED_RANGE
from infer_align.rewards import Reward
from infer_align.run import score
from infer_align.types import Candidate, Draw, Plan, Steering
from infer_align.values import fit, head
from infer_align.values.head import HeadValue

Progress = Callable[[str], None]
FEWEST_SAMPLES = 200
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a samples file was made with; another run may only continue it with the same."""

    model: str
    reward: str
    objective: str
    replies_per_prompt: int = 8
    max_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Fitting:
    """How a head is fitted."""

    method: Literal["ridge", "sgd"] = field(default="ridge", metadata={"description": "closed form, or an MLP by gradients"})
    rank: int = field(default=64, metadata={"ge": 1, "description": "r of the head"})
    ridge: float = field(default=30.0, metadata={"gt": 0, "description": "samples that weigh as much as the prior"})
    width: int = field(default=128, metadata={"ge": 1, "description": "hidden units of the MLP"})
    epochs: int = field(default=10, metadata={"ge": 1, "description": "passes over the samples (sgd)"})
    gamma: float = field(default=1.0, metadata={"gt": 0, "le": 1, "description": "discount per token"})
    lam: float = field(default=0.95, metadata={"ge": 0, "le": 1, "description": "trace of the targets; 1 is the plain reward"})


@dataclass(frozen=True, slots=True)
class Sample:
    """One scored reply of the frozen model."""

    prompt: int
    text: str
    finish_reason: str
    reward: float


@dataclass(frozen=True, slots=True)
class BetaPoint:
    """What steering with one beta did on held-out prompts."""

    beta: float
    reward: float
    reward_se: float
    kl: float  # nats per reply, from the frozen model
    kl_se: float


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a fitted value."""

    samples: int
    held_out: fit.Fitness
    curve: tuple[BetaPoint, ...]
    suggested_beta: float


Conversation = list[dict[str, Any]]


def read_prompts(path: Path) -> list[Conversation]:
    """One prompt a line: {"messages": [...]}, or a JSON string, which is a user's message.

    Raises:
        InvalidRequest: not readable, or a line is neither.
    """
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidRequest(f"prompts: {path} cannot be read: {error.strerror}.", param="prompts") from None
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            prompts.append([{"role": "user", "content": value}] if isinstance(value, str) else list(value["messages"]))
        except (ValueError, TypeError, KeyError):
            raise InvalidRequest(
                f'prompts: {path}:{number} is neither {{"messages": [...]}} nor a JSON string.', param="prompts"
            ) from None
    return prompts


async def sample(
    engine: TransformersEngine, reward: Reward, prompts: Sequence[Conversation], how: Sampling, path: Path, progress: Progress
) -> list[Sample]:
    """Scored replies to every prompt, continued where an earlier run stopped; every finished prompt is on disk before the next ones start.

    Raises:
        InvalidRequest: the file was made with other settings, or a reply could not be scored.
    """
    done = _resume(path, how)
    missing = [i for i in range(len(prompts)) if i not in {s.prompt for s in done}]
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(missing), 16):
            batch = missing[start : start + 16]
            found = await asyncio.gather(*(_replies(engine, reward, prompts[i], i, how) for i in batch))
            for samples in found:
                file.write("".join(json.dumps(asdict(s)) + "\n" for s in samples))
                done += samples
            file.flush()
            os.fsync(file.fileno())
            progress(f"sampled {min(start + 16, len(missing))} of {len(missing)} prompts")
    return done


def _resume(path: Path, how: Sampling) -> list[Sample]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(how)) + "\n")
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if not lines or json.loads(lines[0]) != asdict(how):
        raise InvalidRequest(f"samples: {path} was made with other settings; name another file, or delete it.", param="samples")
    whole = [line for line in lines if line.endswith("\n")]
    samples = [Sample(**json.loads(line)) for line in whole[1:]]
    counts = {s.prompt: sum(other.prompt == s.prompt for other in samples) for s in samples[-how.replies_per_prompt :]}
    kept = [s for s in samples if counts.get(s.prompt, how.replies_per_prompt) == how.replies_per_prompt]
    if len(kept) + 1 != len(lines):  # the last prompt was cut off: it is drawn again
        path.write_text(whole[0] + "".join(json.dumps(asdict(s)) + "\n" for s in kept))
    return kept


async def _replies(engine: TransformersEngine, reward: Reward, messages: Conversation, prompt: int, how: Sampling) -> list[Sample]:
    n = how.replies_per_prompt
    first = how.seed * 1_000_003 + prompt * n
    draw = Draw({"messages": messages, "max_tokens": how.max_tokens}, n, tuple((first + i) % SEED_RANGE for i in range(n)))
    candidates = await _draw(engine, draw)
    scores = await _scores(reward, messages, candidates, how.objective)
    bad = [i for i, value in enumerate(scores) if not math.isfinite(value)]
    if bad:
        raise InvalidRequest(
            f"reward {how.reward}: {len(bad)} of {n} replies to prompt {prompt} could not be scored; "
            "a value can only be fitted to a reward that scores every reply: mend the reward or leave the prompt out.",
            param="reward",
        )
    return [
        Sample(prompt, c.text, c.finish_reason or "stop", float(value)) for c, value in zip(candidates, scores, strict=True)
    ]


async def _draw(engine: TransformersEngine, draw: Draw) -> list[Candidate]:
    async with engine.sample(draw) as stream:
        found = [event async for event in stream if isinstance(event, Candidate)]
    return sorted(found, key=lambda c: c.index)


async def _scores(reward: Reward, messages: Conversation, candidates: Sequence[Candidate], objective: str) -> list[float]:
    ensemble = Ensemble(objective=objective)  # type: ignore[arg-type]
    plan = Plan(draws=(Draw({"messages": messages}),), objective=ensemble, rewards={"reward": 1.0})
    scores = await score(plan, {"reward": reward}, candidates)
    values: list[float] = ensemble.reduce(scores.members["reward"]).tolist()
    return values


def replies_of(engine: TransformersEngine, prompts: Sequence[Conversation], samples: Sequence[Sample], progress: Progress) -> fit.Replies:
    """The frozen model's state before each token of each reply, read in one forward per reply."""
    model = engine.frozen
    hidden, tokens, reply = [], [], []
    for i, s in enumerate(samples):
        prompt = model.render(Draw({"messages": prompts[s.prompt]}))
        ids = model.tokenizer(s.text, add_special_tokens=False)["input_ids"]
        if s.finish_reason == "stop":
            ids = [*ids, min(model.eos)]  # the end is a token too, and worth steering
        if not ids:
            continue
        hidden.append(model.states(prompt.ids + ids)[len(prompt.ids) - 1 : -1].cpu())
        tokens += ids
        reply += [i] * len(ids)
        if i % 500 == 499:
            progress(f"read {i + 1} of {len(samples)} replies")
    rewards = torch.tensor([s.reward for s in samples])
    used, renumbered = torch.unique(torch.tensor(reply), return_inverse=True)
    return fit.Replies(torch.cat(hidden), torch.tensor(tokens), renumbered, rewards[used])


def fit_head(
    engine: TransformersEngine, prompts: Sequence[Conversation], samples: Sequence[Sample], how: Fitting, seed: int, progress: Progress
) -> tuple[fit.HeadTensors, fit.Fitness]:
    """A head, and how well it predicts on prompts that it was not fitted to.

    Raises:
        InvalidRequest: too few samples, or their rewards are all the same.
    """
    if len(samples) < FEWEST_SAMPLES:
        raise InvalidRequest(
            f"samples: {len(samples)} are too few to fit a value; give at least {FEWEST_SAMPLES}: more prompts, or more replies each.",
            param="samples",
        )
    if np.ptp([s.reward for s in samples]) == 0:
        raise InvalidRequest("reward: every reply has the same score, so there is nothing to steer towards.", param="reward")
    replies = replies_of(engine, prompts, samples, progress)
    held = fit.split_by_prompt([s.prompt for s in samples if s.text or s.finish_reason == "stop"], HELD_OUT_SHARE, seed)
    training, testing = replies.only(~held), replies.only(held)
    vocabulary = engine.frozen.vocabulary
    if how.method == "ridge":
        tensors = fit.fit_ridge(training, vocabulary, rank=how.rank, ridge=how.ridge, gamma=how.gamma, lam=how.lam)
    else:
        options = {"rank": how.rank, "width": how.width, "gamma": how.gamma, "lam": how.lam, "epochs": how.epochs}
        tensors = fit.fit_sgd(training, testing, vocabulary, seed=seed, progress=progress, **options)  # type: ignore[arg-type]
    return tensors, fit.fitness(fit.predict(tensors, testing.hidden, testing.tokens), testing)


async def reward_kl_curve(
    engine: TransformersEngine,
    reward: Reward,
    prompts: Sequence[Conversation],
    value: str,
    betas: Sequence[float],
    how: Sampling,
    progress: Progress,
) -> tuple[BetaPoint, ...]:
    """Reward of one steered reply per prompt, and its KL from the frozen model: the sum over tokens of log pi_beta - log pi_0."""
    points = []
    for beta in betas:
        results = await asyncio.gather(
            *(_steered(engine, reward, messages, value, beta, how, how.seed + i) for i, messages in enumerate(prompts))
        )
        rewards, kls = np.array(results).T
        root = math.sqrt(len(rewards))
        points.append(BetaPoint(beta, rewards.mean(), rewards.std(ddof=1) / root, kls.mean(), kls.std(ddof=1) / root))
        progress(f"beta {beta:g}: reward {points[-1].reward:.3f}, KL {points[-1].kl:.2f} nats")
    return tuple(points)


async def _steered(
    engine: TransformersEngine, reward: Reward, messages: Conversation, value: str, beta: float, how: Sampling, seed: int
) -> tuple[float, float]:
    steering = Steering({value: beta}, 20, "keep")
    body = {"messages": messages, "max_tokens": how.max_tokens, "logprobs": True}
    (candidate,) = await _draw(engine, Draw(body, 1, (seed,), steering=steering))
    entries = candidate.choice["logprobs"]["content"]
    kl = sum(entry["aligned_logprob"] - entry["logprob"] for entry in entries)
    (value_of_reply,) = await _scores(reward, messages, [candidate], how.objective)
    return value_of_reply, kl


def suggest(curve: Sequence[BetaPoint]) -> float:
    """The smallest beta whose reward is within one standard error of the best: what lies beyond it costs KL and earns nothing."""
    best = max(curve, key=lambda point: point.reward)
    return min((p.beta for p in curve if p.reward >= best.reward - best.reward_se), key=abs)


def save(path: Path, tensors: Mapping[str, torch.Tensor], engine: TransformersEngine, description: str, report: Report) -> None:
    """The head, and beside it the report as JSON."""
    head.write(path, tensors, engine.frozen.frozen(), {"description": description, "suggested_beta": str(report.suggested_beta)})
    path.with_suffix(".report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")


def install(engine: TransformersEngine, name: str, path: Path) -> None:
    """Let the engine steer with a head that has just been written."""
    engine.add_value(name, HeadValue(str(path)))


def betas(largest: float) -> Iterator[float]:
    """A grid that doubles, from a 16th of the largest, behind 0: the frozen model itself."""
    yield 0.0
    yield from (largest / 2**i for i in range(4, -1, -1))
