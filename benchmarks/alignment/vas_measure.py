"""Measure the ways to answer that `vas.py` compares: frozen, best-of-n, steered and combined."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from benchmarks.alignment.best_of_n import UNCERTAINTY_WEIGHT
from benchmarks.demo import measure
from benchmarks.demo.preference import score
from infer_align import objectives
from infer_align.demo import path, world
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.fitting.curve import BetaSample, suggest_beta
from infer_align.fitting.samples import draw_candidates
from infer_align.methods.best_of_n import expected_best, kl_upper_bound
from infer_align.steering import Steering
from infer_align.types import Array, Candidate, Draw

Tail = Literal["keep", "mask"]

# Names of the configured values.
HEAD = "helpful"
LOOKAHEAD = "helpful-lookahead"
BRIEF = "brief"
NAMES = {HEAD: "VAS head", LOOKAHEAD: "VAS lookahead"}
BETAS = (1.0, 2.0, 4.0, 8.0, 16.0)
HELPFUL_WEIGHTS = (0.0, 4.0, 16.0)
BRIEF_WEIGHTS = (0.0, 2.0, 8.0)
TAIL_BETA = 4.0
# A weight that masks the tail and changes nothing else. With a weight of 0, nothing is masked.
MASK_ALONE = 1e-6
TOP_K = 20
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
POOL = 128
DRAWS = 2
COMPOSED_N = 8
# The betas of VAS with best-of-n, together with the headline beta.
COMPOSED_BETAS = (2.0, 4.0)
MAX_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Way:
    """One way to answer, by its means on each prompt: arrays are [P]."""

    answer: str
    section: str
    gold: Array
    proxy: Array
    kl: Array  # nats from the frozen model, for a whole answer
    tokens: Array
    words: Array | None = None
    kl_is: Literal["measured", "at most"] = "measured"


@dataclass(frozen=True, slots=True)
class Answers:
    """n answers to each of P prompts: arrays are [P, n]."""

    gold: Array
    proxy: Array
    kl: Array
    tokens: Array
    words: Array

    def mean(self, answer: str, section: str) -> Way:
        """Return the way that gives one of these answers."""
        return Way(
            answer,
            section,
            gold=self.gold.mean(1),
            proxy=self.proxy.mean(1),
            kl=self.kl.mean(1),
            tokens=self.tokens.mean(1),
            words=self.words.mean(1),
        )

    def best(self, n: int, answer: str, section: str) -> Way:
        """Return the way that selects the best of n answers by the proxy.

        Its KL is at most the KL of steering for the selected answer plus ln n - (n-1)/n for the
        selection.
        """
        return Way(
            answer,
            section,
            gold=mean_of_best(self.proxy, self.gold, n),
            proxy=mean_of_best(self.proxy, self.proxy, n),
            kl=mean_of_best(self.proxy, self.kl, n) + kl_upper_bound(n),
            tokens=n * self.tokens.mean(1),
            words=mean_of_best(self.proxy, self.words, n),
            kl_is="at most",
        )


def mean_of_best(selector: Array, values: Array, n: int) -> Array:
    """Return [P]: the expected value of the best of n by a selector. Both are [P, N]."""
    return np.array([expected_best(*rows, n) for rows in zip(selector, values, strict=True)])


@dataclass(frozen=True, slots=True)
class Lab:
    """The served engine, the world's questions, and the proxy reward models."""

    engine: TransformersEngine
    models: measure.Models
    questions: Sequence[str]
    seed: int

    async def ask(
        self,
        beta: Mapping[str, float],
        n: int = DRAWS,
        *,
        greedy: bool = False,
        tail: Tail = "keep",
    ) -> Answers:
        """Draw and score answers to every question, with the same seeds for every beta.

        Args:
            beta: weight of each value; empty for the frozen model.
            n: number of answers to each question.
            greedy: draw one answer at temperature 0 instead.
            tail: treatment of the tokens that are not valued.
        """
        temperature = 1.0
        if greedy:
            n = 1
            temperature = 0.0
        steering = Steering(beta, TOP_K, tail) if beta else None
        indices = range(len(self.questions))
        draws = [self._draw(index, n, steering, temperature) for index in indices]
        drawn = await asyncio.gather(*(draw_candidates(self.engine, draw) for draw in draws))
        candidates: list[Candidate] = []
        exchanges: list[tuple[str, str]] = []
        for question, row in zip(self.questions, drawn, strict=True):
            candidates += row
            exchanges += [(question, candidate.text) for candidate in row]
        shape = (len(drawn), n)
        gold = [world.gold(*exchange) for exchange in exchanges]
        kl = [_kl_term(candidate, greedy=greedy) for candidate in candidates]
        tokens = [float(candidate.completion_tokens) for candidate in candidates]
        words = [float(len(text.split())) for _, text in exchanges]
        return Answers(
            gold=np.array(gold).reshape(shape),
            proxy=self._proxy(exchanges).reshape(shape),
            kl=np.array(kl).reshape(shape),
            tokens=np.array(tokens).reshape(shape),
            words=np.array(words).reshape(shape),
        )

    def _draw(self, index: int, n: int, steering: Steering | None, temperature: float) -> Draw:
        body = {
            "messages": [{"role": "user", "content": self.questions[index]}],
            "max_tokens": MAX_TOKENS,
            "temperature": temperature,
            "logprobs": True,
        }
        first_seed = self.seed * 1_000_003 + index * n
        return Draw(body, n, tuple(range(first_seed, first_seed + n)), steering=steering)

    def _proxy(self, exchanges: Sequence[tuple[str, str]]) -> Array:
        """Return the proxy reward of (question, answer) pairs: uwo of the reward models."""
        scores = score(self.models.members, self.models.tokenizer, exchanges)
        members = scores.numpy().astype(np.float64).reshape(-1, len(exchanges))
        return objectives.uwo(members, UNCERTAINTY_WEIGHT)


def _kl_term(candidate: Candidate, *, greedy: bool) -> float:
    """Return log pi - log pi_0 of an answer, whose mean is the KL.

    Greedy decoding has log pi = 0.
    """
    entries = candidate.choice["logprobs"]["content"]
    frozen = sum(entry["logprob"] for entry in entries)
    if greedy:
        return float(0.0 - frozen)
    steered = sum(entry.get("aligned_logprob", entry["logprob"]) for entry in entries)
    return float(steered - frozen)


async def frozen_ways(lab: Lab) -> dict[str, Way]:
    """Measure the ways without values: one sample, greedy, and best-of-n by the proxies."""
    pool = measure.draw_pool(lab.models, lab.questions, POOL, lab.seed)
    members = pool.proxy.reshape(len(pool.proxy), -1)
    proxy = objectives.uwo(members, UNCERTAINTY_WEIGHT).reshape(pool.gold.shape)
    tokens = pool.tokens.mean(1)
    # The pool has no texts, so the words are those of other samples.
    words = (await lab.ask({})).words.mean(1)
    one_sample = Way(
        "one sample",
        "frozen",
        gold=pool.gold.mean(1),
        proxy=proxy.mean(1),
        kl=np.zeros(len(tokens)),
        tokens=tokens,
        words=words,
    )
    greedy = await lab.ask({}, greedy=True)
    ways = {"one sample": one_sample, "greedy": greedy.mean("greedy", "frozen")}
    for n in SIZES[1:]:
        name = f"best of {n}"
        ways[name] = Way(
            name,
            "best of n",
            gold=mean_of_best(proxy, pool.gold, n),
            proxy=mean_of_best(proxy, proxy, n),
            kl=np.full(len(tokens), kl_upper_bound(n)),
            tokens=n * tokens,
            kl_is="at most",
        )
    return ways


async def steered_ways(lab: Lab) -> dict[str, Way]:
    """Measure VAS at each beta, with both kinds of value and decoding, and the masked tail."""
    ways: dict[str, Way] = {}
    for value, kind in NAMES.items():
        for greedy in (False, True):
            section = f"{kind}, greedy" if greedy else kind
            for beta in BETAS:
                name = label(value, beta, greedy=greedy)
                ways[name] = (await lab.ask({value: beta}, greedy=greedy)).mean(name, section)
    masked = {"mask alone, top 20": MASK_ALONE, f"{label(HEAD, TAIL_BETA)}, mask": TAIL_BETA}
    for name, beta in masked.items():
        ways[name] = (await lab.ask({HEAD: beta}, tail="mask")).mean(name, "tail")
    return ways


async def composed_ways(lab: Lab, headline: float) -> dict[str, Way]:
    """Measure two values at once on a grid of weights, and VAS with best-of-n."""
    ways: dict[str, Way] = {}
    for helpful, brief in product(HELPFUL_WEIGHTS, BRIEF_WEIGHTS[1:]):
        name = mix_label(helpful, brief)
        ways[name] = (await lab.ask({HEAD: helpful, BRIEF: brief})).mean(name, "two values")
    for beta in dict.fromkeys((*COMPOSED_BETAS, headline)):
        name = f"{label(HEAD, beta)}, best of {COMPOSED_N}"
        answers = await lab.ask({HEAD: beta}, COMPOSED_N)
        ways[name] = answers.best(COMPOSED_N, name, "VAS + best of n")
    return ways


def label(value: str, beta: float, *, greedy: bool = False) -> str:
    """Return the name of a row with one value."""
    return f"{NAMES[value]}, beta {beta:g}" + (", greedy" if greedy else "")


def mix_label(helpful: float, brief: float) -> str:
    """Return the name of a row with two values.

    If only one weight is not 0, it is that value's row.
    """
    if brief:
        return f"VAS head {helpful:g} + brief {brief:g}"
    return label(HEAD, helpful) if helpful else "one sample"


def headline_rows(ways: Mapping[str, Way]) -> list[str]:
    """Return the headline row of each value and decoding.

    Its beta is chosen by the proxy, never by gold.
    """
    names = [label(HEAD, headline_beta())]
    for value, greedy in ((HEAD, True), (LOOKAHEAD, False), (LOOKAHEAD, True)):
        frozen = ways["greedy" if greedy else "one sample"]
        samples = [BetaSample(0.0, frozen.proxy, frozen.kl)]
        for beta in BETAS:
            way = ways[label(value, beta, greedy=greedy)]
            samples.append(BetaSample(beta, way.proxy, way.kl))
        questions = np.arange(len(samples[0].rewards))
        suggested = suggest_beta(samples, questions, kl_limit=math.inf)
        names.append(label(value, suggested, greedy=greedy))
    return names


def headline_beta() -> float:
    """Return the beta nearest to the suggestion of the head's fit, which is based on the proxy."""
    report = json.loads(path("values.json").read_text())
    suggested = float(report["head"][HEAD]["suggested_beta"])
    return min(BETAS, key=lambda beta: abs(beta - suggested))
