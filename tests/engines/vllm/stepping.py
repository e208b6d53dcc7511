"""vLLM's engine, stepped by hand in this process, and a float32 reference in transformers.

The reference uses neither a cache nor a batch.
"""

# ruff: noqa: PLC0415 - vLLM takes ten seconds to import, after the environment is set
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
from infer_align.engines.vllm.extra_args import EstimateRequest
from infer_align.engines.vllm.values import EngineValues
from infer_align.steering import EstimateSchedule, Steering
from infer_align.values import FrozenModel, Value, head, tokenizer_digest
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import Lookahead, LookaheadValue
from tests.engines.vllm.divergence import limited

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# Warnings of vLLM itself: at import, in its workers and after its shutdown.
WARNINGS = [
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed context <zmq:ResourceWarning"),
]
MODEL = str(demo.path(demo.LM))
# Rows with one value, several values and none; k of 1, of some tokens and of all; both tails.
STEERINGS: list[Steering | None] = [
    Steering({"helpful": 6.0}, 20, "keep"),
    Steering({"brief": -3.0}, 7, "mask"),
    None,
    Steering({"helpful": 4.0, "brief": 2.0}, 12, "keep"),
    Steering({"mlp": 2.0}, 1, "keep"),
    Steering({"mlp": -2.5, "helpful": 3.0}, 10**6, "mask"),
    Steering({"helpful": 0.0}, 5, "mask"),
    Steering({"mlp": 1.0, "brief": 0.0}, 50, "mask"),
    Steering({"helpful": 5.0, "mlp": -1.0}, "all", "keep"),
    Steering({"helpful": 5.0}, 20, "mask", 0.05),
    Steering({"brief": -3.0}, 20, "keep", 0.2),
    Steering({"helpful": 9.0}, 20, "keep", max_kl=0.05),
    Steering({"helpful": 9.0, "mlp": 2.0}, "all", "keep", max_kl=0.3),
]
# The same for values of `make_lookahead_values`: a value LM with its two heads, and a head.
LOOKAHEAD_STEERINGS: list[Steering | None] = [
    Steering({"helpful": 6.0}, 20, "keep"),
    Steering({"brief": -3.0}, 7, "mask"),
    None,
    Steering({"helpful": 4.0, "brief": 2.0}, 12, "keep"),
    Steering({"state": 4.0}, 300, "keep"),
    Steering({"state": -2.5, "helpful": 3.0}, 30, "mask"),
    Steering({"state": 5.0}, "all", "keep"),
    Steering({"helpful": 9.0}, 20, "keep", max_kl=0.05),
    Steering({"brief": 9.0, "state": -4.0}, 40, "keep", max_kl=0.3),
]
SCHEDULES = [
    EstimateSchedule({"helpful": 1.0}, 2),
    None,
    EstimateSchedule({"mlp": -0.5, "brief": 2.0}, 3),
]


def demo_model() -> FrozenModel:
    """Return the properties of the demo's model."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(MODEL)
    digest = tokenizer_digest(AutoTokenizer.from_pretrained(MODEL).get_vocab())
    return FrozenModel("demo", config.vocab_size, config.hidden_size, digest, "cpu")


def make_lookahead_values() -> dict[str, Value]:
    """Return both heads of the demo's value LM, and one of its heads on the model's states."""
    return {
        "helpful": Lookahead("demo/value-lm", "helpful").load(),
        "brief": Lookahead("demo/value-lm", "brief").load(),
        "state": HeadValue("demo/value-helpful.safetensors"),
    }


def make_values(folder: Path) -> dict[str, HeadValue]:
    """Return the demo's two heads, and a random MLP for the same model."""
    frozen = demo_model()
    v, d = frozen.vocabulary, frozen.hidden_size
    g = torch.Generator().manual_seed(3)
    shapes = {"W1": (16, d), "c1": (16,), "W2": (6, 16), "E": (v, 6), "b": (v,)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    tensors["W1"] /= d**0.5
    path = folder / "mlp.safetensors"
    head.write(path, tensors, frozen, {})
    return {
        "helpful": HeadValue("demo/value-helpful.safetensors"),
        "brief": HeadValue("demo/value-brief.safetensors"),
        "mlp": HeadValue(str(path)),
    }


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set vLLM's environment while an engine lives; undo its effects on this process."""
    saved = dict(os.environ)
    cores = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    os.environ.update({**ENVIRONMENT, **variables})
    try:
        yield
    finally:
        with warnings.catch_warnings():
            # vLLM leaves sockets open when it shuts an engine down.
            warnings.filterwarnings("ignore", "Unclosed context <zmq", ResourceWarning)
            gc.collect()
        os.environ.clear()
        os.environ.update(saved)
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def make_engine(values: EngineValues, **options: Any) -> Any:
    """Start an LLMEngine on the demo's language model, which reads prompts in small chunks."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    all_options = {
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
    config = EngineArgs(**values.engine_options(all_options)).create_engine_config()
    values.configure(config)
    return LLMEngine.from_vllm_config(config)


@dataclass
class SteppedRequest:
    """One request and its output.

    Attributes:
        arrives: the step at which it is added.
        aborted_at: the step at which it is aborted.
        estimates: the estimated value after so many tokens.
        cached_tokens: number of prompt tokens that came from the prefix cache.
    """

    prompt: list[int]
    steering: Steering | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    arrives: int = 0
    aborted_at: int | None = None
    schedule: EstimateSchedule | None = None

    estimates: dict[int, float] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] | None = None
    cached_tokens: int = 0
    finish_reason: str | None = None

    def sampling_params(self, values: EngineValues, estimate_key: str) -> Any:
        """Return vLLM's parameters: greedy unless `params` say otherwise."""
        from vllm import SamplingParams

        extra_args = values.extra_args(self.steering) if self.steering else {}
        if self.schedule:
            extra_args |= EstimateRequest(estimate_key, self.schedule).write()
        params = {"temperature": 0, "logprobs": 0, "max_tokens": 8, **self.params}
        return SamplingParams(**params, extra_args=extra_args or None)

    def update(self, output: Any) -> None:
        """Take over the latest cumulative output of vLLM."""
        completion = output.outputs[0]
        self.tokens = list(completion.token_ids)
        self.finish_reason = completion.finish_reason
        self.cached_tokens = output.num_cached_tokens or 0
        entries = zip(self.tokens, completion.logprobs or [], strict=False)
        self.logprobs = [entry[token].logprob for token, entry in entries]
        if output.prompt_logprobs:
            pairs = zip(self.prompt[1:], output.prompt_logprobs[1:], strict=True)
            self.prompt_logprobs = [entry[token].logprob for token, entry in pairs]


def run(
    engine: Any,
    values: EngineValues,
    requests: Sequence[SteppedRequest],
    after_step: Callable[[int], None] = lambda _: None,
) -> None:
    """Step the engine until every request is answered or aborted."""
    last_arrival = max(request.arrives for request in requests)
    step = 0
    while step <= last_arrival or engine.has_unfinished_requests():
        for i, request in enumerate(requests):
            request_id = f"{id(requests)}-{i}"
            if request.arrives == step:
                prompt = {"type": "token", "prompt_token_ids": request.prompt}
                engine.add_request(request_id, prompt, request.sampling_params(values, str(i)))
            if request.aborted_at == step:
                engine.abort_request([request_id])
        for output in engine.step():
            requests[int(output.request_id.rpartition("-")[2])].update(output)
        if values.enabled:
            [estimates] = engine.collective_rpc("infer_align_take_estimates")
            for key, tokens, value in estimates:
                requests[int(key)].estimates[tokens] = value
        after_step(step)
        step += 1


def valued_tokens(steering: Steering, logits: torch.Tensor) -> torch.Tensor:
    """Return the tokens that a steering values in these logits [V]."""
    if steering.candidates is not None:
        return logits.topk(min(steering.candidates, len(logits))).indices
    threshold = logits.max() + math.log(steering.min_p) if steering.min_p else -math.inf
    return (logits >= threshold).nonzero()[:, 0]


class Reference:
    """The definition of steering, token by token. Each forward reads the whole text again."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        from transformers import AutoModelForCausalLM

        self.lm = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        self.heads: dict[str, dict[str, torch.Tensor]] = {}
        self.lookaheads: dict[str, LookaheadValue] = {}
        shared: dict[object, Any] = {}
        for name, value in values.items():
            if isinstance(value, HeadValue):
                self.heads[name] = head.read(value.path)[0]
            elif isinstance(value, LookaheadValue):
                self.lookaheads[name] = value.config.load()
                self.lookaheads[name].start(demo_model(), shared)

    def lookahead(self, name: str, ids: list[int], tokens: torch.Tensor) -> torch.Tensor:
        """Return the value of each token: a value LM reads the text and the token. [k] -> [k]."""
        value = self.lookaheads[name]
        assert value.lm is not None
        texts = torch.tensor([[*ids, token] for token in tokens.tolist()])
        states = value.lm.lm(input_ids=texts).last_hidden_state[:, -1]
        weight, bias = value.lm._weight[value.index], value.lm._bias[value.index]
        result: torch.Tensor = states @ weight + bias
        return result

    def value(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """Return the value of every token, [V]."""
        tensors = self.heads[name]
        if "P" in tensors:
            features = tensors["P"] @ hidden
        else:
            features = tensors["W2"] @ torch.nn.functional.gelu(
                tensors["W1"] @ hidden + tensors["c1"]
            )
        return tensors["E"] @ features + tensors["b"]

    def hidden(self, ids: list[int]) -> torch.Tensor:
        """Return the hidden state at the last token, [d]."""
        return self.lm(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]

    @torch.inference_mode()
    def step(self, ids: list[int], steering: Steering | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the steered logits and the frozen model's logprobs of the next token, [V] each."""
        out = self.lm(torch.tensor([ids]), output_hidden_states=True)
        logits = out.logits[0, -1].clone()
        hidden = out.hidden_states[-1][0, -1]
        frozen = torch.log_softmax(logits, -1)
        betas = {name: beta for name, beta in (steering.beta if steering else {}).items() if beta}
        if steering and betas:
            unsteered = logits.clone()
            top = valued_tokens(steering, logits)
            steered = logits[top] + self._shift(betas, ids, hidden, top)
            if steering.tail == "mask":
                logits[:] = -math.inf
            logits[top] = steered
            if steering.max_kl is not None:
                logits = limited(unsteered, logits, steering.max_kl)
        return logits, frozen

    def _shift(
        self,
        betas: Mapping[str, float],
        ids: list[int],
        hidden: torch.Tensor,
        top: torch.Tensor,
    ) -> torch.Tensor:
        values: dict[str, torch.Tensor] = {}
        for name in betas:
            if name in self.lookaheads:
                values[name] = self.lookahead(name, ids, top)
            else:
                values[name] = self.value(name, hidden)[top]
        return sum(
            (beta * (values[name] - values[name].mean()) for name, beta in betas.items()),
            start=torch.zeros(len(top)),
        )

    @torch.inference_mode()
    def expected(
        self, ids: list[int], steering: Steering | None, weights: Mapping[str, float]
    ) -> float:
        """Return the weighted sum of the values' expectations for the next token."""
        hidden = self.hidden(ids)
        policy = torch.softmax(self.step(ids, steering)[0], -1)
        return float(
            sum(weight * policy @ self.value(name, hidden) for name, weight in weights.items())
        )

    def greedy(
        self, prompt: list[int], steering: Steering | None, n: int, eos: int = 1
    ) -> tuple[list[int], list[float]]:
        """Return up to n tokens, and the frozen model's logprob of each."""
        ids = list(prompt)
        logprobs: list[float] = []
        for _ in range(n):
            logits, frozen = self.step(ids, steering)
            token = int(logits.argmax())
            ids.append(token)
            logprobs.append(float(frozen[token]))
            if token == eos:
                break
        return ids[len(prompt) :], logprobs


def prompts(n: int) -> list[list[int]]:
    """Return n chats about the demo's world, 20 to 150 tokens long. Groups share a beginning."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    question = "What are the diet and the colour of the owl?"
    pair = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "The owl eats mice and is brown."},
    ]
    token_ids = []
    for i in range(n):
        last = question if i % 2 else "What is the size of the fox?"
        turns = [*pair * (i % 5), {"role": "user", "content": last}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        token_ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return token_ids


def mixed_requests(
    n: int, steerings: Sequence[Steering | None] = STEERINGS, **params: Any
) -> list[SteppedRequest]:
    """Return n requests that arrive one after the other, each with its own steering.

    Two of three also need estimates, where the steerings are those of `STEERINGS`.
    """
    return [
        SteppedRequest(
            prompt,
            steerings[i % len(steerings)],
            {"max_tokens": 5 + i % 6, **params},
            arrives=i // 3,
            schedule=SCHEDULES[i % 3] if steerings is STEERINGS else None,
        )
        for i, prompt in enumerate(prompts(n))
    ]


def assert_estimates(requests: Sequence[SteppedRequest], reference: Reference) -> None:
    """Assert that each due estimate was made, before the next token, and equals the reference."""
    for request in requests:
        schedule = request.schedule
        # The estimate after the last token is missing: no step follows.
        counts = range(1, len(request.tokens))
        due = [count for count in counts if schedule and schedule.is_due(count)]
        assert sorted(request.estimates) == due
        for count in due:
            ids = [*request.prompt, *request.tokens[:count]]
            weights = schedule.values if schedule else {}
            expected = reference.expected(ids, request.steering, weights)
            assert math.isclose(request.estimates[count], expected, abs_tol=1e-4)
