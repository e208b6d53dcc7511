"""Measure value reweighting against eager torch and torch.compile.

python benchmarks/kernels/bench_value_reweight.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.kernels.measure import (
    CUDA,
    DEVICE,
    DTYPE,
    SEED,
    Rows,
    measure_row,
    record_shapes,
)
from infer_align_kernels import (
    CandidateValues,
    HeadValues,
    add_head_values,
    candidate_values,
    reweight_logits,
    top_candidates,
    value_reweight,
)

RANK = 128
# B, V and the dtype of logits and head. The embedded engine's are float32.
CUDA_SHAPES = [
    (256, 128256, torch.float32),
    (256, 128256, torch.bfloat16),
    (32, 128256, torch.float32),
    (8, 128256, torch.float32),
    (512, 128256, torch.float32),
    (32, 128256, torch.bfloat16),
    (8, 128256, torch.bfloat16),
    (512, 128256, torch.bfloat16),
]
CPU_SHAPES = [(1, 32000, DTYPE), (8, 32000, DTYPE), (8, 128256, DTYPE), (32, 128256, DTYPE)]
# torch.compile takes seconds for each shape.
COMPILED_ROWS = 256
CANDIDATES = (20, 64)
TEMPERATURE = 0.8
TOLERANCE = 1e-3

Variants = dict[str, Callable[[], Any]]


def eager_head(
    logits: torch.Tensor, head: HeadValues, beta: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Steer by a head with one value and sample, as written without a kernel."""
    q = head.hidden[:, 0] @ head.weight[0].T
    return eager_sample(logits, logits.float() + beta * q.float(), temperature)


def eager_candidates(
    logits: torch.Tensor,
    ids: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Steer by the values of k candidates with the tail kept, and sample."""
    shift = beta * (values[0] - values[0].mean(dim=1, keepdim=True))
    return eager_sample(logits, logits.float().scatter_add(1, ids, shift), temperature)


def eager_sample(
    logits: torch.Tensor, steered: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Sample a token per row. -> the token, its logprob, and its logprob under the frozen model."""
    logprobs = torch.log_softmax(steered / temperature[:, None], dim=-1)
    token = torch.multinomial(logprobs.exp(), 1)
    frozen_logprobs = torch.log_softmax(logits.float() / temperature[:, None], dim=-1)
    return token, logprobs.gather(1, token), frozen_logprobs.gather(1, token)


class Problem:
    """Random logits, a head with one value, and the sampling arguments of a batch."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype) -> None:
        generator = torch.Generator(DEVICE).manual_seed(SEED)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=DEVICE)

        self.shape = {"B": rows, "V": vocabulary, "dtype": str(dtype), "M": 1}
        self.is_compiled = CUDA and rows == COMPILED_ROWS
        self.logits = (random(rows, vocabulary) * 3).to(dtype)
        hidden = random(rows, 1, RANK).to(dtype)
        weight = (random(1, vocabulary, RANK) * RANK**-0.5).to(dtype)
        self.head = HeadValues(hidden, weight)
        self.beta = torch.ones(rows, 1, device=DEVICE)
        self.temperature = torch.full((rows,), TEMPERATURE, device=DEVICE)
        self._uniform = torch.rand(rows, dtype=torch.float64, device=DEVICE)

    def sample(self, values: HeadValues | CandidateValues) -> Any:
        """Call the measured op."""
        return value_reweight(
            self.logits,
            values,
            self.beta,
            temperature=self.temperature,
            uniform=self._uniform,
        )

    def check_agreement(self, values: HeadValues | CandidateValues, expected: torch.Tensor) -> None:
        """Exit if the op disagrees with the expected steered logits. expected: [B, V] float64."""
        result = self.sample(values)
        expected_logprobs = torch.log_softmax(expected / TEMPERATURE, dim=1)
        expected_logprob = expected_logprobs.gather(1, result.token[:, None])[:, 0]
        error = float((expected_logprob - result.logprob).abs().max())
        if not error < TOLERANCE:
            raise SystemExit(
                f"value_reweight: a logprob is off by {error}; must be below {TOLERANCE}. "
                "Nothing is measured."
            )


def measure_head(problem: Problem, bandwidth: float) -> dict[str, Any]:
    """Measure steering by a head over all tokens."""
    logits, head = problem.logits, problem.head
    beta, temperature = problem.beta, problem.temperature
    q = torch.einsum("bmr,mvr->bv", head.hidden.double(), head.weight.double())
    problem.check_agreement(head, logits.double() + q)
    variants: Variants = {
        "ours": lambda: problem.sample(head),
        "eager": lambda: eager_head(logits, head, beta, temperature),
    }
    if problem.is_compiled:
        compiled = torch.compile(eager_head)
        variants["compile"] = lambda: compiled(logits, head, beta, temperature)
    shape = {"op": "head", **problem.shape, "r": RANK}
    moved_bytes = (logits.numel() + head.weight.numel()) * logits.element_size()
    return measure_row(shape, variants, moved_bytes, bandwidth)


def eager_dense(
    logits: torch.Tensor, head: HeadValues, centre: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Add a head's centred values to all logits in place, as written without a kernel."""
    q = head.hidden[:, 0] @ head.weight[0].T
    return logits.add_(beta * (q.float() - centre[:, None]))


def measure_dense(problem: Problem, bandwidth: float) -> dict[str, Any]:
    """Measure a head that steers every token in place. The logits are float32."""
    logits, head, beta = problem.logits.float(), problem.head, problem.beta
    hidden, weight = head.hidden[:, 0], head.weight[0]
    centre = (hidden.double() @ weight.double().mean(dim=0)).float()

    def ours() -> torch.Tensor:
        return add_head_values(logits, hidden, weight, None, centre, beta[:, 0])

    values = hidden.double() @ weight.double().T - centre[:, None]
    expected = logits.double() + beta * values
    error = float((ours() - expected).abs().max())
    if not error < TOLERANCE:
        raise SystemExit(
            f"add_head_values: a logit is off by {error}; must be below {TOLERANCE}. "
            "Nothing is measured."
        )
    variants: Variants = {
        "ours": ours,
        "eager": lambda: eager_dense(logits, head, centre, beta),
    }
    if problem.is_compiled:
        compiled = torch.compile(eager_dense)
        variants["compile"] = lambda: compiled(logits, head, centre, beta)
    shape = {"op": "dense", **problem.shape, "r": RANK}
    return measure_row(shape, variants, 2 * logits.nbytes + weight.nbytes, bandwidth)


def measure_candidates(problem: Problem, k: int, bandwidth: float) -> dict[str, Any]:
    """Measure steering by k candidates, and each step of it."""
    logits, head = problem.logits, problem.head
    beta, temperature = problem.beta, problem.temperature
    ids = top_candidates(logits.float(), k)
    values = candidate_values(ids, head.hidden, head.weight)
    candidates = CandidateValues(ids, values)
    problem.check_agreement(candidates, reweight_logits(logits, ids, values, beta).double())
    work = logits.float()
    variants: Variants = {
        "ours": lambda: problem.sample(candidates),
        "eager": lambda: eager_candidates(logits, ids, values, beta, temperature),
        "reweight_in_place": lambda: reweight_logits(work, ids, values, beta, out=work),
        "candidate_values": lambda: candidate_values(ids, head.hidden, head.weight),
        "top_candidates": lambda: top_candidates(logits, k),
        "topk": lambda: logits.topk(k),
    }
    if problem.is_compiled:
        compiled = torch.compile(eager_candidates)
        variants["compile"] = lambda: compiled(logits, ids, values, beta, temperature)
    shape = {"op": "candidates", **problem.shape, "k": k}
    return measure_row(shape, variants, logits.numel() * logits.element_size(), bandwidth)


def measure_shape(rows: int, vocabulary: int, dtype: torch.dtype, bandwidth: float) -> Rows:
    """Measure all forms at one batch size, vocabulary and dtype."""
    problem = Problem(rows, vocabulary, dtype)
    lines = [measure_dense(problem, bandwidth), measure_head(problem, bandwidth)]
    for k in CANDIDATES:
        lines.append(measure_candidates(problem, k, bandwidth))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all shapes and write the results."""
    compiled = "torch.compile is measured on CUDA only"
    if CUDA:
        compiled = f"compile: the same through torch.compile, at B = {COMPILED_ROWS}"
    record_shapes(
        "value_reweight",
        f"eager: head GEMM, softmax, multinomial, two logprobs; dense: the GEMM and an addition; "
        f"{compiled}",
        CUDA_SHAPES if CUDA else CPU_SHAPES,
        measure_shape,
        arguments,
    )


if __name__ == "__main__":
    main()
