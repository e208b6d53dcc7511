"""Value reweighting in Triton: checks of memory layout, and the launches of the kernels.

Sampling takes two kernels. The first reads the logits once and writes statistics per row and tile.
The second has one small program per row, which merges them and draws the token.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from infer_align_kernels.devices import INTERPRETED
from infer_align_kernels.value_reweight import candidates as candidate_kernels
from infer_align_kernels.value_reweight import head as head_kernels
from infer_align_kernels.value_reweight.types import CandidateValues, HeadValues, Sampled, Tail

# Upper bound of the ranks that `candidate_values` loads at once.
MAX_GATHER_RANK = 256
# tl.dot needs at least this many columns.
MIN_DOT_RANK = 16

# Arguments of a kernel launch by name.
Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tile sizes of a kernel and its compiler options.

    They do not depend on the batch size, so that a row's sums do not depend on the other rows.

    Attributes:
        tokens: tokens per tile.
        rows: rows, candidate slots, or tiles of one row, per program.
        rank: ranks per step of a product.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
    """

    tokens: int
    rows: int = 1
    rank: int = 128
    num_warps: int = 4
    num_stages: int = 2


HEAD = Tiles(tokens=64, rows=64, rank=128, num_warps=4, num_stages=1)
# Where the operands of a product are in registers, and not in shared memory, a part of a float32
# head of rank 128 would fill them.
HEAD_IN_REGISTERS = replace(HEAD, rank=32)
# The major compute capabilities whose tensor cores read operands from shared memory.
READ_SHARED = {9, 10}
SPLIT = Tiles(tokens=1, rows=4, num_warps=4)
PICK = Tiles(tokens=HEAD.tokens, rank=128, num_warps=8)
CANDIDATES = Tiles(tokens=512, rows=8, num_warps=4)
# More candidates of a row need more registers than so many warps have.
MANY_SLOTS = 2048
CANDIDATES_PICK = Tiles(tokens=512, num_warps=4)
APPLY = Tiles(tokens=2048, num_warps=8)
SHIFT = Tiles(tokens=1, num_warps=4)
GATHER = Tiles(tokens=1, rows=16)


def value_reweight(
    logits: torch.Tensor,
    values: HeadValues | CandidateValues,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    uniform: torch.Tensor,
) -> Sampled:
    """Steer the logits and sample a token; see `infer_align_kernels.value_reweight`."""
    rows, vocabulary = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    out = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
    if rows == 0:
        return Sampled(token, *out)
    _check_strides(logits)
    common: Arguments = {
        "logits": logits,
        "beta": beta.contiguous(),
        "temperature": temperature.contiguous(),
        "B": rows,
        "V": vocabulary,
        "row_stride": logits.stride(0),
    }
    draw: Arguments = {
        "uniform": uniform.contiguous(),
        "token_out": token,
        "out": out,
    }
    if isinstance(values, HeadValues):
        _sample_head(values, common, draw)
    else:
        _sample_candidates(values, common, draw)
    return Sampled(token, *out)


def _sample_head(head: HeadValues, common: Arguments, draw: Arguments) -> None:
    rows, vocabulary = common["B"], common["V"]
    count, _, rank = head.weight.shape
    tile_count = triton.cdiv(vocabulary, HEAD.tokens)
    weight = head.weight.contiguous()
    arguments: Arguments = {
        **common,
        "weight": weight,
        "bias": weight if head.bias is None else head.bias.contiguous(),
        "statistics": _floats(
            tile_count, rows, head_kernels.STATISTICS.value, device=weight.device
        ),
        "M": count,
        "TOKENS": HEAD.tokens,
        "R": rank,
        "HAS_BIAS": head.bias is not None,
    }
    hidden = head.hidden.contiguous()
    head_kernels.value_reweight_head_tile_kernel[(tile_count,)](
        **arguments, **_product_arguments(hidden, weight)
    )
    head_kernels.value_reweight_head_pick_kernel[(rows,)](
        **arguments,
        **draw,
        hidden=hidden,
        T=tile_count,
        TILES=triton.next_power_of_2(tile_count),
        RANK=min(PICK.rank, triton.next_power_of_2(rank)),
        num_warps=PICK.num_warps,
    )


def _product_arguments(hidden: torch.Tensor, weight: torch.Tensor) -> Arguments:
    """Return the arguments of a kernel that multiplies features by a head on tensor cores.

    The features of a float32 head are split first.
    """
    rank = weight.shape[-1]
    tiles = head_tiles(weight)
    is_split = weight.dtype == torch.float32
    features = scales = hidden
    if is_split:
        count = hidden.numel() // rank
        features = torch.empty((2, count, rank), dtype=torch.float16, device=hidden.device)
        scales = _floats(count, device=hidden.device)
        head_kernels.value_reweight_split_kernel[(triton.cdiv(count, SPLIT.rows),)](
            hidden=hidden,
            parts=features,
            scales=scales,
            N=count,
            R=rank,
            ROWS=SPLIT.rows,
            RANK=triton.next_power_of_2(rank),
            num_warps=SPLIT.num_warps,
        )
    return {
        "hidden": features,
        "scales": scales,
        "ROWS": tiles.rows,
        "RANK": min(tiles.rank, max(MIN_DOT_RANK, triton.next_power_of_2(rank))),
        "IS_SPLIT": is_split,
        # The interpreter multiplies the bits of bfloat16, so numbers are widened there.
        "UPCAST": INTERPRETED,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _sample_candidates(candidates: CandidateValues, common: Arguments, draw: Arguments) -> None:
    logits, rows, vocabulary = common["logits"], common["B"], common["V"]
    ids = candidates.token_ids.contiguous()
    k = ids.shape[1]
    tile_count = triton.cdiv(vocabulary, CANDIDATES.tokens)
    arguments: Arguments = {
        **common,
        "ids": ids,
        "statistics": _floats(2, rows, tile_count, device=logits.device),
        "candidate_logits": _floats(2, rows, k, device=logits.device),
        "M": candidates.values.shape[0],
        "K": k,
        "T": tile_count,
        "TOKENS": CANDIDATES.tokens,
    }
    grid = (1 + triton.cdiv(tile_count, CANDIDATES.rows), rows)
    candidate_kernels.value_reweight_candidates_tile_kernel[grid](
        **arguments,
        values=candidates.values.contiguous(),
        GROUP=CANDIDATES.rows,
        SLOTS=triton.next_power_of_2(k),
        num_warps=candidates_tiles(k).num_warps,
    )
    candidate_kernels.value_reweight_candidates_pick_kernel[(rows,)](
        **arguments,
        **draw,
        **_tail_arguments(candidates.tail, logits),
        TILES=triton.next_power_of_2(tile_count),
        num_warps=CANDIDATES_PICK.num_warps,
    )


def reweight_logits(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    tail: Tail | torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Add the shifts of the candidates; see `infer_align_kernels.reweight_logits`.

    In place with the tail kept, k numbers per row are written; otherwise [B, V] is written once.
    """
    rows, vocabulary = logits.shape
    _check_strides(logits)
    if out is None:
        out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _check_strides(out)
    if rows == 0:
        return out
    ids = token_ids.contiguous()
    beta = beta.contiguous()
    shifts = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    keeps_tail = isinstance(tail, str) and tail == "keep"
    in_place = keeps_tail and out.data_ptr() == logits.data_ptr()
    _compute_shifts(logits, ids, values, beta, shifts, out, scatter=in_place)
    if in_place:
        return out
    tile_count = triton.cdiv(vocabulary, APPLY.tokens)
    candidate_kernels.value_reweight_apply_kernel[tile_count, rows](
        logits=logits,
        ids=ids,
        shifts=shifts,
        beta=beta,
        out=out,
        V=vocabulary,
        M=values.shape[0],
        K=ids.shape[1],
        row_stride=logits.stride(0),
        out_stride=out.stride(0),
        TOKENS=APPLY.tokens,
        **_tail_arguments(tail, logits),
        num_warps=APPLY.num_warps,
    )
    return out


def candidate_values(
    token_ids: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute a head's values of the candidates; see `infer_align_kernels.candidate_values`."""
    rows, k = token_ids.shape
    count, vocabulary, rank = weight.shape
    out = torch.empty((count, rows, k), dtype=torch.float32, device=hidden.device)
    if not out.numel():
        return out
    weight = weight.contiguous()
    grid = (triton.cdiv(k, GATHER.rows), rows, count)
    candidate_kernels.value_reweight_candidate_values_kernel[grid](
        ids=token_ids.contiguous(),
        hidden=hidden.contiguous(),
        weight=weight,
        bias=weight if bias is None else bias.contiguous(),
        out=out,
        B=rows,
        V=vocabulary,
        M=count,
        K=k,
        SLOTS=GATHER.rows,
        R=rank,
        RANK=min(MAX_GATHER_RANK, triton.next_power_of_2(rank)),
        HAS_BIAS=bias is not None,
        num_warps=GATHER.num_warps,
    )
    return out


def add_head_values(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    beta: torch.Tensor,
    indices: torch.Tensor | None,
) -> torch.Tensor:
    """Add a head's values in place; see `infer_align_kernels.add_head_values`."""
    rows, rank = hidden.shape
    vocabulary = logits.shape[1]
    _check_strides(logits)
    if rows == 0:
        return logits
    weight = weight.contiguous()
    head_kernels.value_reweight_add_head_kernel[(triton.cdiv(vocabulary, HEAD.tokens),)](
        logits=logits,
        # Any pointer will do without indices or a bias: the kernel does not read it.
        indices=logits if indices is None else indices.contiguous(),
        weight=weight,
        bias=weight if bias is None else bias.contiguous(),
        beta=beta.contiguous(),
        B=rows,
        V=vocabulary,
        row_stride=logits.stride(0),
        TOKENS=HEAD.tokens,
        R=rank,
        HAS_BIAS=bias is not None,
        HAS_INDICES=indices is not None,
        **_product_arguments(hidden.contiguous(), weight),
    )
    return logits


def _floats(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def head_tiles(weight: torch.Tensor) -> Tiles:
    """Return the tiles of the products with a head."""
    if weight.dtype != torch.float32 or not weight.is_cuda:
        return HEAD
    major, _ = torch.cuda.get_device_capability(weight.device)
    return HEAD if major in READ_SHARED else HEAD_IN_REGISTERS


def candidates_tiles(k: int) -> Tiles:
    """Return the tiles of a draw by k candidates per row."""
    return CANDIDATES if k <= MANY_SLOTS else replace(CANDIDATES, num_warps=8)


def _compute_shifts(
    logits: torch.Tensor,
    ids: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    shifts: torch.Tensor,
    out: torch.Tensor,
    *,
    scatter: bool,
) -> None:
    """Write the shifts of the candidates to `shifts`, or with `scatter` their logits to `out`."""
    rows, k = ids.shape
    candidate_kernels.value_reweight_shift_kernel[(rows,)](
        logits=logits,
        ids=ids,
        values=values.contiguous(),
        beta=beta,
        shifts=shifts,
        out=out,
        B=rows,
        M=values.shape[0],
        K=k,
        row_stride=logits.stride(0),
        out_stride=out.stride(0),
        SLOTS=triton.next_power_of_2(k),
        SCATTER=scatter,
        num_warps=SHIFT.num_warps,
    )


def _tail_arguments(tail: Tail | torch.Tensor, logits: torch.Tensor) -> Arguments:
    """Return the kernels' arguments for the tail.

    Without a flag per row, `masked` is not read, so any pointer will do.
    """
    if isinstance(tail, torch.Tensor):
        flags = tail.contiguous().view(torch.uint8)
        return {"TAIL": candidate_kernels.PER_ROW.value, "masked": flags}
    constant = candidate_kernels.MASK if tail == "mask" else candidate_kernels.KEEP
    return {"TAIL": constant.value, "masked": logits}


def _check_strides(tensor: torch.Tensor) -> None:
    if tensor.stride(1) != 1:
        raise ValueError(
            "logits, out: the tokens of a row are not contiguous in memory; call "
            ".contiguous() on the tensor."
        )
