"""One steered draw: each candidate is written token by token, with one or two calls per token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.params import SamplingParams
from infer_align.decoding.sampler import sample_at
from infer_align.decoding.siblings import ValueCache
from infer_align.decoding.steering import steer_candidates
from infer_align.decoding.text import TextStream
from infer_align.engines import Stream
from infer_align.engines.openai.continuation import Continuation
from infer_align.engines.openai.draws import refusal
from infer_align.engines.openai.probe import TOP_LOGPROBS
from infer_align.engines.openai.steering import Steerer, sampling_params
from infer_align.errors import AlignError, Unavailable
from infer_align.types import Array, Body, Candidate, Delta, Draw, Steering
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import CallCounter, Client
from infer_align.values.lookahead import LookaheadValue, ValueLM

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
        values: what the value LMs have read of it.
        ids: its tokens, without the prompt.
        counter: the calls made for it.
        finished: True once its candidate is in the stream.
    """

    index: int
    seed: int
    text: TextStream
    values: _ValueReader
    ids: list[int] = field(default_factory=list)
    counter: CallCounter = field(default_factory=CallCounter)
    finished: bool = False


class SteeredDrawing:
    """One steered draw being sampled.

    Args:
        steerer: the tokenizer and the values.
        client: the upstreams.
        draw: the draw.
        steering: its steering.
        model: the upstream's name of the model.
        context_length: tokens of prompt and answer together.
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
        steering: Steering,
        model: str,
        context_length: int,
        on_close: Callable[[SteeredDrawing], None],
    ) -> None:
        way = steerer.way(model)
        if way is None:
            raise Unavailable("no upstream that can be steered was reached yet")
        self.stream = Stream(draw.n, self.stop, self.close)
        self._steerer = steerer
        self._client = client
        self._continuation = Continuation(way, steerer.vocabulary, model)
        self._draw = draw
        self._steering = steering
        # `check` refuses a steering without a fixed number.
        self._top_k = steering.candidates or TOP_LOGPROBS
        self._on_close = on_close
        self._prompt = steerer.prompt(draw)
        self._params = sampling_params(draw)
        self._max_tokens = _max_tokens(self._params, context_length, len(self._prompt.ids))
        # A prefix that is sent as text cannot end within a character.
        self._excluded = frozenset() if way == "ids" else steerer.partial_tokens
        self._answers: list[_Answer] = []
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start one task per candidate."""
        for index in range(self._draw.n):
            seed = self._draw.seeds[index] if self._draw.seeds else index
            text = TextStream(
                self._steerer.tokenizer,
                self._params.stop,
                prompt=self._prompt.ids if self._draw.kind == "completion" else (),
            )
            values = _ValueReader(self._steerer.values_of(self._steering))
            self._answers.append(_Answer(index, seed, text, values))
        self._tasks = [asyncio.create_task(self._run(answer)) for answer in self._answers]

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
        await self._steerer.in_thread(lambda: answer.values.read_prompt(self._prompt.ids))
        for _ in range(self._max_tokens):
            token = await self._next_token(answer)
            if token is None:
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
        candidate = Candidate(
            answer.index,
            {**content, "logprobs": None, "finish_reason": reason},
            prompt_tokens=len(self._prompt.ids),
            completion_tokens=len(answer.ids),
            calls=answer.counter.calls,
            interrupted=interrupted,
        )
        self.stream.put(candidate)

    def _finish_failed(self, answer: _Answer, error: UpstreamFailed) -> None:
        answer.finished = True
        candidate = Candidate(
            answer.index,
            {},
            error=error.message,
            status=error.status,
            retry_after=error.retry_after,
            calls=answer.counter.calls,
        )
        self.stream.put(candidate)

    def _put_delta(self, answer: _Answer, piece: str) -> None:
        choice: Body = {"text": piece}
        if self._draw.kind == "chat":
            choice = {"delta": {"content": piece}}
        self.stream.put(Delta(answer.index, choice))

    # --- one token ---

    async def _next_token(self, answer: _Answer) -> int | None:
        """Sample one token; None for the end of the answer."""
        tokenizer = self._steerer.tokenizer
        text = tokenizer.decode(answer.ids, skip_special_tokens=True)
        body = self._continuation.body(self._prompt, answer.ids, text)
        logprob_fields = self._continuation.logprob_fields(self._top_k)
        logprobs = await self._post(answer, body | logprob_fields, self._continuation.top_logprobs)
        candidates = _most_likely(logprobs, self._excluded, self._top_k)
        if not candidates:
            raise UpstreamFailed(
                "the upstream returns only parts of characters, after which a text cannot be "
                "continued."
            )
        logits = np.array([logprobs[token] for token in candidates])
        steered = await self._steer(answer, candidates, logits)
        token: int | None
        if self._steering.tail == "mask":
            token = candidates[self._sample(answer, steered)]
        else:
            shifts = np.clip(steered - logits, -MAX_BIAS, MAX_BIAS)
            bias = dict(zip(candidates, shifts.tolist(), strict=True))
            bias |= dict.fromkeys(logprobs.keys() & self._excluded, -MAX_BIAS)
            token = await self._sample_upstream(answer, body, bias)
        if token is None or token == tokenizer.eos_token_id:
            return None
        await self._steerer.in_thread(lambda: answer.values.choose(candidates, token))
        return token

    async def _steer(self, answer: _Answer, candidates: Sequence[int], logits: Array) -> Array:
        """Add the weighted values to the logits of the candidates: [k] -> [k]."""
        values = await self._steerer.in_thread(lambda: answer.values.evaluate(candidates))
        return steer_candidates(logits, values, list(self._steering.beta.values()))

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
        client_fields = {
            name: self._draw.body[name] for name in UPSTREAM_SAMPLING if name in self._draw.body
        }
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
        return len(self._prompt.ids) + len(answer.ids)

    async def _post(self, answer: _Answer, body: Mapping[str, Any], parse: Callable[[Any], T]) -> T:
        return await self._client.post(
            self._continuation.path,
            body,
            model=self._continuation.model,
            counter=answer.counter,
            parse=parse,
        )


class _ValueReader:
    """The values of the next tokens of one answer. Its methods run in threads."""

    def __init__(self, values: Sequence[LookaheadValue]) -> None:
        self._values = values
        self._caches: dict[ValueLM, ValueCache] = {}

    @torch.inference_mode()
    def read_prompt(self, ids: Sequence[int]) -> None:
        """Read the prompt with each value LM."""
        for value in self._values:
            if value.lm and value.lm not in self._caches:
                cache = RowCache()
                positions = torch.arange(len(ids))[None]
                value.lm.forward(torch.tensor([list(ids)]), cache, positions, None)
                self._caches[value.lm] = ValueCache(value.lm, [0], [len(ids)], cache)

    @torch.inference_mode()
    def evaluate(self, candidates: Sequence[int]) -> Array:
        """Value the answer after each of k candidates: -> [M, k]. `choose` must follow."""
        ids = torch.tensor([list(candidates)])
        by_lm = {lm: cache.siblings(ids)[0] for lm, cache in self._caches.items()}
        values = [by_lm[value.lm][:, value.index].numpy() for value in self._values if value.lm]
        return np.asarray(values, dtype=np.float64)

    @torch.inference_mode()
    def choose(self, candidates: Sequence[int], token: int) -> None:
        """Keep the sampled token in the caches, and drop the other candidates."""
        for cache in self._caches.values():
            cache.choose(torch.tensor([list(candidates)]), torch.tensor([token]))


def _max_tokens(params: SamplingParams, context_length: int, prompt_tokens: int) -> int:
    if params.max_tokens is None:
        return min(context_length, max(1, context_length - prompt_tokens))
    return min(context_length, params.max_tokens)


def _most_likely(logprobs: Mapping[int, float], excluded: Collection[int], k: int) -> list[int]:
    """Return the k most likely tokens, the lower id first among equals."""
    tokens = [token for token in logprobs if token not in excluded]
    tokens.sort(key=lambda token: (-logprobs[token], token))
    return tokens[:k]
