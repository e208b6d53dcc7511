"""Choices that were read before, so that a profile with many of them is not read again each time.

This is sound because rows of choices are added and never changed, and because their numbers grow
within a profile: who adds a choice holds the row of the profile meanwhile. A profile that was
deleted and made again has another time of creation.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from infer_align.profiles.records import StoredChoice

# Choices that are kept over all profiles.
MAX_CHOICES = 20_000


@dataclass(frozen=True, slots=True)
class CachedChoices:
    """The choices of a profile up to one of them."""

    created_at: float  # of the profile
    number: int = 0  # of the last choice; 0: none was read
    choices: tuple[StoredChoice, ...] = ()  # the latest ones, oldest first
    total: int = 0

    def extended(
        self, number: int, choices: tuple[StoredChoice, ...], total: int, limit: int
    ) -> CachedChoices:
        """Return these choices with later ones; the latest `limit` of them are kept."""
        latest = (*self.choices, *choices)[-limit:]
        return CachedChoices(self.created_at, number, latest, total)


class ProfileCache:
    """The choices of the profiles that were used last."""

    def __init__(self) -> None:
        """Begin empty."""
        self._profiles: OrderedDict[tuple[str, str], CachedChoices] = OrderedDict()
        self._choices = 0

    def get(self, owner: str, profile_id: str, created_at: float) -> CachedChoices:
        """Return the cached choices of a profile; none if it is another one of the same name."""
        cached = self._profiles.get((owner, profile_id))
        if cached is None or cached.created_at != created_at:
            return CachedChoices(created_at)
        return cached

    def put(self, owner: str, profile_id: str, cached: CachedChoices) -> None:
        """Keep the choices of a profile, and forget those that were not used for long."""
        earlier = self._profiles.pop((owner, profile_id), None)
        if earlier is not None:
            if earlier.created_at == cached.created_at and earlier.number > cached.number:
                # Another reader was further.
                cached = earlier
            self._choices -= len(earlier.choices)
        self._profiles[owner, profile_id] = cached
        self._choices += len(cached.choices)
        while self._choices > MAX_CHOICES:
            _, dropped = self._profiles.popitem(last=False)
            self._choices -= len(dropped.choices)
