"""A profile: a user's preferences, learnt from choices between answers.

With `adapt` "weights" the choices become weights of rewards before anything is drawn; see
`infer_align.flow.personal`. With "in_context" they stand in the prompt, as examples of preferred
and dispreferred answers. A description of the user stands in the prompt either way.

Source of the examples' form: Singh et al., "FSPO: Few-Shot Preference Optimization of Synthetic
Preference Data Elicits Effective Personalization to Real Users" (2502.19312).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Len
from pydantic import Field

from infer_align.added_text import with_instruction
from infer_align.errors import InvalidRequest
from infer_align.messages import transcript
from infer_align.methods import PlanDraft, Stage
from infer_align.types import Body, Capability, Draw

MAX_CHOICES = 256
MAX_WEIGHT = 1e9
# Characters that an id may have: no id can be mistaken for a path or a query.
ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.:@-]{0,127}$"
ProfileId = Annotated[str, Field(pattern=ID_PATTERN)]
Weight = Annotated[float, Ge(-MAX_WEIGHT), Le(MAX_WEIGHT)]
Spread = Annotated[float, Gt(0), Le(MAX_WEIGHT)]
Description = Annotated[str, Len(max_length=4000)]
NO_ANSWER = "(no answer)"


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice: this answer is better than that one."""

    chosen: str = field(metadata={"description": "The better answer."})
    rejected: str = field(metadata={"description": "The other answer."})
    messages: tuple[dict[str, Any], ...] | None = field(
        default=None,
        metadata={
            "description": "The conversation that both answer to. Default: that of this request."
        },
    )


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """`[profiles]`: how profiles learn, and where they are kept."""

    store: str | None = field(
        default=None,
        metadata={
            "description": "URL of the database that keeps profiles, such as "
            '"sqlite:///profiles.db". Default: profiles are not kept, and requests bring '
            "their choices themselves."
        },
    )
    store_env: str | None = field(
        default=None,
        metadata={
            "description": "Environment variable that holds the URL instead, if it contains a "
            "password."
        },
    )
    store_text: bool = field(
        default=False,
        metadata={
            "description": "Keep the texts of choices. Without it only differences of scores and "
            'hashes are kept, and `adapt = "in_context"` needs choices in the request.'
        },
    )
    rewards: dict[str, Weight] = field(
        default_factory=dict,
        metadata={
            "description": "{reward: weight}: what profiles weigh if a request names no rewards, "
            "and what feedback is scored by. A weight of 0 is allowed: choices then move it. "
            "Default: `[server] default_rewards`."
        },
    )
    spreads: dict[str, Spread] = field(
        default_factory=dict,
        metadata={
            "description": "{reward: number}: the usual standard deviation of a reward between "
            "answers to one prompt. Default: that of the choices, which is rough for a few."
        },
    )
    traits: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "description": "{trait: reward}: the reward that measures a trait, such as its density "
            "ratio. Choices then also change the scale of the trait in `align.guidance`."
        },
    )
    trait_step: float = field(
        default=0.5,
        metadata={
            "gt": 0,
            "le": 10,
            "description": "How much a scale grows for a user who prefers, with weight 1, answers "
            "whose measure is one spread higher. A scale changes by at most `bound` steps.",
        },
    )
    deviation: float = field(
        default=1.0,
        metadata={
            "gt": 0,
            "le": 100,
            "description": "How far users differ from the weights that a profile starts from, in "
            "units of those weights. A larger number learns faster, and gives a single "
            "choice more influence.",
        },
    )
    bound: float = field(
        default=3.0,
        metadata={
            "gt": 0,
            "le": 100,
            "description": "The largest weight that a profile gives, in the same units.",
        },
    )
    max_angle: float = field(
        default=45.0,
        metadata={
            "ge": 0,
            "le": 180,
            "description": "How far a profile turns `align.dpa.direction`, in degrees.",
        },
    )
    max_characters: int = field(
        default=8000,
        metadata={
            "ge": 0,
            "description": 'Characters of choices that `adapt = "in_context"` puts into a prompt. '
            "Older choices are left out first.",
        },
    )

    section_name: ClassVar[str] = "profiles"

    def __post_init__(self) -> None:
        """Check the places that the URL may stand in.

        Raises:
            ValueError: there are two URLs, or one with a password in the file.
        """
        if self.store is not None and self.store_env is not None:
            raise ValueError("one of store and store_env, not both")
        if self.store is not None and "://" not in self.store:
            raise ValueError('a URL in store, such as "sqlite:///profiles.db"')
        if self.store is not None and "@" in self.store:
            raise ValueError(
                "a URL without a user and a password in store; put the URL into an environment "
                "variable, and its name into store_env"
            )


@dataclass(frozen=True, slots=True)
class Profile:
    """Answer as one user prefers, learnt from earlier choices of this user."""

    id: ProfileId | None = field(
        default=None,
        metadata={"description": "A stored profile. It belongs to the API key that made it."},
    )
    choices: Annotated[tuple[Choice, ...], Len(max_length=MAX_CHOICES)] = field(
        default=(),
        metadata={"description": "Choices of this user, oldest first; with an id, further ones."},
    )
    weights: dict[str, Weight] = field(
        default_factory=dict,
        metadata={
            "description": "{reward or attribute: weight}: the weights that learning starts from; "
            "without choices, they are used as they are."
        },
    )
    description: Description = field(
        default="",
        metadata={"description": "A sentence about the user. It is put into the prompt."},
    )
    adapt: Literal["weights", "in_context"] = field(
        default="weights",
        metadata={
            "description": '"weights": choices change the weights of rewards, '
            "`align.dpa.direction` and the scales of `align.guidance`; "
            '"in_context": they are put into the prompt as examples.'
        },
    )

    stage: ClassVar[Stage] = Stage.CONDITION
    needs: ClassVar[frozenset[Capability]] = frozenset()
    section: ClassVar[type] = ProfileSettings

    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Put the description, and the choices if they are examples, into every prompt.

        Raises:
            InvalidRequest: the prompt is no text.
        """
        settings = draft.sections.get(ProfileSettings)
        text = prompt_text(self, settings.max_characters)
        if not text:
            return draft
        draws: list[Draw] = []
        for draw in draft.draws:
            draws.append(replace(draw, body=_with_text(draw, text, draft)))
        return replace(draft, draws=tuple(draws))


plugin = Profile


def prompt_text(profile: Profile, max_characters: int) -> str:
    """Return what the prompt says about the user; "" for nothing.

    Args:
        profile: the profile, with its choices.
        max_characters: of all examples. The latest choices that fit are used.
    """
    parts: list[str] = []
    if profile.description.strip():
        parts.append(f"About the user: {profile.description.strip()}")
    if profile.adapt == "in_context":
        examples = _examples(profile.choices, max_characters)
        if examples:
            parts.append("Answer as this user prefers. These are earlier choices of the user.")
            parts += examples
    return "\n\n".join(parts)


def examples_in_prompt(choices: Sequence[Choice], max_characters: int) -> int:
    """Return the number of choices that fit into the prompt."""
    return len(_examples(choices, max_characters))


def _examples(choices: Sequence[Choice], max_characters: int) -> list[str]:
    """Return the latest choices that fit, oldest first."""
    latest: list[Choice] = []
    characters = 0
    for choice in reversed(choices):
        characters += len(_example(choice, len(choices)))
        if characters > max_characters:
            break
        latest.append(choice)
    latest.reverse()
    return [_example(choice, i + 1) for i, choice in enumerate(latest)]


def _example(choice: Choice, number: int) -> str:
    lines = [f"# Example {number}"]
    if choice.messages:
        lines += ["## Question", transcript(choice.messages)]
    lines += ["## Preferred answer", choice.chosen.strip() or NO_ANSWER]
    lines += ["## Dispreferred answer", choice.rejected.strip() or NO_ANSWER]
    return "\n".join(lines)


def _with_text(draw: Draw, text: str, draft: PlanDraft) -> Body:
    """Return the body with a text about the user in its prompt."""
    if draw.kind == "completion":
        prompt = draw.body.get("prompt")
        if not isinstance(prompt, str):
            param = draft.param("profile")
            raise InvalidRequest(
                f"{param}: a prompt of token ids cannot carry a text about the user; send the "
                "prompt as text.",
                param=param,
            )
        return {**draw.body, "prompt": f"{text}\n\n{prompt}"}
    messages = draw.body.get("messages", ())
    changed = with_instruction(messages, text, has_system_role=draft.has_system_role)
    return {**draw.body, "messages": changed}


def turned(
    direction: Mapping[str, float], weights: Mapping[str, float], max_angle: float
) -> dict[str, float]:
    """Return the direction of the weights, at most `max_angle` degrees from a given direction.

    Args:
        direction: {attribute: weight}, of length 1, or of length 0 if any direction is as good.
        weights: {attribute: weight}, any length; without length, the direction stays.
        max_angle: degrees.
    """
    names = list(direction)
    start = [direction[name] for name in names]
    if not any(start):
        max_angle = 180.0
    goal = [weights[name] for name in names]
    length = math.hypot(*goal)
    if not length:
        return dict(direction)
    goal = [value / length for value in goal]
    cosine = max(-1.0, min(1.0, sum(a * b for a, b in zip(start, goal, strict=True))))
    limit = math.radians(max_angle)
    if math.acos(cosine) <= limit:
        return dict(zip(names, goal, strict=True))
    # The part of the goal that is at a right angle to the start.
    side = [b - cosine * a for a, b in zip(start, goal, strict=True)]
    across = math.hypot(*side)
    if across < 1e-12:
        # The goal is the opposite: no way of turning is nearer than another.
        return dict(direction)
    turned_direction: dict[str, float] = {}
    for name, a, b in zip(names, start, side, strict=True):
        turned_direction[name] = math.cos(limit) * a + math.sin(limit) * b / across
    return turned_direction
