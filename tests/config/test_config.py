"""The configuration: one tree, where each value came from, and every mistake by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infer_align import config
from infer_align.config import registry
from infer_align.errors import ConfigError
from infer_align.methods.dpa import Prompting
from infer_align_server.service import Service

FAKE = '[engine]\nkind = "fake"\n'


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., config.Config]:
    """`load(toml, "a.b=c", ...)`."""

    def load(text: str, *overrides: str) -> config.Config:
        path = tmp_path / "infer-align.toml"
        path.write_text(text, encoding="utf-8")
        return config.load(path, overrides)

    return load


def test_defaults_are_the_dataclasses(load: Any) -> None:
    loaded = load(FAKE)
    assert loaded.server == config.Server()
    assert loaded.limits == config.Limits()
    assert loaded.engine_kind == "fake"
    assert loaded.engine.model == "fake"
    assert loaded.rewards == {}
    assert loaded.presets == {}
    assert loaded.api_keys() == ()


def test_a_whole_file(load: Any) -> None:
    loaded = load(
        '[engine]\nkind = "fake"\nreplies = [{text = "a", status = 500}]\n'
        '[rewards.short]\nkind = "rules"\nwords_weight = -1\n'
        "[presets.two]\nbest_of_n = {n = 2}\n"
        "[server]\nport = 0\ndefault_rewards = {short = 2}\n"
        "[limits]\nmax_candidates = 4\n"
    )
    assert loaded.engine.replies[0].status == 500
    assert loaded.rewards["short"].words_weight == -1.0
    assert loaded.presets == {"two": {"best_of_n": {"n": 2}}}
    assert loaded.server.default_rewards == {"short": 2.0}
    assert loaded.limits.max_candidates == 4
    assert set(loaded.load_rewards()) == {"short", "trust_judge"}, "a judge there is always"


def test_without_a_file_it_is_the_embedded_demo() -> None:
    pytest.importorskip("torch")
    loaded = config.load()
    assert loaded.engine_kind == "transformers"
    assert loaded.server.served_name == "demo"
    assert loaded.origins["engine.model"] == "the embedded demo"


def test_overrides_use_the_files_own_names(load: Any) -> None:
    loaded = load(
        FAKE,
        "server.port=9",
        "server.host=0.0.0.0",
        "limits.max_queue = 3",
        'rewards.r={kind="rules", regex="a=b"}',
        "presets.p.best_of_n.n=2",
        "engine.model=name=with=equals",
        "telemetry.service_name=",
    )
    assert (loaded.server.port, loaded.server.host, loaded.limits.max_queue) == (9, "0.0.0.0", 3)
    assert loaded.rewards["r"].regex == "a=b"
    assert loaded.presets == {"p": {"best_of_n": {"n": 2}}}
    assert loaded.engine.model == "name=with=equals"
    assert loaded.telemetry.service_name == ""


def test_where_each_value_came_from(load: Any, tmp_path: Path) -> None:
    loaded = load(f"{FAKE}[server]\nport = 1\nhost = 'a'\n", "server.host=b", "limits.max_queue=3")
    origins = {name: origin for name, _, origin in loaded.settings()}
    assert origins["server.port"] == str(tmp_path / "infer-align.toml")
    assert origins["server.host"] == "--set"
    assert origins["limits.max_queue"] == "--set"
    assert origins["limits.max_running"] == "default"
    assert origins["engine.kind"] == str(tmp_path / "infer-align.toml")
    replaced = load(
        f"{FAKE}[rewards.r]\nkind = 'rules'\nregex = 'a'\n",
        'rewards.r={kind = "rules", finished = true}',
    )
    origins = {name: origin for name, _, origin in replaced.settings()}
    assert origins["rewards.r.finished"] == "--set"
    assert origins["rewards.r.regex"] == "default", "the table that held it is gone"


WRONG = [
    ("[sever]\n", "[sever]: no such section; did you mean 'server'?"),
    ("server = 5\n", "write it as a section [server]"),
    ("[server]\nprot = 1\n", "server.prot: no such parameter; did you mean 'port'?"),
    ("[server]\nport = '80'\n", "server.port"),
    ("[server]\nport = 70000\n", "server.port"),
    ("[server]\nkeepalive_seconds = 0\n", "server.keepalive_seconds"),
    ("[server]\nkeepalive_seconds = nan\n", "server.keepalive_seconds"),
    ("[server]\nlog_level = 'chatty'\n", "server.log_level"),
    ("[server]\ndefault_rewards = {a = -1.0}\n", "[server] default_rewards"),
    ("[limits]\nmax_running = 0\n", "limits.max_running"),
    ("[engine]\nkind = 'fkae'\n", "engine.kind: 'fkae' is not a known kind; did you mean 'fake'?"),
    ("[engine]\nkind = 5\n", "engine.kind: 5"),
    (
        "[engine]\nkind = 'fake'\nreplys = []\n",
        "engine.replys: no such parameter; did you mean 'replies'?",
    ),
    (
        "[engine]\nkind = 'fake'\nreplies = [{txt = 'a'}]\n",
        "engine.replies.0.txt: no such parameter; did you mean 'text'?",
    ),
    ("[rewards.a]\nwords_weight = 1\n", "[rewards.a] needs a kind"),
    ("[rewards]\na = 5\n", "[rewards.a] needs a kind"),
    ("[rewards.a]\nkind = 'rulse'\n", "did you mean 'rules'?"),
    ("[rewards.'a.b']\nkind = 'rules'\n", "cannot contain '.' or '@'"),
    ("[rewards.'']\nkind = 'rules'\n", "[rewards.] the name '' is empty"),
    ("[presets.' ']\nbest_of_n = {}\n", "[presets. ] the name ' ' is empty"),
    (
        "[server]\nallowed_origins = ['https://a.example', 'app.example.com']\n",
        "server.allowed_origins.1: 'app.example.com' is not allowed; must be an origin with",
    ),
    ("[server]\nallowed_origins = ['https://a.example/app']\n", "without a path"),
    ("[presets.a]\nbest_of = {n = 2}\n", "[presets.a] align.best_of: no such key"),
    ("[presets.a]\nbest_of_n = {n = 0}\n", "[presets.a] align.best_of_n.n"),
    ("[presets]\na = 5\n", "[presets.a] align: 5 is not an object"),
    ("[presets.a]\npreset = 'b'\n[presets.b]\n", "[presets.a] align.preset"),
    ("[presets.'a@b']\nbest_of_n = {}\n", "cannot contain '@'"),
    ("not toml", "not TOML"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_is_named(load: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            text
            if "[engine]" in text
            else text + FAKE
            if "=" in text.partition("[")[0]
            else FAKE + text
        )
    assert message in caught.value.message


def test_origins_are_what_browsers_send(load: Any) -> None:
    origins = ("*", "null", "http://[::1]:3000", "chrome-extension://abc", "https://a.example")
    server = load(f"{FAKE}[server]\nallowed_origins = {list(origins)}\n").server
    assert server.allowed_origins == origins


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "infer-align.toml"
    path.write_text(FAKE, encoding="utf-8-sig")
    assert config.load(path).engine.model == "fake"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            config.load(path)
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load(tmp_path / "latin.toml")


def test_a_reward_that_cannot_be_made_names_its_section(load: Any) -> None:
    for section in (
        "kind = 'rules'",
        "kind = 'rules'\nregex = '['",
        "kind = 'callable'\nfunction = 'no.such:thing'",
    ):
        with pytest.raises(ConfigError, match=r"\[rewards\.r\]"):
            load(f"{FAKE}[rewards.r]\n{section}\n").load_rewards()


@pytest.mark.parametrize("default", ["nope", "short.words"])
def test_default_rewards_must_exist(load: Any, default: str) -> None:
    with pytest.raises(ConfigError, match="default_rewards"):
        Service(
            load(
                f"{FAKE}[rewards.short]\nkind = 'rules'\nwords_weight = 1\n"
                f"[server]\ndefault_rewards = {{'{default}' = 1}}\n"
            )
        )


@pytest.mark.parametrize("plugins", [registry.engines, registry.rewards])
def test_every_plugin_section_can_be_named_in_a_file(plugins: registry.Registry) -> None:
    for name in plugins.names():
        assert dataclasses.is_dataclass(plugins.get(name))


@pytest.mark.vllm
def test_engines_that_share_gpus_must_leave_room_for_each_other(load: Any) -> None:
    pytest.importorskip("vllm")
    text = "[engine]\nkind = 'vllm'\n{}\n[rewards.rm]\nkind = 'pooling'\nmodels = ['a', 'b']\n{}\n"
    assert (
        load(text.format("gpu_memory_utilization = 0.6", "gpu_memory_utilization = 0.2"))
        .rewards["rm"]
        .memory_share
        == 0.4
    )
    assert load(text.format("gpu_memory_utilization = 0.9", "kv_cache_memory_bytes = 1000000"))
    for engine, reward, message in [
        ("", "", "[engine] 0.92 + [rewards.rm] 1.84 = 2.76"),
        (
            "gpu_memory_utilization = 0.7",
            "gpu_memory_utilization = 0.2",
            "[engine] 0.7 + [rewards.rm] 0.4 = 1.1",
        ),
        ("kv_cache_memory_bytes = 1000000", "", "[rewards.rm] 1.84 = 1.84"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(text.format(engine, reward))
        assert message in caught.value.message
        assert "kv_cache_memory_bytes" in caught.value.message


def test_the_section_of_dpa(load: Any) -> None:
    assert load(FAKE).methods.get(Prompting) == Prompting()
    section = load(
        f'{FAKE}[dpa]\nattributes = ["warmth"]\nscale = 10.0\nplacement = "user"\n'
    ).methods.get(Prompting)
    assert (section.attributes, section.scale, section.placement) == (("warmth",), 10.0, "user")
    for section, message in (
        ("attribute = []", "did you mean 'attributes'"),
        ("scale = 0.0", "greater than 0"),
        ("attributes = []", "at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(f"{FAKE}[dpa]\n{section}\n")


def test_the_judge_of_align_trust_judge(load: Any) -> None:
    assert load(FAKE).load_rewards()["trust_judge"].config.engine == "served"
    critic = (
        f'{FAKE}[engines.other]\nkind = "fake"\n'
        '[rewards.critic]\nkind = "trust_judge"\nengine = "other"\n'
    )
    assert load(critic).load_rewards()["trust_judge"].config.engine == "other", (
        "the first judge there is"
    )
    with pytest.raises(ConfigError, match="rename it"):
        load(f"{FAKE}[rewards.trust_judge]\nkind = 'rules'\nwords_weight = 1.0\n")
    named = f'{critic}[rewards.trust_judge]\nkind = "trust_judge"\nscale = 5\n'
    assert load(named).load_rewards()["trust_judge"].config.scale == 5
    with pytest.raises(ConfigError, match="5, 10 or 100"):
        load(f'{FAKE}[rewards.critic]\nkind = "trust_judge"\nscale = 7\n')
    with pytest.raises(ConfigError, match="must be words"):
        load(f'{FAKE}[rewards.critic]\nkind = "trust_judge"\ncriteria = ""\n')


def test_scaling_is_of_attributes(load: Any) -> None:
    section = (
        '[rewards.r]\nkind = "classifier"\nmodel = "x"\n'
        'attributes = ["a"]\nscaling = {b = {mean = 1.0}}\n'
    )
    with pytest.raises(ConfigError, match=r"scaling\.b"):
        load(FAKE + section).load_rewards()


@pytest.mark.parametrize(
    ("threads", "bound"), [(0, "greater than or equal to 1"), (1025, "less than or equal to 1024")]
)
def test_threads_are_bounded(load: Any, threads: int, bound: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.threads: {threads} is not allowed; .* {bound}"):
        load("", f"engine.threads={threads}")
    assert load("", "engine.threads=1024").engine.threads == 1024
