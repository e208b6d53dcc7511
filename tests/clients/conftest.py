"""The servers that client programs are tried on."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.server.conftest import NUMBERS, config_file, hold, serve

__all__ = ["config_file", "hold", "serve"]

ANSWER = '{\\"city\\": \\"Oslo\\", \\"degrees\\": 4}'
CALL = (
    f'{{id = "call_1", type = "function", function = {{name = "Weather", arguments = "{ANSWER}"}}}}'
)
BRIEF = '[rewards.brevity]\nkind = "rules"\nwords_weight = -1.0\n'
SERVERS = {
    "numbers": NUMBERS,
    "tools": f'[engine]\nkind = "fake"\nreplies = [{{text = "", tool_calls = [{CALL}]}}]\n{BRIEF}',
    "json": f'[engine]\nkind = "fake"\nreplies = [{{text = "{ANSWER}"}}]\n{BRIEF}',
    "slow": (
        '[engine]\nkind = "fake"\n'
        'replies = [{text = "1 2 3 4 5 6 7 8 9 10 11 12", seconds_per_token = 0.3}]\n'
    ),
    "embedded": f'[engine]\nkind = "transformers"\nmodel = "demo"\n{BRIEF}',
    "keyed": '[server]\napi_keys_env = "TEST_CLIENT_KEYS"\n[engine]\nkind = "fake"\n',
}


# Gateways before the servers above, by their names.
GATEWAYS = {
    "upstream_numbers": "numbers",
    "upstream_tools": "tools",
    "upstream_json": "json",
    "upstream_embedded": "embedded",
}


@pytest.fixture(scope="session")
def servers(serve: Any) -> dict[str, Any]:
    """One of each."""
    os.environ["TEST_CLIENT_KEYS"] = "a-key"
    try:
        lives = {name: serve(text) for name, text in SERVERS.items()}
        for name, upstream in GATEWAYS.items():
            url = lives[upstream].base_url
            lives[name] = serve(f'[engine]\nkind = "openai"\nurls = ["{url}"]\n{BRIEF}')
        return lives
    finally:
        del os.environ["TEST_CLIENT_KEYS"]
