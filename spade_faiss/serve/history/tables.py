"""The tables of the history. Times are microseconds since 1970, so that all databases keep them alike."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

pictures = Table(
    "pictures",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("bank", String(255), nullable=False),
    Column("name", Text, nullable=False),
    Column("folded", Text, nullable=False),  # the name without case, for searches
    Column("source", String(255), nullable=False),
    Column("received", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("ranked_by", String(32), nullable=False),
    Column("knn", Double),
    Column("max", Double),
    Column("top", Double),
    Column("score", Double),  # the one that ranks
    Column("p_value", Double),
    Column("alpha", Double),
    Column("alarm", Boolean),
    Column("threshold", Double),
    Column("details", Text, nullable=False),  # JSON: what is shown with a picture, and never searched
    Column("suffix", String(8), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("kept", Boolean, nullable=False),
    Column("key", String(255)),
    Column("now_generation", BigInteger),
    Column("now_p_value", Double),
    Column("now_alarm", Boolean),
    Column("product", String(255)),  # in a bank of several
    Column("label", String(8)),  # of the answer that holds; the answer itself is in its own table
    UniqueConstraint("bank", "key", name="one_picture_a_key"),
    Index("pictures_by_time", "bank", "received", "alarm"),
    Index("pictures_by_age", "label", "received"),
    Index("pictures_to_review", "bank", "alarm", "label", "p_value", "score"),
    Index("pictures_on_disk", "kept", "received", "bytes"),
)

answers = Table(
    "answers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("picture_id", String(32), ForeignKey("pictures.id"), nullable=False),
    Column("bank", String(255), nullable=False),
    Column("kind", String(8), nullable=False),
    Column("note", Text, nullable=False),
    Column("answered", BigInteger, nullable=False),
    Column("by", String(255), nullable=False),
    Column("undone", Boolean, nullable=False),
    Column("state", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("bank_picture", String(255)),
    Index("answers_of_picture", "picture_id", "id"),
    Index("answers_to_do", "bank", "state"),
)

changes = Table(
    "changes",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("bank", String(255), nullable=False),
    Column("generation_before", BigInteger, nullable=False),
    Column("generation_after", BigInteger, nullable=False),
    Column("changed", BigInteger, nullable=False),
    Column("cause", Text, nullable=False),
    Column("details", Text, nullable=False),  # JSON
    Column("seconds", Double, nullable=False),
    Column("error", Text),
    Index("changes_of_bank", "bank", "id"),
)
