"""Read what the contexts of one step show: their top logprobs, side by side.

A token that is plausible in one context may not be among the tokens that another shows. Its logprob
there is read by one more call, in which a bias makes it the answer. That works where an upstream
reports the logprobs of the model before biases, as vLLM and this server do. Elsewhere the bound of
`contexts.py` stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from infer_align.engines.openai.answer_values import most_likely
from infer_align.engines.openai.contexts import GuidanceContexts, largest_hidden
from infer_align.engines.openai.continuation import Continuation
from infer_align.engines.openai.ways import UpstreamWays
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import CallCounter, Client

T = TypeVar("T")

# The largest bias that OpenAI's API allows: the token becomes the answer.
_BIAS = 100
# The hidden logprobs that are read for one token of an answer, at most.
MAX_HIDDEN = 16
# Logprobs are rounded.
_TOLERANCE = 1e-3


class ContextReader:
    """Reads the contexts of one steered draw.

    Args:
        client: the upstreams.
        continuation: the bodies of calls for one token.
        ways: remembers which models hide logprobs for good.
        contexts: the contexts of guidance; None for a draw that reads the request alone.
        width: the top logprobs of each call.
        excluded: tokens that cannot be sampled.
    """

    def __init__(
        self,
        client: Client,
        continuation: Continuation,
        ways: UpstreamWays,
        contexts: GuidanceContexts | None,
        width: int,
        excluded: Collection[int],
    ) -> None:
        self._client = client
        self._continuation = continuation
        self._ways = ways
        self._contexts = contexts
        self._width = width
        self._excluded = excluded

    async def read(
        self, bodies: Sequence[Mapping[str, Any]], counter: CallCounter
    ) -> list[dict[int, float]]:
        """Return the logprobs of the most likely tokens of each context.

        Raises:
            UpstreamFailed: a call failed; a refusal names its context.
        """
        readings = [self._read_context(i, body, counter) for i, body in enumerate(bodies)]
        tops = await _together(readings)
        if self._contexts is None:
            return tops
        likely: list[dict[int, float]] = []
        for top in tops:
            # Some servers add the token that they sampled, which is chance.
            likely.append({token: top[token] for token in most_likely(top, self._width)})
        await self._read_hidden(self._contexts, bodies, likely, counter)
        return likely

    async def _read_context(
        self, index: int, body: Mapping[str, Any], counter: CallCounter
    ) -> dict[int, float]:
        fields = {**body, **self._continuation.logprob_fields(self._width)}
        try:
            return await self._client.post(
                self._continuation.path,
                fields,
                model=self._continuation.model,
                counter=counter,
                parse=self._continuation.top_logprobs,
            )
        except UpstreamFailed as error:
            param = self._contexts.params[index] if self._contexts and error.refused else None
            if self._contexts and param is not None:
                name = self._contexts.names[index]
                error.message = f"{param}: the upstream refuses the request {name}: {error.message}"
                error.param = param
            raise

    async def _read_hidden(
        self,
        contexts: GuidanceContexts,
        bodies: Sequence[Mapping[str, Any]],
        tops: Sequence[dict[int, float]],
        counter: CallCounter,
    ) -> None:
        """Add to `tops` the logprobs of plausible tokens that only other contexts show."""
        guided = contexts.guided(tops, self._excluded)
        hidden: list[tuple[int, int]] = []
        for token in most_likely(guided, len(guided)):
            hidden += [(i, token) for i, top in enumerate(tops) if token not in top]
        if not hidden or self._continuation.model in self._ways.hiding:
            return
        read = hidden[:MAX_HIDDEN]
        logprobs = await _together(self._read_token(bodies[i], token, counter) for i, token in read)
        bounds = [largest_hidden(top) for top in tops]
        for (i, token), logprob in zip(read, logprobs, strict=True):
            if logprob is None or logprob > bounds[i] + _TOLERANCE:
                # The bias had no effect, or it changed the logprob.
                self._ways.hiding.add(self._continuation.model)
            else:
                tops[i][token] = logprob

    async def _read_token(
        self, body: Mapping[str, Any], token: int, counter: CallCounter
    ) -> float | None:
        """Return the logprob of one token; None if the upstream does not let it be the answer."""
        fields = {
            **body,
            **self._continuation.logprob_fields(1),
            "logit_bias": {str(token): _BIAS},
        }
        try:
            answer: Any = await self._client.post(
                self._continuation.path,
                fields,
                model=self._continuation.model,
                counter=counter,
            )
        except UpstreamFailed as error:
            if error.refused:
                return None
            raise
        return self._continuation.sampled_logprob(answer, token)


async def _together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines side by side; if one fails, cancel the rest and raise its error."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
