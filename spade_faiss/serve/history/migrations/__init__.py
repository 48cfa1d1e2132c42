"""Migrations of the history's tables; Alembic runs them when a server starts."""
