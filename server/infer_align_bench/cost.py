"""What a request costs: a model with eight prices, fitted to measurements, that predicts throughput for settings nobody has run.

A replica decodes step by step. With c requests under way on it, each of n candidates, a step serves b = c n sequences and takes
`step + b (sequence + attention x context + steer x k)` seconds; an answer of L tokens takes L steps. In its time, c prompts are
read, c answers are scored and c judged, since in a closed loop as many requests begin and end as are under way::

    seconds(c) =  fixed  +  L (step + [k > 0] steered_step)  +  L b (sequence + attention (P + L / 2) + steer k)
                  +  c (prefill P  +  reward R  +  judge J)

with P prompt tokens, R tokens read by rewards, J tokens of the judge, per request. It is linear in its prices. Throughput is c /
seconds(c) (Little's law), times the replicas. What it leaves out: prefix caches, preemption, the longest of n candidates being
longer than their mean, and arrivals in bursts, which need head room on top.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import numpy as np

from infer_align.errors import ConfigError

LARGEST_CONCURRENCY = 4096


@dataclass(frozen=True, slots=True)
class Setting:
    """One kind of request under one load; token counts are means."""

    concurrency: float  # requests under way, over all replicas
    n: float = 1.0  # candidates
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0  # of one candidate
    k: float = 0.0  # tokens that are valued at each step; 0: not steered
    reward_tokens: float = 0.0
    judge_tokens: float = 0.0
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds for one unit of each thing."""

    fixed: float = 0.0  # a request: network, parsing
    step: float = 0.0  # a decoding step, however few sequences it has: reading the weights
    sequence: float = 0.0  # a sequence in a step
    attention: float = 0.0  # a token of context of a sequence in a step
    prefill: float = 0.0  # a prompt token
    steered_step: float = 0.0  # a steered step, in addition
    steer: float = 0.0  # a valued token of a sequence in a step
    reward: float = 0.0  # a token that the rewards read
    judge: float = 0.0  # a token of the judge


def amounts(setting: Setting) -> Prices:
    """How much of each price a request of this setting pays."""
    c, length = setting.concurrency / setting.replicas, setting.output_tokens
    served = length * c * setting.n
    return Prices(
        fixed=1.0,
        step=length,
        sequence=served,
        attention=served * (setting.prompt_tokens + length / 2),
        prefill=c * setting.prompt_tokens,
        steered_step=length if setting.k else 0.0,
        steer=served * setting.k,
        reward=c * setting.reward_tokens,
        judge=c * setting.judge_tokens,
    )


def seconds(prices: Prices, setting: Setting) -> float:
    """Predicted mean latency of a request."""
    return float(np.dot(astuple(prices), astuple(amounts(setting))))


def throughput(prices: Prices, setting: Setting) -> float:
    """Predicted requests per second."""
    return setting.concurrency / seconds(prices, setting)


def fit(settings: Sequence[Setting], measured: Sequence[float]) -> Prices:
    """The non-negative prices with the least squared relative error; measured are seconds, one per setting.

    Every subset of prices is tried as the one that is not zero, which finds the optimum exactly: there are 512 of them.

    Raises:
        ConfigError: fewer than three measurements.
    """
    if len(settings) < 3:
        raise ConfigError(
            f"a cost model needs three measured settings or more, not {len(settings)}."
        )
    design = (
        np.array([astuple(amounts(setting)) for setting in settings])
        / np.asarray(measured)[:, None]
    )
    scale = np.where(design.any(axis=0), np.abs(design).max(axis=0), 1.0)
    used = [i for i in range(design.shape[1]) if design[:, i].any()]
    best, least = np.zeros(design.shape[1]), math.inf
    for size in range(1, min(len(used), len(settings)) + 1):
        for chosen in itertools.combinations(used, size):
            columns = list(chosen)
            found, *_ = np.linalg.lstsq(
                design[:, columns] / scale[columns], np.ones(len(settings)), rcond=None
            )
            error = float(np.sum((design[:, columns] / scale[columns] @ found - 1) ** 2))
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(design.shape[1]), error
                best[columns] = found / scale[columns]
    return Prices(*(float(price) for price in best))


def errors(prices: Prices, settings: Sequence[Setting], measured: Sequence[float]) -> list[float]:
    """Relative error of each prediction: 0.1 is 10% too slow."""
    return [
        seconds(prices, setting) / value - 1
        for setting, value in zip(settings, measured, strict=True)
    ]


def left_out(settings: Sequence[Setting], measured: Sequence[float]) -> list[float]:
    """Relative error of each setting, predicted from all the others."""
    found = []
    for i, (setting, value) in enumerate(zip(settings, measured, strict=True)):
        others = [j for j in range(len(settings)) if j != i]
        found += errors(
            fit([settings[j] for j in others], [measured[j] for j in others]), [setting], [value]
        )
    return found


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one replica bears, and how many are needed."""

    concurrency: int  # on one replica
    seconds: float
    requests_per_second: float  # of one replica
    replicas: int


def capacity(
    prices: Prices,
    setting: Setting,
    rate: float,
    limit: float = math.inf,
    most_sequences: int = 256,
) -> Capacity:
    """The replicas for `rate` requests per second, each answered in `limit` seconds on average; `setting` without its load.

    Raises:
        ConfigError: a single request alone takes longer, or its candidates do not fit.
    """
    most = int(most_sequences // setting.n)
    alone = seconds(prices, replace(setting, concurrency=1, replicas=1))
    if most < 1:
        raise ConfigError(
            f"n: {setting.n:g} candidates do not fit into {most_sequences} sequences; raise --max-sequences."
        )
    if not alone:
        raise ConfigError(
            "no price was found for anything that is asked; measure requests that are more like it."
        )
    if alone > limit:
        raise ConfigError(
            f"--latency: {limit:g} s cannot be kept: a request alone takes {alone:.3g} s."
        )
    bearable = [
        replace(setting, concurrency=c, replicas=1)
        for c in range(1, min(most, LARGEST_CONCURRENCY) + 1)
    ]
    best = max(
        (s for s in bearable if seconds(prices, s) <= limit), key=lambda s: throughput(prices, s)
    )
    each = throughput(prices, best)
    return Capacity(
        int(best.concurrency), seconds(prices, best), each, math.ceil(rate / each - 1e-9)
    )


def roofline(
    parameters: float,
    bandwidth: float,
    flops: float,
    cache_bytes: float,
    reward_parameters: float = 0.0,
    weight_bytes: float = 2.0,
) -> Prices:
    """Prices from a data sheet, not measured: the weights are read once a step, each token costs two operations a weight.

    Args:
        parameters: of the language model.
        bandwidth: bytes per second that are reached, not the peak.
        flops: operations per second that are reached, not the peak.
        cache_bytes: of keys and values, per token of context.
        reward_parameters: of all reward models together, if they run on the same device.
        weight_bytes: per parameter.
    """
    token = 2 * parameters / flops
    return Prices(
        step=weight_bytes * parameters / bandwidth,
        sequence=token,
        attention=cache_bytes / bandwidth,
        prefill=token,
        reward=2 * reward_parameters / flops,
    )


def from_report(report: Mapping[str, Any], place: str) -> tuple[Setting, float]:
    """The setting and the mean latency of one `bench serve` result.

    Raises:
        ConfigError: not a closed loop on one target, or nothing was answered.
    """
    targets = list(report.get("targets", {}).values())
    if len(targets) != 1 or report["load"]["loop"] != "closed":
        raise ConfigError(
            f"{place}: a cost model is fitted to closed loops on one target; measure with --concurrency."
        )
    found, align = targets[0], targets[0]["align"] or {}
    if not (answered := found["requests"]["answered"]):
        raise ConfigError(f"{place}: no request was answered.")
    tokens, usage = found["tokens"], found["tokens"]["align"]
    if tokens.get("counted_by", "usage") != "usage" or not tokens["prompt"]:
        raise ConfigError(
            f"{place}: the endpoint does not count its tokens (usage), so they have no price."
        )
    n = _candidates(align, usage.get("engine_calls", answered) / answered)
    setting = Setting(
        concurrency=report["load"]["concurrency"],
        n=n,
        prompt_tokens=tokens["prompt"] / answered,
        output_tokens=tokens["spent"] / answered / n,
        k=align["vas"].get("top_k", 20) if "vas" in align else 0,
        reward_tokens=usage.get("reward_tokens", 0) / answered,
        judge_tokens=(usage.get("judge_prompt_tokens", 0) + usage.get("judge_completion_tokens", 0))
        / answered,
    )
    return setting, found["latency_ms"]["e2e"]["mean"]["value"] / 1e3


def _candidates(align: Mapping[str, Any], calls: float) -> float:
    """Of a request, as it asked for them; by a preset, as many as there were calls."""
    if "preset" in align or not ("best_of_n" in align or "rps" in align):
        return max(1.0, calls)
    each = align["best_of_n"].get("n", 8) if "best_of_n" in align else 1
    return float(each * (align["rps"].get("k", 5) if "rps" in align else 1))


def names() -> tuple[str, ...]:
    """The prices, in order."""
    return tuple(f.name for f in fields(Prices))
