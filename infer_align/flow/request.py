"""From an OpenAI body with an `align` object to a Request, and from a Request to a Plan. Nothing is spent here."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from infer_align.config import registry
from infer_align.config.schema import parse
from infer_align.engines import Engine
from infer_align.errors import InvalidRequest, Unsupported, nearest, shown
from infer_align.objectives import Ensemble
from infer_align.rewards import Reward
from infer_align.types import Body, Budget, Draw, Kind, Messages, Method, Plan, Request

Details = Literal["none", "scores", "candidates"]
SETTINGS = ("preset", "rewards", "ensemble", "budget", "details")
SEED_RANGE = 2**63
MASK_64 = 2**64 - 1
MAX_WEIGHT = (
    1e9  # above it a weighted sum could overflow, and an infinite objective compares nothing
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How large one request may be; from `[limits]`."""

    max_candidates: int
    max_completion_tokens: int


def parse_request(
    body: Body, kind: Kind, presets: Mapping[str, Mapping[str, Any]], preset: str | None = None
) -> Request:
    """Split a body into what the engine gets and what `align` asks for.

    Args:
        body: the client's JSON object.
        kind: which route it came by.
        presets: named `align` objects of the configuration.
        preset: chosen by the model's name; `align.preset` wins over it.

    Raises:
        InvalidRequest: the first wrong field, by its dotted path.
    """
    check_prompt(body, kind)
    given = body.get("align")
    forwarded = {key: value for key, value in body.items() if key != "align" and value is not None}
    if given is None and preset is None:
        return Request(forwarded, kind)
    return replace(
        parse_align({} if given is None else given, presets, preset),
        body=forwarded,
        kind=kind,
        aligned=True,
    )


def parse_align(
    given: object, presets: Mapping[str, Mapping[str, Any]], preset: str | None = None
) -> Request:
    """What an `align` object asks for, as a request without a body.

    Raises:
        InvalidRequest: the first wrong field, by its dotted path.
    """
    if not isinstance(given, Mapping):
        raise InvalidRequest(
            f"align: {shown(given)} is not an object; allowed keys: {', '.join(_keys())}.",
            param="align",
        )
    settings = _with_preset(dict(given), presets, preset)
    methods = {}
    for key, value in settings.items():
        if key not in _keys():
            raise InvalidRequest(
                f"align.{key}: no such key; {nearest(key, _keys())}",
                param=f"align.{key}",
                code="unknown_field",
            )
        if key in registry.methods.names():
            methods[key] = parse(registry.methods.get(key), value, f"align.{key}")
    return Request(
        body={},
        methods=methods,
        rewards=_weights(settings["rewards"]) if "rewards" in settings else None,
        objective=parse(Ensemble, settings.get("ensemble", {}), "align.ensemble"),
        budget=parse(Budget, settings.get("budget", {}), "align.budget"),
        details=_details(settings.get("details", "scores")),
    )


def make_plan(
    request: Request,
    engine: Engine,
    rewards: Mapping[str, Reward],
    default_rewards: Mapping[str, float],
    limits: Limits,
    settings: Mapping[str, object] = MappingProxyType({}),
) -> Plan:
    """What the request asks for, as draws, rewards and an objective, with its worst case counted.

    Args:
        request: from `parse_request`.
        engine: what will be sampled.
        rewards: what there is, by name.
        default_rewards: weights for a request that names none.
        limits: how large it may be.
        settings: sections of the configuration that methods read, by the method's name.

    Raises:
        InvalidRequest: the engine lacks a capability, a reward is not configured, or the worst case is over a limit.
    """
    keep = _integer(request.body, "n", 1, limits.max_candidates) or 1
    seed = _integer(request.body, "seed", -SEED_RANGE, SEED_RANGE - 1)
    body = {
        key: value
        for key, value in request.body.items()
        if key not in {"n", "seed", "stream", "stream_options"}
    }
    objective = request.objective or Ensemble()
    plan = Plan(
        draws=(Draw(body, kind=request.kind),),
        objective=objective,
        messages=_read_by_rewards(body, request.kind),
        seed=secrets.randbelow(SEED_RANGE) if seed is None else seed % SEED_RANGE,
        settings=settings,
        attributes=tuple(
            dict.fromkeys(name for reward in rewards.values() for name in reward.attributes)
        ),
        keep=keep,
        deadline_seconds=request.budget.deadline_seconds,
    )
    for name, method in sorted(request.methods.items(), key=lambda item: item[1].stage):
        plan = replace(method.plan(plan), methods=(*plan.methods, name))
        _require(engine, method, name)
    if keep > 1 and not plan.selects:
        plan = replace(plan, draws=tuple(replace(draw, n=keep) for draw in plan.draws))
    _few_enough(plan, request, limits)  # before anything is made per candidate
    for draw in plan.draws:
        engine.check(draw)
    weights = _reward_weights(plan, request, rewards, default_rewards)
    plan = replace(
        plan,
        draws=_seeded(plan.draws, plan.seed, given=seed is not None),
        rewards=weights,
        selects=plan.selects or (bool(weights) and plan.candidates > 1),
    )
    plan = _costed(plan, engine, rewards)
    _affordable(plan, request, limits)
    return plan


def _read_by_rewards(body: Body, kind: Kind) -> Messages:
    """The conversation that rewards and judges read; a text completion's prompt is a user's turn."""
    if kind == "chat":
        messages: Messages = body.get("messages", ())
        return messages
    prompt = body.get("prompt")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else []


def worst_case(body: Body, engine: Engine, limits: Limits) -> int:
    """The most tokens that a request without `align` can generate, where the engine answers it by itself.

    Raises:
        InvalidRequest: over a limit.
    """
    n = _integer(body, "n", 1, limits.max_candidates) or 1
    prompts = body.get("prompt")
    count = (
        len(prompts)
        if isinstance(prompts, list) and any(isinstance(prompt, str | list) for prompt in prompts)
        else 1
    )
    draw = Draw(body, n * count)
    plan = Plan((draw,), Ensemble(), worst_case_tokens=draw.n * engine.worst_case_tokens(body))
    request = Request(body)
    _few_enough(plan, request, limits)
    _affordable(plan, request, limits)
    return plan.worst_case_tokens


def check_prompt(body: Body, kind: Kind) -> None:
    """What every engine relies on; the rest of a message is the engine's and its chat template's to judge."""
    if kind == "completion":
        if not isinstance(prompt := body.get("prompt"), str):
            raise InvalidRequest(
                f"prompt: {shown(prompt)} is not allowed; must be a string.", param="prompt"
            )
        return
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(
            f"messages: {shown(messages)} is not allowed; must be a list of at least one message.",
            param="messages",
        )
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(
                f"{where}: {shown(message)} is not allowed; must be an object with a role.",
                param=where,
            )
        content = message.get("content")
        optional = message["role"] == "assistant"  # it may hold tool calls alone
        if not isinstance(content, str | list) and not (optional and content is None):
            raise InvalidRequest(
                f"{where}.content: {shown(content)} is not allowed; must be text or a list of parts.",
                param=f"{where}.content",
            )
        for j, part in enumerate(content if isinstance(content, list) else ()):
            _check_part(part, f"{where}.content[{j}]")


def _check_part(part: object, where: str) -> None:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise InvalidRequest(
            f"{where}: {shown(part)} is not allowed; must be an object with a type.", param=where
        )
    if part["type"] == "text" and not isinstance(text := part.get("text"), str):
        raise InvalidRequest(
            f"{where}.text: {shown(text)} is not allowed; must be a string.", param=f"{where}.text"
        )


def _keys() -> list[str]:
    return sorted({*registry.methods.names(), *SETTINGS})


def _with_preset(
    given: dict[str, Any], presets: Mapping[str, Mapping[str, Any]], preset: str | None
) -> dict[str, Any]:
    name = given.pop("preset", None)
    name = preset if name is None else name
    if name is None:
        base: Mapping[str, Any] = {}
    elif isinstance(name, str) and name in presets:
        base = presets[name]
    else:
        raise InvalidRequest(
            f"align.preset: {shown(name)} is not configured; {nearest(str(name), presets)}",
            param="align.preset",
        )
    return {key: value for key, value in {**base, **given}.items() if value is not None}


def _weights(value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(
            f"align.rewards: {shown(value)} is not an object; allowed: {{reward name: weight}}.",
            param="align.rewards",
        )
    for name, weight in value.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight <= MAX_WEIGHT:
            raise InvalidRequest(
                f"align.rewards.{name}: {shown(weight)} is not allowed; a weight is a number from 0 to {MAX_WEIGHT:.0e}. "
                "To prefer less of something, weigh a reward that scores its absence.",
                param=f"align.rewards.{name}",
            )
    return {str(name): float(weight) for name, weight in value.items()}


def _details(value: object) -> Details:
    if value not in get_args(Details):
        raise InvalidRequest(
            f"align.details: {shown(value)} is not allowed; allowed: {', '.join(get_args(Details))}.",
            param="align.details",
        )
    return value  # type: ignore[return-value]


def _integer(body: Body, name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(
            f"{name}: {shown(value)} is not allowed; must be an integer from {low} to {high}.",
            param=name,
        )
    return value


def _require(engine: Engine, method: Method, name: str) -> None:
    if missing := sorted(method.needs - engine.capabilities):
        advice = engine.capability_hints.get(missing[0], "use another engine")
        raise Unsupported(
            f"align.{name}: needs {', '.join(missing)}, which the engine of {engine.model!r} lacks; {advice}.",
            param=f"align.{name}",
        )


def reward_names(rewards: Mapping[str, Reward]) -> list[str]:
    """What a request may weigh: a reward of one objective by its name, one of several as "name.attribute"."""
    names = [name for name, reward in rewards.items() if not reward.attributes]
    return names + [
        f"{name}.{attribute}" for name, reward in rewards.items() for attribute in reward.attributes
    ]


def _reward_weights(
    plan: Plan, request: Request, rewards: Mapping[str, Reward], default: Mapping[str, float]
) -> Mapping[str, float]:
    """Rewards are read when they are asked for by name, or when a method draws several candidates to choose from."""
    if request.rewards is None and plan.direction:
        default = {
            name: 1.0
            for name, reward in rewards.items()
            if reward.attributes and _lacking(plan, reward) is None
        } or default
    given = request.rewards if request.rewards is not None else default if plan.selects else {}
    weights = {**given, **plan.rewards}
    for name in weights:
        _check_reward(name, plan, rewards)
    for name, reward in plan_rewards(replace(plan, rewards=weights), rewards).items():
        reward.check(f"align.{name}" if name in plan.parameters else f"align.rewards.{name}")
    if plan.selects and not any(weights.values()):
        raise InvalidRequest(
            "align.rewards: nothing to choose by; give a reward a weight over 0, or configure [rewards] and "
            f"[server] default_rewards. {nearest('', rewards)}",
            param="align.rewards",
        )
    return weights


def _check_reward(name: str, plan: Plan, rewards: Mapping[str, Reward]) -> None:
    base, _, attribute = name.partition(".")
    where, known = f"align.rewards.{name}", reward_names(rewards)
    if name in plan.parameters and name not in rewards:
        raise Unsupported(
            f"align.{name}: there is no such reward here to ask.", param=f"align.{name}"
        )
    if name in known:
        return
    if attribute or base not in rewards:
        raise InvalidRequest(f"{where}: no such reward; {nearest(name, known)}", param=where)
    if plan.direction is None:
        raise InvalidRequest(
            f"{where}: no such reward; has several objectives: {nearest('', known)} Or give align.dpa a direction through them.",
            param=where,
        )
    if (lacking := _lacking(plan, rewards[base])) is not None:
        raise InvalidRequest(
            f"{where}: does not score {lacking!r} of align.dpa.direction; it scores {', '.join(rewards[base].attributes)}.",
            param=where,
        )


def _lacking(plan: Plan, reward: Reward) -> str | None:
    """An attribute of the plan's direction that the reward does not score."""
    return next(
        (
            name
            for name, weight in (plan.direction or {}).items()
            if weight and name not in reward.attributes
        ),
        None,
    )


def plan_rewards(plan: Plan, rewards: Mapping[str, Reward]) -> dict[str, Reward]:
    """The rewards that a plan reads, each once, as the plan asks them."""
    names = dict.fromkeys(name.partition(".")[0] for name in plan.rewards)
    return {
        name: rewards[name].with_parameters(plan.parameters[name])
        if name in plan.parameters
        else rewards[name]
        for name in names
    }


def _costed(plan: Plan, engine: Engine, rewards: Mapping[str, Reward]) -> Plan:
    """The plan with what it can cost at most."""
    scoring = sum(
        reward.worst_case_tokens(plan.candidates) for reward in plan_rewards(plan, rewards).values()
    )
    drawing = sum(draw.n * engine.worst_case_tokens(draw.body) for draw in plan.draws)
    return replace(plan, worst_case_tokens=drawing + scoring, scoring_tokens=scoring)


def _few_enough(plan: Plan, request: Request, limits: Limits) -> None:
    if plan.keep > plan.candidates:
        raise InvalidRequest(
            f"n: {plan.keep} answers of {plan.candidates} candidates; ask for fewer, or draw more.",
            param="n",
        )
    if plan.candidates > limits.max_candidates:
        raise InvalidRequest(
            f"{_fan_out(request)}: {plan.candidates} candidates are over this server's limit of {limits.max_candidates}; "
            "ask for fewer.",
            param=_fan_out(request),
            code="too_many_candidates",
        )


def _affordable(plan: Plan, request: Request, limits: Limits) -> None:
    worst = plan.worst_case_tokens
    each = (
        f"{plan.candidates} candidates x {(worst - plan.scoring_tokens) // plan.candidates} tokens"
    )
    each += f" + {plan.scoring_tokens} of judging" if plan.scoring_tokens else ""
    if (allowed := request.budget.completion_tokens) and worst > allowed:
        raise InvalidRequest(
            f"align.budget.completion_tokens: the worst case is {worst} tokens ({each}), over the budget of {allowed}; "
            "lower max_completion_tokens or the number of candidates, or raise the budget.",
            param="align.budget.completion_tokens",
            code="over_budget",
        )
    if worst > limits.max_completion_tokens:
        raise InvalidRequest(
            f"max_completion_tokens: the worst case is {worst} tokens ({each}), over this server's limit of "
            f"{limits.max_completion_tokens}; lower max_completion_tokens or the number of candidates.",
            param="max_completion_tokens",
            code="over_limit",
        )


def _fan_out(request: Request) -> str:
    return next(
        (f"align.{name}" for name in ("best_of_n.n", "rps.k") if name[:-2] in request.methods), "n"
    )


def _seeded(draws: tuple[Draw, ...], seed: int, *, given: bool) -> tuple[Draw, ...]:
    """The first candidate has the request's own seed, so that it is what the request gives without a selection.

    The others' are mixed from it: requests with neighbouring seeds share no candidates.
    """
    seeded, start = [], 0
    for draw in draws:
        seeds = tuple(_candidate_seed(seed, start + i) for i in range(draw.n))
        seeded.append(replace(draw, seeds=seeds, seed_requested=given))
        start += draw.n
    return tuple(seeded)


def _candidate_seed(seed: int, index: int) -> int:
    if index == 0:
        return seed
    z = (
        seed * 0xD1342543DE82EF95 + index * 0x9E3779B97F4A7C15
    ) & MASK_64  # splitmix64's finish over both
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK_64
    return (z ^ z >> 31) % SEED_RANGE
