"""Turn a Request into a Plan: draws, scorers and the worst case, known before anything is spent."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from infer_align.config import Limits
from infer_align.config.align import Align
from infer_align.decoding.params import limit_field
from infer_align.engines import Engine
from infer_align.errors import InvalidRequest, Unsupported, quote
from infer_align.flow.batches import BatchSizes, CandidateBatch, enlarge, plan_sizes, split
from infer_align.flow.cost import ContextCost, context_cost, read_by_rewards, sampled_by_judges
from infer_align.flow.limits import Generation, check_candidates, check_first_batch, check_tokens
from infer_align.flow.request import (
    Request,
    conversation,
    count_prompts,
    split_begun_answer,
    whole_number,
)
from infer_align.flow.rules import Highest, check_selection
from infer_align.flow.scorers import Scorer, resolve_scorers
from infer_align.flow.seeds import SEED_RANGE, seed_draws
from infer_align.flow.stand_in import stand_in, stand_in_note
from infer_align.methods import (
    Composition,
    Method,
    ObserverFactory,
    PlanDraft,
    Sections,
    SelectionRule,
    Stage,
    StopRule,
)
from infer_align.objectives import Ensemble
from infer_align.rewards import Reward
from infer_align.types import Body, Direction, Draw, Kind, Messages

# Fields of the body that the planner reads. The engine gets them as fields of the draw.
_PLANNED_FIELDS = {"n", "seed", "stream", "stream_options"}
# Stages that make sense for candidates that already exist.
_NO_ALIGN = Align()
SCORING_STAGES = (Stage.CONDITION, Stage.SCORE, Stage.SELECT)


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one request and its maximum cost.

    The methods wrote into the draft of the plan (`PlanDraft`); the planner resolved the scorers,
    seeded the draws and counted the cost.
    """

    # Written by CONDITION, PROPOSE, STEER and OBSERVE; seeded by the planner. With a stop rule, all
    # candidates that may be drawn.
    draws: tuple[Draw, ...]

    # Copied from the request.
    request: Request = field(default_factory=lambda: Request({}))
    messages: Messages = ()  # the client's messages before any method: what rewards read
    # the beginning of the answer, which the client wrote and every candidate continues
    begun_answer: str = ""
    ensemble: Ensemble = field(default_factory=Ensemble)
    methods: tuple[str, ...] = ()  # their names, in the order of their stages
    n_returned: int = 1  # OpenAI's n: the number of candidates to return
    seed: int = 0  # of the request; lotteries draw with it
    deadline_seconds: float | None = None

    # Written by CONDITION.
    direction: Direction | None = None  # unit; rewards with several attributes score along it

    # Written by PROPOSE.
    selects: bool = False  # True if candidates are compared; otherwise they stream
    note: str = ""  # a limitation that the response's reason mentions
    stop_rule: StopRule | None = None  # None: all candidates are drawn at once

    # Written by OBSERVE.
    observers: tuple[ObserverFactory, ...] = ()

    # Resolved by the planner from the request's rewards and from what SCORE wrote.
    scorers: tuple[Scorer, ...] = ()

    # Written by SELECT.
    composition: Composition | None = None  # None: scores are summed as they are
    rule: SelectionRule = field(default_factory=Highest)

    # Counted by the planner.
    batch_sizes: BatchSizes = ()  # per batch and draw; (): one batch of everything
    worst_case_tokens: int = 0  # all that is counted: sampled, and read in contexts and by rewards
    scoring_tokens: int = 0  # the part of the worst case that judges may sample
    reading_tokens: int = 0  # the part that rewards may have engines read
    # The part that the contexts of guidance may read.
    context_cost: ContextCost = field(default_factory=ContextCost)

    @property
    def candidates(self) -> int:
        """Return the number of candidates that the plan samples at most."""
        return sum(draw.n for draw in self.draws)

    @property
    def drawing_tokens(self) -> int:
        """Return the part of the worst case that is sampled for candidates."""
        further = self.scoring_tokens + self.reading_tokens + self.context_cost.worst_case
        return self.worst_case_tokens - further

    @property
    def batches(self) -> tuple[CandidateBatch, ...]:
        """Return the batches in which the candidates are drawn."""
        return split(self.draws, self.batch_sizes)


def make_plan(
    request: Request,
    engine: Engine,
    rewards: Mapping[str, Reward],
    default_rewards: Mapping[str, float],
    limits: Limits,
    sections: Sections | None = None,
) -> Plan:
    """Plan a request, and refuse it if it cannot be served.

    Args:
        request: from `parse_request`.
        engine: the engine that will sample.
        rewards: the configured rewards, by name.
        default_rewards: {reward name: weight} for a request that names none.
        limits: the bounds of `[limits]`.
        sections: the configuration sections that methods read.

    Raises:
        InvalidRequest: the engine lacks a capability, a reward is not configured, or the worst case
            is over a limit.
    """
    n_returned = _parse_integer(request.body, "n", 1, limits.max_candidates) or 1
    seed, is_requested = _seed(request.body)
    draft = _start_draft(request, seed, rewards, engine, sections)
    draft = _apply_methods(draft, request.align.methods, engine)
    if n_returned > 1 and not draft.selects:
        draws = tuple(replace(draw, n=n_returned) for draw in draft.draws)
        draft = replace(draft, draws=draws)
    # The numbers of candidates are checked before a large one makes as many seeds.
    rule = draft.stop_rule
    check_first_batch(draft.candidates, rule, request.align)
    candidates = draft.candidates if rule is None else rule.max_candidates
    check_candidates(candidates, n_returned, request.align, limits)
    for draw in draft.draws:
        engine.check(draw)
    draws, sizes = _seeded(draft, n_returned, seed, requested=is_requested)
    draft = replace(draft, draws=draws)
    plan = _complete(draft, request, rewards, default_rewards, engine, n_returned, sizes)
    _check_tokens((plan,), limits)
    return plan


def make_scoring_plan(
    messages: object,
    n: int,
    align: Align,
    engine: Engine,
    rewards: Mapping[str, Reward],
    default_rewards: Mapping[str, float],
    sections: Sections | None = None,
) -> Plan:
    """Plan the scoring of n existing answers to a conversation.

    Only the methods that condition, score or select take part. Nothing will be sampled for
    candidates, so the cost is `scoring_tokens`, and what rewards read in the answers
    (`infer_align.flow.cost.read_in_texts`).

    Raises:
        InvalidRequest: as `make_plan`.
    """
    # The engine checks the conversation as for a request that it would answer with one token.
    request = Request({"messages": messages, "max_tokens": 1}, align=align, aligned=True)
    draft = _start_draft(request, 0, rewards, engine, sections)
    scoring: dict[str, Method] = {}
    for name, method in align.methods.items():
        if method.stage in SCORING_STAGES:
            scoring[name] = method
    draft = _apply_methods(draft, scoring, engine)
    draws = tuple(replace(draw, n=n) for draw in draft.draws)
    for draw in draws:
        engine.check(draw)
    draft = replace(draft, draws=draws, selects=True)
    return _complete(draft, request, rewards, default_rewards, engine)


def check_prompt_count(prompts: int, limits: Limits) -> None:
    """Check the number of prompts of one request; each has at least one candidate.

    Raises:
        InvalidRequest: there are more than the server allows candidates.
    """
    if prompts > limits.max_candidates:
        raise InvalidRequest(
            f"prompt: {prompts} prompts are over this server's limit of {limits.max_candidates} "
            "candidates; send fewer prompts in one request.",
            param="prompt",
            code="too_many_candidates",
        )


def check_together(plans: Sequence[Plan], limits: Limits) -> None:
    """Check the plans of all prompts of one request against the limits of one request.

    Raises:
        InvalidRequest: together they are over a limit.
    """
    align = plans[0].request.align
    candidates = sum(plan.candidates for plan in plans)
    check_candidates(candidates, 1, align, limits)
    _check_tokens(plans, limits)


def worst_case(body: Body, engine: Engine, limits: Limits) -> int:
    """Return the most tokens that a request can generate which the engine answers by itself.

    Raises:
        InvalidRequest: the request is over a limit.
    """
    n = _parse_integer(body, "n", 1, limits.max_candidates) or 1
    candidates = n * count_prompts(body.get("prompt"))
    tokens = candidates * engine.worst_case_tokens(body)
    check_candidates(candidates, 1, _NO_ALIGN, limits)
    kind: Kind = "chat" if body.get("prompt") is None else "completion"
    check_tokens(Generation(tokens), candidates, _NO_ALIGN, limits, limit_field(body, kind))
    return tokens


def _start_draft(
    request: Request,
    seed: int,
    rewards: Mapping[str, Reward],
    engine: Engine,
    sections: Sections | None,
) -> PlanDraft:
    """Return the draft that the first method gets: one draw of the whole body."""
    body = {key: value for key, value in request.body.items() if key not in _PLANNED_FIELDS}
    attributes: dict[str, None] = {}
    for reward in rewards.values():
        attributes |= dict.fromkeys(reward.attributes)
    return PlanDraft(
        draws=(Draw(body, kind=request.kind),),
        messages=conversation(body, request.kind, engine.text_of_tokens),
        seed=seed,
        attributes=tuple(attributes),
        has_system_role=engine.has_system_role,
        sections=Sections() if sections is None else sections,
        path=request.align.path,
    )


def _apply_methods(draft: PlanDraft, methods: Mapping[str, Method], engine: Engine) -> PlanDraft:
    """Apply the methods in the order of their stages.

    Raises:
        Unsupported: the engine lacks a capability that a method needs, or its model sees no system
            message and a method wrote into it.
        Undiscovered: the engine does not know yet if it has one.
    """
    for name, method in sorted(methods.items(), key=lambda item: item[1].stage):
        draft = method.apply(draft)
        hides_system = engine.reads_chats and not engine.has_system_role
        if draft.system_setting is not None and hides_system:
            param = draft.param(name)
            raise Unsupported(
                f"{param}: writes into the system message, which the chat template of "
                f"{engine.describe(draft.draws[0].body.get('model'))} does not show to the model; "
                f"set {draft.system_setting}.",
                param=param,
            )
        missing = sorted(engine.missing(method.needs, draft.draws[0].body.get("model")))
        if missing:
            param = draft.param(name)
            hint = engine.capability_hints.get(missing[0], "use another engine")
            lacking = engine.describe(draft.draws[0].body.get("model"))
            raise Unsupported(
                f"{param}: needs {', '.join(missing)}, which {lacking} lacks; {hint}.",
                param=param,
            )
    return draft


def _seeded(
    draft: PlanDraft, n_returned: int, seed: int, *, requested: bool
) -> tuple[tuple[Draw, ...], BatchSizes]:
    """Return the seeded draws of the worst case, and the sizes of the batches.

    A candidate has the seed that it has where `best_of_n` draws the largest number at once.
    """
    rule = draft.stop_rule
    if rule is None:
        return seed_draws(draft.draws, seed, requested=requested), ()
    sizes = plan_sizes(draft.draws, rule, n_returned)
    ranges = [draw.n * rule.max_candidates for draw in draft.draws]
    draws = enlarge(draft.draws, sizes)
    return seed_draws(draws, seed, requested=requested, ranges=ranges), sizes


def _complete(
    draft: PlanDraft,
    request: Request,
    rewards: Mapping[str, Reward],
    default_rewards: Mapping[str, float],
    engine: Engine,
    n_returned: int = 1,
    batch_sizes: BatchSizes = (),
) -> Plan:
    """Resolve the scorers and return the plan with its cost."""
    messages, begun_answer = split_begun_answer(request.body, draft.messages)
    scored = draft
    if messages is not draft.messages:
        scored = replace(draft, messages=messages)
    align = request.align
    scorers = resolve_scorers(
        scored,
        request.reward_weights(selects=draft.selects),
        rewards,
        default_rewards,
        align.reward_parameters,
        partial(stand_in, scored, engine),
    )
    rule = draft.rule or Highest()
    check_selection(draft, rule, scorers, rewards)
    methods = align.methods
    plan = Plan(
        draws=draft.draws,
        request=request,
        messages=messages,
        begun_answer=begun_answer,
        scorers=scorers,
        ensemble=align.ensemble,
        direction=draft.direction,
        observers=draft.observers,
        composition=draft.composition,
        rule=rule,
        seed=draft.seed,
        methods=tuple(sorted(methods, key=lambda name: methods[name].stage)),
        n_returned=n_returned,
        batch_sizes=batch_sizes,
        # Several candidates with scorers are ranked even if no method asks for a selection.
        selects=draft.selects or (bool(scorers) and draft.candidates > 1),
        note="; ".join(note for note in (draft.note, stand_in_note(scorers)) if note),
        stop_rule=draft.stop_rule,
        deadline_seconds=align.budget.deadline_seconds,
    )
    return _count_cost(plan, engine)


def _count_cost(plan: Plan, engine: Engine) -> Plan:
    """Return the plan with the most tokens that it can cost."""
    drawing = sum(draw.n * engine.worst_case_tokens(draw.body) for draw in plan.draws)
    contexts = context_cost(plan.draws, engine)
    scoring = sampled_by_judges(plan)
    reading = read_by_rewards(plan, engine)
    return replace(
        plan,
        worst_case_tokens=drawing + contexts.worst_case + scoring + reading,
        scoring_tokens=scoring,
        reading_tokens=reading,
        context_cost=contexts,
    )


def _check_tokens(plans: Sequence[Plan], limits: Limits) -> None:
    """Check the worst case of the plans of one request in tokens."""
    request = plans[0].request
    tokens = sum((_generation(plan) for plan in plans), Generation())
    candidates = sum(plan.candidates for plan in plans)
    field_name = limit_field(request.body, request.kind)
    check_tokens(tokens, candidates, request.align, limits, field_name)


def _generation(plan: Plan) -> Generation:
    """Return the part of the worst case that bounds on generated tokens count."""
    return Generation(plan.drawing_tokens, plan.context_cost.worst_case, plan.scoring_tokens)


def _seed(body: Body) -> tuple[int, bool]:
    """Return the seed of a request, and True if the client chose it."""
    requested = _parse_integer(body, "seed", -SEED_RANGE, SEED_RANGE - 1)
    if requested is None:
        return secrets.randbelow(SEED_RANGE), False
    return requested % SEED_RANGE, True


def _parse_integer(body: Body, name: str, low: int, high: int) -> int | None:
    value = whole_number(body.get(name))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(
            f"{name}: {quote(value)} is not allowed; must be an integer from {low} to {high}.",
            param=name,
        )
    return value
