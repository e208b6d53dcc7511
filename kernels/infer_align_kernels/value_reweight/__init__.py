"""Value reweighting: logits plus beta times value estimates, and a token sampled from the result."""

from __future__ import annotations

import torch

from infer_align_kernels.value_reweight import reference
from infer_align_kernels.value_reweight.types import CandidateValues, HeadValues, Sampled, Tail

__all__ = [
    "CandidateValues",
    "HeadValues",
    "Sampled",
    "add_candidate_shifts",
    "allocate_workspace",
    "candidate_values",
    "reweight_logits",
    "top_candidates",
    "value_reweight",
]


def value_reweight(
    logits: torch.Tensor,
    values: HeadValues | CandidateValues,
    beta: torch.Tensor,
    *,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    bitmask: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> Sampled:
    """Sample one token per row from softmax((logits + sum over m of beta_m * value_m) / temperature), in one go.

    The steered logits are never stored. A row's result depends on nothing else in the batch, and its draw on (seed, step) alone.
    top-p and min-p need an order of the whole vocabulary and are outside: for them take `reweight_logits` and a sampler.

    A logit of -inf stays -inf, NaN counts as -inf, +inf as the largest number; equal ones go to the lowest id. A value whose beta
    is 0 is not looked at. Candidates are centred over their slots, as VAS is published; see `reweight_logits`.

    Args:
        logits: [B, V] float16, bfloat16 or float32; rows may lie apart, tokens not.
        values: a head over all tokens, or k candidates with their values.
        beta: [B, M], finite; 0 in a column leaves that value out, an all-zero row is the frozen model.
        temperature: [B]; beta acts before it. At 0 or below the largest logit is taken, and logprobs are those of temperature 1.
        seed: [B] int64.
        step: [B] int32, the position of the token to be drawn.
        bitmask: [B, ceil(V / 32)] int32, bit i of word w allows token 32 w + i, as xgrammar packs it.
        workspace: from `allocate_workspace`, to be passed where allocating is not wanted; CUDA only.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, by name. Numbers are not inspected: that would wait for the device.
    """
    _check_sampling(logits, beta, temperature=temperature, seed=seed, step=step, bitmask=bitmask)
    if isinstance(values, HeadValues):
        _check_head(logits, beta, values)
    else:
        _check_candidates(logits, values.token_ids, values.values, beta, values.tail)
    if logits.is_cuda:
        from infer_align_kernels.value_reweight import triton  # noqa: PLC0415 - not needed on CPU

        with torch.cuda.device(logits.device):
            return triton.value_reweight(
                logits, values, beta, temperature, seed, step, bitmask, workspace
            )
    return reference.value_reweight(logits, values, beta, temperature, seed, step, bitmask)


def reweight_logits(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    tail: Tail | torch.Tensor = "keep",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """logits[a] + sum over m of beta_m * (value_m[a] - mean of value_m over the k slots), for the candidates a. -> [B, V].

    A row whose betas are all 0, or without candidates, comes back bit for bit, whatever its values hold and whatever its tail. A
    logit of -inf stays -inf and its slot counts in the mean, as published. A candidate with a value that is not finite gets -inf
    and does not count.

    Args:
        logits: [B, V], before temperature.
        token_ids: [B, k] int64, different in each row; unused slots come last and hold -1.
        values: [M, B, k].
        beta: [B, M], finite.
        tail: "keep" leaves the other tokens' logits, "mask" makes them -inf; or [B] bool, True where they are masked.
        out: where to write, `logits` itself included; float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, by name.
    """
    _check_logits(logits)
    _check_candidates(logits, token_ids, values, beta, tail)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if out is not None and (
        out.shape != logits.shape or out.dtype != dtype or out.device != logits.device
    ):
        raise ValueError(
            f"out: {tuple(out.shape)} {out.dtype} on {out.device}; must be {tuple(logits.shape)} {dtype} on {logits.device}."
        )
    if logits.is_cuda and dtype == torch.float32:
        from infer_align_kernels.value_reweight import triton  # noqa: PLC0415 - not needed on CPU

        with torch.cuda.device(logits.device):
            return triton.reweight_logits(logits, token_ids, values, beta, tail, out)
    return reference.reweight_logits(logits, token_ids, values, beta, tail, out)


def add_candidate_shifts(
    logits: torch.Tensor, token_ids: torch.Tensor, values: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Add the shift of every candidate to its logit, in place and without any check. -> `logits`.

    This is `reweight_logits(..., tail="keep", out=logits)` on a CPU for a caller that has already established the preconditions.
    The result is bit for bit the same. If a precondition does not hold, the result is undefined.

    Preconditions:
        All tensors are on the CPU and fit together as `reweight_logits` documents.
        `logits`, `values` and `beta` are float32.
        Every slot is used: `token_ids` holds no -1.
        Every beta is non-zero, and every value is finite.

    Args:
        logits: [B, V], overwritten.
        token_ids: [B, k] int64, different in each row.
        values: [M, B, k].
        beta: [B, M].
    """
    return logits.scatter_add_(1, token_ids, reference.centred_shifts(values, beta))


def candidate_values(
    token_ids: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A low-rank head's values for the candidates alone: hidden[b, m] . weight[m, token] (+ bias). -> [M, B, k] float32.

    Args:
        token_ids: [B, k] int64; a slot of -1 gives a number without meaning.
        hidden: [B, M, r].
        weight: [M, V, r].
        bias: [M, V], or none.

    Raises:
        ValueError: shapes that do not fit, by name.
    """
    _expect("token_ids", token_ids, (hidden.shape[0], None), hidden.device)
    _expect("hidden", hidden, (None, weight.shape[0], weight.shape[2]), weight.device)
    if bias is not None:
        _expect("bias", bias, tuple(weight.shape[:2]), weight.device)
    if hidden.is_cuda:
        from infer_align_kernels.value_reweight import triton  # noqa: PLC0415 - not needed on CPU

        with torch.cuda.device(hidden.device):
            return triton.candidate_values(token_ids, hidden, weight, bias)
    return reference.candidate_values(token_ids, hidden, weight, bias)


def top_candidates(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest logits of each row, largest first, equal ones by the lower id. -> [B, k] int64.

    `torch.topk` leaves open which of equal logits it takes. NaN counts as -inf. On CUDA nothing waits for the device.

    Args:
        logits: [B, V].
        k: 1..V.

    Raises:
        ValueError: k outside 1..V.
    """
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(
            f"k: {k} is not allowed for logits {tuple(logits.shape)}; must be in 1..V of [B, V]."
        )
    return (
        reference.keyed_candidates(logits, k)
        if logits.is_cuda
        else reference.top_candidates(logits, k)
    )


def allocate_workspace(rows: int, vocabulary: int, device: torch.device | str) -> torch.Tensor:
    """Scratch memory for `value_reweight` on up to `rows` rows; one per stream that runs it."""
    from infer_align_kernels.value_reweight import triton  # noqa: PLC0415 - not needed on CPU

    return triton.allocate_workspace(rows, vocabulary, device)


def _expect(
    name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], device: torch.device
) -> None:
    found = tensor.shape
    if len(found) != len(shape) or any(
        want is not None and want != found[i] for i, want in enumerate(shape)
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} is not allowed; must be [{wanted}].")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, but the rest is on {device}.")


def _check_logits(logits: torch.Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"logits: shape {tuple(logits.shape)} is not allowed; must be [B, V] with V > 0."
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits: {logits.dtype} is not allowed; must be a floating type.")


def _check_sampling(
    logits: torch.Tensor,
    beta: torch.Tensor,
    *,
    bitmask: torch.Tensor | None,
    **per_row: torch.Tensor,
) -> None:
    _check_logits(logits)
    rows, vocabulary = logits.shape
    _expect("beta", beta, (rows, None), logits.device)
    for name, tensor in per_row.items():
        _expect(name, tensor, (rows,), logits.device)
    if bitmask is not None:
        _expect("bitmask", bitmask, (rows, -(-vocabulary // 32)), logits.device)
        if bitmask.dtype != torch.int32:
            raise ValueError(
                f"bitmask: {bitmask.dtype} is not allowed; must be torch.int32, 32 tokens to a word."
            )


def _check_head(logits: torch.Tensor, beta: torch.Tensor, head: HeadValues) -> None:
    rows, values = beta.shape
    _expect("values.weight", head.weight, (values, logits.shape[1], None), logits.device)
    _expect("values.hidden", head.hidden, (rows, values, head.weight.shape[2]), logits.device)
    if head.bias is not None:
        _expect("values.bias", head.bias, (values, logits.shape[1]), logits.device)


def _check_candidates(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    tail: Tail | torch.Tensor,
) -> None:
    rows = logits.shape[0]
    _expect("token_ids", token_ids, (rows, None), logits.device)
    if token_ids.dtype != torch.int64 or token_ids.shape[1] == 0:
        raise ValueError(
            f"token_ids: {tuple(token_ids.shape)} {token_ids.dtype} is not allowed; must be [B, k] torch.int64 with k > 0."
        )
    _expect("values", values, (None, *token_ids.shape), logits.device)
    _expect("beta", beta, (rows, values.shape[0]), logits.device)
    if isinstance(tail, torch.Tensor):
        _expect("tail", tail, (rows,), logits.device)
        if tail.dtype != torch.bool:
            raise ValueError(f"tail: {tail.dtype} is not allowed; must be torch.bool.")
    elif tail not in {"keep", "mask"}:
        raise ValueError(f'tail: {tail!r} is not allowed; must be "keep", "mask" or a [B] tensor.')
