"""Find out how each upstream's model continues a prefix, and how many top logprobs it then shows.

It takes calls for one token each, when a request first needs it:

    "steer"  value steering needs a way to continue a prefix that shows top logprobs
    "guide"  guidance also needs at least two of them, and a turn that is really continued
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from infer_align.engines.openai.continuation import (
    TOKEN_ID,
    WAYS,
    Continuation,
    ContinuationPrompt,
    Way,
)
from infer_align.engines.openai.probe import CONTINUE, TOP_LOGPROBS, prompt_tokens
from infer_align.types import Draw
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import Client
from infer_align.upstream.pool import Host

STEER = "steer"
GUIDE = "guide"
# The needs of draws that are written token by token. No field of a request stands for them.
TOKENWISE = (STEER, GUIDE)
# Numbers of top logprobs that are tried, the largest first. Servers refuse more than they show.
WIDTHS = (TOP_LOGPROBS, 10, 5, 2)
_TEXT = "one two"
_TURN = {"role": "user", "content": _TEXT}

HostModel = tuple[str, str]  # URL, model


def needs_of(draw: Draw) -> frozenset[str]:
    """Return what a draw needs that is written token by token; nothing for other draws."""
    needs: set[str] = set()
    if draw.guidance:
        needs.add(GUIDE)
    if draw.steering is not None and any(draw.steering.beta.values()):
        needs.add(STEER)
    return frozenset(needs)


class UpstreamWays:
    """The ways in which the upstreams of one engine continue a prefix.

    Args:
        vocabulary: {bytes of a token: id}.
        tokenize: returns the tokens of a text, without special tokens.

    Attributes:
        hiding: the models of which only the top logprobs can be read.
    """

    def __init__(
        self, vocabulary: Mapping[bytes, int], tokenize: Callable[[str], Sequence[int]]
    ) -> None:
        self._vocabulary = vocabulary
        ids = tuple(tokenize(_TEXT))
        self._prompt = ContinuationPrompt(_TEXT, ids, {"messages": [_TURN]})
        self.hiding: set[str] = set()
        # None if an upstream returns no top logprobs.
        self._ways: dict[HostModel, Way | None] = {}
        # The top logprobs of a call; 0 if they do not suffice for guidance.
        self._widths: dict[HostModel, int] = {}

    # --- what is known ---

    def knows(self, need: str, host: Host, model: str) -> bool:
        """Return True if it was found out whether an upstream meets the need."""
        key = host.url, model
        return key in (self._widths if need == GUIDE else self._ways)

    def way(self, model: str) -> Way | None:
        """Return how every upstream of the model can continue a prefix, or None if one cannot."""
        ways = [way for (_, name), way in self._ways.items() if name == model]
        usable = [way for way in ways if way is not None]
        if not usable or len(usable) < len(ways):
            return None
        # The least exact one, which the more capable upstreams have too.
        common: Way = max(usable, key=WAYS.index)
        return common

    def refuses(self, model: str) -> bool:
        """Return True if an upstream was asked for a way, and the model has none."""
        return bool(self._ways) and self.way(model) is None

    def width(self, model: str) -> int:
        """Return the top logprobs that every upstream of the model shows to guidance; 0: none."""
        widths = [width for (_, name), width in self._widths.items() if name == model]
        return min(widths, default=0)

    # --- finding out ---

    async def find(self, needs: Collection[str], client: Client, host: Host, model: str) -> None:
        """Find out whether an upstream meets the needs.

        Raises:
            AlignError: the upstream did not answer, so that it is still unknown.
        """
        key = host.url, model
        if key not in self._ways:
            self._ways[key] = await self._find_way(client, host, model)
        if GUIDE in needs:
            self._widths[key] = await self._find_width(client, host, model)

    async def _find_way(self, client: Client, host: Host, model: str) -> Way | None:
        """Return the most exact way that shows top logprobs."""
        for way in WAYS:
            continuation = Continuation(way, self._vocabulary, model)
            body = continuation.body(self._prompt, [], "three") | continuation.logprob_fields(2)
            answer = await _answer(client, host, continuation.path, body)
            if _shows_tokens(continuation, answer):
                return way
        return None

    async def _find_width(self, client: Client, host: Host, model: str) -> int:
        way = self._ways[host.url, model]
        if way is None:
            return 0
        continuation = Continuation(way, self._vocabulary, model)
        body = continuation.body(self._prompt, [], "three")
        if way == "chat" and not await _continues(client, host, continuation, body):
            return 0
        for width in WIDTHS:
            fields = body | continuation.logprob_fields(width)
            answer = await _answer(client, host, continuation.path, fields)
            if len(_top_logprobs(continuation, answer)) > 1:
                return width
        return 0


async def _answer(client: Client, host: Host, path: str, body: Mapping[str, Any]) -> Any:
    """Return the answer of a host, or None if it refuses the request."""
    try:
        return await client.call_host(host, path, body)
    except UpstreamFailed as error:
        if error.refused or error.status == 501:
            return None
        raise


def _shows_tokens(continuation: Continuation, answer: Any) -> bool:
    """Return True if an answer shows top logprobs of known tokens, by id if the way needs it."""
    if not _top_logprobs(continuation, answer):
        return False
    return continuation.way != "ids" or TOKEN_ID in str(answer["choices"][0]["logprobs"])


def _top_logprobs(continuation: Continuation, answer: Any) -> Mapping[int, float]:
    try:
        return continuation.top_logprobs(answer)
    except UpstreamFailed:
        return {}


async def _continues(
    client: Client, host: Host, continuation: Continuation, body: Mapping[str, Any]
) -> bool:
    """Return True if the upstream reads fewer tokens where a turn is continued, not followed."""
    new_turn = {name: value for name, value in body.items() if name not in CONTINUE}
    continued = prompt_tokens(await _answer(client, host, continuation.path, body))
    followed = prompt_tokens(await _answer(client, host, continuation.path, new_turn))
    return continued is not None and followed is not None and continued < followed
