"""The tables. A change here needs a migration; a test compares the two.

Times are seconds since 1970 by the database's own clock. A non-finite number is never stored: a diverged
run has its kind in `diverged_kind` and NULL in every metric.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
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
    literal_column,
    text,
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

teams: Final = Table(
    "teams",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("weight", Double, nullable=False),
    # Quotas; NULL sets none.
    Column("max_devices", Double),
    Column("max_queued_runs", Integer),
    # What its attempts that have ended took, as in `attempts`.
    Column("device_seconds", Double, nullable=False),
    Column("run_steps", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    CheckConstraint("weight > 0", name="weight"),
)

sweeps: Final = Table(
    "sweeps",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("team_id", ForeignKey("teams.id"), nullable=False),
    Column("name", String(200), nullable=False),
    # `wanted` is what its owners want; `state` follows from it and the packs' states: dispatch/states.py.
    Column("wanted", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("idempotency_key", String(200)),
    Column("runs_total", Integer, nullable=False),
    Column("run_steps_total", BigInteger, nullable=False),
    # The devices that it may use: asked for, or those of its first pack, on which the others follow.
    Column("device_kind", String(8)),
    Column("device_model", String(64)),
    # Of a pack, on average: estimated device-seconds, and the part of a device.
    Column("pack_seconds", Double, nullable=False),
    Column("pack_share", Double, nullable=False),
    # Counted anew from the packs at each of their transitions: leases.settle.
    Column("packs_queued", Integer, nullable=False),
    Column("packs_running", Integer, nullable=False),
    # When the first of the queued packs may start; NULL if none is queued.
    Column("ready_at", Double),
    # When a pack of it was last claimed.
    Column("served_at", Double),
    # What its attempts that have ended took, as in `attempts`.
    Column("device_seconds", Double, nullable=False),
    Column("run_steps_trained", BigInteger, nullable=False),
    Column("runs_reused", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    CheckConstraint(
        "state IN ('queued', 'running', 'pausing', 'paused', 'cancelling', 'cancelled', "
        "'completed', 'failed')",
        name="state",
    ),
    CheckConstraint("wanted IN ('run', 'pause', 'cancel')", name="wanted"),
    UniqueConstraint("team_id", "idempotency_key"),
    Index(None, "created_at", "id"),
    # The queue: a few of many sweeps.
    Index(
        "ix_sweeps_queue",
        "team_id",
        "ready_at",
        sqlite_where=text("packs_queued > 0"),
        postgresql_where=text("packs_queued > 0"),
    ),
    Index(
        "ix_sweeps_alive",
        "team_id",
        sqlite_where=text("packs_queued + packs_running > 0"),
        postgresql_where=text("packs_queued + packs_running > 0"),
    ),
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
    # Whether its attempt should stop at a checkpoint to make room.
    Column("preempted", Boolean, nullable=False),
    Column("runs_total", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("runs_diverged", Integer, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("error", Text),
    Column("error_detail", Text),
    Column("device", String(200)),
    Column("versions", JSON),
    Column("data_checksum", String(64)),
    # `Environment.key`: under which of them the results may be used again.
    Column("environment_key", String(64)),
    CheckConstraint("state IN ('queued', 'running', 'completed', 'failed', 'cancelled')", name="state"),
    CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name="lease"),
    UniqueConstraint("sweep_id", "position"),
    Index(None, "sweep_id", "state", "not_before"),
    Index(
        "ix_packs_leases",
        "lease_owner",
        "lease_until",
        sqlite_where=text("state = 'running'"),
        postgresql_where=text("state = 'running'"),
    ),
)

# The ledger: who used which device for how long, for whom. Kept for ever.
attempts: Final = Table(
    "attempts",
    metadata,
    Column("pack_id", ForeignKey("packs.id"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("sweep_id", ForeignKey("sweeps.id"), nullable=False),
    Column("team_id", ForeignKey("teams.id"), nullable=False),
    Column("owner", String(100), nullable=False),
    Column("cluster", String(100), nullable=False),
    Column("pool", String(144), nullable=False),
    Column("share", Double, nullable=False),
    # Seconds that the team was charged at the claim; the actual ones take their place at the end.
    Column("charged", Double, nullable=False),
    # The team's, by which it was charged.
    Column("weight", Double, nullable=False),
    Column("node", String(100)),
    Column("device", String(200)),
    Column("claimed_at", Double, nullable=False),
    # When it had its device.
    Column("started_at", Double),
    Column("ended_at", Double),
    # The step that it began at, if it told of any.
    Column("first_step", Integer),
    # Runs that it trains, if it told: the others have equal results.
    Column("runs_trained", Integer),
    Column("outcome", String(16), nullable=False),
    Column("device_seconds", Double, nullable=False),
    Column("run_steps", BigInteger, nullable=False),
    Column("error", Text),
    # The end of what it wrote.
    Column("log", Text, nullable=False),
    CheckConstraint(
        "outcome IN ('running', 'completed', 'failed', 'stopped', 'released', 'lost')", name="outcome"
    ),
    CheckConstraint("(outcome = 'running') = (ended_at IS NULL)", name="ended"),
    Index(None, "sweep_id"),
)

# One row, on which claims take turns.
scheduler: Final = Table(
    "scheduler",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    # Of the pools, by key: see dispatch/fairness.py.
    Column("virtual_times", JSON, nullable=False),
)

shares: Final = Table(
    "shares",
    metadata,
    Column("team_id", ForeignKey("teams.id"), primary_key=True),
    # kind/model/team
    Column("pool", String(144), primary_key=True),
    # Device-seconds per weight that the team was charged there: see dispatch/fairness.py.
    Column("virtual_time", Double, nullable=False),
)

# Who dispatches, and on what machines: for the cluster view and for each other.
dispatchers: Final = Table(
    "dispatchers",
    metadata,
    Column("owner", String(100), primary_key=True),
    Column("cluster", String(100), nullable=False),
    Column("version", String(40), nullable=False),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
    # Of `workers.protocol.Node`.
    Column("nodes", JSON, nullable=False),
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
    # The first 16 bytes of a SHA-256 of its configuration; NULL if it was stored before there were any.
    Column("config_key", LargeBinary(16)),
    CheckConstraint("(method = 'baseline') = (vxx_reg IS NULL)", name="method"),
    UniqueConstraint("pack_id", "pack_index"),
    Index(None, "config_key"),
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
    # The run that was trained, if this one was not.
    Column("reused_from", ForeignKey("runs.id", ondelete="SET NULL")),
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

# As literals: a partial index serves no query that says the same with a parameter.
is_running: Final = packs.c.state == literal_column("'running'")
is_alive: Final = sweeps.c.packs_queued + sweeps.c.packs_running > literal_column("0")
has_queued: Final = sweeps.c.packs_queued > literal_column("0")
