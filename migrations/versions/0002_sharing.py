"""Teams and shares, what a sweep's owners want, attempts as a ledger, dispatchers, keys of equal runs."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from alembic.operations.base import BatchOperations

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Check = tuple[str, str]
NOW = {
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "postgresql": "extract(epoch from clock_timestamp())::double precision",
}
OLD_STATES = "state IN ('queued', 'running', 'completed', 'failed')"
PACK_STATES = ("state", "state IN ('queued', 'running', 'completed', 'failed', 'cancelled')")
SWEEP_STATES = (
    "state",
    "state IN ('queued', 'running', 'pausing', 'paused', 'cancelling', 'cancelled', 'completed', 'failed')",
)
WANTED = ("wanted", "wanted IN ('run', 'pause', 'cancel')")


def replace_checks(batch: BatchOperations, table: str, old: Sequence[str], new: Sequence[Check]) -> None:
    for name in old:
        batch.drop_constraint(op.f(f"ck_{table}_{name}"), type_="check")
    for name, sql in new:
        batch.create_check_constraint(op.f(f"ck_{table}_{name}"), sql)


def filled(name: str, kind: sa.types.TypeEngine, value: str) -> sa.Column:
    """Return a column that rows which are there already get a value in."""
    return sa.Column(name, kind, nullable=False, server_default=sa.text(value))


def upgrade() -> None:
    now = NOW[op.get_bind().dialect.name]
    op.create_table(
        "teams",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("max_devices", sa.Double(), nullable=True),
        sa.Column("max_queued_runs", sa.Integer(), nullable=True),
        sa.Column("device_seconds", sa.Double(), nullable=False),
        sa.Column("run_steps", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("weight > 0", name=op.f("ck_teams_weight")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_teams")),
        sa.UniqueConstraint("name", name=op.f("uq_teams_name")),
    )
    op.execute(
        "INSERT INTO teams (name, weight, device_seconds, run_steps, created_at) "  # noqa: S608
        f"VALUES ('default', 1, 0, 0, {now})"
    )
    op.create_table(
        "scheduler",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("virtual_times", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_scheduler")),
    )
    op.execute("INSERT INTO scheduler (id, virtual_times) VALUES (1, '{}')")
    op.create_table(
        "shares",
        sa.Column("team_id", ROW_ID, nullable=False),
        sa.Column("pool", sa.String(length=144), nullable=False),
        sa.Column("virtual_time", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_shares_team_id_teams")),
        sa.PrimaryKeyConstraint("team_id", "pool", name=op.f("pk_shares")),
    )
    op.create_table(
        "dispatchers",
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("cluster", sa.String(length=100), nullable=False),
        sa.Column("version", sa.String(length=40), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.Column("nodes", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_dispatchers")),
    )
    _upgrade_sweeps()
    _upgrade_packs()
    op.create_table(
        "attempts",
        sa.Column("pack_id", ROW_ID, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("sweep_id", sa.String(length=16), nullable=False),
        sa.Column("team_id", ROW_ID, nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("cluster", sa.String(length=100), nullable=False),
        sa.Column("pool", sa.String(length=144), nullable=False),
        sa.Column("share", sa.Double(), nullable=False),
        sa.Column("charged", sa.Double(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("node", sa.String(length=100), nullable=True),
        sa.Column("device", sa.String(length=200), nullable=True),
        sa.Column("claimed_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("first_step", sa.Integer(), nullable=True),
        sa.Column("runs_trained", sa.Integer(), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("device_seconds", sa.Double(), nullable=False),
        sa.Column("run_steps", sa.BigInteger(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("log", sa.Text(), nullable=False),
        sa.CheckConstraint("(outcome = 'running') = (ended_at IS NULL)", name=op.f("ck_attempts_ended")),
        sa.CheckConstraint(
            "outcome IN ('running', 'completed', 'failed', 'stopped', 'released', 'lost')",
            name=op.f("ck_attempts_outcome"),
        ),
        sa.ForeignKeyConstraint(["pack_id"], ["packs.id"], name=op.f("fk_attempts_pack_id_packs")),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name=op.f("fk_attempts_sweep_id_sweeps")),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_attempts_team_id_teams")),
        sa.PrimaryKeyConstraint("pack_id", "attempt", name=op.f("pk_attempts")),
    )
    op.create_index(op.f("ix_attempts_sweep_id"), "attempts", ["sweep_id"], unique=False)
    with op.batch_alter_table("runs", recreate="never") as batch:
        batch.add_column(sa.Column("config_key", sa.LargeBinary(length=16), nullable=True))
        batch.create_index(op.f("ix_runs_config_key"), ["config_key"], unique=False)
    _upgrade_results()


def _upgrade_sweeps() -> None:
    with op.batch_alter_table("sweeps") as batch:
        batch.add_column(filled("team_id", ROW_ID, "1"))
        batch.add_column(filled("wanted", sa.String(length=16), "'run'"))
        batch.add_column(filled("priority", sa.Integer(), "0"))
        batch.add_column(sa.Column("device_kind", sa.String(length=8), nullable=True))
        batch.add_column(sa.Column("device_model", sa.String(length=64), nullable=True))
        batch.add_column(filled("pack_seconds", sa.Double(), "1"))
        batch.add_column(filled("pack_share", sa.Double(), "1"))
        batch.add_column(filled("packs_queued", sa.Integer(), "0"))
        batch.add_column(filled("packs_running", sa.Integer(), "0"))
        batch.add_column(sa.Column("ready_at", sa.Double(), nullable=True))
        batch.add_column(sa.Column("served_at", sa.Double(), nullable=True))
        batch.add_column(filled("device_seconds", sa.Double(), "0"))
        batch.add_column(filled("run_steps_trained", sa.BigInteger(), "0"))
        batch.add_column(filled("runs_reused", sa.Integer(), "0"))
        batch.create_foreign_key(op.f("fk_sweeps_team_id_teams"), "teams", ["team_id"], ["id"])
        batch.drop_constraint(op.f("uq_sweeps_idempotency_key"), type_="unique")
        batch.create_unique_constraint(
            op.f("uq_sweeps_team_id_idempotency_key"), ["team_id", "idempotency_key"]
        )
        replace_checks(batch, "sweeps", ["state"], [SWEEP_STATES, WANTED])
    for state, column in (("queued", "packs_queued"), ("running", "packs_running")):
        op.execute(
            f"UPDATE sweeps SET {column} = (SELECT count(*) FROM packs "  # noqa: S608
            f"WHERE packs.sweep_id = sweeps.id AND packs.state = '{state}')"
        )
    op.execute(
        "UPDATE sweeps SET ready_at = (SELECT min(not_before) FROM packs "
        "WHERE packs.sweep_id = sweeps.id AND packs.state = 'queued')"
    )
    op.create_index(
        "ix_sweeps_queue",
        "sweeps",
        ["team_id", "ready_at"],
        unique=False,
        sqlite_where=sa.text("packs_queued > 0"),
        postgresql_where=sa.text("packs_queued > 0"),
    )
    op.create_index(
        "ix_sweeps_alive",
        "sweeps",
        ["team_id"],
        unique=False,
        sqlite_where=sa.text("packs_queued + packs_running > 0"),
        postgresql_where=sa.text("packs_queued + packs_running > 0"),
    )


def _upgrade_packs() -> None:
    with op.batch_alter_table("packs") as batch:
        replace_checks(batch, "packs", ["state"], [PACK_STATES])
        batch.add_column(filled("preempted", sa.Boolean(), "false"))
        batch.add_column(filled("seconds", sa.Double(), "1"))
        batch.add_column(sa.Column("environment_key", sa.String(length=64), nullable=True))
    op.drop_index(op.f("ix_packs_state_not_before_id"), table_name="packs")
    op.create_index(
        op.f("ix_packs_sweep_id_state_not_before"), "packs", ["sweep_id", "state", "not_before"], unique=False
    )
    op.create_index(
        "ix_packs_leases",
        "packs",
        ["lease_owner", "lease_until"],
        unique=False,
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    )


def _upgrade_results() -> None:
    with op.batch_alter_table("results") as batch:
        batch.add_column(sa.Column("reused_from", ROW_ID, nullable=True))
        batch.create_foreign_key(
            op.f("fk_results_reused_from_runs"), "runs", ["reused_from"], ["id"], ondelete="SET NULL"
        )


def downgrade() -> None:
    with op.batch_alter_table("results") as batch:
        batch.drop_constraint(op.f("fk_results_reused_from_runs"), type_="foreignkey")
        batch.drop_column("reused_from")
    with op.batch_alter_table("runs", recreate="never") as batch:
        batch.drop_index(op.f("ix_runs_config_key"))
        batch.drop_column("config_key")
    op.drop_index(op.f("ix_attempts_sweep_id"), table_name="attempts")
    op.drop_table("attempts")
    _downgrade_packs()
    _downgrade_sweeps()
    op.drop_table("dispatchers")
    op.drop_table("shares")
    op.drop_table("scheduler")
    op.drop_table("teams")


def _downgrade_packs() -> None:
    # What has no word in the older version is given the nearest one.
    op.execute("UPDATE packs SET state = 'failed', error = 'cancelled' WHERE state = 'cancelled'")
    op.drop_index("ix_packs_leases", table_name="packs")
    op.drop_index(op.f("ix_packs_sweep_id_state_not_before"), table_name="packs")
    with op.batch_alter_table("packs") as batch:
        replace_checks(batch, "packs", ["state"], [("state", OLD_STATES)])
        for column in ("preempted", "seconds", "environment_key"):
            batch.drop_column(column)
    op.create_index(
        op.f("ix_packs_state_not_before_id"), "packs", ["state", "not_before", "id"], unique=False
    )


def _downgrade_sweeps() -> None:
    op.execute("UPDATE sweeps SET state = 'running' WHERE state IN ('pausing', 'paused', 'cancelling')")
    op.execute("UPDATE sweeps SET state = 'failed' WHERE state = 'cancelled'")
    # Two teams may have used one key, of which the older version allows one.
    op.execute(
        "UPDATE sweeps SET idempotency_key = NULL WHERE EXISTS (SELECT 1 FROM sweeps AS other "
        "WHERE other.idempotency_key = sweeps.idempotency_key AND other.id < sweeps.id)"
    )
    op.drop_index("ix_sweeps_alive", table_name="sweeps")
    op.drop_index("ix_sweeps_queue", table_name="sweeps")
    with op.batch_alter_table("sweeps") as batch:
        replace_checks(batch, "sweeps", ["state", "wanted"], [("state", OLD_STATES)])
        batch.drop_constraint(op.f("fk_sweeps_team_id_teams"), type_="foreignkey")
        batch.drop_constraint(op.f("uq_sweeps_team_id_idempotency_key"), type_="unique")
        batch.create_unique_constraint(op.f("uq_sweeps_idempotency_key"), ["idempotency_key"])
        for column in (
            *("team_id", "wanted", "priority", "device_kind", "device_model", "pack_seconds", "pack_share"),
            *("packs_queued", "packs_running", "ready_at", "served_at", "device_seconds"),
            *("run_steps_trained", "runs_reused"),
        ):
            batch.drop_column(column)
