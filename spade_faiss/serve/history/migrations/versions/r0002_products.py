"""The product that a picture shows, in a bank of several."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; what was scored before is of banks of one product."""
    op.add_column("pictures", sa.Column("product", sa.String(255)))
