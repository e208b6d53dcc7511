"""Compile each kernel for a GPU architecture and report its use of the hardware. Needs no GPU.

The report has registers, spills, shared memory and tensor-core instructions.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infer_align_kernels.sibling_attention import triton as sibling_attention
from infer_align_kernels.steer_logits import likely, weighing
from infer_align_kernels.steer_logits import triton as steer_logits
from infer_align_kernels.top_candidates import MAX_CANDIDATES
from infer_align_kernels.top_candidates import triton as top_candidates
from infer_align_kernels.value_reweight import MAX_SLOTS, candidates, head
from infer_align_kernels.value_reweight import triton as value_reweight

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Local memory of a thread, where spilled registers go.
LOCAL_BYTES = re.compile(r"\b(?:STACK|LOCAL):(\d+)")
# The instructions of PTX that become those of tensor cores.
MATRIX_PRODUCT = re.compile(r"\b(?:mma|wgmma|tcgen05)\b")
SPILL = re.compile(r"\b(?:STL|LDL)\b")
TENSOR_CORE_INSTRUCTION = re.compile(r"\b(?:HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|OMMA)\b")
THREADS_PER_WARP = 32


@dataclass(frozen=True, slots=True)
class Launch:
    """One way to launch a kernel.

    Attributes:
        name: for people; launches of one kernel may share it.
        kernel: the Triton function.
        types: Triton type of each argument. Pointers count as aligned.
        constants: compile-time arguments.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
        tensor_cores: True if the kernel should use tensor cores.
        aligned: integer arguments that are multiples of 16.
        oldest: lowest compute capability for which it is launched.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    aligned: Sequence[str] = ()
    oldest: int = 80


@dataclass(frozen=True, slots=True)
class Resources:
    """The hardware resources of one compiled kernel.

    Attributes:
        registers: per thread.
        spills: number of instructions that load or store local memory.
        shared_bytes: shared memory per program.
        tensor_core_instructions: number of them.
    """

    registers: int
    spills: int
    shared_bytes: int
    tensor_core_instructions: int


def resources(launch: Launch, capability: int) -> Resources:
    """Compile a launch and read its machine code.

    Args:
        launch: from `launches`.
        capability: CUDA compute capability: 80, 90 or 100.

    Raises:
        RuntimeError: the disassembler that is part of Triton failed.
    """
    binary = triton.compile(
        _source(launch),
        target=GPUTarget("cuda", capability, THREADS_PER_WARP),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _disassemble("-res-usage", file.name)
        # To disassemble takes longer than to compile: only for code that has what is counted.
        has_spills = any(map(int, LOCAL_BYTES.findall(usage)))
        has_products = MATRIX_PRODUCT.search(binary.asm["ptx"]) is not None
        code = _disassemble("-sass", file.name) if has_spills or has_products else ""
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump: no register count for {launch.name}: {usage[:200]}")
    return Resources(
        registers=int(registers[1]),
        spills=len(SPILL.findall(code)),
        shared_bytes=int(binary.metadata.shared),
        tensor_core_instructions=len(TENSOR_CORE_INSTRUCTION.findall(code)),
    )


def _source(launch: Launch) -> ASTSource:
    signature = {}
    attributes = {}
    for i, name in enumerate(launch.kernel.arg_names):
        signature[name] = "constexpr" if name in launch.constants else launch.types[name]
        is_aligned = name in launch.aligned and name not in launch.constants
        if signature[name].startswith("*") or is_aligned:
            attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(
        launch.kernel, signature=signature, constexprs=dict(launch.constants), attrs=attributes
    )


def _disassemble(option: str, path: str) -> str:
    # The command is Triton's own disassembler, and its file is ours.
    process = subprocess.run(  # noqa: S603
        [str(CUOBJDUMP), option, path], capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise RuntimeError(f"cuobjdump {option}: {process.stderr.strip()}")
    return process.stdout


def launches() -> list[Launch]:
    """Return every kernel as it is launched for a Llama-like model.

    That is a vocabulary of 128,256 tokens, rank 128, bfloat16, 64 candidates, and heads of 128.
    Candidates are selected from 262,144 tokens too.
    """
    return [
        *_top_candidates_launches(),
        *_head_launches(),
        *_candidate_launches(),
        *_attention_launches(),
    ]


VOCABULARY = 128_256
# Vocabularies and candidates. The largest models of today have tiles of twice as many tokens.
CANDIDATE_COUNTS = (
    (VOCABULARY, 20),
    (VOCABULARY, 64),
    (VOCABULARY, MAX_CANDIDATES),
    (262_144, 20),
    (262_144, MAX_CANDIDATES),
)
TOP_CANDIDATES_TYPES = {
    "logits": "*fp32",
    **dict.fromkeys(("out", "addresses"), "*i64"),
    **dict.fromkeys(("features", "weights", "sums"), "*fp32"),
    **dict.fromkeys(("peaks", "records", "rows", "ranks"), "*i32"),
    **dict.fromkeys(("V", "N", "M", "K", "D", "row_stride", "record_stride"), "i32"),
}


def _top_candidates_launches() -> list[Launch]:
    peaks = top_candidates.tile_peaks_kernel
    tile = top_candidates.plan(VOCABULARY, 1).tile
    constants = {"TILE": tile, "TILES": top_candidates.BLOCK // tile, "HAS_RECORDS": True}
    made = [_top_candidates_launch(peaks, constants, top_candidates.PEAK_WARPS)]
    for vocabulary, k in CANDIDATE_COUNTS:
        cut = top_candidates.plan(vocabulary, k)
        constants = {"SLOTS": cut.slots, "TILE": cut.tile, "TILES": cut.tile_slots}
        kernel = top_candidates.top_candidates_kernel
        made.append(_top_candidates_launch(kernel, constants, cut.num_warps))
        steering = {**constants, "RANK": weighing.RANK, "FILL": steer_logits.FILL}
        kernel = steer_logits.steer_logits_kernel
        made.append(_top_candidates_launch(kernel, steering, cut.num_warps))
    return made + _likely_launches()


def _likely_launches() -> list[Launch]:
    made = []
    for vocabulary in sorted({vocabulary for vocabulary, _ in CANDIDATE_COUNTS}):
        cut = top_candidates.plan(vocabulary, 1)
        constants = {"TILE": cut.tile, "TILES": cut.tile_slots, "GROUP": likely.GROUP}
        constants["RANK"] = weighing.RANK
        sums = likely.steer_likely_sums_kernel
        made.append(_top_candidates_launch(sums, constants, likely.warps(cut)))
        groups = {"GROUPS": triton.next_power_of_2(likely.group_count(cut))}
        kernel = likely.steer_likely_kernel
        made.append(_top_candidates_launch(kernel, {**constants, **groups}, likely.warps(cut)))
    return made


def _top_candidates_launch(kernel: Any, constants: Mapping[str, Any], num_warps: int) -> Launch:
    return Launch(
        name=kernel.__name__.removesuffix("_kernel"),
        kernel=kernel,
        types=TOP_CANDIDATES_TYPES,
        constants=constants,
        num_warps=num_warps,
        num_stages=2,
        tensor_cores=False,
        aligned=("V", "row_stride"),
    )


# Types of the arguments of all value reweighting kernels.
VALUE_REWEIGHT_TYPES = {
    **dict.fromkeys(("logits", "hidden", "weight", "bias"), "*bf16"),
    **dict.fromkeys(("beta", "temperature", "statistics", "out", "shifts", "values"), "*fp32"),
    "candidate_logits": "*fp32",
    **dict.fromkeys(("token_out", "ids"), "*i64"),
    "uniform": "*fp64",
    **dict.fromkeys(("B", "V", "M", "T", "K", "N", "R", "row_stride", "out_stride"), "i32"),
    "parts": "*fp16",
    "scales": "*fp32",
    "masked": "*u8",
    "indices": "*i64",
}


def _value_reweight_launch(
    kernel: Any,
    tiles: value_reweight.Tiles,
    constants: Mapping[str, Any],
    *,
    float_type: str = "*bf16",
    tensor_cores: bool = False,
) -> Launch:
    float_arguments = dict.fromkeys(("logits", "hidden", "weight", "bias"), float_type)
    return Launch(
        name=kernel.__name__.removesuffix("_kernel"),
        kernel=kernel,
        types={**VALUE_REWEIGHT_TYPES, **float_arguments},
        constants=constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        tensor_cores=tensor_cores,
        aligned=("V", "R", "row_stride", "out_stride"),
    )


def _head_launches() -> list[Launch]:
    made = []
    for tiles, float_type, oldest in (
        (value_reweight.HEAD, "*bf16", 80),
        (value_reweight.HEAD, "*fp32", 90),
        (value_reweight.HEAD_IN_REGISTERS, "*fp32", 80),
    ):
        made += _product_launches(tiles, float_type, oldest)
    pick = value_reweight.PICK
    constants = {"TOKENS": pick.tokens, "TILES": 2048, "R": 128, "RANK": 128, "HAS_BIAS": True}
    kernel = head.value_reweight_head_pick_kernel
    for float_type in ("*bf16", "*fp32"):
        made.append(_value_reweight_launch(kernel, pick, constants, float_type=float_type))
    split = value_reweight.SPLIT
    constants = {"ROWS": split.rows, "RANK": 128}
    kernel = head.value_reweight_split_kernel
    made.append(_value_reweight_launch(kernel, split, constants, float_type="*fp32"))
    return made


def _product_launches(tiles: value_reweight.Tiles, float_type: str, oldest: int) -> list[Launch]:
    """Return the launches of the kernels that multiply by a head on tensor cores."""
    is_split = float_type == "*fp32"
    made = []
    for kernel, constants in (
        (head.value_reweight_head_tile_kernel, {"M": 1}),
        (head.value_reweight_add_head_kernel, {"HAS_INDICES": True}),
    ):
        constants |= {"ROWS": tiles.rows, "TOKENS": tiles.tokens, "R": 128, "RANK": tiles.rank}
        constants |= {"HAS_BIAS": True, "IS_SPLIT": is_split, "UPCAST": False}
        launch = _value_reweight_launch(
            kernel, tiles, constants, float_type=float_type, tensor_cores=True
        )
        types = {**launch.types, "hidden": "*fp16" if is_split else float_type}
        if kernel is head.value_reweight_add_head_kernel:
            # The logits are float32, whatever the head is.
            types["logits"] = "*fp32"
        made.append(replace(launch, types=types, oldest=oldest))
    return made


def _candidate_launches() -> list[Launch]:
    launch = _value_reweight_launch
    tiles = value_reweight.CANDIDATES
    shift = candidates.value_reweight_shift_kernel
    tile_constants = {"TOKENS": tiles.tokens, "GROUP": tiles.rows}
    pick_constants = {"TOKENS": tiles.tokens, "TILES": 256, "TAIL": candidates.PER_ROW.value}
    tile = candidates.value_reweight_candidates_tile_kernel
    pick = candidates.value_reweight_candidates_pick_kernel
    apply = value_reweight.APPLY
    apply_constants = {"TOKENS": apply.tokens, "TAIL": candidates.PER_ROW.value}
    gather = value_reweight.GATHER
    gather_constants = {"SLOTS": gather.rows, "RANK": 128, "R": 128, "HAS_BIAS": True}
    return [
        launch(shift, value_reweight.SHIFT, {"SLOTS": 64, "SCATTER": False}),
        launch(shift, value_reweight.SHIFT, {"SLOTS": 64, "SCATTER": True}),
        launch(shift, value_reweight.SHIFT, {"SLOTS": MAX_SLOTS, "SCATTER": True}),
        launch(candidates.value_reweight_apply_kernel, apply, apply_constants),
        *(
            launch(tile, value_reweight.candidates_tiles(slots), {**tile_constants, "SLOTS": slots})
            for slots in (value_reweight.MANY_SLOTS, MAX_SLOTS)
        ),
        launch(tile, tiles, {**tile_constants, "SLOTS": 32}),
        launch(tile, tiles, {**tile_constants, "SLOTS": 32}, float_type="*fp32"),
        launch(pick, value_reweight.CANDIDATES_PICK, pick_constants),
        launch(pick, value_reweight.CANDIDATES_PICK, pick_constants, float_type="*fp32"),
        launch(candidates.value_reweight_candidate_values_kernel, gather, gather_constants),
    ]


# Stacked queries per key head, numbers per head, dtype, and True for a prefix in parts.
ATTENTION_SHAPES = (
    (16, 64, torch.bfloat16, True),
    (32, 128, torch.bfloat16, True),
    (60, 128, torch.bfloat16, False),
    (80, 128, torch.bfloat16, False),
    (80, 128, torch.bfloat16, True),
    (512, 64, torch.bfloat16, False),
    (80, 256, torch.bfloat16, False),
    (80, 128, torch.float32, True),
)
ATTENTION_TENSORS = ("query", "prefix_keys", "prefix_values", "own_keys", "own_values", "out")
UNFINISHED = ("peaks", "totals", "parts")
ATTENTION_STRIDE_SUFFIXES = ("_row", "_head", "_sibling", "_column")


def _attention_launches() -> list[Launch]:
    made = []
    for queries, dim, dtype, is_split in ATTENTION_SHAPES:
        tiles = sibling_attention.tiles(queries, dim, dtype)
        for by_table in (False, True):
            made.append(_attention_launch(tiles, dim, dtype, is_split=is_split, by_table=by_table))
    merge = sibling_attention.sibling_attention_merge_kernel
    types = _attention_types(merge, torch.bfloat16)
    constants = {"QUERIES": sibling_attention.MERGED, "PART": 1024, "D": 128, "DIM": 128}
    name = "sibling_attention_merge"
    return [
        *made,
        Launch(name, merge, types, constants, num_warps=4, num_stages=3, tensor_cores=False),
    ]


def _attention_types(kernel: Any, dtype: torch.dtype) -> dict[str, str]:
    names = kernel.arg_names
    float_type = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    return {
        **dict.fromkeys(names, "i32"),
        **dict.fromkeys(ATTENTION_TENSORS, float_type),
        **dict.fromkeys(UNFINISHED, "*fp32"),
        "lengths": "*i64",
        "scale": "fp32",
    }


def _attention_launch(
    tiles: sibling_attention.AttentionTiles,
    dim: int,
    dtype: torch.dtype,
    *,
    is_split: bool,
    by_table: bool,
) -> Launch:
    kernel = sibling_attention.sibling_attention_kernel
    types = _attention_types(kernel, dtype)
    if by_table:
        types.update(prefix_keys="*i64", prefix_values="*i64")
    return Launch(
        name="sibling_attention",
        kernel=kernel,
        types=types,
        constants={
            "QUERIES": tiles.queries,
            "COLUMNS": tiles.columns,
            "D": dim,
            "DIM": dim,
            "PART": tiles.part,
            "IS_SPLIT": is_split,
            "UPCAST": False,
            "BY_TABLE": by_table,
            "UNIT": 16 if by_table else 1,
            "ALIGNED": by_table,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        tensor_cores=dtype == torch.bfloat16,
        aligned=[name for name in kernel.arg_names if name.endswith(ATTENTION_STRIDE_SUFFIXES)],
    )
