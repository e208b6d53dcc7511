"""The comparison of two servers has a figure after any number of rounds."""

from __future__ import annotations

import pytest

from benchmarks.serving.vllm_engine import Comparison, measure
from infer_align.config.config import Config
from infer_align.engines.fake import Fake
from tests.server.conftest import USER, end, start

BODY = {"model": "fake", "messages": USER}


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("as_rate", [False, True])
def test_a_comparison_has_a_figure_after_any_number_of_rounds(rounds: int, as_rate: bool) -> None:
    live = start(Config(engine=Fake(), engine_kind="fake"))
    comparison = Comparison("x", BODY, BODY, "raw", 1, 2, "at most 2", as_rate)
    figure = measure({"raw": live.port, "ours": live.port}, comparison, rounds, 1.0)
    end(live)
    low, high = figure["quartiles"]
    assert 0 < low <= figure["value"] <= high
    if rounds == 1:
        assert low == high == figure["ours"] / figure["baseline"]
