"""Value reweighting in torch: the definition, and the path on CPU."""

from __future__ import annotations

import math

import torch

from infer_align_kernels.value_reweight.types import CandidateValues, HeadValues, Sampled, Tail

# Inverse CDF in two levels: the sums of tiles, then the tokens of one tile. About the square root of a vocabulary.
TILE = 512
LOG2_E = 1.4426950408889634
COLDEST = 1e-30
# Tokens that `keyed_candidates` makes keys for at once: 16 bytes each.
KEYED_TOKENS = 2**23


def reweight_logits(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    tail: Tail | torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """See `infer_align_kernels.reweight_logits`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    in_place = out is not None and out.data_ptr() == logits.data_ptr()
    keep = isinstance(tail, str) and tail == "keep"
    if (out is None or in_place) and keep and not logits.is_cuda and _is_whole(token_ids, beta):
        # The common case, with fewer operations and bit for bit the same.
        shift = centred_shifts(values.to(dtype), beta.to(dtype))
        if math.isfinite(shift.sum()):  # every value is a number
            return (logits.to(dtype, copy=True) if out is None else out).scatter_add_(
                1, token_ids, shift
            )
    slots = token_ids >= 0
    # Unused slots repeat the first: a scatter that writes the same number twice is well defined.
    ids = torch.where(slots, token_ids, token_ids[:, :1]).clamp_(min=0)
    chosen = logits.gather(1, ids).to(dtype)
    steered_rows = ((beta != 0).any(dim=1) & slots[:, 0])[:, None]
    steered = torch.where(
        steered_rows, chosen + shifts(values.to(dtype), beta.to(dtype), slots), chosen
    )
    if out is None:
        out = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    if not in_place:
        out.copy_(logits)
    if not keep:
        dropped = steered_rows[:, 0] & (tail if isinstance(tail, torch.Tensor) else True)
        out.index_fill_(0, dropped.nonzero()[:, 0], -torch.inf)
    return out.scatter_(1, ids, torch.where(slots, steered, steered[:, :1]))


def centred_shifts(values: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """`shifts` where every slot is used, every weight counts and every value is a number. [M, B, k], [B, M] -> [B, k]."""
    centred = values - values.sum(dim=2, keepdim=True) / values.shape[2]
    if len(values) == 1:
        return beta * centred[0]
    return (beta.T[:, :, None] * centred).sum(dim=0)


def _is_whole(token_ids: torch.Tensor, beta: torch.Tensor) -> bool:
    """Every slot is used and every weight counts."""
    return token_ids.numel() > 0 and bool(token_ids.amin() >= 0) and bool(beta.all())


def shifts(values: torch.Tensor, beta: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """What is added to the candidates: sum over m of beta_m (v_m - mean of v_m). [M, B, k], [B, M], [B, k] slots -> [B, k].

    A candidate with a value that is not finite gets -inf and does not count in the mean; a value whose beta is 0 is not looked at.
    """
    active = (beta != 0).T[:, :, None]
    usable = slots & (values.isfinite() | ~active).all(dim=0)
    finite = torch.where(usable & active, values, 0.0)
    mean = finite.sum(dim=2, keepdim=True) / usable.sum(dim=1, keepdim=True).clamp_(min=1)
    shift = (beta.T[:, :, None] * (finite - mean)).sum(dim=0)
    return shift.masked_fill_(~usable, -torch.inf)


def candidate_values(
    token_ids: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """See `infer_align_kernels.candidate_values`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    ids = token_ids.clamp(min=0)
    flat = ids.flatten()
    found = []
    for m in range(weight.shape[0]):
        rows = weight[m].index_select(0, flat).to(dtype).view(*ids.shape, -1)
        value = torch.bmm(rows, hidden[:, m].to(dtype)[:, :, None])[:, :, 0]
        found.append(value if bias is None else value + bias[m][ids])
    return torch.stack(found)


def top_candidates(logits: torch.Tensor, k: int) -> torch.Tensor:
    """See `infer_align_kernels.top_candidates`."""
    values, ids = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    if (
        bool((values[:, 1:] < values[:, :-1]).all()) and values.shape[1] > 1
    ):  # no equal ones, and no NaN
        return ids[:, :k]
    if bool(values[:, 0].isnan().any()):
        return top_candidates(logits.masked_fill(logits.isnan(), -torch.inf), k)
    # topk leaves open which of equal logits it takes, and their order.
    for row in (values[:, 1:] == values[:, :-1]).any(dim=1).nonzero()[:, 0].tolist():
        cut = values[row, k - 1]
        above = (logits[row] > cut).nonzero()[:, 0]
        taken = torch.cat([above, (logits[row] == cut).nonzero()[: k - len(above), 0]])
        ids[row, :k] = taken[logits[row, taken].sort(descending=True, stable=True).indices]
    return ids[:, :k]


def keyed_candidates(logits: torch.Tensor, k: int) -> torch.Tensor:
    """`top_candidates` without a look at the numbers: one integer per token, ordered by logit and then by the lower id."""
    rows = max(1, KEYED_TOKENS // logits.shape[1])
    last = 0xFFFFFFFF - torch.arange(logits.shape[1], device=logits.device)
    found = []
    for start in range(
        0, len(logits), rows
    ):  # each row by itself in all that follows: how many go together changes nothing
        clean = (
            logits[start : start + rows]
            .float()
            .nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        )
        keys = clean.add_(0.0).view(torch.int32).long()  # -0 is 0
        keys ^= (keys >> 63) & 0x7FFFFFFF  # as integers, floats below 0 come in reverse
        found.append((keys << 32).bitwise_or_(last).topk(k, dim=1).indices)
    return torch.cat(found) if found else logits.new_empty((0, k), dtype=torch.int64)


def value_reweight(
    logits: torch.Tensor,
    values: HeadValues | CandidateValues,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    bitmask: torch.Tensor | None,
) -> Sampled:
    """See `infer_align_kernels.value_reweight`."""
    rows, vocabulary = logits.shape
    greedy = temperature <= 0
    scale = torch.where(greedy, 1.0, 1.0 / temperature.float().clamp(min=COLDEST))
    tiled = (rows, -(-vocabulary // TILE), TILE)
    scores = logits.new_full((rows, tiled[1] * TILE), -torch.inf, dtype=torch.float32)
    frozen = scores[:, :vocabulary].copy_(logits)
    if bitmask is not None:
        frozen.masked_fill_(~unpacked(bitmask, vocabulary), -torch.inf)
    scratch = torch.empty_like(scores)
    frozen_peak = _clean(scores).amax(dim=1)
    frozen_total = _weights(scores, frozen_peak, scale, scratch).sum(dim=1)
    if isinstance(values, HeadValues):
        _add_head(frozen, values, beta.float())
    else:
        reweight_logits(frozen, values.token_ids, values.values, beta, values.tail, out=frozen)
    peaks = _clean(scores).view(tiled).amax(dim=2)
    peak = peaks.amax(dim=1)
    weights = _weights(scores, peak, scale, scratch).view(tiled)
    token, total = _pick(scores.view(tiled), weights, peaks, uniforms(seed, step), greedy)

    def logprob(source: torch.Tensor, peak: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        logit = (
            source.gather(1, token[:, None])[:, 0]
            .float()
            .clamp_(max=torch.finfo(torch.float32).max)
        )
        return (logit - peak) * scale - total.log()

    found = peak > -torch.inf
    lowest = torch.full_like(peak, -torch.inf)
    return Sampled(
        token=torch.where(found, token, -1),
        logsumexp=torch.where(found, peak * scale + total.log(), lowest),
        logprob=torch.where(found, logprob(scores, peak, total), lowest),
        frozen_logprob=torch.where(found, logprob(logits, frozen_peak, frozen_total), lowest),
    )


def uniforms(seed: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), each from its (seed, step) alone: 53 bits of one Philox4x32-10 draw. [B], [B] -> [B] float64."""
    return torch.tensor(
        [_uniform(*pair) for pair in zip(seed.tolist(), step.tolist(), strict=True)],
        dtype=torch.float64,
    )


def _uniform(seed: int, step: int) -> float:
    low = 0xFFFFFFFF
    k0, k1 = seed & low, seed >> 32 & low
    c0, c1, c2, c3 = step & low, 0, 0, 0
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & low, a >> 32 ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0 * 2.0**-32 + (c1 >> 11) * 2.0**-53


def unpacked(bitmask: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Bit i of word w allows token 32 w + i. [B, words] int32 -> [B, V] bool."""
    bits = torch.arange(32, dtype=torch.int32, device=bitmask.device)
    return (bitmask[:, :, None] >> bits & 1).bool().flatten(1)[:, :vocabulary]


def _clean(scores: torch.Tensor) -> torch.Tensor:
    """NaN is never chosen; +inf counts as the largest number. In place."""
    return scores.nan_to_num_(
        nan=-torch.inf, posinf=torch.finfo(scores.dtype).max, neginf=-torch.inf
    )


def _weights(
    scores: torch.Tensor, peak: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """exp((scores - peak) / temperature) into `out`; 0 throughout in a row without a finite score."""
    torch.sub(scores, peak.clamp(min=torch.finfo(torch.float32).min)[:, None], out=out)
    # exp2 and not exp: where results are subnormal, torch.exp is a hundred times slower on CPU.
    return out.mul_(scale[:, None] * LOG2_E).exp2_()


def _add_head(scores: torch.Tensor, head: HeadValues, beta: torch.Tensor) -> None:
    """Add beta times the head's values, in place, reading a head only for the rows that steer by it."""
    for m in range(head.weight.shape[0]):
        active = beta[:, m] != 0
        if not bool(active.any()):
            continue
        everywhere = bool(active.all())
        part = scores if everywhere else scores[active]
        strength = beta[active, m, None]
        part.addmm_(strength * head.hidden[active, m].float(), head.weight[m].float().T)
        if head.bias is not None:
            part.addcmul_(strength, head.bias[m].float())
        if not everywhere:
            scores[active] = part


def _pick(
    scores: torch.Tensor,
    weights: torch.Tensor,
    peaks: torch.Tensor,
    uniform: torch.Tensor,
    greedy: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token at the uniform number's place in the cumulative weights, or the largest; and the sum of the weights."""
    row = torch.arange(len(scores), device=scores.device)
    cdf = weights.sum(dim=2, dtype=torch.float32).double().cumsum(dim=1)
    total = cdf[:, -1]
    target = uniform * total
    tile = torch.where(greedy, peaks.argmax(dim=1), _reaches(cdf, target))
    before = torch.where(tile > 0, cdf.gather(1, (tile - 1).clamp_(min=0)[:, None])[:, 0], 0.0)
    drawn = _reaches(weights[row, tile].double().cumsum(dim=1), target - before)
    within = torch.where(greedy, scores[row, tile].argmax(dim=1), drawn)
    return tile * scores.shape[2] + within, total.float()


def _reaches(cdf: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first place where the cumulative sum passes the target; the last that adds anything, where rounding hid it."""
    last = (cdf >= cdf[:, -1:]).int().argmax(dim=1)
    return torch.minimum(torch.searchsorted(cdf, target[:, None], right=True)[:, 0], last)
