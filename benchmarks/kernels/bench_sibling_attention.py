"""Sibling attention against PyTorch's own: one masked call, and the prefix copied per candidate; and against its floor.

python benchmarks/kernels/bench_sibling_attention.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernels.measure import CUDA, DEVICE, bandwidth, gate, row
from benchmarks.record import record
from infer_align_kernels import sibling_attention

DTYPE = torch.bfloat16 if CUDA else torch.float32
# B, H, Hkv, k, T, D
SHAPES = (
    [(8, 32, 8, 20, 1024, 128), (32, 32, 8, 20, 1024, 128), (64, 32, 4, 64, 2048, 64)]
    if CUDA
    else [
        (16, 4, 2, 20, 64, 16),
        (32, 4, 4, 20, 128, 32),
        (32, 8, 2, 20, 256, 64),
        (32, 4, 2, 5, 128, 32),
    ]
)
TOLERANCE = 2e-2 if CUDA else 1e-5
SEED = 0


def masked(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """One call over prefix and siblings, a mask that lets each see its prefix and itself."""
    rows, heads, siblings, _ = query.shape
    columns = keys.shape[2]
    mask = torch.full(
        (rows, 1, siblings, columns + siblings), -torch.inf, dtype=query.dtype, device=query.device
    )
    used = torch.arange(columns, device=query.device) >= (columns - lengths)[:, None]
    mask[..., :columns].masked_fill_(used[:, None, None], 0)
    mask[..., columns:].diagonal(dim1=-2, dim2=-1).zero_()
    joined = torch.cat([keys, own_keys], dim=2), torch.cat([values, own_values], dim=2)
    return F.scaled_dot_product_attention(
        query, *joined, attn_mask=mask, enable_gqa=heads != keys.shape[1]
    )


def copied(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """The prefix once per sibling: k rows where there was one."""
    rows, heads, siblings, dim = query.shape
    columns = keys.shape[2]
    used = torch.arange(columns + 1, device=query.device) >= (columns - lengths)[:, None]
    own = [
        t.transpose(1, 2).reshape(rows * siblings, keys.shape[1], 1, dim)
        for t in (own_keys, own_values)
    ]
    joined = [
        torch.cat([t.repeat_interleave(siblings, 0), mine], dim=2)
        for t, mine in zip((keys, values), own, strict=True)
    ]
    flat = query.transpose(1, 2).reshape(rows * siblings, heads, 1, dim)
    mask = used.repeat_interleave(siblings, 0)[:, None, None]
    out = F.scaled_dot_product_attention(
        flat, *joined, attn_mask=mask, enable_gqa=heads != keys.shape[1]
    )
    return out.view(rows, siblings, heads, dim).transpose(1, 2)


def measured(shape: tuple[int, ...], copy: float) -> dict[str, Any]:
    rows, heads, kv_heads, siblings, columns, dim = shape
    g = torch.Generator(DEVICE).manual_seed(SEED)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device=DEVICE).to(DTYPE)

    query = random(rows, siblings, heads, dim).transpose(1, 2)
    keys, values = random(2, rows, kv_heads, columns, dim)
    own_keys, own_values = random(2, rows, siblings, kv_heads, dim).transpose(2, 3)
    lengths = torch.randint(columns // 2, columns + 1, (rows,), generator=g, device=DEVICE)
    given = (query, keys, values, own_keys, own_values, lengths)
    got = sibling_attention(*given).float()
    for other in (masked, copied):
        worst = float((got - other(*given).float()).abs().max())
        if not worst < TOLERANCE:
            raise SystemExit(
                f"sibling_attention: off by {worst} from {other.__name__}; nothing is measured."
            )
    variants = {
        "ours": lambda: sibling_attention(*given),
        "masked": lambda: masked(*given),
        "copied": lambda: copied(*given),
    }
    if CUDA:
        compiled = torch.compile(masked)
        variants["compile"] = lambda: compiled(*given)
    moved = (
        2 * int(lengths.sum()) * kv_heads * dim + 2 * query.numel() + 2 * own_keys.numel()
    ) * query.element_size()
    return row(
        dict(zip(("B", "H", "Hkv", "k", "T", "D"), shape, strict=True)), variants, moved, copy
    )


if __name__ == "__main__":
    gate("sibling_attention")
    copy = bandwidth()
    rows = [measured(shape, copy) for shape in SHAPES]
    setup = {
        "device": torch.cuda.get_device_name()
        if CUDA
        else "one CPU thread, the torch reference; no CUDA here",
        "dtype": str(DTYPE),
        "copy_bytes_per_s": round(copy),
    }
    baseline = "masked: one scaled_dot_product_attention over prefix and siblings; copied: the prefix once per sibling"
    print(
        record(
            f"kernels_sibling_attention_{DEVICE.type}",
            baseline=baseline,
            seed=SEED,
            rows=rows,
            setup=setup,
        )
    )
