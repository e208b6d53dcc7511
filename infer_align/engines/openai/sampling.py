"""How a token is chosen here, where an upstream shows its logprobs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from infer_align.errors import InvalidRequest, shown
from infer_align.types import Array, Draw


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen here."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stops: tuple[str, ...]

    @classmethod
    def read(cls, draw: Draw) -> Sampling:
        """From a body.

        Raises:
            InvalidRequest: a value that is not allowed.
        """
        bounds = {
            "temperature": (0.0, 2.0, 1.0),
            "top_p": (0.0, 1.0, 1.0),
            "top_k": (-1, 2**31, 0),
            "min_p": (0.0, 1.0, 0.0),
        }
        found = {}
        for name, (low, high, default) in bounds.items():
            value = default if draw.body.get(name) is None else draw.body[name]
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not low <= value <= high
            ):
                raise InvalidRequest(
                    f"{name}: {shown(value)} is not allowed; must be from {low} to {high}.",
                    param=name,
                )
            found[name] = value
        for name in ("max_completion_tokens", "max_tokens"):
            limit = draw.body.get(name)
            if limit is not None and (
                isinstance(limit, bool) or not isinstance(limit, int) or limit < 1
            ):
                raise InvalidRequest(
                    f"{name}: {shown(limit)} is not allowed; must be an integer of at least 1.",
                    param=name,
                )
        stops = _stops(draw.body.get("stop"))
        return cls(found["temperature"], found["top_p"], int(found["top_k"]), found["min_p"], stops)

    def choose(self, logits: Array, lot: np.random.Generator) -> int:
        """[k] -> the place of the token that is sampled: temperature, then min_p, top_k, top_p."""
        if not self.temperature:
            return int(np.argmax(logits))
        scaled = np.exp((logits - logits.max()) / self.temperature)
        p = scaled / scaled.sum()
        p[p < self.min_p * p.max()] = 0.0
        order = np.argsort(-p, kind="stable")
        if self.top_k > 0:
            p[order[self.top_k :]] = 0.0
        before = np.cumsum(p[order]) - p[order]
        p[order[1:][before[1:] >= self.top_p * p.sum()]] = 0.0
        return int(lot.choice(len(p), p=p / p.sum()))


def _stops(stop: object) -> tuple[str, ...]:
    listed = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if not all(isinstance(one, str) and one for one in listed):
        raise InvalidRequest(
            f"stop: {shown(stop)} is not allowed; must be a string or several, none empty.",
            param="stop",
        )
    return tuple(listed)
