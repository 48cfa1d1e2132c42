"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "pictures",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("bank", sa.String(255), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("folded", sa.Text, nullable=False),
        sa.Column("source", sa.String(255), nullable=False),
        sa.Column("received", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("ranked_by", sa.String(32), nullable=False),
        sa.Column("knn", sa.Double),
        sa.Column("max", sa.Double),
        sa.Column("top", sa.Double),
        sa.Column("score", sa.Double),
        sa.Column("p_value", sa.Double),
        sa.Column("alpha", sa.Double),
        sa.Column("alarm", sa.Boolean),
        sa.Column("threshold", sa.Double),
        sa.Column("details", sa.Text, nullable=False),
        sa.Column("suffix", sa.String(8), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("kept", sa.Boolean, nullable=False),
        sa.Column("key", sa.String(255)),
        sa.Column("now_generation", sa.BigInteger),
        sa.Column("now_p_value", sa.Double),
        sa.Column("now_alarm", sa.Boolean),
        sa.Column("label", sa.String(8)),
        sa.UniqueConstraint("bank", "key", name="one_picture_a_key"),
    )
    op.create_index("pictures_by_time", "pictures", ["bank", "received", "alarm"])
    op.create_index("pictures_by_age", "pictures", ["label", "received"])
    op.create_index("pictures_to_review", "pictures", ["bank", "alarm", "label", "p_value", "score"])
    op.create_index("pictures_on_disk", "pictures", ["kept", "received", "bytes"])
    op.create_table(
        "answers",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("picture_id", sa.String(32), sa.ForeignKey("pictures.id"), nullable=False),
        sa.Column("bank", sa.String(255), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("answered", sa.BigInteger, nullable=False),
        sa.Column("by", sa.String(255), nullable=False),
        sa.Column("undone", sa.Boolean, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("bank_picture", sa.String(255)),
    )
    op.create_index("answers_of_picture", "answers", ["picture_id", "id"])
    op.create_index("answers_to_do", "answers", ["bank", "state"])
    op.create_table(
        "changes",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("bank", sa.String(255), nullable=False),
        sa.Column("generation_before", sa.BigInteger, nullable=False),
        sa.Column("generation_after", sa.BigInteger, nullable=False),
        sa.Column("changed", sa.BigInteger, nullable=False),
        sa.Column("cause", sa.Text, nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("error", sa.Text),
    )
    op.create_index("changes_of_bank", "changes", ["bank", "id"])
