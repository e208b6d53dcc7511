"""`make bench` compares new ratios with the recorded ones."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks.record import RESULTS
from benchmarks.serving import quick

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("ratios", "recorded", "verdict"),
    [
        ([1.0, 1.0, 1.0], 1.0, "+0%"),
        ([1.3, 1.2, 1.25], 1.0, "+25% moved"),
        ([0.7, 0.8, 0.75], 1.0, "-25% moved"),
        ([0.9, 1.3, 1.3], 1.0, "+30%"),
        ([1.05, 1.06, 1.04], 1.0, "+5%"),
    ],
)
def test_a_ratio_has_moved_if_every_round_agrees(
    ratios: list[float], recorded: float, verdict: str
) -> None:
    assert quick.verdict(ratios, recorded) == verdict


def test_every_quick_ratio_is_recorded() -> None:
    """A ratio is found by its name, which must be the same in both places."""
    recorded = quick.recorded_ratios()
    assert "head, batch 16, against plain decoding" in recorded
    assert "best-of-8 against n=8, wall time ratio" in recorded
    assert min(recorded.values()) > 0


def test_the_docs_name_every_result() -> None:
    page = (ROOT / "docs/bench.md").read_text(encoding="utf-8")
    missing = [path.name for path in RESULTS.glob("*.json") if f"`{path.name}`" not in page]
    assert missing == []
