"""The records that stored profiles consist of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from infer_align.methods.profile import Choice


@dataclass(frozen=True, slots=True)
class StoredChoice:
    """One choice as the store keeps it."""

    # Score of the chosen minus that of the rejected answer, by the name of the reward, such as
    # "brief" or "quality.verbosity". A reward that could not score is absent.
    differences: Mapping[str, float]
    chosen_hash: str
    rejected_hash: str
    messages_hash: str
    text: Choice | None = None  # None: texts are not kept
    request_id: str | None = None
    created_at: float = 0.0  # seconds of Unix time


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """A profile as the store keeps it."""

    id: str
    description: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)  # where learning starts
    choices: tuple[StoredChoice, ...] = ()  # the latest ones, oldest first
    total: int = 0  # of choices, the older ones included
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Addition:
    """A profile after choices were added to it."""

    profile: StoredProfile
    added: int  # number of choices that were not stored before
    choices: tuple[StoredChoice, ...]  # those that were sent, as they are stored
