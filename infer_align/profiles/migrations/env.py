"""Alembic runs this to migrate the store over the connection that it was given."""

from __future__ import annotations

from alembic import context

from infer_align.profiles.schema import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
