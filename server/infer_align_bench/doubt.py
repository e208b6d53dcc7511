"""What measurements cannot answer: things that they never held, lengths that they never varied, loads beyond them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from infer_align.errors import ConfigError
from infer_align_bench.cost import Prices, Setting

VARIED = 1.5  # the longest over the shortest, from which on a length counts as varied
BEYOND = 1.1  # times the range that was measured: further out it is extrapolated
RISEN = 1.05  # times the throughput at fewer requests under way, or more of them bring nothing
PARTS = {
    "k": ("steered", ("steer", "steered_step")),
    "reward_tokens": ("scored", ("reward",)),
    "judge_tokens": ("judged", ("judge",)),
}
LENGTHS = {"prompt_tokens": "prompts", "output_tokens": "answers"}


def refuse_unmeasured(settings: Sequence[Setting], asked: Setting) -> None:
    """A thing that no measurement held has no price: to plan with it for nothing would be a lie.

    Raises:
        ConfigError: such a thing is asked, or lengths outside of those measured, which were never varied.
    """
    for name, (flag, _) in PARTS.items():
        if getattr(asked, name) and not any(getattr(s, name) for s in settings):
            raise ConfigError(
                f"{name}: no result holds {flag} requests, so they have no price; measure some and add them."
            )
    for name, what in LENGTHS.items():
        low, high = _range(settings, name)
        if (
            high < VARIED * max(low, 1e-9)
            and not low / BEYOND <= getattr(asked, name) <= high * BEYOND
        ):
            raise ConfigError(
                f"{name}: {getattr(asked, name):g} cannot be planned: all measured {what} have {low:.3g} to {high:.3g} tokens, "
                "which says nothing of other lengths; measure some (--dataset synthetic --input-tokens ... --output-tokens ...)."
            )


def doubted(prices: Prices, settings: Sequence[Setting], asked: Setting) -> Iterator[str]:
    """Where a plan says more than its measurements do; `asked` with the concurrency that is planned."""
    for name, (_, parts) in PARTS.items():
        if getattr(asked, name) and not any(getattr(prices, part) for part in parts):
            yield f"{name}: measured, but the fit found no cost of it: it is planned as if it were free."
    low, high = _range(settings, "prompt_tokens")
    if high < VARIED * max(low, 1e-9):
        yield f"prompts were not varied ({low:.3g} to {high:.3g} tokens): what reading them costs is mixed with other prices."
    for name in (*LENGTHS, "k", "n"):
        low, high = _range(settings, name)
        if getattr(asked, name) and not low / BEYOND <= getattr(asked, name) <= high * BEYOND:
            yield f"{name}: {getattr(asked, name):g} is extrapolated; measured were {low:.3g} to {high:.3g}."
    most = max(s.concurrency * s.n / s.replicas for s in settings)
    if asked.concurrency * asked.n > BEYOND * most:
        yield (
            f"{asked.concurrency * asked.n:g} sequences at once are extrapolated; measured were {most:g} at most: a replica may "
            "not bear them, or queue. Measure with a larger --concurrency, or set --max-sequences."
        )


def saturated(settings: Sequence[Setting], measured: Sequence[float]) -> Iterator[str]:
    """Loads at which more requests under way brought no more throughput: what was measured there is waiting, not work."""
    for setting, took in zip(settings, measured, strict=True):
        fewer = [
            (other.concurrency / value, other.concurrency)
            for other, value in zip(settings, measured, strict=True)
            if other.concurrency < setting.concurrency and _alike(setting, other)
        ]
        if fewer and setting.concurrency / took < RISEN * max(fewer)[0]:
            yield (
                f"saturated: {setting.concurrency:g} under way bring no more requests / s than {max(fewer)[1]:g} "
                f"(n = {setting.n:g}): they wait in the server, and the prices hold that waiting; leave that result out."
            )


def _alike(one: Setting, other: Setting) -> bool:
    """But for the load; means of lengths differ a little from run to run."""
    same = replace(
        one,
        concurrency=other.concurrency,
        prompt_tokens=other.prompt_tokens,
        output_tokens=other.output_tokens,
    )
    same = replace(same, reward_tokens=other.reward_tokens, judge_tokens=other.judge_tokens)
    return same == other and all(
        abs(getattr(one, name) - getattr(other, name))
        <= 0.1 * max(getattr(one, name), getattr(other, name))
        for name in (*LENGTHS, "reward_tokens", "judge_tokens")
    )


def _range(settings: Sequence[Setting], name: str) -> tuple[float, float]:
    values = [getattr(setting, name) for setting in settings]
    return min(values), max(values)
