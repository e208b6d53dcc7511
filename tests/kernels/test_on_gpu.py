"""Test the compiled kernels on a GPU: against the CPU reference, across batches, in CUDA graphs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from infer_align_kernels import (
    CandidateValues,
    HeadTable,
    HeadValues,
    PrefixTable,
    Sampled,
    SteeredRows,
    Workspace,
    add_head_values,
    reweight_logits,
    sibling_attention,
    sibling_attention_at,
    steer_logits,
    top_candidates,
    value_reweight,
)
from tests.kernels import cases
from tests.kernels.cases import DTYPES
from tests.kernels.test_sibling_attention import TOLERANCE, case
from tests.kernels.test_steer_logits import (
    RANKS,
    ROWS,
    definition,
    head_table,
    one_row,
    row_features,
    steered_rows,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"),
    pytest.mark.slow,
]


def to_gpu(value: Any) -> Any:
    """Copy tensors to the GPU, also those in dicts and in values."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, dict):
        return {name: to_gpu(entry) for name, entry in value.items()}
    if isinstance(value, (HeadValues, CandidateValues)):
        arguments = [to_gpu(getattr(value, field.name)) for field in fields(value)]
        return type(value)(*arguments)
    return value


def to_gpu_all(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Copy tensors to the GPU."""
    return tuple(tensor.cuda() for tensor in tensors)


def assert_close(result: Sampled, expected: Sampled) -> None:
    """Check for equal tokens, up to draws that fall on an edge of the cumulative sum."""
    is_equal = result.token.cpu() == expected.token
    # A draw falls on an edge about once in a hundred rows, so in few rows one may.
    different = int((~is_equal).sum())
    assert different <= max(1, len(is_equal) // 100)
    torch.testing.assert_close(result.logsumexp.cpu(), expected.logsumexp, atol=1e-4, rtol=1e-5)
    for name in ("logprob", "frozen_logprob"):
        numbers = getattr(result, name).cpu()[is_equal]
        expected_numbers = getattr(expected, name)[is_equal]
        torch.testing.assert_close(numbers, expected_numbers, atol=1e-3, rtol=1e-4)


@DTYPES
@pytest.mark.parametrize(
    ("rows", "vocabulary"), [(1, 32000), (3, 32001), (257, 1003), (65, 128256), (3, 151936)]
)
def test_value_reweighting_matches_the_cpu(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits = cases.logits(rows, vocabulary, dtype)
    head = cases.head(rows, vocabulary, 128, 2, dtype)
    candidates = cases.candidates(logits, 20, 2)
    beta = cases.strengths(rows, 2)
    cases.forbid(logits)
    options = cases.sampling(rows)
    for values in (head, candidates):
        expected = value_reweight(logits, values, beta, **options)
        result = value_reweight(logits.cuda(), to_gpu(values), beta.cuda(), **to_gpu(options))
        assert_close(result, expected)
    arguments = (candidates.token_ids, candidates.values, beta)
    expected_logits = reweight_logits(logits, *arguments)
    result = reweight_logits(logits.cuda(), *(tensor.cuda() for tensor in arguments))
    torch.testing.assert_close(result.cpu(), expected_logits, equal_nan=True, atol=1e-4, rtol=1e-5)


@DTYPES
# A part of the head is loaded once for all rows, or for each 64 of them: by values and by rank.
@pytest.mark.parametrize(("rows", "rank", "values"), [(1, 128, 1), (130, 40, 1), (65, 272, 2)])
def test_a_draw_by_a_head_of_any_rank_matches_the_cpu(
    rows: int, rank: int, values: int, dtype: torch.dtype
) -> None:
    logits = cases.logits(rows, 32001, dtype)
    head = cases.head(rows, 32001, rank, values, dtype)
    beta, options = cases.strengths(rows, values), cases.sampling(rows)
    expected = value_reweight(logits, head, beta, **options)
    result = value_reweight(logits.cuda(), to_gpu(head), beta.cuda(), **to_gpu(options))
    assert_close(result, expected)


# More candidates than are looked for at once, and than four warps hold.
@pytest.mark.parametrize("k", [1, 33, 200, 3000])
def test_a_draw_by_any_number_of_candidates_matches_the_cpu(k: int) -> None:
    logits = cases.logits(4, 32001)
    beta, options = cases.strengths(4, 2), cases.sampling(4)
    for tail in ("keep", "mask", torch.tensor([True, False, True, True])):
        candidates = cases.candidates(logits, k, 2, tail)
        expected = value_reweight(logits, candidates, beta, **options)
        result = value_reweight(logits.cuda(), to_gpu(candidates), beta.cuda(), **to_gpu(options))
        assert_close(result, expected)


@DTYPES
@pytest.mark.parametrize("values", [1, 2])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, values: int) -> None:
    logits = cases.logits(130, 32000, dtype)
    steering = (
        to_gpu(cases.head(130, 32000, 128, values, dtype)),
        to_gpu(cases.candidates(logits, 20, values)),
    )
    logits = logits.cuda()
    beta, sampling = cases.strengths(130, values).cuda(), to_gpu(cases.sampling(130))
    for each in steering:
        together = value_reweight(logits, each, beta, **sampling)
        for b in (0, 63, 64, 129):
            rows = slice(b, b + 1)
            row_sampling = cases.select_rows(sampling, rows)
            alone = value_reweight(logits[rows], of_rows(each, rows), beta[rows], **row_sampling)
            for field in fields(Sampled):
                assert torch.equal(getattr(alone, field.name), getattr(together, field.name)[rows])


def of_rows(values: HeadValues | CandidateValues, rows: slice) -> HeadValues | CandidateValues:
    if isinstance(values, HeadValues):
        return HeadValues(values.hidden[rows], values.weight, values.bias)
    return CandidateValues(values.token_ids[rows], values.values[:, rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_can_be_captured_in_a_graph(dtype: torch.dtype) -> None:
    logits = cases.logits(8, 32000, dtype)
    steering = (
        to_gpu(cases.head(8, 32000, 128, 1, dtype)),
        to_gpu(cases.candidates(logits, 20, 1)),
    )
    logits = logits.cuda()
    beta, sampling = cases.strengths(8, 1).cuda(), to_gpu(cases.sampling(8))
    for values in steering:
        expected = value_reweight(logits, values, beta, **sampling)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = value_reweight(logits, values, beta, **sampling)
        graph.replay()
        assert torch.equal(captured.token, expected.token)
        sampling["uniform"].copy_(torch.rand(8, dtype=torch.float64))
        graph.replay()
        expected = value_reweight(logits, values, beta, **sampling)
        assert torch.equal(captured.token, expected.token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 4, 2, 5, 70, 24), (4, 32, 8, 20, 513, 128), (2, 8, 1, 64, 300, 256), (2, 4, 4, 4, 0, 64)],
    ids=str,
)
def test_sibling_attention_matches_the_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = case(*shape, dtype)
    result = sibling_attention(*(tensor.cuda() for tensor in inputs)).cpu()
    expected = sibling_attention(*inputs)
    torch.testing.assert_close(result, expected, atol=10 * TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [24, 64, 128])
def test_a_graph_of_sibling_attention_reads_the_prefix_that_its_table_points_to(
    dim: int, dtype: torch.dtype
) -> None:
    rows, columns = 5, 1500
    query, keys, values, own_keys, own_values, lengths = to_gpu_all(
        case(rows, 8, 2, 20, columns, dim, dtype)
    )
    table = PrefixTable(3, dim, dtype, query.device)
    capacity = 2048

    def attend() -> torch.Tensor:
        return sibling_attention_at(
            query, table, 2, own_keys, own_values, lengths, capacity, dim**-0.5
        )

    graph = torch.cuda.CUDAGraph()
    for used in (700, columns, 3):
        # Another length, and another place in memory.
        prefix = [each[:, :, -used:].contiguous() for each in (keys, values)]
        lengths.copy_(lengths.clamp(max=used))
        with table.pointing_to([prefix[0]] * 3, [prefix[1]] * 3):
            expected = attend()
            by_tensors = sibling_attention(query, *prefix, own_keys, own_values, lengths)
            torch.testing.assert_close(expected, by_tensors, atol=TOLERANCE[dtype], rtol=0)
            if used == 700:
                with torch.cuda.graph(graph):
                    captured = attend()
            graph.replay()
        assert torch.equal(captured, expected)


def by_sorting(logits: torch.Tensor, k: int) -> torch.Tensor:
    clean = logits.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return clean.sort(dim=1, descending=True, stable=True).indices[:, :k]


def equal_logits(rows: int, vocabulary: int) -> torch.Tensor:
    """Make rows of few different logits, some full of one, of -inf or of NaN."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (rows, vocabulary), generator=generator).float()
    for row, number in enumerate((2.5, -torch.inf, torch.nan)):
        logits[row] = number
    logits[3, ::2] = -0.0
    return logits


@DTYPES
@pytest.mark.parametrize(
    ("rows", "vocabulary", "k"),
    [(4, 70, 64), (300, 4097, 20), (65, 128256, 20), (4, 151936, 128), (4, 262144, 64)],
)
def test_the_top_candidates_are_those_of_a_stable_sort(
    rows: int, vocabulary: int, k: int, dtype: torch.dtype
) -> None:
    for logits in (cases.logits(rows, vocabulary, dtype), equal_logits(rows, vocabulary).to(dtype)):
        expected = by_sorting(logits, k)
        assert torch.equal(top_candidates(logits.cuda(), k).cpu(), expected)
        assert torch.equal(top_candidates(logits[2:3].cuda(), k).cpu(), expected[2:3])


def steering_on_gpu(vocabulary: int) -> tuple[torch.Tensor, HeadTable, SteeredRows]:
    """Return the features, the heads and the rows of test_steer_logits.py on the GPU."""
    heads = head_table(vocabulary)
    table = HeadTable([w.cuda() for w in heads.weights], [b.cuda() for b in heads.biases])
    rows = steered_rows(len(RANKS))
    on_gpu = SteeredRows(rows.table.cuda(), rows.k, has_likely=rows.has_likely)
    return row_features(sum(RANKS)).cuda(), table, on_gpu


@pytest.mark.parametrize("vocabulary", [700, 32001, 151936])
def test_steering_by_heads_matches_the_definition(vocabulary: int) -> None:
    frozen = cases.logits(ROWS, vocabulary)
    features, heads, rows = steering_on_gpu(vocabulary)
    expected = definition(
        frozen, row_features(sum(RANKS)), head_table(vocabulary), steered_rows(len(RANKS))
    )
    logits = frozen.cuda()
    steer_logits(logits, features, heads, rows, Workspace())
    np.testing.assert_allclose(logits.cpu().numpy(), expected, atol=1e-4)
    alone = frozen.cuda()
    for s in range(len(rows.table)):
        steer_logits(alone, features[s : s + 1], heads, one_row(rows, s), Workspace())
    assert torch.equal(alone.nan_to_num(), logits.nan_to_num())


def test_steering_by_heads_can_be_captured_in_a_graph() -> None:
    frozen = cases.logits(ROWS, 32001).cuda()
    features, heads, rows = steering_on_gpu(32001)
    expected = frozen.clone()
    workspace = Workspace()
    steer_logits(expected, features, heads, rows, workspace)
    logits = frozen.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steer_logits(logits, features, heads, rows, workspace)
    # A larger call of the same workspace does not disturb the graph.
    workspace.take(64, 4096, logits.device).fill_(-1)
    logits.copy_(frozen)
    graph.replay()
    assert torch.equal(logits.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "rank"), [(1, 128), (65, 128), (130, 40), (65, 272), (3, 5)])
def test_a_value_of_every_token_is_added(rows: int, rank: int, dtype: torch.dtype) -> None:
    logits = cases.logits(rows, 32001)
    head = cases.head(rows, 32001, rank, 1, dtype)
    hidden, weight = head.hidden[:, 0], head.weight[0]
    bias = torch.linspace(-1, 1, 32001)
    beta = cases.strengths(rows, 1)[:, 0]
    values = hidden.double() @ weight.double().T + bias
    expected = torch.where(beta[:, None] != 0, logits + beta[:, None] * values, logits.double())
    arguments = [tensor.cuda() for tensor in (hidden, weight, bias, beta)]
    result = add_head_values(logits.cuda(), *arguments).cpu().double()
    torch.testing.assert_close(result, expected, equal_nan=True, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_a_float32_head_of_any_magnitude_keeps_its_precision(magnitude: float) -> None:
    head = cases.head(70, 32001, 128, 1)
    spread = 10.0 ** torch.linspace(-3, 3, 128)
    hidden = head.hidden[:, 0] * magnitude * spread.flip(0)
    weight = head.weight[0] / magnitude * spread
    logits = torch.zeros(70, 32001).cuda()
    add_head_values(logits, hidden.cuda(), weight.cuda(), None, torch.ones(70).cuda())
    expected = hidden.double() @ weight.double().T
    scale = hidden.double().abs() @ weight.double().abs().T
    assert ((logits.cpu().double() - expected).abs() <= scale * 2.0**-21).all()
