"""Apply a profile to a request: learn the weights that its choices speak for.

This happens before the plan is made. The result is an ordinary request with other weights of
rewards, another `align.dpa.direction` and other scales of guidance, so that every other method
works with a profile as it works without one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import monotonic

import numpy as np

from infer_align.config.align import Align
from infer_align.config.schema import join
from infer_align.errors import InvalidRequest, nearest
from infer_align.flow.applied_profile import AppliedProfile, LearnedScale
from infer_align.flow.choice_scores import ChoiceScores
from infer_align.flow.personalised import (
    Term,
    Terms,
    changed_request,
    personalised,
    unit_or_same,
)
from infer_align.flow.profile_inputs import check_conversations, with_stored
from infer_align.flow.request import Request, conversation
from infer_align.flow.scorers import reward_names, rewards_along
from infer_align.flow.trait_scales import check_traits, learned_scales, learnt_traits
from infer_align.methods import Sections
from infer_align.methods.dpa import DPA, Prompting, unit
from infer_align.methods.profile import (
    Choice,
    Profile,
    ProfileSettings,
    examples_in_prompt,
)
from infer_align.profiles.records import StoredChoice, StoredProfile
from infer_align.profiles.weights import Learned, learn, spreads_of
from infer_align.rewards import Reward
from infer_align.types import Array, Messages


class Personaliser:
    """Applies profiles to requests."""

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        default_rewards: Mapping[str, float],
        sections: Sections,
        scores: ChoiceScores,
    ) -> None:
        """Prepare to apply profiles.

        Args:
            rewards: the configured rewards, by name.
            default_rewards: {reward name: weight} for a request that names none.
            sections: the configuration sections that methods read.
            scores: scores the answers of choices.

        Raises:
            ConfigError: `[profiles] traits` names what is not configured.
        """
        check_traits(sections, rewards)
        self._rewards = rewards
        self._default_rewards = default_rewards
        self._sections = sections
        self._scores = scores
        self.settings = sections.get(ProfileSettings)

    async def apply(self, request: Request, stored: StoredProfile | None = None) -> Request:
        """Return the request with what its profile says; without a profile, as it is.

        Args:
            request: from `parse_request`.
            stored: the profile that the request names by its id.

        Raises:
            InvalidRequest: a weight names nothing that the request uses, a conversation of a choice
                is no conversation, or stored choices have no texts to put into the prompt.
        """
        profile = request.align.methods.get("profile")
        if not isinstance(profile, Profile):
            return request
        path = join(request.align.path, "profile")
        if stored is not None:
            stored = replace(stored, weights=self.known_weights(stored.weights))
            profile = with_stored(profile, stored, path)
        check_conversations(profile.choices, path)
        terms = self.terms(request.align, profile.weights, path)
        if profile.adapt == "in_context":
            return self._in_context(request, profile, terms)
        brought = await self._differences(request, profile.choices, terms.learnt, path)
        failed = _failures(brought, terms.learnt)
        brought = _without_failed_rewards(brought)
        earlier = self.stored_rows(stored.choices if stored else (), terms.learnt)
        learned = self.learn(np.concatenate([earlier, brought]), terms.learnt)
        total = len(earlier) + len(brought)
        scales = self.scales(terms, learned)
        return personalised(request, profile, terms, learned, scales, total, self.settings, failed)

    def terms(
        self,
        align: Align,
        weights: Mapping[str, float],
        path: str,
        traits: Mapping[str, float] | None = None,
    ) -> Terms:
        """Return what a profile weighs in a request with this `align`.

        Args:
            align: of the request.
            weights: the profile's own weights, where learning starts.
            path: where the profile stands in the request, for error messages.
            traits: {trait: scale} to learn; by default those of the request's guidance.

        Raises:
            InvalidRequest: a weight names neither a reward nor an attribute of the direction.
        """
        direction = self._direction(align)
        names = reward_names(self._rewards)
        rewards: dict[str, float] = {}
        for name, weight in weights.items():
            if name in names:
                rewards[name] = weight
            elif direction is not None and name in direction:
                direction[name] = weight
            else:
                allowed = [*names, *(direction or ())]
                param = f"{path}.weights.{name}"
                raise InvalidRequest(
                    f"{param}: no such reward, nor an attribute of align.dpa.direction; "
                    f"{nearest(name, allowed)}",
                    param=param,
                )
        base = {**self._base_weights(align, rewards, direction), **rewards}
        learnt = [
            Term(name, name, weight)
            for name, weight in base.items()
            if self._is_learnt(name, weight, align, rewards)
        ]
        learnt += self._attribute_terms(base, direction)
        if traits is None:
            traits = learnt_traits(align.methods.get("guidance"), self.settings.traits)
        features = [term.feature for term in learnt]
        for measure in dict.fromkeys(self.settings.traits[trait] for trait in traits):
            if measure not in features:
                learnt.append(Term(measure, measure, 0.0, is_measure=True))
        return Terms(base, direction, traits, tuple(learnt))

    def default_weights(self) -> Mapping[str, float]:
        """Return the weights of a request that names no rewards and no direction."""
        return self.settings.rewards or self._default_rewards

    def known_weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Return the weights of rewards that are configured; a stored one may be gone."""
        names = reward_names(self._rewards)
        return {name: weight for name, weight in weights.items() if name in names}

    def feedback_features(self) -> list[str]:
        """Return the scores that stored choices are kept by.

        They are those of the default weights, the measures of traits, and without `[profiles]
        rewards` also each attribute of each reward, so that a direction can be learnt.
        """
        names = list(self.default_weights())
        if not self.settings.rewards:
            names += [name for name in reward_names(self._rewards) if "." in name]
        names += self.settings.traits.values()
        features = dict.fromkeys(name for name in names if self._is_learnt(name, 1.0, Align(), {}))
        return list(features)

    def _base_weights(
        self,
        align: Align,
        rewards: Mapping[str, float],
        direction: Mapping[str, float] | None,
    ) -> Mapping[str, float]:
        """Return the weights of a request before its profile."""
        if align.rewards is not None:
            return align.rewards
        if rewards:
            return {}
        along = rewards_along(direction, self._rewards) if direction else {}
        return along or self.default_weights()

    def _is_learnt(
        self, name: str, weight: float, align: Align, rewards: Mapping[str, float]
    ) -> bool:
        """Return True for a weight that choices may change.

        A request's weight of 0 only shows a score. A judge that generates text is not asked about
        earlier choices, nor is a reward whose scores depend on the other candidates. The attributes
        of a whole reward are weighed by the direction.
        """
        if name not in reward_names(self._rewards):
            return False
        if weight == 0 and align.rewards is not None and name not in rewards:
            return False
        reward = self._rewards[name.partition(".")[0]]
        return not reward.relative and not reward.worst_case_tokens(2)

    def _direction(self, align: Align) -> dict[str, float] | None:
        """Return the complete direction of dpa; None without one that can be used."""
        dpa = align.methods.get("dpa")
        if not isinstance(dpa, DPA):
            return None
        try:
            return self._sections.get(Prompting).complete(unit(dpa.direction))
        except ValueError:
            # The planner refuses it, and says why.
            return None

    def _attribute_terms(
        self, weights: Mapping[str, float], direction: Mapping[str, float] | None
    ) -> list[Term]:
        """Return the attributes of the direction, each with the reward that scores it."""
        if not direction:
            return []
        along = list(rewards_along(direction, self._rewards))
        named = [name for name in along if name in weights]
        scorer = next(iter([*named, *along]), None)
        if scorer is None:
            return []
        terms: list[Term] = []
        for attribute, weight in direction.items():
            if attribute in self._rewards[scorer].attributes:
                feature = f"{scorer}.{attribute}"
                terms.append(Term(attribute, feature, weight, is_attribute=True))
        return terms

    async def _differences(
        self, request: Request, choices: Sequence[Choice], terms: Sequence[Term], path: str
    ) -> Array:
        """Return chosen minus rejected of each choice: [C, T]; NaN where a reward failed."""
        rows = np.full((len(choices), len(terms)), np.nan)
        if not terms or not choices:
            return rows
        features = [term.feature for term in terms]
        seconds = request.align.budget.deadline_seconds
        deadline = None if seconds is None else monotonic() + seconds
        pending = []
        for i, choice in enumerate(choices):
            if choice.messages is None:
                messages = conversation(request.body, request.kind, _refuse_tokens)
            else:
                messages = choice.messages
            self.check_conversation(features, messages, f"{path}.choices.{i}.messages")
            texts = (choice.chosen, choice.rejected)
            work = self._scores.score(features, messages, texts, request.align.ensemble, deadline)
            pending.append(work)
        for i, scores in enumerate(await asyncio.gather(*pending)):
            rows[i] = scores[0] - scores[1]
        return rows

    def check_conversation(self, features: Sequence[str], messages: Messages, param: str) -> None:
        """Refuse a conversation that a reward cannot read.

        Raises:
            InvalidRequest: naming `param`.
        """
        for name in dict.fromkeys(feature.partition(".")[0] for feature in features):
            self._rewards[name].check_conversation(param, messages)

    def stored_rows(self, choices: Sequence[StoredChoice], terms: Sequence[Term]) -> Array:
        """Return the differences of stored choices: [C, T].

        A reward that was not configured when the choice was made does not tell its answers apart.
        """
        rows = np.zeros((len(choices), len(terms)))
        for i, choice in enumerate(choices):
            for t, term in enumerate(terms):
                rows[i, t] = choice.differences.get(term.feature, 0.0)
        return rows

    def learn(
        self, rows: Array, terms: Sequence[Term], spread_rows: Array | None = None
    ) -> Learned:
        """Learn the weights of the terms.

        Args:
            rows: [C, T] chosen minus rejected.
            terms: the T terms.
            spread_rows: [D, T] further differences that say how much answers differ.
        """
        configured = [self.settings.spreads.get(term.feature) for term in terms]
        every = rows if spread_rows is None else np.concatenate([rows, spread_rows])
        prior = np.array([term.prior for term in terms], dtype=np.float64)
        return learn(
            rows,
            prior,
            spreads_of(every, configured, prior),
            deviation=self.settings.deviation,
            bound=self.settings.bound,
            keeps_sign=np.array([not term.is_attribute for term in terms], dtype=bool),
        )

    def _in_context(self, request: Request, profile: Profile, terms: Terms) -> Request:
        """Return the request with the profile's choices for the prompt, and its own weights."""
        used = examples_in_prompt(profile.choices, self.settings.max_characters)
        weights = {term.name: term.prior for term in terms.learnt if not term.is_measure}
        applied = AppliedProfile(
            id=profile.id,
            adapt=profile.adapt,
            choices=used,
            left_out=len(profile.choices) - used,
            weights=weights,
            uncertainty={},
            bounds={},
        )
        direction = unit_or_same(terms.direction or {})
        return changed_request(request, profile, terms.weights, direction, applied)

    def scales(self, terms: Terms, learned: Learned) -> dict[str, LearnedScale]:
        """Return the scales of the traits of these terms."""
        features = [term.feature for term in terms.learnt]
        return learned_scales(terms.traits, self.settings, features, learned)


def _refuse_tokens(_: Sequence[int]) -> str:
    raise InvalidRequest(
        "prompt: choices are compared by the text of the prompt; send the prompt as text, or give "
        "each choice its own messages.",
        param="prompt",
    )


def _failures(rows: Array, terms: Sequence[Term]) -> dict[str, int]:
    """Return {feature: number of choices that it could not score}, without those of 0."""
    counts = np.isnan(rows).sum(axis=0).tolist()
    return {term.feature: count for term, count in zip(terms, counts, strict=True) if count}


def _without_failed_rewards(rows: Array) -> Array:
    """Return the rows, with 0 for a reward that could score no choice at all.

    It teaches nothing, but the other rewards still do.
    """
    failed = np.isnan(rows).all(axis=0)
    if failed.all():
        return rows
    return np.where(failed, 0.0, rows)
