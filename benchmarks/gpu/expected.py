"""Compute the time that each target of `make measure-gpu` should take on an H200. Needs no GPU.

    python -m benchmarks.gpu.expected

Nothing is timed. The figures come from shapes, bytes, products, exponentials, the instructions of
the compiled kernels, and the speed of plain vLLM that was measured once. Each is a range, and its
verdict says what the whole range means for the aim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu import attention_work, kernel_work, older_version, value_lm_work
from benchmarks.gpu.hardware import BANDWIDTH, MICRO, NOTHING, Range, Work
from benchmarks.gpu.older_version import TORCH_TOPK_US, added_us, plain_step_us, unexplained_us
from benchmarks.gpu.value_lm_work import TORCH_CALL, TRITON_LAUNCH
from benchmarks.record import record

Row = dict[str, Any]

NAME = "gpu_expected"
K = 20
BATCH = 256
FLOAT = 4
HALF = 2
VOCABULARY = kernel_work.VOCABULARY
# The share of its aim that a figure may reach and still be met with a margin.
MARGIN = 0.85
WITH_MARGIN = "met, with a margin"
CLOSELY = "met, closely"
OPEN = "open"
MISSED = "missed"
NO_AIM = "no aim"
VALUE_COUNTS = (1, 2, 4)
# The aims of steering in vLLM over plain decoding, for one value and for several.
ONE_VALUE = {1: 0.99, 32: 0.98, 256: 0.97}
SEVERAL_VALUES = 0.96
# Microseconds of the host for our own Python.
OWN_PYTHON = Range(10.0, 30.0)
# Calls of torch in a steering step, which a test counts: memory, cast, product, views of tensors.
STEERING_CALLS = 5
STEERING_LAUNCHES = 2


def verdict(value: Range, kind: str, limit: float) -> str:
    """Say what a range means for an aim.

    Args:
        value: the low and the high estimate.
        kind: "most" if the figure should be at most the limit, "least" if at least.
        limit: the aim. A ratio of speeds below 1 is judged by what it loses.
    """
    best, worst = value
    if kind == "least":
        best, worst, limit = 1 - value.high, 1 - value.low, 1 - limit
    if worst <= MARGIN * limit:
        return WITH_MARGIN
    if worst <= limit:
        return CLOSELY
    return MISSED if best > limit else OPEN


def figure(
    what: str,
    unit: str,
    floor: float | None,
    value: Range,
    aim: tuple[str, float] | None,
    bound: str,
) -> Row:
    """Return one row of the record.

    Args:
        what: the target.
        unit: of the figure: "us", "x floor", "x plain" or "launches".
        floor: time in microseconds of the bytes that must move; None where bytes do not decide.
        value: the figure's range.
        aim: ("most" or "least", limit); None without an aim.
        bound: what takes the longest, or decides.
    """
    return {
        "what": what,
        "unit": unit,
        "floor_us": None if floor is None else round(floor, 1),
        "low": round(value.low, 3),
        "high": round(value.high, 3),
        "target": "none" if aim is None else f"at {aim[0]} {aim[1]:g}",
        "verdict": NO_AIM if aim is None else verdict(value, *aim),
        "bound": bound,
    }


def total(works: Iterable[Work]) -> Range:
    """Return the time of launches, one after the other."""
    time = NOTHING
    for work in works:
        time += work.time
    return time


def over(time: Range, floor: float) -> Range:
    """Return a time in multiples of its floor."""
    return Range(time.low / floor, time.high / floor)


# --- kernels ---


def top_k() -> list[Row]:
    """Return the exact top-k at 256 rows, and beside torch.topk at each batch size."""
    rows = []
    floor = FLOAT * BATCH * VOCABULARY / BANDWIDTH / MICRO
    what = f"exact top-{K} of float32 logits, {BATCH} rows"
    rows.append(figure(what, "us", floor, _top_k(BATCH), ("most", 100.0), "memory"))
    for batch, microseconds in TORCH_TOPK_US.items():
        floor = FLOAT * batch * VOCABULARY / BANDWIDTH / MICRO
        read, chosen = kernel_work.tile_peaks(batch), kernel_work.selection(batch, K)
        bound = "memory" if read.time.low > chosen.time.low else "waits"
        what = f"exact top-{K}, {_count(batch, 'row')}, against torch.topk's {microseconds:g} us"
        rows.append(figure(what, "us", floor, _top_k(batch), ("most", microseconds), bound))
    return rows


def _top_k(batch: int) -> Range:
    return total([kernel_work.tile_peaks(batch), kernel_work.selection(batch, K)])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def steering_us(rows: int, values: int) -> Range:
    """Return the GPU time of one steering call, with the cast and the product of the heads."""
    call = total([kernel_work.tile_peaks(rows), kernel_work.steering(rows, K, values)])
    return call + kernel_work.features(rows, values)


def steering_host_us() -> Range:
    """Return the host's time of one steering call. The number of rows and values is not in it."""
    launches = TRITON_LAUNCH.times(STEERING_LAUNCHES)
    return launches + TORCH_CALL.times(STEERING_CALLS) + OWN_PYTHON


def steering_call() -> list[Row]:
    """Return the GPU time and the host time of one steering call."""
    rows = []
    floor = FLOAT * BATCH * VOCABULARY / BANDWIDTH / MICRO
    for values in VALUE_COUNTS:
        what = f"one steering call, {BATCH} rows, {_count(values, 'value')}, on the GPU"
        time = steering_us(BATCH, values)
        rows.append(figure(what, "us", floor, time, None, "memory, and the product of the heads"))
    # As many likely tokens as candidates, so that the two can be compared.
    likely = total([kernel_work.tile_peaks(BATCH), *kernel_work.likely(BATCH, K, 1)])
    likely += kernel_work.features(BATCH, 1)
    what = f"one steering call by min_p, {BATCH} rows, 1 value, {K} likely tokens, on the GPU"
    rows.append(figure(what, "us", floor, likely, None, "memory, L2 cache, and that product"))
    launches = Range(4.0, 5.0)
    what = "launches of one steering call by top-k, any number of values"
    rows.append(figure(what, "launches", None, launches, None, "cast, product, two kernels"))
    what = "one steering call, on the host"
    aim = ("most", 125.0)
    rows.append(figure(what, "us", None, steering_host_us(), aim, "launches and calls of torch"))
    return rows


def dense() -> list[Row]:
    """Return the dense form at 256 rows: the logits are read and written once."""
    rows = []
    for half, name in ((False, "float32"), (True, "bfloat16")):
        weight = (HALF if half else FLOAT) * VOCABULARY * kernel_work.RANK
        floor = (2 * FLOAT * BATCH * VOCABULARY + weight) / BANDWIDTH / MICRO
        work = kernel_work.dense(BATCH, half=half)
        works = [work] if half else [kernel_work.feature_split(BATCH), work]
        what = f"dense form (all tokens), {BATCH} rows, {name} head"
        time = over(total(works), floor)
        rows.append(figure(what, "x floor", floor, time, ("most", 1.5), work.bound))
    return rows


def value_reweight() -> list[Row]:
    """Return the draw by a head's values and by candidates at 256 rows."""
    rows = []
    for half, name in ((False, "float32"), (True, "bfloat16")):
        size = HALF if half else FLOAT
        logits = size * BATCH * VOCABULARY
        floor = (logits + size * VOCABULARY * kernel_work.RANK) / BANDWIDTH / MICRO
        tile = kernel_work.head_tile(BATCH, half=half)
        works = [tile, kernel_work.head_pick(BATCH, half=half)]
        if not half:
            works.append(kernel_work.feature_split(BATCH))
        time = over(total(works), floor)
        what = f"value_reweight by a head, {BATCH} rows, {name}"
        rows.append(figure(what, "x floor", floor, time, ("most", 2.0), tile.bound))
        floor = logits / BANDWIDTH / MICRO
        tile = kernel_work.candidates_tile(BATCH, K, half=half)
        time = over(total([tile, kernel_work.candidates_pick(BATCH, half=half)]), floor)
        what = f"value_reweight by {K} candidates, {BATCH} rows, {name}"
        rows.append(figure(what, "x floor", floor, time, ("most", 2.0), tile.bound))
    return rows


def attention() -> list[Row]:
    """Return sibling attention at the shapes of the benchmark."""
    rows = []
    aims = (None, ("most", 2.0), ("most", 2.5))
    for shape, aim in zip(attention_work.SHAPES, aims, strict=True):
        time = attention_work.time(shape, attention_work.present(shape))
        bound = "waits between the steps"
        if shape.product_us > shape.floor_us:
            times = shape.product_us / shape.floor_us
            bound = f"the products alone take {times:.1f} x the floor"
        what = f"sibling attention {tuple(shape)}"
        rows.append(figure(what, "x floor", shape.floor_us, over(time, shape.floor_us), aim, bound))
    return rows


# --- vLLM ---


def steered_over_plain(values: int, concurrency: int) -> Range:
    """Return the speed of steered decoding over plain decoding.

    At the high end, a step grows by the kernels alone, and the host's work is hidden behind the
    GPU's. At the low end, what the older version added and its selection does not explain is all
    still there. That was not measured for four values, so it is that of two.
    """
    plain = plain_step_us(concurrency)
    kernels = steering_us(concurrency, values) + kernel_work.float32_logits(concurrency)
    rest = unexplained_us(min(values, 2), concurrency)
    return Range(plain / (plain + kernels.high + rest), plain / (plain + kernels.low))


def vllm_steering() -> list[Row]:
    """Return steering by heads in vLLM with an 8B model, by concurrency."""
    rows = []
    for values in VALUE_COUNTS:
        for concurrency, goal in ONE_VALUE.items():
            limit = goal if values == 1 else SEVERAL_VALUES
            ratio = steered_over_plain(values, concurrency)
            what = f"vLLM, {_count(values, 'value')} over plain at concurrency {concurrency}"
            rest = unexplained_us(min(values, 2), concurrency)
            bound = f"{rest:.0f} us that the older version added, beside its top-k"
            rows.append(figure(what, "x plain", None, ratio, ("least", limit), bound))
    return rows


def best_of() -> list[Row]:
    """Return best-of-8 over eight answers: no kernel is in it, so the older figure stands."""
    value = Range(min(older_version.BEST_OF_8), max(older_version.BEST_OF_8))
    what = "vLLM, time of best-of-8 over that of eight answers"
    return [figure(what, "x plain", None, value, ("most", 1.05), "the host, as measured before")]


def lookahead() -> list[Row]:
    """Return steering by a value LM of the 1B class in vLLM at concurrency 32."""
    concurrency = 32
    plain = plain_step_us(concurrency)
    what = f"over plain at concurrency {concurrency}"
    rows = []
    for name, added, aim, bound in (
        (
            "a 1B value LM",
            value_lm_work.graph_step_us(concurrency),
            ("least", 0.5),
            "products, some 600 small kernels, and what the wait for tokens exposes",
        ),
        (
            "a 1B value LM without a CUDA graph,",
            value_lm_work.eager_step_us(concurrency),
            None,
            "the host, which issues some 800 operations for the value LM",
        ),
    ):
        ratio = Range(plain / (plain + added.high), plain / (plain + added.low))
        rows.append(figure(f"vLLM, {name} {what}", "x plain", None, ratio, aim, bound))
    return rows


def all_rows() -> list[Row]:
    """Return every target, in the order of the table."""
    kernels = [*top_k(), *steering_call(), *dense(), *value_reweight(), *attention()]
    return [*kernels, *vllm_steering(), *best_of(), *lookahead()]


def main() -> None:
    """Compute all targets and write the record."""
    rows = all_rows()
    for row in rows:
        print(f"{row['what']}: {row['low']:g} to {row['high']:g} {row['unit']}: {row['verdict']}")
    path = record(
        NAME,
        baseline="the floor of each kernel: bytes that must move, at the speed of a copy",
        seed=None,
        rows=rows,
        setup={
            "note": "computed for one H200; nothing was run or timed on one",
            "plain_step_us": {str(c): round(plain_step_us(c)) for c in ONE_VALUE},
            "added_by_older_version_us": {str(c): round(added_us(1, c)) for c in ONE_VALUE},
            "no_seed": "nothing is drawn: this is arithmetic",
        },
    )
    print(path)


if __name__ == "__main__":
    main()
