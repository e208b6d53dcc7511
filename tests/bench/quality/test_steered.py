"""Steered settings get an estimate of their KL, and a warning where it is large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from infer_align_bench.quality.grid import Cell
from infer_align_bench.quality.runner import _log_ratio
from infer_align_server import cli
from tests.bench.conftest import read, words

DEMO = """
[engine]
kind = "transformers"
model = "demo"
threads = 1
[rewards.brief]
kind = "rules"
words_weight = -0.1
[rewards.constant]
kind = "callable"
function = "tests.server.scorers:constant"
[values.brief]
kind = "head"
path = "demo/value-brief.safetensors"
"""
GRID = """
[[cells]]
name = "one sample"
[[cells]]
name = "beta {beta}"
align = { vas = { beta = { brief = "{beta}" } } }
over = { beta = [1.0, 30.0] }
[[cells]]
name = "steered best of 2"
align = { vas = { beta = { brief = 1.0 } }, best_of_n = { n = 2 }, rewards = { constant = 1.0 } }
"""


@pytest.mark.slow
def test_the_kl_of_steered_settings_is_estimated(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid.toml").write_text(GRID)
    url = serve(DEMO).base_url
    command = ["bench", "quality", "--base-url", url, "--gold", "brief", "--prompts", "demo"]
    files = ["--report", str(tmp_path / "q.html"), "--json", str(tmp_path / "q.json")]
    limits = ["--limit", "4", "--kl-limit", "3", "--grid", str(tmp_path / "grid.toml")]
    assert cli.main([*command, *limits, *files]) == 0
    report = read(tmp_path / "q.json")
    settings = {setting["name"]: setting for setting in report["settings"]}
    assert settings["one sample"]["kl"] is None
    assert settings["one sample"]["kl_bound"] == 0
    assert settings["steered best of 2"]["kl"] is None, "the best of two is no sample"
    assert settings["beta 30.0"]["kl"]["value"] > 3 > settings["beta 1.0"]["kl"]["value"]
    (warning,) = report["warnings"]
    assert warning.startswith("beta 30.0 is recommended at ")
    assert "above --kl-limit 3." in warning
    assert warning in words(capsys.readouterr().out)
    assert "class=warning>beta 30.0" in (tmp_path / "q.html").read_text()


def test_a_log_ratio_needs_both_log_probabilities() -> None:
    def body(*tokens: dict[str, float]) -> Any:
        return {"choices": [{"logprobs": {"content": list(tokens)}}]}

    steered = {"logprob": -2.0, "aligned_logprob": -0.5}
    assert _log_ratio(body(steered, steered)) == 3.0
    assert _log_ratio(body(steered, {"logprob": -1.0})) is None
    assert _log_ratio({"choices": [{"logprobs": None}]}) is None
    assert _log_ratio({"choices": []}) is None


@pytest.mark.parametrize(
    ("align", "is_steered"),
    [
        ({"vas": {}}, True),
        ({"guidance": {}, "details": "none"}, True),
        ({"vas": {}, "best_of_n": {"n": 2}}, False),
        ({"dpa": {}}, False),
        (None, False),
    ],
)
def test_one_steered_draw_has_a_kl(align: Any, is_steered: bool) -> None:
    assert Cell("a", align).is_steered == is_steered
