"""Thousands of generated requests give no server error and only documented responses.

The runs are seeded and bounded; see `tests.server.generated_requests`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infer_align import config as configuration
from tests.server.conftest import Live, end, start
from tests.server.generated_requests import (
    check_failures,
    follow_links,
    own_document,
    schemathesis,
)

pytestmark = [pytest.mark.clients, pytest.mark.timeout(300)]

DATA = Path(__file__).parents[1] / "data"
FAKE = """
[engine]
kind = "fake"
replies = [{text = "candidate 3"}, {text = "candidate 1"}, {text = "candidate 9"}]
"""
EMBEDDED = """
[engine]
kind = "transformers"
model = "demo"
[values.helpful]
kind = "head"
path = "demo/value-helpful.safetensors"
"""
UPSTREAM = """
[engine]
kind = "openai"
probe = false
urls = ["{url}"]
"""
SECTIONS = """
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[rewards.constant]
kind = "callable"
function = "tests.server.scorers:constant"
[presets.best]
best_of_n = {n = 3}
[limits]
max_candidates = 16
"""


@pytest.fixture(params=["fake", "transformers", "upstream"])
def keeper(request: pytest.FixtureRequest, serve: Any, tmp_path: Path) -> Iterator[Live]:
    """A server that keeps profiles, on one of the engines."""
    engine = {"fake": FAKE, "transformers": EMBEDDED, "upstream": UPSTREAM}[request.param]
    if request.param == "upstream":
        engine = engine.replace("{url}", serve(FAKE).base_url)
    path = tmp_path / "infer-align.toml"
    store = f'[profiles]\nstore = "sqlite:///{tmp_path}/profiles.db"\n'
    path.write_text(engine + SECTIONS + store)
    live = start(configuration.load(path))
    yield live
    end(live)


def test_sequences_of_requests_are_as_described(keeper: Live, tmp_path: Path) -> None:
    follow_links(keeper, tmp_path, 6)


def test_our_own_description_is_true(serve: Any, tmp_path: Path) -> None:
    live = serve(FAKE + SECTIONS)
    check_failures(*schemathesis(own_document(live), live.root, tmp_path, 30))
    assert live.idle()
    assert live.metric("infer_align_requests_total", status="500") == 0


def test_openais_description_holds(serve: Any, tmp_path: Path) -> None:
    live = serve(FAKE + SECTIONS)
    document = json.loads((DATA / "openai_subset.json").read_text())
    schemas = document["components"]["schemas"]
    schemas["ModelIdsShared"] = schemas["CreateCompletionRequest"]["properties"]["model"] = {
        "enum": ["fake"]
    }
    refusal = {
        "description": "refused",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
    }
    for item in document["paths"].values():
        for operation in item.values():
            operation["responses"] |= {
                "400": refusal,
                "404": refusal,
            }  # OpenAI answers these, and does not describe them
    # An engine forwards fields that it does not know, which OpenAI's description types.
    options = ["--exclude-checks", "negative_data_rejection"]
    check_failures(*schemathesis(document, live.base_url, tmp_path, 30, options=options))
    assert live.idle()
    assert live.metric("infer_align_requests_total", status="500") == 0
