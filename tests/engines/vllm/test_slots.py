"""Which rows are steered by what, and what that does to their logits: against the float64 definition, row by row. Needs no vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align.decoding.steering import steer
from infer_align.engines.vllm.slots import Slots
from infer_align.engines.vllm.steering import Terms
from infer_align.methods.vas import reweight
from infer_align.values import FrozenModel
from infer_align.values.head import HeadValue, write

V, D, SIZE = 40, 6, 5
FROZEN = FrozenModel("tiny", V, D, "tokens", "cpu")
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HeadValue]:
    folder: Path = tmp_path_factory.mktemp("heads")
    g = torch.Generator().manual_seed(1)
    made = {}
    for name in NAMES:
        tensors = {
            key: torch.randn(shape, generator=g)
            for key, shape in {"P": (3, D), "E": (V, 3), "b": (V,)}.items()
        }
        write(folder / f"{name}.safetensors", tensors, FROZEN, {})
        made[name] = HeadValue(str(folder / f"{name}.safetensors"))
        made[name].start(FROZEN, {})
    return made


TERMS = st.none() | st.builds(
    Terms,
    st.dictionaries(st.sampled_from(NAMES), st.floats(-4, 4, width=32).filter(bool), min_size=1),
    st.sampled_from([1, 2, 7, V, 10**6]),
    st.booleans(),
)
EVENTS = st.lists(st.tuples(st.integers(0, SIZE - 1), TERMS), max_size=12)


def filled(
    heads: dict[str, HeadValue], events: list[tuple[int, Terms | None]]
) -> tuple[Slots, dict[int, Terms | None]]:
    slots = Slots(SIZE, V, torch.device("cpu"))
    for name, head in heads.items():
        slots.add(name, head)
    for slot, terms in events:
        slots.put(slot, slots.bind(terms))
    return slots, dict(events)


def batch(owners: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(len(owners))
    return torch.randn((len(owners), V), generator=g) * 3, torch.randn(
        (len(owners), D), generator=g
    )


def expected(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    terms: list[Terms | None],
    heads: dict[str, HeadValue],
) -> Any:
    out = logits.double().numpy().copy()
    for row, own in enumerate(terms):
        if own is not None:
            ids = out[row].argsort()[::-1][: own.top_k][None]
            every = torch.arange(V)[None]
            values = np.stack(
                [
                    heads[name].evaluate(hidden[row : row + 1], every).numpy()[:, ids[0]]
                    for name in own.beta
                ]
            )
            out[row] = reweight(
                out[row][None], ids, values, [*own.beta.values()], "mask" if own.mask else "keep"
            )[0]
    return out


@given(EVENTS, st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=SIZE, unique=True))
@settings(deadline=None, max_examples=60)
def test_each_row_is_steered_by_its_own_terms(
    heads: Any, events: list[tuple[int, Terms | None]], owners: list[int]
) -> None:
    slots, last = filled(heads, events)
    logits, hidden = batch(owners)
    own = [last.get(slot) for slot in owners]
    layout = slots.layout(owners)
    assert (layout is None) == all(terms is None for terms in own)
    if layout is not None:
        fresh = logits.clone()
        got, _ = steer(fresh, hidden, layout, out=fresh)
        np.testing.assert_allclose(got.numpy(), expected(logits, hidden, own, heads), atol=1e-4)
        for row, terms in enumerate(own):
            if terms is None:
                assert torch.equal(got[row], logits[row])
    assert slots.layout(owners) is layout, "made again only when something has changed"


@given(EVENTS, st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=9))
@settings(deadline=None, max_examples=60)
def test_several_rows_of_one_slot(
    heads: Any, events: list[tuple[int, Terms | None]], owners: list[int]
) -> None:
    slots, last = filled(heads, events)
    logits, hidden = batch(owners)
    layout = slots.expanded_layout(np.unique(owners), torch.tensor(owners, dtype=torch.int32))
    own = [last.get(slot) for slot in owners]
    assert (layout is None) == all(terms is None for terms in own)
    if layout is not None:
        fresh = logits.clone()
        got, _ = steer(fresh, hidden, layout, out=fresh)
        np.testing.assert_allclose(got.numpy(), expected(logits, hidden, own, heads), atol=1e-4)
        for row, terms in enumerate(own):
            if terms is None:
                assert torch.equal(got[row], logits[row])


def test_replace_is_all_slots_at_once(heads: dict[str, HeadValue]) -> None:
    slots, _ = filled(heads, [(0, Terms({"a": 1.0}, 3, False)), (1, Terms({"b": 1.0}, 3, True))])
    slots.replace({2: slots.bind(Terms({"c": 2.0}, 4, False))})  # type: ignore[dict-item]
    assert slots.layout([0, 1]) is None
    layout = slots.layout([0, 2])
    assert layout is not None
    assert layout.values == (heads["c"],)
    slots.replace({})
    assert not slots.steered_any


def test_a_replaced_value_stays_for_those_who_use_it_and_no_longer(
    heads: dict[str, HeadValue],
) -> None:
    slots, _ = filled({"a": heads["a"]}, [(0, Terms({"a": 1.0}, 3, False))])
    slots.add("a", heads["b"])
    slots.put(1, slots.bind(Terms({"a": 1.0}, 3, False)))
    first, second = slots.layout([0]), slots.layout([1])
    assert first is not None
    assert second is not None
    assert (first.values, second.values) == ((heads["a"],), (heads["b"],))
    slots.put(0, None)
    slots.add("x", heads["c"])
    assert slots._values == [heads["c"], heads["b"]], (
        "the column of the one that was replaced is used again"
    )
    again = slots.layout([1])
    assert again is not None
    assert again.values == (heads["b"],)


def test_a_value_that_is_not_here_is_no_reason_to_go_on(heads: dict[str, HeadValue]) -> None:
    slots, _ = filled(heads, [])
    with pytest.raises(RuntimeError, match="nope"):
        slots.bind(Terms({"nope": 1.0}, 3, False))


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_on_a_gpu_nothing_waits_for_the_device(heads: dict[str, HeadValue]) -> None:
    terms = [
        Terms({"a": 2.0}, 7, False),
        None,
        Terms({"a": -1.0, "b": 3.0}, 20, True),
        None,
        Terms({"c": 1.0}, 1, False),
    ]
    device = torch.device("cuda")
    slots, owners = Slots(SIZE, V, device), [*range(SIZE)]
    for name, head in heads.items():
        moved = HeadValue(head.path)
        moved.start(FrozenModel("tiny", V, D, "tokens", "cuda"), {})
        slots.add(name, moved)
    logits, hidden = batch(owners)
    on_gpu = hidden.cuda()
    for again in range(2):  # the first compiles the kernels
        for slot, own in enumerate(terms):
            slots.put(slot, slots.bind(own))
        given = logits.cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if again else "default")
        try:
            layout = slots.layout(owners)
            assert layout is not None
            got, _ = steer(given, on_gpu, layout, out=given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_allclose(got.cpu().numpy(), expected(logits, hidden, terms, heads), atol=1e-3)
    assert torch.equal(got[1].cpu(), logits[1])
