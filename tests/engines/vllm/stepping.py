"""vLLM's own engine stepped by hand in this process, and a float32 reference of transformers without cache and without batch."""

# ruff: noqa: PLC0415 - vLLM takes ten seconds to import, and is told by the environment how to run
from __future__ import annotations

import gc
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from infer_align import demo
from infer_align.engines.vllm.steering import Steerer
from infer_align.engines.vllm.watching import Named
from infer_align.types import EstimateSchedule, Steering
from infer_align.values import FrozenModel, head, tokenizer_digest
from infer_align.values.head import HeadValue

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# Of vLLM's own making: at import, in its workers, and what its shutdown leaves.
WARNINGS = [
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed context <zmq:ResourceWarning"),
]
MODEL = str(demo.path(demo.LM))
# Mixed so that rows use one value, several, and none; k of 1, of some, and of everything; both tails.
MIXES: list[Steering | None] = [
    Steering({"helpful": 6.0}, 20, "keep"),
    Steering({"brief": -3.0}, 7, "mask"),
    None,
    Steering({"helpful": 4.0, "brief": 2.0}, 12, "keep"),
    Steering({"mlp": 2.0}, 1, "keep"),
    Steering({"mlp": -2.5, "helpful": 3.0}, 10**6, "mask"),
    Steering({"helpful": 0.0}, 5, "mask"),
    Steering({"mlp": 1.0, "brief": 0.0}, 50, "mask"),
]


def make_values(folder: Path) -> dict[str, HeadValue]:
    """The demo's two heads, and a random MLP for the same model."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(MODEL)
    v, d = config.vocab_size, config.hidden_size
    digest = tokenizer_digest(AutoTokenizer.from_pretrained(MODEL).get_vocab())
    g = torch.Generator().manual_seed(3)
    mlp = {"W1": (16, d), "c1": (16,), "W2": (6, 16), "E": (v, 6), "b": (v,)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in mlp.items()}
    tensors["W1"] /= d**0.5
    head.write(folder / "mlp.safetensors", tensors, FrozenModel("demo", v, d, digest, "cpu"), {})
    return {
        "helpful": HeadValue("demo/value-helpful.safetensors"),
        "brief": HeadValue("demo/value-brief.safetensors"),
        "mlp": HeadValue(str(folder / "mlp.safetensors")),
    }


@contextmanager
def environment(**more: str) -> Iterator[None]:
    """vLLM's settings while an engine lives; what it does to this process's threads, and leaves behind, is undone."""
    before, cores, threads = dict(os.environ), os.sched_getaffinity(0), torch.get_num_threads()
    os.environ.update({**ENVIRONMENT, **more})
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Unclosed context <zmq", ResourceWarning
            )  # vLLM's, of an engine that was shut down
            gc.collect()
        os.environ.clear()
        os.environ.update(before)
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def make_engine(steerer: Steerer, **options: Any) -> Any:
    """An LLMEngine on the demo's language model: prompts are read in small pieces."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    given = {
        "model": MODEL,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1 << 26,
        "block_size": 32,
        "max_num_seqs": 40,
        "max_num_batched_tokens": 40,
        "disable_log_stats": True,
        **options,
    }
    config = EngineArgs(**steerer.engine_args(given)).create_engine_config()
    steerer.configure(config)
    return LLMEngine.from_vllm_config(config)


@dataclass
class Ask:
    """One request, and what came back."""

    prompt: list[int]
    steering: Steering | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    arrives: int = 0  # at this step
    aborted_at: int | None = None
    schedule: EstimateSchedule | None = None
    estimates: dict[int, float] = field(default_factory=dict)  # tokens -> value
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] | None = None
    cached: int = 0
    reason: str | None = None


def run(
    engine: Any,
    steerer: Steerer,
    asks: Sequence[Ask],
    each_step: Callable[[int], None] = lambda _: None,
) -> None:
    """Step the engine until every request is answered or aborted."""
    from vllm import SamplingParams

    known, step = {}, 0
    while step <= max(ask.arrives for ask in asks) or engine.has_unfinished_requests():
        for i, ask in enumerate(asks):
            if ask.arrives == step:
                extra = steerer.extra_args(ask.steering) if ask.steering else {}
                extra |= Named(str(i), ask.schedule).extra_args() if ask.schedule else {}
                params = SamplingParams(
                    **{"temperature": 0, "logprobs": 0, "max_tokens": 8, **ask.params},
                    extra_args=extra or None,
                )
                known[engine.add_request(f"{id(asks)}-{i}", _prompt(ask.prompt), params)] = ask
            if ask.aborted_at == step:
                engine.abort_request([f"{id(asks)}-{i}"])
        for output in engine.step():
            _take(asks[int(output.request_id.rpartition("-")[2])], output)
        for name, tokens, value in (
            engine.collective_rpc("infer_align_take_estimates")[0] if steerer.active else ()
        ):
            asks[int(name)].estimates[tokens] = value
        each_step(step)
        step += 1


def _prompt(ids: list[int]) -> Any:
    return {"type": "token", "prompt_token_ids": ids}


def _take(ask: Ask, output: Any) -> None:
    found = output.outputs[0]
    ask.tokens, ask.reason, ask.cached = (
        list(found.token_ids),
        found.finish_reason,
        output.num_cached_tokens or 0,
    )
    ask.logprobs = [
        entry[token].logprob
        for token, entry in zip(found.token_ids, found.logprobs or [], strict=False)
    ]
    if output.prompt_logprobs:
        pairs = zip(ask.prompt[1:], output.prompt_logprobs[1:], strict=True)
        ask.prompt_logprobs = [entry[token].logprob for token, entry in pairs]


class Reference:
    """The definition, token by token: every forward reads the whole text again."""

    def __init__(self, values: Mapping[str, HeadValue]) -> None:
        from transformers import AutoModelForCausalLM

        self.lm = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        self.heads = {name: head.read(value.path)[0] for name, value in values.items()}

    def value(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """Of every token, [V]."""
        t = self.heads[name]
        u = (
            t["P"] @ hidden
            if "P" in t
            else t["W2"] @ torch.nn.functional.gelu(t["W1"] @ hidden + t["c1"])
        )
        return t["E"] @ u + t["b"]

    @torch.inference_mode()
    def step(self, ids: list[int], steering: Steering | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token's logits, [V] steered, and its logprobs under the frozen model, [V]."""
        out = self.lm(torch.tensor([ids]), output_hidden_states=True)
        logits, hidden = out.logits[0, -1].clone(), out.hidden_states[-1][0, -1]
        frozen = torch.log_softmax(logits, -1)
        used = {name: beta for name, beta in (steering.beta if steering else {}).items() if beta}
        if steering and used:
            top = logits.topk(min(steering.top_k, len(logits))).indices
            values = {name: self.value(name, hidden)[top] for name in used}
            shift = sum(beta * (values[name] - values[name].mean()) for name, beta in used.items())
            steered = logits[top] + shift
            if steering.tail == "mask":
                logits[:] = -math.inf
            logits[top] = steered
        return logits, frozen

    def expected(
        self, ids: list[int], steering: Steering | None, weights: Mapping[str, float]
    ) -> float:
        """What the values expect of the next token, weighted."""
        with torch.inference_mode():
            hidden = self.lm(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][
                0, -1
            ]
            policy = torch.softmax(self.step(ids, steering)[0], -1)
            return float(
                sum(weight * policy @ self.value(name, hidden) for name, weight in weights.items())
            )

    def greedy(
        self, prompt: list[int], steering: Steering | None, n: int, eos: int = 1
    ) -> tuple[list[int], list[float]]:
        """n tokens, and the frozen model's logprob of each."""
        ids, tokens, logprobs = list(prompt), [], []
        for _ in range(n):
            logits, frozen = self.step(ids, steering)
            tokens.append(token := int(logits.argmax()))
            logprobs.append(float(frozen[token]))
            ids.append(token)
            if token == eos:
                break
        return tokens, logprobs


def prompts(n: int) -> list[list[int]]:
    """Chats of the demo's world, of 20 to 150 tokens, in groups that share their beginning."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    asked = "What are the diet and the colour of the owl?"
    found = []
    for i in range(n):
        turns: list[dict[str, str]] = []
        for _ in range(i % 5):
            turns += [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": "The owl eats mice and is brown."},
            ]
        turns.append(
            {"role": "user", "content": asked if i % 2 else "What is the size of the fox?"}
        )
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


SCHEDULES = [
    EstimateSchedule({"helpful": 1.0}, 2),
    None,
    EstimateSchedule({"mlp": -0.5, "brief": 2.0}, 3),
]


def mixed(n: int, **params: Any) -> list[Ask]:
    """n requests that come one after the other, each with its own steering; of three, two are watched."""
    return [
        Ask(
            prompt,
            MIXES[i % len(MIXES)],
            {"max_tokens": 5 + i % 6, **params},
            arrives=i // 3,
            schedule=SCHEDULES[i % 3],
        )
        for i, prompt in enumerate(prompts(n))
    ]


def assert_estimates(asks: Sequence[Ask], reference: Reference) -> None:
    """Each is there, once its number of tokens is reached and another one is sampled, and is what the reference expects."""
    for ask in asks:
        due = [t for t in range(1, len(ask.tokens)) if ask.schedule and ask.schedule.is_due(t)]
        assert sorted(ask.estimates) == due
        for t in due:
            expected = reference.expected(
                [*ask.prompt, *ask.tokens[:t]],
                ask.steering,
                ask.schedule.values if ask.schedule else {},
            )
            assert math.isclose(ask.estimates[t], expected, abs_tol=1e-4)
