"""Model what differs between requests of a cluster: cached prefixes, and adaptive numbers of draws.

A prefix is the part of a prompt that many requests share, such as a system prompt or a long
conversation. A replica that has read it recently does not read it again. With routing by prefix the
caches of all replicas hold different prefixes and work as one; with any other routing each of them
sees all prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from infer_align.errors import ConfigError
from infer_align.types import Array

Routing: TypeAlias = Literal["least", "random", "affine"]
# A prefix-affine router sends a request elsewhere if its replica has more than this times the mean
# number of requests.
LOAD_BOUND = 1.25
# Halvings of an interval: more digits than a float has.
HALVINGS = 60
# A smaller share of the requests counts as none.
UNUSED = 1e-12


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The prefixes that requests share.

    Attributes:
        tokens: of each prefix.
        count: number of different prefixes.
        skew: of their popularity: prefix i is used in proportion to 1 / i^skew.
        cache_tokens: tokens of prefixes that one replica keeps.
    """

    tokens: int = 0
    count: int = 1
    skew: float = 1.0
    cache_tokens: int = 0

    def popularity(self) -> Array:
        """Return the share of requests of each prefix, [count], that sums to 1."""
        weights = np.arange(1, self.count + 1, dtype=np.float64) ** -self.skew
        return np.asarray(weights / weights.sum())

    def hit_share(self, replicas: int, routing: Routing) -> float:
        """Return the share of requests whose prefix is in the cache of their replica."""
        if not self.tokens:
            return 0.0
        capacity = self.cache_tokens // self.tokens
        if routing == "affine":
            capacity *= replicas
        return lru_hit_share(self.popularity(), capacity)


def lru_hit_share(popularity: Array, capacity: int) -> float:
    """Return the share of hits of a cache that keeps the most recent items.

    An item is in the cache if it was used within the time T in which as many items are used as fit:
    the approximation of Che, Tung and Wang (2002), exact to about a percent for independent uses.

    Args:
        popularity: [N] share of each item; sums to 1.
        capacity: number of items that fit.
    """
    # An item that is never used needs no place. A steep skew leaves only a few others.
    popularity = popularity[popularity > UNUSED]
    if capacity >= len(popularity):
        return 1.0
    if capacity <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while _occupied(popularity, high) < capacity:
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _occupied(popularity, middle) < capacity:
            low = middle
        else:
            high = middle
    return float(np.sum(popularity * -np.expm1(-popularity * high)))


def _occupied(popularity: Array, time: float) -> float:
    return float(np.sum(-np.expm1(-popularity * time)))


@dataclass(frozen=True, slots=True)
class Batches:
    """The numbers of batches of an adaptive request: it stops after each one with equal chance.

    Attributes:
        limit: number of batches at most.
        stop: probability to stop after a batch.
    """

    limit: int = 1
    stop: float = 1.0

    @property
    def mean(self) -> float:
        """Return the mean number of batches."""
        return mean_batches(self.stop, self.limit)

    def draw(self, generator: np.random.Generator, count: int) -> Array:
        """Draw the numbers of batches of `count` requests: [count], from 1 to `limit`."""
        drawn = generator.geometric(self.stop, count)
        return np.minimum(drawn, self.limit).astype(np.float64)


def mean_batches(stop: float, limit: int) -> float:
    """Return the mean of a geometric number that is cut at `limit`."""
    if stop <= 0:
        return float(limit)
    return -math.expm1(limit * math.log1p(-stop)) / stop if stop < 1 else 1.0


def batches(mean_n: float, batch: int, max_n: int) -> Batches:
    """Return the batches of adaptive requests that draw `mean_n` candidates on average.

    Raises:
        ConfigError: the mean is not between one batch and the largest number.
    """
    limit = math.ceil(max_n / batch)
    if not batch <= mean_n <= limit * batch:
        raise ConfigError(
            f"--mean-n: {mean_n:g} is not possible with batches of {batch} and at most {max_n} "
            f"candidates; must be from {batch} to {limit * batch}."
        )
    low, high = 1e-9, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if mean_batches(middle, limit) > mean_n / batch:
            low = middle
        else:
            high = middle
    return Batches(limit, high)


@dataclass(frozen=True, slots=True)
class Traffic:
    """The work of requests, in units of that of the mean request, and where they are sent.

    Attributes:
        spread: coefficient of variation of the length of answers.
        batches: of adaptive requests.
        hit_share: share of requests whose prefix is cached on the replica that routing prefers.
        hit_work: work of such a request.
        miss_work: work of any other.
        routing: "least" sends a request to the replica with the fewest, "random" to any, "affine"
            to that of its prefix unless this one is overloaded.
    """

    spread: float = 0.5
    batches: Batches = Batches()
    hit_share: float = 0.0
    hit_work: float = 1.0
    miss_work: float = 1.0
    routing: Routing = "least"

    def lengths(self, generator: np.random.Generator, count: int) -> Array:
        """Draw the lengths of requests: [count], with mean 1."""
        lengths = np.ones(count)
        if self.spread:
            lengths = generator.gamma(1 / self.spread**2, self.spread**2, count)
        if self.batches.limit > 1:
            lengths = lengths * self.batches.draw(generator, count) / self.batches.mean
        return np.asarray(lengths)

    def works(self, generator: np.random.Generator, lengths: Array) -> tuple[Array, Array]:
        """Return the work of each request on its preferred replica, and on any other."""
        hits = np.zeros(len(lengths), dtype=bool)
        if self.hit_share:
            hits = generator.random(len(lengths)) < self.hit_share
        preferred = lengths * np.where(hits, self.hit_work, self.miss_work)
        if self.routing != "affine":
            return preferred, preferred
        return preferred, lengths * self.miss_work


def homes(
    routing: Routing, generator: np.random.Generator, replicas: int, count: int
) -> Sequence[int]:
    """Return the replica that routing prefers for each request; [] for the one with the fewest."""
    if routing == "least":
        return []
    homes_of: list[int] = generator.integers(replicas, size=count).tolist()
    return homes_of
