"""Compare forms of the small model's forward pass: types of weights, int8 and a compiled pass.

Every form decodes the same prompts, in alternating rounds. A form may serve the embedded engine if
the logits of a row do not depend on the other rows of its batch, and if it answers like float32.

    python benchmarks/serving/forward_forms.py [--rounds 5] [--steps 16] [--compile]
        [--llama-batched-bench PATH]

`--llama-batched-bench` adds the same model in llama.cpp: the path of its program of that name.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.record import record
from benchmarks.serving.rows import Row
from infer_align import config, quickstart
from infer_align.decoding.cache import RowCache
from infer_align.demo.locate import locate
from infer_align.engines.transformers import Transformers
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.engines.transformers.linear_layers import quicken_linear_layers

OUT = Console(width=110)
BATCHES = (1, 8, 32)
TEXT = (
    "The sea is a large body of salt water that covers most of the planet. People have lived near "
    "the sea since the earliest times, because it gives them food, work and a way to travel. "
) * 3
PROMPT_TOKENS = 48
# Decoding steps of llama.cpp's program and of ours count the tokens after the prompt alone.
CONTEXT = 8192


@dataclass
class Form:
    """A form of the forward pass.

    Attributes:
        name: of the form.
        lm: the model.
        seconds: of one decoding step, by batch and round.
    """

    name: str
    lm: Any
    seconds: dict[int, list[float]] = field(default_factory=dict)


class Int8Linear(torch.nn.Module):
    """A linear layer with int8 weights, one scale per output, and bfloat16 states."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.float().abs().amax(dim=1) / 127
        self.weight = (layer.weight.float() / scale[:, None]).round().to(torch.int8)
        self.scale = scale.to(torch.bfloat16)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return [..., d] @ W^T."""
        flat = states.reshape(-1, states.shape[-1])
        output = torch._weight_int8pack_mm(flat, self.weight, self.scale)
        return output.reshape(*states.shape[:-1], -1)


def load(folder: str, dtype: str) -> Any:
    """Return the model with weights of this type."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lm = lm.eval().requires_grad_(requires_grad=False)
    quicken_linear_layers(lm)
    return lm


def with_int8_weights(lm: Any) -> Any:
    """Replace every linear layer by one with int8 weights."""
    for name, layer in list(lm.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            parent, _, attribute = name.rpartition(".")
            setattr(lm.get_submodule(parent), attribute, Int8Linear(layer))
    return lm


def with_int8_arithmetic(lm: Any) -> Any:
    """Let every linear layer multiply in int8, with one scale for all states of a batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize: Any = torch.ao.quantization.quantize_dynamic
        return quantize(lm, {torch.nn.Linear}, dtype=torch.qint8)


@torch.inference_mode()
def decode(lm: Any, prompts: torch.Tensor, steps: int) -> float:
    """Return the median of the seconds of one step after these prompts. [B, T]."""
    cache = RowCache()
    lm(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)
    tokens = prompts[:, :1]
    seconds = []
    for _ in range(steps):
        start = perf_counter()
        positions = torch.full(tokens.shape, cache.length)
        lm(input_ids=tokens, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        seconds.append(perf_counter() - start)
    return statistics.median(seconds)


@torch.inference_mode()
def agreement(lm: Any, reference: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the share of positions whose likeliest token is that of the reference. [T], [T]."""
    chosen = lm(input_ids=ids[None]).logits[0].argmax(dim=-1)
    return float((chosen == reference).float().mean())


@torch.inference_mode()
def dependence(lm: Any, prompts: torch.Tensor) -> float:
    """Return how far a row's logits move when other rows join its batch, at most."""
    together = lm(input_ids=prompts, logits_to_keep=1).logits[0, -1].float()
    alone = lm(input_ids=prompts[:1], logits_to_keep=1).logits[0, -1].float()
    return float((together - alone).abs().max())


def forms(folder: str, *, is_compiled: bool) -> list[Form]:
    """Return the forms, float32 first."""
    made = [
        Form("float32", load(folder, "float32")),
        Form("bfloat16", load(folder, "bfloat16")),
        Form("int8 weights, bfloat16 states", with_int8_weights(load(folder, "bfloat16"))),
        Form("int8 weights and states", with_int8_arithmetic(load(folder, "float32"))),
    ]
    if is_compiled:
        compiled = torch.compile(load(folder, "bfloat16"), dynamic=True)
        made.append(Form("bfloat16, compiled", compiled))
    return made


def measure(made: list[Form], folder: str, rounds: int, steps: int) -> list[Row]:
    """Return one row per form and batch."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids[0]
    prompts = torch.stack([ids[i : i + PROMPT_TOKENS] for i in range(max(BATCHES))])
    first_pass: dict[str, float] = {}
    for form in made:
        # Compilation takes place here.
        start = perf_counter()
        decode(form.lm, prompts[:2], 2)
        first_pass[form.name] = perf_counter() - start
        OUT.print(f"{form.name}: first pass in {first_pass[form.name]:.1f} s")
    for _ in range(rounds):
        for batch in BATCHES:
            for form in made:
                times = form.seconds.setdefault(batch, [])
                times.append(decode(form.lm, prompts[:batch], steps))
    with torch.inference_mode():
        reference = made[0].lm(input_ids=ids[None]).logits[0].argmax(dim=-1)
    rows = []
    for form in made:
        share = agreement(form.lm, reference, ids)
        moved = dependence(form.lm, prompts[:8])
        for batch in BATCHES:
            rate = batch / statistics.median(form.seconds[batch])
            baseline = batch / statistics.median(made[0].seconds[batch])
            row = _row(f"{form.name}, batch {batch}", rate, baseline)
            row |= {"agrees": share, "row_moves_by": moved, "first_s": first_pass[form.name]}
            rows.append(row)
    return rows


def _row(what: str, rate: float, baseline: float) -> Row:
    return {"what": what, "value": rate / baseline, "ours": rate, "baseline": baseline}


def llama_rows(program: str, gguf: Path, made: list[Form], rounds: int, steps: int) -> list[Row]:
    """Return the rows of llama.cpp, with the given weights and with the same in bfloat16."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bfloat16 = Path(folder, "bf16.gguf")
        quantize = Path(program).with_name("llama-quantize")
        command = [str(quantize), "--allow-requantize", str(gguf), str(bfloat16), "BF16"]
        subprocess.run(command, check=True, capture_output=True)
        for name, path in (("Q4_1", gguf), ("bfloat16", bfloat16)):
            rates: dict[int, list[float]] = {}
            for _ in range(rounds):
                for batch, rate in _llama_rates(program, path, steps).items():
                    rates.setdefault(batch, []).append(rate)
            for batch, measured in rates.items():
                baseline = batch / statistics.median(made[0].seconds[batch])
                rate = statistics.median(measured)
                rows.append(_row(f"llama.cpp, {name}, batch {batch}", rate, baseline))
    return rows


def _llama_rates(program: str, gguf: Path, steps: int) -> dict[int, float]:
    """Return the tokens per second of decoding, by batch."""
    parallel = ",".join(str(batch) for batch in BATCHES)
    command = [program, "-m", str(gguf), "-c", str(CONTEXT), "-t", str(torch.get_num_threads())]
    command += ["-npp", str(PROMPT_TOKENS), "-ntg", str(steps), "-npl", parallel]
    command += ["--output-format", "jsonl"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rates: dict[int, float] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            result = json.loads(line)
            rates[result["pl"]] = result["speed_tg"]
    return rates


def quickstart_model() -> tuple[Path, str]:
    """Return the file that `make serve` serves, and the folder into which it is converted."""
    settings = config.load(quickstart.CONFIG)
    if not isinstance(settings.engine, Transformers):
        raise TypeError(f"make serve has the engine {settings.engine}")
    engine = settings.load_engine()
    if not isinstance(engine, TransformersEngine):
        raise TypeError(f"make serve loads a {type(engine).__name__}")
    asyncio.run(engine.start())
    folder = str(engine.frozen.lm.config.name_or_path)
    asyncio.run(engine.close())
    return Path(locate(settings.engine.model)), folder


def print_rows(rows: list[Row]) -> None:
    """Print the rows as a table."""
    columns = ("what", "tokens/s", "of float32", "agrees", "a row moves by", "first pass, s")
    table = Table(*columns)
    for row in rows:
        numbers = [f"{row['ours']:.1f}", f"{row['value']:.2f}"]
        for name in ("agrees", "row_moves_by", "first_s"):
            numbers.append(f"{row[name]:.3g}" if name in row else "")
        table.add_row(row["what"], *numbers)
    OUT.print(table)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="add the compiled pass: minutes")
    parser.add_argument("--llama-batched-bench", help="the path of llama.cpp's program")
    options = parser.parse_args()
    gguf, folder = quickstart_model()
    made = forms(folder, is_compiled=options.compile)
    rows = measure(made, folder, options.rounds, options.steps)
    program: str | None = options.llama_batched_bench
    if program:
        rows += llama_rows(program, gguf, made, options.rounds, options.steps)
    print_rows(rows)
    setup = {
        "rounds": options.rounds,
        "steps": options.steps,
        "prompt_tokens": PROMPT_TOKENS,
        "threads": torch.get_num_threads(),
        "unit": "tokens per second of decoding, all rows together; median of the rounds",
    }
    path = record(
        "forward_forms", baseline="float32 in alternating rounds", seed=0, rows=rows, setup=setup
    )
    OUT.print(f"wrote {path}")


if __name__ == "__main__":
    main()
