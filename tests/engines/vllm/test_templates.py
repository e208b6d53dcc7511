"""A model on vLLM whose chat template refuses system messages, and shows no tools."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infer_align import config as configuration
from tests.engines.vllm.conftest import LIMIT_SECONDS
from tests.engines.vllm.stepping import WARNINGS, environment
from tests.server.conftest import Live, end, start

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), *WARNINGS]

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
CONFIG = """
[engine]
kind = "vllm"
model = "demo"
dtype = "float32"
enforce_eager = true
max_model_len = 1024
kv_cache_memory_bytes = 67_108_864
block_size = 32
chat_template = "TEMPLATE"
[rewards.simple]
kind = "density_ratio"
prompt = "Use simple words."
"""
USER = {"role": "user", "content": "What does the owl eat?"}
SYSTEM = {"role": "system", "content": "Be brief."}
DIRECTION = {"direction": {"helpfulness": 1.0}}


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("refusing")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    path = folder / "infer-align.toml"
    path.write_text(CONFIG.replace("TEMPLATE", str(template)), encoding="utf-8")
    with environment():
        live = start(configuration.load(path), wait=False)
        assert live.until(live.service.settled.is_set, 3 * LIMIT_SECONDS)
        assert live.service.failure is None
        yield live
        end(live)


def post(live: Live, align: Any, messages: Any = (USER,), **fields: Any) -> Any:
    body = {"messages": [*messages], "max_tokens": 6, "seed": 1, "align": align, **fields}
    with live.http() as client:
        return client.post("/v1/chat/completions", json=body, timeout=LIMIT_SECONDS)


@pytest.mark.parametrize(
    "align",
    [
        {"best_of_n": {"n": 2}, "trust_judge": {"scale": 5}},
        {"best_of_n": {"n": 2}, "trust_judge": {"scale": 5, "mode": "pairwise"}},
        {"best_of_n": {"n": 2}, "trust_judge": {"scale": 5, "principles": [{"text": "be kind"}]}},
        {"best_of_n": {"n": 2}, "rewards": {"simple": 1.0}},
    ],
    ids=["score", "pairwise", "principles", "density-ratio"],
)
def test_instructions_of_judges_and_rewards_go_into_the_users_turn(
    refusing: Live, align: Any
) -> None:
    answer = post(refusing, align)
    assert answer.status_code == 200, answer.text
    for candidate in answer.json()["align"]["candidates"]:
        values = [score["value"] for score in candidate["scores"].values()]
        assert values
        assert None not in values


def test_a_direction_needs_another_placement(refusing: Live) -> None:
    generated = refusing.metric("vllm:generation_tokens_total")
    answer = post(refusing, {"dpa": DIRECTION})
    assert answer.status_code == 400, answer.text
    assert '[dpa] placement = "user"' in answer.json()["error"]["message"]
    assert refusing.metric("vllm:generation_tokens_total") == generated


@pytest.mark.parametrize("align", [None, {}, {"best_of_n": {"n": 2}}])
def test_a_system_message_of_the_client_is_no_error_of_the_server(
    refusing: Live, align: Any
) -> None:
    answer = post(refusing, align, (SYSTEM, USER))
    assert answer.status_code in {200, 400}, answer.text


def test_what_the_template_lacks_is_said(refusing: Live) -> None:
    with refusing.http() as client:
        notes = client.get("/v1/align/methods").json()["notes"]
    assert "no system messages" in notes[0]
    assert refusing.service.engine.has_system_role is False
