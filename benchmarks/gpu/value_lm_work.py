"""The time that one step of a value LM of the 1B class adds to a step of vLLM.

The GPU computes the pass over K siblings of each row: products, small kernels between them, and
sibling attention. With a CUDA graph, the host issues the pass as one operation, and a few tens
around it. Without one, it issues all of them.

Each step begins with a wait for the tokens that the step before has sampled. So nothing of it
overlaps with the step of the language model, and what vLLM's host prepares during a plain step is
not hidden either.
"""

from __future__ import annotations

from benchmarks.gpu import attention_work, older_version
from benchmarks.gpu.hardware import (
    BANDWIDTH,
    BFLOAT16,
    FASTEST_L2,
    GAP,
    L2_BANDWIDTH,
    MEMORY_WAIT,
    MICRO,
    Range,
)
from benchmarks.gpu.models import LARGE

K = 20
HALF = 2
FLOAT = 4
SHAPE = LARGE.value_lm
HEAD = SHAPE.hidden_size // SHAPE.num_attention_heads
LAYERS = SHAPE.num_hidden_layers
# Microseconds of the host: a launch of a Triton kernel, and a call of torch.
TRITON_LAUNCH = Range(15.0, 40.0)
TORCH_CALL = Range(2.0, 8.0)
# Calls of torch of one layer without views, with its launch of sibling attention, as a test counts;
# those that are products; and those around the layers.
LAYER_CALLS = 43
LAYER_PRODUCTS = 7
CALLS_AROUND_LAYERS = 40
# Calls around a replayed pass, and those that keep the chosen sibling of one layer. A test counts
# both. vLLM's processor makes the rest of the first, to read the tokens and to place the values.
CALLS_AROUND_PASS = 45
KEEPING_CALLS = 2
# Selecting the candidates and adding their values takes two launches each.
STEERING_LAUNCHES = 4
# The share of the products' rate that this shape reaches.
BEST_PRODUCTS = 0.7
WORST_PRODUCTS = 0.5
# Columns of a prefix: a question, and some of 128 tokens.
COLUMNS = 256
# A guess: the work of vLLM's host that a plain step hides, and a step that waits does not.
EXPOSED_HOST = Range(0.0, 2000.0)


def products_us(rows: int) -> float:
    """Return the time of all products at the full rates: weights are read, then multiplied."""
    attention = 2 * SHAPE.hidden_size * HEAD
    attention *= SHAPE.num_attention_heads + SHAPE.num_key_value_heads
    layer = attention + 3 * SHAPE.hidden_size * SHAPE.intermediate_size
    weights = layer * LAYERS
    return (2 * weights * rows * K / BFLOAT16 + HALF * weights / BANDWIDTH) / MICRO


def small_kernel_us(rows: int) -> Range:
    """Return the time of a kernel that reads and writes one number per sibling and hidden unit.

    At the low end, the numbers are in the L2 cache and take two bytes. At the high end they take
    four, and the kernel waits for memory at its begin and at its end.
    """
    numbers = 2 * rows * K * SHAPE.hidden_size
    low = HALF * numbers / FASTEST_L2 / MICRO
    high = FLOAT * numbers / L2_BANDWIDTH / MICRO + 2 * MEMORY_WAIT.high
    return Range(low, high) + GAP


def attention_us(rows: int) -> Range:
    """Return the time of sibling attention in one layer."""
    heads, key_heads = SHAPE.num_attention_heads, SHAPE.num_key_value_heads
    shape = attention_work.Shape(rows, heads, key_heads, K, COLUMNS, HEAD)
    return attention_work.time(shape, attention_work.present(shape))


def pass_us(rows: int) -> Range:
    """Return the GPU's time of a pass."""
    products = products_us(rows)
    total = Range(products / BEST_PRODUCTS, products / WORST_PRODUCTS)
    total += GAP.times(LAYERS * LAYER_PRODUCTS) + attention_us(rows).times(LAYERS)
    small = LAYERS * (LAYER_CALLS - LAYER_PRODUCTS - 1) + CALLS_AROUND_LAYERS
    return total + small_kernel_us(rows).times(small)


def host_us() -> Range:
    """Return the host's time for what is around a pass."""
    calls = CALLS_AROUND_PASS + LAYERS * KEEPING_CALLS
    return TORCH_CALL.times(calls) + TRITON_LAUNCH.times(STEERING_LAUNCHES)


def graph_step_us(rows: int) -> Range:
    """Return what a step adds with the pass in a CUDA graph: the GPU's time, then the host's."""
    return pass_us(rows) + host_us() + EXPOSED_HOST


def eager_step_us(rows: int) -> Range:
    """Return what a step adds without a graph: the longer one of the GPU's and the host's time.

    The high end is what the embedded engine took for a step of this shape.
    """
    calls = LAYERS * LAYER_CALLS + CALLS_AROUND_LAYERS
    issued = TORCH_CALL.low * calls + TRITON_LAUNCH.low * LAYERS
    measured = 1e6 / older_version.EMBEDDED_STEPS_PER_SECOND
    gpu = pass_us(rows)
    low = max(issued, gpu.low) + host_us().low
    return Range(low, max(measured + TRITON_LAUNCH.high * LAYERS, gpu.high))
