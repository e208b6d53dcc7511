"""Measure the ways to draw a token in the embedded engine, on a Llama of the 1B class.

On a GPU, a row is steered and drawn by one kernel, `value_reweight`. A row that excludes tokens is
steered first and drawn afterwards. A min_p that excludes next to nothing takes the second way, so
both do the same work.

    python -m benchmarks.gpu.embedded [--seconds 45] [--tiny]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu.models import HEADS, LARGE, SEED, TINY, Size, write_models
from benchmarks.record import record
from benchmarks.serving.rows import Row, ratio_row
from infer_align import config
from infer_align.engines import Engine
from infer_align.steering import Steering
from infer_align.types import Candidate, Draw

BATCHES = (1, 16, 64)
TOKENS = 64
TINY_BATCHES = (2,)
TINY_TOKENS = 2
MAX_ROUNDS = 7
STEERING = Steering({HEADS[0]: 0.5}, 20, "keep")
# Excludes tokens that are a billion times less likely than the likeliest one.
TWO_STEP = {"min_p": 1e-9}
Case = tuple[str, str]
CASES: tuple[Case, ...] = (
    ("plain", "one kernel"),
    ("plain", "two steps"),
    ("vas", "one kernel"),
    ("vas", "two steps"),
)


def write_model(folder: Path, size: Size, device: torch.device) -> Path:
    """Write a language model of the value LM's shape, a head for it and a configuration."""
    embedded = replace(size, lm=size.value_lm)
    write_models(folder, embedded, device)
    torch.manual_seed(SEED)
    with device:
        dtype = getattr(torch, size.dtype)
        model = AutoModelForCausalLM.from_config(embedded.lm.config(), dtype=dtype)
    model.save_pretrained(folder / "lm")
    lines = [
        "[engine]",
        'kind = "transformers"',
        f'model = "{folder / "lm"}"',
        f'device = "{device}"',
        f'dtype = "{size.dtype}"',
        f"[values.{HEADS[0]}]",
        'kind = "head"',
        f'path = "{folder / HEADS[0]}.safetensors"',
    ]
    file = folder / "embedded.toml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


async def rate(engine: Engine, case: Case, batch: int, tokens: int) -> float:
    """Return the tokens per second of `batch` requests at once."""
    kind, way = case
    messages = [{"role": "user", "content": "What do owls eat?"}]
    body: dict[str, Any] = {"messages": messages, "max_tokens": tokens, "ignore_eos": True}
    if way == "two steps":
        body |= TWO_STEP
    steering = STEERING if kind == "vas" else None
    draws = [Draw(body, 1, (seed,), steering=steering) for seed in range(batch)]
    started = time.perf_counter()
    await asyncio.gather(*(finish(engine, draw) for draw in draws))
    return batch * tokens / (time.perf_counter() - started)


async def finish(engine: Engine, draw: Draw) -> None:
    """Read a draw to its end.

    Raises:
        RuntimeError: its candidate failed.
    """
    async with engine.sample(draw) as stream:
        async for event in stream:
            if isinstance(event, Candidate) and event.error:
                raise RuntimeError(event.error)


async def measure(
    file: Path, batches: Sequence[int], tokens: int, seconds: float
) -> dict[str, list[float]]:
    """Return the rates of each case in alternating rounds, until the time is over."""
    started = time.monotonic()
    engine = config.load(file).load_engine()
    await engine.start()
    rates: dict[str, list[float]] = {}
    for round_number in range(MAX_ROUNDS + 1):
        round_started = time.monotonic()
        for batch in batches:
            for case in CASES:
                result = await rate(engine, case, batch, tokens)
                # The first round compiles the kernels.
                if round_number:
                    rates.setdefault(key(case, batch), []).append(result)
        now = time.monotonic()
        if round_number and now - started + (now - round_started) > seconds:
            break
    await engine.close()
    return rates


def key(case: Case, batch: int) -> str:
    """Return the name of a case at a batch size."""
    return f"{case[0]}, {case[1]}, batch {batch}"


def summarize(rates: dict[str, list[float]], batches: Sequence[int]) -> list[Row]:
    """Return the ratios of the two ways, and of steering to plain decoding."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = []
    for batch in batches:
        one, two, vas_one, vas_two = (medians[key(case, batch)] for case in CASES)
        what = f"batch {batch}, tokens per second"
        rows.append(ratio_row(f"plain, one kernel against two steps, {what}", one, two, ""))
        rows.append(ratio_row(f"vas, one kernel against two steps, {what}", vas_one, vas_two, ""))
        rows.append(ratio_row(f"vas against plain, one kernel, {what}", vas_one, one, ""))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description="Measure the embedded engine's two ways to draw.")
    parser.add_argument("--seconds", type=float, default=45.0, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a small model and few tokens")
    options = parser.parse_args(arguments)
    size = TINY if options.tiny else LARGE
    batches = TINY_BATCHES if options.tiny else BATCHES
    tokens = TINY_TOKENS if options.tiny else TOKENS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        file = write_model(Path(folder), size, device)
        rates = asyncio.run(measure(file, batches, tokens, options.seconds))
    setup = {"model": f"a Llama of the value LM's shape, {size.name}", "tokens": tokens}
    path = record(
        "gpu_embedded",
        baseline="two steps: steer, then sample; plain decoding",
        seed=SEED,
        rows=summarize(rates, batches),
        setup={**setup, "rates": rates, "device": str(device)},
    )
    print(path)


if __name__ == "__main__":
    main()
