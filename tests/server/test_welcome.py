"""The start of `infer-align serve` as a person sees it, and its end without a word."""

from __future__ import annotations

import io
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from rich.console import Console

from infer_align_server.welcome import print_welcome
from tests.server.conftest import Live, Serve
from tests.server.processes import ENVIRONMENT, LOCAL, Process, run

pytestmark = pytest.mark.slow

QUIET = ("--set", "server.log_level=error")
REWARD = '[rewards.short]\nkind = "rules"\ntarget_words = 60\n'
BARE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PRESETS = "".join(f"[presets.p{i}]\n" for i in range(12))


def screen(server: Process) -> str:
    """Return what the server has printed when it is ready."""
    server.screen.find("docs +docs/api.md")
    return "".join(server.screen.lines)


def welcome(live: Live) -> str:
    """Return the start screen of a server in this process, which loads torch only once."""
    console = Console(file=io.StringIO(), width=200)
    with console.capture() as printed:
        print_welcome(live.service, live.root, 1.0, console)
    return printed.get()


def embedded(folder: str | Path, *lines: str) -> str:
    """Return the configuration that serves a model in the embedded engine."""
    return "\n".join(["[engine]", 'kind = "transformers"', f'model = "{folder}"', *lines, ""])


def methods(url: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx2.get(f"{url}/v1/align/methods", **LOCAL).json()["methods"]
    return answer


def test_the_screen_says_what_is_missing_and_the_lines_mend_it(
    process: Callable[..., Process], command: Callable[..., Process], tmp_path: Path
) -> None:
    server = process('[engine]\nkind = "fake"\nmodel = "tiny"\n', *QUIET)
    text = screen(server)
    assert re.search(r"infer-align serves tiny at http://127.0.0.1:\d+/v1 \(ready after", text)
    assert "best_of_n, rps: no reward is configured: density_ratio chooses" in text
    assert methods(server.url())["best_of_n"]["available"] is True
    assert "density_ratio chooses" in methods(server.url())["best_of_n"]["note"]
    assert methods(server.url())["dpa"]["available"] is True
    assert "[dpa] trained = true" in text
    fix = methods(server.url())["best_of_n"]["fix"]
    for line in fix.splitlines():
        assert line in text
    path = tmp_path / "mended.toml"
    path.write_text(f'{fix}\n[engine]\nkind = "fake"\n[dpa]\ntrained = true\n')
    mended = command(str(path), *QUIET)
    assert "best_of_n, " in screen(mended)
    assert "[dpa] trained" not in screen(mended)
    assert methods(mended.url())["best_of_n"]["note"] == ""


@pytest.mark.parametrize("text", ["", REWARD, PRESETS])
def test_the_example_can_be_copied(process: Callable[..., Process], text: str) -> None:
    server = process(f'{text}[engine]\nkind = "fake"\nmodel = "it\'s"\n', *QUIET)
    printed = screen(server)
    match = re.search(r"curl .*", printed)
    assert match
    done = subprocess.run(
        ["bash", "-c", f"{match[0]} --silent --noproxy '*'"],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    assert '"choices"' in done.stdout
    assert ("best of" in done.stdout or '"align"' in done.stdout) is (text == REWARD)
    assert ("and 5 more" in printed) is (text == PRESETS)


def test_the_example_has_a_place_for_a_key_where_one_is_needed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYS", "secret")
    live = serve('[server]\napi_keys_env = "KEYS"\n[engine]\nkind = "fake"\n')
    assert "-H 'Authorization: Bearer YOUR_KEY' -H 'Content-Type" in welcome(live)
    assert "Authorization" not in welcome(serve('[engine]\nkind = "fake"\n'))


def test_sizes_of_what_loads_are_logged(
    command: Callable[..., Process], language_model: Callable[..., str]
) -> None:
    server = command(language_model("Llama"))
    server.url()
    loading = [event for event in server.events() if event["event"] == "loading"]
    assert re.fullmatch(r"engine \S+ \(\d[\d.]* [kM]B\)", loading[0]["part"])


def test_a_missing_chat_template_can_be_named(
    serve: Serve, language_model: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(language_model("Llama"), folder)
    template = folder / "chat_template.jinja"
    template.unlink(missing_ok=True)
    config = folder / "tokenizer_config.json"
    without = re.sub(r'"chat_template": ".*?[^\\]",?', "", config.read_text())
    config.write_text(without)
    without_chat = serve(f'{embedded(folder)}\n[rewards.next]\nkind = "follow_up"\n')
    bare = welcome(without_chat)
    assert "The model has no chat template, so only /v1/completions answers" in bare
    assert "/v1/completions -H" in bare
    assert '"prompt": "The sky is blue because"' in bare
    methods = without_chat.get("/v1/align/methods").json()["methods"]
    refused = [name for name, method in methods.items() if "chat template" in str(method["reason"])]
    assert sorted(refused) == ["dpa", "rps", "trust_judge"]
    asking: dict[str, dict[str, Any]] = {
        "trust_judge": {"rewards": {}, "trust_judge": {}},
        "rewards.next": {"rewards": {"next": 1}},
    }
    for key, align in asking.items():
        body = {"prompt": "the cat", "max_tokens": 2, "align": {"best_of_n": {"n": 2}, **align}}
        answer = without_chat.post(body, "/v1/completions")
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == f"align.{key}"
    directed = without_chat.chat({"dpa": {"direction": {"helpfulness": 1}}})
    assert directed.status_code == 400
    assert "this model has no chat template" in directed.json()["error"]["message"]
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    live = serve(embedded(folder, f'chat_template = "{file}"'))
    assert "shows it no system messages: it leaves them out" in welcome(live)
    body = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2}
    answer = live.post(body)
    assert answer.status_code == 200, answer.text
    other = tmp_path / "whole.jinja"
    other.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    described = serve(embedded(folder, f'chat_template = "{other}"'))
    assert "chat template" not in welcome(described)
    [note] = described.get("/v1/align/methods").json()["notes"]
    assert 'With "auto" such a model may never call' in note
    assert note in welcome(described)
    calling = tmp_path / "calling.jinja"
    calling.write_text("{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}")
    whole = serve(embedded(folder, f'chat_template = "{calling}"'))
    assert whole.get("/v1/align/methods").json()["notes"] == []
    assert "Tools:" not in welcome(whole)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_the_end_prints_nothing(
    command: Callable[..., Process], language_model: Callable[..., str], sign: int
) -> None:
    # test_json_log.py has the end of the interpreter, which a fork skips.
    server = command(language_model("Llama"), *QUIET)
    before = screen(server)
    server.popen.send_signal(sign)
    assert server.wait() == {signal.SIGTERM: 0, signal.SIGINT: 130}[signal.Signals(sign)]
    assert "".join(server.screen.lines) == before
    assert server.log.lines == []


def break_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:2000])


def remove_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def name_unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "zebra"}')


@pytest.fixture
def damaged(language_model: Callable[..., str], tmp_path: Path) -> Path:
    """A copy of a model, to be damaged."""
    folder = tmp_path / "damaged"
    shutil.copytree(language_model("Llama"), folder)
    return folder


@pytest.mark.parametrize(
    "damage",
    [break_weights, remove_weights, break_config, list_config, name_unknown_architecture],
)
def test_a_damaged_model_is_named_on_one_line(
    serve: Serve, damaged: Path, damage: Callable[[Path], None]
) -> None:
    damage(damaged)
    failure = serve(embedded(damaged)).service.failure
    assert failure is not None
    assert failure.startswith("[engine] ")
    assert "\n" not in failure


def test_a_damaged_model_ends_the_command_with_one_line(damaged: Path) -> None:
    break_weights(damaged)
    done = run("serve", str(damaged), "--port", "0", *QUIET)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("configuration: [engine] ")


def test_a_missing_template_file_is_named() -> None:
    pytest.importorskip("torch")
    done = run("serve", "--port", "0", "--set", "engine.chat_template=/no/such.jinja", *QUIET)
    assert done.returncode == 2
    assert "[engine] chat_template: '/no/such.jinja' cannot be read" in done.stderr


@pytest.mark.parametrize("is_written", [False, True])
def test_a_reward_whose_template_lacks_special_tokens_is_noted(
    is_written: bool,
    serve: Serve,
    framing_tokenizer: Callable[[str], Any],
    reward_model: Callable[..., str],
) -> None:
    model = reward_model("Bert", tokenizer=framing_tokenizer(BARE))
    lines = ["[rewards.quality]", 'kind = "classifier"', f'model = "{model}"']
    if is_written:
        lines.append("add_special_tokens = true")
    lines += ["[engine]", 'kind = "fake"', ""]
    text = welcome(serve("\n".join(lines)))
    note = re.search(r"note +\[rewards.quality\] .*adds <pad> </s>.*add_special_tokens = t", text)
    assert bool(note) is not is_written
