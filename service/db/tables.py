"""The tables. A change here needs a migration; a test compares the two.

Times are seconds since 1970 by the database's own clock. A non-finite number is never stored: a diverged
run has its kind in `diverged_kind` and NULL in every metric.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

NAMES: Final = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

metadata: Final = MetaData(naming_convention=NAMES)

# SQLite numbers rows by itself only in a column that is INTEGER to the letter.
RowId: Final = BigInteger().with_variant(Integer, "sqlite")

sweeps: Final = Table(
    "sweeps",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("state", String(16), nullable=False),
    Column("spec", JSON, nullable=False),
    Column("idempotency_key", String(200), unique=True),
    Column("runs_total", Integer, nullable=False),
    Column("run_steps_total", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    CheckConstraint("state IN ('queued', 'running', 'completed', 'failed')", name="state"),
    Index(None, "created_at", "id"),
)

grids: Final = Table(
    "grids",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("sweep_id", ForeignKey("sweeps.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("baseline", String(32), nullable=False),
    UniqueConstraint("sweep_id", "position"),
)

packs: Final = Table(
    "packs",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("sweep_id", ForeignKey("sweeps.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("not_before", Double, nullable=False),
    Column("lease_owner", String(100)),
    Column("lease_until", Double),
    Column("runs_total", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("runs_diverged", Integer, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("error", Text),
    Column("error_detail", Text),
    Column("device", String(200)),
    Column("versions", JSON),
    Column("data_checksum", String(64)),
    CheckConstraint("state IN ('queued', 'running', 'completed', 'failed')", name="state"),
    CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name="lease"),
    UniqueConstraint("sweep_id", "position"),
    Index(None, "state", "not_before", "id"),
)

runs: Final = Table(
    "runs",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("sweep_id", ForeignKey("sweeps.id"), nullable=False),
    Column("grid_id", ForeignKey("grids.id"), nullable=False),
    Column("pack_id", ForeignKey("packs.id"), nullable=False),
    Column("pack_index", Integer, nullable=False),
    Column("method", String(16), nullable=False),
    Column("learning_rate", Double, nullable=False),
    Column("vxx_reg", Double),
    Column("seed", BigInteger, nullable=False),
    CheckConstraint("(method = 'baseline') = (vxx_reg IS NULL)", name="method"),
    UniqueConstraint("pack_id", "pack_index"),
    Index(None, "grid_id"),
    Index(None, "sweep_id", "id"),
)

results: Final = Table(
    "results",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("steps", Integer, nullable=False),
    Column("train_loss", Double),
    Column("train_accuracy", Double),
    Column("test_loss", Double),
    Column("accuracy", Double),
    Column("diverged_step", Integer),
    Column("diverged_quantity", String(32)),
    Column("diverged_kind", String(8)),
    Column("last_finite", Double),
    Column("weights_digest", String(64), nullable=False),
    Column("recorded_at", Double, nullable=False),
    CheckConstraint("state IN ('completed', 'diverged')", name="state"),
    CheckConstraint("(state = 'diverged') = (diverged_step IS NOT NULL)", name="diverged"),
    CheckConstraint("(state = 'completed') = (train_loss IS NOT NULL)", name="metrics"),
)

curves: Final = Table(
    "curves",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("metric", String(32), primary_key=True),
    # Little-endian float32; the steps are those of the sweep's spec, cut short where the run diverged.
    Column("points", LargeBinary, nullable=False),
)
