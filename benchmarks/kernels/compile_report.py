"""Compile every kernel for three generations of GPU and record its resources. Needs no GPU.

python benchmarks/kernels/compile_report.py
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks.record import record
from infer_align_kernels.compiled import Launch, launches, resources

CAPABILITIES = (80, 90, 100)


def compile_rows() -> list[dict[str, Any]]:
    """Compile each launch for each architecture and return a row per result."""
    lines = []
    for launch in launches():
        for capability in CAPABILITIES:
            if capability < launch.oldest:
                continue
            line = {
                "kernel": launch.name,
                "architecture": f"sm_{capability}",
                "logits_or_query": _input_type(launch),
                "num_warps": launch.num_warps,
                "num_stages": launch.num_stages,
                **asdict(resources(launch, capability)),
                "constants": dict(launch.constants),
            }
            print(line)
            lines.append(line)
    return lines


def _input_type(launch: Launch) -> str | None:
    """Return the Triton type of the kernel's main input, if it has one."""
    for name in ("logits", "query"):
        if name in launch.kernel.arg_names:
            return launch.types[name]
    return None


if __name__ == "__main__":
    path = record(
        "kernels_compile",
        baseline="none: a count of what the compiler made, no speed",
        seed=None,
        rows=compile_rows(),
        setup={
            "note": "compiled for the architecture without a GPU; nothing was run or timed on one",
            "no_seed": "nothing is drawn: the compiler gives the same for the same source",
        },
    )
    print(path)
