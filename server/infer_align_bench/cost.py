"""Cost model of a request: nine prices, fitted to measurements, that predict other settings.

A replica decodes step by step. With c requests in flight on it, each of n candidates, one step
serves b = c n sequences and takes

    step + b (sequence + attention x context + steer x k)

seconds. An answer of L tokens takes L steps. Meanwhile c prompts are read, c answers are scored
and c are judged, since in a closed loop requests begin and end at the same rate:

    seconds(c) = fixed
               + L (step + [k > 0] steered_step)
               + L b (sequence + attention (P + L / 2) + steer k)
               + c (prefill P + reward R + judge J)

with P prompt tokens (without those of a cached prefix), R tokens read by rewards and J tokens of
the judge per request. The model is linear in its prices. The throughput is c / seconds(c) (Little's
law), times the replicas.

The model ignores preemption, and bursts of arrivals, which need spare capacity. It also uses the
mean length of n candidates, where the longest of them decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import numpy as np

from infer_align.errors import ConfigError
from infer_align.methods.best_of_n import BestOfN
from infer_align.methods.rps import RPS
from infer_align.methods.vas import VAS

# The server's defaults of parameters that a request leaves out.
DEFAULT_N = BestOfN().n
DEFAULT_DIRECTIONS = RPS().k
DEFAULT_TOP_K = VAS(beta={}).top_k
MAX_CONCURRENCY = 4096
MIN_MEASUREMENTS = 3


@dataclass(frozen=True, slots=True)
class Setting:
    """One kind of request under one load. Token counts are means."""

    # Requests in flight, over all replicas.
    concurrency: float
    # Candidates of a request.
    n: float = 1.0
    prompt_tokens: float = 0.0
    # Of one candidate.
    output_tokens: float = 0.0
    # Tokens that are valued at each step; 0: no steering.
    k: float = 0.0
    reward_tokens: float = 0.0
    judge_tokens: float = 0.0
    replicas: int = 1
    # Tokens of the prompt that a prefix cache holds: they are attended to, and not read again.
    cached_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds for one unit of each resource."""

    # A request: network and parsing.
    fixed: float = 0.0
    # A decoding step of any batch size: reading the weights.
    step: float = 0.0
    # A sequence in a step.
    sequence: float = 0.0
    # A token of context of a sequence in a step.
    attention: float = 0.0
    # A prompt token.
    prefill: float = 0.0
    # A steered step, in addition to `step`.
    steered_step: float = 0.0
    # A valued token of a sequence in a step.
    steer: float = 0.0
    # A token that the rewards read.
    reward: float = 0.0
    # A token of the judge.
    judge: float = 0.0

    def tabulated_seconds(self, setting: Setting) -> float:
        """Return what a table of steps adds to the latency of a request: nothing here."""
        del setting  # prices from a table read it
        return 0.0


def amounts(setting: Setting) -> Prices:
    """Return the number of units that a request of this setting takes of each price."""
    concurrency = setting.concurrency / setting.replicas
    length = setting.output_tokens
    sequence_steps = length * concurrency * setting.n
    return Prices(
        fixed=1.0,
        step=length,
        sequence=sequence_steps,
        attention=sequence_steps * (setting.prompt_tokens + length / 2),
        prefill=concurrency * (setting.prompt_tokens - setting.cached_tokens),
        steered_step=length if setting.k else 0.0,
        steer=sequence_steps * setting.k,
        reward=concurrency * setting.reward_tokens,
        judge=concurrency * setting.judge_tokens,
    )


def seconds(prices: Prices, setting: Setting) -> float:
    """Predict the mean latency of a request."""
    units = asdict(amounts(setting))
    linear = sum(getattr(prices, name) * unit for name, unit in units.items())
    return float(linear + prices.tabulated_seconds(setting))


def throughput(prices: Prices, setting: Setting) -> float:
    """Predict the requests per second."""
    return setting.concurrency / seconds(prices, setting)


def fit(settings: Sequence[Setting], measured: Sequence[float]) -> Prices:
    """Fit non-negative prices with the smallest squared relative error.

    Args:
        settings: that were measured.
        measured: mean latency of each setting, in seconds.

    Raises:
        ConfigError: there are fewer than three measurements.
    """
    # Loading it takes a quarter of a second, and most commands fit nothing.
    from scipy.optimize import nnls

    if len(settings) < MIN_MEASUREMENTS:
        raise ConfigError(
            f"{len(settings)} results are too few: a cost model needs three measured settings or "
            "more; measure other settings and add their results."
        )
    units = np.array([astuple(amounts(setting)) for setting in settings])
    # Divided by the measurement, every row predicts 1.
    design = units / np.asarray(measured)[:, None]
    scale = np.abs(design).max(axis=0)
    # A price that no setting pays has a column of zeros, and becomes 0.
    scale[scale == 0] = 1.0
    scaled_prices, _ = nnls(design / scale, np.ones(len(settings)))
    return Prices(*(float(price) for price in scaled_prices / scale))


def errors(prices: Prices, settings: Sequence[Setting], measured: Sequence[float]) -> list[float]:
    """Return the relative error of each prediction; 0.1 predicts 10% too many seconds."""
    result = []
    for setting, value in zip(settings, measured, strict=True):
        result.append(seconds(prices, setting) / value - 1)
    return result


def leave_one_out_errors(settings: Sequence[Setting], measured: Sequence[float]) -> list[float]:
    """Return the relative error of each setting, predicted from all other settings."""
    result = []
    for i in range(len(settings)):
        prices = fit([*settings[:i], *settings[i + 1 :]], [*measured[:i], *measured[i + 1 :]])
        result += errors(prices, [settings[i]], [measured[i]])
    return result


@dataclass(frozen=True, slots=True)
class Capacity:
    """The load of one replica and the number of replicas that a rate needs."""

    # Requests in flight on one replica.
    concurrency: int
    # Mean latency of a request.
    seconds: float
    # Throughput of one replica.
    requests_per_second: float
    replicas: int


def capacity(
    prices: Prices,
    setting: Setting,
    rate: float,
    limit: float = math.inf,
    max_sequences: int = 256,
) -> Capacity:
    """Plan the replicas for a rate and a limit of the mean latency.

    Args:
        prices: of the cost model.
        setting: the kind of request; its load is ignored.
        rate: requests per second.
        limit: maximum mean latency, in seconds.
        max_sequences: maximum number of sequences of one replica.

    Raises:
        ConfigError: a single request exceeds the limit, its candidates do not fit on a replica, or
            it has no price.
    """
    max_requests = int(max_sequences // setting.n)
    if max_requests < 1:
        raise ConfigError(
            f"--n: {setting.n:g} candidates do not fit into {max_sequences} sequences; "
            "raise --max-sequences or reduce --n."
        )
    alone = seconds(prices, replace(setting, concurrency=1, replicas=1))
    if not alone:
        raise ConfigError(
            "the results give no price to any part of the planned request; "
            "measure requests that are more similar to it."
        )
    if alone > limit:
        raise ConfigError(
            f"--latency: {limit:g} s is too short: a single request without other load takes "
            f"{alone:.3g} s; raise --latency."
        )
    best = _best_load(prices, setting, limit, min(max_requests, MAX_CONCURRENCY))
    rate_per_replica = throughput(prices, best)
    # The margin keeps a rate that is an exact multiple from taking one more replica.
    replicas = max(1, math.ceil(rate / rate_per_replica - 1e-9))
    return Capacity(int(best.concurrency), seconds(prices, best), rate_per_replica, replicas)


def _best_load(prices: Prices, setting: Setting, limit: float, max_requests: int) -> Setting:
    """Return the setting with the concurrency of highest throughput within the latency limit."""
    candidates = []
    for concurrency in range(1, max_requests + 1):
        loaded = replace(setting, concurrency=concurrency, replicas=1)
        if seconds(prices, loaded) <= limit:
            candidates.append(loaded)
    return max(candidates, key=lambda loaded: throughput(prices, loaded))


def roofline(
    parameters: float,
    bandwidth: float,
    flops: float,
    cache_bytes: float,
    reward_parameters: float = 0.0,
    weight_bytes: float = 2.0,
) -> Prices:
    """Compute prices from a data sheet instead of measurements.

    The weights are read once per step, and each token takes two operations per weight.

    Args:
        parameters: of the language model.
        bandwidth: achieved (not peak) bytes per second.
        flops: achieved (not peak) operations per second.
        cache_bytes: of keys and values, per token of context.
        reward_parameters: of all reward models together, if they run on the same device.
        weight_bytes: per parameter.
    """
    seconds_per_token = 2 * parameters / flops
    return Prices(
        step=weight_bytes * parameters / bandwidth,
        sequence=seconds_per_token,
        attention=cache_bytes / bandwidth,
        prefill=seconds_per_token,
        reward=2 * reward_parameters / flops,
    )


def from_report(report: Mapping[str, Any], place: str) -> tuple[Setting, float]:
    """Return the setting and the mean latency in seconds of one `bench serve` result.

    Args:
        report: the JSON object that `bench serve --json` wrote.
        place: its file, for error messages.

    Raises:
        ConfigError: the run is not a closed loop on one target, no request was answered, or the
            endpoint did not count its tokens.
    """
    targets = list(report.get("targets", {}).values())
    if len(targets) != 1 or report["load"]["loop"] != "closed":
        raise ConfigError(
            f"{place}: a cost model is fitted to closed loops on one target; "
            "measure one target with --concurrency."
        )
    target = targets[0]
    answered = target["requests"]["answered"]
    if not answered:
        raise ConfigError(f"{place}: no request was answered; measure again.")
    tokens = target["tokens"]
    if tokens.get("counted_by", "usage") != "usage" or not tokens["prompt"]:
        raise ConfigError(
            f"{place}: the endpoint does not count its tokens (usage), so they have no price; "
            "measure an endpoint that sends usage."
        )
    align = target["align"] or {}
    usage = tokens["align"]
    n = _candidates(align, usage.get("engine_calls", answered) / answered)
    judge_tokens = usage.get("judge_prompt_tokens", 0) + usage.get("judge_completion_tokens", 0)
    setting = Setting(
        concurrency=report["load"]["concurrency"],
        n=n,
        prompt_tokens=tokens["prompt"] / answered,
        output_tokens=tokens["spent"] / answered / n,
        k=_valued_tokens(align),
        reward_tokens=usage.get("reward_tokens", 0) / answered,
        judge_tokens=judge_tokens / answered,
    )
    return setting, target["latency_ms"]["e2e"]["mean"]["value"] / 1e3


def _valued_tokens(align: Mapping[str, Any]) -> int:
    """Return the number of tokens that steering values at each step.

    Raises:
        ConfigError: the number is not fixed, and the model has no price for that.
    """
    if "vas" not in align:
        return 0
    top_k: object = align["vas"].get("top_k", DEFAULT_TOP_K)
    if not isinstance(top_k, int) or align["vas"].get("min_p") is not None:
        raise ConfigError(
            "align.vas: the cost model has no price for steering without a fixed number of "
            "candidates; measure a target that sets top_k to a number."
        )
    return top_k


def _candidates(align: Mapping[str, Any], calls: float) -> float:
    """Return the candidates of a request: from its parameters, or with a preset from its calls."""
    if "preset" in align or not ("best_of_n" in align or "rps" in align):
        return max(1.0, calls)
    candidates = 1.0
    if "best_of_n" in align:
        candidates *= align["best_of_n"].get("n", DEFAULT_N)
    if "rps" in align:
        candidates *= align["rps"].get("k", DEFAULT_DIRECTIONS)
    return candidates
