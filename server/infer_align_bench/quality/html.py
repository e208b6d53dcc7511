"""One HTML page with everything in it: readable offline, from a file, by mail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from infer_align_bench.quality.advice import Advice, Headline
from infer_align_bench.quality.curve import Cost, Mean, Point
from infer_align_bench.quality.plots import numbered, plots
from infer_align_bench.show import number

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd }
td.name, th.name { text-align: left } tr.front td { font-weight: 600; background: #f2f7ff } div { overflow-x: auto }
.doubt { color: #777; font-weight: 400 } figure { margin: 1em 0 } svg { max-width: 100%; height: auto } code { font-size: 90% }
"""
LEGEND = """Tokens: all that an answer costs, which are its prompt's, what was generated for it, and what rewards and the judge
read and wrote, one for one; generated: completion tokens alone. Gold, tokens, seconds: mean ± standard error over prompts.
Differences are taken prompt by prompt. Equal budget: against the equal-budget family at the same tokens, linear in log tokens
between neighbours; empty outside its range. KL at most: ln n - (n-1)/n nats for best-of-n; empty where no bound is known. Bold
rows: nothing cheaper is better. Numbers are those of the plots."""
BUDGET = (
    "use",
    "gold",
    "best in budget",
    "chosen by one half: on the other",
    "cheaper, not told apart",
)
COLUMNS = (
    "prompts",
    "tokens",
    "generated",
    "seconds",
    "KL at most",
    "gold",
    "- baseline",
    "- greedy",
    "- equal budget",
)
MEANING = "Gold is the scorer's mean over prompts ± its standard error, higher is better; tokens are all that one answer costs."


def page(
    found: Sequence[Point],
    advised: Mapping[Cost, Sequence[Advice]],
    first: Headline | None,
    unmeasured: Mapping[str, str],
    facts: Mapping[str, Any],
) -> str:
    """The report: what to use, the curves, every setting, what was not measured and why, and what it was made with."""
    said = "".join(
        f"<p>{line}</p>" for line in _headline(first, str(facts["baseline"]), advised["tokens"])
    )
    parts = [f"<h1>Which setting is worth it?</h1>{said}", "<h2>What to use for a budget</h2>"]
    parts += [_advice(cost, given) for cost, given in advised.items() if given]
    parts += [
        "<h2>Quality against cost</h2>",
        f"<figure>{plots(found)}</figure>",
        "<h2>Every setting</h2>",
        _points(found),
    ]
    parts += [f"<p class=doubt>{LEGEND}</p>"]
    if unmeasured:
        parts += ["<h2>Not measured, or not everywhere</h2>"]
        parts += [
            _table(
                ("setting", "why"),
                [(escape(name), escape(why)) for name, why in unmeasured.items()],
            )
        ]
    parts += [
        "<h2>Made with</h2>",
        _table(("", ""), [(escape(name), escape(str(value))) for name, value in facts.items()]),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    head += f"<title>Quality against cost</title><style>{STYLE}</style>"
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
    )


def _headline(first: Headline | None, baseline: str, advised: Sequence[Advice]) -> list[str]:
    if first is None:
        return [
            "No two settings can be compared: none was scored at every prompt, or the endpoint counts no tokens; see below."
        ]
    best, default, cheap = first.best, first.default, first.cheap
    lines = []
    if default is not best:
        lines.append(
            f"By default: {_said(default)}, the cheapest with nine tenths of the best gain over {escape(baseline)}."
        )
    else:
        lines.append(
            f"By default: {_said(default)}; nothing cheaper has nine tenths of its gain over {escape(baseline)}."
        )
    if cheap is not None:
        gain = _mean(cheap.minus_baseline)
        lines.append(
            f"Cheap: {_said(cheap)}, the cheapest that is measurably better than {escape(baseline)}, by {gain}."
        )
    else:
        lines.append(
            f"Cheap: nothing is measurably better than {escape(baseline)} on these prompts."
        )
    sure = next((one for one in advised if one.name == best.cell.name), None)
    doubt = ""
    if sure is not None:
        doubt = f"; it is the best of all in {sure.chance:.0%} of resamples of the prompts"
        if math.isfinite(sure.held_out):
            doubt += f", and choosing by half of the prompts reaches {sure.held_out:.2f} on the other half"
    lines.append(f"Best: {_said(best)}, the highest gold of all{doubt}.")
    lines.append(MEANING)
    return lines


def _said(point: Point) -> str:
    return f"<b>{escape(point.cell.name)}</b> reaches {_mean(point.gold)} for {number(point.cost('tokens'))} tokens an answer"


def _advice(cost: Cost, advised: Sequence[Advice]) -> str:
    rows = []
    for one in advised:
        cheap = ""
        if one.cheaper:
            cheap = f"{escape(one.cheaper.name)}: {_mean(one.cheaper.loss)} less, {one.cheaper.most:.2g} at most (97.5%)"
        rows.append(
            (
                number(one.cost),
                escape(one.name),
                _mean(one.gold),
                f"{one.chance:.0%}",
                f"{one.held_out:.2f}",
                cheap,
            ),
        )
    return _table((f"{cost} an answer, from", *BUDGET), rows)


def _points(found: Sequence[Point]) -> str:
    rows, fronts = [], []
    for place, point in numbered(found):
        kl = "" if point.kl_bound is None else f"{point.kl_bound:.2f}"
        costs = [_mean(mean) for mean in (point.tokens, point.generated, point.seconds)]
        differences = [
            _mean(mean, "+")
            for mean in (point.minus_baseline, point.minus_greedy, point.minus_equal)
        ]
        rows.append(
            (
                str(place),
                escape(point.cell.name),
                str(point.prompts),
                *costs,
                kl,
                _mean(point.gold),
                *differences,
            )
        )
        fronts.append(point.front)
    return _table(("", "setting", *COLUMNS), rows, fronts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = ()) -> str:
    names = {
        i
        for i, head in enumerate(heads)
        if head in {"setting", "use", "why", "cheaper, not told apart", ""}
    }

    def row(cells: Sequence[str], tag: str, *, front: bool = False) -> str:
        inner = "".join(
            f"<{tag}{' class=name' if i in names else ''}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr{' class=front' if front else ''}>{inner}</tr>"

    body = "".join(
        row(cells, "td", front=bool(marked) and marked[i]) for i, cells in enumerate(rows)
    )
    return f"<div><table>{row(heads, 'th') if any(heads) else ''}{body}</table></div>"


def _mean(mean: Mean | None, sign: str = "") -> str:
    if mean is None or not math.isfinite(mean.value):
        return ""
    return f"{mean.value:{sign}.{mean.decimals}f} <span class=doubt>± {mean.error:.{mean.decimals}f}</span>"
