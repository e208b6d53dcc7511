"""Sample scored replies of the frozen model, keep them in a file, and read the model's states.

A samples file is JSON lines. The first line is the `SamplingConfig`; each further line is a
`ScoredReply`. A run that was interrupted continues its file.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from infer_align.engines.transformers import TransformersEngine
from infer_align.engines.transformers.model import Model
from infer_align.errors import EngineFailed, InvalidRequest
from infer_align.fitting.regression import Progress, Replies
from infer_align.flow.scoring import score_with
from infer_align.flow.seeds import SEED_RANGE
from infer_align.objectives import Ensemble, Objective
from infer_align.rewards import Reward
from infer_align.types import Candidate, Draw

Conversation = list[dict[str, Any]]

# Number of prompts sampled at once. Their replies are on disk before the next prompts start.
BATCH = 16
# Runs with different seeds do not share the seed of a reply, up to this many replies per run.
SEED_STRIDE = 1_000_003
# Progress is reported each time this many replies were read.
PROGRESS_INTERVAL = 500


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """The settings of a samples file. Only a run with equal settings may continue the file."""

    model: str
    reward: str
    objective: Objective
    replies_per_prompt: int
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class ScoredReply:
    """One scored reply of the frozen model.

    Attributes:
        prompt: index of the prompt.
        prompt_digest: digest of the prompt, which detects that the prompts have changed.
        text: the reply.
        finish_reason: reason of the engine for ending the reply.
        reward: the score.
    """

    prompt: int
    prompt_digest: str
    text: str
    finish_reason: str
    reward: float


def read_prompts(path: Path) -> list[Conversation]:
    """Read one prompt per line: {"messages": [...]}, or a JSON string with a user message.

    Raises:
        InvalidRequest: the file cannot be read, or a line is in neither form.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(
            f"prompts: {path} cannot be read: {error.strerror}.", param="prompts"
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"prompts: {path} is not UTF-8: {error}.", param="prompts") from None
    # str.splitlines also splits at characters that JSON strings may contain.
    lines = text.removesuffix("\n").split("\n")
    return [_parse_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _parse_prompt(line: str, place: str) -> Conversation:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages = value.get("messages") if isinstance(value, dict) else None
    if not _is_conversation(messages):
        raise InvalidRequest(
            f'prompts: {place} is neither {{"messages": [...]}} nor a JSON string.', param="prompts"
        )
    return messages


def _is_conversation(messages: object) -> TypeGuard[Conversation]:
    if not isinstance(messages, list) or not messages:
        return False
    return all(isinstance(message, dict) for message in messages)


async def sample_replies(
    engine: TransformersEngine,
    reward: Reward,
    prompts: Sequence[Conversation],
    sampling: SamplingConfig,
    path: Path,
    progress: Progress,
) -> list[ScoredReply]:
    """Sample and score replies to every prompt, and continue the file of an earlier run.

    Prompts are sampled in batches. The replies to a batch are on disk before the next batch starts.

    Raises:
        InvalidRequest: the file is damaged or was made with other settings or prompts, or a reply
            could not be scored.
        EngineFailed: a reply could not be sampled.
    """
    replies = _resume(path, sampling, [_digest(messages) for messages in prompts])
    finished = {reply.prompt for reply in replies}
    remaining = [i for i in range(len(prompts)) if i not in finished]
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(remaining), BATCH):
            batch = remaining[start : start + BATCH]
            tasks = [_sample_prompt(engine, reward, prompts[i], i, sampling) for i in batch]
            for new_replies in await asyncio.gather(*tasks):
                file.writelines(_format_reply(reply) for reply in new_replies)
                replies += new_replies
            file.flush()
            os.fsync(file.fileno())
            done = min(start + BATCH, len(remaining))
            progress(f"sampled {done} of {len(remaining)} prompts")
    return replies


def _digest(messages: Conversation) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]


def _resume(path: Path, sampling: SamplingConfig, digests: Sequence[str]) -> list[ScoredReply]:
    """Return the replies to the finished prompts of a file, or start the file.

    An unfinished last prompt is removed from the file, so that all its replies are sampled again.
    """
    header = json.dumps(asdict(sampling)) + "\n"
    if not path.exists():
        _rewrite(path, header)
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    # Text after the last line end is a line that was only partly written.
    *lines, partial_line = text.split("\n")
    if not lines:
        raise _unusable(path, "has no header")
    if _parse_json(path, 1, lines[0]) != asdict(sampling):
        raise _unusable(path, "was made with other settings")
    replies = [_parse_reply(path, number, line) for number, line in enumerate(lines[1:], start=2)]
    groups = [list(group) for _, group in itertools.groupby(replies, lambda reply: reply.prompt)]
    is_unfinished = bool(groups) and len(groups[-1]) < sampling.replies_per_prompt
    finished = groups[:-1] if is_unfinished else groups
    _check_prompts(path, groups)
    _check_counts(path, finished, sampling.replies_per_prompt)
    _check_digests(path, replies, digests)
    finished_replies = list(itertools.chain.from_iterable(finished))
    if partial_line or is_unfinished:
        _rewrite(path, header + "".join(_format_reply(reply) for reply in finished_replies))
    return finished_replies


def _check_prompts(path: Path, groups: Sequence[Sequence[ScoredReply]]) -> None:
    """Refuse a file in which the replies to one prompt do not stand together."""
    prompts = {group[0].prompt for group in groups}
    if len(prompts) < len(groups):
        raise _unusable(path, "holds a prompt twice: two runs have written to it")


def _check_counts(path: Path, groups: Sequence[Sequence[ScoredReply]], expected: int) -> None:
    for group in groups:
        if len(group) != expected:
            prompt = group[0].prompt
            raise _unusable(
                path, f"has {len(group)} replies to prompt {prompt} instead of {expected}"
            )


def _check_digests(path: Path, replies: Sequence[ScoredReply], digests: Sequence[str]) -> None:
    for reply in replies:
        if reply.prompt >= len(digests) or reply.prompt_digest != digests[reply.prompt]:
            raise _unusable(
                path, "was made with other prompts; new ones can only be added at the end"
            )


def _rewrite(path: Path, text: str) -> None:
    """Replace the file as a whole, so that an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _format_reply(reply: ScoredReply) -> str:
    line = {
        "prompt": reply.prompt,
        "asked": reply.prompt_digest,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "reward": reply.reward,
    }
    return json.dumps(line) + "\n"


def _parse_reply(path: Path, number: int, line: str) -> ScoredReply:
    value = _parse_json(path, number, line)
    try:
        return ScoredReply(prompt_digest=value.pop("asked"), **value)
    except (AttributeError, KeyError, TypeError):
        raise _unusable(path, f"is damaged: line {number} is not a sample") from None


def _parse_json(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise _unusable(path, f"is damaged: line {number} is not JSON") from None


def _unusable(path: Path, problem: str) -> InvalidRequest:
    return InvalidRequest(
        f"samples: {path} {problem}. Delete it, or write the value to another path.",
        param="samples",
    )


async def _sample_prompt(
    engine: TransformersEngine,
    reward: Reward,
    messages: Conversation,
    prompt: int,
    sampling: SamplingConfig,
) -> list[ScoredReply]:
    """Sample and score all replies to one prompt."""
    n = sampling.replies_per_prompt
    first_seed = sampling.seed * SEED_STRIDE + prompt * n
    seeds = tuple((first_seed + i) % SEED_RANGE for i in range(n))
    body = {"messages": messages, "max_tokens": sampling.max_tokens}
    try:
        candidates = await draw_candidates(engine, Draw(body, n, seeds))
    except InvalidRequest as error:
        raise InvalidRequest(f"prompt {prompt}: {error.message}", param="prompts") from error
    scores = await score_candidates(reward, messages, candidates, sampling.objective)
    unscored = sum(not math.isfinite(value) for value in scores)
    if unscored:
        raise InvalidRequest(
            f"reward {sampling.reward}: {unscored} of {n} replies to prompt {prompt} could not be "
            "scored. A value can only be fitted to a reward that scores every reply. Fix the "
            "reward, or remove the prompt.",
            param="reward",
        )
    digest = _digest(messages)
    replies = []
    for candidate, value in zip(candidates, scores, strict=True):
        finish_reason = candidate.finish_reason or "stop"
        replies.append(ScoredReply(prompt, digest, candidate.text, finish_reason, float(value)))
    return replies


async def draw_candidates(engine: TransformersEngine, draw: Draw) -> list[Candidate]:
    """Sample the candidates of a draw and return them in order.

    Raises:
        EngineFailed: a candidate failed.
    """
    async with engine.sample(draw) as stream:
        candidates = [event async for event in stream if isinstance(event, Candidate)]
    for candidate in candidates:
        if candidate.error:
            raise EngineFailed(candidate.error)
    return sorted(candidates, key=lambda candidate: candidate.index)


async def score_candidates(
    reward: Reward,
    messages: Conversation,
    candidates: Sequence[Candidate],
    objective: Objective,
) -> list[float]:
    """Score each candidate by the objective over the reward's members; NaN for a failed score."""
    ensemble = Ensemble(objective=objective)
    scores = await score_with(reward, messages, candidates)
    values: list[float] = ensemble.reduce(scores.values[0]).tolist()
    return values


def read_states(
    model: Model,
    prompts: Sequence[Conversation],
    samples: Sequence[ScoredReply],
    progress: Progress,
) -> tuple[Replies, list[list[int]], list[int]]:
    """Run the frozen model once over each reply and collect the state before each reply token.

    A reply that ended by itself gets an end token, since ending is a choice that can be steered.

    Returns:
        The replies with their states, the token ids of each prompt with its reply, and the index of
        the first reply token in each of these.
    """
    hidden = []
    tokens: list[int] = []
    reply_index: list[int] = []
    token_ids = []
    reply_starts = []
    for i, sample in enumerate(samples):
        prompt_ids = model.render(Draw({"messages": prompts[sample.prompt]})).ids
        ids = model.tokenizer(sample.text, add_special_tokens=False)["input_ids"]
        states = model.states(prompt_ids + ids)[len(prompt_ids) - 1 :]
        if model.eos and (sample.finish_reason == "stop" or not ids):
            ids = [*ids, _likeliest_end_token(model, states[-1])]
        hidden.append(states[: len(ids)].cpu())
        tokens += ids
        reply_index += [i] * len(ids)
        token_ids.append(prompt_ids + ids)
        reply_starts.append(len(prompt_ids))
        if (i + 1) % PROGRESS_INTERVAL == 0:
            progress(f"read {i + 1} of {len(samples)} replies")
    replies = Replies(
        hidden=torch.cat(hidden).clone(),
        tokens=torch.tensor(tokens),
        reply_index=torch.tensor(reply_index),
        rewards=torch.tensor([sample.reward for sample in samples]),
        prompt_index=torch.tensor([sample.prompt for sample in samples]),
    )
    return replies, token_ids, reply_starts


def _likeliest_end_token(model: Model, state: torch.Tensor) -> int:
    """Return the likeliest end token after this state, because a chat model has several."""
    end_tokens = sorted(model.eos)
    weight = model.lm.get_output_embeddings().weight[end_tokens].float()
    return end_tokens[int((weight @ state).argmax())]
