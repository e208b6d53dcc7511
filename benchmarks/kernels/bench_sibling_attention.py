"""Measure sibling attention against two ways to do it with PyTorch's own attention.

python benchmarks/kernels/bench_sibling_attention.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.kernels.measure import (
    CUDA,
    DEVICE,
    DTYPE,
    SEED,
    Rows,
    measure_row,
    record_shapes,
)
from infer_align_kernels import sibling_attention

# B, H, Hkv, k, T, D
CUDA_SHAPES = [
    (32, 32, 8, 20, 1024, 128),
    (8, 32, 8, 20, 1024, 128),
    (64, 32, 4, 64, 2048, 64),
]
CPU_SHAPES = [
    (16, 4, 2, 20, 64, 16),
    (32, 4, 4, 20, 128, 32),
    (32, 8, 2, 20, 256, 64),
    (32, 4, 2, 5, 128, 32),
]
TOLERANCE = 2e-2 if CUDA else 1e-5


def masked(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Call attention once over prefix and siblings; a mask shows each its prefix and itself."""
    rows, heads, siblings, _ = query.shape
    columns = keys.shape[2]
    mask = torch.full(
        (rows, 1, siblings, columns + siblings), -torch.inf, dtype=query.dtype, device=query.device
    )
    is_prefix = torch.arange(columns, device=query.device) >= (columns - lengths)[:, None]
    mask[..., :columns].masked_fill_(is_prefix[:, None, None], 0)
    mask[..., columns:].diagonal(dim1=-2, dim2=-1).zero_()
    all_keys = torch.cat([keys, own_keys], dim=2)
    all_values = torch.cat([values, own_values], dim=2)
    return F.scaled_dot_product_attention(
        query, all_keys, all_values, attn_mask=mask, enable_gqa=heads != keys.shape[1]
    )


def copied(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Copy the prefix once per sibling, so that each sibling is a row of its own."""
    rows, heads, siblings, dim = query.shape
    kv_heads, columns = keys.shape[1:3]

    def with_prefix(prefix: torch.Tensor, sibling: torch.Tensor) -> torch.Tensor:
        sibling_rows = sibling.transpose(1, 2).reshape(rows * siblings, kv_heads, 1, dim)
        return torch.cat([prefix.repeat_interleave(siblings, 0), sibling_rows], dim=2)

    # The last column is the sibling itself.
    is_used = torch.arange(columns + 1, device=query.device) >= (columns - lengths)[:, None]
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2).reshape(rows * siblings, heads, 1, dim),
        with_prefix(keys, own_keys),
        with_prefix(values, own_values),
        attn_mask=is_used.repeat_interleave(siblings, 0)[:, None, None],
        enable_gqa=heads != kv_heads,
    )
    return out.view(rows, siblings, heads, dim).transpose(1, 2)


def random_inputs(shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Make inputs with the memory layout of an engine; at least half of each prefix is used."""
    rows, heads, kv_heads, siblings, columns, dim = shape
    generator = torch.Generator(DEVICE).manual_seed(SEED)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE).to(DTYPE)

    query = random(rows, siblings, heads, dim).transpose(1, 2)
    keys, values = random(2, rows, kv_heads, columns, dim)
    own_keys, own_values = random(2, rows, siblings, kv_heads, dim).transpose(2, 3)
    lengths = torch.randint(columns // 2, columns + 1, (rows,), generator=generator, device=DEVICE)
    return query, keys, values, own_keys, own_values, lengths


def check_agreement(inputs: tuple[torch.Tensor, ...]) -> None:
    """Exit if the op and the baselines disagree on this device."""
    result = sibling_attention(*inputs).float()
    for baseline in (masked, copied):
        error = float((result - baseline(*inputs).float()).abs().max())
        if not error < TOLERANCE:
            raise SystemExit(
                f"sibling_attention: differs from {baseline.__name__} by {error}; must be below "
                f"{TOLERANCE}. Nothing is measured."
            )


def measure_shape(
    rows: int, heads: int, kv_heads: int, siblings: int, columns: int, dim: int, bandwidth: float
) -> Rows:
    """Measure one shape and return its row, as the only one."""
    shape = (rows, heads, kv_heads, siblings, columns, dim)
    inputs = random_inputs(shape)
    check_agreement(inputs)
    variants = {
        "ours": lambda: sibling_attention(*inputs),
        "masked": lambda: masked(*inputs),
        "copied": lambda: copied(*inputs),
    }
    if CUDA:
        compiled = torch.compile(masked)
        variants["compile"] = lambda: compiled(*inputs)
    query, _, _, own_keys, _, lengths = inputs
    prefix_numbers = 2 * int(lengths.sum()) * kv_heads * dim
    moved_numbers = prefix_numbers + 2 * query.numel() + 2 * own_keys.numel()
    sizes = dict(zip(("B", "H", "Hkv", "k", "T", "D"), shape, strict=True))
    return [measure_row(sizes, variants, moved_numbers * query.element_size(), bandwidth)]


if __name__ == "__main__":
    record_shapes(
        "sibling_attention",
        "masked: one scaled_dot_product_attention over prefix and siblings; "
        "copied: the prefix once per sibling",
        CUDA_SHAPES if CUDA else CPU_SHAPES,
        measure_shape,
    )
