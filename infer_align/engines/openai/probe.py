"""What an upstream can do with one of its models, asked with calls of a few tokens.

A capability is what an answer was seen to obey, not what was answered 200. What is taken without a sign is `takes`; a field that
was seen to change nothing is `ignores`; a call that failed leaves a question open.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infer_align.errors import AlignError
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import Client
from infer_align.upstream.pool import Host

FEATURES = (
    "completion",
    "seed",
    "logprobs",
    "label_logprobs",
    "tools",
    "structured",
    "n",
    "logit_bias",
    "continue",
)
# Fields that need a feature: where an upstream was found to ignore it, they are refused by name.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "logprobs": ("logprobs", "top_logprobs"),
    "tools": ("tools",),
    "structured": ("response_format",),
    "logit_bias": ("logit_bias",),
}
# The two names of the limit on a completion's tokens: some models know the newer only, and need more tokens to speak at all.
LIMITS: Mapping[str, int] = {"max_tokens": 1, "max_completion_tokens": 16}
ASK = [{"role": "user", "content": "Say one word."}]
LETTERS = [{"role": "user", "content": "Write random letters, and nothing else."}]
BEGUN = [*ASK, {"role": "assistant", "content": "one two three four"}]
TOOL = {
    "type": "function",
    "function": {"name": "note", "parameters": {"type": "object", "properties": {}}},
}
CALLED = {"type": "function", "function": {"name": "note"}}
SCHEMA = {
    "type": "object",
    "properties": {"x": {"const": 1}},
    "required": ["x"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOP_LOGPROBS = 20
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
SHORT, LONG = 8, 48  # tokens in which two seeds differ, and in which a tool is called
# Two tokens that every usual vocabulary has, and as different texts: a bias of 100 makes one the answer.
FIRST, SECOND = {"40": 100}, {"50": 100}
GREEDY = {"messages": ASK, "temperature": 0}

ASKED: Mapping[str, dict[str, Any]] = {
    "completion": {"prompt": "one"},
    "logprobs": {"messages": ASK, "logprobs": True, "top_logprobs": TOP_LOGPROBS},
    "n": {"messages": ASK, "n": 2},
    "tools": {"messages": ASK, "tools": [TOOL], "tool_choice": CALLED, "max_tokens": LONG},
    "structured": {"messages": ASK, "response_format": FORMAT, "max_tokens": LONG},
    "seed": {"messages": LETTERS, "seed": 1, "temperature": 1.0, "max_tokens": SHORT},
    "seed again": {"messages": LETTERS, "seed": 1, "temperature": 1.0, "max_tokens": SHORT},
    "seed other": {"messages": LETTERS, "seed": 2, "temperature": 1.0, "max_tokens": SHORT},
    "plain": GREEDY,
    "logit_bias": {**GREEDY, "logit_bias": FIRST},
    "logit_bias again": {**GREEDY, "logit_bias": FIRST},
    "logit_bias other": {**GREEDY, "logit_bias": SECOND},
    "begun": {"messages": BEGUN},
    "continue": {"messages": BEGUN, **CONTINUE},
}


@dataclass(frozen=True, slots=True)
class Probed:
    """What was seen to work, and what was seen to be ignored. Of the rest nothing is known, or the upstream itself refuses it.

    Attributes:
        can: an answer shows it.
        ignores: an answer shows that it changes nothing; or, of text completions and n, that there is no such thing.
        takes: what is answered without a sign of it.
        unknown: what had no answer.
        limit: how the model calls the limit on its tokens.
    """

    can: frozenset[str]
    ignores: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    limit: str = "max_tokens"

    @property
    def continues(self) -> bool:
        """Whether a turn of the assistant that was begun can be continued."""
        return "continue" in self.can


async def probe(client: Client, host: Host, model: str, seconds: float) -> Probed:
    """Ask everything at once; what has no answer within `seconds` stays unknown."""
    limits: set[str] = set()
    tasks = {
        name: asyncio.create_task(_ask(client, host, {"model": model, **body}, limits))
        for name, body in ASKED.items()
    }
    try:
        await asyncio.wait(tasks.values(), timeout=seconds)
        answers = {name: task.result() if task.done() else None for name, task in tasks.items()}
    finally:
        for task in tasks.values():
            task.cancel()
    return judged(answers, limit="max_completion_tokens" if limits else "max_tokens")


def judged(answers: Mapping[str, Any], *, limit: str = "max_tokens") -> Probed:
    """What the answers to `ASKED` show; False for one that was refused, None for one that failed."""
    found = {name: _verdict(name, answers) for name in FEATURES if name != "label_logprobs"}
    by = {
        verdict: {name for name, said in found.items() if said == verdict}
        for verdict in ("can", "ignores", "takes", "unknown")
    }
    if "logprobs" in by["can"]:
        by["can"].add("label_logprobs")
    sets = {verdict: frozenset(names) for verdict, names in by.items()}
    return Probed(sets["can"], sets["ignores"], sets["takes"], sets["unknown"], limit)


def _verdict(name: str, answers: Mapping[str, Any]) -> str:
    """One of "can", "ignores", "takes", "refuses", "unknown"."""
    answer, others = (
        answers.get(name),
        [answers.get(f"{name} {which}") for which in ("again", "other")],
    )
    if answer is False:
        return "ignores" if name in {"completion", "n"} else "refuses"
    if answer is None:
        return "unknown"
    if name in {"seed", "logit_bias"}:
        if not all(others):
            return "unknown"
        return _sampling(name, [said(one) for one in (answer, *others)], answers.get("plain"))
    if name == "continue":
        return "can" if _continues(answers.get("begun"), answer) else "ignores"
    if name in {"tools", "structured"}:
        return "can" if _SIGNS[name](_message(answer)) else "takes"
    shows = {
        "n": len(_choices(answer)) == 2,
        "logprobs": bool(top_logprobs(answer)),
        "completion": bool(_choices(answer)),
    }
    return "can" if shows[name] else "ignores"


def _sampling(name: str, texts: list[str], plain: Any) -> str:
    """Whether the same gave the same and other gave other: a seed under sampling, a bias that makes one token the answer."""
    first, again, other = texts
    if name == "seed":  # a model that has one thing to say shows nothing of its seeds
        return "can" if first == again != other else "takes"
    if first != again:
        return "ignores"
    return "can" if first != other or (plain and first != said(plain)) else "ignores"


async def _ask(client: Client, host: Host, body: dict[str, Any], limits: set[str]) -> Any:
    """The answer; False where the upstream refuses the request; None where it failed."""
    path = "/completions" if "prompt" in body else "/chat/completions"
    try:
        return await client.call_host(
            host, path, {**body, "max_tokens": body.get("max_tokens", LIMITS["max_tokens"])}
        )
    except UpstreamFailed as error:
        if not limit_refused(error):
            return False if error.refused or error.status == 501 else None
    except AlignError:
        return None
    newer = {key: value for key, value in body.items() if key != "max_tokens"}
    least = LIMITS["max_completion_tokens"]
    try:
        answer = await client.call_host(
            host, path, {**newer, "max_completion_tokens": max(least, body.get("max_tokens", 0))}
        )
    except UpstreamFailed as error:
        return False if error.refused or error.status == 501 else None
    except AlignError:
        return None
    limits.add("max_completion_tokens")
    return answer


def limit_refused(error: UpstreamFailed) -> bool:
    """Whether it is the older name of the limit on tokens that is refused."""
    return error.refused and (
        error.param == "max_tokens" or "max_completion_tokens" in error.message
    )


def _choices(answer: Any) -> list[Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return choices if isinstance(choices, list) and choices and isinstance(choices[0], dict) else []


def _message(answer: Any) -> dict[str, Any]:
    choices = _choices(answer)
    message = choices[0].get("message") if choices else None
    return message if isinstance(message, dict) else {}


def said(answer: Any) -> str:
    """All that a message says, thoughts too."""
    return json.dumps(
        {key: value for key, value in _message(answer).items() if key != "role" and value},
        default=str,
    )


def _is_object(message: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(message.get("content") or "") == {"x": 1})
    except (ValueError, TypeError, RecursionError):
        return False


_SIGNS = {"tools": lambda message: bool(message.get("tool_calls")), "structured": _is_object}


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
