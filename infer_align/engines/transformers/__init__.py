"""The embedded engine: any causal LM that transformers loads, batched in this process."""

from __future__ import annotations

from dataclasses import dataclass, field

from infer_align.engines.transformers.engine import TransformersEngine


@dataclass(frozen=True, slots=True)
class Transformers:
    """Any causal LM that transformers loads, in this process."""

    model: str = field(
        default="demo",
        metadata={"description": 'Path, GGUF file or hub id; "demo" is the embedded model.'},
    )
    device: str = field(
        default="auto",
        metadata={"description": 'Device of the model; "auto" uses a GPU if there is one.'},
    )
    dtype: str = field(
        default="auto",
        metadata={
            "description": 'torch dtype of the weights, or "int8" on a CPU: linear layers in '
            'int8 with one scale per output, all else in bfloat16. "auto" is float32 on a CPU, '
            "else the model's own."
        },
    )
    context_length: int | None = field(
        default=None,
        metadata={
            "ge": 8,
            "description": "Maximum number of tokens of prompt and completion together. "
            "Default: the model's. It also chooses the factors of longrope and dynamic rotary "
            "positions, once for all requests, as vLLM does.",
        },
    )
    max_batch: int = field(
        default=256,
        metadata={
            "ge": 1,
            "description": "Maximum number of candidates decoded at once. Each prompt of "
            "`align.guidance` counts as one more.",
        },
    )
    kv_cache_gib: float = field(
        default=2.0,
        metadata={
            "gt": 0,
            "description": "Memory for keys and values; limits how many candidates run at once.",
        },
    )
    prefill_tokens: int = field(
        default=1024,
        metadata={
            "ge": 16,
            "description": "Maximum number of prompt tokens read between two decoding steps.",
        },
    )
    threads: int | None = field(
        default=None,
        metadata={
            "ge": 1,
            # A million threads take all memory.
            "le": 1024,
            "description": "CPU threads of torch. Default: one for a model under 30 million "
            "weights, which several threads slow down, else torch's own choice.",
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={"description": "File of a Jinja chat template. Default: the model's own."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"description": "Run model code that comes with the weights."},
    )

    def load(self) -> TransformersEngine:
        """Return the engine. Its model is loaded by `start`."""
        return TransformersEngine(self)


plugin = Transformers
