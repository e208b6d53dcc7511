"""What a kernel becomes on an architecture: registers, spills, shared memory, tensor-core instructions. Needs no GPU."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infer_align_kernels.sibling_attention import triton as sibling_attention
from infer_align_kernels.value_reweight import candidates, head
from infer_align_kernels.value_reweight import triton as value_reweight

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True, slots=True)
class Launch:
    """One way a kernel is launched."""

    name: str
    kernel: Any
    types: Mapping[
        str, str
    ]  # argument -> Triton type; pointers are aligned, and the strides named in `aligned`
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    aligned: Sequence[str] = ()  # integers that are multiples of 16


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes of a multiprocessor."""

    registers: int  # per thread
    spills: int  # loads and stores of local memory in the machine code
    shared_bytes: int
    tensor_core_instructions: int


def resources(launch: Launch, capability: int) -> Resources:
    """Compile for compute capability 80, 90, 100 and read the machine code.

    Raises:
        RuntimeError: the disassembler that comes with Triton failed.
    """
    names = launch.kernel.arg_names
    signature = {
        name: "constexpr" if name in launch.constants else launch.types[name] for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in launch.aligned
    }
    source = ASTSource(
        launch.kernel, signature=signature, constexprs=dict(launch.constants), attrs=aligned
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = _dump("-res-usage", file.name), _dump("-sass", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump: no register count for {launch.name}: {usage[:200]}")
    return Resources(
        registers=int(registers[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared_bytes=int(binary.metadata.shared),
        tensor_core_instructions=len(
            re.findall(r"\b(?:HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|OMMA)\b", code)
        ),
    )


def _dump(option: str, path: str) -> str:
    done = subprocess.run(
        [str(CUOBJDUMP), option, path], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option}: {done.stderr.strip()}")
    return done.stdout


def launches() -> list[Launch]:
    """Every kernel as it is launched on a Llama-like model: 128,256 tokens, rank 128, bfloat16, 64 candidates, heads of 128."""
    return [*_value_reweight(), *_sibling_attention()]


def _value_reweight() -> list[Launch]:
    ops = value_reweight
    numbers = dict.fromkeys(("logits", "hidden", "weight", "bias"), "*bf16")
    singles = dict.fromkeys(
        ("beta", "temperature", "statistics", "out", "shifts", "values"), "*fp32"
    )
    whole = {
        "bitmask": "*i32",
        "seed": "*i64",
        "step": "*i32",
        "token_out": "*i64",
        "ids": "*i64",
        "masked": "*u8",
    }
    sizes = dict.fromkeys(
        ("B", "V", "M", "T", "K", "row_stride", "mask_stride", "out_stride"), "i32"
    )
    types = {**numbers, **singles, **whole, **sizes}
    rows = ("V", "row_stride", "out_stride")

    def launch(
        name: str,
        tiles: Any,
        constants: Mapping[str, Any],
        types: Mapping[str, str] = types,
        *,
        tensor_cores: bool = False,
    ) -> Launch:
        kernel = getattr(
            head if name.startswith("head") else candidates, f"value_reweight_{name}_kernel"
        )
        return Launch(
            f"value_reweight_{name}",
            kernel,
            types,
            constants,
            tiles.num_warps,
            tiles.num_stages,
            tensor_cores,
            rows,
        )

    masks = {"HAS_BITMASK": True}
    rank = {"R": 128, "HAS_BIAS": True}
    sparse = {"TOKENS": ops.CANDIDATES.tokens, "TAIL": candidates.PER_ROW.value}
    found = []
    for tiles, kind in ((ops.HEAD, "*bf16"), (ops.HEAD_FLOAT32, "*fp32")):
        typed = {**types, **dict.fromkeys(numbers, kind)}
        cut = {"TOKENS": tiles.tokens, "RANK": tiles.rank, **rank, **masks}
        found.append(
            launch(
                "head_tile",
                tiles,
                {**cut, "ROWS": tiles.rows, "UPCAST": False},
                typed,
                tensor_cores=kind == "*bf16",
            )
        )
        found.append(launch("head_pick", ops.PICK, {**cut, "TILES": 2048}, typed))
    return [
        *found,
        launch("shift", ops.SHIFT, {"SLOTS": 64, "SCATTER": False}),
        launch("shift", ops.SHIFT, {"SLOTS": 64, "SCATTER": True}),
        launch("apply", ops.CANDIDATES, sparse),
        launch("candidates_tile", ops.CANDIDATES, {**sparse, **masks}),
        launch("candidates_pick", ops.CANDIDATES, {**sparse, **masks, "TILES": 64}),
        launch("candidate_values", ops.GATHER, {"SLOTS": ops.GATHER.rows, "RANK": 128, **rank}),
    ]


def _sibling_attention() -> list[Launch]:
    kernel = sibling_attention.sibling_attention_kernel
    constants = ("QUERIES", "COLUMNS", "D", "DIM", "UPCAST")
    tensors = ("query", "prefix_keys", "prefix_values", "own_keys", "own_values", "out")
    strides = tuple(
        n for n in kernel.arg_names if n.endswith(("_row", "_head", "_sibling", "_column"))
    )
    found = []
    for queries, dim, kind, dtype in (
        (16, 64, "*bf16", torch.bfloat16),
        (32, 128, "*bf16", torch.bfloat16),
        (80, 128, "*bf16", torch.bfloat16),
        (80, 256, "*bf16", torch.bfloat16),
        (80, 128, "*fp32", torch.float32),
    ):
        tiles = sibling_attention.tiles(queries, dim, dtype)
        types = {
            **dict.fromkeys(kernel.arg_names, "i32"),
            **dict.fromkeys(tensors, kind),
            "lengths": "*i64",
            "scale": "fp32",
        }
        values = dict(zip(constants, (tiles.queries, tiles.columns, dim, dim, False), strict=True))
        half = kind == "*bf16"
        found.append(
            Launch(
                "sibling_attention",
                kernel,
                types,
                values,
                tiles.num_warps,
                tiles.num_stages,
                half,
                strides,
            )
        )
    return found
