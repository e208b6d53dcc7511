"""Defaults: a limit on tokens, bodies of presets, and presets that are checked at the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infer_align import config as configuration
from infer_align.errors import ConfigError
from infer_align_server.service import Service
from tests.server.conftest import Serve, end, start

FAKE = '[engine]\nkind = "fake"\nmodel = "m"\ncontext_length = 4096\n'
SHORT = '[rewards.short]\nkind = "rules"\nwords_weight = -1\n'
LIMITED = f"""{FAKE}{SHORT}
[server]
default_max_tokens = 7
[limits]
max_completion_tokens = 64
[presets.cold]
best_of_n = {{ n = 2 }}
[presets.cold.body]
temperature = 0.25
stop = ["x"]
[presets.long.body]
max_completion_tokens = 11
"""


def test_a_request_that_names_no_limit_gets_the_default(serve: Serve) -> None:
    live = serve(LIMITED)
    for fields, expected in (
        ({}, 7),
        ({"max_tokens": None}, 7),
        ({"max_tokens": 3}, 3),
    ):
        assert live.chat(**fields).status_code == 200
        assert live.engine.bodies[-1]["max_tokens"] == expected
    assert live.chat(max_completion_tokens=4).status_code == 200
    assert "max_tokens" not in live.engine.bodies[-1]
    completion = live.post({"prompt": "x"}, "/v1/completions")
    assert completion.status_code == 200
    assert live.engine.bodies[-1]["max_tokens"] == 7


def test_the_default_bounds_what_is_reserved(serve: Serve) -> None:
    live = serve(LIMITED)
    assert live.chat({"best_of_n": {"n": 8}}).status_code == 200, "8 x 7 tokens, not 8 x 4096"
    refused = live.chat({"best_of_n": {"n": 8}}, max_tokens=100)
    assert refused.status_code == 400
    assert "800 tokens" in refused.json()["error"]["message"]


@pytest.mark.parametrize("way", ["model", "align"])
def test_a_preset_sets_fields_of_the_body(serve: Serve, way: str) -> None:
    live = serve(LIMITED)

    def chat(preset: str, **fields: Any) -> dict[str, Any]:
        if way == "model":
            answer = live.chat(**{"model": f"m@{preset}", **fields})
        else:
            answer = live.chat({"preset": preset}, **fields)
        assert answer.status_code == 200, answer.text
        return dict(live.engine.bodies[-1])

    cold = chat("cold")
    assert (cold["temperature"], cold["stop"], cold["max_tokens"]) == (0.25, ["x"], 7)
    own = chat("cold", temperature=1.5, max_tokens=2)
    assert (own["temperature"], own["stop"], own["max_tokens"]) == (1.5, ["x"], 2)
    long = chat("long")
    assert long["max_completion_tokens"] == 11
    assert "max_tokens" not in long


def test_the_lists_show_the_body_of_a_preset(serve: Serve) -> None:
    live = serve(LIMITED)
    entry = live.get("/v1/models/m@cold").json()
    assert entry["align"] == {"best_of_n": {"n": 2}}
    assert entry["body"] == {"temperature": 0.25, "stop": ["x"]}
    assert live.get("/v1/align/methods").json()["preset_bodies"]["cold"] == entry["body"]


def failure(path: Path) -> str:
    live = start(configuration.load(path))
    end(live)
    return live.service.failure or ""


WRONG = [
    ("rewards = { shrt = 1 }", "rewards.shrt: no such reward; did you mean 'short'?"),
    ("vas = { beta = { mine = 1 } }", "vas: the value 'mine' is not configured"),
    ("early_stop = { values = { mine = 1 } }", "early_stop: the value 'mine' is not configured"),
]
WRONG_BODY = [
    ("body = { temperature = -1 }", "temperature: -1 is not allowed"),
    ("best_of_n = { n = 1000 }", "align.best_of_n.n: 1000 candidates are over"),
    ("dpa = { direction = { helpfulnes = 1 } }", "align.dpa.direction.helpfulnes"),
]


@pytest.mark.parametrize(("preset", "message"), WRONG)
def test_a_wrong_name_in_a_preset_fails_before_loading(
    config_file: Callable[[str], Path], preset: str, message: str
) -> None:
    path = config_file(f"{FAKE}{SHORT}[presets.p]\n{preset}\n")
    with pytest.raises(ConfigError) as caught:
        Service(configuration.load(path))
    assert caught.value.message.startswith(f"[presets.p] {message}")


@pytest.mark.parametrize(("preset", "message"), WRONG_BODY)
def test_a_wrong_value_in_a_preset_fails_the_start(
    config_file: Callable[[str], Path], preset: str, message: str
) -> None:
    path = config_file(f"{FAKE}{SHORT}[presets.p]\n{preset}\n")
    assert failure(path).startswith(f"[presets.p] {message}")


def test_a_preset_that_leaves_something_to_the_request_is_served(serve: Serve) -> None:
    live = serve(f"{FAKE}[presets.p]\nbest_of_n = {{ n = 2 }}\n[presets.q]\nrps = {{}}\n")
    assert live.service.failure is None
    warnings = live.service.warnings
    assert len(warnings) == 1
    assert "[presets.q] cannot be used by itself: align.rps: needs a direction" in warnings[0]
    answer = live.chat({"trust_judge": {}}, model="m@p")
    assert answer.status_code == 200, answer.text


@pytest.mark.slow
def test_a_field_that_the_engine_does_not_have_fails_the_start(
    language_model: Callable[..., str], config_file: Callable[[str], Path]
) -> None:
    model = language_model("Llama")
    path = config_file(f'[engine]\nmodel = "{model}"\n[presets.p.body]\ntemprature = 1\n')
    assert failure(path).startswith("[presets.p] temprature: ")


@pytest.mark.slow
def test_the_default_is_shortened_to_what_fits_the_context(
    language_model: Callable[..., str], config_file: Callable[[str], Path]
) -> None:
    text = (
        f'[engine]\nmodel = "{language_model("Llama")}"\ncontext_length = 64\n'
        "[server]\ndefault_max_tokens = 1000\n"
    )
    live = start(configuration.load(config_file(text)))
    try:
        answer = live.chat(temperature=0)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["total_tokens"] <= 64
        refused = live.chat(max_tokens=999)
        assert refused.status_code == 400
    finally:
        end(live)
