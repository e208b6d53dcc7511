"""The targets of a soak: configurations of our server, and the upstream that one of them needs."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.engines.openai.upstream import fake_upstream

COMMON_CONFIG = """
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[server]
keepalive_seconds = 0.2
log_level = "error"
"""
FAKE_CONFIG = """
[engine]
kind = "fake"
replies = [
    {text = "a short answer"},
    {text = "one that takes a little longer to say", seconds_per_token = 0.01},
    {text = "one that fails", error = "out of memory", status = 500},
    {text = "late", first_token_seconds = 0.3},
    {text = "one that is busy", error = "slow down", status = 429},
]
[limits]
max_running = 32
max_queue = 24
candidate_tokens_per_minute = 3_000_000
"""
UPSTREAM_CONFIG = """
[engine]
kind = "openai"
urls = ["{url}"]
model = "{model}"
probe = false
timeout_seconds = 2.0
max_retry_wait_seconds = 0.2
[limits]
max_running = 48
max_queue = 24
"""
UPSTREAM_FAULTS = (
    "error_500",
    "error_400",
    "error_429",
    "error_502",
    "error_503",
    "redirect",
    "hang",
    "drip",
    "garbage",
    "html",
    "error_in_200",
    "no_choices",
    "truncated",
    "ended_early",
    "reset",
    "slow_reset",
    "message_missing",
    "infinite",
    "half_a_character",
    "sse_as_json",
    "garbage_in_stream",
    "odd_in_stream",
)
UPSTREAM_FAULT_SHARE = 0.5


@contextmanager
def target_config(name: str, model: str, seed: int) -> Iterator[Path]:
    """Yield the configuration file of a target, and run the upstream that it needs.

    Args:
        name: "fake", "upstream", or the path of a configuration.
        model: served by the upstream.
        seed: of the upstream's faults.
    """
    if name not in {"fake", "upstream"}:
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "infer-align.toml"
        if name == "fake":
            path.write_text(FAKE_CONFIG + COMMON_CONFIG)
            yield path
            return
        with failing_upstream(seed) as url:
            path.write_text(UPSTREAM_CONFIG.format(url=url, model=model) + COMMON_CONFIG)
            yield path


@contextmanager
def failing_upstream(seed: int) -> Iterator[str]:
    """Run an upstream that fails half of its calls, and yield its URL."""
    generator = random.Random(seed)

    def behaviour(_: object, __: object) -> str:
        if generator.random() < UPSTREAM_FAULT_SHARE:
            return "ok"
        return generator.choice(UPSTREAM_FAULTS)

    with fake_upstream() as app:
        app.behave = behaviour
        app.word_seconds = 0.02
        yield app.url
