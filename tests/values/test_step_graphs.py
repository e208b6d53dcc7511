"""Steps with CUDA graphs, where no graph can be captured."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from infer_align.values._step_graphs import CAPTURED_AT_USE, StepGraphs, WaitingCalls


def test_a_step_on_a_cpu_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    graphs = StepGraphs("tiny", torch.device("cpu"))
    total = torch.zeros(())
    for _ in range(3 * CAPTURED_AT_USE):
        graphs.run("size", lambda: total.add_(1))
    assert total == 3 * CAPTURED_AT_USE
    assert len(graphs) == 0
    assert not caplog.records


@pytest.mark.skipif(torch.cuda.is_available(), reason="a graph can be captured here")
def test_where_no_graph_can_be_captured_every_step_runs_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # This machine has no CUDA, so every capture fails.
    graphs = StepGraphs("value-lm", torch.device("cuda"))
    runs = {"first": 0, "second": 0}

    def step(size: str) -> None:
        runs[size] += 1

    with caplog.at_level(logging.WARNING, logger="infer_align"):
        for _ in range(2 * CAPTURED_AT_USE):
            for size in runs:
                graphs.run(size, lambda size=size: step(size))  # type: ignore[misc]
    assert set(runs.values()) == {2 * CAPTURED_AT_USE}
    assert len(graphs) == 0
    (warning,) = caplog.records
    assert warning.getMessage().startswith("value-lm: a step cannot be captured in a CUDA graph")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a graph can be captured here")
def test_an_error_of_the_step_itself_is_raised() -> None:
    graphs = StepGraphs("value-lm", torch.device("cuda"))

    def step() -> None:
        raise ValueError("not about the capture")

    for _ in range(2 * CAPTURED_AT_USE):
        with pytest.raises(ValueError, match="not about the capture"):
            graphs.run("size", step)


NUMBERS = torch.tensor([1.0, 0.0, 2.0])


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        NUMBERS[0].item,
        lambda: bool(NUMBERS.any()),
        NUMBERS.nonzero,
        lambda: NUMBERS[NUMBERS > 0],
        lambda: NUMBERS.masked_select(NUMBERS > 0),
        lambda: NUMBERS.clone().index_put_((NUMBERS > 0,), torch.zeros(())),
        lambda: NUMBERS.to("meta"),
        lambda: torch.empty(3, device="meta").copy_(NUMBERS),
    ],
    ids=["item", "bool", "nonzero", "mask", "select", "put", "to", "copy"],
)
def test_a_call_that_no_graph_can_hold_is_noted(
    call: Callable[[], object], *, inference: bool
) -> None:
    with torch.inference_mode(inference), WaitingCalls() as waiting:
        call()
    assert waiting.names


@pytest.mark.parametrize("inference", [True, False])
def test_other_calls_are_not_noted(*, inference: bool) -> None:
    with torch.inference_mode(inference), WaitingCalls() as waiting:
        rows = torch.arange(2)
        (NUMBERS[rows] + 1).to(torch.bfloat16).float().copy_(NUMBERS[:2])
        torch.zeros(3, dtype=torch.bool)[rows]
        torch.where(NUMBERS > 0, NUMBERS, 0.0).masked_fill(NUMBERS > 1, 3.0)
    assert waiting.names == []
