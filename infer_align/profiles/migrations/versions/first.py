"""Make the tables of profiles and choices."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "first"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "profiles",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("id", sa.String(128), primary_key=True),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "choices",
        sa.Column("number", number, primary_key=True, autoincrement=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("profile_id", sa.String(128), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("differences", sa.JSON, nullable=False),
        sa.Column("chosen_hash", sa.String(64), nullable=False),
        sa.Column("rejected_hash", sa.String(64), nullable=False),
        sa.Column("messages_hash", sa.String(64), nullable=False),
        sa.Column("request_id", sa.String(128)),
        sa.Column("text", sa.JSON),
    )
    op.create_index("choices_of_profile", "choices", ["owner", "profile_id", "number"])
