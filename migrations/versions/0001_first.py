"""The first tables: sweeps, grids, packs, runs, results, curves."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "sweeps",
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("idempotency_key", sa.String(length=200), nullable=True),
        sa.Column("runs_total", sa.Integer(), nullable=False),
        sa.Column("run_steps_total", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'completed', 'failed')", name=op.f("ck_sweeps_state")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sweeps")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_sweeps_idempotency_key")),
    )
    op.create_index(op.f("ix_sweeps_created_at_id"), "sweeps", ["created_at", "id"], unique=False)
    op.create_table(
        "grids",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("sweep_id", sa.String(length=16), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("baseline", sa.String(length=32), nullable=False),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name=op.f("fk_grids_sweep_id_sweeps")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_grids")),
        sa.UniqueConstraint("sweep_id", "position", name=op.f("uq_grids_sweep_id_position")),
    )
    op.create_table(
        "packs",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("sweep_id", sa.String(length=16), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.Double(), nullable=False),
        sa.Column("lease_owner", sa.String(length=100), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("runs_total", sa.Integer(), nullable=False),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("runs_diverged", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("error_detail", sa.Text(), nullable=True),
        sa.Column("device", sa.String(length=200), nullable=True),
        sa.Column("versions", sa.JSON(), nullable=True),
        sa.Column("data_checksum", sa.String(length=64), nullable=True),
        sa.CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name=op.f("ck_packs_lease")),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'completed', 'failed')", name=op.f("ck_packs_state")
        ),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name=op.f("fk_packs_sweep_id_sweeps")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_packs")),
        sa.UniqueConstraint("sweep_id", "position", name=op.f("uq_packs_sweep_id_position")),
    )
    op.create_index(
        op.f("ix_packs_state_not_before_id"), "packs", ["state", "not_before", "id"], unique=False
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("sweep_id", sa.String(length=16), nullable=False),
        sa.Column("grid_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("pack_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("pack_index", sa.Integer(), nullable=False),
        sa.Column("method", sa.String(length=16), nullable=False),
        sa.Column("learning_rate", sa.Double(), nullable=False),
        sa.Column("vxx_reg", sa.Double(), nullable=True),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("(method = 'baseline') = (vxx_reg IS NULL)", name=op.f("ck_runs_method")),
        sa.ForeignKeyConstraint(["grid_id"], ["grids.id"], name=op.f("fk_runs_grid_id_grids")),
        sa.ForeignKeyConstraint(["pack_id"], ["packs.id"], name=op.f("fk_runs_pack_id_packs")),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name=op.f("fk_runs_sweep_id_sweeps")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("pack_id", "pack_index", name=op.f("uq_runs_pack_id_pack_index")),
    )
    op.create_index(op.f("ix_runs_grid_id"), "runs", ["grid_id"], unique=False)
    op.create_index(op.f("ix_runs_sweep_id_id"), "runs", ["sweep_id", "id"], unique=False)
    op.create_table(
        "curves",
        sa.Column("run_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("metric", sa.String(length=32), nullable=False),
        sa.Column("points", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_curves_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "metric", name=op.f("pk_curves")),
    )
    op.create_table(
        "results",
        sa.Column("run_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("train_loss", sa.Double(), nullable=True),
        sa.Column("train_accuracy", sa.Double(), nullable=True),
        sa.Column("test_loss", sa.Double(), nullable=True),
        sa.Column("accuracy", sa.Double(), nullable=True),
        sa.Column("diverged_step", sa.Integer(), nullable=True),
        sa.Column("diverged_quantity", sa.String(length=32), nullable=True),
        sa.Column("diverged_kind", sa.String(length=8), nullable=True),
        sa.Column("last_finite", sa.Double(), nullable=True),
        sa.Column("weights_digest", sa.String(length=64), nullable=False),
        sa.Column("recorded_at", sa.Double(), nullable=False),
        sa.CheckConstraint(
            "(state = 'completed') = (train_loss IS NOT NULL)", name=op.f("ck_results_metrics")
        ),
        sa.CheckConstraint(
            "(state = 'diverged') = (diverged_step IS NOT NULL)", name=op.f("ck_results_diverged")
        ),
        sa.CheckConstraint("state IN ('completed', 'diverged')", name=op.f("ck_results_state")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_results_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_results")),
    )


def downgrade() -> None:
    op.drop_table("results")
    op.drop_table("curves")
    op.drop_index(op.f("ix_runs_sweep_id_id"), table_name="runs")
    op.drop_index(op.f("ix_runs_grid_id"), table_name="runs")
    op.drop_table("runs")
    op.drop_index(op.f("ix_packs_state_not_before_id"), table_name="packs")
    op.drop_table("packs")
    op.drop_table("grids")
    op.drop_index(op.f("ix_sweeps_created_at_id"), table_name="sweeps")
    op.drop_table("sweeps")
