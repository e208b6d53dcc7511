"""Compile every kernel for three generations of GPU, without a GPU.

No kernel may spill registers, and kernels with products must use tensor cores. Every launch is
compiled for sm_90. One launch of each kernel with tensor cores is compiled for the others, whose
instructions for them differ. `benchmarks/kernels/compile_report.py` compiles all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import triton

from infer_align_kernels.compiled import Launch, launches, resources

pytestmark = pytest.mark.slow

# Bytes of shared memory that one program may use, by compute capability.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MAX_REGISTERS = 255
# The compute capability for which every launch is compiled.
EVERY_LAUNCH = 90


@pytest.fixture(scope="module", autouse=True)
def binaries(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Keep the compiled code: what has not changed since an earlier run is not compiled again."""
    # The cache of pytest can be switched off.
    cache: pytest.Cache | None = getattr(request.config, "cache", None)
    folder = tmp_path_factory.mktemp("triton") if cache is None else cache.mkdir("triton")
    triton.knobs.cache.dir = str(folder)
    yield
    triton.knobs.cache.reset()


def compilations() -> Iterator[object]:
    """Yield each launch with the architectures for which it is compiled here."""
    kernels: set[object] = set()
    for i, launch in enumerate(launches()):
        name = (launch.name, launch.oldest, launch.constants.get("IS_SPLIT"))
        differs = launch.tensor_cores and name not in kernels
        kernels.add(name)
        for capability in SHARED_BYTES:
            is_launched = capability >= launch.oldest
            if is_launched and (differs or capability == EVERY_LAUNCH):
                yield pytest.param(launch, capability, id=f"{launch.name}-sm_{capability}-{i}")


@pytest.mark.parametrize(("launch", "capability"), list(compilations()))
def test_a_kernel_compiles_without_spills(launch: Launch, capability: int) -> None:
    compiled = resources(launch, capability)
    assert compiled.spills == 0
    assert compiled.registers <= MAX_REGISTERS
    assert compiled.shared_bytes <= SHARED_BYTES[capability]
    assert (compiled.tensor_core_instructions > 0) == launch.tensor_cores


def test_a_kernel_is_compiled_without_a_warning() -> None:
    # A warning would be an error in the tests that run on a GPU.
    code = (
        "from infer_align_kernels.compiled import launches, resources; resources(launches()[0], 90)"
    )
    environment = {**os.environ, "TRITON_ALWAYS_COMPILE": "1"}
    environment.pop("TRITON_DEFAULT_FP_FUSION", None)
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "FP_FUSION" not in process.stderr
