"""Scored replies of the frozen model, on disk as they come, and the states in which their tokens were chosen."""

from __future__ import annotations

import asyncio
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
from infer_align.errors import InvalidRequest
from infer_align.fitting.regression import Replies
from infer_align.objectives import Ensemble
from infer_align.request import SEED_RANGE
from infer_align.rewards import Reward
from infer_align.run import score
from infer_align.types import Candidate, Draw, Plan

Progress = Callable[[str], None]
Conversation = list[dict[str, Any]]

# Prompts that are sampled at once; what they gave is on disk before the next ones start.
BATCH = 16


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
class Sample:
    """One scored reply of the frozen model."""

    prompt: int
    text: str
    finish_reason: str
    reward: float


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
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            found = await asyncio.gather(*(_replies(engine, reward, prompts[i], i, how) for i in batch))
            for samples in found:
                file.write("".join(json.dumps(asdict(s)) + "\n" for s in samples))
                done += samples
            file.flush()
            os.fsync(file.fileno())
            progress(f"sampled {min(start + BATCH, len(missing))} of {len(missing)} prompts")
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
    wanted = Draw({"messages": messages, "max_tokens": how.max_tokens}, n, tuple((first + i) % SEED_RANGE for i in range(n)))
    candidates = await draw(engine, wanted)
    scores = await scores_of(reward, messages, candidates, how.objective)
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


async def draw(engine: TransformersEngine, wanted: Draw) -> list[Candidate]:
    """Its candidates, in order."""
    async with engine.sample(wanted) as stream:
        found = [event async for event in stream if isinstance(event, Candidate)]
    return sorted(found, key=lambda c: c.index)


async def scores_of(reward: Reward, messages: Conversation, candidates: Sequence[Candidate], objective: str) -> list[float]:
    """One number each, by the objective over the reward's members; NaN where it could not be scored."""
    ensemble = Ensemble(objective=objective)  # type: ignore[arg-type]
    plan = Plan(draws=(Draw({"messages": messages}),), objective=ensemble, rewards={"reward": 1.0})
    scores = await score(plan, {"reward": reward}, candidates)
    values: list[float] = ensemble.reduce(scores.members["reward"]).tolist()
    return values


def read_states(
    model: Model, prompts: Sequence[Conversation], samples: Sequence[Sample], progress: Progress
) -> tuple[Replies, list[list[int]], list[int]]:
    """The frozen model's state before each token of each reply, one forward per reply; and what was read, with where replies begin."""
    hidden, tokens, reply, texts, starts = [], [], [], [], []
    for i, s in enumerate(samples):
        prompt = model.render(Draw({"messages": prompts[s.prompt]}))
        ids = model.tokenizer(s.text, add_special_tokens=False)["input_ids"]
        if s.finish_reason == "stop" or not ids:
            ids = [*ids, min(model.eos)]  # the end is a token too, and worth steering
        hidden.append(model.states(prompt.ids + ids)[len(prompt.ids) - 1 : -1].cpu())
        tokens += ids
        reply += [i] * len(ids)
        texts.append(prompt.ids + ids)
        starts.append(len(prompt.ids))
        if i % 500 == 499:
            progress(f"read {i + 1} of {len(samples)} replies")
    rewards = torch.tensor([s.reward for s in samples])
    prompt_of = torch.tensor([s.prompt for s in samples])
    return Replies(torch.cat(hidden).clone(), torch.tensor(tokens), torch.tensor(reply), rewards, prompt_of), texts, starts
