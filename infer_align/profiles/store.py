"""Keep profiles in a database: SQLite or PostgreSQL, by SQLAlchemy's URL.

A choice is one row, which is added and never changed. So clients that write at the same time lose
nothing, every replica reads what the others wrote, and a process that dies in the middle of a write
leaves either the whole choice or none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sqlalchemy import Connection, RowMapping, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from infer_align.methods.profile import Choice
from infer_align.profiles.cache import CachedChoices, ProfileCache
from infer_align.profiles.database import SqliteDatabase, open_database
from infer_align.profiles.records import Addition, StoredChoice, StoredProfile
from infer_align.profiles.schema import CHOICES, PROFILES

# The latest choices of a profile that are read. Older ones stay in the store.
MAX_READ = 1000
_Key: TypeAlias = tuple[str | None, str, str, str]


class ProfileStore:
    """The profiles of all owners. The database is opened at the first use."""

    def __init__(self, url: str) -> None:
        """Prepare the store.

        Args:
            url: SQLAlchemy's URL of the database.

        Raises:
            ConfigError: the URL is none, or names another kind of database.
        """
        self._database = open_database(url)
        is_sqlite = isinstance(self._database, SqliteDatabase)
        self._insert = sqlite.insert if is_sqlite else postgresql.insert
        self._cache = ProfileCache()

    async def close(self) -> None:
        """Close all connections."""
        await self._database.close()

    async def add(
        self,
        owner: str,
        profile_id: str,
        choices: Sequence[StoredChoice] = (),
        description: str | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> Addition:
        """Add choices to a profile, which is made if it does not exist.

        It is stored when this returns. A choice among the latest `MAX_READ` is not added again: the
        same answers to the same messages, for one request id. So a client may send it again if the
        answer was lost. What is stored stays as it is, even if a reward now scores what it could
        not score then.

        Args:
            owner: whose profile it is.
            profile_id: its name.
            choices: to add.
            description: replaces the profile's; None leaves it.
            weights: replace those of the profile; None leaves them.

        Returns:
            The profile as it is then, the sent choices as they are stored, and how many were new.

        Raises:
            StoreFailed: nothing was stored.
        """
        changes: dict[str, Any] = {"id": profile_id}
        if description is not None:
            changes["description"] = description
        if weights is not None:
            changes["weights"] = dict(weights)
        profile = {"owner": owner, "created_at": time.time(), **changes}
        statement = self._insert(PROFILES).values({"weights": {}, **profile})
        # The update of an existing row also locks it, so no one deletes it meanwhile.
        updating = statement.on_conflict_do_update(index_elements=["owner", "id"], set_=changes)
        upsert = updating.returning(*PROFILES.c)

        def write(connection: Connection) -> tuple[RowMapping, CachedChoices, _Sent]:
            row = connection.execute(upsert).mappings().one()
            # No one adds to the profile meanwhile, so what is not there now is new.
            cached = self._read_choices(connection, row)
            sent = _compared(choices, cached.choices)
            if sent.new:
                rows = [_choice_row(owner, profile_id, choice) for choice in sent.new]
                connection.execute(CHOICES.insert(), rows)
                cached = _with_later_choices(connection, row, cached)
            return row, cached, sent

        row, cached, sent = await self._database.run(write, writes=True)
        # Only now: a transaction that failed has left nothing to cache.
        self._cache.put(owner, profile_id, cached)
        return Addition(_stored_profile(row, cached), len(sent.new), (*sent.earlier, *sent.new))

    async def get(self, owner: str, profile_id: str) -> StoredProfile | None:
        """Return a profile with its latest choices; None if the owner has none of this name.

        Raises:
            StoreFailed: it could not be read.
        """
        if "\0" in profile_id:
            # PostgreSQL refuses even to look for it.
            return None
        is_profile = (PROFILES.c.owner == owner) & (PROFILES.c.id == profile_id)
        query = select(PROFILES).where(is_profile)

        def read(connection: Connection) -> tuple[RowMapping, CachedChoices] | None:
            row = connection.execute(query).mappings().first()
            return None if row is None else (row, self._read_choices(connection, row))

        result = await self._database.run(read)
        if result is None:
            return None
        row, cached = result
        self._cache.put(owner, profile_id, cached)
        return _stored_profile(row, cached)

    def _read_choices(self, connection: Connection, profile: RowMapping) -> CachedChoices:
        """Return the choices of a profile; only those that are new to this process are read."""
        cached = self._cache.get(profile["owner"], profile["id"], profile["created_at"])
        return _with_later_choices(connection, profile, cached)

    async def delete(self, owner: str, profile_id: str) -> bool:
        """Delete a profile and its choices; return False if the owner has none of this name.

        Raises:
            StoreFailed: nothing was deleted.
        """
        is_profile = (PROFILES.c.owner == owner) & (PROFILES.c.id == profile_id)
        is_choice = (CHOICES.c.owner == owner) & (CHOICES.c.profile_id == profile_id)

        def write(connection: Connection) -> bool:
            deleted = connection.execute(delete(PROFILES).where(is_profile))
            connection.execute(delete(CHOICES).where(is_choice))
            return deleted.rowcount > 0

        return await self._database.run(write, writes=True)

    async def overview(self) -> list[tuple[str, str, int, float]]:
        """Return (owner, id, choices, created at) of every profile, for the operator.

        Raises:
            StoreFailed: they could not be read.
        """
        has_owner = CHOICES.c.owner == PROFILES.c.owner
        has_profile = CHOICES.c.profile_id == PROFILES.c.id
        counting = select(func.count()).select_from(CHOICES).where(has_owner & has_profile)
        columns = (
            PROFILES.c.owner,
            PROFILES.c.id,
            counting.scalar_subquery(),
            PROFILES.c.created_at,
        )
        query = select(*columns).order_by(PROFILES.c.owner, PROFILES.c.id)

        def read(connection: Connection) -> list[tuple[str, str, int, float]]:
            rows = connection.execute(query).all()
            return [(row[0], row[1], row[2], row[3]) for row in rows]

        return await self._database.run(read)


def _with_later_choices(
    connection: Connection, profile: RowMapping, cached: CachedChoices
) -> CachedChoices:
    """Return the choices of a profile, with those in the database that follow the given ones."""
    owner, profile_id = profile["owner"], profile["id"]
    is_choice = (CHOICES.c.owner == owner) & (CHOICES.c.profile_id == profile_id)
    is_new = is_choice & (CHOICES.c.number > cached.number)
    latest = select(CHOICES).where(is_new).order_by(CHOICES.c.number.desc()).limit(MAX_READ)
    rows = connection.execute(latest).mappings().all()
    if not rows:
        return cached
    total = cached.total + len(rows)
    if len(rows) == MAX_READ:
        # There may be more than these.
        counting = select(func.count()).select_from(CHOICES).where(is_choice)
        total = connection.execute(counting).scalar_one()
    choices = tuple(_stored_choice(row) for row in reversed(rows))
    return cached.extended(rows[0]["number"], choices, total, MAX_READ)


@dataclass(frozen=True, slots=True)
class _Sent:
    """The choices of a feedback, each one once."""

    new: Sequence[StoredChoice]
    earlier: Sequence[StoredChoice]  # as they were stored before


def _compared(choices: Sequence[StoredChoice], stored: Sequence[StoredChoice]) -> _Sent:
    """Tell new choices from those that are stored. One without a request id is always new."""
    by_key = {_key(choice): choice for choice in stored if choice.request_id}
    new: list[StoredChoice] = []
    earlier: list[StoredChoice] = []
    keys: set[_Key] = set()
    for choice in choices:
        key = _key(choice)
        if key in keys:
            continue
        if key in by_key:
            earlier.append(by_key[key])
        else:
            new.append(choice)
        if choice.request_id:
            keys.add(key)
    return _Sent(new, earlier)


def _key(choice: StoredChoice) -> _Key:
    """Return what is equal in a choice that is sent again."""
    return (choice.request_id, choice.messages_hash, choice.chosen_hash, choice.rejected_hash)


def _choice_row(owner: str, profile_id: str, choice: StoredChoice) -> dict[str, Any]:
    text = None
    if choice.text is not None:
        text = {
            "chosen": choice.text.chosen,
            "rejected": choice.text.rejected,
            "messages": list(choice.text.messages or ()),
        }
    return {
        "owner": owner,
        "profile_id": profile_id,
        "created_at": choice.created_at or time.time(),
        "differences": dict(choice.differences),
        "chosen_hash": choice.chosen_hash,
        "rejected_hash": choice.rejected_hash,
        "messages_hash": choice.messages_hash,
        "request_id": choice.request_id,
        "text": text,
    }


def _stored_profile(profile: RowMapping, cached: CachedChoices) -> StoredProfile:
    return StoredProfile(
        id=profile["id"],
        description=profile["description"],
        weights=profile["weights"],
        choices=cached.choices,
        total=cached.total,
        created_at=profile["created_at"],
    )


def _stored_choice(row: RowMapping) -> StoredChoice:
    text = None
    if row["text"] is not None:
        messages = tuple(row["text"]["messages"])
        text = Choice(row["text"]["chosen"], row["text"]["rejected"], messages)
    return StoredChoice(
        differences=row["differences"],
        chosen_hash=row["chosen_hash"],
        rejected_hash=row["rejected_hash"],
        messages_hash=row["messages_hash"],
        text=text,
        request_id=row["request_id"],
        created_at=row["created_at"],
    )
