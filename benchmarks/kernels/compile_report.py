"""Registers, spills, shared memory and tensor-core instructions of every kernel on three generations of GPU. Needs none.

python benchmarks/kernels/compile_report.py
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks.record import record
from infer_align_kernels.compiled import launches, resources

CAPABILITIES = (80, 90, 100)


def rows() -> list[dict[str, Any]]:
    """One line per launch and architecture."""
    lines = []
    for launch in launches():
        for capability in CAPABILITIES:
            types = {
                name: launch.types[name]
                for name in ("logits", "query")
                if name in launch.kernel.arg_names
            }
            line = {
                "kernel": launch.name,
                "architecture": f"sm_{capability}",
                "logits_or_query": next(iter(types.values()), None),
                "num_warps": launch.num_warps,
                "num_stages": launch.num_stages,
                **asdict(resources(launch, capability)),
                "constants": dict(launch.constants),
            }
            print(line)
            lines.append(line)
    return lines


if __name__ == "__main__":
    setup = {
        "note": "compiled for the architecture without a GPU; nothing was run or timed on one",
        "no_seed": "nothing is drawn: the compiler gives the same for the same source",
    }
    print(
        record(
            "kernels_compile",
            baseline="none: a count of what the compiler made, no speed",
            seed=None,
            rows=rows(),
            setup=setup,
        )
    )
