"""A fitted value as a reward, over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow
ASK = [{"role": "user", "content": "What are the diet and the colour of the owl?"}]
CONFIG = """
[engine]
kind = "transformers"
model = "demo"
[values.helpful]
kind = "head"
path = "demo/value-helpful.safetensors"
[rewards.good]
kind = "value"
value = "helpful"
"""


def test_answers_are_chosen_and_scored_over_http(serve: Callable[[str], Any]) -> None:
    live = serve(CONFIG)
    align = {"best_of_n": {"n": 4}, "rewards": {"good": 1.0}}
    answer = live.chat(align, messages=ASK, max_tokens=24, seed=3, temperature=1.0).json()
    candidates = answer["align"]["candidates"]
    scores = [candidate["scores"]["good"]["value"] for candidate in candidates]
    assert answer["align"]["selected"] == int(np.argmax(scores))
    assert len(set(scores)) > 1
    body = {"messages": ASK, "candidates": ["The owl eats mice.", "m"], "rewards": {"good": 1.0}}
    scored = live.post(body, "/v1/align/score")
    assert scored.status_code == 200, scored.text
    values = [each["scores"]["good"]["value"] for each in scored.json()["candidates"]]
    assert values[0] != values[1]
    assert answer["align"]["usage"]["reward_tokens"] > 4
