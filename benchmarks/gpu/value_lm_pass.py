"""Measure steps of a value LM of the 1B class, with its pass in a CUDA graph and without.

A step values 20 candidates of each row and keeps one of them. The two variants alternate.

    python -m benchmarks.gpu.value_lm_pass [--seconds 35] [--tiny]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.gpu.models import LARGE, LOOKAHEAD, SEED, TINY, Size, write_models
from benchmarks.record import record
from benchmarks.serving.rows import Row, ratio_row
from infer_align.decoding.siblings import ValueCache, read_tokens
from infer_align.values import FrozenModel, tokenizer_digest
from infer_align.values.lookahead import ValueLM

K = 20
PROMPT_TOKENS = 64
ROWS = (1, 32, 64)
TINY_ROWS = (2,)
STEPS = 32
MAX_ROUNDS = 9
VARIANTS = ("with graphs", "eager")


def load(folder: Path, size: Size, device: torch.device) -> ValueLM:
    """Load the value LM of `write_models`.

    Raises:
        RuntimeError: it does not read siblings by a pass.
    """
    vocabulary = AutoTokenizer.from_pretrained(folder / "lm").get_vocab()
    digest = tokenizer_digest(vocabulary)
    frozen = FrozenModel("lm", size.lm.vocab_size, size.lm.hidden_size, digest, str(device))
    lm = ValueLM(str(folder / LOOKAHEAD), frozen, size.dtype)
    lm.use_sibling_pass(LOOKAHEAD)
    if lm.sibling_pass is None:
        raise RuntimeError("the value LM has no pass over siblings.")
    return lm


@torch.inference_mode()
def steps_per_second(lm: ValueLM, rows: int) -> float:
    """Return the steps per second of a batch that starts with a short prompt."""
    text = list(range(5, 5 + PROMPT_TOKENS))
    columns = read_tokens(lm, text).take([0] * rows, len(text))
    cache = ValueCache(lm, list(range(rows)), [len(text)] * rows, columns)
    candidates = torch.arange(rows * K, device=lm.lm.device).view(rows, K) + 5
    # The first step compiles and, in the first rounds, captures.
    for step in range(STEPS + 1):
        if step == 1:
            started = time.perf_counter()
        cache.siblings(candidates)
        # This waits for the device, as every step of an engine does.
        cache.choose(candidates[:, step % K])
    return STEPS / (time.perf_counter() - started)


def measure(
    variants: Sequence[ValueLM], rows: Sequence[int], seconds: float
) -> dict[str, list[float]]:
    """Return the steps per second of each variant and number of rows, in alternating rounds."""
    started = time.monotonic()
    rates: dict[str, list[float]] = {}
    for round_number in range(MAX_ROUNDS + 1):
        round_started = time.monotonic()
        for count in rows:
            for name, lm in zip(VARIANTS, variants, strict=True):
                rate = steps_per_second(lm, count)
                if round_number:
                    rates.setdefault(key(name, count), []).append(rate)
        now = time.monotonic()
        if round_number and now - started + (now - round_started) > seconds:
            break
    return rates


def key(name: str, rows: int) -> str:
    """Return the name of a variant at a number of rows."""
    return f"{name}, {rows} rows"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description="Measure steps of a value LM.")
    parser.add_argument("--seconds", type=float, default=35.0, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    options = parser.parse_args(arguments)
    size = TINY if options.tiny else LARGE
    counts = TINY_ROWS if options.tiny else ROWS
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), size, device)
        variants = [load(Path(folder), size, device) for _ in VARIANTS]
    graphed, eager = (each.sibling_pass for each in variants)
    if graphed is None or eager is None:
        raise SystemExit("the value LM has no pass over siblings.")
    eager.graphs.may_capture = False
    rates = measure(variants, counts, options.seconds)
    rows: list[Row] = []
    for count in counts:
        medians = [statistics.median(rates[key(name, count)]) for name in VARIANTS]
        what = f"{VARIANTS[0]} against {VARIANTS[1]}, {count} rows, steps per second"
        rows.append(ratio_row(what, *medians, ""))
    setup = {
        "model": f"a value LM of the shape {size.name}, random weights",
        "candidates": K,
        "graphs": len(graphed.graphs),
        "rates": rates,
        "device": str(device),
    }
    path = record("gpu_value_lm_pass", baseline=VARIANTS[1], seed=SEED, rows=rows, setup=setup)
    print(path)


if __name__ == "__main__":
    main()
