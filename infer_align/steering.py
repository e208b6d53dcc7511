"""The ways in which a method changes or watches the sampling of a draw.

Methods write them into a draw, and engines carry them out. The draw's body does not hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# The treatment of the tokens that are not valued: unchanged, or banned.
Tail = Literal["keep", "mask"]


@dataclass(frozen=True, slots=True)
class Steering:
    """The value estimates that reweight a draw's logits."""

    beta: Mapping[str, float]  # value name -> weight
    # The number of most likely tokens that are valued, or all of them.
    top_k: int | Literal["all"]
    tail: Tail
    # Instead of `top_k`: the tokens at least this times as likely as the likeliest are valued.
    min_p: float | None = None
    # The largest KL divergence of one step from the frozen model, in nats; None for no limit.
    max_kl: float | None = None

    @property
    def candidates(self) -> int | None:
        """Return the number of valued tokens; None if it is not fixed."""
        if self.min_p is not None or self.top_k == "all":
            return None
        return self.top_k


@dataclass(frozen=True, slots=True)
class Contrast:
    """One trait that guides a draw: the request with the trait's prompt against the one without.

    It adds scale x (logprobs after `body` - logprobs after `negative_body`) to the logits.
    """

    trait: str
    scale: float  # never 0
    body: Mapping[str, Any]  # the draw's body with the trait's prompt in it
    # The draw's body with the negative prompt in it; None: the draw's own body.
    negative_body: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Guidance:
    """The contrasts between prompts that change a draw's logits.

    Its truth is False if there is none, because every scale is 0. The draw is then sampled as it
    is, and its logprobs list what those of guided draws list.
    """

    contrasts: tuple[Contrast, ...]
    # A token is masked if it is below min_p times the likeliest token in every context. 0: no mask.
    min_p: float

    def __bool__(self) -> bool:
        """Return True if a contrast changes the logits."""
        return bool(self.contrasts)


@dataclass(frozen=True, slots=True)
class EstimateSchedule:
    """The moments at which an engine reports what values expect of a draw's candidates."""

    values: Mapping[str, float]  # value name -> weight
    after: int  # first checkpoint in tokens; later ones double

    def is_due(self, tokens: int) -> bool:
        """Return True if a candidate of this many tokens is estimated."""
        checkpoint, remainder = divmod(tokens, self.after)
        return tokens > 0 and remainder == 0 and checkpoint.bit_count() == 1
