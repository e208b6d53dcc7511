"""The slot table: its batches steer each row as the float64 definition does. Needs no vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align.decoding.kl_limit import limit_kl
from infer_align.decoding.steering import steer
from infer_align.decoding.steering_batch import SteeringBatch
from infer_align.engines.vllm.extra_args import SteeringRequest
from infer_align.engines.vllm.slot_table import SlotTable
from infer_align.methods.vas import reweight
from infer_align.values import FrozenModel
from infer_align.values.head import HeadValue, write

V, D, SLOTS = 40, 6, 5
FROZEN = FrozenModel("tiny", V, D, "tokens", "cpu")
NAMES = ("a", "b", "c")
Heads = dict[str, HeadValue]
Assignment = tuple[int, SteeringRequest | None]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Heads:
    folder: Path = tmp_path_factory.mktemp("heads")
    g = torch.Generator().manual_seed(1)
    shapes = {"P": (3, D), "E": (V, 3), "b": (V,)}
    heads = {}
    for name in NAMES:
        tensors = {key: torch.randn(shape, generator=g) for key, shape in shapes.items()}
        path = folder / f"{name}.safetensors"
        write(path, tensors, FROZEN, {})
        heads[name] = HeadValue(str(path))
        heads[name].start(FROZEN, {})
    return heads


BETAS = st.floats(-4, 4, width=32).filter(bool)
WEIGHTS = st.dictionaries(st.sampled_from(NAMES), BETAS, min_size=1)
NO_LIMIT = st.just(np.inf)
FIXED = st.builds(
    SteeringRequest,
    WEIGHTS,
    st.sampled_from([1, 2, 7, V, 10**6]),
    st.booleans(),
    st.just(0.0),
    NO_LIMIT,
)
# Without a fixed number of candidates: all tokens, or the likely ones.
DENSE = st.builds(
    SteeringRequest,
    WEIGHTS,
    st.none(),
    st.booleans(),
    st.sampled_from([0.0, 0.05, 0.5]),
    NO_LIMIT,
)
LIMITED = st.builds(
    SteeringRequest,
    WEIGHTS,
    st.sampled_from([None, 2, V]),
    st.just(value=False),
    st.just(0.0),
    st.sampled_from([0.01, 0.2, 1.0]),
)
REQUESTS = st.none() | FIXED | DENSE | LIMITED
ASSIGNMENTS = st.lists(st.tuples(st.integers(0, SLOTS - 1), REQUESTS), max_size=12)


def make_table(heads: Heads, assignments: list[Assignment]) -> SlotTable:
    table = SlotTable(SLOTS, V, torch.device("cpu"))
    for name, head in heads.items():
        table.set_value(name, head)
    for slot, request in assignments:
        table.assign(slot, table.resolve(request))
    return table


def random_batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [rows, V] and hidden states [rows, D]."""
    g = torch.Generator().manual_seed(rows)
    return torch.randn((rows, V), generator=g) * 3, torch.randn((rows, D), generator=g)


def valued_tokens(logits: Any, request: SteeringRequest) -> Any:
    """Return the tokens of a row [V] that a request values."""
    if request.top_k is not None:
        return logits.argsort()[::-1][: request.top_k]
    threshold = logits.max() + np.log(request.min_p) if request.min_p else -np.inf
    return np.flatnonzero(logits >= threshold)


def definition(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    requests: list[SteeringRequest | None],
    heads: Heads,
) -> Any:
    """Steer each row by its own request, in float64."""
    out = logits.double().numpy().copy()
    every_token = torch.arange(V)[None]
    for row, request in enumerate(requests):
        if request is None:
            continue
        ids = valued_tokens(out[row], request)[None]
        state = hidden[row : row + 1]
        values = np.stack(
            [heads[name].evaluate(state, every_token).numpy()[:, ids[0]] for name in request.beta]
        )
        tail = "mask" if request.mask_tail else "keep"
        steered = reweight(out[row][None], ids, values, [*request.beta.values()], tail)
        if np.isfinite(request.max_kl):
            limit = torch.tensor([request.max_kl], dtype=torch.float64)
            limited = limit_kl(logits[row][None].double(), torch.from_numpy(steered), limit)
            steered = limited.numpy()
        out[row] = steered[0]
    return out


def assert_steered(batch: Any, requests: list[SteeringRequest | None], heads: Heads) -> None:
    """Assert that a batch changes the rows with a request, and no other row."""
    assert (batch is None) == all(request is None for request in requests)
    if batch is None:
        return
    logits, hidden = random_batch(len(requests))
    target = logits.clone()
    result = steer(target, hidden, batch, in_place=True)
    expected = definition(logits, hidden, requests, heads)
    limited = [row for row, each in enumerate(requests) if each and np.isfinite(each.max_kl)]
    exact = np.delete(np.arange(len(requests)), limited)
    np.testing.assert_allclose(result.numpy()[exact], expected[exact], atol=1e-4)
    # A limit may be reached by weights that differ where the distribution hardly does.
    probabilities = torch.from_numpy(expected[limited]).softmax(-1).numpy()
    np.testing.assert_allclose(result[limited].softmax(-1).numpy(), probabilities, atol=1e-3)
    for row, request in enumerate(requests):
        if request is None:
            assert torch.equal(result[row], logits[row])


@given(ASSIGNMENTS, st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True))
@settings(deadline=None, max_examples=60)
def test_each_row_is_steered_by_its_own_request(
    heads: Any, assignments: list[Assignment], slots: list[int]
) -> None:
    table = make_table(heads, assignments)
    batch = table.batch(slots)
    requests = [dict(assignments).get(slot) for slot in slots]
    assert_steered(batch, requests, heads)
    assert table.batch(slots) is batch, "the batch is made again only after a change"


@pytest.mark.slow
@given(ASSIGNMENTS, st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=9))
@settings(deadline=None, max_examples=60)
def test_a_slot_may_have_several_rows(
    heads: Any, assignments: list[Assignment], row_slots: list[int]
) -> None:
    table = make_table(heads, assignments)
    on_device = torch.tensor(row_slots, dtype=torch.int32)
    batch = table.expanded_batch(np.unique(row_slots), on_device)
    assert_steered(batch, [dict(assignments).get(slot) for slot in row_slots], heads)


def values_of(batch: SteeringBatch | None) -> tuple[Any, ...]:
    """Return the values that steer a batch, in one call or in separate ones."""
    assert batch is not None
    return batch.values if batch.fused is None else batch.fused.stack.heads


def test_assign_all_replaces_all_slots(heads: Heads) -> None:
    table = make_table(
        heads,
        [(0, SteeringRequest({"a": 1.0}, 3, False)), (1, SteeringRequest({"b": 1.0}, 3, True))],
    )
    steering = table.resolve(SteeringRequest({"c": 2.0}, 4, False))
    assert steering is not None
    table.assign_all({2: steering})
    assert table.batch([0, 1]) is None
    assert values_of(table.batch([0, 2])) == (heads["c"],)
    table.assign_all({})
    assert not table.any_steered


def test_a_replaced_value_stays_as_long_as_a_slot_uses_it(heads: Heads) -> None:
    request = SteeringRequest({"a": 1.0}, 3, False)
    table = make_table({"a": heads["a"]}, [(0, request)])
    table.set_value("a", heads["b"])
    table.assign(1, table.resolve(request))
    assert values_of(table.batch([0])) == (heads["a"],)
    assert values_of(table.batch([1])) == (heads["b"],)
    table.assign(0, None)
    table.set_value("x", heads["c"])
    assert table._values == [heads["c"], heads["b"]], "the free column is used again"
    assert values_of(table.batch([1])) == (heads["b"],)


def test_a_missing_value_is_an_error(heads: Heads) -> None:
    table = make_table(heads, [])
    with pytest.raises(RuntimeError, match="nope"):
        table.resolve(SteeringRequest({"nope": 1.0}, 3, False))
    with pytest.raises(RuntimeError, match="nope"):
        table.head("nope")


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_on_a_gpu_nothing_waits_for_the_device(heads: Heads) -> None:
    requests = [
        SteeringRequest({"a": 2.0}, 7, False),
        None,
        SteeringRequest({"a": -1.0, "b": 3.0}, 20, True),
        None,
        SteeringRequest({"c": 1.0}, 1, False),
    ]
    table = SlotTable(SLOTS, V, torch.device("cuda"))
    for name, head in heads.items():
        on_gpu = HeadValue(head.path)
        on_gpu.start(FrozenModel("tiny", V, D, "tokens", "cuda"), {})
        table.set_value(name, on_gpu)
    logits, hidden = random_batch(SLOTS)
    hidden_on_gpu = hidden.cuda()
    # The first round compiles the kernels.
    for mode in ("default", "error"):
        for slot, request in enumerate(requests):
            table.assign(slot, table.resolve(request))
        target = logits.cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            batch = table.batch(range(SLOTS))
            assert batch is not None
            result = steer(target, hidden_on_gpu, batch, in_place=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    expected = definition(logits, hidden, requests, heads)
    np.testing.assert_allclose(result.cpu().numpy(), expected, atol=1e-3)
    assert torch.equal(result[1].cpu(), logits[1])
