"""Value reweighting: add beta times value estimates to the logits, and sample a token from them.

Shapes: B rows, V vocabulary, M values, k candidates, r rank.
"""

from __future__ import annotations

import torch

from infer_align_kernels.devices import launching, runs_triton
from infer_align_kernels.value_reweight import reference
from infer_align_kernels.value_reweight.types import CandidateValues, HeadValues, Sampled, Tail

__all__ = [
    "CandidateValues",
    "HeadValues",
    "Sampled",
    "add_head_values",
    "candidate_values",
    "reweight_logits",
    "value_reweight",
]

# The most candidates that the Triton kernels take. One program holds all of a row in registers, and
# with more of them it would take minutes to compile.
MAX_SLOTS = 4096


def value_reweight(
    logits: torch.Tensor,
    values: HeadValues | CandidateValues,
    beta: torch.Tensor,
    *,
    temperature: torch.Tensor,
    uniform: torch.Tensor,
) -> Sampled:
    """Sample one token per row from softmax((logits + sum of beta_m * value_m) / temperature).

    The steered logits are never stored. The result of a row does not depend on the other rows.
    top-p and min-p are not offered, because they sort the whole vocabulary: use `reweight_logits`
    and a sampler for them.

    A logit of -inf stays -inf, NaN counts as -inf and +inf as the largest number. Of equal logits,
    the one with the lowest id is chosen. A value whose beta is 0 is ignored. Candidates are centred
    over their slots, as published; see `reweight_logits`.

    Args:
        logits: [B, V] float16, bfloat16 or float32. Rows may be strided, tokens are contiguous.
        values: a head over all tokens, or k candidates with their values.
        beta: [B, M], finite. 0 turns off one value of a row; a row of zeros is the frozen model.
        temperature: [B], applied after beta. At 0 or below, the largest logit is chosen, and the
            logprobs are those of temperature 1.
        uniform: [B] float64 in [0, 1): the number of each row at which the cumulative distribution
            is inverted.

    Raises:
        ValueError: a shape, dtype or device does not fit. Numbers are not checked, because that
            would wait for the device.
    """
    _check_sampling(logits, beta, temperature=temperature, uniform=uniform)
    if isinstance(values, HeadValues):
        _check_head(logits, beta, values)
    else:
        _check_candidates(logits, values.token_ids, values.values, beta, values.tail)
    is_small = isinstance(values, HeadValues) or values.token_ids.shape[1] <= MAX_SLOTS
    if runs_triton(logits.device) and is_small:
        # Triton is not needed on a CPU.
        from infer_align_kernels.value_reweight import triton  # noqa: PLC0415

        with launching(logits.device):
            return triton.value_reweight(logits, values, beta, temperature, uniform)
    return reference.value_reweight(logits, values, beta, temperature, uniform)


def reweight_logits(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    tail: Tail | torch.Tensor = "keep",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add the shift of every candidate to its logit.

    The shift of a candidate a is sum over m of beta_m * (value_m[a] - mean of value_m), with the
    mean over the slots of the row.

    A row whose betas are all 0, or without candidates, is returned bit for bit, whatever its values
    and its tail. A logit of -inf stays -inf, and its slot counts in the mean, as published. A
    candidate with a value that is not finite gets -inf and does not count in the mean.

    Args:
        logits: [B, V], before temperature.
        token_ids: [B, k] int64, different in each row. Unused slots come last and hold -1.
        values: [M, B, k].
        beta: [B, M], finite.
        tail: "keep" leaves the logits of all other tokens, "mask" sets them to -inf. A [B] bool
            tensor masks the tail of the rows that are True.
        out: tensor to write to, which may be `logits`: float32, or float64 for float64 logits.

    Returns:
        [B, V], float32, or float64 for float64 logits.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_logits(logits)
    _check_candidates(logits, token_ids, values, beta, tail)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if out is not None:
        _check_out(out, logits, dtype)
    is_small = token_ids.shape[1] <= MAX_SLOTS
    if runs_triton(logits.device) and dtype == torch.float32 and is_small:
        # Triton is not needed on a CPU.
        from infer_align_kernels.value_reweight import triton  # noqa: PLC0415

        with launching(logits.device):
            return triton.reweight_logits(logits, token_ids, values, beta, tail, out)
    return reference.reweight_logits(logits, token_ids, values, beta, tail, out)


def add_head_values(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    beta: torch.Tensor,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add beta times a head's value of every token to the logits, in place.

    The value of a token is hidden[s] . weight[token] + bias[token]. The values are never stored:
    the logits are read and written once. A logit of -inf stays -inf, and a row whose beta is 0
    stays bit for bit the same.

    Args:
        logits: [B, V] float32, overwritten. Rows may be strided, tokens are contiguous.
        hidden: [S, r] features of the steered rows.
        weight: [V, r].
        bias: [V], or None.
        beta: [S] float32, finite.
        indices: [S] int64, the steered rows of the logits, all different; None for all, in order.

    Returns:
        `logits`.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_logits(logits)
    if logits.dtype != torch.float32:
        raise ValueError(f"logits: {logits.dtype} is not allowed; must be torch.float32.")
    rows = len(logits) if indices is None else len(indices)
    _check_shape("weight", weight, (logits.shape[1], None), logits.device)
    _check_shape("hidden", hidden, (rows, weight.shape[1]), logits.device)
    if bias is not None:
        _check_shape("bias", bias, (logits.shape[1],), logits.device)
    _check_shape("beta", beta, (rows,), logits.device)
    if runs_triton(logits.device):
        # Triton is not needed on a CPU.
        from infer_align_kernels.value_reweight import triton  # noqa: PLC0415

        with launching(logits.device):
            return triton.add_head_values(logits, hidden, weight, bias, beta, indices)
    return reference.add_head_values(logits, hidden, weight, bias, beta, indices)


def candidate_values(
    token_ids: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a low-rank head's values of the candidates: hidden[b, m] . weight[m, token] + bias.

    Args:
        token_ids: [B, k] int64. The value of a slot that holds -1 is undefined.
        hidden: [B, M, r].
        weight: [M, V, r].
        bias: [M, V], or None.

    Returns:
        [M, B, k] float32.

    Raises:
        ValueError: a shape or device does not fit.
    """
    _check_shape("token_ids", token_ids, (hidden.shape[0], None), hidden.device)
    _check_shape("hidden", hidden, (None, weight.shape[0], weight.shape[2]), weight.device)
    if bias is not None:
        _check_shape("bias", bias, tuple(weight.shape[:2]), weight.device)
    if runs_triton(hidden.device):
        # Triton is not needed on a CPU.
        from infer_align_kernels.value_reweight import triton  # noqa: PLC0415

        with launching(hidden.device):
            return triton.candidate_values(token_ids, hidden, weight, bias)
    return reference.candidate_values(token_ids, hidden, weight, bias)


def _check_shape(
    name: str, tensor: torch.Tensor, expected: tuple[int | None, ...], device: torch.device
) -> None:
    """Refuse a tensor of another shape or on another device; None allows any size."""
    fits = tensor.ndim == len(expected)
    for size, expected_size in zip(tensor.shape, expected, strict=False):
        fits = fits and expected_size in {None, size}
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} is not allowed; must be [{sizes}].")
    if tensor.device != device:
        raise ValueError(
            f"{name}: on {tensor.device}, but the other tensors are on {device}; move it there."
        )


def _check_logits(logits: torch.Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"logits: shape {tuple(logits.shape)} is not allowed; must be [B, V] with V > 0."
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits: {logits.dtype} is not allowed; must be a floating type.")


def _check_out(out: torch.Tensor, logits: torch.Tensor, dtype: torch.dtype) -> None:
    if out.shape != logits.shape or out.dtype != dtype or out.device != logits.device:
        raise ValueError(
            f"out: {tuple(out.shape)} {out.dtype} on {out.device} is not allowed; must be "
            f"{tuple(logits.shape)} {dtype} on {logits.device}."
        )


def _check_sampling(
    logits: torch.Tensor,
    beta: torch.Tensor,
    *,
    temperature: torch.Tensor,
    uniform: torch.Tensor,
) -> None:
    _check_logits(logits)
    rows = len(logits)
    _check_shape("beta", beta, (rows, None), logits.device)
    _check_shape("temperature", temperature, (rows,), logits.device)
    _check_shape("uniform", uniform, (rows,), logits.device)
    if uniform.dtype != torch.float64:
        raise ValueError(f"uniform: {uniform.dtype} is not allowed; must be torch.float64.")


def _check_head(logits: torch.Tensor, beta: torch.Tensor, head: HeadValues) -> None:
    rows, values = beta.shape
    vocabulary = logits.shape[1]
    _check_shape("values.weight", head.weight, (values, vocabulary, None), logits.device)
    rank = head.weight.shape[2]
    _check_shape("values.hidden", head.hidden, (rows, values, rank), logits.device)
    if head.bias is not None:
        _check_shape("values.bias", head.bias, (values, vocabulary), logits.device)


def _check_candidates(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    tail: Tail | torch.Tensor,
) -> None:
    rows = logits.shape[0]
    _check_shape("token_ids", token_ids, (rows, None), logits.device)
    if token_ids.dtype != torch.int64 or token_ids.shape[1] == 0:
        raise ValueError(
            f"token_ids: {tuple(token_ids.shape)} {token_ids.dtype} is not allowed; must be "
            "[B, k] torch.int64 with k > 0."
        )
    _check_shape("values", values, (None, *token_ids.shape), logits.device)
    _check_shape("beta", beta, (rows, values.shape[0]), logits.device)
    if isinstance(tail, torch.Tensor):
        _check_shape("tail", tail, (rows,), logits.device)
        if tail.dtype != torch.bool:
            raise ValueError(f"tail: {tail.dtype} is not allowed; must be torch.bool.")
    elif tail not in {"keep", "mask"}:
        raise ValueError(f'tail: {tail!r} is not allowed; must be "keep", "mask" or a [B] tensor.')
