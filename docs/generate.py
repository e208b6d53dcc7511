"""Fill the tables in README.md and docs/*.md, and the types of the Python client.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is a key of TABLES.
Tables of parameters come from the code. Tables of figures come from benchmarks/results, see
`figures.py` and `effects.py`. The tables of docs/scaling.md are computed by the cost model, see
`capacity.py`. The types come from the code too, see `client_types.py`. With `--check` nothing is
written: the exit code is 1 if a file is out of date.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import capacity
import client_types
import figures
from tables import ROOT, table

from infer_align import config
from infer_align.config import registry
from infer_align.config.align import parameter_classes
from infer_align.config.fitting import FitConfig
from infer_align.config.schema import placeholder
from infer_align.methods.adaptive import Adaptive
from infer_align.methods.compose import RewardShape
from infer_align.methods.dpa import Prompting
from infer_align.methods.guidance import PromptGuidance, Trait
from infer_align.methods.profile import ProfileSettings
from infer_align.methods.rps import RPS
from infer_align.methods.select import Select
from infer_align_server.metrics import Metrics
from infer_align_server.openapi import STATUSES

MARKER = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def example() -> str:
    """Return the example program as a code block."""
    code = (ROOT / "clients/python/example.py").read_text(encoding="utf-8")
    return f"```python\n{code}```\n"


def methods() -> str:
    """Return each key of `align` with its parameters."""
    return _parameters(parameter_classes(), "key")


def rewards() -> str:
    """Return each kind of reward with the fields of its section."""
    return _parameters(_plugins(registry.rewards), "kind")


def engines() -> str:
    """Return each kind of engine with the fields of its section."""
    return _parameters(_plugins(registry.engines), "kind")


def values() -> str:
    """Return each kind of value with the fields of its section."""
    return _parameters(_plugins(registry.values), "kind")


def server() -> str:
    """Return the fields of the [server] section."""
    return _fields(config.Server)


def limits() -> str:
    """Return the fields of the [limits] section."""
    return _fields(config.Limits)


def telemetry() -> str:
    """Return the fields of the [telemetry] section."""
    return _fields(config.Telemetry)


def dpa() -> str:
    """Return the fields of the [dpa] section."""
    return _fields(Prompting)


def rps_parameters() -> str:
    """Return the parameters of `align.rps`."""
    return _fields(RPS)


def adaptive_parameters() -> str:
    """Return the parameters of `align.adaptive`."""
    return _fields(Adaptive)


def shape_parameters() -> str:
    """Return the parameters of the shape of one reward in `align.compose`."""
    return _fields(RewardShape)


def select_parameters() -> str:
    """Return the parameters of `align.select`."""
    return _fields(Select)


def profiles() -> str:
    """Return the fields of the [profiles] section."""
    return _fields(ProfileSettings)


def guidance() -> str:
    """Return the parameters of `align.guidance`."""
    return _fields(PromptGuidance)


def traits() -> str:
    """Return the fields of a [traits.<name>] section."""
    return _fields(Trait)


def fit() -> str:
    """Return the settings of `infer-align fit value`."""
    return _fields(FitConfig)


def statuses() -> str:
    """Return the meaning of each HTTP status."""
    rows = [[str(status), text] for status, text in STATUSES.items()]
    return table(["status", "when"], rows)


def metrics() -> str:
    """Return the metrics of the server."""
    rows = []
    for family in Metrics().families:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        rows.append([f"`{family.name}`", family.kind, labels, f"{family.text}."])
    return table(["metric", "type", "labels", "meaning"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "example": example,
    "methods": methods,
    "rewards": rewards,
    "engines": engines,
    "values": values,
    "server": server,
    "limits": limits,
    "telemetry": telemetry,
    "dpa": dpa,
    "rps-parameters": rps_parameters,
    "adaptive-parameters": adaptive_parameters,
    "shape-parameters": shape_parameters,
    "select-parameters": select_parameters,
    "profiles": profiles,
    "guidance": guidance,
    "traits": traits,
    "fit": fit,
    "statuses": statuses,
    "metrics": metrics,
    **figures.TABLES,
    **capacity.TABLES,
}


def _plugins(plugins: registry.Registry) -> dict[str, type[Any]]:
    return {name: plugins.get(name) for name in plugins.names()}


def _parameters(classes: dict[str, type[Any]], head: str) -> str:
    rows = []
    for name, cls in classes.items():
        summary = (cls.__doc__ or "").partition("\n")[0]
        rows.append([f"`{name}`", "", summary])
        for field in dataclasses.fields(cls):
            parameter = f"`{placeholder(field)}` ({_default(field)})"
            rows.append(["", parameter, field.metadata.get("description", "")])
    return table([head, "parameter (default)", "what it does"], rows)


def _fields(cls: type[Any]) -> str:
    rows = []
    for field in dataclasses.fields(cls):
        description = field.metadata.get("description", "")
        rows.append([f"`{field.name}`", _default(field), description])
    return table(["name", "default", "what it does"], rows)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{json.dumps(field.default, default=_set_fields)}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(field.default_factory())}`"
    return "required"


def _set_fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are set, for defaults such as a scripted reply."""
    items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: item for name, item in items.items() if item}


def _fill(match: re.Match[str]) -> str:
    start, name, end = match.groups()
    return start + TABLES[name]() + end


def _files() -> dict[Path, str]:
    """Return the text that each page and each file of types should have."""
    files = client_types.files()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        files[path] = MARKER.sub(_fill, path.read_text(encoding="utf-8"))
    return files


def main() -> int:
    """Write the tables and types, or check them."""
    check = "--check" in sys.argv
    stale = []
    for path, text in _files().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not check:
            path.write_text(text, encoding="utf-8")
    if stale and check:
        print("out of date:", *stale, "- run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
