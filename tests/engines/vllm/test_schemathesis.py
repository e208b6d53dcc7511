"""Sequences of generated requests to the server over vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.conftest import Live
from tests.server.generated_requests import follow_links

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.clients,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
]


def test_sequences_of_requests_are_as_described(live: Live, tmp_path: Path) -> None:
    follow_links(live, tmp_path, 3, key="sesame")
