"""Scored replies of the frozen model, on disk as they come, and the states in which their tokens were chosen."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from infer_align.engines.transformers import TransformersEngine
from infer_align.engines.transformers.model import Model
from infer_align.errors import EngineFailed, InvalidRequest
from infer_align.fitting.regression import Replies
from infer_align.flow.request import SEED_RANGE
from infer_align.flow.run import score
from infer_align.objectives import Ensemble
from infer_align.rewards import Reward
from infer_align.types import Candidate, Draw, Plan

Progress = Callable[[str], None]
Conversation = list[dict[str, Any]]

# Prompts that are sampled at once; what they gave is on disk before the next ones start.
BATCH = 16


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """What a samples file was made with; another run may only continue it with the same."""

    model: str
    reward: str
    objective: str
    replies_per_prompt: int
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class ScoredReply:
    """One scored reply of the frozen model."""

    prompt: int
    asked: str  # digest of the prompt, so that other prompts are not taken for these
    text: str
    finish_reason: str
    reward: float


def read_prompts(path: Path) -> list[Conversation]:
    """One prompt a line: {"messages": [...]}, or a JSON string, which is a user's message.

    Raises:
        InvalidRequest: not readable, or a line is neither.
    """
    try:
        # Not splitlines: JSON strings may hold other characters that end a line to Python.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise InvalidRequest(
            f"prompts: {path} cannot be read: {error.strerror}.", param="prompts"
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"prompts: {path} is not UTF-8: {error}.", param="prompts") from None
    return [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _prompt(line: str, place: str) -> Conversation:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages = value.get("messages") if isinstance(value, dict) else None
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(message, dict) for message in messages)
    ):
        raise InvalidRequest(
            f'prompts: {place} is neither {{"messages": [...]}} nor a JSON string.', param="prompts"
        )
    return messages


async def sample_replies(
    engine: TransformersEngine,
    reward: Reward,
    prompts: Sequence[Conversation],
    how: SamplingConfig,
    path: Path,
    progress: Progress,
) -> list[ScoredReply]:
    """Scored replies to every prompt, continued where an earlier run stopped; finished prompts are on disk before the next start.

    Raises:
        InvalidRequest: the file is damaged, or was made with other settings or prompts; or a reply could not be scored.
        EngineFailed: a reply could not be sampled.
    """
    done = _resume(path, how, [_digest(messages) for messages in prompts])
    missing = [i for i in range(len(prompts)) if i not in {s.prompt for s in done}]
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            found = await asyncio.gather(
                *(_replies(engine, reward, prompts[i], i, how) for i in batch)
            )
            for samples in found:
                file.write("".join(json.dumps(asdict(s)) + "\n" for s in samples))
                done += samples
            file.flush()
            os.fsync(file.fileno())
            progress(f"sampled {min(start + BATCH, len(missing))} of {len(missing)} prompts")
    return done


def _digest(messages: Conversation) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]


def _resume(path: Path, how: SamplingConfig, digests: Sequence[str]) -> list[ScoredReply]:
    header = json.dumps(asdict(how)) + "\n"
    if not path.exists():
        _rewrite(path, header)
        return []
    *lines, cut = path.read_text(encoding="utf-8", errors="replace").split(
        "\n"
    )  # whole lines; what follows was cut off
    if not lines:
        raise _unusable(path, "has no header")
    if _json(path, 1, lines[0]) != asdict(how):
        raise _unusable(path, "was made with other settings")
    samples = [_read_sample(path, number, line) for number, line in enumerate(lines[1:], start=2)]
    by_prompt = [
        (prompt, list(group)) for prompt, group in itertools.groupby(samples, lambda s: s.prompt)
    ]
    unfinished = (
        [by_prompt.pop()] if by_prompt and len(by_prompt[-1][1]) < how.replies_per_prompt else []
    )
    if len({prompt for prompt, _ in by_prompt + unfinished}) < len(by_prompt + unfinished):
        raise _unusable(path, "holds a prompt twice: two runs have written to it")
    for prompt, group in by_prompt:
        if len(group) != how.replies_per_prompt:
            raise _unusable(
                path,
                f"has {len(group)} replies to prompt {prompt} instead of {how.replies_per_prompt}",
            )
    if any(s.prompt >= len(digests) or s.asked != digests[s.prompt] for s in samples):
        raise _unusable(path, "was made with other prompts; new ones can only be added at the end")
    kept = [s for _, group in by_prompt for s in group]
    if cut or unfinished:  # the last prompt is drawn again
        _rewrite(path, header + "".join(json.dumps(asdict(s)) + "\n" for s in kept))
    return kept


def _rewrite(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _read_sample(path: Path, number: int, line: str) -> ScoredReply:
    value = _json(path, number, line)
    try:
        found = ScoredReply(**value)
    except TypeError:
        raise _unusable(path, f"is damaged: line {number} is not a sample") from None
    return found


def _json(path: Path, number: int, line: str) -> Any:
    try:
        value = json.loads(line)
    except ValueError:
        raise _unusable(path, f"is damaged: line {number} is not JSON") from None
    return value


def _unusable(path: Path, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"samples: {path} {why}; delete it, or write the value elsewhere.", param="samples"
    )


async def _replies(
    engine: TransformersEngine,
    reward: Reward,
    messages: Conversation,
    prompt: int,
    how: SamplingConfig,
) -> list[ScoredReply]:
    n = how.replies_per_prompt
    first = how.seed * 1_000_003 + prompt * n
    wanted = Draw(
        {"messages": messages, "max_tokens": how.max_tokens},
        n,
        tuple((first + i) % SEED_RANGE for i in range(n)),
    )
    try:
        candidates = await draw_candidates(engine, wanted)
    except InvalidRequest as error:
        raise InvalidRequest(f"prompt {prompt}: {error.message}", param="prompts") from error
    scores = await score_candidates(reward, messages, candidates, how.objective)
    bad = [i for i, value in enumerate(scores) if not math.isfinite(value)]
    if bad:
        raise InvalidRequest(
            f"reward {how.reward}: {len(bad)} of {n} replies to prompt {prompt} could not be scored; "
            "a value can only be fitted to a reward that scores every reply: mend the reward or leave the prompt out.",
            param="reward",
        )
    asked = _digest(messages)
    return [
        ScoredReply(prompt, asked, c.text, c.finish_reason or "stop", float(value))
        for c, value in zip(candidates, scores, strict=True)
    ]


async def draw_candidates(engine: TransformersEngine, wanted: Draw) -> list[Candidate]:
    """Its candidates, in order.

    Raises:
        EngineFailed: one of them failed.
    """
    async with engine.sample(wanted) as stream:
        found = [event async for event in stream if isinstance(event, Candidate)]
    for candidate in found:
        if candidate.error:
            raise EngineFailed(candidate.error)
    return sorted(found, key=lambda c: c.index)


async def score_candidates(
    reward: Reward, messages: Conversation, candidates: Sequence[Candidate], objective: str
) -> list[float]:
    """One number each, by the objective over the reward's members; NaN where it could not be scored."""
    ensemble = Ensemble(objective=objective)  # type: ignore[arg-type]
    plan = Plan(
        draws=(Draw({"messages": messages}),),
        objective=ensemble,
        rewards={"reward": 1.0},
        messages=messages,
    )
    scores = await score(plan, {"reward": reward}, candidates)
    values: list[float] = ensemble.reduce(scores.members["reward"]).tolist()
    return values


def read_states(
    model: Model,
    prompts: Sequence[Conversation],
    samples: Sequence[ScoredReply],
    progress: Progress,
) -> tuple[Replies, list[list[int]], list[int]]:
    """The frozen model's state before each token of each reply, by one forward each; what was read; where replies begin."""
    hidden, tokens, reply, texts, starts = [], [], [], [], []
    for i, s in enumerate(samples):
        prompt = model.render(Draw({"messages": prompts[s.prompt]}))
        ids = model.tokenizer(s.text, add_special_tokens=False)["input_ids"]
        states = model.states(prompt.ids + ids)[len(prompt.ids) - 1 :]
        if model.eos and (s.finish_reason == "stop" or not ids):
            ids = [*ids, _end(model, states[-1])]  # the end is a token too, and worth steering
        hidden.append(states[: len(ids)].cpu())
        tokens += ids
        reply += [i] * len(ids)
        texts.append(prompt.ids + ids)
        starts.append(len(prompt.ids))
        if i % 500 == 499:
            progress(f"read {i + 1} of {len(samples)} replies")
    rewards = torch.tensor([s.reward for s in samples])
    prompt_of = torch.tensor([s.prompt for s in samples])
    return (
        Replies(
            torch.cat(hidden).clone(), torch.tensor(tokens), torch.tensor(reply), rewards, prompt_of
        ),
        texts,
        starts,
    )


def _end(model: Model, state: torch.Tensor) -> int:
    """The likeliest of the tokens that end an answer: a chat model has several, and says one of them."""
    ends = sorted(model.eos)
    weight = model.lm.get_output_embeddings().weight[ends].float()
    return ends[int((weight @ state).argmax())]
