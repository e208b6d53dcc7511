"""Every kernel compiles for three generations of GPU, without one: no spills, and tensor cores where products are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import triton

from infer_align_kernels.compiled import Launch, launches, resources

# Bytes of shared memory that one program may take, by compute capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ALL = [(launch, capability) for capability in SHARED for launch in launches()]
QUICK = {"value_reweight_head_tile", "value_reweight_candidates_tile", "sibling_attention"}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
    yield
    triton.knobs.cache.reset()


def cases() -> Iterator[object]:
    """The first launch of the three kernels that do the work, on sm_90, is quick; the rest is slow."""
    waiting = set(QUICK)
    for i, (launch, capability) in enumerate(ALL):
        quick = capability == 90 and launch.name in waiting
        waiting -= {launch.name} if quick else set()
        yield pytest.param(
            launch,
            capability,
            id=f"{launch.name}-sm_{capability}-{i}",
            marks=[] if quick else [pytest.mark.slow],
        )


@pytest.mark.parametrize(("launch", "capability"), list(cases()))
def test_it_compiles_without_spills(launch: Launch, capability: int) -> None:
    found = resources(launch, capability)
    assert found.spills == 0
    assert found.registers <= 255
    assert found.shared_bytes <= SHARED[capability]
    assert (found.tensor_core_instructions > 0) == launch.tensor_cores
