"""Resolve the rewards that a request names into the scorers of its plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from infer_align.config.schema import join, parse
from infer_align.errors import InvalidRequest, Unsupported, nearest
from infer_align.methods import PlanDraft
from infer_align.rewards import Reward
from infer_align.types import Direction


@dataclass(frozen=True, slots=True)
class Scorer:
    """One term of the weighted sum that ranks the candidates."""

    reward_name: str
    reward: Reward  # with the parameters of this request
    weight: float  # 0 shows the score in the response without counting it
    attribute: str | None = None  # one attribute of a reward that has several
    # True if it chooses because no reward is configured that could.
    stands_in: bool = False

    @property
    def name(self) -> str:
        """Return the name in the request and the response, such as "quality.verbosity"."""
        if self.attribute is None:
            return self.reward_name
        return f"{self.reward_name}.{self.attribute}"


def reward_names(rewards: Mapping[str, Reward]) -> list[str]:
    """Return the names that a request may give a weight.

    A reward with one objective has its own name; one with several is "name.attribute".
    """
    single = [name for name, reward in rewards.items() if not reward.attributes]
    several = []
    for name, reward in rewards.items():
        several += [f"{name}.{attribute}" for attribute in reward.attributes]
    return single + several


def rewards_along(direction: Direction, rewards: Mapping[str, Reward]) -> dict[str, float]:
    """Return weight 1 for each reward that scores every attribute of a direction.

    Rewards that score only if a request names them are left out.
    """
    along = {}
    for name, reward in rewards.items():
        if not reward.attributes or reward.named_only:
            continue
        if _unscored_attribute(direction, reward) is None:
            along[name] = 1.0
    return along


def resolve_scorers(
    draft: PlanDraft,
    weights: Mapping[str, float] | None,
    rewards: Mapping[str, Reward],
    default_weights: Mapping[str, float],
    parameters: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    stand_in: Callable[[], Scorer] | None = None,
) -> tuple[Scorer, ...]:
    """Return the scorers of a plan, each reward looked up and made once.

    Rewards take part if the request names them, if a method adds them, or by default if a method
    draws several candidates to choose from. Where the configuration has no default, `stand_in`
    chooses.

    Args:
        draft: the draft after all methods.
        weights: {name: weight} of the request, or None.
        rewards: the configured rewards.
        default_weights: {name: weight} for a request that names none.
        parameters: {name: parameters} that the request sets.
        stand_in: makes the scorer of a request that names no rewards, if there is no default.

    Raises:
        InvalidRequest: a reward is unknown, does not score the plan's direction or refuses its
            parameters, or there is nothing to choose by.
    """
    is_named = weights is not None
    if weights is None:
        weights = _default_weights(draft, rewards, default_weights) if draft.selects else {}
    # The attributes of a reward may depend on the parameters of the request.
    rewards = {**rewards, **_with_request(draft, rewards, parameters)}
    merged = {**weights, **_added_weights(draft, weights, rewards)}
    for name in merged:
        _check_name(name, draft, rewards)
    checked: set[str] = set()
    scorers = []
    for name, weight in merged.items():
        reward_name, _, attribute = name.partition(".")
        if reward_name not in checked:
            _check_reward(reward_name, draft, rewards[reward_name])
            checked.add(reward_name)
        scorers.append(Scorer(reward_name, rewards[reward_name], weight, attribute or None))
    needs_scores = draft.rule is None or draft.rule.needs_scores or draft.stop_rule is not None
    if draft.selects and needs_scores and not any(merged.values()):
        if is_named or stand_in is None:
            raise _nothing_to_choose_by(draft, rewards)
        scorers.append(stand_in())
    return tuple(scorers)


def _nothing_to_choose_by(draft: PlanDraft, rewards: Mapping[str, Reward]) -> InvalidRequest:
    param = draft.param("rewards")
    return InvalidRequest(
        f"{param}: nothing to choose by; give a reward a weight over 0, or leave {param} out to "
        f"choose by the default. {nearest('', rewards)}",
        param=param,
    )


def _with_request(
    draft: PlanDraft,
    rewards: Mapping[str, Reward],
    parameters: Mapping[str, Mapping[str, Any]],
) -> dict[str, Reward]:
    """Return the configured rewards that this request sets parameters of, with them."""
    changed: dict[str, Reward] = {}
    for scorer_name, chosen in parameters.items():
        name = scorer_name.partition(".")[0]
        if name in rewards:
            reward = changed.get(name, rewards[name])
            param = draft.param("rewards", scorer_name)
            changed[name] = _with_parameters(name, reward, chosen, param)
    for scorer in draft.scorers:
        name = scorer.reward.partition(".")[0]
        if name in rewards and scorer.parameters:
            changed[name] = changed.get(name, rewards[name]).with_parameters(scorer.parameters)
    return changed


def _added_weights(
    draft: PlanDraft, weights: Mapping[str, float], rewards: Mapping[str, Reward]
) -> dict[str, float]:
    """Return the weights of the rewards that methods add.

    The attributes of a reward that cannot be scored along the direction share its weight equally,
    unless the request weighs them itself.
    """
    added: dict[str, float] = {}
    for scorer in draft.scorers:
        name = scorer.reward
        reward = rewards.get(name)
        if reward is None or not reward.attributes or _is_scored_along(draft.direction, reward):
            added[name] = scorer.weight
            continue
        attributes = [f"{name}.{attribute}" for attribute in reward.attributes]
        if not any(attribute in weights for attribute in attributes):
            added |= dict.fromkeys(attributes, scorer.weight / len(attributes))
    return added


def _check_reward(name: str, draft: PlanDraft, reward: Reward) -> None:
    """Refuse a reward that cannot score this request."""
    added = {scorer.reward.partition(".")[0] for scorer in draft.scorers}
    param = draft.param(name) if name in added else draft.param("rewards", name)
    reward.check(param)
    reward.check_conversation(param, draft.messages)


def _with_parameters(name: str, reward: Reward, chosen: Mapping[str, Any], param: str) -> Reward:
    """Return the reward with parameters from `align.rewards`.

    Raises:
        Unsupported: the reward takes none.
        InvalidRequest: one is unknown or wrong.
    """
    if reward.parameters is None:
        first = f"{param}.{next(iter(chosen))}"
        raise Unsupported(
            f"{first}: the reward {name!r} takes no parameters of a request; give it a weight "
            f"alone, or set the fields of [rewards.{name}].",
            param=first,
        )
    parsed: Any = parse(reward.parameters, chosen, param)
    try:
        return reward.with_parameters({key: getattr(parsed, key) for key in chosen})
    except InvalidRequest as error:
        where = join(param, error.param) if error.param else param
        raise InvalidRequest(f"{param}.{error.message}", param=where) from None


def _default_weights(
    draft: PlanDraft, rewards: Mapping[str, Reward], default_weights: Mapping[str, float]
) -> Mapping[str, float]:
    """Prefer the rewards that score every attribute of the plan's direction, if there is one."""
    along = rewards_along(draft.direction, rewards) if draft.direction else {}
    return along or default_weights


def _check_name(name: str, draft: PlanDraft, rewards: Mapping[str, Reward]) -> None:
    names = reward_names(rewards)
    if name in names:
        return
    if name not in rewards and any(scorer.reward == name for scorer in draft.scorers):
        raise Unsupported(
            f"{draft.param(name)}: this server has no reward {name!r}; configure [rewards.{name}].",
            param=draft.param(name),
        )
    param = draft.param("rewards", name)
    reward_name, _, attribute = name.partition(".")
    if attribute or reward_name not in rewards:
        raise InvalidRequest(f"{param}: no such reward; {nearest(name, names)}", param=param)
    reward = rewards[reward_name]
    own_names = [f"{reward_name}.{attribute}" for attribute in reward.attributes]
    if draft.direction is None:
        raise InvalidRequest(
            f"{param}: {reward_name!r} has several objectives; give a weight to one of "
            f"{', '.join(own_names)}, or set {draft.param('dpa', 'direction')}.",
            param=param,
        )
    unscored = _unscored_attribute(draft.direction, reward)
    if unscored is not None:
        raise InvalidRequest(
            f"{param}: does not score {unscored!r} of {draft.param('dpa', 'direction')}; it scores "
            f"{', '.join(reward.attributes)}.",
            param=param,
        )


def _is_scored_along(direction: Direction | None, reward: Reward) -> bool:
    """Return True if there is a direction, and the reward scores all its attributes."""
    return direction is not None and _unscored_attribute(direction, reward) is None


def _unscored_attribute(direction: Direction | None, reward: Reward) -> str | None:
    """Return an attribute of the direction that the reward does not score, if any."""
    for name, weight in (direction or {}).items():
        if weight and name not in reward.attributes:
            return name
    return None
