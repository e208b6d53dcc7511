"""Tests of steered decoding against a reference without cache and batch.

The reference reads the complete text again for each token, and for each of its k candidates, with
float32 models.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaModel

from infer_align.decoding.kl_limit import limit_kl
from infer_align.decoding.text import token_bytes
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.steering import EstimateSchedule, Steering
from infer_align.types import Candidate, Draw, Estimate
from infer_align.values import head, lookahead
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import Lookahead, LookaheadValue

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

RANK = 6


@pytest.fixture(scope="module")
def values(language_model: Any, serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a folder with a linear head, an MLP head and a value LM with two heads, all random."""
    folder = tmp_path_factory.mktemp("values")
    generator = torch.Generator().manual_seed(11)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    async def make() -> Any:
        async with serving() as engine:
            return engine.frozen.frozen("tiny")

    frozen = asyncio.run(make())
    v, d = frozen.vocabulary, frozen.hidden_size
    head.write(
        folder / "linear.safetensors",
        {"P": randn(RANK, d) / d**0.5, "E": randn(v, RANK), "b": randn(v)},
        frozen,
        {},
    )
    mlp = {
        "W1": randn(16, d) / d**0.5,
        "c1": randn(16),
        "W2": randn(RANK, 16),
        "E": randn(v, RANK),
        "b": randn(v),
    }
    head.write(folder / "mlp.safetensors", mlp, frozen, {})
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=v,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    heads = {"helpful": (randn(32), 0.5), "brief": (randn(32), -1.0)}
    lookahead.write(folder / "lm", LlamaModel(config), heads, frozen, {})
    return folder


def resident(folder: Any) -> dict[str, Any]:
    return {
        "linear": HeadValue(str(folder / "linear.safetensors")),
        "mlp": HeadValue(str(folder / "mlp.safetensors")),
        "helpful": LookaheadValue(Lookahead(str(folder / "lm"), "helpful")),
        "brief": LookaheadValue(Lookahead(str(folder / "lm"), "brief")),
    }


def valued(steering: Steering, logits: torch.Tensor) -> torch.Tensor:
    """Return the tokens that a steering values in these logits [V]."""
    if steering.candidates is not None:
        return logits.topk(min(steering.candidates, len(logits))).indices
    threshold = logits.max() + math.log(steering.min_p) if steering.min_p else -math.inf
    return (logits >= threshold).nonzero()[:, 0]


class Reference:
    """The definition, token by token: every forward pass reads the complete text again."""

    def __init__(self, engine: Any, folder: Any) -> None:
        self.tokenizer = engine.frozen.tokenizer
        self.eos = engine.frozen.eos
        self.lm = AutoModelForCausalLM.from_pretrained(
            engine.config.model, dtype=torch.float32
        ).eval()
        self.value_lm = AutoModel.from_pretrained(folder / "lm", dtype=torch.float32).eval()
        self.heads = {
            name: head.read(str(folder / f"{name}.safetensors"))[0] for name in ("linear", "mlp")
        }
        self.scalar = load_file(folder / "lm" / lookahead.HEADS)

    def values(
        self, name: str, ids: list[int], hidden: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Return the value of each token after a text; a value LM reads each text as a whole."""
        if name in self.heads:
            t = self.heads[name]
            u = (
                t["P"] @ hidden
                if "P" in t
                else t["W2"] @ torch.nn.functional.gelu(t["W1"] @ hidden + t["c1"])
            )
            return t["E"][tokens] @ u + t["b"][tokens]
        texts = torch.cat([torch.tensor(ids).expand(len(tokens), -1), tokens[:, None]], dim=1)
        states = self.value_lm(texts).last_hidden_state[:, -1]
        i = ["helpful", "brief"].index(name)
        return states @ self.scalar["weight"][i] + self.scalar["bias"][i]

    @torch.inference_mode()
    def greedy(
        self, prompt: list[int], steering: Steering, n: int
    ) -> tuple[list[int], list[float], list[float]]:
        ids, tokens, aligned, frozen = list(prompt), [], [], []
        for _ in range(n):
            out = self.lm(torch.tensor([ids]), output_hidden_states=True)
            logits, hidden = out.logits[0, -1].clone(), out.hidden_states[-1][0, -1]
            raw = torch.log_softmax(logits, -1)
            top = valued(steering, logits)
            shift = torch.zeros(len(top))
            for name, beta in steering.beta.items():
                v = self.values(name, ids, hidden, top)
                shift += beta * (v - v.mean())
            steered = logits[top] + shift
            if steering.tail == "mask":
                logits[:] = -math.inf
            logits[top] = steered
            if steering.max_kl is not None:
                limit = torch.tensor([steering.max_kl])
                logits = limit_kl(out.logits[0, -1:], logits[None], limit)[0]
            token = int(logits.argmax())
            tokens.append(token)
            aligned.append(float(torch.log_softmax(logits, -1)[token]))
            frozen.append(float(raw[token]))
            if token in self.eos:
                break
            ids.append(token)
        return tokens, aligned, frozen


MIXES = [
    ({"linear": 2.0}, 5, "keep"),
    ({"mlp": -1.5}, 12, "mask"),
    ({"helpful": 3.0}, 4, "keep"),
    ({"helpful": 1.0, "brief": -2.0}, 9, "mask"),
    ({"linear": 1.0, "brief": 2.0}, 7, "keep"),
    ({"helpful": 0.5}, 1, "keep"),
    ({"mlp": 4.0, "linear": -4.0, "helpful": 1.0, "brief": 1.0}, 3, "keep"),
    ({"brief": 5.0}, 10**6, "keep"),
    ({"linear": 2.0, "mlp": -1.0}, "all", "keep"),
    ({"mlp": 3.0}, 20, "mask", 0.05),
    ({"linear": -4.0}, 20, "keep", 0.3),
]


async def test_32_rows_with_different_steering_equal_the_reference(
    serving: Any, values: Any, finish: Any
) -> None:
    async with serving(prefill_tokens=16, values=resident(values)) as engine:
        reference = Reference(engine, values)
        draws = []
        for i in range(32):
            beta, *how = MIXES[i % len(MIXES)]
            body = {
                "messages": [{"role": "user", "content": "the cat sat " * (i % 5) + "on"}],
                "temperature": 0,
                "logprobs": True,
            }
            draws.append(
                Draw({**body, "max_tokens": 4 + i % 7}, 1, (i,), steering=Steering(beta, *how))
            )

        async def later(i: int, draw: Draw) -> Any:
            # Let the draws join and leave at different steps.
            await asyncio.sleep(0.01 * (i % 6))
            candidates, _ = await finish(engine, draw)
            return candidates[0]

        async def cancelled() -> None:
            async with engine.sample(
                Draw(
                    {**draws[3].body, "max_tokens": 200},
                    4,
                    (1, 2, 3, 4),
                    steering=draws[3].steering,
                )
            ):
                await asyncio.sleep(0.05)

        finished, _ = await asyncio.gather(
            asyncio.gather(*(later(i, d) for i, d in enumerate(draws))), cancelled()
        )
        for draw, candidate in zip(draws, finished, strict=True):
            prompt = engine.frozen.render(draw).ids
            tokens, aligned, frozen = reference.greedy(
                prompt, draw.steering, draw.body["max_tokens"]
            )
            entries = candidate.choice["logprobs"]["content"]
            assert len(entries) == len(tokens)
            assert [e["aligned_logprob"] for e in entries] == pytest.approx(aligned, abs=1e-4)
            assert [e["logprob"] for e in entries] == pytest.approx(frozen, abs=1e-4)


async def test_likely_tokens_are_steered_by_heads_alone(
    serving: Any, values: Any, finish: Any
) -> None:
    # Where kernels run, one call steers such rows. The row with a number of candidates is apart.
    steerings = (
        Steering({"linear": -4.0, "mlp": 2.0}, 20, "keep", 0.1),
        Steering({"mlp": 3.0}, 20, "mask", 0.05),
        Steering({"linear": 2.0}, 5, "keep"),
    )
    body = {
        "messages": [{"role": "user", "content": "on"}],
        "temperature": 0,
        "logprobs": True,
        "max_tokens": 3,
    }
    async with serving(values=resident(values)) as engine:
        reference = Reference(engine, values)
        draws = [Draw(body, 1, (i,), steering=steering) for i, steering in enumerate(steerings)]
        finished = await asyncio.gather(*(finish(engine, draw) for draw in draws))
        for draw, ((candidate,), _) in zip(draws, finished, strict=True):
            assert draw.steering is not None
            prompt = engine.frozen.render(draw).ids
            _, aligned, frozen = reference.greedy(prompt, draw.steering, 3)
            entries = candidate.choice["logprobs"]["content"]
            assert [e["aligned_logprob"] for e in entries] == pytest.approx(aligned, abs=1e-4)
            assert [e["logprob"] for e in entries] == pytest.approx(frozen, abs=1e-4)


async def test_the_divergence_of_each_step_is_limited(
    serving: Any, values: Any, finish: Any
) -> None:
    limited = (
        Steering({"linear": -8.0}, "all", "keep", max_kl=0.05),
        Steering({"helpful": 6.0}, 4, "keep", max_kl=0.3),
    )
    body = {
        "messages": [{"role": "user", "content": "on"}],
        "temperature": 0,
        "logprobs": True,
        "max_tokens": 4,
    }
    async with serving(values=resident(values)) as engine:
        reference = Reference(engine, values)
        draws = [Draw(body, 1, (i,), steering=steering) for i, steering in enumerate(limited)]
        finished = await asyncio.gather(*(finish(engine, draw) for draw in draws))
        for draw, ((candidate,), _) in zip(draws, finished, strict=True):
            prompt = engine.frozen.render(draw).ids
            assert draw.steering is not None
            _, aligned, frozen = reference.greedy(prompt, draw.steering, 4)
            free = reference.greedy(prompt, replace(draw.steering, max_kl=None), 4)
            assert free[1] != pytest.approx(aligned, abs=1e-2)
            entries = candidate.choice["logprobs"]["content"]
            assert [e["aligned_logprob"] for e in entries] == pytest.approx(aligned, abs=1e-3)
            assert [e["logprob"] for e in entries] == pytest.approx(frozen, abs=1e-4)


async def test_rows_that_are_not_steered_do_not_change(
    serving: Any, values: Any, draw: Any, finish: Any
) -> None:
    plain = [draw("the cat " * i, seed=i, max_tokens=6) for i in range(1, 5)]
    async with serving() as engine:
        expected = [(await finish(engine, d))[0][0].choice for d in plain]
    async with serving(values=resident(values)) as engine:
        steered = Draw(
            plain[0].body,
            3,
            (7, 8, 9),
            steering=Steering({"helpful": 4.0, "linear": 2.0}, 6, "keep"),
        )
        results = await asyncio.gather(finish(engine, steered), *(finish(engine, d) for d in plain))
        assert [candidates[0].choice for candidates, _ in results[1:]] == expected


async def test_weight_zero_is_the_frozen_model(
    serving: Any, values: Any, draw: Any, finish: Any
) -> None:
    async with serving(values=resident(values)) as engine:
        plain = draw("the cat", n=4, seed=3, max_tokens=8)
        zero = Draw(
            plain.body,
            4,
            plain.seeds,
            steering=Steering({"linear": 0.0, "helpful": 0.0}, 5, "keep"),
        )
        assert [c.text for c in (await finish(engine, zero))[0]] == [
            c.text for c in (await finish(engine, plain))[0]
        ]


async def test_seeded_samples_do_not_depend_on_the_batch(
    serving: Any, values: Any, draw: Any, finish: Any
) -> None:
    async with serving(values=resident(values)) as engine:
        draws = []
        for i in range(12):
            plain = draw("the cat " * (1 + i % 3), n=2, seed=50 * i, max_tokens=15)
            draws.append(
                Draw(plain.body, 2, plain.seeds, steering=Steering(*MIXES[i % len(MIXES)]))
            )
        alone = [[c.text for c in (await finish(engine, d))[0]] for d in draws]
        together = await asyncio.gather(*(finish(engine, d) for d in draws))
        assert [[c.text for c in candidates] for candidates, _ in together] == alone


async def test_estimates_are_the_expected_value_of_the_next_token(
    serving: Any, values: Any, draw: Any
) -> None:
    """The policy is the frozen model for a plain draw, and the steered model for a steered draw."""
    weights = {"linear": 0.5, "mlp": -2.0}
    async with serving(values=resident(values)) as engine:
        reference = Reference(engine, values)
        for steering in (None, Steering({"linear": 2.0}, 10**6, "keep")):
            plain = draw("the cat", n=2, seed=5, max_tokens=7, ignore_eos=True, logprobs=True)
            estimated = Draw(
                plain.body,
                2,
                plain.seeds,
                steering=steering,
                estimates=EstimateSchedule(weights, 3),
            )
            async with engine.sample(estimated) as stream:
                events = [event async for event in stream]
            estimates = {(e.index, e.tokens): e.value for e in events if isinstance(e, Estimate)}
            assert {*estimates} == {(i, t) for i in range(2) for t in (3, 6)}
            for candidate in (e for e in events if isinstance(e, Candidate)):
                answer = [entry["bytes"] for entry in candidate.choice["logprobs"]["content"]]
                ids = [*engine.frozen.render(estimated).ids, *token_ids(engine.frozen, answer)]
                for t in (3, 6):
                    expected = state_value(
                        reference, ids[: len(ids) - len(answer) + t], weights, steering
                    )
                    assert estimates[candidate.index, t] == pytest.approx(expected, abs=1e-4)


def token_ids(model: Any, answer: list[list[int]]) -> list[int]:
    by_bytes = {
        tuple(token_bytes(model.tokenizer, token)): token for token in range(model.vocabulary)
    }
    return [by_bytes[tuple(data)] for data in answer]


@torch.inference_mode()
def state_value(
    reference: Reference, ids: list[int], weights: dict[str, float], steering: Steering | None
) -> float:
    out = reference.lm(torch.tensor([ids]), output_hidden_states=True)
    logits, hidden = out.logits[0, -1].clone(), out.hidden_states[-1][0, -1]
    every = {
        name: reference.values(name, ids, hidden, torch.arange(len(logits))) for name in weights
    }
    for name, beta in (steering.beta if steering else {}).items():
        logits += beta * (every[name] - every[name].mean())
    policy = torch.softmax(logits, -1)
    return float(sum(weight * (policy * every[name]).sum() for name, weight in weights.items()))


async def test_a_value_that_cannot_estimate_is_refused_by_name(
    serving: Any, values: Any, draw: Any
) -> None:
    async with serving(values=resident(values)) as engine:
        for name, words in (
            ("linea", "did you mean 'linear'"),
            ("helpful", "values of kind head can: linear, mlp"),
        ):
            with pytest.raises(InvalidRequest, match=words) as caught:
                engine.check(Draw(draw().body, 1, (0,), estimates=EstimateSchedule({name: 1.0}, 4)))
            assert caught.value.param == f"align.early_stop.values.{name}"


async def test_an_unknown_value_is_refused_with_the_nearest(
    serving: Any, values: Any, draw: Any
) -> None:
    async with serving(values=resident(values)) as engine:
        with pytest.raises(InvalidRequest, match="did you mean 'helpful'"):
            engine.check(
                Draw(draw().body, 1, (0,), steering=Steering({"helpfull": 1.0}, 5, "keep"))
            )


async def test_a_value_of_another_tokenizer_is_refused_at_start(
    serving: Any, values: Any, language_model: Any, byte_fallback: Any
) -> None:
    other = language_model("Llama", tokenizer=byte_fallback)
    with pytest.raises(ConfigError, match="token ids differ"):
        async with serving(
            model=other, values={"linear": HeadValue(str(values / "linear.safetensors"))}
        ):
            pass


async def test_a_value_lm_with_several_heads_must_name_one(serving: Any, values: Any) -> None:
    with pytest.raises(ConfigError, match="helpful, brief"):
        async with serving(values={"x": LookaheadValue(Lookahead(str(values / "lm")))}):
            pass


async def test_a_file_without_a_head_is_refused(serving: Any, values: Any) -> None:
    with pytest.raises(ConfigError, match="not a value head"):
        async with serving(values={"x": HeadValue(str(values / "lm" / lookahead.HEADS))}):
            pass


async def test_replacing_a_value_does_not_change_running_draws(
    serving: Any, values: Any, draw: Any, finish: Any, until: Any, running: Any
) -> None:
    async with serving(values=resident(values)) as engine:
        plain = draw("the cat", n=2, seed=3, max_tokens=60, ignore_eos=True)
        steered = Draw(
            plain.body,
            2,
            plain.seeds,
            steering=Steering({"helpful": 2.0, "linear": 1.0}, 6, "keep"),
        )
        expected = [[c.text for c in (await finish(engine, d))[0]] for d in (plain, steered)]

        async def replace() -> None:
            await until(lambda: running(engine) == 4)
            for _ in range(3):
                await engine.add_value(
                    "helpful", LookaheadValue(Lookahead(str(values / "lm"), "brief"))
                )
                await engine.add_value("linear", HeadValue(str(values / "mlp.safetensors")))

        decoding = asyncio.gather(finish(engine, plain), finish(engine, steered))
        await replace()
        assert [[c.text for c in candidates] for candidates, _ in await decoding] == expected
        after = [c.text for c in (await finish(engine, steered))[0]]
        assert after != expected[1], "the next request is steered by the new values"
