"""The numbers of instructions in the expected times are those of the compiled kernels.

Another version of Triton may compile a few instructions more or fewer.
"""

from __future__ import annotations

import re
import tempfile
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.gpu import attention_work, kernel_work
from infer_align_kernels import compiled

pytestmark = pytest.mark.slow

CAPABILITY = 90
TOLERANCE = 0.1
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
TARGET = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")


class Code:
    """The instructions of a compiled kernel.

    Attributes:
        count: number of all of them.
        loops: number in each loop, by the address where it begins; an inner loop is also a part of
            its outer one.
        outside: number outside of all loops.
        first_branch: number up to the place to which the first branch goes, with loops.
    """

    def __init__(self, launch: compiled.Launch) -> None:
        lines = {}
        for place, line in INSTRUCTION.findall(machine_code(launch)):
            if not line.startswith("NOP"):
                lines[int(place, 16)] = line
        bodies: list[set[int]] = []
        branches: list[int] = []
        for place, line in sorted(lines.items()):
            match = TARGET.search(line)
            if match is None:
                continue
            target = int(match[1], 16)
            branches.append(target)
            if target < place:
                bodies.append({each for each in lines if target <= each <= place})
        bodies.sort(key=min)
        self.count = len(lines)
        self.loops = [len(body) for body in bodies]
        self.outside = len(set(lines).difference(*bodies))
        self.first_branch = sum(place < branches[0] for place in lines)


def machine_code(launch: compiled.Launch) -> str:
    """Compile a launch without a GPU and return its machine code as text."""
    binary = triton.compile(
        compiled._source(launch),
        target=GPUTarget("cuda", CAPABILITY, compiled.THREADS_PER_WARP),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return compiled._disassemble("-sass", file.name)


def code(name: str, weight: str = "", **constants: Any) -> Code:
    """Return the code of the launch of this name, with these constants and this type of head."""
    for launch in compiled.launches():
        is_type = weight in {"", launch.types.get("weight")}
        if launch.name == name and is_type and constants.items() <= launch.constants.items():
            return Code(launch)
    raise AssertionError(f"no launch of {name} with {constants}")


def about(number: float) -> object:
    return pytest.approx(number, rel=TOLERANCE)


def test_top_k() -> None:
    assert code("tile_peaks").count == about(kernel_work.PEAKS)
    selection = code("top_candidates", SLOTS=32, TILE=64)
    assert sum(selection.loops) == about(kernel_work.SELECTION_LOOPS)
    assert selection.outside == about(kernel_work.SELECTION_OUTSIDE)


def test_steering() -> None:
    steering = code("steer_logits", SLOTS=32, TILE=64)
    tiles, candidates, *_, value, features, _fill = steering.loops
    assert tiles + candidates == about(kernel_work.STEERING_LOOPS)
    assert features == about(kernel_work.STEERING_FEATURES)
    assert value - features == about(kernel_work.STEERING_VALUE)
    assert steering.outside == about(kernel_work.STEERING_OUTSIDE)


@pytest.mark.parametrize(
    ("kernel", "numbers"),
    [
        ("steer_likely_sums", kernel_work.LIKELY_SUMS),
        ("steer_likely", kernel_work.LIKELY_ADD),
    ],
)
def test_steering_of_likely_tokens(kernel: str, numbers: tuple[int, ...]) -> None:
    likely = code(kernel, TILE=64)
    *_, tile, value, turn = likely.loops
    outside, per_tile, per_value, per_turn = numbers
    assert likely.outside == about(outside)
    assert tile - value == about(per_tile)
    assert value - turn == about(per_value)
    assert turn == about(per_turn)


@pytest.mark.parametrize(
    ("kernel", "weight", "numbers"),
    [
        ("value_reweight_add_head", "*fp32", kernel_work.DENSE_FLOAT32),
        ("value_reweight_add_head", "*bf16", kernel_work.DENSE_BFLOAT16),
        ("value_reweight_head_tile", "*fp32", kernel_work.HEAD_FLOAT32),
        ("value_reweight_head_tile", "*bf16", kernel_work.HEAD_BFLOAT16),
    ],
)
def test_a_product_with_a_head(kernel: str, weight: str, numbers: tuple[int, int]) -> None:
    product = code(kernel, weight, RANK=kernel_work.RANK)
    outside, turn = numbers
    assert product.outside == about(outside)
    assert product.loops == [about(turn)]


def test_the_draw_by_a_head() -> None:
    pick = code("value_reweight_head_pick", "*fp32")
    assert pick.count == about(kernel_work.HEAD_PICK_FLOAT32)
    assert code("value_reweight_head_pick", "*bf16").count == about(kernel_work.HEAD_PICK_BFLOAT16)
    assert code("value_reweight_split").count == about(kernel_work.SPLIT)


def test_the_draw_by_candidates() -> None:
    for weight, number in (
        ("*fp32", kernel_work.CANDIDATES_TILE_FLOAT32),
        ("*bf16", kernel_work.CANDIDATES_TILE_BFLOAT16),
    ):
        tile = code("value_reweight_candidates_tile", weight, SLOTS=32)
        looks, found, *_ = tile.loops
        assert found == about(kernel_work.CANDIDATES_FOUND)
        assert looks - found == about(kernel_work.CANDIDATES_LOOK)
        # The other branch writes the logits of the candidates, and its code comes later.
        assert tile.first_branch - looks == about(number)
    assert code("value_reweight_candidates_pick").count == about(kernel_work.CANDIDATES_PICK)


@pytest.mark.parametrize("shape", [attention_work.SHAPES[0], attention_work.SHAPES[2]])
def test_a_step_of_sibling_attention(shape: attention_work.Shape) -> None:
    version = attention_work.present(shape)
    attention = code("sibling_attention", QUERIES=version.queries, DIM=shape.dim, IS_SPLIT=False)
    assert attention.loops == [about(version.instructions)]
