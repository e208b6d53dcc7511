"""Measure steering by heads in one call against the separate functions.

python benchmarks/kernels/bench_steer_logits.py
"""

from __future__ import annotations

import itertools

import torch

from benchmarks.kernels.measure import (
    CUDA,
    DEVICE,
    SEED,
    Rows,
    measure_row,
    record_shapes,
)
from infer_align_kernels import (
    HeadTable,
    SteeredRows,
    Workspace,
    candidate_values,
    reweight_logits,
    steer_logits,
    top_candidates,
)

VOCABULARY = 128_256
RANK = 128
K = 20
CUDA_ROWS = (256, 32, 1, 512, 8, 128, 64)
CPU_ROWS = (1, 8)
HEADS = (1, 4)
TOLERANCE = 1e-3


class Problem:
    """Random logits, heads and weights of a batch in which every row is steered."""

    def __init__(self, rows: int, heads: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(SEED)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=DEVICE)

        self.logits = random(rows, VOCABULARY) * 3
        self.weights = [random(VOCABULARY, RANK) * RANK**-0.5 for _ in range(heads)]
        self.biases = [random(VOCABULARY) for _ in range(heads)]
        self.features = random(rows, heads * RANK)
        self.beta = random(rows, heads)
        self._table = HeadTable(self.weights, self.biases)
        record = torch.zeros((rows, SteeredRows.COLUMNS), dtype=torch.int32, device=DEVICE)
        record[:, 0] = torch.arange(rows)
        record[:, 1] = K
        self._rows = SteeredRows(torch.cat([record, self.beta.view(torch.int32)], dim=1), K)
        self._workspace = Workspace()

    def fused(self) -> torch.Tensor:
        """Steer with one call."""
        steer_logits(self.logits, self.features, self._table, self._rows, self._workspace)
        return self.logits

    def separate(self) -> torch.Tensor:
        """Steer with a call for each step."""
        ids = top_candidates(self.logits, K)
        values = []
        for m, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            features = self.features[:, None, m * RANK : (m + 1) * RANK].contiguous()
            values.append(candidate_values(ids, features, weight[None], bias[None])[0])
        return reweight_logits(self.logits, ids, torch.stack(values), self.beta, out=self.logits)


def check_agreement(rows: int, heads: int) -> None:
    """Exit if the fused call and the separate ones disagree."""
    one, other = Problem(rows, heads), Problem(rows, heads)
    error = float((one.fused() - other.separate()).abs().max())
    if not error < TOLERANCE:
        raise SystemExit(
            f"steer_logits: differs from the separate calls by {error}; must be below "
            f"{TOLERANCE}. Nothing is measured."
        )


def measure_shape(rows: int, heads: int, bandwidth: float) -> Rows:
    """Measure one batch size and return its row, as the only one."""
    check_agreement(rows, heads)
    problem = Problem(rows, heads)
    shape = {"B": rows, "V": VOCABULARY, "k": K, "M": heads, "r": RANK}
    variants = {"ours": problem.fused, "separate": problem.separate}
    return [measure_row(shape, variants, problem.logits.nbytes, bandwidth)]


def main() -> None:
    """Measure all shapes and write the results."""
    record_shapes(
        "steer_logits",
        "separate: top_candidates, candidate_values per head, reweight_logits in place",
        list(itertools.product(CUDA_ROWS if CUDA else CPU_ROWS, HEADS)),
        measure_shape,
    )


if __name__ == "__main__":
    main()
