"""How Alembic runs the migrations: on the connection that it is given."""

from __future__ import annotations

from alembic import context

from spade_faiss.serve.history.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transaction_per_migration=False,
    render_as_batch=True,
)
context.run_migrations()
