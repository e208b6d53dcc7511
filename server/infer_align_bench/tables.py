"""Print the report of a run in a terminal of at least 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
# Requests that are sent later than this measure the client more than the endpoint.
LATE_MS = 10.0
# A mean number of tokens per chunk that differs more from 1 is reported.
TOKENS_PER_CHUNK_TOLERANCE = 0.05


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables of each target, and the ratios of two targets."""
    for name, target in report["targets"].items():
        endpoint = f"{target['base_url']} {target['model']}"
        if target["align"]:
            endpoint += f" align={target['align']}"
        console.print(f"\n[bold]{name}[/] {escape(endpoint)}", highlight=False)
        _print_requests(target, report, console)
        console.print(_latency_table(target["latency_ms"], TITLES))
        console.print(_rate_table(target["rates"], RATES))
        for note in notes(target):
            console.print(f"[yellow]{escape(note)}[/]", highlight=False)
    if "ratios" in report:
        _print_ratios(report, console)


def _print_requests(target: Mapping[str, Any], report: Mapping[str, Any], console: Console) -> None:
    requests = target["requests"]
    console.print(
        f"{requests['answered']} of {requests['sent']} requests answered "
        f"in {target['seconds']:.1f} s",
        highlight=False,
    )
    for kind, error in target["errors"].items():
        line = f"[red]{error['count']} x {escape(kind)}[/]: {escape(error['first'])}"
        console.print(line, highlight=False)
    console.print(f"[dim]tokens and calls:[/] {_token_counts(target['tokens'])}", highlight=False)
    goodput = target["goodput"]
    if goodput:
        limits = report["goodput_ms"].items()
        goals = ", ".join(f"{name} <= {limit:g} ms" for name, limit in limits)
        rate = cell(goodput["requests_per_second"])
        line = f"goodput ({goals}): {rate} requests / s, share {cell(goodput['share'])}"
        console.print(line, highlight=False)


def _token_counts(tokens: Mapping[str, Any]) -> str:
    parts = [
        f"{tokens['prompt']} prompt",
        f"{tokens['spent']} generated",
        f"{tokens['returned']} returned",
    ]
    for name, count in tokens["align"].items():
        if count:
            parts.append(f"{count} {name.replace('_', ' ')}")
    return ", ".join(parts)


def _latency_table(latencies: Mapping[str, Any], titles: Mapping[str, str]) -> Table:
    columns = ("", "mean", "p50", "p90", "p99")
    table = Table(*columns, box=None, header_style="dim", padding=(0, 1, 0, 0))
    for name, title in titles.items():
        if latencies[name]:
            table.add_row(title, *(cell(estimate) for estimate in latencies[name].values()))
    return table


def _rate_table(rates: Mapping[str, Any], titles: Mapping[str, str]) -> Table:
    table = Table("", "", box=None, show_header=False, padding=(0, 1, 0, 0))
    for name, title in titles.items():
        if rates.get(name):
            table.add_row(title, cell(rates[name]))
    return table


def notes(target: Mapping[str, Any]) -> Iterator[str]:
    """Yield what limits the figures of one target."""
    latencies = target["latency_ms"]
    unknown_ends = []
    for name, estimate in latencies["e2e"].items():
        if estimate["high"] is None and name != "mean":
            unknown_ends.append(name)
    if unknown_ends:
        yield (
            f"{' and '.join(unknown_ends)}: the upper end is unknown (?), since larger values may "
            "exist than were measured: a p99 needs 368 independent requests or more."
        )
    if target["requests"]["answered"]:
        yield from _answer_notes(target)
    for name, count in ((target["goodput"] or {}).get("unmeasured") or {}).items():
        yield (
            f"goodput: {count} answers have no {name}, because they arrived in one chunk: "
            "they count as missing that goal."
        )
    delay = target["send_delay_ms"].get("p99", {}).get("value")
    if delay is not None and delay > LATE_MS:
        yield (
            f"1% of the requests were sent {delay:.0f} ms late or later: "
            "this client, or --max-in-flight, was the limit."
        )


def _answer_notes(target: Mapping[str, Any]) -> Iterator[str]:
    tokens = target["tokens"]
    per_chunk = tokens["tokens_per_chunk"]
    if tokens["counted_by"] != "usage":
        yield (
            f"tokens counted by {tokens['counted_by']}: the endpoint sends no usage, "
            "and a chunk may hold several tokens."
        )
    elif per_chunk is not None and abs(per_chunk - 1) > TOKENS_PER_CHUNK_TOLERANCE:
        yield (
            f"a chunk holds {per_chunk:.2f} tokens on average: "
            "gaps between chunks are not gaps between tokens."
        )
    if not target["latency_ms"]["tpot"] and target["stream"]:
        yield (
            "answers arrived in one chunk, as selected answers do: "
            "there is no time per output token."
        )
    align = target["align"]
    if align and align.get("details") != "none" and not tokens["align"]:
        yield ("`align` was sent, but the answers contain no `align`: this endpoint ignores it.")


def _print_ratios(report: Mapping[str, Any], console: Console) -> None:
    ratios = report["ratios"]
    first, second = report["targets"]
    console.print(
        f"\n[bold]{first} / {second}[/], {ratios['pairs']} pairs; "
        f"times: below 1, {first} is faster",
        highlight=False,
    )
    titles = {name: title.removesuffix(", ms") for name, title in TITLES.items()}
    console.print(_latency_table(ratios, titles))
    console.print(_rate_table(ratios, RATIOS))
    if ratios["dropped"]:
        line = (
            f"[yellow]{ratios['dropped']} pairs are not in the ratios of times and tokens, because "
            "one of the two requests was not answered. Rates and goodput include them.[/]"
        )
        console.print(line, highlight=False)


def cell(estimate: Mapping[str, float | None] | None) -> str:
    """Format an estimate with the digits that its interval supports; "?" is an unknown end."""
    if estimate is None or estimate["value"] is None:
        return "-"
    value = estimate["value"]
    ends = [estimate["low"], estimate["high"]]
    distances = [abs(end - value) for end in ends if end is not None]
    if not distances:
        return number(value)
    uncertainty = max(distances)
    low, high = ("?" if end is None else number(end, uncertainty) for end in ends)
    return f"{number(value, uncertainty)} [dim]{low}-{high}[/]"


def number(value: float, uncertainty: float = 0.0) -> str:
    """Format a number with three digits, or with the digits that its uncertainty supports.

    One digit of the uncertainty itself is printed, or two if it begins with 1.
    """
    if not math.isfinite(value):
        return "-"
    magnitude = math.floor(math.log10(abs(value) or 1.0))
    digits = 3
    if uncertainty:
        digits = min(4, max(2, 1 + magnitude - math.floor(math.log10(uncertainty / 2))))
    decimals = max(0, digits - 1 - magnitude)
    return f"{value:.{decimals}f}"
