"""The scales of guidance that a user's choices speak for.

Sampling from a model that is guided by a trait is, token by token, sampling from the frozen model
times (density ratio of the trait) ** scale. So a scale is to the drawing of answers what a weight
is to their selection. It is learnt from the same choices: `[profiles] traits` names the reward that
measures a trait, such as its density ratio. If a user prefers answers in which the measure is one
spread higher, guidance asks for more of the trait by `trait_step`.

A measure that is also a reward of the request is learnt once, and then moves both its weight and
the scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from infer_align.errors import ConfigError, nearest
from infer_align.flow.applied_profile import LearnedScale
from infer_align.flow.scorers import reward_names
from infer_align.methods import Sections
from infer_align.methods.guidance import MAX_SCALE, PromptGuidance, TraitSections
from infer_align.methods.profile import ProfileSettings
from infer_align.profiles.weights import Learned
from infer_align.rewards import Reward


def check_traits(sections: Sections, rewards: Mapping[str, Reward]) -> None:
    """Check that `[profiles] traits` names traits and rewards that can measure them.

    Raises:
        ConfigError: a trait or a reward is not configured, or scores of the reward depend on the
            other candidates, or it generates text.
    """
    traits = sections.get(TraitSections).entries
    names = reward_names(rewards)
    for trait, measure in sections.get(ProfileSettings).traits.items():
        if trait not in traits:
            raise ConfigError(
                f"[profiles] traits.{trait}: no such trait is configured; {nearest(trait, traits)}"
            )
        if measure not in names:
            raise ConfigError(
                f"[profiles] traits.{trait}: {measure!r} is not the name of a reward; "
                f"{nearest(measure, names)}"
            )
        reward = rewards[measure.partition(".")[0]]
        if reward.relative or reward.worst_case_tokens(2):
            raise ConfigError(
                f"[profiles] traits.{trait}: {measure!r} cannot measure a trait: it generates "
                "text, or its scores depend on the other candidates; name another reward."
            )


def learnt_traits(guidance: object, measures: Mapping[str, str]) -> dict[str, float]:
    """Return {trait: scale to start from} of the traits whose scale a profile may change.

    Args:
        guidance: the request's guidance, if it has one.
        measures: {trait: reward} of `[profiles] traits`. A trait that the request brings itself has
            other prompts than the configured one, so its measure is not known.
    """
    if not isinstance(guidance, PromptGuidance):
        return {}
    scales: dict[str, float] = {}
    for trait, scale in guidance.scale.items():
        if trait in measures and trait not in guidance.traits:
            scales[trait] = scale
    return scales


def learned_scales(
    start: Mapping[str, float],
    settings: ProfileSettings,
    features: Sequence[str],
    learned: Learned,
) -> dict[str, LearnedScale]:
    """Return the scale of each trait after the choices.

    Args:
        start: {trait: scale} before them.
        settings: name the measures, the step and the bound.
        features: of the T terms.
        learned: what the choices say about the terms.
    """
    reach = settings.trait_step * settings.bound
    deviations = np.sqrt(np.clip(np.diag(learned.covariance), 0.0, None))
    scales: dict[str, LearnedScale] = {}
    for trait, scale in start.items():
        t = features.index(settings.traits[trait])
        low = max(scale - reach, -MAX_SCALE)
        high = min(scale + reach, MAX_SCALE)
        is_unknown = math.isnan(learned.deviations[t])
        scales[trait] = LearnedScale(
            scale=min(max(scale + settings.trait_step * float(learned.changes[t]), low), high),
            uncertainty=None if is_unknown else settings.trait_step * float(deviations[t]),
            bounds=(low, high),
        )
    return scales
