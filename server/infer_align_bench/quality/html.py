"""Write a quality report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from infer_align_bench.page import document, table
from infer_align_bench.quality.advice import Advice, Headline
from infer_align_bench.quality.answers import Answers, answers_table
from infer_align_bench.quality.curve import Cost, Mean, Point
from infer_align_bench.quality.plots import draw_plots, numbered
from infer_align_bench.tables import number

STYLE = """
p.warning { border: 2px solid #b00; background: #fff0f0; padding: .5em 1em }
table.answers td { vertical-align: top; text-align: left; white-space: pre-wrap; min-width: 15em }
"""
LEGEND = """Tokens: everything that an answer costs: the tokens of its prompt, the generated tokens,
and the tokens that rewards and the judge read and wrote. Generated: completion tokens alone. Gold,
tokens and seconds are means ± standard error over prompts. Differences are computed prompt by
prompt. Equal budget: difference to the equal-budget family at the same tokens, interpolated
linearly in log tokens between its neighbours; empty outside the range of the family. KL: distance
of the answers from the frozen model, in nats per answer. For best-of-n it is at most
ln n - (n-1)/n. For one steered answer it is estimated by the log ratio of the answer's tokens under
the steered and the frozen model, before temperature, where the engine reports both. Otherwise it is
empty. Bold rows: nothing cheaper is better. The numbers of the rows are those in the plots."""
MEANING = (
    "Gold is the mean of the scorer over prompts ± its standard error; higher is better. "
    "Tokens are everything that one answer costs."
)
NOT_COMPARABLE = (
    "No two settings can be compared: no setting has a score for every prompt, "
    "or the endpoint counts no tokens; see below."
)
ADVICE_COLUMNS = (
    "use",
    "gold",
    "best in budget",
    "gold on held-out prompts (chosen on the other half)",
    "cheaper, not distinguishable",
)
POINT_COLUMNS = (
    "",
    "setting",
    "prompts",
    "tokens",
    "generated",
    "seconds",
    "KL, nats",
    "gold",
    "- baseline",
    "- greedy",
    "- equal budget",
)
# Columns of text, which are aligned to the left.
TEXT_COLUMNS = {"", "setting", "use", "why", "cheaper, not distinguishable"}


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that a report shows."""

    points: Sequence[Point]
    advice: Mapping[Cost, Sequence[Advice]]
    headline: Headline | None
    # Reasons for missing figures, by setting.
    unmeasured: Mapping[str, str]
    # How the report was made.
    facts: Mapping[str, Any]
    answers: Answers
    # What a reader must know before the recommendations.
    warnings: Sequence[str]


def render_page(results: Results) -> str:
    """Return the HTML page of a report."""
    return document("Quality against cost", _sections(results), STYLE)


def _sections(results: Results) -> Iterator[str]:
    yield "<h1>Which setting is worth it?</h1>"
    for warning in results.warnings:
        yield f"<p class=warning>{escape(warning)}</p>"
    baseline = escape(str(results.facts["baseline"]))
    if results.headline is None:
        yield f"<p>{NOT_COMPARABLE}</p>"
    else:
        for line in _headline(results.headline, baseline, results.advice["tokens"]):
            yield f"<p>{line}</p>"
    yield "<h2>What to use for a budget</h2>"
    for cost, choices in results.advice.items():
        if choices:
            yield _advice_table(cost, choices)
    yield "<h2>Quality against cost</h2>"
    yield f"<figure>{draw_plots(results.points)}</figure>"
    yield "<h2>Every setting</h2>"
    yield _point_table(results.points)
    yield f"<p class=note>{LEGEND}</p>"
    yield "<h2>Answers side by side</h2>"
    yield answers_table(results.answers)
    if results.unmeasured:
        yield "<h2>Not measured, or not everywhere</h2>"
        yield _text_table(("setting", "why"), results.unmeasured)
    yield "<h2>Made with</h2>"
    yield _text_table(("", ""), results.facts)


def _headline(headline: Headline, baseline: str, advice: Sequence[Advice]) -> Iterator[str]:
    """Yield the paragraphs that name the default, the cheap and the best setting."""
    default = _reached(headline.default)
    if headline.default is headline.best:
        yield (
            f"By default: {default}; nothing cheaper has nine tenths of its gain over {baseline}."
        )
    else:
        yield (
            f"By default: {default}, the cheapest with nine tenths of the best gain over "
            f"{baseline}."
        )
    cheap = headline.cheap
    if cheap is None:
        yield f"Cheap: nothing is measurably better than {baseline} on these prompts."
    else:
        yield (
            f"Cheap: {_reached(cheap)}, the cheapest that is measurably better than {baseline}, "
            f"by {_mean(cheap.minus_baseline)}."
        )
    best = headline.best
    yield f"Best: {_reached(best)}, the highest gold of all{_certainty(best, advice)}."
    yield MEANING


def _reached(point: Point) -> str:
    tokens = number(point.cost("tokens"))
    name = escape(point.cell.name)
    return f"<b>{name}</b> reaches {_mean(point.gold)} for {tokens} tokens an answer"


def _certainty(best: Point, advice: Sequence[Advice]) -> str:
    """Return the part of a sentence that says how certain the choice of the best setting is."""
    for choice in advice:
        if choice.name == best.cell.name:
            text = f"; it is the best of all in {choice.chance:.0%} of resamples of the prompts"
            if math.isfinite(choice.held_out):
                text += (
                    ", and choosing by half of the prompts reaches "
                    f"{choice.held_out:.2f} on the other half"
                )
            return text
    return ""


def _advice_table(cost: Cost, choices: Sequence[Advice]) -> str:
    rows = []
    for choice in choices:
        cheaper = ""
        if choice.cheaper:
            loss = _mean(choice.cheaper.loss)
            bound = f"{choice.cheaper.max_loss:.2g} at most (97.5%)"
            cheaper = f"{escape(choice.cheaper.name)}: {loss} less, {bound}"
        row = (
            number(choice.cost),
            escape(choice.name),
            _mean(choice.gold),
            f"{choice.chance:.0%}",
            f"{choice.held_out:.2f}",
            cheaper,
        )
        rows.append(row)
    return table((f"{cost} an answer, from", *ADVICE_COLUMNS), rows, TEXT_COLUMNS)


def _point_table(points: Sequence[Point]) -> str:
    rows = []
    front_rows = set()
    for i, (place, point) in enumerate(numbered(points)):
        row = (
            str(place),
            escape(point.cell.name),
            str(point.prompts),
            _mean(point.tokens),
            _mean(point.generated),
            _mean(point.seconds),
            _kl(point),
            _mean(point.gold),
            _mean(point.minus_baseline, "+"),
            _mean(point.minus_greedy, "+"),
            _mean(point.minus_equal, "+"),
        )
        rows.append(row)
        if point.front:
            front_rows.add(i)
    return table(POINT_COLUMNS, rows, TEXT_COLUMNS, front_rows)


def _kl(point: Point) -> str:
    if point.kl_bound:
        return f"&le; {point.kl_bound:.2f}"
    return "0" if point.kl_bound == 0 else _mean(point.kl)


def _text_table(columns: Sequence[str], texts: Mapping[str, Any]) -> str:
    rows = [(escape(name), escape(str(value))) for name, value in texts.items()]
    return table(columns, rows, TEXT_COLUMNS)


def _mean(mean: Mean | None, sign: str = "") -> str:
    """Format a mean and its standard error; `sign` is "+" to print the sign of the mean."""
    if mean is None or not math.isfinite(mean.value):
        return ""
    error = f"<span class=note>± {mean.error:.{mean.decimals}f}</span>"
    return f"{mean.value:{sign}.{mean.decimals}f} {error}"
