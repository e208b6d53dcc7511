"""What an upstream can do, asked with calls of one token. An answer that shows it, or not, is a finding; a failure is none."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infer_align.errors import AlignError
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import Client
from infer_align.upstream.pool import Host

FEATURES = ("completion", "seed", "logprobs", "label_logprobs", "tools", "structured", "n", "logit_bias", "continue")
# Fields that need a feature: where an upstream was found to ignore it, they are refused by name.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "logprobs": ("logprobs", "top_logprobs"),
    "tools": ("tools",),
    "structured": ("response_format",),
    "logit_bias": ("logit_bias",),
}
ASK = [{"role": "user", "content": "Say one word."}]
BEGUN = [*ASK, {"role": "assistant", "content": "one two three four"}]
TOOL = {"type": "function", "function": {"name": "note", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "empty", "schema": {"type": "object", "properties": {}}}}
TOP_LOGPROBS = 20
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


@dataclass(frozen=True, slots=True)
class Probed:
    """What was seen to work, and what was seen to be ignored. Of the rest nothing is known, or the upstream itself refuses it."""

    can: frozenset[str]
    ignores: frozenset[str] = frozenset()

    @property
    def continues(self) -> bool:
        """Whether a turn of the assistant that was begun can be continued."""
        return "continue" in self.can


async def probe(client: Client, host: Host, model: str, seconds: float) -> Probed:
    """Ask everything at once; what has no answer within `seconds` stays unknown."""
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "completion": ("/completions", {"prompt": "one"}),
        "seed": ("/chat/completions", {"messages": ASK, "seed": 1}),
        "logprobs": ("/chat/completions", {"messages": ASK, "logprobs": True, "top_logprobs": TOP_LOGPROBS}),
        "tools": ("/chat/completions", {"messages": ASK, "tools": [TOOL], "tool_choice": "auto"}),
        "structured": ("/chat/completions", {"messages": ASK, "response_format": SCHEMA}),
        "n": ("/chat/completions", {"messages": ASK, "n": 2}),
        "logit_bias": ("/chat/completions", {"messages": ASK, "logit_bias": {"0": -100}}),
        "begun": ("/chat/completions", {"messages": BEGUN}),
        "continue": ("/chat/completions", {"messages": BEGUN, **CONTINUE}),
    }
    tasks = {name: asyncio.create_task(_ask(client, host, path, {"model": model, **body})) for name, (path, body) in asked.items()}
    await asyncio.wait(tasks.values(), timeout=seconds)
    answers = {name: task.result() for name, task in tasks.items() if task.done()}
    for task in tasks.values():
        task.cancel()
    can = {name for name, answer in answers.items() if name in FEATURES and _shows(name, answer)}
    if not _continues(answers.get("begun"), answers.get("continue")):
        can.discard("continue")
    if "logprobs" in can:
        can.add("label_logprobs")
    ignores = {name for name, answer in answers.items() if answer and name in FEATURES and name not in can}
    return Probed(frozenset(can), frozenset(ignores | {name for name in ("completion", "n") if answers.get(name) is False}))


async def _ask(client: Client, host: Host, path: str, body: dict[str, Any], maximum: str = "max_tokens") -> Any:
    """The answer; False where the upstream refuses the request; None where it failed."""
    try:
        return await client.once(host, path, {**body, maximum: 1 if maximum == "max_tokens" else 16})
    except UpstreamFailed as error:
        if error.refused and error.param == maximum == "max_tokens":  # some know the newer name only, and need more to speak at all
            return await _ask(client, host, path, body, "max_completion_tokens")
        return False if error.refused or error.status == 501 else None
    except AlignError:
        return None


def _shows(name: str, answer: Any) -> bool:
    """Whether an answer shows what was asked for."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return False
    if name == "n":
        return len(choices) == 2
    if name == "logprobs":
        return bool(top_logprobs(answer))
    return True


def _continues(begun: Any, continued: Any) -> bool:
    """An upstream that ignores the wish starts a new turn either way, and reads as many tokens; one that heeds it reads fewer."""
    before, after = _prompt_tokens(begun), _prompt_tokens(continued)
    return before is not None and after is not None and after < before


def _prompt_tokens(answer: Any) -> int | None:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) else None


def top_logprobs(answer: Any) -> dict[str, float]:
    """{token: logprob} of the first generated token of a chat answer; {} where they are not shown."""
    try:
        first = answer["choices"][0]["logprobs"]["content"][0]
        return {str(entry["token"]): float(entry["logprob"]) for entry in (*first["top_logprobs"],)}
    except (KeyError, IndexError, TypeError, ValueError):
        return {}
