"""Fill the tables in README.md and docs/*.md from the code; with --check, only say whether they are up to date.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of TABLES.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infer_align import config, registry
from infer_align.objectives import Ensemble
from infer_align.types import Budget

ROOT = Path(__file__).parent.parent
MARKER = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def methods() -> str:
    """Each key of `align` that a method or the selection reads, with its parameters."""
    found = {name: registry.methods.get(name) for name in registry.methods.names()}
    return _parameters({**found, "ensemble": Ensemble, "budget": Budget}, "key")


def rewards() -> str:
    """Each kind of reward, with the fields of its section."""
    return _parameters({name: registry.rewards.get(name) for name in registry.rewards.names()}, "kind")


def engines() -> str:
    """Each kind of engine, with the fields of its section."""
    return _parameters({name: registry.engines.get(name) for name in registry.engines.names()}, "kind")


def values() -> str:
    """Each kind of value, with the fields of its section."""
    return _parameters({name: registry.values.get(name) for name in registry.values.names()}, "kind")


def vas_results() -> str:
    """What steering does on the demo, as last measured."""
    result = json.loads((ROOT / "benchmarks/results/vas.json").read_text())
    columns = ["answer", "tokens spent", "gold", "± s.e.", "KL, nats", "proxy"]
    rows = [
        [row["answer"], f"{row['tokens']:.0f}", *(_score(row.get(key)) for key in ("gold", "gold_se", "kl", "proxy"))]
        for row in result["rows"]
    ]
    return _table(columns, rows)


def vas_speed() -> str:
    """What steering costs, as last measured."""
    return _ratios("vas_speed")


def server() -> str:
    """The [server] section."""
    return _fields(config.Server)


def limits() -> str:
    """The [limits] section."""
    return _fields(config.Limits)


def demo_results() -> str:
    """What best-of-n does on the demo, as last measured."""
    result = json.loads((ROOT / "benchmarks/results/best_of_n.json").read_text())
    columns = ["answer", "tokens spent", "proxy", "gold", "± s.e."]
    rows = [
        [row["answer"], f"{row['tokens']:.0f}", _score(row["proxy"]), _score(row["gold"]), _score(row["gold_se"])]
        for row in result["rows"]
        if row["n"] in {1, 8, 64, 512}
    ]
    return _table(columns, rows)


def demo_replication() -> str:
    """The same with fresh reward models, prompts and samples."""
    result = json.loads((ROOT / "benchmarks/results/best_of_n_retrained.json").read_text())
    shown = ("1", "8", "64", "512")
    rows = [
        [str(row["set"]), row["objective"], str(row["best_n"]), *(f"{row[f'gold_{n}']:.2f}" for n in shown)]
        for row in result["rows"]
        if row["objective"] in {"single", "uwo"}
    ]
    return _table(["set", "objective", "best n", *(f"gold at n = {n}" for n in shown)], rows)


def serving_results() -> str:
    """What serving costs, as last measured."""
    return _ratios("serving")


TABLES: dict[str, Callable[[], str]] = {
    "methods": methods,
    "rewards": rewards,
    "engines": engines,
    "values": values,
    "vas-results": vas_results,
    "vas-speed": vas_speed,
    "server": server,
    "limits": limits,
    "demo-results": demo_results,
    "demo-replication": demo_replication,
    "serving-results": serving_results,
}


def _ratios(name: str) -> str:
    result = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    rows = [[r["what"], f"{r['value']:.3g}", f"{r['ours']:.4g}", f"{r['baseline']:.4g}", r["target"]] for r in result["rows"]]
    return _table(["what", "value", "ours", "baseline", "aim"], rows)


def _parameters(classes: dict[str, type[Any]], head: str) -> str:
    rows = []
    for name, cls in classes.items():
        rows.append([f"`{name}`", "", (cls.__doc__ or "").partition("\n")[0]])
        rows += [["", f"`{f.name}` ({_default(f)})", f.metadata.get("description", "")] for f in dataclasses.fields(cls)]
    return _table([head, "parameter (default)", "what it does"], rows)


def _fields(cls: type[Any]) -> str:
    rows = [[f"`{f.name}`", _default(f), f.metadata.get("description", "")] for f in dataclasses.fields(cls)]
    return _table(["name", "default", "what it does"], rows)


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is not dataclasses.MISSING:
        return f"`{json.dumps(f.default, default=repr)}`"
    return "required" if f.default_factory is dataclasses.MISSING else f"`{json.dumps(f.default_factory())}`"


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> int:
    """Write the tables, or check them."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        filled = MARKER.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)
        if filled != text:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.write_text(filled)
    if stale and "--check" in sys.argv:
        print("out of date:", *stale, "- run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
