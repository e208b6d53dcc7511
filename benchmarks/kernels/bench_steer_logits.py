"""Measure steering by heads in one call against the separate functions.

python benchmarks/kernels/bench_steer_logits.py
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

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
# About as many tokens of these random logits as K.
LOG_MIN_P = math.log(0.05)
TOLERANCE = 1e-3
# The calls that are measured steer the same logits again and again, and should not move them far.
MEASURED_STRENGTH = 1e-6


class Problem:
    """Random logits, heads and weights of a batch in which every row is steered."""

    def __init__(self, rows: int, heads: int, strength: float = 1.0) -> None:
        generator = torch.Generator(DEVICE).manual_seed(SEED)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=DEVICE)

        self.logits = random(rows, VOCABULARY) * 3
        self.weights = [random(VOCABULARY, RANK) * RANK**-0.5 for _ in range(heads)]
        self.biases = [random(VOCABULARY) for _ in range(heads)]
        self.features = random(rows, heads * RANK)
        self.beta = random(rows, heads) * strength
        self._table = HeadTable(self.weights, self.biases)
        self._workspace = Workspace()
        self._by_number = self._steered_rows(K)
        self._by_min_p = self._steered_rows(SteeredRows.LIKELY)

    def _steered_rows(self, count: int) -> SteeredRows:
        rows = len(self.logits)
        record = torch.zeros((rows, SteeredRows.COLUMNS), dtype=torch.int32, device=DEVICE)
        record[:, 0] = torch.arange(rows)
        record[:, 1] = count
        record[:, 3] = torch.full((rows,), LOG_MIN_P, device=DEVICE).view(torch.int32)
        table = torch.cat([record, self.beta.view(torch.int32)], dim=1)
        return SteeredRows(table, max(count, 0), has_likely=count == SteeredRows.LIKELY)

    def fused(self) -> torch.Tensor:
        """Steer the largest logits with one call."""
        steer_logits(self.logits, self.features, self._table, self._by_number, self._workspace)
        return self.logits

    def separate(self) -> torch.Tensor:
        """Steer the largest logits with a call for each step."""
        ids = top_candidates(self.logits, K)
        values = []
        for m, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            features = self._features_of(m)[:, None].contiguous()
            values.append(candidate_values(ids, features, weight[None], bias[None])[0])
        return reweight_logits(self.logits, ids, torch.stack(values), self.beta, out=self.logits)

    def fused_likely(self) -> torch.Tensor:
        """Steer the likely tokens with one call."""
        steer_logits(self.logits, self.features, self._table, self._by_min_p, self._workspace)
        return self.logits

    def separate_likely(self) -> torch.Tensor:
        """Steer the likely tokens with products over the whole vocabulary."""
        shift = torch.zeros_like(self.logits)
        for m, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values = torch.addmm(bias[None], self._features_of(m), weight.T)
            shift += self.beta[:, m, None] * values
        likely = self.logits >= self.logits.amax(dim=1, keepdim=True) + LOG_MIN_P
        total = torch.where(likely, shift, 0.0).sum(dim=1, keepdim=True)
        mean = total / likely.sum(dim=1, keepdim=True)
        self.logits.copy_(torch.where(likely, self.logits + (shift - mean), self.logits))
        return self.logits

    def _features_of(self, m: int) -> torch.Tensor:
        return self.features[:, m * RANK : (m + 1) * RANK]


Steer = Callable[[Problem], torch.Tensor]
FORMS: dict[str, tuple[Steer, Steer]] = {
    "top_k": (Problem.fused, Problem.separate),
    "min_p": (Problem.fused_likely, Problem.separate_likely),
}


def check_agreement(rows: int, heads: int, form: str) -> None:
    """Exit if the fused call and the separate ones disagree."""
    fused, separate = FORMS[form]
    error = float((fused(Problem(rows, heads)) - separate(Problem(rows, heads))).abs().max())
    if not error < TOLERANCE:
        raise SystemExit(
            f"steer_logits, {form}: differs from the separate calls by {error}; must be below "
            f"{TOLERANCE}. Nothing is measured."
        )


def measure_shape(rows: int, heads: int, bandwidth: float) -> Rows:
    """Measure one batch size and return a row for each form of steering."""
    measured = []
    for form, (fused, separate) in FORMS.items():
        check_agreement(rows, heads, form)
        problem = Problem(rows, heads, MEASURED_STRENGTH)
        shape = {"op": form, "B": rows, "V": VOCABULARY, "k": K, "M": heads, "r": RANK}
        variants = {"ours": partial(fused, problem), "separate": partial(separate, problem)}
        measured.append(measure_row(shape, variants, problem.logits.nbytes, bandwidth))
    return measured


def main() -> None:
    """Measure all shapes and write the results."""
    record_shapes(
        "steer_logits",
        "separate: top_candidates, candidate_values per head, reweight_logits in place; for min_p, "
        "products over the vocabulary",
        list(itertools.product(CUDA_ROWS if CUDA else CPU_ROWS, HEADS)),
        measure_shape,
    )


if __name__ == "__main__":
    main()
