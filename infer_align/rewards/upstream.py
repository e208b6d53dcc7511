"""Reward models on other servers, called by HTTP.

The APIs are vLLM's `/classify`, `/score`, `/rerank` and `/pooling`, and servers compatible with
them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from infer_align.errors import AlignError, ConfigError
from infer_align.messages import transcript
from infer_align.rewards import CALL_SHARE, DESCRIPTION, Reward, RewardScores, time_budget
from infer_align.rewards._conversation import json_turns, turns
from infer_align.rewards._scaling import SCALING, Scaling, check_scaling, scale_scores
from infer_align.types import Array, Body, Candidate, Messages, ScoringUsage
from infer_align.upstream import Upstream, UpstreamFailed
from infer_align.upstream.client import Client

Api = Literal["classify", "score", "rerank", "pooling"]
# For each API, the field of an answer that lists the texts, and the field of a text's scores.
RESULT_FIELDS: Mapping[Api, tuple[str, str]] = {
    "classify": ("data", "probs"),
    "score": ("data", "score"),
    "rerank": ("results", "relevance_score"),
    "pooling": ("data", "data"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FromUpstream(Upstream):
    """A reward model on another server. Each URL, and each model of it, is a member."""

    api: Api = field(
        default="classify",
        metadata={
            "description": "API that is called: the path below the URL, which for vLLM has no /v1. "
            "score and rerank get all candidates in one call."
        },
    )
    models: tuple[str, ...] = field(
        default=(),
        metadata={
            "description": "Names of the models on the server. Default: the server's only model."
        },
    )
    replicas: bool = field(
        default=False,
        metadata={"description": "Use the URLs as copies of one server, not as members."},
    )
    labels: int = field(
        default=1,
        metadata={
            "ge": 1,
            "description": "Number of scores per text (classify, pooling). Without attributes, "
            "each is a member.",
        },
    )
    attributes: tuple[str, ...] = field(
        default=(),
        metadata={
            "description": "Names of the labels, if each label is an objective. Without names, "
            "each label is a member."
        },
    )
    scaling: dict[str, Scaling] = field(default_factory=dict, metadata=SCALING)
    input: Literal["messages", "text"] = field(
        default="messages",
        metadata={
            "description": "Input of classify and pooling. 'messages': the conversation, for the "
            "server's chat template, one call per candidate. 'text': plain text, one call for all."
        },
    )
    activation: bool = field(
        default=False,
        metadata={
            "description": "Use the output of the model's sigmoid or softmax instead of its raw "
            "scores."
        },
    )
    description: str = field(default="", metadata=DESCRIPTION)
    timeout_seconds: float = field(
        default=60.0,
        metadata={
            "gt": 0,
            "description": "Timeout for one call. Its candidates then count as not scored.",
        },
    )

    def load(self) -> UpstreamReward:
        """Return the reward, without calling its servers.

        Raises:
            ConfigError: urls or key are wrong, or labels and attributes do not fit together.
        """
        check_scaling("upstream", self.scaling, self.attributes)
        if self.attributes and self.labels not in {1, len(self.attributes)}:
            raise ConfigError(
                f"labels: {self.labels} labels do not fit {len(self.attributes)} attributes; "
                "leave labels out."
            )
        if self.api in {"score", "rerank"} and (self.attributes or self.labels > 1):
            raise ConfigError(
                f"api: {self.api!r} gives one number per candidate; "
                "use classify or pooling for attributes and labels."
            )
        if self.api in {"classify", "pooling"} and self.input == "messages":
            return PipelinedUpstreamReward(self)
        return UpstreamReward(self)


plugin = FromUpstream


@dataclass(frozen=True, slots=True)
class _Model:
    """One model of one server, or of its copies."""

    client: Client
    model: str | None
    name: str


@dataclass(frozen=True, slots=True)
class _Call:
    """One call: the candidates that it scores, and its body without the model."""

    indices: Sequence[int]
    body: Body


class _Result(NamedTuple):
    """The result of one call.

    Attributes:
        rows: [labels] for each candidate of the call; () if the call failed.
        note: why the call failed.
        tokens: number of tokens that the model read.
    """

    rows: Sequence[Array]
    note: str | None
    tokens: int


class _ModelScores(NamedTuple):
    """The scores of one model for N candidates.

    Attributes:
        values: [labels, N]; NaN where a call failed.
        notes: per candidate, why its call failed.
        tokens: number of tokens that the model read.
    """

    values: Array
    notes: Sequence[str | None]
    tokens: int


class UpstreamReward(Reward):
    """Scores every candidate with every model at once. A failed call gives NaN and a note."""

    def __init__(self, config: FromUpstream) -> None:
        self.config = config
        self.attributes = config.attributes
        self.timeout_seconds = config.timeout_seconds
        self.description = config.description or f"{config.api} of another server"
        self._labels = len(config.attributes) or config.labels
        self._clients = _clients(config)
        self._models = _models(config, self._clients)
        self.members = self._member_names()
        self.cost = f"reads the conversation and each answer once with {len(self._models)} model(s)"

    def _member_names(self) -> tuple[str, ...]:
        names = [model.name for model in self._models]
        if self.attributes or self._labels == 1:
            return tuple(names)
        members: list[str] = []
        for name in names:
            members += [f"{name} {label}" for label in range(self._labels)]
        return tuple(members)

    async def start(self) -> None:
        """Open the connection pools. A server that is down is noticed at the first call."""
        for client in self._clients:
            await client.start()

    async def close(self) -> None:
        """Close every connection."""
        for client in self._clients:
            await client.close()

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Score the candidates: [A, K, N].

        With attributes each label is one objective; without, each label is one member.
        """
        scores = await asyncio.gather(
            *(self._score_with(model, messages, candidates) for model in self._models)
        )
        # [models, labels, N]
        values = np.stack([each.values for each in scores])
        if self.attributes:
            values = values.transpose(1, 0, 2)
        else:
            values = values.reshape(1, len(self.members), len(candidates))
        notes = tuple(self._first_note(scores, index) for index in range(len(candidates)))
        tokens = sum(each.tokens for each in scores)
        scaled = scale_scores(values, self.config.scaling, self.attributes)
        return RewardScores(scaled, ScoringUsage(tokens), notes)

    def _first_note(self, scores: Sequence[_ModelScores], index: int) -> str | None:
        for model, each in zip(self._models, scores, strict=True):
            if each.notes[index]:
                return f"{model.name}: {each.notes[index]}"
        return None

    async def _score_with(
        self, model: _Model, messages: Messages, candidates: Sequence[Candidate]
    ) -> _ModelScores:
        """Score the candidates with one model."""
        calls = self._calls(messages, candidates)
        results = await asyncio.gather(*(self._call_in_time(model, call) for call in calls))
        values = np.full((self._labels, len(candidates)), np.nan)
        notes: list[str | None] = [None] * len(candidates)
        for call, result in zip(calls, results, strict=True):
            for position, index in enumerate(call.indices):
                if result.note is None:
                    values[:, index] = result.rows[position]
                else:
                    notes[index] = result.note
        return _ModelScores(values, notes, sum(result.tokens for result in results))

    def _calls(self, messages: Messages, candidates: Sequence[Candidate]) -> list[_Call]:
        """Return the calls that score the candidates with one model."""
        texts = [candidate.text for candidate in candidates]
        if not texts:
            return []
        activation = {"use_activation": self.config.activation}
        if self.config.api in {"classify", "pooling"} and self.config.input == "messages":
            calls: list[_Call] = []
            for index, candidate in enumerate(candidates):
                conversation = json_turns(messages, candidate)
                calls.append(_Call([index], {"messages": conversation, **activation}))
            return calls
        body: dict[str, Any]
        if self.config.api == "score":
            body = {"text_1": transcript(messages), "text_2": texts}
        elif self.config.api == "rerank":
            body = {"query": transcript(messages), "documents": texts}
        else:
            body = {"input": [transcript(turns(messages, each)) for each in candidates]}
        return [_Call(range(len(texts)), body | activation)]

    async def _call_in_time(self, model: _Model, call: _Call) -> _Result:
        """Make one call with its own time limit, so that a call that hangs delays no other."""
        seconds = CALL_SHARE * min(self.timeout_seconds, time_budget.get())
        try:
            async with asyncio.timeout(seconds):
                return await self._call(model, call)
        except TimeoutError:
            return _Result((), f"no answer within {seconds:.3g} s", 0)

    async def _call(self, model: _Model, call: _Call) -> _Result:
        def parse(answer: Any) -> _Result:
            rows = parse_scores(self.config.api, answer, len(call.indices), self._labels)
            return _Result(rows, None, _total_tokens(answer))

        body = call.body if model.model is None else {"model": model.model, **call.body}
        try:
            return await model.client.post(f"/{self.config.api}", body, parse=parse)
        except AlignError as error:
            return _Result((), error.message, 0)


class PipelinedUpstreamReward(UpstreamReward):
    """Scores each candidate as soon as it is finished, because each takes its own call anyway."""

    pipelined: ClassVar[bool] = True


def _clients(config: FromUpstream) -> list[Client]:
    """Return one client for all copies of a server, or else one per URL."""
    if config.replicas:
        return [Client(config)]
    return [Client(replace(config, urls=(address,))) for address in config.addresses()]


def _models(config: FromUpstream, clients: Sequence[Client]) -> list[_Model]:
    models = []
    for index, client in enumerate(clients):
        number = f" {index}" if len(clients) > 1 else ""
        for model in config.models or (None,):
            models.append(_Model(client, model, f"{model or config.api}{number}"))
    return models


def _total_tokens(answer: Mapping[str, Any]) -> int:
    usage = answer.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) and tokens >= 0 else 0


def parse_scores(api: Api, answer: Any, n: int, labels: int) -> list[Array]:
    """Return the scores of an answer: [labels] for each of n texts, in the order of the request.

    Raises:
        UpstreamFailed: the answer has another format, or another number of labels.
    """
    list_field, score_field = RESULT_FIELDS[api]
    scores: dict[int, Array] = {}
    try:
        for position, entry in enumerate(answer[list_field]):
            index = int(entry.get("index", position))
            scores[index] = _label_scores(entry[score_field])
        rows = [scores[index] for index in range(n)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        raise UpstreamFailed(
            f"the upstream's answer does not have the format of /{api}: {str(answer)[:80]}."
        ) from None
    for row in rows:
        if row.shape != (labels,):
            raise UpstreamFailed(
                f"the upstream returned {row.size} numbers per text, but {labels} are configured; "
                "change labels or attributes."
            )
    return [np.where(np.isfinite(row), row, math.nan) for row in rows]


def _label_scores(value: Any) -> Array:
    """Return [labels]. Pooling may give one row per token; the last one counts."""
    numbers = np.asarray(value, dtype=np.float64)
    return np.atleast_1d(numbers[-1] if numbers.ndim == 2 else numbers)
