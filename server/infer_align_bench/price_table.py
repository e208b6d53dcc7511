"""Prices from a table of measured steps, shipped or the user's own.

The seconds of a decoding step are read from measurements at a few batch sizes, with straight lines
between them: a step of a large batch costs more than a line through the small ones says. A shipped
table names its device and its source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from infer_align.errors import ConfigError, nearest
from infer_align_bench.cost import Prices, Setting, errors

# Sequences in a step, and the seconds that it takes.
Steps = tuple[tuple[float, float], ...]
COMPUTED = ("fixed", "prefill", "reward", "judge")
HELD_OUT = "held out"
EXAMPLE = '{"output_tokens": 128, "measured": [{"concurrency": 1, "tokens_per_second": 191}, ...]}'


@dataclass(frozen=True, slots=True)
class TablePrices(Prices):
    """Prices of which that of a step depends on the number of its sequences."""

    steps: Steps = ()
    # What steering adds to such a step, whatever the number of valued tokens.
    steered_steps: Steps = ()

    @property
    def most_sequences(self) -> float:
        """Return the largest number of sequences with a price."""
        return self.steps[-1][0]

    def tabulated_seconds(self, setting: Setting) -> float:
        """Return the seconds of the steps of a request."""
        sequences = setting.concurrency / setting.replicas * setting.n
        step = _interpolate(self.steps, sequences)
        if setting.k:
            step += _interpolate(self.steered_steps, sequences)
        return setting.output_tokens * step


def _interpolate(steps: Steps, sequences: float) -> float:
    if not steps:
        return 0.0
    sizes, times = zip(*steps, strict=True)
    return float(np.interp(sequences, sizes, times))


@dataclass(frozen=True, slots=True)
class PriceTable:
    """A table of prices with its source, and its error where it was not fitted."""

    device: str
    model: str
    source: str
    prices: TablePrices
    # label -> relative errors of the predicted seconds.
    errors: Mapping[str, Sequence[float]] = field(default_factory=dict)


def shipped() -> list[str]:
    """Return the names of the tables that this package ships."""
    folder = resources.files("infer_align_bench") / "prices"
    return sorted(each.name.removesuffix(".json") for each in folder.iterdir())


def load(name: str) -> PriceTable:
    """Return the shipped table of this name, or the one in the file of this path.

    Raises:
        ConfigError: there is neither, or the file is no table of prices.
    """
    if name in shipped():
        text = (resources.files("infer_align_bench") / "prices" / f"{name}.json").read_text("utf-8")
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise ConfigError(
                f"--prices: {name!r} is neither a file nor a shipped table; "
                f"{nearest(name, shipped())}"
            ) from None
    try:
        return parse(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"--prices: {name} is no table of prices ({type(error).__name__}: {error}); a table "
            f"has the form {EXAMPLE}."
        ) from None


def parse(table: Mapping[str, Any]) -> PriceTable:
    """Return a table of prices from its JSON.

    Raises:
        ValueError: a number is not positive, a name is unknown, or plain steps are missing.
        KeyError: a field is missing.
    """
    length = float(table["output_tokens"])
    settings = []
    measured = []
    roles = []
    for row in table["measured"]:
        sequences, speed = float(row["concurrency"]), float(row["tokens_per_second"])
        if not (sequences > 0 and speed > 0 and length > 0):
            raise ValueError("concurrency, tokens_per_second and output_tokens must be over 0")
        settings.append(Setting(sequences, output_tokens=length, k=float(row.get("k", 0))))
        measured.append(length * sequences / speed)
        roles.append(row.get("role", "fitted"))
    computed = {name: float(price) for name, price in table.get("prices_seconds", {}).items()}
    unknown = sorted({*computed} - {*COMPUTED})
    if unknown or min(computed.values(), default=0.0) < 0:
        raise ValueError(f"prices_seconds may hold {', '.join(COMPUTED)}, at least 0")
    fitted = [i for i, role in enumerate(roles) if role != HELD_OUT]
    prices = _fit(settings, measured, fitted, computed)
    return PriceTable(
        device=str(table.get("device", "")),
        model=str(table.get("model", "")),
        source=str(table.get("source", "")),
        prices=prices,
        errors=_errors(settings, measured, fitted, computed),
    )


def _fit(
    settings: Sequence[Setting],
    measured: Sequence[float],
    used: Sequence[int],
    computed: Mapping[str, float],
) -> TablePrices:
    """Return the prices that the used measurements give."""
    plain: dict[float, float] = {}
    steered: dict[float, float] = {}
    for i in used:
        table = steered if settings[i].k else plain
        table[settings[i].concurrency] = measured[i] / settings[i].output_tokens
    if not plain:
        raise ValueError("measured needs rows without steering (k = 0)")
    steps = tuple(sorted(plain.items()))
    further = []
    for sequences, step in sorted(steered.items()):
        further.append((sequences, max(0.0, step - _interpolate(steps, sequences))))
    return TablePrices(**computed, steps=steps, steered_steps=tuple(further))


def _errors(
    settings: Sequence[Setting],
    measured: Sequence[float],
    fitted: Sequence[int],
    computed: Mapping[str, float],
) -> dict[str, list[float]]:
    """Return the errors of the rows that were held out, and of inner rows left out in turn."""
    result: dict[str, list[float]] = {}
    held_out = [i for i in range(len(settings)) if i not in fitted]
    if held_out:
        prices = _fit(settings, measured, fitted, computed)
        result[HELD_OUT] = _errors_of(prices, settings, measured, held_out)
    sizes = sorted({settings[i].concurrency for i in fitted if not settings[i].k})
    for size in sizes[1:-1]:
        rest = [i for i in fitted if settings[i].concurrency != size]
        left_out = [i for i in fitted if settings[i].concurrency == size]
        prices = _fit(settings, measured, rest, computed)
        result.setdefault("left out, one batch size at a time", [])
        result["left out, one batch size at a time"] += _errors_of(
            prices, settings, measured, left_out
        )
    return result


def _errors_of(
    prices: Prices, settings: Sequence[Setting], measured: Sequence[float], rows: Sequence[int]
) -> list[float]:
    return errors(prices, [settings[i] for i in rows], [measured[i] for i in rows])
