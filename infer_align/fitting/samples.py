"""Sample scored replies of the frozen model, keep them in a file, and read the model's states."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.engines.transformers.model import Model
from infer_align.errors import ConfigError, EngineFailed, InvalidRequest, RewardFailed
from infer_align.fitting.progress import Pace
from infer_align.fitting.regression import Progress, Replies
from infer_align.fitting.samples_file import (
    Conversation,
    SamplingConfig,
    ScoredReply,
    by_prompt,
    format_reply,
    prompt_digest,
    resume,
)
from infer_align.flow.scoring import score_with
from infer_align.flow.seeds import SEED_RANGE
from infer_align.objectives import Ensemble, Objective
from infer_align.preferences import conversation_key
from infer_align.preferences.fields import checked_messages, read_prompt
from infer_align.preferences.lines import BadLineError, read_content
from infer_align.rewards import Reward
from infer_align.types import Candidate, Draw, Messages

# Number of prompts sampled at once. Their replies are on disk before the next prompts start.
BATCH = 16
# Runs with different seeds do not share the seed of a reply, up to this many replies per run.
SEED_STRIDE = 1_000_003
# Progress is reported each time this many replies were read.
PROGRESS_INTERVAL = 100


def read_prompts(path: Path) -> list[Conversation]:
    """Read one prompt per line: {"messages": [...]}, {"prompt": ...}, or a JSON string.

    A text is a user's message. Blank lines are skipped, and the file may be compressed.

    Raises:
        InvalidRequest: the file cannot be read or has no prompt, or a line is in no such form.
    """
    try:
        content = read_content(path)
    except ConfigError as error:
        raise InvalidRequest(f"prompts: {error.message}", param="prompts") from None
    prompts: list[Conversation] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            prompts.append(_parse_prompt(line, f"{path}:{number}"))
    if not prompts:
        raise InvalidRequest(
            f'prompts: {path} is empty; each line must be {{"messages": [...]}} or a JSON string.',
            param="prompts",
        )
    return prompts


def _parse_prompt(line: bytes, place: str) -> Conversation:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"prompts: {place} is not UTF-8: {error}.", param="prompts") from None
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, str):
        value = {"messages": [{"role": "user", "content": value}]}
    fields = value if isinstance(value, dict) else {}
    try:
        if fields.get("messages"):
            messages: Messages = checked_messages("messages", fields["messages"])
        elif fields.get("prompt"):
            messages = read_prompt(fields)
        else:
            raise InvalidRequest(
                f'prompts: {place} is neither {{"messages": [...]}} nor {{"prompt": ...}} nor a '
                "JSON string.",
                param="prompts",
            )
    except BadLineError as error:
        raise InvalidRequest(f"prompts: {place} is no prompt: {error}.", param="prompts") from None
    return [dict(message) for message in messages]


def group_prompts(prompts: Sequence[Conversation]) -> list[int]:
    """Return a number for each prompt, which is the index of the first equal one.

    Replies to equal prompts are not independent, so they belong to the same part of a split.
    """
    first: dict[str, int] = {}
    for index, messages in enumerate(prompts):
        first.setdefault(conversation_key(messages), index)
    return [first[conversation_key(messages)] for messages in prompts]


async def sample_replies(
    engine: TransformersEngine,
    reward: Reward,
    prompts: Sequence[Conversation],
    sampling: SamplingConfig,
    path: Path,
    progress: Progress,
    earlier: Sequence[ScoredReply] = (),
) -> list[ScoredReply]:
    """Sample and score replies to every prompt, and continue the file of an earlier run.

    Prompts are sampled in batches. The replies to a batch are on disk before the next batch starts.

    Args:
        engine: started.
        reward: started.
        prompts: the prompts to sample replies to.
        sampling: settings of the replies.
        path: of the samples file.
        progress: called with a line of text after each batch.
        earlier: replies of another samples file. They are scored again instead of sampling replies
            to their prompts.

    Raises:
        InvalidRequest: the file is damaged or was made with other settings or prompts.
        RewardFailed: a reply could not be scored.
        EngineFailed: a reply could not be sampled.
    """
    replies = resume(path, sampling, [prompt_digest(messages) for messages in prompts])
    finished = {reply.prompt for reply in replies}
    remaining = [i for i in range(len(prompts)) if i not in finished]
    sampler = _Sampler(engine, reward, sampling, by_prompt(earlier))
    pace = Pace(len(remaining))
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(remaining), BATCH):
            batch = remaining[start : start + BATCH]
            tasks = [sampler.scored_replies(prompts[i], i) for i in batch]
            for new_replies in await asyncio.gather(*tasks):
                file.writelines(format_reply(reply) for reply in new_replies)
                replies += new_replies
            file.flush()
            os.fsync(file.fileno())
            pace.add(len(batch))
            progress(f"replies to {pace.done} of {len(remaining)} prompts are scored{pace}")
    return replies


@dataclass(frozen=True, slots=True)
class _Sampler:
    """The source of scored replies: the engine, or earlier replies that are scored again."""

    engine: TransformersEngine
    reward: Reward
    sampling: SamplingConfig
    # prompt -> its replies
    earlier: Mapping[int, Sequence[ScoredReply]]

    async def scored_replies(self, messages: Conversation, prompt: int) -> list[ScoredReply]:
        """Return all replies to one prompt with their scores."""
        sampling = self.sampling
        if prompt in self.earlier:
            candidates = [_as_candidate(i, r) for i, r in enumerate(self.earlier[prompt])]
        else:
            candidates = await self._sample(messages, prompt)
        scores = await score_candidates(self.reward, messages, candidates, sampling.objective)
        unscored = sum(not math.isfinite(value) for value in scores)
        if unscored:
            raise RewardFailed(
                f"reward {sampling.reward}: {unscored} of {len(scores)} replies to prompt {prompt} "
                "could not be scored. A value can only be fitted to a reward that scores every "
                "reply. Fix the reward, or remove the prompt.",
                param="reward",
            )
        digest = prompt_digest(messages)
        replies = []
        for candidate, value in zip(candidates, scores, strict=True):
            finish_reason = candidate.finish_reason or "stop"
            reply = ScoredReply(prompt, digest, candidate.text, finish_reason, float(value))
            replies.append(reply)
        return replies

    async def _sample(self, messages: Conversation, prompt: int) -> list[Candidate]:
        n = self.sampling.replies_per_prompt
        first_seed = self.sampling.seed * SEED_STRIDE + prompt * n
        seeds = tuple((first_seed + i) % SEED_RANGE for i in range(n))
        body = {"messages": messages, "max_tokens": self.sampling.max_tokens}
        try:
            return await draw_candidates(self.engine, Draw(body, n, seeds))
        except InvalidRequest as error:
            raise InvalidRequest(f"prompt {prompt}: {error.message}", param="prompts") from error


def _as_candidate(index: int, reply: ScoredReply) -> Candidate:
    """Return a reply as the engine gave it, as far as rewards read it."""
    message = {"role": "assistant", "content": reply.text}
    return Candidate(index, {"message": message, "finish_reason": reply.finish_reason})


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
    rewards: list[float] = []
    prompt_index: list[int] = []
    token_ids = []
    reply_starts = []
    groups = group_prompts(prompts)
    pace = Pace(len(samples))
    for i, sample in enumerate(samples):
        prompt_ids = model.render(Draw({"messages": prompts[sample.prompt]})).ids
        ids = model.tokenizer(sample.text, add_special_tokens=False)["input_ids"]
        states = model.states(prompt_ids + ids)[len(prompt_ids) - 1 :]
        if model.eos and (sample.finish_reason == "stop" or not ids):
            ids = [*ids, _likeliest_end_token(model, states[-1])]
        hidden.append(states[: len(ids)].cpu())
        tokens += ids
        reply_index += [i] * len(ids)
        rewards.append(sample.reward)
        prompt_index.append(groups[sample.prompt])
        token_ids.append(prompt_ids + ids)
        reply_starts.append(len(prompt_ids))
        pace.add()
        if pace.done % PROGRESS_INTERVAL == 0:
            progress(f"read the states of {pace.done} of {len(samples)} replies{pace}")
    replies = Replies(
        hidden=torch.cat(hidden).clone(),
        tokens=torch.tensor(tokens),
        reply_index=torch.tensor(reply_index),
        rewards=torch.tensor(rewards),
        prompt_index=torch.tensor(prompt_index),
    )
    return replies, token_ids, reply_starts


def _likeliest_end_token(model: Model, state: torch.Tensor) -> int:
    """Return the likeliest end token after this state, because a chat model has several."""
    end_tokens = sorted(model.eos)
    weight = model.lm.get_output_embeddings().weight[end_tokens].float()
    return end_tokens[int((weight @ state).argmax())]
