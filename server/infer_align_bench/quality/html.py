"""One HTML page with everything in it: readable offline, from a file, by mail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from infer_align_bench.quality.curve import Advice, Cost, Mean, Point
from infer_align_bench.quality.plots import plots

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } tr.front td { font-weight: 600; background: #f2f7ff }
.doubt { color: #777; font-weight: 400 } figure { margin: 1em 0 } svg { max-width: 100%; height: auto } code { font-size: 90% }
"""


def page(
    found: Sequence[Point],
    advised: Mapping[Cost, Sequence[Advice]],
    refused: Mapping[str, str],
    failed: Mapping[str, int],
    facts: Mapping[str, Any],
) -> str:
    """The report: what to use, the curves, every setting, what was refused, and what it was made with."""
    parts = [f"<h1>Which setting is worth it?</h1><p>{_verdict(advised['tokens'])}</p>", "<h2>What to use</h2>"]
    parts += [_advice(cost, given) for cost, given in advised.items()]
    parts += ["<h2>Quality against cost</h2>", f"<figure>{plots(found)}</figure>", "<h2>Every setting</h2>", _points(found)]
    parts += [
        "<p class=doubt>Gold: mean ± standard error over prompts. Differences are taken prompt by prompt. Equal budget: against "
        "the equal-budget family at the same tokens, linear in log tokens between neighbours; empty outside its range. KL at most: "
        "ln n - (n-1)/n nats for best-of-n; empty where no bound is known. Bold rows: nothing cheaper is better.</p>"
    ]
    if refused or failed:
        parts += ["<h2>Not measured</h2><table><tr><th>setting</th><th>why</th></tr>"]
        parts += [f"<tr><td>{escape(name)}</td><td>{escape(why)}</td></tr>" for name, why in refused.items()]
        parts += [f"<tr><td>{escape(name)}</td><td>{count} requests failed</td></tr>" for name, count in failed.items()]
        parts += ["</table>"]
    parts += ["<h2>Made with</h2><table>"]
    parts += [f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in facts.items()]
    body = "\n".join([*parts, "</table>"])
    head = f'<meta charset="utf-8"><title>Quality against cost</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _verdict(advised: Sequence[Advice]) -> str:
    if not advised:
        return "Nothing was measured on all settings yet."
    best = advised[-1]
    said = f"<b>{escape(best.name)}</b> reaches {_mean(best.gold)} for {best.cost:.3g} tokens an answer"
    said += f", and is the best of all settings in {best.chance:.0%} of resamples of the prompts."
    if best.cheaper:
        said += f" <b>{escape(best.cheaper)}</b> is cheaper and not measurably worse."
    return said


def _advice(cost: Cost, advised: Sequence[Advice]) -> str:
    heads = (f"{cost} an answer, from", "use", "gold", "best within the budget", "cheaper, not measurably worse")
    rows = [
        f"<tr><td>{one.cost:.3g}</td><td>{escape(one.name)}</td><td>{_mean(one.gold)}</td><td>{one.chance:.0%}</td>"
        f"<td>{escape(one.cheaper or '')}</td></tr>"
        for one in advised
    ]
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(rows)}</table>"


def _points(found: Sequence[Point]) -> str:
    heads = ("setting", "prompts", "tokens", "seconds", "KL at most", "gold", "- baseline", "- greedy", "- equal budget")
    rows = []
    for point in found:
        kl = "" if point.cell.kl_bound is None else f"{point.cell.kl_bound:.2f}"
        cells = [escape(point.cell.name), str(point.prompts), f"{point.tokens:.3g}", f"{point.seconds:.3g}", kl, _mean(point.gold)]
        cells += [_difference(mean) for mean in (point.minus_baseline, point.minus_greedy, point.minus_equal)]
        rows.append(f"<tr{' class=front' if point.front else ''}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(rows)}</table>"


def _mean(mean: Mean, sign: str = "") -> str:
    return f"{mean.value:{sign}.{mean.decimals}f} <span class=doubt>± {mean.error:.{mean.decimals}f}</span>"


def _difference(mean: Mean | None) -> str:
    return "" if mean is None else _mean(mean, "+")
