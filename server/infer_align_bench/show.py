"""A run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

TITLES = {
    "ttft": "time to first token, ms",
    "tpot": "time per output token, ms",
    "itl": "gap between chunks, ms",
    "e2e": "end to end, ms",
}
RATES = {
    "requests_per_second": "requests / s",
    "output_tokens_per_second": "returned tokens / s",
    "generated_tokens_per_second": "generated tokens / s",
}
FEW = 100  # requests under which a p99 is about the largest value seen
LATE_MS = 10.0  # requests sent later than this say more of the client than of the endpoint


def show(report: Mapping[str, Any], out: Console) -> None:
    """The tables: each target, then A over B."""
    for name, found in report["targets"].items():
        where = f"{found['base_url']} {found['model']}" + (f" align={found['align']}" if found["align"] else "")
        out.print(f"\n[bold]{name}[/] {escape(where)}", highlight=False)
        _requests(found, report, out)
        _latencies(found, out)
        for note in notes(found, report):
            out.print(f"[yellow]{escape(note)}[/]", highlight=False)
    if "ratios" in report:
        _ratios(report, out)


def _requests(found: Mapping[str, Any], report: Mapping[str, Any], out: Console) -> None:
    sent, tokens = found["requests"], found["tokens"]
    out.print(f"{sent['answered']} of {sent['sent']} requests answered in {report['seconds']:.1f} s", highlight=False)
    for kind, error in found["errors"].items():
        out.print(f"[red]{error['count']} x {escape(kind)}[/]: {escape(error['first'])}", highlight=False)
    parts = [f"{tokens['prompt']} prompt", f"{tokens['spent']} generated", f"{tokens['returned']} returned"]
    parts += [f"{count} {name.replace('_', ' ')}" for name, count in tokens["align"].items() if count]
    out.print(f"[dim]tokens and calls:[/] {', '.join(parts)}", highlight=False)
    if goodput := found["goodput"]:
        goals = ", ".join(f"{name} <= {limit:g} ms" for name, limit in report["goodput_ms"].items())
        out.print(f"goodput ({goals}): {_cell(goodput['requests_per_second'])} requests / s, share {_cell(goodput['share'])}")


def _latencies(found: Mapping[str, Any], out: Console) -> None:
    table = Table("", "mean", "p50", "p90", "p99", box=None, header_style="dim")
    for name, title in TITLES.items():
        if figures := found["latency_ms"][name]:
            table.add_row(title, *(_cell(figure) for figure in figures.values()))
    for name, title in RATES.items():
        table.add_row(title, _cell(found["rates"][name]), "", "", "")
    out.print(table)


def notes(found: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """What a reader should know before trusting the figures."""
    tokens, said = found["tokens"], []
    if 0 < found["requests"]["answered"] < FEW:
        said.append(f"p99 of {found['requests']['answered']} requests is about the slowest of them; take 500 or more.")
    if tokens["counted_by"] != "usage" and found["requests"]["answered"]:
        said.append(f"tokens counted by {tokens['counted_by']}: the endpoint does not send usage; a chunk may hold several tokens.")
    elif tokens["chunks"] and abs(tokens["tokens_per_chunk"] - 1) > 0.05:
        said.append(
            f"a chunk holds {tokens['tokens_per_chunk']:.2f} tokens on average: gaps between chunks are not gaps between tokens."
        )
    if not found["latency_ms"]["tpot"] and found["requests"]["answered"] and found["stream"]:
        said.append("answers came in one piece (a selection does): there is no time per output token.")
    if found["align"] and found["align"].get("details") != "none" and not tokens["align"] and found["requests"]["answered"]:
        said.append("`align` was sent, but the answers carry none: this endpoint ignores it.")
    late = found["send_delay_ms"].get("p99", {}).get("value")
    if late is not None and late > LATE_MS:
        said.append(f"1% of the requests were sent {late:.0f} ms late or later: this client, or --max-in-flight, was the limit.")
    return said


def _ratios(report: Mapping[str, Any], out: Console) -> None:
    ratios = report["ratios"]
    names = list(report["targets"])
    table = Table("", "mean", "p50", "p90", "p99", box=None, header_style="dim")
    for name, title in TITLES.items():
        if ratios[name]:
            table.add_row(title.removesuffix(", ms"), *(_cell(figure) for figure in ratios[name].values()))
    out.print(f"\n[bold]{names[0]} / {names[1]}[/], {ratios['pairs']} pairs; below 1 is faster", highlight=False)
    out.print(table)


def _cell(figure: Mapping[str, float | None] | None) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    interval = "" if figure["low"] is None else f" [dim]({_number(figure['low'])} - {_number(figure['high'])})[/]"
    return _number(figure["value"]) + interval


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
