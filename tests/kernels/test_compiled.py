"""Compile every kernel for three generations of GPU, without a GPU.

No kernel may spill registers, and kernels with products must use tensor cores.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import triton

from infer_align_kernels.compiled import Launch, launches, resources

pytestmark = pytest.mark.slow

# Bytes of shared memory that one program may use, by compute capability.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MAX_REGISTERS = 255
# The first launch of each of these kernels is tested on sm_90 in the quick set. They do the work.
QUICK_KERNELS = {
    "value_reweight_head_tile",
    "value_reweight_candidates_tile",
    "sibling_attention",
}
QUICK_CAPABILITY = 90


@pytest.fixture(scope="module", autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
    yield
    triton.knobs.cache.reset()


def compilations() -> Iterator[object]:
    """Yield each launch with each architecture; most of them are slow."""
    remaining = set(QUICK_KERNELS)
    pairs = [(launch, capability) for capability in SHARED_BYTES for launch in launches()]
    for i, (launch, capability) in enumerate(pairs):
        is_quick = capability == QUICK_CAPABILITY and launch.name in remaining
        if is_quick:
            remaining.remove(launch.name)
        marks = [] if is_quick else [pytest.mark.slow]
        name = f"{launch.name}-sm_{capability}-{i}"
        yield pytest.param(launch, capability, id=name, marks=marks)


@pytest.mark.parametrize(("launch", "capability"), list(compilations()))
def test_a_kernel_compiles_without_spills(launch: Launch, capability: int) -> None:
    compiled = resources(launch, capability)
    assert compiled.spills == 0
    assert compiled.registers <= MAX_REGISTERS
    assert compiled.shared_bytes <= SHARED_BYTES[capability]
    assert (compiled.tensor_core_instructions > 0) == launch.tensor_cores
