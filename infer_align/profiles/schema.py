"""The tables of the store, as the newest migration leaves them."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

METADATA = MetaData()

PROFILES = Table(
    "profiles",
    METADATA,
    # The hash of the API key that made the profile.
    Column("owner", String(64), primary_key=True),
    Column("id", String(128), primary_key=True),
    Column("created_at", Float, nullable=False),
    Column("description", Text, nullable=False, server_default=""),
    Column("weights", JSON, nullable=False, server_default="{}"),
)

# Rows are added and deleted, never changed.
CHOICES = Table(
    "choices",
    METADATA,
    Column(
        "number",
        BigInteger().with_variant(Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    Column("owner", String(64), nullable=False),
    Column("profile_id", String(128), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("differences", JSON, nullable=False),
    Column("chosen_hash", String(64), nullable=False),
    Column("rejected_hash", String(64), nullable=False),
    Column("messages_hash", String(64), nullable=False),
    Column("request_id", String(128)),
    # The texts as {"chosen", "rejected", "messages"}; null unless texts are kept.
    Column("text", JSON),
    Index("choices_of_profile", "owner", "profile_id", "number"),
)
