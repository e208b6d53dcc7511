"""Value reweighting against eager torch and torch.compile, and against its floor.

python benchmarks/kernels/bench_value_reweight.py
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels.measure import CUDA, DEVICE, bandwidth, gate, row
from benchmarks.record import record
from infer_align_kernels import (
    CandidateValues,
    HeadValues,
    allocate_workspace,
    candidate_values,
    reweight_logits,
    top_candidates,
    value_reweight,
)

RANK = 128
SHAPES = (
    [(8, 128256), (32, 128256), (256, 128256), (512, 128256)]
    if CUDA
    else [(1, 32000), (8, 32000), (8, 128256), (32, 128256)]
)
K = (20, 64)
DTYPE = torch.bfloat16 if CUDA else torch.float32
SEED = 0


def eager_head(
    logits: torch.Tensor, head: HeadValues, beta: torch.Tensor, temperature: torch.Tensor
) -> Any:
    """What one writes without a kernel; one value."""
    q = head.hidden[:, 0] @ head.weight[0].T
    scores = (logits.float() + beta * q.float()) / temperature[:, None]
    logprobs = torch.log_softmax(scores, dim=-1)
    token = torch.multinomial(logprobs.exp(), 1)
    return (
        token,
        logprobs.gather(1, token),
        torch.log_softmax(logits.float() / temperature[:, None], dim=-1).gather(1, token),
    )


def eager_candidates(
    logits: torch.Tensor,
    ids: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
) -> Any:
    """The same for k candidates, the tail kept."""
    shift = beta * (values[0] - values[0].mean(dim=1, keepdim=True))
    scores = logits.float().scatter_add(1, ids, shift) / temperature[:, None]
    logprobs = torch.log_softmax(scores, dim=-1)
    token = torch.multinomial(logprobs.exp(), 1)
    return (
        token,
        logprobs.gather(1, token),
        torch.log_softmax(logits.float() / temperature[:, None], dim=-1).gather(1, token),
    )


def agrees(
    logits: torch.Tensor,
    values: HeadValues | CandidateValues,
    expected: torch.Tensor,
    common: dict[str, Any],
) -> None:
    """Refuse to measure where this device's result is not float64's. `expected`: scores over temperature, [B, V]."""
    got = value_reweight(logits, values, **common)
    logprob = torch.log_softmax(expected, dim=1).gather(1, got.token[:, None])[:, 0]
    worst = float((logprob - got.logprob).abs().max())
    if not worst < 1e-3:
        raise SystemExit(f"value_reweight: logprob off by {worst}; nothing is measured.")


def measured(rows: int, vocabulary: int, copy: float) -> list[dict[str, Any]]:
    g = torch.Generator(DEVICE).manual_seed(SEED)
    logits = (torch.randn(rows, vocabulary, generator=g, device=DEVICE) * 3).to(DTYPE)
    head = HeadValues(
        torch.randn(rows, 1, RANK, generator=g, device=DEVICE).to(DTYPE),
        (torch.randn(1, vocabulary, RANK, generator=g, device=DEVICE) * RANK**-0.5).to(DTYPE),
    )
    beta, temperature = torch.ones(rows, 1, device=DEVICE), torch.full((rows,), 0.8, device=DEVICE)
    seed, step = (
        torch.arange(rows, device=DEVICE),
        torch.zeros(rows, dtype=torch.int32, device=DEVICE),
    )
    space = allocate_workspace(rows, vocabulary, DEVICE) if CUDA else None
    common = {
        "beta": beta,
        "temperature": temperature,
        "seed": seed,
        "step": step,
        "workspace": space,
    }
    q = torch.einsum("bmr,mvr->bv", head.hidden.double(), head.weight.double())
    agrees(logits, head, (logits.double() + q) / 0.8, common)
    size = logits.element_size()
    shape = {"op": "head", "B": rows, "V": vocabulary, "M": 1, "r": RANK}
    variants = {
        "ours": lambda: value_reweight(logits, head, **common),
        "eager": lambda: eager_head(logits, head, beta, temperature),
    }
    if CUDA:
        compiled = torch.compile(eager_head)
        variants["compile"] = lambda: compiled(logits, head, beta, temperature)
    lines = [row(shape, variants, (logits.numel() + head.weight.numel()) * size, copy)]
    for k in K:
        ids = top_candidates(logits.float(), k)
        scored = candidate_values(ids, head.hidden, head.weight)
        given = CandidateValues(ids, scored)
        agrees(logits, given, reweight_logits(logits, ids, scored, beta).double() / 0.8, common)
        work = logits.float()
        variants = {
            "ours": lambda given=given: value_reweight(logits, given, **common),
            "eager": lambda ids=ids, scored=scored: eager_candidates(
                logits, ids, scored, beta, temperature
            ),
            "reweight_in_place": lambda ids=ids, scored=scored, work=work: reweight_logits(
                work, ids, scored, beta, out=work
            ),
            "candidate_values": lambda ids=ids: candidate_values(ids, head.hidden, head.weight),
            "top_candidates": lambda k=k: top_candidates(logits, k),
            "topk": lambda k=k: logits.topk(k),
        }
        if CUDA:
            sparse = torch.compile(eager_candidates)
            variants["compile"] = lambda ids=ids, scored=scored, sparse=sparse: sparse(
                logits, ids, scored, beta, temperature
            )
        lines.append(
            row(
                {"op": "candidates", "B": rows, "V": vocabulary, "M": 1, "k": k},
                variants,
                logits.numel() * size,
                copy,
            )
        )
    return lines


if __name__ == "__main__":
    gate("value_reweight")
    copy = bandwidth()
    rows = [line for shape in SHAPES for line in measured(*shape, copy)]
    setup = {
        "device": torch.cuda.get_device_name()
        if CUDA
        else "one CPU thread, the torch reference; no CUDA here",
        "dtype": str(DTYPE),
        "copy_bytes_per_s": round(copy),
    }
    baseline = "eager: head GEMM, softmax, multinomial, two logprobs" + (
        "; compile: the same through torch.compile"
        if CUDA
        else "; torch.compile is measured on CUDA only"
    )
    print(
        record(
            f"kernels_value_reweight_{DEVICE.type}",
            baseline=baseline,
            seed=SEED,
            rows=rows,
            setup=setup,
        )
    )
