"""What `make bench` says of a ratio that was measured again."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks.record import RESULTS
from benchmarks.serving import quick

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("values", "before", "said"),
    [
        ([1.0, 1.0, 1.0], 1.0, "+0%"),
        ([1.3, 1.2, 1.25], 1.0, "+25% moved"),
        ([0.7, 0.8, 0.75], 1.0, "-25% moved"),
        ([0.9, 1.3, 1.3], 1.0, "+30%"),
        ([1.05, 1.06, 1.04], 1.0, "+5%"),
    ],
)
def test_a_ratio_has_moved_when_every_round_says_so(
    values: list[float], before: float, said: str
) -> None:
    assert quick.verdict(values, before) == said


def test_everything_quick_is_recorded() -> None:
    """A row that is not recorded could not be compared: the names must stay the same in both places."""
    recorded = quick.recorded()
    assert "head, batch 16, against plain decoding" in recorded
    assert "best-of-8 against n=8, wall time ratio" in recorded
    assert all(value > 0 for value in recorded.values())


def test_every_recorded_result_is_shown() -> None:
    page = (ROOT / "docs/bench.md").read_text(encoding="utf-8")
    assert [path.name for path in RESULTS.glob("*.json") if f"`{path.name}`" not in page] == []
