"""Figures that were measured on one H200 with an older version of this code and vLLM 0.32.

They come from a machine that was at hand once. No result of that run is in benchmarks/results.
"""

from __future__ import annotations

# Tokens per second of vLLM without steering: an 8B Llama, bfloat16, CUDA graphs, by concurrency.
PLAIN_TOKENS_PER_SECOND = {1: 191.0, 32: 4874.0, 256: 8353.0}
# Speed of VAS with k = 20 over plain, by the number of values and the concurrency.
STEERED_OVER_PLAIN = {
    1: {1: 0.975, 32: 0.941, 256: 0.887},
    2: {1: 0.966, 32: 0.918, 256: 0.889},
}
# Time of best-of-8 over that of n = 8, at concurrency 1 and 32.
BEST_OF_8 = (1.056, 1.04)
# Microseconds of the selection that the kernel `top_candidates` has replaced, float32, k = 20.
OLD_SELECTION_US = {1: 252.0, 8: 239.0, 32: 301.0, 64: 612.0, 128: 1206.0, 256: 2389.0, 512: 4765.0}
# Microseconds of torch.topk, float32, k = 20, with its launches.
TORCH_TOPK_US = {1: 77.0, 8: 86.0, 32: 114.0, 64: 167.0, 128: 280.0, 256: 476.0, 512: 845.0}
# Microseconds of the floors, computed from the bandwidth that the same run measured.
HEAD_FLOOR_US = {1: 7.9, 8: 8.3, 32: 9.7, 64: 11.7, 128: 15.6, 256: 23.4, 512: 38.9}
CANDIDATES_FLOOR_US = {1: 0.1, 8: 0.5, 32: 1.9, 64: 3.9, 128: 7.8, 256: 15.6, 512: 31.2}
ATTENTION_FLOOR_US = (6.7, 26.3, 32.3)
# Microseconds of the older sibling attention at the shapes of `attention.SHAPES`.
OLD_ATTENTION_US = (33.0, 65.0, 218.0)
# Steps per second of the embedded engine with a model of the value LM's shape, 16 rows: 1,110
# tokens per second.
EMBEDDED_STEPS_PER_SECOND = 1110.0 / 16


def plain_step_us(concurrency: int) -> float:
    """Return the microseconds of one step of plain decoding."""
    return concurrency / PLAIN_TOKENS_PER_SECOND[concurrency] * 1e6


def added_us(values: int, concurrency: int) -> float:
    """Return the microseconds that steering by so many values added to a step."""
    ratio = STEERED_OVER_PLAIN[values][concurrency]
    return plain_step_us(concurrency) * (1 / ratio - 1)


def unexplained_us(values: int, concurrency: int) -> float:
    """Return the microseconds of `added_us` that the old selection does not explain.

    At concurrency 1 the selection's figure holds the time of its launches, and is more than
    steering added: then nothing is taken away.
    """
    added = added_us(values, concurrency)
    rest = added - OLD_SELECTION_US[concurrency]
    return rest if rest > 0 else added
