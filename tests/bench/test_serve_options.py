"""`infer-align bench serve` names the option that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infer_align_server import cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "2", "--rate", "3"], "--concurrency and --rate: only one of them"),
        (["--max-in-flight", "2"], "--max-in-flight: only allowed with --rate"),
        (["--goodput", "tfft:200"], "--goodput: 'tfft:200' is not allowed"),
        (["--goodput", "ttft:fast"], "--goodput: 'ttft:fast' is not allowed"),
        (["--dataset", "nowhere.jsonl"], "prompts: nowhere.jsonl cannot be read"),
        (["--dataset", "synthetik"], "did you mean 'synthetic'?"),
        (["--json", "no/such/folder/x.json"], "no/such/folder/x.json cannot be written"),
    ],
)
def test_a_wrong_option_is_named(bench: Any, arguments: list[str], message: str) -> None:
    code, _, err = bench(*arguments)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "--rate: '0' is not allowed"),
        (["--base-url", "ftp://host"], "--base-url: 'ftp://host' is not an http(s) URL"),
        (["--rate", "nan"], "--rate"),
        (["--concurrency", "-1"], "--concurrency"),
        (["--requests", "many"], "--requests: 'many' is not allowed"),
        (["--align", "[1]"], "--align: '[1]' is not a JSON object"),
        (["--align", "{"], "is not JSON"),
        (["--input-tokens", "9-5"], "must be like 64 or 32-128"),
        (["--warmup", "-2"], "--warmup"),
        (["--seed", "-1"], "--seed: '-1' is not allowed"),
    ],
)
def test_a_wrong_value_is_refused_by_the_parser(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "serve", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ['{"message": []}', '{"messages": []}', '{"messages": "x"}', "3", "{"]
)
def test_a_wrong_line_is_named(bench: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(f'"fine"\n\n{content}\n')
    code, _, err = bench("--dataset", path)
    assert code == 2
    assert "chats.jsonl:3" in err.replace(" ", "")
