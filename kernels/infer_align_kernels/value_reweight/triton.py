"""Value reweighting in Triton: tile statistics in one read of the logits, then one small program per row that draws the token."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton

from infer_align_kernels.value_reweight import candidates as candidate_kernels
from infer_align_kernels.value_reweight import head as head_kernels
from infer_align_kernels.value_reweight.sampling import STATISTICS
from infer_align_kernels.value_reweight.types import CandidateValues, HeadValues, Sampled, Tail

# The interpreter multiplies the bits of bfloat16: there everything is widened first.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel is cut. The same for every batch size: a row's sums must not depend on its neighbours."""

    tokens: int
    rows: int = 1
    rank: int = 128
    num_warps: int = 4
    num_stages: int = 2


HEAD = Tiles(tokens=128, rows=64, rank=128, num_warps=8)
HEAD_FLOAT32 = Tiles(tokens=64, rows=16, rank=64, num_warps=4)
PICK = Tiles(tokens=128, num_warps=8)
CANDIDATES = Tiles(tokens=2048, num_warps=8)
SHIFT = Tiles(tokens=1, num_warps=4)
GATHER = Tiles(tokens=1, rows=16)


def value_reweight(
    logits: torch.Tensor,
    values: HeadValues | CandidateValues,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    bitmask: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> Sampled:
    """See `infer_align_kernels.value_reweight`."""
    rows, vocabulary = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    out = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
    if rows == 0:
        return Sampled(token, *out)
    _check_strides(logits, bitmask)
    size = workspace_size(rows, vocabulary)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=logits.device)
    elif workspace.numel() < size:
        raise ValueError(
            f"workspace: {workspace.numel()} numbers; must be {size} for {rows} rows of {vocabulary} tokens."
        )
    frozen = (logits, logits if bitmask is None else bitmask)
    strides = {
        "row_stride": logits.stride(0),
        "mask_stride": 0 if bitmask is None else bitmask.stride(0),
    }
    flags = {"HAS_BITMASK": bitmask is not None}
    rest = (beta.contiguous(), temperature.contiguous())
    drawn = (
        seed.to(torch.int64).contiguous(),
        step.to(torch.int32).contiguous(),
        workspace,
        token,
        out,
    )
    if isinstance(values, HeadValues):
        _sample_head(frozen, values, rest, drawn, strides, flags)
    else:
        _sample_candidates(frozen, values, rest, drawn, strides, flags)
    return Sampled(token, *out)


def _sample_head(
    frozen: Any,
    head: HeadValues,
    rest: Any,
    drawn: Any,
    strides: dict[str, int],
    flags: dict[str, bool],
) -> None:
    rows, vocabulary = frozen[0].shape
    count, _, rank = head.weight.shape
    tiles = head_tiles(head.weight.dtype)
    weight, hidden = head.weight.contiguous(), head.hidden.contiguous()
    given = (
        *frozen,
        hidden,
        weight,
        weight if head.bias is None else head.bias.contiguous(),
        *rest,
    )
    sizes = {"B": rows, "V": vocabulary, "M": count, **strides}
    shape = {
        "TOKENS": tiles.tokens,
        "R": rank,
        "RANK": min(tiles.rank, max(16, triton.next_power_of_2(rank))),
        "HAS_BIAS": head.bias is not None,
    }
    steps = triton.cdiv(vocabulary, tiles.tokens)
    head_kernels.value_reweight_head_tile_kernel[triton.cdiv(rows, tiles.rows), steps](
        *given,
        drawn[2],
        **sizes,
        **shape,
        **flags,
        ROWS=tiles.rows,
        UPCAST=INTERPRETED,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    head_kernels.value_reweight_head_pick_kernel[(rows,)](
        *given,
        *drawn,
        **sizes,
        **shape,
        **flags,
        T=steps,
        TILES=triton.next_power_of_2(steps),
        num_warps=PICK.num_warps,
    )


def _sample_candidates(
    frozen: Any,
    candidates: CandidateValues,
    rest: Any,
    drawn: Any,
    strides: dict[str, int],
    flags: dict[str, bool],
) -> None:
    logits = frozen[0]
    rows, vocabulary = logits.shape
    ids = candidates.token_ids.contiguous()
    shifts = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    _shift(logits, ids, candidates.values, rest[0], shifts, logits, scatter=False)
    tail, masked = _tail(candidates.tail, logits)
    given = (*frozen, ids, shifts, rest[0], masked, rest[1])
    sizes = {
        "B": rows,
        "V": vocabulary,
        "M": candidates.values.shape[0],
        "K": ids.shape[1],
        **strides,
    }
    shape = {"TOKENS": CANDIDATES.tokens, "TAIL": tail}
    steps = triton.cdiv(vocabulary, CANDIDATES.tokens)
    candidate_kernels.value_reweight_candidates_tile_kernel[steps, rows](
        *given, drawn[2], **sizes, **shape, **flags, num_warps=CANDIDATES.num_warps
    )
    candidate_kernels.value_reweight_candidates_pick_kernel[(rows,)](
        *given,
        *drawn,
        **sizes,
        **shape,
        **flags,
        T=steps,
        TILES=triton.next_power_of_2(steps),
        num_warps=CANDIDATES.num_warps,
    )


def reweight_logits(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    tail: Tail | torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """See `infer_align_kernels.reweight_logits`: k numbers per row in place with the tail kept, else one pass over [B, V]."""
    rows, vocabulary = logits.shape
    _check_strides(logits, None)
    if out is None:
        out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _check_strides(out, None)
    if rows == 0:
        return out
    ids, beta = token_ids.contiguous(), beta.contiguous()
    shifts = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    in_place = isinstance(tail, str) and tail == "keep" and out.data_ptr() == logits.data_ptr()
    _shift(logits, ids, values, beta, shifts, out, scatter=in_place)
    if not in_place:
        kind, masked = _tail(tail, logits)
        candidate_kernels.value_reweight_apply_kernel[
            triton.cdiv(vocabulary, CANDIDATES.tokens), rows
        ](
            logits,
            ids,
            shifts,
            beta,
            masked,
            out,
            vocabulary,
            values.shape[0],
            ids.shape[1],
            logits.stride(0),
            out.stride(0),
            TOKENS=CANDIDATES.tokens,
            TAIL=kind,
            num_warps=CANDIDATES.num_warps,
        )
    return out


def candidate_values(
    token_ids: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """See `infer_align_kernels.candidate_values`."""
    rows, k = token_ids.shape
    count, vocabulary, rank = weight.shape
    out = torch.empty((count, rows, k), dtype=torch.float32, device=hidden.device)
    if out.numel():
        weight = weight.contiguous()
        candidate_kernels.value_reweight_candidate_values_kernel[
            triton.cdiv(k, GATHER.rows), rows, count
        ](
            token_ids.contiguous(),
            hidden.contiguous(),
            weight,
            weight if bias is None else bias.contiguous(),
            out,
            rows,
            vocabulary,
            count,
            k,
            SLOTS=GATHER.rows,
            R=rank,
            RANK=min(256, triton.next_power_of_2(rank)),
            HAS_BIAS=bias is not None,
            num_warps=GATHER.num_warps,
        )
    return out


def allocate_workspace(rows: int, vocabulary: int, device: torch.device | str) -> torch.Tensor:
    """See `infer_align_kernels.allocate_workspace`."""
    return torch.empty(workspace_size(rows, vocabulary), dtype=torch.float32, device=device)


def workspace_size(rows: int, vocabulary: int) -> int:
    """Numbers that the finest tiles need."""
    tokens = min(HEAD.tokens, HEAD_FLOAT32.tokens, CANDIDATES.tokens)
    return int(triton.cdiv(vocabulary, tokens) * STATISTICS.value * rows)


def head_tiles(dtype: torch.dtype) -> Tiles:
    """The tiles for a head of this type; float32 multiplies without tensor cores, in full precision."""
    return HEAD_FLOAT32 if dtype == torch.float32 else HEAD


def _shift(
    logits: torch.Tensor,
    ids: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    shifts: torch.Tensor,
    out: torch.Tensor,
    *,
    scatter: bool,
) -> None:
    rows, k = ids.shape
    candidate_kernels.value_reweight_shift_kernel[(rows,)](
        logits,
        ids,
        values.contiguous(),
        beta,
        shifts,
        out,
        rows,
        values.shape[0],
        k,
        logits.stride(0),
        out.stride(0),
        SLOTS=triton.next_power_of_2(k),
        SCATTER=scatter,
        num_warps=SHIFT.num_warps,
    )


def _tail(tail: Tail | torch.Tensor, logits: torch.Tensor) -> tuple[int, torch.Tensor]:
    """The kernels' word for the tail, and the rows' own flags; any tensor where there are none."""
    if isinstance(tail, torch.Tensor):
        return candidate_kernels.PER_ROW.value, tail.contiguous().view(torch.uint8)
    return (candidate_kernels.MASK if tail == "mask" else candidate_kernels.KEEP).value, logits


def _check_strides(tensor: torch.Tensor, bitmask: torch.Tensor | None) -> None:
    if tensor.stride(1) != 1 or (bitmask is not None and bitmask.stride(1) != 1):
        raise ValueError(
            "logits, out, bitmask: tokens lie apart in memory; their last dimension must be contiguous."
        )
