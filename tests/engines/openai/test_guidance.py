"""Guidance before an upstream does what its definition says of the model behind the upstream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infer_align import config as configuration
from infer_align import demo as demo_files
from infer_align.config import Limits
from infer_align.decoding.params import SamplingParams
from infer_align.decoding.sampler import sample_at
from infer_align.decoding.steering import steer_candidates
from infer_align.demo import world
from infer_align.engines import Engine, Undiscovered
from infer_align.engines.openai import OpenAI, OpenAIEngine
from infer_align.errors import EngineFailed, InvalidRequest, Unsupported
from infer_align.flow.plan import Plan, make_plan
from infer_align.flow.request import parse_request
from infer_align.flow.run import align
from infer_align.methods import Sections
from infer_align.methods.guidance import guide
from infer_align.types import Array, Candidate, Capability, Delta, Draw
from infer_align.values.lookahead import Lookahead
from tests.engines.openai.conftest import until
from tests.engines.openai.upstream import Behaviour, FakeUpstream, fake_upstream, reply
from tests.server.conftest import Live, end, start

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

QUESTION = world.prompts(1, seed=3)[0]
TRAITS = {
    "polite": {"prompt": "Answer politely and say you hope it helps."},
    "rude": {"prompt": "You are rude.", "negative_prompt": "You are polite."},
}
TOKENS = 16
LIMITS = Limits(8, 100_000)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The embedded model as an upstream."""
    path = tmp_path_factory.mktemp("demo") / "config.toml"
    path.write_text(
        '[engine]\nkind = "transformers"\nmodel = "demo"\nthreads = 1\n', encoding="utf-8"
    )
    live = start(configuration.load(path))
    yield live
    end(live)


async def guiding(urls: str, **config: Any) -> OpenAIEngine:
    """Return a started engine with the tokenizer of the demo and a value."""
    engine = OpenAI(**{"urls": urls, "tokenizer": "demo", **config}).load()
    engine.values = {"helpful": Lookahead(path="demo/value-lm", head="helpful").load()}
    await engine.start()
    return engine


@pytest.fixture
async def engine(demo: Live) -> AsyncIterator[OpenAIEngine]:
    engine = await guiding(demo.base_url)
    yield engine
    await engine.close()


def guided_body(scale: Mapping[str, float], **fields: Any) -> dict[str, Any]:
    """Return a request that brings the traits that it scales."""
    traits = {name: TRAITS[name] for name in scale}
    guidance = {"scale": scale, "traits": traits}
    return {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": TOKENS,
        "temperature": 0,
        **fields,
        "align": {"guidance": guidance, **fields.get("align", {})},
    }


async def planned(engine: Engine, body: Mapping[str, Any], kind: str = "chat") -> Plan:
    """Plan a request; what the engine does not know yet is found out first."""
    request = parse_request(body, "completion" if kind == "completion" else "chat", {})
    while True:
        try:
            return make_plan(request, engine, {}, {}, LIMITS, Sections())
        except Undiscovered as gap:
            await gap.discover()


class Reference:
    """The guided answers of the demo by their definition, over the whole vocabulary in float64."""

    def __init__(self) -> None:
        path = demo_files.path(demo_files.LM)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def ids(self, draw: Draw, body: Mapping[str, Any]) -> list[int]:
        text = body.get("prompt")
        if draw.kind == "chat":
            text = self.tokenizer.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True
            )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def logprobs(self, draw: Draw, body: Mapping[str, Any], answer: Sequence[int]) -> Array:
        ids = torch.tensor([[*self.ids(draw, body), *answer]])
        logits = self.model(ids).logits[0, -1].double()
        return np.asarray(torch.log_softmax(logits, -1))

    def guided(self, draw: Draw, answer: Sequence[int]) -> Array:
        assert draw.guidance is not None
        base = self.logprobs(draw, draw.body, answer)
        pairs = []
        for contrast in draw.guidance.contrasts:
            negative = draw.body if contrast.negative_body is None else contrast.negative_body
            positive = self.logprobs(draw, contrast.body, answer)
            pairs.append([positive, self.logprobs(draw, negative, answer)])
        scales = [contrast.scale for contrast in draw.guidance.contrasts]
        return guide(base, pairs, scales, draw.guidance.min_p)

    def text(self, draw: Draw, choose: Callable[[Array, list[int]], int]) -> str:
        answer: list[int] = []
        while len(answer) < draw.body["max_tokens"]:
            token = choose(self.guided(draw, answer), answer)
            if token == self.tokenizer.eos_token_id:
                break
            answer.append(token)
        text: str = self.tokenizer.decode(answer, skip_special_tokens=True)
        return text


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def likeliest(logits: Array, _: list[int]) -> int:
    return int(logits.argmax())


# --- the same answers ---

SCALES = [
    {"polite": 0.5},
    {"polite": 1.0},
    {"polite": 3.0},
    {"polite": -2.0},
    {"rude": 2.0},
    {"rude": -1.5},
    {"polite": 1.5, "rude": -1.0},
]


@pytest.mark.parametrize("scale", SCALES, ids=json.dumps)
async def test_greedy_answers_are_those_of_the_whole_vocabulary(
    engine: OpenAIEngine, reference: Reference, scale: dict[str, float]
) -> None:
    plan = await planned(engine, guided_body(scale))
    (draw,) = plan.draws
    (candidate,) = await engine.generate(draw)
    assert candidate.error is None
    assert candidate.text == reference.text(draw, likeliest)


async def test_scales_change_the_answer(engine: OpenAIEngine) -> None:
    texts = set()
    for scale in ({"rude": 0}, {"rude": 2.0}, {"polite": -2.0}, {"polite": 3.0}):
        plan = await planned(engine, guided_body(scale))
        (candidate,) = await engine.generate(plan.draws[0])
        texts.add(candidate.text)
    assert len(texts) > 1


async def test_text_completions_are_guided(engine: OpenAIEngine, reference: Reference) -> None:
    body = guided_body({"polite": 2.0})
    del body["messages"]
    plan = await planned(engine, {**body, "prompt": "The otter is"}, "completion")
    (draw,) = plan.draws
    (candidate,) = await engine.generate(draw)
    assert candidate.text == reference.text(draw, likeliest)


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5}])
async def test_sampled_answers_are_drawn_from_the_whole_vocabulary_by_their_seeds(
    engine: OpenAIEngine, reference: Reference, fields: dict[str, Any]
) -> None:
    # These tokens come before the demo's long lists of adjectives, of which an upstream shows 20.
    fields = {"temperature": 1.0, **fields}
    body = guided_body({"polite": 2.0}, **fields, n=3, seed=5, max_tokens=8)
    plan = await planned(engine, body)
    (draw,) = plan.draws
    candidates = await engine.generate(draw)
    params = SamplingParams.from_body(fields, "chat")
    prompt = len(reference.ids(draw, draw.body))
    for candidate, seed in zip(candidates, draw.seeds, strict=True):

        def choose(logits: Array, answer: list[int], seed: int = seed) -> int:
            number = np.random.default_rng((seed % 2**64, prompt + len(answer))).random()
            (token,) = sample_at(torch.from_numpy(logits)[None], [params], np.array([number]))
            return token

        assert candidate.text == reference.text(draw, choose)
    assert len({candidate.text for candidate in candidates}) > 1


@pytest.mark.parametrize("tail", ["keep", "mask"])
async def test_values_steer_the_guided_logits(
    engine: OpenAIEngine, reference: Reference, tail: str
) -> None:
    vas = {"beta": {"helpful": 6.0}, "top_k": 5, "tail": tail}
    body = guided_body({"polite": 2.0})
    body["align"]["vas"] = vas
    plan = await planned(engine, body)
    (draw,) = plan.draws
    (steered,) = await engine.generate(draw)
    (plain,) = await engine.generate(replace(draw, steering=None))
    value = engine.values["helpful"]

    def choose(logits: Array, answer: list[int]) -> int:
        tokens = np.argsort(-logits, kind="stable")[:5]
        tokens = tokens[logits[tokens] > -np.inf]
        prefix = [*reference.ids(draw, draw.body), *answer]
        values = _values(value, prefix, tokens.tolist())
        return int(tokens[steer_candidates(logits[tokens], values[None], [6.0]).argmax()])

    assert steered.text == reference.text(draw, choose)
    assert steered.text != plain.text


def _values(value: Any, prefix: list[int], tokens: list[int]) -> Array:
    """Value a text after each token, by reading the whole text again."""
    from infer_align.decoding.cache import RowCache  # noqa: PLC0415

    values = []
    for token in tokens:
        ids = torch.tensor([[*prefix, token]])
        read = value.lm.forward(ids, RowCache(), torch.arange(ids.shape[1])[None], None)
        values.append(float(read[0, -1, value.index]))
    return np.array(values)


# --- cost ---


async def test_calls_and_context_tokens_are_reported(
    engine: OpenAIEngine, reference: Reference
) -> None:
    body = guided_body({"polite": 1.0, "rude": 1.0}, max_tokens=4)
    plan = await planned(engine, body)
    (draw,) = plan.draws
    assert draw.guidance is not None
    (candidate,) = await engine.generate(draw)
    bodies = [draw.guidance.contrasts[0].body, draw.guidance.contrasts[1].body]
    bodies.append(draw.guidance.contrasts[1].negative_body or {})
    assert candidate.completion_tokens == 4
    assert candidate.calls == 4 * 4, "four contexts"
    assert candidate.prompt_tokens == len(reference.ids(draw, draw.body))
    prompts = sum(len(reference.ids(draw, each)) for each in bodies)
    assert candidate.context_prompt_tokens == prompts
    assert candidate.context_completion_tokens == 3 * 4


async def test_a_scale_of_zero_takes_one_plain_call(engine: OpenAIEngine) -> None:
    plan = await planned(engine, guided_body({"polite": 0}))
    (candidate,) = await engine.generate(plan.draws[0])
    (plain,) = await engine.generate(Draw(plan.draws[0].body, 1, (0,)))
    assert candidate.choice == plain.choice
    assert candidate.calls == 1
    assert candidate.context_prompt_tokens == 0


# --- streams, and ends ---


async def test_tokens_are_streamed_up_to_a_stop_string(engine: OpenAIEngine, finish: Any) -> None:
    plan = await planned(engine, guided_body({"polite": 1.0}))
    (whole,) = await engine.generate(plan.draws[0])
    stop = whole.text.split()[2]
    plan = await planned(engine, guided_body({"polite": 1.0}, stop=stop))
    (candidate,), deltas = await finish(engine, plan.draws[0])
    assert candidate.text == whole.text[: whole.text.index(stop)]
    assert candidate.finish_reason == "stop"
    pieces = [delta.choice["delta"]["content"] for delta in deltas]
    assert "".join(pieces) == candidate.text
    assert len(pieces) > 1


async def test_the_best_of_several_guided_candidates_is_selected(engine: OpenAIEngine) -> None:
    body = guided_body({"polite": 1.0}, temperature=1.0, seed=1, max_tokens=4)
    request = parse_request({**body, "n": 3}, "chat", {})
    with pytest.raises(Undiscovered) as gap:
        make_plan(request, engine, {}, {}, LIMITS)
    await gap.value.discover()
    response = await align(make_plan(request, engine, {}, {}, LIMITS), engine)
    assert len(response.returned) == 3
    assert sum(candidate.calls for candidate in response.candidates) >= 3 * 2 * 3


async def test_a_draw_that_is_stopped_returns_what_it_has(engine: OpenAIEngine) -> None:
    plan = await planned(engine, guided_body({"polite": 1.0}, max_tokens=100))
    candidates = []
    async with engine.sample(plan.draws[0]) as stream:
        async for event in stream:
            if isinstance(event, Delta):
                stream.stop()
            elif isinstance(event, Candidate):
                candidates.append(event)
    (candidate,) = candidates
    assert candidate.interrupted or candidate.finish_reason == "stop"
    assert candidate.context_completion_tokens == candidate.completion_tokens > 0
    assert not engine._drawings


# --- upstreams that show less, or fail ---

NAMES = ["the", "a", "is", "and", "in", "of"]


class Letters:
    """An upstream that shows top logprobs of words, the likeliest last.

    Args:
        allowed: the most top logprobs that it may be asked for.
        fails_at: the number of the call that fails, with the behaviour `fault`.
        fault: a name of `Faults`.
    """

    def __init__(self, allowed: int = 20, fails_at: int = -1, fault: str = "error_500") -> None:
        self.allowed = allowed
        self.fails_at = fails_at
        self.fault = fault

    def behave(self, call: int, body: Mapping[str, Any]) -> str | Behaviour:
        if call == self.fails_at:
            return self.fault
        is_text = isinstance(body.get("prompt"), str)
        if not is_text or body["logprobs"] > self.allowed:
            return "error_400"
        return "ok"

    def answer(self, _: str, body: Mapping[str, Any]) -> dict[str, Any]:
        names = NAMES[: body["logprobs"]]
        top = {name: -2.0 - i / 10 for i, name in enumerate(names)}
        logprobs = {"tokens": names[:1], "top_logprobs": [top]}
        choice = {"index": 0, "text": "the", "logprobs": logprobs, "finish_reason": "length"}
        return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}


@pytest.fixture
def up() -> Iterator[FakeUpstream]:
    with fake_upstream() as app:
        yield app


async def letters(up: FakeUpstream, tokenizer: str = "demo", allowed: int = 20) -> OpenAIEngine:
    upstream = Letters(allowed)
    up.behave = upstream.behave
    up.answer = upstream.answer
    return await guiding(up.url, tokenizer=tokenizer, recovery_seconds=60)


class Narrow:
    """The demo behind a server that shows few top logprobs, and perhaps takes no bias.

    Args:
        url: of the demo.
        allowed: the most top logprobs that it may be asked for.
        takes_bias: False to ignore `logit_bias`.
    """

    def __init__(self, url: str, allowed: int, *, takes_bias: bool = True) -> None:
        self.url = url
        self.allowed = allowed
        self.takes_bias = takes_bias
        self.biased = 0

    async def __call__(self, _: FakeUpstream, body: dict[str, Any], send: Any) -> None:
        if (body.get("logprobs") or 0) > self.allowed:
            await reply(send, 400, {"error": {"message": "too many", "param": "logprobs"}})
            return
        self.biased += "logit_bias" in body
        fields = {name: value for name, value in body.items() if name != "model"}
        if not self.takes_bias:
            fields.pop("logit_bias", None)
        path = "chat/completions" if "messages" in body else "completions"
        async with httpx2.AsyncClient(trust_env=False, verify=False, timeout=60) as client:
            answer = await client.post(f"{self.url}/{path}", json=fields)
        await reply(send, answer.status_code, answer.json())


@pytest.mark.parametrize("scale", [{"rude": -1.5}, {"rude": 2.0, "polite": -1.0}], ids=json.dumps)
async def test_a_logprob_that_a_context_does_not_show_is_read_with_a_bias(
    demo: Live, up: FakeUpstream, reference: Reference, scale: dict[str, float]
) -> None:
    narrow = Narrow(demo.base_url, 2)
    up.behave = lambda _, __: narrow
    engine = await guiding(up.url)
    plan = await planned(engine, guided_body(scale, max_tokens=8))
    (candidate,) = await engine.generate(plan.draws[0])
    assert candidate.text == reference.text(plan.draws[0], likeliest)
    assert narrow.biased > 0
    contexts = 4 if "polite" in scale else 3
    assert candidate.calls == candidate.completion_tokens * contexts + narrow.biased
    await engine.close()


async def test_an_upstream_that_ignores_the_bias_is_asked_once(
    demo: Live, up: FakeUpstream
) -> None:
    narrow = Narrow(demo.base_url, 2, takes_bias=False)
    up.behave = lambda _, __: narrow
    engine = await guiding(up.url)
    plan = await planned(engine, guided_body({"rude": -1.5}, max_tokens=8))
    (candidate,) = await engine.generate(plan.draws[0])
    assert candidate.error is None
    first = narrow.biased
    assert first > 0
    await engine.generate(plan.draws[0])
    assert narrow.biased == first, "it is remembered"
    await engine.close()


async def test_an_upstream_that_shows_five_tokens_is_asked_for_five(up: FakeUpstream) -> None:
    engine = await letters(up, allowed=5)
    plan = await planned(engine, guided_body({"polite": 1.0}, max_tokens=3))
    up.clear_log()
    (candidate,) = await engine.generate(plan.draws[0])
    assert candidate.text == "thethethe"
    assert [body["logprobs"] for body in up.bodies] == [5] * 6
    prompts = [body["prompt"] for body in up.bodies]
    assert sum("politely" in prompt for prompt in prompts) == 3
    assert sum(prompt.endswith("thethe") for prompt in prompts) == 2
    await engine.close()


async def test_a_token_that_the_generation_config_names_ends_the_answer(
    up: FakeUpstream, reference: Reference, tmp_path: Path
) -> None:
    word = reference.tokenizer.convert_tokens_to_ids("the")
    reference.tokenizer.save_pretrained(tmp_path)
    ends = {"eos_token_id": [reference.tokenizer.eos_token_id, word]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    engine = await letters(up, tokenizer=str(tmp_path))
    plan = await planned(engine, guided_body({"polite": 1.0}))
    (candidate,) = await engine.generate(plan.draws[0])
    assert candidate.text == ""
    assert candidate.finish_reason == "stop"
    await engine.close()


async def test_an_upstream_that_shows_one_token_is_refused_by_name(up: FakeUpstream) -> None:
    engine = await letters(up, allowed=1)
    with pytest.raises(Unsupported, match=r"align\.guidance: needs guide.*at least 2 top_logprobs"):
        await planned(engine, guided_body({"polite": 1.0}))
    await engine.close()


async def test_an_upstream_without_logprobs_is_refused_by_name(up: FakeUpstream) -> None:
    engine = await guiding(up.url)
    with pytest.raises(Unsupported, match=r"align\.guidance: needs guide.*top_logprobs"):
        await planned(engine, guided_body({"polite": 1.0}))
    assert Capability.GUIDE not in engine.unknown_capabilities | engine.capabilities
    await engine.close()


async def test_a_missing_tokenizer_is_named(up: FakeUpstream) -> None:
    engine = OpenAI(urls=up.url).load()
    await engine.start()
    with pytest.raises(Unsupported, match=r"\[engine\] tokenizer"):
        await planned(engine, guided_body({"polite": 1.0}))
    assert up.calls == 0
    await engine.close()


async def test_a_call_that_fails_in_the_middle_fails_its_candidate(up: FakeUpstream) -> None:
    engine = await letters(up)
    plan = await planned(engine, guided_body({"polite": 1.0}, max_tokens=5))
    up.clear_log()
    up.behave = Letters(fails_at=5).behave
    (failed,) = await engine.generate(plan.draws[0])
    assert failed.status == 500
    assert failed.completion_tokens == failed.context_completion_tokens == 2
    assert failed.calls == up.calls == 6
    up.clear_log()
    with pytest.raises(EngineFailed, match="on fire"):
        await align(plan, engine)
    assert not engine._drawings
    await engine.close()


async def test_a_busy_upstream_is_tried_again(up: FakeUpstream) -> None:
    engine = await letters(up)
    plan = await planned(engine, guided_body({"polite": 1.0}, max_tokens=3))
    up.clear_log()
    up.behave = Letters(fails_at=2, fault="error_503").behave
    (candidate,) = await engine.generate(plan.draws[0])
    assert candidate.text == "thethethe"
    assert candidate.calls == 7, "six calls and the one that was repeated"
    await engine.close()


async def test_a_client_that_leaves_closes_the_calls_of_every_context(up: FakeUpstream) -> None:
    engine = await letters(up)
    plan = await planned(engine, guided_body({"polite": 1.0}))
    up.behave = lambda _, __: "hang"
    async with engine.sample(plan.draws[0]):
        assert await until(lambda: up.running == 2)
    assert await until(lambda: up.running == 0)
    assert not engine._drawings
    await engine.close()


async def test_a_refused_context_is_named(up: FakeUpstream) -> None:
    engine = await letters(up)
    plan = await planned(engine, guided_body({"polite": 1.0}))

    def refuse_context(_: int, body: Mapping[str, Any]) -> str:
        return "error_422" if "politely" in body["prompt"] else "ok"

    up.behave = refuse_context
    with pytest.raises(
        InvalidRequest, match=r"with the prompt of 'polite': .*not a number"
    ) as raised:
        await engine.generate(plan.draws[0])
    assert raised.value.param == "align.guidance.scale.polite"
    await engine.close()


# --- refusals ---


@pytest.mark.parametrize(
    ("field", "value"),
    [("presence_penalty", 1), ("logprobs", True), ("stop", [5]), ("temperature", 7)],
)
async def test_a_field_that_cannot_be_honoured_is_refused_by_name(
    engine: OpenAIEngine, field: str, value: Any
) -> None:
    with pytest.raises(InvalidRequest, match=field) as raised:
        await planned(engine, guided_body({"polite": 1.0}, **{field: value}))
    assert raised.value.param == field


async def test_a_context_that_leaves_no_room_is_refused_and_a_long_one_ends_the_answer(
    demo: Live, reference: Reference
) -> None:
    engine = await guiding(demo.base_url)
    plan = await planned(engine, guided_body({"polite": 1.0}))
    (draw,) = plan.draws
    assert draw.guidance is not None
    longest = len(reference.ids(draw, draw.guidance.contrasts[0].body))
    await engine.close()
    engine = await guiding(demo.base_url, context_length=longest)
    with pytest.raises(InvalidRequest, match="with the prompt of 'polite' has") as raised:
        await planned(engine, guided_body({"polite": 1.0}))
    assert raised.value.param == "align.guidance.scale.polite"
    await engine.close()
    engine = await guiding(demo.base_url, context_length=longest + 3)
    plan = await planned(engine, guided_body({"polite": 1.0}))
    (candidate,) = await engine.generate(plan.draws[0])
    assert candidate.completion_tokens == 3
    assert candidate.finish_reason == "length"
    await engine.close()


async def test_a_text_of_megabytes_is_refused_without_reading_it(
    demo: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await guiding(demo.base_url, context_length=512)
    await planned(engine, guided_body({"polite": 1.0}))
    assert engine._steerer is not None
    messages = [{"role": "user", "content": "what " * 100_000}]
    with monkeypatch.context() as patch:
        patch.setattr(engine._steerer, "_tokenize", None)
        with pytest.raises(InvalidRequest, match=r"at least \d+ tokens") as refused:
            await planned(engine, guided_body({"polite": 1.0}, messages=messages))
        assert refused.value.code == "context_length_exceeded"
        # Planning counts at most a token per byte, and leaves other requests to the upstream.
        draw = Draw({"messages": messages, "max_tokens": 4}, 1)
        assert engine.prompt_tokens(draw) >= 500_000
    await engine.close()
