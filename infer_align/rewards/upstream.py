"""Reward models that other servers hold: vLLM's `/classify`, `/score`, `/rerank`, `/pooling`, and what speaks like them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from infer_align.errors import AlignError, ConfigError
from infer_align.messages import transcript
from infer_align.rewards import CALL_SHARE, Reward, RewardScores, time_budget
from infer_align.rewards._scaling import SCALING, Scaling, check_scaling, scale_scores
from infer_align.types import Array, Candidate, Messages, ScoringUsage
from infer_align.upstream import Upstream, UpstreamFailed
from infer_align.upstream.client import Client


@dataclass(frozen=True, slots=True, kw_only=True)
class FromUpstream(Upstream):
    """A reward model on another server. Each URL, and each model of it, is a member of the ensemble."""

    api: Literal["classify", "score", "rerank", "pooling"] = field(
        default="classify",
        metadata={
            "description": "path below the URL, which for vLLM has no /v1; score and rerank take all candidates in one call"
        },
    )
    models: tuple[str, ...] = field(
        default=(), metadata={"description": "their names there; default: the only one"}
    )
    replicas: bool = field(
        default=False, metadata={"description": "the URLs are copies of one server, not members"}
    )
    labels: int = field(
        default=1,
        metadata={
            "ge": 1,
            "description": "numbers per text (classify, pooling); each is a member where there are no attributes",
        },
    )
    attributes: tuple[str, ...] = field(
        default=(),
        metadata={"description": "names of the labels, when they are objectives, not members"},
    )
    scaling: dict[str, Scaling] = field(default_factory=dict, metadata=SCALING)
    input: Literal["messages", "text"] = field(
        default="messages",
        metadata={
            "description": "classify, pooling: the conversation under the server's chat template, a call per candidate; or as "
            "plain text, all in one call"
        },
    )
    activation: bool = field(
        default=False,
        metadata={
            "description": "take what the model's sigmoid or softmax makes of its scores, not the scores"
        },
    )
    description: str = field(default="", metadata={"description": "one line for people"})
    timeout_seconds: float = field(
        default=60.0,
        metadata={
            "gt": 0,
            "description": "for one call; after this its candidates count as not scored, and only they",
        },
    )

    def load(self) -> UpstreamReward:
        """The reward, its servers not yet asked.

        Raises:
            ConfigError: urls or key are wrong, or the labels are not those of the attributes.
        """
        check_scaling("upstream", self.scaling, self.attributes)
        if self.attributes and self.labels not in {1, len(self.attributes)}:
            raise ConfigError(
                f"labels: {self.labels} numbers do not fit {len(self.attributes)} attributes; leave labels out."
            )
        if self.api in {"score", "rerank"} and (self.attributes or self.labels > 1):
            raise ConfigError(
                f"api: {self.api!r} gives one number per candidate; attributes and labels need classify or pooling."
            )
        return (
            OneByOne(self)
            if self.api in {"classify", "pooling"} and self.input == "messages"
            else UpstreamReward(self)
        )


plugin = FromUpstream


@dataclass(frozen=True, slots=True)
class _Member:
    """One model of one server, or of its copies."""

    client: Client
    model: str | None
    name: str


class UpstreamReward(Reward):
    """Asks every member about every candidate, all at once. What fails or is malformed is NaN, and the note says why."""

    def __init__(self, config: FromUpstream) -> None:
        self.config = config
        self.attributes = config.attributes
        self.timeout_seconds = config.timeout_seconds
        self.description = config.description or f"{config.api} of another server"
        self._labels = len(config.attributes) or config.labels
        addresses = config.addresses()
        sections = (
            [config]
            if config.replicas
            else [replace(config, urls=(address,)) for address in addresses]
        )
        self._clients = [Client(section) for section in sections]
        self._asked = [
            _Member(client, model, f"{model or config.api}{f' {i}' if len(sections) > 1 else ''}")
            for i, client in enumerate(self._clients)
            for model in config.models or (None,)
        ]
        several = self._labels > 1 and not config.attributes
        self.members = tuple(
            f"{member.name} {label}" if several else member.name
            for member in self._asked
            for label in range(self._labels if several else 1)
        )

    async def start(self) -> None:
        """Open the connections; a server that is down is found out when it is asked."""
        for client in self._clients:
            await client.start()

    async def close(self) -> None:
        """Close them."""
        for client in self._clients:
            await client.close()

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """[A, K, N]: a label is an attribute where there are attributes, else a member."""
        answers = await asyncio.gather(
            *(self._ask(member, messages, candidates) for member in self._asked)
        )
        values = np.stack([found for found, _, _ in answers])  # [members, labels, N]
        values = (
            values.transpose(1, 0, 2)
            if self.attributes
            else values.reshape(1, len(self.members), len(candidates))
        )
        notes = tuple(
            next(
                (
                    f"{m.name}: {notes[i]}"
                    for m, (_, notes, _) in zip(self._asked, answers, strict=True)
                    if notes[i]
                ),
                None,
            )
            for i in range(len(candidates))
        )
        values = scale_scores(values, self.config.scaling, self.attributes)
        return RewardScores(values, ScoringUsage(sum(tokens for _, _, tokens in answers)), notes)

    async def _ask(
        self, member: _Member, messages: Messages, candidates: Sequence[Candidate]
    ) -> tuple[Array, list[str | None], int]:
        """[labels, N] of one member, why not, and the tokens read."""
        found = np.full((self._labels, len(candidates)), np.nan)
        notes: list[str | None] = [None] * len(candidates)
        calls = self._calls(messages, candidates)
        answers = await asyncio.gather(
            *(self._in_time(member, body, len(indices)) for indices, body in calls)
        )
        for (indices, _), (rows, note, _) in zip(calls, answers, strict=True):
            for place, index in enumerate(indices):
                if note is None:
                    found[:, index] = rows[place]
                else:
                    notes[index] = note
        return found, notes, sum(tokens for _, _, tokens in answers)

    def _calls(
        self, messages: Messages, candidates: Sequence[Candidate]
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """Which candidates each call is about, and its body without the model."""
        texts, every = [candidate.text for candidate in candidates], list(range(len(candidates)))
        if not texts:
            return []
        if self.config.api == "score":
            return [
                (
                    every,
                    {
                        "text_1": transcript(messages),
                        "text_2": texts,
                        "use_activation": self.config.activation,
                    },
                )
            ]
        if self.config.api == "rerank":
            return [
                (
                    every,
                    {
                        "query": transcript(messages),
                        "documents": texts,
                        "use_activation": self.config.activation,
                    },
                )
            ]
        activation = {"use_activation": self.config.activation}
        if self.config.input == "text":
            return [
                (
                    every,
                    {
                        "input": [transcript([*messages, _turn(text)]) for text in texts],
                        **activation,
                    },
                )
            ]
        return [
            ([i], {"messages": [*messages, _turn(text)], **activation})
            for i, text in enumerate(texts)
        ]

    async def _in_time(
        self, member: _Member, body: Mapping[str, Any], n: int
    ) -> tuple[Sequence[Array], str | None, int]:
        """`_answer`, or that there was none in time: one call that hangs is not to take the others along."""
        seconds = CALL_SHARE * min(self.timeout_seconds, time_budget.get())
        try:
            async with asyncio.timeout(seconds):
                return await self._answer(member, body, n)
        except TimeoutError:
            return (), f"no answer within {seconds:.3g} s", 0

    async def _answer(
        self, member: _Member, body: Mapping[str, Any], n: int
    ) -> tuple[Sequence[Array], str | None, int]:
        """One [labels] per candidate of a call, or why there is none, and the tokens read."""
        api, labels = self.config.api, self._labels

        def understood(answer: Any) -> tuple[list[Array], int]:
            return read(api, answer, n, labels), _tokens(answer)

        try:
            rows, tokens = await member.client.post(
                f"/{api}",
                body if member.model is None else {"model": member.model, **body},
                parse=understood,
            )
        except AlignError as error:
            return (), error.message, 0
        return rows, None, tokens


class OneByOne(UpstreamReward):
    """A call per candidate anyway: each is asked about as soon as it is finished, and one that hangs holds up no other."""

    pipelined: ClassVar[bool] = True


def _tokens(answer: Mapping[str, Any]) -> int:
    usage = answer.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) and tokens >= 0 else 0


def read(api: str, answer: Any, n: int, labels: int) -> list[Array]:
    """The numbers of an answer, [labels] for each of n texts in the order that they were sent.

    Raises:
        UpstreamFailed: it does not hold them.
    """
    try:
        listed = answer["results" if api == "rerank" else "data"]
        found: dict[int, Array] = {}
        for place, entry in enumerate(listed):
            value = entry[
                {
                    "rerank": "relevance_score",
                    "score": "score",
                    "classify": "probs",
                    "pooling": "data",
                }[api]
            ]
            numbers = np.asarray(value, dtype=np.float64)
            found[int(entry.get("index", place))] = np.atleast_1d(
                numbers[-1] if numbers.ndim == 2 else numbers
            )
        rows = [found[i] for i in range(n)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        raise UpstreamFailed(
            f"the upstream's answer is not what /{api} says: {str(answer)[:80]}."
        ) from None
    if wrong := [row.size for row in rows if row.shape != (labels,)]:
        raise UpstreamFailed(
            f"the upstream gives {wrong[0]} numbers per text, configured are {labels}; correct labels or attributes."
        )
    return [np.where(np.isfinite(row), row, math.nan) for row in rows]


def _turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
