"""The scenarios of gateways, at a small scale: nothing is lost, and nothing is left over."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.serving.scenarios import __main__ as scenarios

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("scenarios")]


# Those whose outcome does not depend on the speed of the machine.
@pytest.mark.parametrize(
    "name",
    [
        "failover",
        "slow-readers",
        "disconnects",
        "descriptors",
        "killed-worker",
        "clock-steps",
        "full-disk",
        "read-only-store",
    ],
)
def test_a_scenario_holds(name: str) -> None:
    outcome = asyncio.run(scenarios.SCENARIOS[name](0.05))
    assert outcome.holds, outcome
