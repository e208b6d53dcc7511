"""The clients that people use, on vLLM: the same cases as on the other engines."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from infer_align import demo
from tests.clients.engine import CLIENTS, describe, run_client
from tests.engines.vllm.conftest import LIMIT_SECONDS
from tests.engines.vllm.stepping import WARNINGS
from tests.engines.vllm.test_serving import no_white_space
from tests.server.conftest import Live

pytestmark = [pytest.mark.vllm, pytest.mark.clients, pytest.mark.timeout(300), *WARNINGS]


@pytest.mark.parametrize("name", CLIENTS)
def test_client_on_vllm(live: Live, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.path(demo.LM))
    fields = {"logit_bias": no_white_space(tokenizer)}
    argument = describe(live.base_url, "owl", "sesame", fields=fields)
    run_client(name, CLIENTS[name], argument, seconds=LIMIT_SECONDS)
    assert live.metric("infer_align_requests_total", status="500") == 0
    assert live.until(lambda: live.service.admission.running == 0)
