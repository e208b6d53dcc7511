"""The name of a model in the log is the one of the API."""

from __future__ import annotations

import pytest

from infer_align_server.model_choice import ModelChoice


@pytest.mark.parametrize(
    ("name", "preset", "expected"),
    [
        ("owl", None, "owl"),
        ("owl@brief", "brief", "owl"),
        ("owl@home@brief", "brief", "owl@home"),
        ("owl@home", None, "owl@home"),
    ],
)
def test_the_name_in_the_api_has_no_preset(name: str, preset: str | None, expected: str) -> None:
    assert ModelChoice(name, "package:birds/owl.gguf", preset).api_name == expected
