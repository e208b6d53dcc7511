"""What only a GPU can show: the compiled kernels against the CPU reference, bit-equality across batches, CUDA graphs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from infer_align_kernels import (
    CandidateValues,
    HeadValues,
    Sampled,
    allocate_workspace,
    reweight_logits,
    sibling_attention,
    value_reweight,
)
from tests.kernels import cases
from tests.kernels.test_sibling_attention import TOLERANCE, case

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"),
    pytest.mark.slow,
]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def on_gpu(thing: Any) -> Any:
    if isinstance(thing, torch.Tensor):
        return thing.cuda()
    if isinstance(thing, (HeadValues, CandidateValues)):
        return type(thing)(*(on_gpu(getattr(thing, f.name)) for f in fields(thing)))
    return {k: on_gpu(v) for k, v in thing.items()} if isinstance(thing, dict) else thing


def assert_same(got: Sampled, expected: Sampled) -> None:
    """Equal tokens, up to draws that fall on an edge of the cumulative sum."""
    same = got.token.cpu() == expected.token
    assert float(same.float().mean()) > 0.99
    torch.testing.assert_close(got.logsumexp.cpu(), expected.logsumexp, atol=1e-4, rtol=1e-5)
    for name in ("logprob", "frozen_logprob"):
        torch.testing.assert_close(
            getattr(got, name).cpu()[same], getattr(expected, name)[same], atol=1e-3, rtol=1e-4
        )


@DTYPES
@pytest.mark.parametrize(
    ("rows", "vocabulary"), [(1, 32000), (3, 32001), (257, 1003), (65, 128256), (3, 151936)]
)
def test_value_reweight(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits, head = (
        cases.logits(rows, vocabulary, dtype),
        cases.head(rows, vocabulary, 128, 2, dtype),
    )
    given = cases.candidates(logits, 20, 2)
    beta, sampling, mask = (
        cases.strengths(rows, 2),
        cases.sampling(rows),
        cases.bitmask(rows, vocabulary),
    )
    for values in (head, given):
        expected = value_reweight(logits, values, beta, **sampling, bitmask=mask)
        assert_same(
            value_reweight(
                logits.cuda(), on_gpu(values), beta.cuda(), **on_gpu(sampling), bitmask=mask.cuda()
            ),
            expected,
        )
    arguments = (given.token_ids, given.values, beta)
    expected_logits = reweight_logits(logits, *arguments)
    got = reweight_logits(logits.cuda(), *(a.cuda() for a in arguments))
    torch.testing.assert_close(got.cpu(), expected_logits, equal_nan=True, atol=1e-4, rtol=1e-5)


@DTYPES
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    logits, head = (
        cases.logits(130, 32000, dtype).cuda(),
        on_gpu(cases.head(130, 32000, 128, 2, dtype)),
    )
    beta, sampling = cases.strengths(130, 2).cuda(), on_gpu(cases.sampling(130))
    together = value_reweight(logits, head, beta, **sampling)
    for b in (0, 63, 64, 129):
        one = slice(b, b + 1)
        part = HeadValues(head.hidden[one], head.weight, head.bias)
        alone = value_reweight(
            logits[one], part, beta[one], **{k: v[one] for k, v in sampling.items()}
        )
        for f in fields(Sampled):
            assert torch.equal(getattr(alone, f.name), getattr(together, f.name)[one])


def test_it_can_be_captured_in_a_graph() -> None:
    logits, head = (
        cases.logits(8, 32000, torch.bfloat16).cuda(),
        on_gpu(cases.head(8, 32000, 128, 1, torch.bfloat16)),
    )
    beta, sampling = cases.strengths(8, 1).cuda(), on_gpu(cases.sampling(8))
    space = allocate_workspace(8, 32000, "cuda")
    expected = value_reweight(logits, head, beta, **sampling, workspace=space)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = value_reweight(logits, head, beta, **sampling, workspace=space)
    graph.replay()
    assert torch.equal(got.token, expected.token)
    sampling["step"] += 1
    graph.replay()
    assert torch.equal(
        got.token, value_reweight(logits, head, beta, **sampling, workspace=space).token
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 4, 2, 5, 70, 24), (4, 32, 8, 20, 513, 128), (2, 8, 1, 64, 300, 256), (2, 4, 4, 4, 0, 64)],
    ids=str,
)
def test_sibling_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = case(*shape, dtype)
    got = sibling_attention(*(t.cuda() for t in given)).cpu()
    torch.testing.assert_close(got, sibling_attention(*given), atol=10 * TOLERANCE[dtype], rtol=0)
