"""Which form of VAS keeps real text whole? The forms at equal KL on SmolLM2-135M-Instruct.

A fitted head steers the model in several forms: the published top 20, all tokens, the likely ones
(min_p), and top 20 with a limit on the divergence of each step (max_kl). For each form and target
KL per answer, beta is searched on the first prompts; the answers to the other prompts are measured.
So forms are compared at about the same distance from the frozen model, on prompts that no search
has seen. With --beta there is no search: each form has these betas, and the plot shows its curve of
effect over KL. Best-of-n by the same measure stands beside them: it knows the measure exactly.

Several values can be compared, each a head (a file) or a lookahead value (a folder, of which
another forward pass reads each candidate token). Each row has the tokens per second of its draws.

    python benchmarks/alignment/vas_real.py --value cheerful=cheerful.safetensors \
        --pools answer_pools.jsonl.xz [--beta 128,256,512]
    python benchmarks/alignment/vas_real.py --trait cheerful --value head=cheerful.safetensors \
        --value lookahead=cheerful-lm --forms "top_k 20; top_k 5" --pools answer_pools.jsonl.xz
"""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from rich.table import Table

from benchmarks.alignment.flow import Flow, serving, texts
from benchmarks.alignment.guidance_real import distinct_pairs, frozen_logprobs
from benchmarks.alignment.real import MEASURES, test_prompts
from benchmarks.alignment.report import OUT, argument_parser, difference, mean_se, row_figure
from benchmarks.alignment.vas_forms import distances
from benchmarks.record import RESULTS, record
from infer_align.flow.response import Response
from infer_align.methods.best_of_n import expected_best, kl_upper_bound
from infer_align.quickstart import CONFIG
from infer_align.types import Array

FORMS: dict[str, dict[str, Any]] = {
    "top_k 20": {"top_k": 20},
    "top_k 5": {"top_k": 5},
    "all": {"top_k": "all"},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 20, max_kl 0.1": {"top_k": 20, "max_kl": 0.1},
    "top_k 20, max_kl 0.3": {"top_k": 20, "max_kl": 0.3},
}
# A lookahead value reads each candidate, so it is tried with few of them too.
DEFAULT_FORMS = [form for form in FORMS if form != "top_k 5"]
# The search of beta: its first step, its factor, and its largest number of steps per target.
FIRST_BETA = 4.0
FACTOR = 2.0
LARGEST_BETA = 1000.0
BISECTIONS = 3
BEST_OF = (2, 4)
GUARDS = ("kl", "tokens", "logprob_per_token", "distinct_pairs", "tokens_per_s")


@dataclass(frozen=True, slots=True)
class Way:
    """A value and a form of steering by it."""

    value: str
    form: str
    name: str  # of its rows


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting of the comparison."""

    name: str
    target: float
    beta: float


@dataclass(frozen=True, slots=True)
class Draws:
    """The answers to all prompts, and the seconds they took."""

    responses: list[Response]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Return the generated tokens per second of all prompts together."""
        tokens = 0
        for response in self.responses:
            tokens += sum(each.completion_tokens for each in response.candidates)
        return tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Setup:
    """What all cells share.

    Attributes:
        trait: the measure.
        ways: the values and forms to compare.
        seed: of all draws.
        max_tokens: of an answer.
        draws: per prompt.
        betas: of each value; empty to search a beta for each target.
        levels: target divergences of the search, in nats per answer.
        record: name of the record and its plot.
    """

    trait: str
    ways: tuple[Way, ...]
    seed: int
    max_tokens: int
    draws: int
    betas: Mapping[str, tuple[float, ...]]
    levels: tuple[float, ...]
    record: str


class Search:
    """Searches the beta of one form for a divergence, on prompts of its own."""

    def __init__(self, flow: Flow, setup: Setup, prompts: Sequence[str], way: Way) -> None:
        self._flow = flow
        self._setup = setup
        self._prompts = prompts
        self._way = way
        self._known: dict[float, float] = {0.0: 0.0}

    async def beta(self, target: float) -> float:
        """Return the beta whose divergence is nearest to the target, on a log scale."""
        high = FIRST_BETA
        while await self._kl(high) < target and high < LARGEST_BETA:
            high = min(LARGEST_BETA, high * FACTOR)
        low = high / FACTOR
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            if await self._kl(middle) < target:
                low = middle
            else:
                high = middle
        tried = [beta for beta in self._known if beta]
        return min(tried, key=lambda beta: abs(math.log(max(self._known[beta], 1e-3) / target)))

    async def _kl(self, beta: float) -> float:
        if beta not in self._known:
            draws = await steered(self._flow, self._setup, self._prompts, self._way, beta)
            self._known[beta] = float(distances(draws.responses).mean())
            OUT.print(f"  {self._way.name}, beta {beta:.3g}: {self._known[beta]:.2f} nats")
        return self._known[beta]


async def steered(flow: Flow, setup: Setup, prompts: Sequence[str], way: Way, beta: float) -> Draws:
    """Answer all prompts with one form of steering."""
    align = {"rewards": {}, "vas": {"beta": {way.value: beta}, **FORMS[way.form]}}
    return await draw(flow, setup, prompts, align)


async def draw(
    flow: Flow, setup: Setup, prompts: Sequence[str], align: Mapping[str, Any], **body: Any
) -> Draws:
    """Answer all prompts, with the log-probability of each token."""
    fields = {"max_tokens": setup.max_tokens, "logprobs": True, "n": setup.draws, **body}
    started = monotonic()
    responses = await flow.ask_all(prompts, setup.seed, align, **fields)
    return Draws(responses, monotonic() - started)


async def measures_of(
    flow: Flow, setup: Setup, prompts: Sequence[str], draws: Draws
) -> dict[str, Array]:
    """Return the measure and the guards of each prompt, as means over its draws: [P] each."""
    responses = draws.responses
    answers = texts(responses)
    gold: list[float] = []
    tokens: list[float] = []
    logprobs: list[float] = []
    distinct: list[float] = []
    for prompt, response, drawn in zip(prompts, responses, answers, strict=True):
        gold.append(float(np.mean([MEASURES[setup.trait](text) for text in drawn])))
        tokens.append(float(np.mean([each.completion_tokens for each in response.candidates])))
        read = await frozen_logprobs(flow, [prompt] * len(drawn), drawn)
        logprobs.append(float(np.nanmean(read)))
        distinct.append(float(np.nanmean([distinct_pairs(text) for text in drawn])))
    return {
        "gold": np.array(gold),
        "kl": distances(responses),
        "tokens": np.array(tokens),
        "logprob_per_token": np.array(logprobs),
        "distinct_pairs": np.array(distinct),
    }


def row_of(
    trial: Trial, measures: Mapping[str, Array], plain: Mapping[str, Array], draws: Draws
) -> dict[str, Any]:
    """Return the recorded row of a setting, with its paired difference to plain draws."""
    row: dict[str, Any] = {"form": trial.name, "target": trial.target, "beta": trial.beta}
    for name, values in measures.items():
        row[name], row[f"{name}_se"] = mean_se(values)
    row["effect"], row["effect_se"] = mean_se(measures["gold"] - plain["gold"])
    row["tokens_per_s"] = draws.tokens_per_second
    row["text"] = texts(draws.responses)[0][0]
    return row


def best_of_rows(setup: Setup, draws: Draws) -> list[dict[str, Any]]:
    """Return the rows of best-of-n by the measure itself, from plain draws."""
    answers = texts(draws.responses)
    scores = [[MEASURES[setup.trait](text) for text in drawn] for drawn in answers]
    plain = np.array([np.mean(each) for each in scores])
    rows: list[dict[str, Any]] = []
    for n in BEST_OF:
        if n > len(scores[0]):
            continue
        best = np.array([expected_best(each, each, n) for each in scores])
        row: dict[str, Any] = {"form": f"best of {n} by the measure", "kl": kl_upper_bound(n)}
        row["gold"], row["gold_se"] = mean_se(best)
        row["effect"], row["effect_se"] = mean_se(best - plain)
        rows.append(row)
    return rows


async def compare(
    flow: Flow, setup: Setup, searched: Sequence[str], prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the rows of the frozen model, best-of-n and each form at each target."""
    many = await draw(flow, setup, prompts, {"rewards": {}}, n=max(setup.draws, *BEST_OF))
    plain = await measures_of(flow, setup, prompts, many)
    greedy = await draw(flow, setup, prompts, {"rewards": {}}, n=1, temperature=0)
    rows = [row_of(Trial("frozen", 0.0, 0.0), plain, plain, many)]
    of_greedy = await measures_of(flow, setup, prompts, greedy)
    rows.append(row_of(Trial("greedy", 0.0, 0.0), of_greedy, plain, greedy))
    rows += best_of_rows(setup, many)
    for way in setup.ways:
        for trial in await trials_of(flow, setup, searched, way):
            draws = await steered(flow, setup, prompts, way, trial.beta)
            measures = await measures_of(flow, setup, prompts, draws)
            rows.append(row_of(trial, measures, plain, draws))
            OUT.print(f"{way.name}, beta {trial.beta:.3g}: measured", highlight=False)
            # A long run that is stopped keeps what it has measured.
            save(setup, rows, len(searched), len(prompts))
    return rows


async def trials_of(flow: Flow, setup: Setup, searched: Sequence[str], way: Way) -> list[Trial]:
    """Return the settings of one form: the betas of the setup, or one per reachable target."""
    if setup.betas:
        return [Trial(way.name, 0.0, beta) for beta in setup.betas[way.value]]
    search = Search(flow, setup, searched, way)
    reachable = FORMS[way.form].get("max_kl", math.inf) * setup.max_tokens
    trials: list[Trial] = []
    for target in setup.levels:
        if target <= reachable:
            trials.append(Trial(way.name, target, await search.beta(target)))
    return trials


def show(setup: Setup, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table. An effect in bold is more than two standard errors from zero."""
    title = f"More {setup.trait!r}, ± s.e. over prompts"
    table = Table("form", "target", "beta", setup.trait, "effect", *GUARDS, title=title)
    for row in rows:
        numbers = [f"{row[name]:.3g}" if row.get(name) else "" for name in ("target", "beta")]
        guards = [f"{row[name]:.2f}" if name in row else "" for name in GUARDS]
        effect = difference(row["effect"], row["effect_se"])
        table.add_row(row["form"], *numbers, row_figure(row, "gold"), effect, *guards)
    OUT.print(table)


def save(setup: Setup, rows: list[dict[str, Any]], searched: int, count: int) -> None:
    """Record and plot the rows so far."""
    facts = {
        "trait": setup.trait,
        "prompts": count,
        "prompts_of_the_search": searched,
        "draws": setup.draws,
        "max_tokens": setup.max_tokens,
        "temperature": 1.0,
    }
    baseline = "plain draws on the same prompts; best-of-n by the measure itself"
    record(setup.record, baseline=baseline, seed=setup.seed, rows=rows, setup=facts)
    plot(setup, rows)


def plot(setup: Setup, rows: Sequence[Mapping[str, Any]]) -> None:
    """Plot the measure against KL, and against the log-probability under the frozen model."""
    mpl.use("Agg")
    figure, (by_kl, by_guard) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for form in dict.fromkeys(row["form"] for row in rows):
        curve = [row for row in rows if row["form"] == form]
        for axis, name in ((by_kl, "kl"), (by_guard, "logprob_per_token")):
            points = [row for row in curve if name in row]
            xs = [row[name] for row in points]
            errors = [row["gold_se"] for row in points]
            axis.errorbar(xs, [row["gold"] for row in points], errors, marker="o", label=form)
    by_kl.set(xlabel="KL from the frozen model, nats per answer", ylabel=setup.trait)
    by_guard.set(xlabel="log p per token under the frozen model", ylabel=setup.trait)
    by_kl.legend(fontsize=7)
    figure.savefig(RESULTS / f"{setup.record}.png", dpi=100)
    plt.close(figure)


def ways_of(values: Mapping[str, str], forms: Sequence[str]) -> tuple[Way, ...]:
    """Return each value with each form that its kind allows."""
    ways: list[Way] = []
    for value, path in values.items():
        for form in forms:
            reads_all = FORMS[form].get("top_k") == "all" or "min_p" in FORMS[form]
            # A lookahead value reads each candidate, so it needs a number of them.
            if not (reads_all and is_lookahead(path)):
                name = form if len(values) == 1 else f"{value}, {form}"
                ways.append(Way(value, form, name))
    return tuple(ways)


def is_lookahead(path: str) -> bool:
    """Return True for the folder of a lookahead value, False for the file of a head."""
    return Path(path).is_dir()


def betas_of(texts: Sequence[str], values: Collection[str]) -> dict[str, tuple[float, ...]]:
    """Read the betas of each value: "BETA,..." for all of them, or "NAME=BETA,..." for one."""
    betas: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, _, numbers = text.rpartition("=")
        if name and name not in values:
            raise SystemExit(f"--beta: {name!r} is not allowed; must be one of {[*values]}")
        for value in [name] if name else values:
            betas[value] = _numbers(numbers)
    missing = set(values) - betas.keys() if betas else set()
    if missing:
        raise SystemExit(f"--beta: there is none for {', '.join(sorted(missing))}")
    return betas


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(each) for each in text.split(",") if each)


async def run(options: argparse.Namespace) -> None:
    """Measure, print, record and plot."""
    OUT.print(__doc__, highlight=False)
    values: dict[str, str] = {}
    for text in options.value:
        name, _, path = text.partition("=")
        if not name or not path:
            raise SystemExit(f"--value: {text!r} is not allowed; must be NAME=FILE or NAME=FOLDER")
        values[name] = path
    trait = options.trait or next(iter(values))
    if trait not in MEASURES:
        raise SystemExit(f"--trait: {trait!r} is not allowed; must be one of {[*MEASURES]}")
    name_of_record = options.record or f"vas_real_{trait}"
    forms = [form.strip() for form in options.forms.split(";")]
    for form in forms:
        if form not in FORMS:
            raise SystemExit(f"--forms: {form!r} is not allowed; must be one of {[*FORMS]}")
    betas = betas_of(options.beta, values)
    # Without a search, no prompts are kept for it.
    search = 0 if betas else options.search
    count = search + options.prompts
    questions = test_prompts(options.pools, options.exclude, count)
    ways = ways_of(values, forms)
    numbers = (options.seed, options.max_tokens, options.draws)
    setup = Setup(trait, ways, *numbers, betas, _numbers(options.levels), name_of_record)
    settings = ["engine.threads=1", "server.default_rewards={}"]
    for name, path in values.items():
        kind = "lookahead" if is_lookahead(path) else "head"
        settings.append(f'values.{name}={{kind="{kind}",path="{path}"}}')
    started = monotonic()
    async with serving(CONFIG, settings) as flow:
        searched, measured = questions[:search], questions[search:]
        rows = await compare(flow, setup, searched, measured)
    show(setup, rows)
    OUT.print(f"{monotonic() - started:.0f} s")


def main() -> None:
    """Run from the command line."""
    parser = argument_parser(__doc__, prompts=48)
    parser.add_argument("--trait", help="the measure; default: the name of the first value")
    parser.add_argument(
        "--value",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="a fitted head, or the folder of a lookahead value; may be repeated",
    )
    parser.add_argument("--forms", default=";".join(DEFAULT_FORMS), help="of steering, by ;")
    parser.add_argument("--levels", default="1,3,10", help="KL of the search, in nats per answer")
    parser.add_argument("--record", help="name of the record; default: vas_real_TRAIT")
    parser.add_argument("--pools", type=Path, help="answer pools of AlpacaEval, JSONL in xz")
    parser.add_argument("--exclude", type=Path, help="JSONL file of the prompts of the fit")
    parser.add_argument("--search", type=int, default=16, help="prompts of the search of beta")
    parser.add_argument(
        "--beta",
        action="append",
        default=[],
        metavar="[NAME=]BETA,...",
        help="betas in place of a search, of all values or of one; may be repeated",
    )
    parser.add_argument("--draws", type=int, default=2, help="draws per prompt")
    parser.add_argument("--max-tokens", type=int, default=40)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
