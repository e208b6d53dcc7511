"""Keep a description of the user, and the weights that learning starts from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "start"
down_revision = "first"


def upgrade() -> None:
    """Add the columns; profiles that exist have none of both."""
    description = sa.Column("description", sa.Text, nullable=False, server_default="")
    weights = sa.Column("weights", sa.JSON, nullable=False, server_default="{}")
    op.add_column("profiles", description)
    op.add_column("profiles", weights)
