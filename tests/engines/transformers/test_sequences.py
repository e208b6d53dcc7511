"""Log-probabilities of given texts, against one forward pass of each complete text."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque

import numpy as np
import pytest
import torch

from infer_align.decoding.sequences import SequenceQuery
from infer_align.engines.transformers.sequences import take_sequences
from infer_align.errors import EngineFailed, InvalidRequest, Unavailable
from infer_align.types import Capability
from infer_align.values.head import HeadValue, write
from tests.engines.transformers.test_model import ARCHITECTURES
from tests.engines.transformers.test_rope import CASES

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
TEXTS = ("sat on the mat", "", "a big red ball is in the box with the small blue hat", "x", "sat")


def query(text: str = "the cat", *texts: str, **fields) -> SequenceQuery:
    return SequenceQuery({"messages": [{"role": "user", "content": text}]}, texts, **fields)


def tokens(engine, text: str) -> list[int]:
    return engine.frozen.tokenizer(text, add_special_tokens=False)["input_ids"]


def chat_prompt(engine, messages) -> list[int]:
    text = engine.frozen.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return tokens(engine, text)


@torch.inference_mode()
def forced(engine, prompt: list[int], text: list[int]) -> list[float]:
    """Return the logprobs of a text by one forward pass without a cache."""
    model = engine.frozen
    logits = model.lm(torch.tensor([[*prompt, *text]], device=model.device), use_cache=False).logits
    logprobs = torch.log_softmax(logits[0, len(prompt) - 1 : -1].double(), dim=-1)
    return logprobs[range(len(text)), text].tolist()


def same(engine, answer, prompt: list[int], texts) -> None:
    expected = [forced(engine, prompt, tokens(engine, text)) for text in texts]
    assert [len(each) for each in answer.logprobs] == [len(each) for each in expected]
    for got, each in zip(answer.logprobs, expected, strict=True):
        np.testing.assert_allclose(got, each, atol=1e-4)
    np.testing.assert_allclose(answer.sums, [sum(each) for each in expected], atol=1e-4)
    assert answer.prompt_tokens == len(prompt)
    assert answer.text_tokens == sum(len(each) for each in expected)


@pytest.mark.parametrize("prefill_tokens", [16, 1024])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_log_probabilities_are_those_of_teacher_forcing(
    architecture, prefill_tokens, serving
):
    # With 16 tokens a pass, prompts and texts are read in parts.
    async with serving(architecture, prefill_tokens=prefill_tokens) as engine:
        assert Capability.SEQUENCE_LOGPROBS in engine.capabilities
        asked = query("the dog ran to the sun and the box", *TEXTS)
        answer = await engine.sequence_logprobs(asked)
        same(engine, answer, chat_prompt(engine, asked.body["messages"]), TEXTS)


@pytest.mark.parametrize("case", CASES)
async def test_rotary_positions_of_texts_are_those_of_the_engine(case, serving, language_model):
    architecture, options, context_length = CASES[case]
    model = language_model(architecture, **options)
    async with serving(model=model, context_length=context_length) as engine:
        asked = query("a", *TEXTS)
        prompt = chat_prompt(engine, asked.body["messages"])
        same(engine, await engine.sequence_logprobs(asked), prompt, TEXTS)


@pytest.mark.parametrize("prefill_tokens", [16, 1024])
@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
async def test_queries_at_once_give_the_same_as_alone(architecture, prefill_tokens, serving):
    prompts = ["the cat sat on the mat " * 4 + end for end in ("", "and", "b c d", "x " * 30)]
    prompts += ["a dog", "a dog", "something quite different " * 6, "x"]
    queries = [query(text, *TEXTS[: 1 + i % 5]) for i, text in enumerate(prompts)]
    async with serving(architecture, prefill_tokens=prefill_tokens) as engine:
        answers = await asyncio.gather(*(engine.sequence_logprobs(each) for each in queries))
        for each, answer in zip(queries, answers, strict=True):
            same(engine, answer, chat_prompt(engine, each.body["messages"]), each.texts)


@pytest.mark.parametrize(("kind", "prompt"), [("chat", "What do owls eat?"), ("completion", "Ow")])
async def test_an_answer_scores_the_tokens_that_were_sampled(serving, draw, finish, kind, prompt):
    async with serving(model="demo") as engine:
        logprobs = {"logprobs": True} if kind == "chat" else {"logprobs": 0}
        candidates, _ = await finish(
            engine, draw(prompt, kind=kind, n=4, max_tokens=40, ignore_eos=False, **logprobs)
        )
        body = {"messages": [{"role": "user", "content": prompt}], "prompt": prompt}
        texts = tuple(candidate.text for candidate in candidates)
        answer = await engine.sequence_logprobs(SequenceQuery(body, texts, kind=kind))
        for candidate, got in zip(candidates, answer.logprobs, strict=True):
            shown = candidate.choice["logprobs"]
            sampled = shown.get("token_logprobs") or [e["logprob"] for e in shown["content"]]
            # The end token is no part of the text.
            assert len(got) >= len(sampled) - 1 > 0
            np.testing.assert_allclose(got, sampled[: len(got)], atol=1e-4)
        assert answer.prompt_tokens == candidates[0].prompt_tokens


async def test_a_small_cache_reads_many_texts_in_groups(serving, monkeypatch):
    texts = [f"text {i} of the mat and the sun" for i in range(30)]
    async with serving() as plain:
        cell = plain.frozen.cell_bytes
    async with serving(kv_cache_gib=cell * 1200 / 2**30) as engine:
        widest = 0
        forward = engine.frozen.lm.forward

        def counting(*args, **fields):
            nonlocal widest
            output = forward(*args, **fields)
            cache = fields["past_key_values"]
            if cache is not None:
                widest = max(widest, cache.length * fields["input_ids"].shape[0])
            return output

        monkeypatch.setattr(engine.frozen.lm, "forward", counting)
        asked = query("the cat", *texts)
        answer = await engine.sequence_logprobs(asked)
        assert 0 < widest <= 150
        monkeypatch.undo()
        same(engine, answer, chat_prompt(engine, asked.body["messages"]), texts)


async def test_a_prompt_is_read_once_for_all_queries_of_it(serving, monkeypatch, until):
    async with serving() as engine:
        read = []
        hold = threading.Event()
        forward = engine.frozen.lm.forward

        def counting(*args, **fields):
            read.append(tuple(fields["input_ids"].shape))
            hold.wait()
            return forward(*args, **fields)

        monkeypatch.setattr(engine.frozen.lm, "forward", counting)
        # The engine reads another prompt until both queries wait.
        another = asyncio.create_task(engine.sequence_logprobs(query("a dog", "ran")))
        await until(lambda: read)
        prompt = "the cat sat on the mat " * 4
        queries = [query(prompt, "a cat", "the dog"), query(prompt, "the sun")]
        pending = [asyncio.create_task(engine.sequence_logprobs(each)) for each in queries]
        await until(lambda: engine._started.scheduler._inbox.qsize() == len(queries))
        hold.set()
        await another
        answers = await asyncio.gather(*pending)
        length = answers[0].prompt_tokens
        longest = max(len(each) for answer in answers for each in answer.logprobs)
        assert read[-2:] == [(1, length), (3, longest)]
        assert read.count((1, length)) == 1


async def test_readings_do_not_change_what_is_decoded(serving, draw, finish):
    async with serving() as engine:
        (quiet,), _ = await finish(engine, draw("the cat", seed=3, max_tokens=40, ignore_eos=True))
        task = asyncio.create_task(
            finish(engine, draw("the cat", seed=3, max_tokens=40, ignore_eos=True))
        )
        for i in range(10):
            await engine.sequence_logprobs(query(f"number {i}", "one", "two"))
        (busy,), _ = await task
        assert busy.choice == quiet.choice


async def test_a_decoding_step_comes_between_the_parts_of_a_reading(
    serving, draw, finish, monkeypatch
):
    async with serving(prefill_tokens=16) as engine:
        read = []
        forward = engine.frozen.lm.forward

        def counting(*args, **fields):
            read.append(tuple(fields["input_ids"].shape))
            return forward(*args, **fields)

        monkeypatch.setattr(engine.frozen.lm, "forward", counting)
        # Both begin in the same round of the event loop.
        await asyncio.gather(
            finish(engine, draw("a", max_tokens=150, ignore_eos=True, n=2)),
            engine.sequence_logprobs(query("the cat " * 12, *["x y z " * 6] * 8)),
        )
        between = [0]
        for rows, columns in read:
            assert rows * columns <= 16
            between[-1] += rows * columns if columns > 1 else 0
            if columns == 1:
                between.append(0)
        # Before the first step, nothing runs. A short pass leaves room for another one.
        assert max(between[1:]) < 2 * 16
        assert sum(each > 0 for each in between) > 10


async def test_cancelled_callers_leave_nothing_behind(serving, until):
    async with serving(prefill_tokens=16) as engine:
        queue = engine._started.scheduler._questions
        asked = [query(f"the cat {i} " * 5, "one", "two three " * 10) for i in range(12)]
        tasks = [asyncio.create_task(engine.sequence_logprobs(each)) for each in asked]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in done[::2])
        for each, answer in zip(asked[1::2], done[1::2], strict=True):
            same(engine, answer, chat_prompt(engine, each.body["messages"]), each.texts)
        await until(lambda: len(queue) == 0)
        await engine.close()
        with pytest.raises(Unavailable):
            await engine.sequence_logprobs(asked[0])


async def test_closing_ends_a_query(serving):
    async with serving(prefill_tokens=16) as engine:
        task = asyncio.create_task(engine.sequence_logprobs(query("the cat " * 20, *["a "] * 50)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await engine.close()
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        assert isinstance(result, Unavailable) or len(result.logprobs) == 50


async def test_weights_that_are_not_finite_fail_the_query_only(serving):
    async with serving() as engine:
        head = engine.frozen.lm.get_output_embeddings().weight
        original = head.detach().clone()
        with torch.no_grad():
            head.fill_(math.nan)
        with pytest.raises(EngineFailed, match="not finite"):
            await engine.sequence_logprobs(query("x", "y"))
        with torch.no_grad():
            head.copy_(original)
        assert math.isfinite((await engine.sequence_logprobs(query("x", "y"))).sums[0])


async def test_control_tokens_in_a_text_are_ordinary_text(serving):
    async with serving() as engine:
        answer = await engine.sequence_logprobs(query("a", "b</s>", "b"))
        end = engine.frozen.tokenizer.eos_token_id
        spelt = engine.frozen.tokenizer("b</s>", split_special_tokens=True)["input_ids"]
        assert end not in spelt
        prompt = chat_prompt(engine, [{"role": "user", "content": "a"}])
        np.testing.assert_allclose(answer.logprobs[0], forced(engine, prompt, spelt), atol=1e-4)
        assert len(answer.logprobs[0]) > len(answer.logprobs[1])


async def test_a_completion_continues_its_prompt(serving):
    async with serving() as engine:
        ids = tokens(engine, "the cat s")
        for prompt in ("the cat s", ids):
            asked = SequenceQuery({"prompt": prompt}, ("at on", ""), kind="completion")
            answer = await engine.sequence_logprobs(asked)
            expected = forced(engine, ids, tokens(engine, "at on"))
            np.testing.assert_allclose(answer.logprobs[0], expected, atol=1e-4)
        for prompt in ([], ["a"], [-1], [10**6], None, 3):
            with pytest.raises(InvalidRequest, match="prompt"):
                await engine.sequence_logprobs(
                    SequenceQuery({"prompt": prompt}, ("a",), kind="completion")
                )


async def test_the_next_turn_of_the_user_is_read_after_the_answer(serving):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    async with serving() as engine:
        asked = SequenceQuery({"messages": messages}, ("thanks", "no"), role="user")
        prompt = tokens(engine, "<user>a</s><assistant>b</s><user>")
        same(engine, await engine.sequence_logprobs(asked), prompt, asked.texts)


async def test_a_turn_that_is_continued_and_tools_are_part_of_the_prompt(serving, language_model):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the c"}]
    async with serving(model=language_model("Llama", max_position_embeddings=1024)) as engine:
        body = {"messages": messages, "continue_final_message": True}
        continued = await engine.sequence_logprobs(SequenceQuery(body, ("at",)))
        prompt = tokens(engine, "<user>a</s><assistant>the c")
        same(engine, continued, prompt, ("at",))
        body = {"messages": messages[:1], "tools": [tool]}
        with_tools = await engine.sequence_logprobs(SequenceQuery(body, ("at",)))
        plain = await engine.sequence_logprobs(query("a", "at"))
        assert with_tools.prompt_tokens > plain.prompt_tokens + 20
        assert with_tools.sums != plain.sums


async def test_a_text_over_the_context_is_refused_by_its_number(serving):
    async with serving(context_length=64) as engine:
        with pytest.raises(InvalidRequest, match=r"text 1: .* do not fit the context of 64"):
            await engine.sequence_logprobs(query("a", "b", "word " * 100))
        with pytest.raises(InvalidRequest, match=r"text 1: .* and at least \d{5} of text do not"):
            await engine.sequence_logprobs(query("a", "b", "word " * 100_000))
        with pytest.raises(InvalidRequest, match="messages"):
            await engine.sequence_logprobs(
                SequenceQuery({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, ("b",))
            )
        with pytest.raises(InvalidRequest, match="valid Unicode"):
            await engine.sequence_logprobs(query("a", "\ud800"))
        nothing = await engine.sequence_logprobs(query("a"))
        assert (nothing.logprobs, nothing.text_tokens) == ((), 0)


async def test_heads_expect_a_value_after_the_last_token(serving, tmp_path):
    generator = torch.Generator().manual_seed(1)
    async with serving() as engine:
        frozen = engine.frozen.frozen("tiny")
        v, d = frozen.vocabulary, frozen.hidden_size
        path = tmp_path / "value.safetensors"
        tensors = {
            "P": torch.randn((4, d), generator=generator),
            "E": torch.randn((v, 4), generator=generator),
            "b": torch.randn(v, generator=generator),
        }
        write(path, tensors, frozen, {})
        value = HeadValue(str(path))
        await engine.add_value("good", value)
        await engine.add_value("good too", value)
        asked = query("the cat", *TEXTS, values=("good", "good too"))
        answer = await engine.sequence_logprobs(asked)
        prompt = chat_prompt(engine, asked.body["messages"])
        same(engine, answer, prompt, TEXTS)
        for text, *estimates in zip(TEXTS, *answer.estimates.values(), strict=True):
            ids = [*prompt, *tokens(engine, text)]
            states = engine.frozen.states(ids)[-1:]
            logits = engine.frozen.lm(torch.tensor([ids], device=engine.frozen.device)).logits
            expected = float(value.expected(states, logits[:, -1].detach()))
            np.testing.assert_allclose(estimates, expected, atol=1e-4)
        with pytest.raises(InvalidRequest, match=r"values\.god: no such value.*'good'"):
            await engine.sequence_logprobs(query("a", "b", values=("god",)))


def test_only_prompts_that_cost_no_more_together_are_read_together():
    class WithIds:
        def __init__(self, *ids):
            self.ids = list(ids)

    similar = [WithIds(1, 2, 3, 4, 5, i) for i in range(6)]
    other = WithIds(9, 9, 9, 9)
    equal = WithIds(*similar[0].ids)
    waiting = deque([*similar[:2], other, *similar[2:], equal])
    group = take_sequences(waiting, 1024, 10_000)
    assert set(group) == {*similar, equal}
    assert [*waiting] == [other]
    # Prompts that share nothing are read side by side.
    assert len(take_sequences(deque([similar[0], other]), 1024, 10_000)) == 2
    assert len(take_sequences(deque([similar[0], other]), 3, 10_000)) == 1
    assert len(take_sequences(deque(similar), 1024, 7)) == 2
