"""VAS before a model that is out of reach (Han et al. 2405.06639): the upstream's top logprobs, and a value LM here.

    tail "mask"  one call per token: its top k, reweighted and sampled here; what is not among them cannot be said
    tail "keep"  two calls per token: its top k, then one token sampled there under logit_bias = beta . (V - mean), clipped at 100

Either way the upstream reads the prefix again at every token; with prefix caching that is cheap, without it the cost is quadratic.
The calls are counted in `align.usage.engine_calls`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from infer_align.decoding.cache import RowCache
from infer_align.decoding.params import SamplingParams
from infer_align.decoding.sampler import sample_at
from infer_align.decoding.siblings import ValueCache
from infer_align.decoding.text import TextStream, token_bytes
from infer_align.demo.locate import locate
from infer_align.engines import Stream
from infer_align.engines.openai.continuation import WAYS, Continuation, Way
from infer_align.engines.openai.draws import refusal
from infer_align.engines.openai.probe import TOP_LOGPROBS
from infer_align.errors import (
    AlignError,
    ConfigError,
    InvalidRequest,
    Unavailable,
    Unsupported,
    nearest,
)
from infer_align.methods.vas import reweight
from infer_align.types import Array, Candidate, Delta, Draw
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import Client, CallCounter
from infer_align.upstream.pool import Host
from infer_align.values import FrozenModel, Value, tokenizer_digest
from infer_align.values.lookahead import LookaheadValue, ValueLM

MAX_BIAS = 100.0
# What a request may set while each token is a call of its own; a penalty, say, would see one token only.
SAMPLED = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "stop"}
)
READ = SAMPLED | frozenset(
    {
        "model",
        "messages",
        "prompt",
        "user",
        "metadata",
        "chat_template_kwargs",
        "safety_identifier",
        "prompt_cache_key",
    }
)
GOLDEN = 0x9E3779B97F4A7C15  # spreads the steps of one seed


class Steerer:
    """The tokenizer and the values of one engine.

    Attributes:
        ways: how each upstream continues a prefix with a model, by (URL, model); None where it shows no top logprobs.
    """

    def __init__(self, tokenizer: str, values: Mapping[str, Value]) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(locate(tokenizer))
        except (OSError, ValueError) as error:
            raise ConfigError(f"tokenizer: {tokenizer!r} cannot be loaded: {error}") from error
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f"tokenizer: {tokenizer!r} has no fast tokenizer, which streaming needs."
            )
        self.ways: dict[tuple[str, str], Way | None] = {}
        self.values = values
        self._lock = threading.Lock()
        size, shared = len(self.tokenizer), dict[object, Any]()
        frozen = FrozenModel(
            tokenizer, size, 0, tokenizer_digest(self.tokenizer.get_vocab()), "cpu"
        )
        for name, value in values.items():
            if not isinstance(value, LookaheadValue):
                raise ConfigError(
                    f"[values.{name}] reads the model's own states, which an upstream does not show; use a lookahead."
                )
            value.start(frozen, shared)
        self.vocabulary: dict[bytes, int] = {}
        for token in range(size):
            self.vocabulary.setdefault(token_bytes(self.tokenizer, token), token)
        self.vocabulary.pop(b"", None)
        self.partial = frozenset(
            token for data, token in self.vocabulary.items() if not _is_text(data)
        )

    async def probe(self, client: Client, host: Host, model: str) -> None:
        """Find the most exact way in which an upstream continues a prefix and shows its top logprobs."""
        ids = self.tokenizer("one two", add_special_tokens=False)["input_ids"]
        prompt = {"text": "one two", "messages": [{"role": "user", "content": "one two"}]}
        for way in WAYS:
            asked = Continuation(way, self.vocabulary, model)
            try:
                answer = await client.call_host(
                    host, asked.path, asked.body(prompt, ids, "three") | asked.asking(2)
                )
                named = way != "ids" or "token_id:" in str(answer["choices"][0]["logprobs"])
                self.ways[host.url, model] = way if named and asked.top(answer) else None
            except (AlignError, KeyError, IndexError, TypeError):
                self.ways[host.url, model] = None
            if self.ways[host.url, model]:
                return

    def way(self, model: str) -> Way | None:
        """How a prefix is continued, whichever upstream takes a call; None where one of them cannot."""
        found = {way for (_, name), way in self.ways.items() if name == model}
        return (
            None
            if not found or None in found
            else next(way for way in reversed(WAYS) if way in found)
        )

    def check(self, draw: Draw, model: str, *, biased: bool) -> None:
        """Refuse what cannot be steered token by token.

        Raises:
            InvalidRequest: naming the field.
        """
        steering = draw.steering
        assert steering is not None
        for name in steering.beta:
            if name not in self.values:
                where = f"align.vas.beta.{name}"
                raise InvalidRequest(
                    f"{where}: no such value; {nearest(name, self.values)}", param=where
                )
        if steering.top_k > TOP_LOGPROBS:
            raise Unsupported(
                f"align.vas.top_k: {steering.top_k} is over the {TOP_LOGPROBS} logprobs that an upstream shows; ask for fewer.",
                param="align.vas.top_k",
            )
        if self.way(model) is None and self.ways:
            raise Unsupported(
                f"align.vas: the upstream of {model!r} cannot be steered; ask for another model.",
                param="align.vas",
            )
        if steering.tail == "keep" and not biased:
            raise Unsupported(
                "align.vas.tail: 'keep' needs logit_bias, which the upstream does not show to obey; ask for tail 'mask'.",
                param="align.vas.tail",
            )
        for name, value in draw.body.items():
            if name not in READ and value not in (None, False, [], {}, 0):
                raise Unsupported(
                    f"{name}: is not available where vas steers an upstream token by token; leave it out.",
                    param=name,
                )
        _sampling_params(draw)

    def drawing(
        self, client: Client, draw: Draw, model: str, room: int, ended: Callable[[Any], None]
    ) -> Steered:
        """The draw, to be started; it must not grow over `room` tokens.

        Raises:
            Unavailable: no upstream was reached yet.
        """
        way = self.way(model)
        if way is None:
            raise Unavailable("no upstream that can be steered was reached yet")
        return Steered(self, client, Continuation(way, self.vocabulary, model), draw, room, ended)

    def prompt(self, draw: Draw) -> tuple[dict[str, Any], list[int]]:
        """What continues the upstream's prompt, and the prompt's tokens.

        Raises:
            InvalidRequest: the chat template refuses the messages.
        """
        if draw.kind == "completion":
            return {"text": draw.body["prompt"]}, self.tokenizer(draw.body["prompt"])["input_ids"]
        options = draw.body.get("chat_template_kwargs") or {}
        try:
            text = self.tokenizer.apply_chat_template(
                draw.body["messages"], tokenize=False, add_generation_prompt=True, **options
            )
        except Exception as error:  # a template is code, and what it raises is up to it
            raise InvalidRequest(
                f"messages: the tokenizer's chat template refused them: {error}.", param="messages"
            ) from None
        chat = {
            "messages": draw.body["messages"],
            **({"chat_template_kwargs": options} if options else {}),
        }
        return {"text": text, **chat}, self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """For a thread: one forward at a time, as each takes all cores."""
        with self._lock:
            return work(*args)


def _sampling_params(draw: Draw) -> SamplingParams:
    """Read the sampling fields that steering token by token honours.

    Raises:
        InvalidRequest: naming the field.
    """
    return SamplingParams.from_body(
        {name: value for name, value in draw.body.items() if name in SAMPLED}, draw.kind
    )


def _is_text(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


class Steered:
    """One steered draw.

    Attributes:
        stream: what the caller reads.
    """

    def __init__(
        self,
        steerer: Steerer,
        client: Client,
        continuation: Continuation,
        draw: Draw,
        room: int,
        ended: Callable[[Any], None],
    ) -> None:
        self.stream = Stream(draw.n, self.stop, self.close)
        self._steerer = steerer
        self._client = client
        self._continuation = continuation
        self._draw = draw
        self._room = room
        self._ended = ended
        self._answers: list[_Answer] = []
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """One task per candidate."""
        prompt, ids = self._steerer.prompt(self._draw)
        params = _sampling_params(self._draw)
        for i in range(self._draw.n):
            seed = self._draw.seeds[i] if self._draw.seeds else i
            text = TextStream(self._steerer.tokenizer, params.stop)
            self._answers.append(_Answer(i, prompt, list(ids), text, params, seed, len(ids)))
        self._tasks = [asyncio.create_task(self._run(answer)) for answer in self._answers]

    def close(self) -> None:
        """Break off what runs."""
        for task in self._tasks:
            task.cancel()
        self._ended(self)

    def fail(self, error: AlignError) -> None:
        """End the draw by an error."""
        self.stream.put(error)
        self.close()

    def stop(self, index: int | None) -> None:
        """Finish with what has come."""
        for answer in self._answers if index is None else [self._answers[index]]:
            if not answer.done:
                self._tasks[answer.index].cancel()
                self._finish(answer, "length", interrupted=True)

    def _finish(self, answer: _Answer, reason: str, *, interrupted: bool = False) -> None:
        answer.done = True
        if rest := answer.text.finish():
            self._say(answer, rest)
        said = answer.text.text
        content = (
            {"message": {"role": "assistant", "content": said}}
            if self._draw.kind == "chat"
            else {"text": said}
        )
        spent = len(answer.ids) - answer.prompt_tokens
        choice = {**content, "logprobs": None, "finish_reason": reason}
        self.stream.put(
            Candidate(
                answer.index,
                choice,
                0,
                answer.prompt_tokens,
                spent,
                calls=answer.counter.calls,
                interrupted=interrupted,
            )
        )

    def _say(self, answer: _Answer, piece: str) -> None:
        choice = {"delta": {"content": piece}} if self._draw.kind == "chat" else {"text": piece}
        self.stream.put(Delta(answer.index, choice))

    async def _run(self, answer: _Answer) -> None:
        try:
            await self._write(answer)
        except UpstreamFailed as error:
            if error.refused:
                self.fail(refusal(error))
                return
            calls = answer.counter.calls
            failed = Candidate(
                answer.index,
                {},
                error=error.message,
                status=error.status,
                retry_after=error.retry_after,
                calls=calls,
            )
            answer.done = True
            self.stream.put(failed)
        except AlignError as error:
            self.fail(error)
        except Exception as error:
            self.fail(UpstreamFailed(f"steering failed: {error!r}", status=500))
            raise

    async def _write(self, answer: _Answer) -> None:
        caches = await asyncio.to_thread(self._steerer.run, self._prefill, answer)
        end = self._steerer.tokenizer.eos_token_id
        for _ in range(min(self._room, self._limit(answer))):
            token = await self._next(answer, caches)
            if token is None or token == end:
                self._finish(answer, "stop")
                return
            answer.ids.append(token)
            if piece := answer.text.push(token):
                self._say(answer, piece)
            if answer.text.stopped:
                self._finish(answer, "stop")
                return
        self._finish(answer, "length")

    def _limit(self, answer: _Answer) -> int:
        limits = (self._draw.body.get(name) for name in ("max_completion_tokens", "max_tokens"))
        return next(
            (limit for limit in limits if isinstance(limit, int)),
            max(1, self._room - answer.prompt_tokens),
        )

    async def _next(self, answer: _Answer, caches: dict[ValueLM, ValueCache]) -> int | None:
        steering = self._draw.steering
        assert steering is not None
        said = self._steerer.tokenizer.decode(
            answer.ids[answer.prompt_tokens :], skip_special_tokens=True
        )
        body = self._continuation.body(answer.prompt, answer.ids, said)
        shown = await self._post(
            answer, body | self._continuation.asking(steering.top_k), self._continuation.top
        )
        # A prefix that is sent as text cannot end within a character.
        unsayable = frozenset() if self._continuation.way == "ids" else self._steerer.partial
        best = sorted(shown.keys() - unsayable, key=lambda token: (-shown[token], token))[
            : steering.top_k
        ]
        if not best:
            raise UpstreamFailed(
                "the upstream shows parts of characters only, after which text cannot be continued."
            )
        values = await asyncio.to_thread(self._steerer.run, self._value, best, caches)
        logits = np.array([[shown[token] for token in best]])
        beta = np.array([steering.beta[name] for name in steering.beta])
        steered = reweight(logits, np.arange(len(best))[None], values[:, None], beta, "keep")[0]
        step = len(answer.ids)
        if steering.tail == "mask":
            number = np.random.default_rng((answer.seed % 2**64, step)).random()
            (place,) = sample_at(
                torch.from_numpy(steered)[None], [answer.params], np.array([number])
            )
            token: int | None = best[place]
        else:
            bias = dict(zip(best, np.clip(steered - logits[0], -MAX_BIAS, MAX_BIAS), strict=True))
            token = await self._sampled_there(
                answer, body, bias | dict.fromkeys(shown.keys() & unsayable, -MAX_BIAS), step
            )
            if token in unsayable:
                raise UpstreamFailed(
                    "the upstream sampled a part of a character, after which text cannot be continued."
                )
        if token is not None and token != self._steerer.tokenizer.eos_token_id:
            await asyncio.to_thread(self._steerer.run, self._choose, best, token, caches)
        return token

    async def _sampled_there(
        self, answer: _Answer, body: dict[str, Any], added: dict[int, float], step: int
    ) -> int | None:
        bias = {str(token): float(b) for token, b in added.items()}
        own = {
            key: self._draw.body[key]
            for key in ("temperature", "top_p", "top_k", "min_p")
            if key in self._draw.body
        }
        seed = {"seed": (answer.seed + step * GOLDEN) % 2**31} if self._draw.seed_requested else {}
        asked = (
            body
            | self._continuation.asking(1)
            | {"temperature": 1.0, **own, "logit_bias": bias, **seed}
        )
        token: int | None = await self._post(answer, asked, self._continuation.sampled)
        return token

    async def _post(self, answer: _Answer, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        path = self._continuation.path
        return await self._client.post(
            path, body, model=body["model"], counter=answer.counter, parse=read
        )

    def _used(self) -> list[LookaheadValue]:
        steering = self._draw.steering
        assert steering is not None
        return [
            value
            for name in steering.beta
            if isinstance(value := self._steerer.values[name], LookaheadValue)
        ]

    @torch.inference_mode()
    def _prefill(self, answer: _Answer) -> dict[ValueLM, ValueCache]:
        caches: dict[ValueLM, ValueCache] = {}
        for value in self._used():
            if value.lm and value.lm not in caches:
                cache = RowCache()
                value.lm.forward(
                    torch.tensor([answer.ids]), cache, torch.arange(len(answer.ids))[None], None
                )
                caches[value.lm] = ValueCache(value.lm, [0], [len(answer.ids)], cache)
        return caches

    @torch.inference_mode()
    def _value(self, tokens: list[int], caches: dict[ValueLM, ValueCache]) -> Array:
        """[M, k] of the values after each token; the candidates stay in the caches until one is chosen."""
        read = {lm: cache.siblings(torch.tensor([tokens]))[0] for lm, cache in caches.items()}
        found = [read[value.lm][:, value.index].numpy() for value in self._used() if value.lm]
        return np.asarray(found, dtype=np.float64)

    @torch.inference_mode()
    def _choose(self, tokens: list[int], token: int, caches: dict[ValueLM, ValueCache]) -> None:
        for cache in caches.values():
            cache.choose(torch.tensor([tokens]), torch.tensor([token]))


@dataclass(slots=True)
class _Answer:
    """One candidate being written."""

    index: int
    prompt: dict[str, Any]
    ids: list[int]  # prompt and answer
    text: TextStream
    params: SamplingParams
    seed: int
    prompt_tokens: int
    counter: CallCounter = field(default_factory=CallCounter)
    done: bool = False
