"""One steered draw: each candidate is written token by token.

    each context's top logprobs ─▶ guidance ─▶ vas ─▶ a token ─▶ every context goes on with it

A draw without guidance has one context, the request as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from infer_align.decoding.sampler import sample_at
from infer_align.decoding.text import TextStream
from infer_align.engines import Stream
from infer_align.engines.openai.answer_values import AnswerValues, most_likely
from infer_align.engines.openai.context_reader import ContextReader
from infer_align.engines.openai.contexts import GuidanceContexts
from infer_align.engines.openai.continuation import Continuation
from infer_align.engines.openai.draws import refusal
from infer_align.engines.openai.models import CONTEXT_LENGTH
from infer_align.engines.openai.probe import TOP_LOGPROBS
from infer_align.engines.openai.steering import Steerer, sampling_params
from infer_align.engines.openai.ways import STEER, needs_of
from infer_align.errors import AlignError, Unavailable
from infer_align.types import Array, Body, Candidate, Delta, Draw
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import CallCounter, Client

T = TypeVar("T")

MAX_BIAS = 100.0
# Spreads the steps of one seed over the seeds of an upstream.
_GOLDEN = 0x9E3779B97F4A7C15
# Fields of the client's body that the upstream applies when it samples a token.
UPSTREAM_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@dataclass(slots=True)
class _Answer:
    """One candidate that is being written.

    Attributes:
        index: the candidate.
        seed: its seed.
        text: the text of its tokens.
        values: what the value LMs have read of it; None without vas.
        ids: its tokens, without the prompt.
        counter: the calls made for it.
        ended: True once the end token is sampled.
        finished: True once its candidate is in the stream.
    """

    index: int
    seed: int
    text: TextStream
    values: AnswerValues | None
    ids: list[int] = field(default_factory=list)
    counter: CallCounter = field(default_factory=CallCounter)
    ended: bool = False
    finished: bool = False

    @property
    def token_count(self) -> int:
        """Return the number of sampled tokens. The end token is one of them, as everywhere."""
        return len(self.ids) + self.ended


class SteeredDrawing:
    """One steered draw being sampled.

    Args:
        steerer: the tokenizer and the values.
        client: the upstreams.
        draw: the draw, with steering or guidance.
        model: the upstream's name of the model.
        context_length: tokens of prompt and answer together; None if they are unknown.
        on_close: called with this drawing when it is closed.

    Attributes:
        stream: the events of the draw, for the caller.

    Raises:
        Unavailable: no upstream that can be steered was reached yet.
    """

    def __init__(
        self,
        steerer: Steerer,
        client: Client,
        draw: Draw,
        model: str,
        context_length: int | None,
        on_close: Callable[[SteeredDrawing], None],
    ) -> None:
        way = steerer.ways.way(model)
        if way is None:
            raise Unavailable("no upstream that can be steered was reached yet")
        self.stream = Stream(draw.n, self.stop, self.close)
        self._steerer = steerer
        self._client = client
        self._continuation = Continuation(way, steerer.vocabulary, model)
        self._draw = draw
        self._steering = draw.steering if STEER in needs_of(draw) else None
        self._contexts: GuidanceContexts | None = None
        bodies: Sequence[Body] = (draw.body,)
        # The tokens that each call shows. `check` refuses a steering without a fixed number.
        self._width = (self._steering and self._steering.candidates) or TOP_LOGPROBS
        if draw.guidance:
            self._contexts = GuidanceContexts.of(draw.body, draw.guidance)
            bodies = self._contexts.bodies
            self._width = steerer.ways.width(model)
        self._on_close = on_close
        self._prompts = [steerer.prompt(draw.kind, body, context_length) for body in bodies]
        self._params = sampling_params(draw)
        self._max_tokens = self._count_max_tokens(context_length)
        # A prefix that is sent as text cannot end within a character.
        self._excluded = frozenset() if way == "ids" else steerer.partial_tokens
        self._reader = ContextReader(
            client, self._continuation, steerer.ways, self._contexts, self._width, self._excluded
        )
        self._answers: list[_Answer] = []
        self._tasks: list[asyncio.Task[None]] = []

    def _count_max_tokens(self, context_length: int | None) -> int:
        """Return the most tokens of an answer."""
        limit = CONTEXT_LENGTH if context_length is None else context_length
        requested = self._params.max_tokens
        room = max(1, limit - max(len(prompt.ids) for prompt in self._prompts))
        if requested is None:
            return min(limit, room)
        # The contexts of guidance are longer than the request that the upstream would accept.
        if self._contexts and context_length is not None:
            return min(requested, room)
        return min(limit, requested)

    def start(self) -> None:
        """Start one task per candidate."""
        for index in range(self._draw.n):
            seed = self._draw.seeds[index] if self._draw.seeds else index
            text = TextStream(
                self._steerer.tokenizer,
                self._params.stop,
                prompt=self._prompts[0].ids if self._draw.kind == "completion" else (),
            )
            self._answers.append(_Answer(index, seed, text, self._new_values()))
        self._tasks = [asyncio.create_task(self._run(answer)) for answer in self._answers]

    def _new_values(self) -> AnswerValues | None:
        if self._steering is None:
            return None
        return AnswerValues(self._steerer.values_of(self._steering), self._steering)

    def close(self) -> None:
        """Cancel every task."""
        for task in self._tasks:
            task.cancel()
        self._on_close(self)

    def fail(self, error: AlignError) -> None:
        """End the draw with an error."""
        self.stream.put(error)
        self.close()

    def stop(self, index: int | None) -> None:
        """Finish candidate `index`, or all, with the text so far."""
        answers = self._answers if index is None else [self._answers[index]]
        for answer in answers:
            if not answer.finished:
                self._tasks[answer.index].cancel()
                self._finish(answer, "length", interrupted=True)

    # --- one candidate ---

    async def _run(self, answer: _Answer) -> None:
        try:
            reason = await self._write(answer)
            self._finish(answer, reason)
        except UpstreamFailed as error:
            if error.refused:
                self.fail(refusal(error))
            else:
                self._finish_failed(answer, error)
        except AlignError as error:
            self.fail(error)
        except Exception as error:
            self.fail(UpstreamFailed(f"steering failed: {error!r}", status=500))
            raise

    async def _write(self, answer: _Answer) -> str:
        """Sample the tokens of an answer; return its finish_reason."""
        values = answer.values
        if values:
            await self._steerer.in_thread(lambda: values.read_prompt(self._prompts[0].ids))
        for _ in range(self._max_tokens):
            token = await self._next_token(answer)
            if token is None:
                answer.ended = True
                return "stop"
            answer.ids.append(token)
            piece = answer.text.push(token)
            if piece:
                self._put_delta(answer, piece)
            if answer.text.stopped:
                return "stop"
        return "length"

    def _finish(self, answer: _Answer, reason: str, *, interrupted: bool = False) -> None:
        answer.finished = True
        rest = answer.text.finish()
        if rest:
            self._put_delta(answer, rest)
        content: Body = {"text": answer.text.text}
        if self._draw.kind == "chat":
            content = {"message": {"role": "assistant", "content": answer.text.text}}
        self._put_candidate(
            answer,
            Candidate(
                answer.index,
                {**content, "logprobs": None, "finish_reason": reason},
                prompt_tokens=len(self._prompts[0].ids),
                interrupted=interrupted,
            ),
        )

    def _finish_failed(self, answer: _Answer, error: UpstreamFailed) -> None:
        answer.finished = True
        self._put_candidate(
            answer,
            Candidate(
                answer.index,
                {},
                error=error.message,
                status=error.status,
                retry_after=error.retry_after,
            ),
        )

    def _put_candidate(self, answer: _Answer, candidate: Candidate) -> None:
        """Put a finished candidate into the stream, with what it has cost."""
        further = self._prompts[1:]
        counted = replace(
            candidate,
            completion_tokens=answer.token_count,
            context_prompt_tokens=sum(len(prompt.ids) for prompt in further),
            context_completion_tokens=len(further) * answer.token_count,
            calls=answer.counter.calls,
        )
        self.stream.put(counted)

    def _put_delta(self, answer: _Answer, piece: str) -> None:
        choice: Body = {"text": piece}
        if self._draw.kind == "chat":
            choice = {"delta": {"content": piece}}
        self.stream.put(Delta(answer.index, choice))

    # --- one token ---

    async def _next_token(self, answer: _Answer) -> int | None:
        """Sample one token; None for the end of the answer."""
        text = self._steerer.tokenizer.decode(answer.ids, skip_special_tokens=True)
        bodies = [self._continuation.body(prompt, answer.ids, text) for prompt in self._prompts]
        tops = await self._reader.read(bodies, answer.counter)
        candidates, logits = self._candidates(tops)
        if not candidates:
            raise UpstreamFailed(
                "the upstream returns only parts of characters, after which a text cannot be "
                "continued."
            )
        steered = logits
        values = answer.values
        if values:
            steered = await self._steerer.in_thread(lambda: values.steer(candidates, logits))
        token: int | None
        if self._lets_upstream_sample:
            shifts = np.clip(steered - logits, -MAX_BIAS, MAX_BIAS)
            bias = dict(zip(candidates, shifts.tolist(), strict=True))
            bias |= dict.fromkeys(tops[0].keys() & self._excluded, -MAX_BIAS)
            token = await self._sample_upstream(answer, bodies[0], bias)
        else:
            token = candidates[self._sample(answer, steered)]
        if token is None or token in self._steerer.end_tokens:
            return None
        if values:
            await self._steerer.in_thread(lambda: values.choose(token))
        return token

    def _candidates(self, tops: Sequence[Mapping[int, float]]) -> tuple[list[int], Array]:
        """Return the tokens that may be sampled and their logits: guided, or as they are."""
        if self._contexts:
            guided = self._contexts.guided(tops, self._excluded)
            return list(guided), np.array(list(guided.values()))
        candidates = most_likely(tops[0], self._width, self._excluded)
        return candidates, np.array([tops[0][token] for token in candidates])

    @property
    def _lets_upstream_sample(self) -> bool:
        """Return True if tokens that no call shows may be sampled: only the upstream can do it."""
        if self._contexts or self._steering is None:
            return False
        return self._steering.tail == "keep"

    def _sample(self, answer: _Answer, logits: Array) -> int:
        """Sample here; return the position of the token among the candidates."""
        generator = np.random.default_rng((answer.seed % 2**64, self._step(answer)))
        number = np.array([generator.random()])
        (position,) = sample_at(torch.from_numpy(logits)[None], [self._params], number)
        return position

    async def _sample_upstream(
        self, answer: _Answer, body: Mapping[str, Any], bias: Mapping[int, float]
    ) -> int | None:
        """Let the upstream sample the token with a bias; None for the end of the answer."""
        client_fields: dict[str, Any] = {}
        for name in UPSTREAM_SAMPLING:
            if name in self._draw.body:
                client_fields[name] = self._draw.body[name]
        fields = {
            **body,
            **self._continuation.logprob_fields(1),
            **client_fields,
            "logit_bias": {str(token): amount for token, amount in bias.items()},
        }
        if self._draw.seed_requested:
            fields["seed"] = (answer.seed + self._step(answer) * _GOLDEN) % 2**31
        token = await self._post(answer, fields, self._continuation.sampled_token)
        if token in self._excluded:
            raise UpstreamFailed(
                "the upstream sampled a part of a character, after which a text cannot be "
                "continued."
            )
        return token

    def _step(self, answer: _Answer) -> int:
        return len(self._prompts[0].ids) + len(answer.ids)

    async def _post(self, answer: _Answer, body: Mapping[str, Any], parse: Callable[[Any], T]) -> T:
        return await self._client.post(
            self._continuation.path,
            body,
            model=self._continuation.model,
            counter=answer.counter,
            parse=parse,
        )
