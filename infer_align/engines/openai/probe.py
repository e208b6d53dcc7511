"""Probing: find out with calls of a few tokens which features an upstream offers with a model.

A feature counts as supported only if an answer shows its effect; status 200 alone proves nothing.
A field that is accepted without a visible effect is `accepted`. A field that changed nothing,
although it should have, is `ignored`. A call that failed leaves its feature `unknown`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from infer_align.engines.openai.prompt_tokens import (
    echoed_tokens,
    rendered_tokens,
    text_logprobs,
)
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
    "echo",
    "sequence_logprobs",
)
# The request fields of a feature. They are refused by name if an upstream ignores the feature.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "logprobs": ("logprobs", "top_logprobs"),
    "tools": ("tools",),
    "structured": ("response_format",),
    "logit_bias": ("logit_bias",),
}
# Features that may work although an answer does not show it. A model that always says the same,
# for example, shows nothing of its seeds.
EFFECT_MAY_BE_HIDDEN = frozenset({"seed", "tools", "structured"})
# Features for questions of rewards. No field of a request stands for them.
WITHOUT_FIELD = frozenset({"label_logprobs", "echo", "sequence_logprobs"})
LimitName = Literal["max_tokens", "max_completion_tokens"]
# Both names of the limit on a completion's tokens, and the smallest value that gets an answer.
# Models that accept only the newer name generate reasoning tokens first, and need more tokens.
MIN_TOKENS: Mapping[LimitName, int] = {"max_tokens": 1, "max_completion_tokens": 16}
TOP_LOGPROBS = 20
# Fields that continue the last message of the request instead of starting a new turn.
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}

ONE_WORD = [{"role": "user", "content": "Say one word."}]
LETTERS = [{"role": "user", "content": "Write random letters, and nothing else."}]
UNFINISHED_TEXT = "one two three four"
UNFINISHED_TURN = [*ONE_WORD, {"role": "assistant", "content": UNFINISHED_TEXT}]
TOOL = {
    "type": "function",
    "function": {"name": "note", "parameters": {"type": "object", "properties": {}}},
}
TOOL_CHOICE = {"type": "function", "function": {"name": "note"}}
SCHEMA = {
    "type": "object",
    "properties": {"x": {"const": 1}},
    "required": ["x"],
    "additionalProperties": False,
}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
# Enough tokens for the texts of two seeds to differ, and for a tool call.
SEED_TOKENS = 8
TOOL_TOKENS = 48
# Two tokens that every usual vocabulary has, with different texts. A bias of 100 makes each of
# them the answer.
FIRST_BIAS = {"40": 100}
SECOND_BIAS = {"50": 100}
GREEDY = {"messages": ONE_WORD, "temperature": 0}
SAMPLED = {"messages": LETTERS, "temperature": 1.0, "max_tokens": SEED_TOKENS}

PROBES: Mapping[str, dict[str, Any]] = {
    "completion": {"prompt": "one"},
    "logprobs": {"messages": ONE_WORD, "logprobs": True, "top_logprobs": TOP_LOGPROBS},
    "n": {"messages": ONE_WORD, "n": 2},
    "tools": {
        "messages": ONE_WORD,
        "tools": [TOOL],
        "tool_choice": TOOL_CHOICE,
        "max_tokens": TOOL_TOKENS,
    },
    "structured": {
        "messages": ONE_WORD,
        "response_format": JSON_FORMAT,
        "max_tokens": TOOL_TOKENS,
    },
    "seed": {**SAMPLED, "seed": 1},
    "seed again": {**SAMPLED, "seed": 1},
    "seed other": {**SAMPLED, "seed": 2},
    "plain": GREEDY,
    "logit_bias": {**GREEDY, "logit_bias": FIRST_BIAS},
    "logit_bias again": {**GREEDY, "logit_bias": FIRST_BIAS},
    "logit_bias other": {**GREEDY, "logit_bias": SECOND_BIAS},
    "new turn": {"messages": UNFINISHED_TURN},
    "continue": {"messages": UNFINISHED_TURN, **CONTINUE},
    "echo": {"prompt": UNFINISHED_TEXT, "echo": True, "logprobs": 0},
    "sequence_logprobs": {"messages": UNFINISHED_TURN, **CONTINUE, "prompt_logprobs": 0},
}
# The probes whose answers show a feature; by default the one of the same name.
PROBES_OF: Mapping[str, tuple[str, ...]] = {
    # Labels are read from top_logprobs.
    "label_logprobs": ("logprobs",),
    "seed": ("seed", "seed again", "seed other"),
    "logit_bias": ("plain", "logit_bias", "logit_bias again", "logit_bias other"),
    "continue": ("new turn", "continue"),
}


class _Refused:
    """The result of a probe that the upstream refused."""


class _Verdict(Enum):
    SUPPORTED = "supported"
    ACCEPTED = "accepted"
    IGNORED = "ignored"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Features:
    """The features of one model of one upstream.

    Attributes:
        supported: an answer shows the effect.
        ignored: an answer shows that there is no effect; or the upstream refuses text completions
            or `n`.
        accepted: an answer shows neither.
        refused: the upstream itself refuses requests for it.
        unknown: it was not looked for, or there was no answer.
        limit_name: the field that limits the completion tokens.
    """

    supported: frozenset[str]
    ignored: frozenset[str] = frozenset()
    accepted: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    limit_name: LimitName = "max_tokens"

    def updated(self, result: Features) -> Features:
        """Return these features with the result of another probe."""
        looked_for = result.supported | result.ignored | result.accepted | result.refused
        looked_for |= result.unknown
        is_newer_name = "max_completion_tokens" in {self.limit_name, result.limit_name}
        return Features(
            supported=(self.supported - looked_for) | result.supported,
            ignored=(self.ignored - looked_for) | result.ignored,
            accepted=(self.accepted - looked_for) | result.accepted,
            refused=(self.refused - looked_for) | result.refused,
            unknown=(self.unknown - looked_for) | result.unknown,
            limit_name="max_completion_tokens" if is_newer_name else "max_tokens",
        )


NOTHING_KNOWN = Features(supported=frozenset(), unknown=frozenset(FEATURES))


async def probe(
    client: Client,
    host: Host,
    model: str,
    seconds: float,
    features: Collection[str] = FEATURES,
) -> Features:
    """Send the probes of some features at once.

    A feature without an answer within `seconds` stays unknown. The result is about these features
    only.
    """
    prober = _Prober(client, host, model)
    names: dict[str, None] = {}
    for feature in features:
        names |= dict.fromkeys(PROBES_OF.get(feature, (feature,)))
    tasks = {name: asyncio.create_task(prober.send(PROBES[name])) for name in names}
    try:
        await asyncio.wait(tasks.values(), timeout=seconds)
        answers = {name: task.result() for name, task in tasks.items() if task.done()}
    finally:
        for task in tasks.values():
            task.cancel()
    return _features(answers, features, prober.limit_name)


class _Prober:
    """Sends probes to one model of one host, and learns the name of its token limit."""

    def __init__(self, client: Client, host: Host, model: str) -> None:
        self.limit_name: LimitName = "max_tokens"
        self._client = client
        self._host = host
        self._model = model

    async def send(self, body: dict[str, Any]) -> Any:
        """Return the answer, `_Refused` if the upstream refuses the probe, or None if it fails."""
        try:
            return await self._post(body, "max_tokens")
        except UpstreamFailed as error:
            if not refuses_max_tokens(error):
                return _failed_probe(error)
        except AlignError:
            return None
        try:
            answer = await self._post(body, "max_completion_tokens")
        except UpstreamFailed as error:
            return _failed_probe(error)
        except AlignError:
            return None
        self.limit_name = "max_completion_tokens"
        return answer

    async def _post(self, body: dict[str, Any], limit_name: LimitName) -> Any:
        path = "/completions" if "prompt" in body else "/chat/completions"
        tokens = max(body.get("max_tokens", 1), MIN_TOKENS[limit_name])
        fields = {key: value for key, value in body.items() if key != "max_tokens"}
        limited = {"model": self._model, **fields, limit_name: tokens}
        return await self._client.call_host(self._host, path, limited)


def _failed_probe(error: UpstreamFailed) -> type[_Refused] | None:
    return _Refused if error.refused or error.status == 501 else None


def refuses_max_tokens(error: UpstreamFailed) -> bool:
    """Return True if the upstream wants the limit on tokens under its newer name."""
    return error.refused and (
        error.param == "max_tokens" or "max_completion_tokens" in error.message
    )


# --- verdicts ---


def _features(
    answers: Mapping[str, Any], features: Collection[str], limit_name: LimitName
) -> Features:
    """Return which of the features the answers to their probes show."""
    names: dict[_Verdict, set[str]] = {verdict: set() for verdict in _Verdict}
    for feature in features:
        names[_feature_verdict(feature, answers)].add(feature)
    return Features(
        supported=frozenset(names[_Verdict.SUPPORTED]),
        ignored=frozenset(names[_Verdict.IGNORED]),
        accepted=frozenset(names[_Verdict.ACCEPTED]),
        refused=frozenset(names[_Verdict.REFUSED]),
        unknown=frozenset(names[_Verdict.UNKNOWN]),
        limit_name=limit_name,
    )


def _feature_verdict(feature: str, answers: Mapping[str, Any]) -> _Verdict:
    if feature not in WITHOUT_FIELD:
        return _verdict(feature, answers)
    verdict = _verdict("logprobs" if feature == "label_logprobs" else feature, answers)
    # There is no field that a request could contain in vain.
    return _Verdict.REFUSED if verdict is _Verdict.IGNORED else verdict


def _verdict(feature: str, answers: Mapping[str, Any]) -> _Verdict:
    answer = answers.get(feature)
    if answer is None:
        return _Verdict.UNKNOWN
    if answer is _Refused:
        return _Verdict.IGNORED if feature in {"completion", "n"} else _Verdict.REFUSED
    has_effect = _EFFECTS[feature](answers)
    if has_effect is None:
        return _Verdict.UNKNOWN
    if has_effect:
        return _Verdict.SUPPORTED
    return _Verdict.ACCEPTED if feature in EFFECT_MAY_BE_HIDDEN else _Verdict.IGNORED


def _seed_has_effect(answers: Mapping[str, Any]) -> bool | None:
    """Return True if equal seeds gave equal texts and different seeds different ones."""
    texts = _three_messages("seed", answers)
    if texts is None:
        return None
    first, again, other = texts
    return first == again != other


def _bias_has_effect(answers: Mapping[str, Any]) -> bool | None:
    """Return True if equal biases gave equal texts, and another bias, or none, a different one."""
    texts = _three_messages("logit_bias", answers)
    if texts is None:
        return None
    first, again, other = texts
    differs = first != other
    plain = answers.get("plain")
    if _is_answer(plain):
        differs = differs or first != _message_json(plain)
    return first == again and differs


def _three_messages(feature: str, answers: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return the messages of a feature's three probes, or None if one has no answer."""
    first = answers.get(feature)
    again = answers.get(f"{feature} again")
    other = answers.get(f"{feature} other")
    if not _is_answer(again) or not _is_answer(other):
        return None
    return _message_json(first), _message_json(again), _message_json(other)


def _is_answer(answer: Any) -> bool:
    return bool(answer) and answer is not _Refused


def _choices(answer: Any) -> list[Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return choices if isinstance(choices, list) and choices and isinstance(choices[0], dict) else []


def _message(answer: Any) -> dict[str, Any]:
    choices = _choices(answer)
    message = choices[0].get("message") if choices else None
    return message if isinstance(message, dict) else {}


def _message_json(answer: Any) -> str:
    """Return all fields of a message as text, its reasoning included."""
    fields = {}
    for key, value in _message(answer).items():
        if key != "role" and value:
            fields[key] = value
    return json.dumps(fields, default=str)


def _follows_schema(answers: Mapping[str, Any]) -> bool:
    try:
        content = json.loads(_message(answers["structured"]).get("content") or "")
    except (ValueError, TypeError, RecursionError):
        return False
    return bool(content == {"x": 1})


def _continues_turn(answers: Mapping[str, Any]) -> bool:
    """Return True if the fields that continue a turn made the prompt shorter.

    An upstream that ignores them starts a new turn and reads at least as many tokens.
    """
    new_turn_tokens = prompt_tokens(answers.get("new turn"))
    continued_tokens = prompt_tokens(answers.get("continue"))
    if new_turn_tokens is None or continued_tokens is None:
        return False
    return continued_tokens < new_turn_tokens


def prompt_tokens(answer: Any) -> int | None:
    """Return the prompt tokens that an answer reports, or None."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) else None


def top_logprobs(answer: Any) -> dict[str, float]:
    """Return {token: logprob} of the first token of a chat answer, or {} if there are none."""
    try:
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {str(entry["token"]): float(entry["logprob"]) for entry in entries}
    except (KeyError, IndexError, TypeError, ValueError):
        return {}


def _lists_turn(answers: Mapping[str, Any]) -> bool:
    """Return True if the prompt that the answer lists ends with the turn that was continued."""
    tokens = rendered_tokens(answers["sequence_logprobs"])
    return text_logprobs(tokens, UNFINISHED_TEXT) is not None


# For each probed feature, a function that says whether the answers show its effect; None if an
# answer that it needs is missing.
_EFFECTS: Mapping[str, Callable[[Mapping[str, Any]], bool | None]] = {
    "completion": lambda answers: bool(_choices(answers["completion"])),
    "logprobs": lambda answers: bool(top_logprobs(answers["logprobs"])),
    "n": lambda answers: len(_choices(answers["n"])) == 2,
    "tools": lambda answers: bool(_message(answers["tools"]).get("tool_calls")),
    "structured": _follows_schema,
    "seed": _seed_has_effect,
    "logit_bias": _bias_has_effect,
    "continue": _continues_turn,
    "echo": lambda answers: len(echoed_tokens(answers["echo"])) > 1,
    "sequence_logprobs": _lists_turn,
}
