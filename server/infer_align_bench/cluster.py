"""Plan a cluster: where requests are sent, what their prefixes save, and who judges them.

The plan of `bench plan` for one kind of request becomes that of a cluster: the share of prefixes
that are cached changes the work of a request, adaptive requests draw a varying number of batches,
and judges may stand on replicas of their own.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace

from infer_align.errors import ConfigError
from infer_align_bench.cost import Capacity, Prices, Setting, capacity, seconds
from infer_align_bench.simulate import JudgePool
from infer_align_bench.traffic import Batches, Prefixes, Traffic, batches

# Outside of these a plan has no meaning, or its simulation does not fit into the memory.
MIN_RATE = 1e-6
MAX_PREFIXES = 10_000_000
MAX_JUDGES = 1_000_000
# The hit share depends on the number of replicas, and that on the hit share.
MAX_ITERATIONS = 20


@dataclass(frozen=True, slots=True)
class Cluster:
    """The plan of a cluster.

    Attributes:
        request: the mean request, with the tokens that caches save on average.
        planned: replicas at the mean load.
        traffic: how requests differ, and where they are sent.
        judges: the pool of judges; None if the replicas judge.
        hit_share: share of requests whose prefix is cached, with the planned routing.
        hit_share_elsewhere: the same if routing does not look at prefixes.
    """

    request: Setting
    planned: Capacity
    traffic: Traffic
    judges: JudgePool | None = None
    hit_share: float = 0.0
    hit_share_elsewhere: float = 0.0


def plan_cluster(
    options: argparse.Namespace, prices: Prices, request: Setting, max_sequences: int
) -> Cluster:
    """Plan the cluster of the options.

    Args:
        options: of `bench plan`.
        prices: of the cost model.
        request: the planned request, without caches and with all that judges read.
        max_sequences: maximum number of sequences of one replica.

    Raises:
        ConfigError: options contradict each other, or no number of replicas fits.
    """
    _check_sizes(options)
    prefixes = _prefixes(options)
    adaptive = Batches()
    if options.mean_n is not None:
        adaptive = batches(options.mean_n, options.batch, options.n)
        request = replace(
            request, n=options.batch, output_tokens=options.output_tokens * adaptive.mean
        )
    judges = None
    if options.judge_pool is not None:
        judges = _judges(options, prices, request)
        request = replace(request, judge_tokens=0.0)
    planned = capacity(prices, request, options.rate, options.latency, max_sequences)
    share = 0.0
    for _ in range(MAX_ITERATIONS):
        replicas = planned.replicas
        share = prefixes.hit_share(replicas, options.routing)
        cached = replace(request, cached_tokens=share * prefixes.tokens)
        planned = capacity(prices, cached, options.rate, options.latency, max_sequences)
        if planned.replicas == replicas:
            break
    request = replace(request, cached_tokens=share * prefixes.tokens)
    traffic = _traffic(options, prices, replace(request, concurrency=planned.concurrency), share)
    return Cluster(
        request=request,
        planned=planned,
        traffic=replace(traffic, batches=adaptive),
        judges=judges,
        hit_share=share,
        hit_share_elsewhere=prefixes.hit_share(1, "least"),
    )


def _check_sizes(options: argparse.Namespace) -> None:
    """Check that the plan can be computed.

    Raises:
        ConfigError: the rate is too low, or there are too many prefixes.
    """
    if options.rate < MIN_RATE:
        raise ConfigError(
            f"--rate: {options.rate:g} is not allowed; must be at least {MIN_RATE:g} requests per "
            "second. One replica serves that."
        )
    if options.prefixes > MAX_PREFIXES:
        raise ConfigError(
            f"--prefixes: {options.prefixes} is not allowed; must be at most {MAX_PREFIXES}. Rarer "
            "prefixes are hardly ever in a cache: leave them out."
        )


def _prefixes(options: argparse.Namespace) -> Prefixes:
    """Return the prefixes of the options.

    Raises:
        ConfigError: they contradict each other.
    """
    if options.prefix_tokens > options.prompt_tokens:
        raise ConfigError(
            f"--prefix-tokens: {options.prefix_tokens} is over --prompt-tokens "
            f"({options.prompt_tokens}); a prefix is a part of the prompt."
        )
    if options.prefix_tokens and options.cache_tokens < options.prefix_tokens:
        raise ConfigError(
            f"--cache-tokens: {options.cache_tokens} does not hold one prefix of "
            f"{options.prefix_tokens} tokens; set it to the tokens that a replica keeps beside "
            "running requests."
        )
    if options.routing == "affine" and not options.prefix_tokens:
        raise ConfigError("--routing affine: needs --prefix-tokens, the tokens that prompts share.")
    return Prefixes(
        options.prefix_tokens, options.prefixes, options.prefix_skew, options.cache_tokens
    )


def _traffic(options: argparse.Namespace, prices: Prices, loaded: Setting, share: float) -> Traffic:
    """Return the traffic; a hit and a miss take more or less than the mean request."""
    mean = seconds(prices, loaded)
    hit = seconds(prices, replace(loaded, cached_tokens=float(options.prefix_tokens)))
    miss = seconds(prices, replace(loaded, cached_tokens=0.0))
    return Traffic(
        spread=options.spread,
        hit_share=share,
        hit_work=hit / mean,
        miss_work=miss / mean,
        routing=options.routing,
    )


def _judges(options: argparse.Namespace, prices: Prices, request: Setting) -> JudgePool:
    """Return a pool of judges with the mean load of the options.

    Raises:
        ConfigError: judging has no price, or the load is none.
    """
    alone = prices.judge * request.judge_tokens
    if not alone:
        raise ConfigError(
            "--judge-pool: the planned request costs a judge nothing; give --judge-tokens, and "
            "prices or results in which judging has a price."
        )
    if options.judge_pool >= 1:
        raise ConfigError(
            f"--judge-pool: {options.judge_pool:g} is not allowed; must be a mean load below 1, "
            "such as 0.7."
        )
    pool = options.rate * alone / options.judge_pool
    if pool > MAX_JUDGES:
        raise ConfigError(
            f"--judge-tokens: {options.judge_tokens} at {options.rate:g} requests per second need "
            f"{pool:.3g} judges; at most {MAX_JUDGES} are simulated. Reduce --judge-tokens or "
            "--rate."
        )
    return JudgePool(alone, math.ceil(pool))
