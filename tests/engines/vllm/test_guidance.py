"""vLLM in this process refuses guidance and says how to have it: from a server before it."""

from __future__ import annotations

import pytest

from infer_align.config import Limits
from infer_align.engines import Engine, Undiscovered
from infer_align.engines.openai import OpenAI
from infer_align.engines.transformers import Transformers
from infer_align.engines.vllm import Vllm, VllmEngine
from infer_align.errors import InvalidRequest, Unsupported
from infer_align.flow.plan import Plan, make_plan
from infer_align.flow.request import parse_request
from infer_align.types import Capability
from tests.engines.vllm.stepping import WARNINGS
from tests.server.conftest import Live

pytestmark = WARNINGS

QUESTION = [{"role": "user", "content": "What are the diet and the colour of the owl?"}]
TRAITS = {
    "polite": {"prompt": "Answer politely and say you hope it helps."},
    "rude": {"prompt": "You are rude.", "negative_prompt": "You are polite."},
}


def guided(**scale: float) -> dict[str, object]:
    guidance = {"scale": scale, "traits": {name: TRAITS[name] for name in scale}}
    body = {"messages": QUESTION, "max_tokens": 16, "temperature": 0}
    return {**body, "align": {"guidance": guidance}}


def test_guidance_is_refused_by_name_and_a_server_before_it_is_named() -> None:
    # It is planned before anything is loaded, so vLLM may be missing.
    engine = VllmEngine(Vllm("demo"))
    request = parse_request(guided(polite=1.0), "chat", {})
    with pytest.raises(Unsupported) as raised:
        make_plan(request, engine, {}, {}, Limits())
    assert raised.value.param == "align.guidance"
    assert "needs guide, which the engine of 'demo' lacks" in raised.value.message
    assert "infer-align serve --upstream" in raised.value.message
    assert "--set engine.tokenizer=" in raised.value.message


@pytest.mark.parametrize(
    ("guidance", "param"),
    [
        ({"scale": {"polite": 1.0}}, "align.guidance.scale.polite"),
        ({"scale": {"polite": "NaN"}}, "align.guidance.scale.polite"),
        (
            {"scale": {"polite": 1.0}, "traits": {"polite": {"prompt": " "}}},
            "align.guidance.traits.polite.prompt",
        ),
    ],
)
def test_a_wrong_field_of_guidance_is_named_before_the_engine_is(
    guidance: object, param: str
) -> None:
    body = {"messages": QUESTION, "align": {"guidance": guidance}}
    engine = VllmEngine(Vllm("demo"))
    with pytest.raises(InvalidRequest) as raised:
        make_plan(parse_request(body, "chat", {}), engine, {}, {}, Limits())
    assert raised.value.param == param


async def discovered(engine: Engine, body: dict[str, object]) -> Plan:
    """Plan a request; what the engine does not know yet is found out first."""
    while True:
        try:
            return make_plan(parse_request(body, "chat", {}), engine, {}, {}, Limits())
        except Undiscovered as gap:
            await gap.discover()


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.anyio
async def test_a_server_before_vllm_guides_its_model(live: Live) -> None:
    before = OpenAI(urls=live.base_url, api_key_env="VLLM_TEST_KEYS", tokenizer="demo").load()
    owner = Transformers(model="demo", threads=1).load()
    await before.start()
    await owner.start()
    for scale in ({"polite": 2.0}, {"polite": -1.0}, {"rude": 1.5, "polite": 0.5}):
        (draw,) = (await discovered(before, guided(**scale))).draws
        (guided_before,) = await before.generate(draw)
        (guided_inside,) = await owner.generate(draw)
        assert guided_before.text == guided_inside.text
    assert Capability.GUIDE in before.capabilities
    await before.close()
    await owner.close()
