"""The parts of a request that travel to vLLM's workers, in SamplingParams.extra_args.

The server writes them. vLLM reads them in the server, to validate the request, and in each worker,
where an invalid one would end the engine.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from infer_align.errors import nearest, quote
from infer_align.methods import MAX_VALUE_WEIGHT
from infer_align.methods.vas import MAX_KL
from infer_align.steering import EstimateSchedule, Steering

# Keys in extra_args. The values of an engine are under STEERING_KEY of its additional_config.
STEERING_KEY = "infer_align"
ESTIMATES_KEY = "infer_align_watch"

# An estimate on its way back: key of the request, its number of tokens, the expected value.
Estimated: TypeAlias = tuple[str, int, float]


class SteeringRequest(NamedTuple):
    """The steering of one request.

    Attributes:
        beta: weight of each value; none is 0.
        top_k: number of candidate tokens; None if it is not fixed.
        mask_tail: True if all other tokens are masked.
        min_p: without a fixed number, the smallest share of the likeliest token's probability that
            is valued; 0 for all tokens.
        max_kl: largest divergence of one step in nats; inf for no limit.
    """

    beta: Mapping[str, float]
    top_k: int | None
    mask_tail: bool
    min_p: float = 0.0
    max_kl: float = math.inf

    @staticmethod
    def write(steering: Steering, vocabulary_size: int | None = None) -> dict[str, Any]:
        """Return the extra arguments of a request that is steered."""
        top_k = steering.top_k
        if vocabulary_size is not None and top_k != "all":
            top_k = min(top_k, vocabulary_size)
        fields: dict[str, Any] = {
            "beta": dict(steering.beta),
            "top_k": top_k,
            "tail": steering.tail,
        }
        if steering.min_p is not None:
            fields["min_p"] = steering.min_p
        if steering.max_kl is not None:
            fields["max_kl"] = steering.max_kl
        return {STEERING_KEY: fields}

    @classmethod
    def read(
        cls, extra_args: Mapping[str, Any] | None, names: Collection[str] | None = None
    ) -> SteeringRequest | None:
        """Read the extra arguments of a request; None if it is not steered by any value.

        Args:
            extra_args: of the request.
            names: the values that exist; None if they are not known.

        Raises:
            ValueError: the steering is malformed, or a number is out of bounds.
        """
        fields = (extra_args or {}).get(STEERING_KEY)
        if fields is None:
            return None
        match fields:
            case {"beta": dict(beta), "top_k": top_k, "tail": tail, **rest} if rest.keys() <= {
                "min_p",
                "max_kl",
            }:
                weights = _weights("align.vas.beta", beta, names)
            case _:
                raise ValueError(
                    f"extra_args.{STEERING_KEY}: {quote(fields)} is not of the form "
                    "{beta, top_k, tail, min_p, max_kl}; use align.vas instead."
                )
        if tail not in {"keep", "mask"}:
            raise ValueError(f'align.vas.tail: {tail!r} is not allowed; must be "keep" or "mask".')
        candidates, min_p = _candidates(top_k, rest.get("min_p"))
        max_kl = _limit(rest.get("max_kl"), tail)
        beta = {name: weight for name, weight in weights.items() if weight}
        return cls(beta, candidates, tail == "mask", min_p, max_kl) if beta else None


def _candidates(top_k: object, min_p: object) -> tuple[int | None, float]:
    """Check which tokens are valued; return their number, None if not fixed, and min_p.

    Raises:
        ValueError: a number is out of bounds.
    """
    if min_p is not None:
        if not isinstance(min_p, int | float) or not 0 < min_p <= 1:
            raise ValueError(
                f"align.vas.min_p: {min_p!r} is not allowed; must be over 0 and at most 1."
            )
        return None, float(min_p)
    if top_k == "all":
        return None, 0.0
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(
            f'align.vas.top_k: {top_k!r} is not allowed; must be an integer >= 1, or "all".'
        )
    return top_k, 0.0


def _limit(max_kl: object, tail: str) -> float:
    """Check the limit of a step's divergence; inf without one.

    Raises:
        ValueError: it is no positive number, or tokens are masked, whose divergence has no limit.
    """
    if max_kl is None:
        return math.inf
    if isinstance(max_kl, bool) or not isinstance(max_kl, int | float) or not 0 < max_kl <= MAX_KL:
        raise ValueError(
            f"align.vas.max_kl: {max_kl!r} is not allowed; must be over 0 and at most {MAX_KL:g}."
        )
    if tail == "mask":
        raise ValueError('align.vas.max_kl: needs tail "keep", but it is "mask".')
    return float(max_kl)


class EstimateRequest(NamedTuple):
    """The value estimates that one request needs while it runs.

    Attributes:
        key: a unique name, under which the workers report the estimates.
        schedule: when to estimate, and by which values.
    """

    key: str
    schedule: EstimateSchedule

    def write(self) -> dict[str, Any]:
        """Return the extra arguments of the request."""
        values = dict(self.schedule.values)
        return {ESTIMATES_KEY: {"name": self.key, "values": values, "after": self.schedule.after}}

    @classmethod
    def read(
        cls, extra_args: Mapping[str, Any] | None, names: Collection[str] | None = None
    ) -> EstimateRequest | None:
        """Read the extra arguments of a request; None if it needs no estimates.

        Args:
            extra_args: of the request.
            names: the values that exist; None if they are not known.

        Raises:
            ValueError: the schedule is malformed, or a number is out of bounds.
        """
        fields = (extra_args or {}).get(ESTIMATES_KEY)
        match fields:
            case None:
                return None
            case {"name": str(key), "values": dict(values), "after": int(after)} if after > 0:
                weights = _weights("align.early_stop.values", values, names)
                return cls(key, EstimateSchedule(weights, after))
        raise ValueError(
            f"extra_args.{ESTIMATES_KEY}: {quote(fields)} is not of the form "
            "{name, values, after}; use align.early_stop instead."
        )


def _weights(
    field: str, weights: Mapping[Any, Any], names: Collection[str] | None
) -> dict[str, float]:
    """Check the weights of values.

    Raises:
        ValueError: a value does not exist, or its weight is out of bounds.
    """
    for name, weight in weights.items():
        where = f"{field}.{name}"
        if not isinstance(name, str) or (names is not None and name not in names):
            raise ValueError(f"{where}: no such value; {nearest(str(name), names or ())}")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        # The comparison also fails for NaN.
        if not is_number or not abs(weight) <= MAX_VALUE_WEIGHT:
            raise ValueError(
                f"{where}: {weight!r} is not allowed; must be a number from "
                f"{-MAX_VALUE_WEIGHT:g} to {MAX_VALUE_WEIGHT:g}."
            )
    return {name: float(weight) for name, weight in weights.items()}


# The names of the values of each engine in this process. An engine's own object is the key, so
# its names also disappear with it.
_value_names: weakref.WeakKeyDictionary[object, frozenset[str]] = weakref.WeakKeyDictionary()


def publish_value_names(owner: object, names: Iterable[str]) -> None:
    """Set the names of the values of one engine; requests may then use them."""
    _value_names[owner] = frozenset(names)


def withdraw_value_names(owner: object) -> None:
    """Remove the names of one engine."""
    _value_names.pop(owner, None)


def published_value_names() -> frozenset[str]:
    """Return the names of the values of all engines in this process.

    vLLM validates requests in a class method that does not know the engine, so it has to accept the
    values of every engine.
    """
    return frozenset[str]().union(*_value_names.values())
