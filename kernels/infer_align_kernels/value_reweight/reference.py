"""Value reweighting in torch: the definition of the kernels, and the implementation on CPU.

Shapes: B rows, V vocabulary, M values, k candidates, r rank.
"""

from __future__ import annotations

import math

import torch

from infer_align_kernels.value_reweight.types import CandidateValues, HeadValues, Sampled, Tail

# Tokens per tile of the two-level draw: about the square root of a vocabulary.
TILE = 512
LOG2_E = 1.4426950408889634
LARGEST = torch.finfo(torch.float32).max
# Lower temperatures count as this one; its inverse is still a finite number.
MIN_TEMPERATURE = 1e-30


def reweight_logits(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    tail: Tail | torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Add the shifts of the candidates; see `infer_align_kernels.reweight_logits`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    in_place = out is not None and out.data_ptr() == logits.data_ptr()
    keeps_tail = isinstance(tail, str) and tail == "keep"
    needs_no_copy = (out is None or in_place) and keeps_tail and not logits.is_cuda
    if needs_no_copy and _is_complete(token_ids, beta):
        # The common case with fewer operations. Its results are bit for bit the same.
        shift = complete_shifts(values.to(dtype), beta.to(dtype))
        # The sum is finite only if every value is finite.
        if math.isfinite(shift.sum()):
            target = logits.to(dtype, copy=True) if out is None else out
            return target.scatter_add_(1, token_ids, shift)
    slots = token_ids >= 0
    # Unused slots repeat the first one: a scatter that writes equal numbers twice is well defined.
    ids = torch.where(slots, token_ids, token_ids[:, :1]).clamp_(min=0)
    candidate_logits = logits.gather(1, ids).to(dtype)
    steers = ((beta != 0).any(dim=1) & slots[:, 0])[:, None]
    shifted = candidate_logits + shifts(values.to(dtype), beta.to(dtype), slots)
    steered = torch.where(steers, shifted, candidate_logits)
    if out is None:
        out = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    if not in_place:
        out.copy_(logits)
    if not keeps_tail:
        masked = steers[:, 0]
        if isinstance(tail, torch.Tensor):
            masked = masked & tail
        out.index_fill_(0, masked.nonzero()[:, 0], -torch.inf)
    return out.scatter_(1, ids, torch.where(slots, steered, steered[:, :1]))


def add_head_values(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    beta: torch.Tensor,
    indices: torch.Tensor | None,
) -> torch.Tensor:
    """Add a head's values in place; see `infer_align_kernels.add_head_values`."""
    row_beta = beta[:, None]
    weighted = hidden.float() * row_beta
    table = weight.float().T
    if indices is None and bias is None and bool(beta.all()):
        # The common case reads and writes the logits once.
        return logits.addmm_(weighted, table)
    frozen = logits if indices is None else logits.index_select(0, indices)
    steered = torch.addmm(frozen, weighted, table)
    if bias is not None:
        steered.addcmul_(row_beta, bias.float())
    # Adding 0 would turn a logit of -0.0 into 0.0.
    steered = torch.where(row_beta != 0, steered, frozen)
    if indices is None:
        return logits.copy_(steered)
    return logits.index_copy_(0, indices, steered)


def _is_complete(token_ids: torch.Tensor, beta: torch.Tensor) -> bool:
    """Return True if every slot is used and no beta is 0."""
    return token_ids.numel() > 0 and bool(token_ids.amin() >= 0) and bool(beta.all())


def complete_shifts(values: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Compute `shifts` for used slots, non-zero betas and finite values only.

    [M, B, k], [B, M] -> [B, k].
    """
    centred = values - values.mean(dim=2, keepdim=True)
    if len(values) == 1:
        return centred[0].mul_(beta)
    return (beta.T[:, :, None] * centred).sum(dim=0)


def shifts(values: torch.Tensor, beta: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Compute the shift of each candidate: sum over m of beta_m (v_m - mean of v_m).

    A candidate with a value that is not finite gets -inf and does not count in the mean. A value
    whose beta is 0 is ignored.

    [M, B, k] values, [B, M] beta, [B, k] True for used slots -> [B, k].
    """
    # [M, B, 1]
    value_beta = beta.T[:, :, None]
    active = value_beta != 0
    is_valid = values.isfinite() | ~active
    usable = slots & is_valid.all(dim=0)
    finite = torch.where(usable & active, values, 0.0)
    count = usable.sum(dim=1, keepdim=True).clamp_(min=1)
    mean = finite.sum(dim=2, keepdim=True) / count
    centred = finite - mean
    shift = (value_beta * centred).sum(dim=0)
    return shift.masked_fill_(~usable, -torch.inf)


def candidate_values(
    token_ids: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute a head's values of the candidates; see `infer_align_kernels.candidate_values`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    ids = token_ids.clamp(min=0)
    flat_ids = ids.flatten()
    values = []
    for m in range(weight.shape[0]):
        rows = weight[m].index_select(0, flat_ids).to(dtype).view(*ids.shape, weight.shape[2])
        value = torch.bmm(rows, hidden[:, m].to(dtype)[:, :, None])[:, :, 0]
        if bias is not None:
            value = value + bias[m][ids]
        values.append(value)
    return torch.stack(values)


def value_reweight(
    logits: torch.Tensor,
    values: HeadValues | CandidateValues,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    uniform: torch.Tensor,
) -> Sampled:
    """Steer the logits and sample a token; see `infer_align_kernels.value_reweight`."""
    rows, vocabulary = logits.shape
    greedy = temperature <= 0
    scale = torch.where(greedy, 1.0, 1.0 / temperature.float().clamp(min=MIN_TEMPERATURE))
    tile_count = -(-vocabulary // TILE)
    # The last tile is filled up with -inf.
    scores = logits.new_full((rows, tile_count * TILE), -torch.inf, dtype=torch.float32)
    steered = scores[:, :vocabulary].copy_(logits)
    scratch = torch.empty_like(scores)
    frozen_peak = _clean_in_place(scores).amax(dim=1)
    frozen_total = _weights(scores, frozen_peak, scale, scratch).sum(dim=1)
    if isinstance(values, HeadValues):
        _add_head(steered, values, beta.float())
    else:
        reweight_logits(steered, values.token_ids, values.values, beta, values.tail, out=steered)
    tiles = _clean_in_place(scores).view(rows, tile_count, TILE)
    tile_peaks = tiles.amax(dim=2)
    peak = tile_peaks.amax(dim=1)
    weights = _weights(scores, peak, scale, scratch).view(rows, tile_count, TILE)
    token, total = _pick(tiles, weights, tile_peaks, uniform, greedy)
    logprob = (_logit_of(scores, token) - peak) * scale - total.log()
    frozen_logprob = (_logit_of(logits, token) - frozen_peak) * scale - frozen_total.log()
    has_token = peak > -torch.inf
    return Sampled(
        token=torch.where(has_token, token, -1),
        logsumexp=torch.where(has_token, peak * scale + total.log(), -torch.inf),
        logprob=torch.where(has_token, logprob, -torch.inf),
        frozen_logprob=torch.where(has_token, frozen_logprob, -torch.inf),
    )


def _logit_of(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Return the logit of each row's token in float32, +inf as the largest number."""
    return logits.gather(1, token[:, None])[:, 0].float().clamp_(max=LARGEST)


def _clean_in_place(scores: torch.Tensor) -> torch.Tensor:
    """Replace NaN by -inf, so that it is never chosen, and +inf by the largest number."""
    return scores.nan_to_num_(nan=-torch.inf, posinf=LARGEST, neginf=-torch.inf)


def _weights(
    scores: torch.Tensor, peak: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Write exp((scores - peak) * scale) to `out`; a row without a finite score gets zeros."""
    # torch.exp is a hundred times slower than exp2 on CPU where results are subnormal.
    finite_peak = peak.clamp(min=-LARGEST)
    torch.sub(scores, finite_peak[:, None], out=out)
    return out.mul_(scale[:, None] * LOG2_E).exp2_()


def _add_head(scores: torch.Tensor, head: HeadValues, beta: torch.Tensor) -> None:
    """Add beta times the head's values in place, only for the rows that each value steers."""
    for m in range(head.weight.shape[0]):
        active = beta[:, m] != 0
        if not bool(active.any()):
            continue
        steers_all = bool(active.all())
        part = scores if steers_all else scores[active]
        strength = beta[active, m, None]
        part.addmm_(strength * head.hidden[active, m].float(), head.weight[m].float().T)
        if head.bias is not None:
            part.addcmul_(strength, head.bias[m].float())
        if not steers_all:
            scores[active] = part


def _pick(
    tiles: torch.Tensor,
    weights: torch.Tensor,
    tile_peaks: torch.Tensor,
    uniform: torch.Tensor,
    greedy: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert the cumulative distribution at the uniform number, or take the largest score.

    The draw has two levels: first the tile, by the sums of the tiles, then the token in the tile.

    Args:
        tiles: [B, T, TILE] scores.
        weights: [B, T, TILE] unnormalized probabilities.
        tile_peaks: [B, T] largest score of each tile.
        uniform: [B] float64 in [0, 1).
        greedy: [B] bool, True for the largest score.

    Returns:
        [B] token and [B] float32 sum of the weights.
    """
    row = torch.arange(len(tiles), device=tiles.device)
    tile_sums = weights.sum(dim=2, dtype=torch.float32)
    cumulative = tile_sums.double().cumsum(dim=1)
    total = cumulative[:, -1]
    target = uniform * total
    tile = torch.where(greedy, tile_peaks.argmax(dim=1), _first_above(cumulative, target))
    previous = (tile - 1).clamp_(min=0)[:, None]
    preceding = torch.where(tile > 0, cumulative.gather(1, previous)[:, 0], 0.0)
    cumulative_in_tile = weights[row, tile].double().cumsum(dim=1)
    drawn = _first_above(cumulative_in_tile, target - preceding)
    offset = torch.where(greedy, tiles[row, tile].argmax(dim=1), drawn)
    return tile * tiles.shape[2] + offset, total.float()


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the first place whose cumulative sum exceeds the target.

    Rounding can hide that place. The result is then the last place that adds to the sum.
    """
    last = (cumulative >= cumulative[:, -1:]).int().argmax(dim=1)
    place = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return torch.minimum(place, last)
