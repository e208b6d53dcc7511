"""Probabilities of labels, read from the top logprobs of calls for one token.

An upstream that continues an unfinished turn reads the labels after the given prefix, exactly as
an engine that owns the model does. Any other upstream is asked to reply with the label only; that
is a different prompt, and so a different reading.

A label of one token is exact if it is among the top tokens that the upstream returns (20), and
-inf otherwise. A label of several tokens, such as "85" as "8" and "5", takes further calls: one
after each of its beginnings whose probability is above NEGLIGIBLE. Space around a label does not
count.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from infer_align.decoding.labels import (
    LabelLogprobs,
    LabelQuery,
    bare_label,
    without_trailing_space,
)
from infer_align.engines.openai.probe import (
    CONTINUE,
    MIN_TOKENS,
    TOP_LOGPROBS,
    LimitName,
    refuses_max_tokens,
    top_logprobs,
)
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import CallCounter, Client

# The reply that ends a label which could be continued to a longer one.
END = "]"
# Beginnings less likely than this are not followed, so that a label loses at most this much.
NEGLIGIBLE = 1e-3


async def read_labels(
    client: Client,
    model: str,
    query: LabelQuery,
    *,
    continues: bool,
    limit_name: LimitName = "max_tokens",
) -> LabelLogprobs:
    """Return the log probability of each label.

    Args:
        client: the upstreams.
        model: the upstream's name of the model.
        query: the labels and their prompt.
        continues: True if the upstream continues an unfinished turn of the assistant.
        limit_name: the field that limits the completion tokens.

    Raises:
        UpstreamFailed: the upstream did not answer, or returns no logprobs.
    """
    reader = _Reader(client, model, query, continues=continues, limit_name=limit_name)
    await reader.follow("", 1.0)
    logprobs = {}
    for label, probability in reader.probabilities.items():
        logprobs[label] = math.log(probability) if probability > 0.0 else -math.inf
    return LabelLogprobs(logprobs, reader.prompt_tokens, reader.counter.calls)


class _Reader:
    """One reading: a walk over the beginnings of the labels, with one call for each.

    Attributes:
        probabilities: label -> the probability found so far.
        counter: the calls made.
        prompt_tokens: the tokens of all prompts.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        query: LabelQuery,
        *,
        continues: bool,
        limit_name: LimitName,
    ) -> None:
        self.probabilities = dict.fromkeys(query.labels, 0.0)
        self.counter = CallCounter()
        self.prompt_tokens = 0
        self._client = client
        self._model = model
        self._query = query
        self._continues = continues
        self._limit_name: LimitName = limit_name
        # True if the model replies with a label of several characters as one token. A shorter
        # label is then complete, and not the beginning of a longer one.
        self._labels_are_tokens = False

    async def follow(self, beginning: str, probability: float) -> float:
        """Add the probabilities of the labels that start with `beginning`.

        Args:
            beginning: the text so far.
            probability: the probability of the beginning.

        Returns:
            The conditional probability that the beginning is continued to a longer label.
        """
        logprobs = await self._top_logprobs(beginning)
        if not beginning and not self._continues:
            self._labels_are_tokens = self._has_label_of_several_characters(logprobs)
        probabilities: dict[str, float] = {}
        completed = 0.0
        for token, logprob in logprobs.items():
            text = self._spelt(beginning, token)
            if text == beginning or not self._starts_label(text):
                continue
            token_probability = math.exp(min(logprob, 0.0))
            if without_trailing_space(token) == token:
                probabilities[text] = probabilities.get(text, 0.0) + token_probability
            elif text in self.probabilities:
                # The space at its end completes the label.
                self.probabilities[text] += probability * token_probability
                completed += token_probability
        await asyncio.gather(
            *(self._add(text, probability * p) for text, p in probabilities.items())
        )
        return completed + sum(probabilities.values())

    def _spelt(self, beginning: str, token: str) -> str:
        """Return what a token spells after the beginning. Space around a label does not count."""
        if beginning and self._continues:
            return beginning + without_trailing_space(token)
        return beginning + bare_label(token)

    async def _add(self, text: str, probability: float) -> None:
        """Add the probability of `text` to its label, and follow it to longer labels."""
        is_beginning = not self._labels_are_tokens and self._starts_longer_label(text)
        continued = 0.0
        if is_beginning and probability > NEGLIGIBLE:
            continued = await self.follow(text, probability)
        if text in self.probabilities:
            self.probabilities[text] += probability * max(0.0, 1.0 - continued)

    def _starts_label(self, text: str) -> bool:
        return any(label.startswith(text) for label in self._query.labels)

    def _starts_longer_label(self, text: str) -> bool:
        return any(label != text and label.startswith(text) for label in self._query.labels)

    def _has_label_of_several_characters(self, tokens: Mapping[str, float]) -> bool:
        stripped = (bare_label(token) for token in tokens)
        return any(len(token) > 1 and token in self.probabilities for token in stripped)

    async def _top_logprobs(self, beginning: str) -> Mapping[str, float]:
        body: dict[str, Any] = {
            "model": self._model,
            **self._prompt(beginning),
            self._limit_name: MIN_TOKENS[self._limit_name],
            "temperature": 1.0,
            "logprobs": True,
            "top_logprobs": TOP_LOGPROBS,
        }
        try:
            answer: Any = await self._client.post(
                "/chat/completions", body, model=self._model, counter=self.counter
            )
        except UpstreamFailed as error:
            if self._limit_name != "max_tokens" or not refuses_max_tokens(error):
                raise
            self._limit_name = "max_completion_tokens"
            return await self._top_logprobs(beginning)
        logprobs = top_logprobs(answer)
        if not logprobs:
            raise UpstreamFailed("the upstream returns no top logprobs.")
        usage = answer.get("usage") or {}
        self.prompt_tokens += usage.get("prompt_tokens") or 0
        return logprobs

    def _prompt(self, beginning: str) -> dict[str, Any]:
        """Return the fields that make the upstream continue the prefix and `beginning`."""
        text = self._query.prefix + beginning
        if self._continues:
            turn = {"role": "assistant", "content": text}
            return {"messages": [*self._query.messages, turn], **CONTINUE}
        replies = [END] if beginning in self.probabilities else []
        for label in self._query.labels:
            if label != beginning and label.startswith(beginning):
                replies.append(label.removeprefix(beginning))
        instruction = (
            f"Reply with what follows {text!r} and nothing else, without quotes. "
            f"It is one of: {', '.join(replies)}."
        )
        return {"messages": [*self._query.messages, {"role": "user", "content": instruction}]}
