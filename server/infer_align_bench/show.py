"""A run in the terminal: 80 columns are enough."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

TITLES = {
    "ttft": "first token, ms",
    "tpot": "per token, ms",
    "itl": "chunk gap, ms",
    "e2e": "end to end, ms",
}
RATES = {
    "requests_per_second": "requests / s",
    "output_tokens_per_second": "returned tokens / s",
    "generated_tokens_per_second": "generated tokens / s",
}
RATIOS = {
    **RATES,
    "goodput": "goodput, requests / s",
    "returned_tokens": "returned tokens",
    "generated_tokens": "generated tokens",
}
LATE_MS = 10.0  # requests sent later than this say more of the client than of the endpoint


def show(report: Mapping[str, Any], out: Console) -> None:
    """The tables: each target, then A over B."""
    for name, found in report["targets"].items():
        where = f"{found['base_url']} {found['model']}" + (
            f" align={found['align']}" if found["align"] else ""
        )
        out.print(f"\n[bold]{name}[/] {escape(where)}", highlight=False)
        _requests(found, report, out)
        out.print(_latencies(found))
        out.print(_rates(found["rates"], RATES))
        for note in notes(found, report):
            out.print(f"[yellow]{escape(note)}[/]", highlight=False)
    if "ratios" in report:
        _ratios(report, out)


def _requests(found: Mapping[str, Any], report: Mapping[str, Any], out: Console) -> None:
    sent, tokens = found["requests"], found["tokens"]
    out.print(
        f"{sent['answered']} of {sent['sent']} requests answered in {found['seconds']:.1f} s",
        highlight=False,
    )
    for kind, error in found["errors"].items():
        out.print(
            f"[red]{error['count']} x {escape(kind)}[/]: {escape(error['first'])}", highlight=False
        )
    parts = [
        f"{tokens['prompt']} prompt",
        f"{tokens['spent']} generated",
        f"{tokens['returned']} returned",
    ]
    parts += [
        f"{count} {name.replace('_', ' ')}" for name, count in tokens["align"].items() if count
    ]
    out.print(f"[dim]tokens and calls:[/] {', '.join(parts)}", highlight=False)
    if goodput := found["goodput"]:
        goals = ", ".join(f"{name} <= {limit:g} ms" for name, limit in report["goodput_ms"].items())
        kept = (
            f"{cell(goodput['requests_per_second'])} requests / s, share {cell(goodput['share'])}"
        )
        out.print(f"goodput ({goals}): {kept}", highlight=False)


def _latencies(found: Mapping[str, Any]) -> Table:
    table = Table(
        "", "mean", "p50", "p90", "p99", box=None, header_style="dim", padding=(0, 1, 0, 0)
    )
    for name, title in TITLES.items():
        if figures := found["latency_ms"][name]:
            table.add_row(title, *(cell(figure) for figure in figures.values()))
    return table


def _rates(found: Mapping[str, Any], titles: Mapping[str, str]) -> Table:
    table = Table("", "", box=None, show_header=False, padding=(0, 1, 0, 0))
    for name, title in titles.items():
        if found.get(name):
            table.add_row(title, cell(found[name]))
    return table


def notes(found: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """What a reader should know before trusting the figures."""
    tokens, answered, said = found["tokens"], found["requests"]["answered"], []
    open_ended = [
        key
        for key, figure in found["latency_ms"]["e2e"].items()
        if figure["high"] is None and key != "mean"
    ]
    if open_ended:
        said.append(
            f"{' and '.join(open_ended)} may be higher than anything seen (?): a p99 needs 368 independent requests or more."
        )
    if tokens["counted_by"] != "usage" and answered:
        said.append(
            f"tokens counted by {tokens['counted_by']}: the endpoint does not send usage; a chunk may hold several tokens."
        )
    elif tokens["chunks"] and abs(tokens["tokens_per_chunk"] - 1) > 0.05:
        said.append(
            f"a chunk holds {tokens['tokens_per_chunk']:.2f} tokens on average: gaps between chunks are not gaps between tokens."
        )
    if not found["latency_ms"]["tpot"] and answered and found["stream"]:
        said.append(
            "answers came in one piece (a selection does): there is no time per output token."
        )
    if (
        found["align"]
        and found["align"].get("details") != "none"
        and not tokens["align"]
        and answered
    ):
        said.append("`align` was sent, but the answers carry none: this endpoint ignores it.")
    for name, count in ((found["goodput"] or {}).get("unmeasured") or {}).items():
        said.append(
            f"goodput: {count} answers have no {name} (they came in one piece): they count as missing that goal."
        )
    late = found["send_delay_ms"].get("p99", {}).get("value")
    if late is not None and late > LATE_MS:
        said.append(
            f"1% of the requests were sent {late:.0f} ms late or later: this client, or --max-in-flight, was the limit."
        )
    return said


def _ratios(report: Mapping[str, Any], out: Console) -> None:
    ratios, (ours, theirs) = report["ratios"], report["targets"]
    out.print(
        f"\n[bold]{ours} / {theirs}[/], {ratios['pairs']} pairs; times: below 1, {ours} is faster",
        highlight=False,
    )
    table = Table(
        "", "mean", "p50", "p90", "p99", box=None, header_style="dim", padding=(0, 1, 0, 0)
    )
    for name, title in TITLES.items():
        if ratios[name]:
            table.add_row(
                title.removesuffix(", ms"), *(cell(figure) for figure in ratios[name].values())
            )
    out.print(table)
    out.print(_rates(ratios, RATIOS))
    if ratios["dropped"]:
        lost = f"{ratios['dropped']} pairs are not in the ratios of times and tokens: one of the two was not answered."
        out.print(f"[yellow]{lost} Rates and goodput count them.[/]", highlight=False)


def cell(figure: Mapping[str, float | None] | None) -> str:
    """A figure and its interval, to the digits that its interval leaves a meaning; "?" for an end that is not known."""
    if figure is None or figure["value"] is None:
        return "-"
    ends = [figure[end] for end in ("low", "high")]
    known = [end for end in ends if end is not None]
    if not known:
        return number(figure["value"])
    wide = max(abs(end - figure["value"]) for end in known)
    low, high = ("?" if end is None else number(end, wide) for end in ends)
    return f"{number(figure['value'], wide)} [dim]{low}-{high}[/]"


def number(value: float, doubt: float = 0.0) -> str:
    """Three digits, or as many as a doubt of this size leaves: one of the doubt's own, two where that begins with 1."""
    if not math.isfinite(value):
        return "-"
    size = abs(value) or 1.0
    digits = (
        3
        if not doubt
        else min(4, max(2, 1 + math.floor(math.log10(size)) - math.floor(math.log10(doubt / 2))))
    )
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:.{places}f}"
