"""How likely labels are, from the top logprobs of calls of one token.

Where the upstream continues a turn that was begun, the prefix is forced, as in an engine that owns the model. Where it does not,
it is asked to say the label alone; that is another prompt, and so another reading.

A label that is one token is exact while it is among the top tokens shown (20), else -inf. One that takes several tokens ("85" as
"8" and "5") is read by further calls after each of its beginnings whose probability is over NEGLIGIBLE, and then as exact.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from infer_align.engines.openai.probe import (
    CONTINUE,
    LIMITS,
    TOP_LOGPROBS,
    limit_refused,
    top_logprobs,
)
from infer_align.types import LabelLogprobs, LabelQuery
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import Client, CallCounter

# What closes a label: said where a shorter label could go on.
END = "]"
# Beginnings less likely than this are not followed: a label loses at most this much.
NEGLIGIBLE = 1e-3


async def read_labels(
    client: Client, model: str, query: LabelQuery, *, continues: bool, limit: str = "max_tokens"
) -> LabelLogprobs:
    """One reading.

    Args:
        client: of the upstreams.
        model: to be asked.
        query: the labels.
        continues: whether the upstream continues an assistant's turn that was begun.
        limit: what the model calls the limit on its tokens.

    Raises:
        UpstreamFailed: it did not answer, or shows no logprobs.
    """
    reader = _Reader(client, model, query, continues)
    reader.limit = limit
    total = dict.fromkeys(query.labels, 0.0)
    await reader.follow("", 1.0, total)
    logprobs = {label: math.log(p) if p > 0.0 else -math.inf for label, p in total.items()}
    return LabelLogprobs(logprobs, reader.prompt_tokens, reader.counter.calls)


class _Reader:
    def __init__(self, client: Client, model: str, query: LabelQuery, continues: bool) -> None:  # noqa: FBT001
        self.counter = CallCounter()
        self.prompt_tokens = 0
        self.limit = "max_tokens"
        self._client = client
        self._model = model
        self._query = query
        self._continues = continues
        self._whole = False  # the model was seen to say a label of several characters at once: shorter ones are not its beginnings

    async def follow(self, said: str, probability: float, total: dict[str, float]) -> float:
        """Add to `total` what the labels that begin with `said` get; -> the probability that one of them is continued."""
        shown = await self._top(said)
        labels = self._query.labels
        if (
            not said and not self._continues
        ):  # who continues a turn says what follows exactly; here it has to be guessed
            self._whole = any(len(word) > 1 and word in labels for word in map(str.strip, shown))
        steps: dict[str, float] = {}
        for token, logprob in shown.items():
            text = said + (token if self._continues else token.strip())
            if text != said and any(label.startswith(text) for label in labels):
                steps[text] = steps.get(text, 0.0) + math.exp(min(logprob, 0.0))
        await asyncio.gather(
            *(self._step(text, probability * p, total) for text, p in steps.items())
        )
        return sum(steps.values())

    async def _step(self, text: str, probability: float, total: dict[str, float]) -> None:
        longer = not self._whole and any(
            label != text and label.startswith(text) for label in self._query.labels
        )
        goes_on = (
            await self.follow(text, probability, total)
            if longer and probability > NEGLIGIBLE
            else 0.0
        )
        if (
            text in total
        ):  # said in full only where nothing that continues it to another label follows
            total[text] += probability * max(0.0, 1.0 - goes_on)

    async def _top(self, said: str) -> Mapping[str, float]:
        body = {
            "model": self._model,
            **self._prompt(said),
            self.limit: LIMITS[self.limit],
            "temperature": 1.0,
        }
        body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        try:
            answer: Any = await self._client.post(
                "/chat/completions", body, model=self._model, counter=self.counter
            )
        except UpstreamFailed as error:
            if self.limit != "max_tokens" or not limit_refused(error):
                raise
            self.limit = "max_completion_tokens"
            return await self._top(said)
        shown = top_logprobs(answer)
        if not shown:
            raise UpstreamFailed("the upstream shows no top logprobs.")
        usage = answer.get("usage") or {}
        self.prompt_tokens += usage.get("prompt_tokens") or 0
        return shown

    def _prompt(self, said: str) -> dict[str, Any]:
        messages = [*self._query.messages]
        if self._continues:
            return {
                "messages": [
                    *messages,
                    {"role": "assistant", "content": self._query.prefix + said},
                ],
                **CONTINUE,
            }
        begun = self._query.prefix + said
        rest = [
            label.removeprefix(said)
            for label in self._query.labels
            if label.startswith(said) and label != said
        ]
        choices = ", ".join([END] * (said in self._query.labels) + rest)
        wish = f"Reply with what follows {begun!r} and nothing else, without quotes. It is one of: {choices}."
        return {"messages": [*messages, {"role": "user", "content": wish}]}
