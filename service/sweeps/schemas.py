"""What the API answers about sweeps."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from service.dispatch.states import SweepState
from service.sweeps.queries import SweepRow


class Validated(BaseModel):
    """What a spec comes to; nothing was stored.

    Attributes:
        estimated_seconds: device time on one CPU core.
    """

    runs: int
    packs: int
    run_steps: int
    estimated_seconds: float


class Progress(BaseModel):
    """How far a sweep is.

    Attributes:
        run_steps_done: updates done over all runs.
        run_steps_per_second: since the sweep started.
        seconds_left: at that rate; null before the first report and after the end.
    """

    runs_done: int
    runs_total: int
    runs_diverged: int
    run_steps_done: int
    run_steps_total: int
    run_steps_per_second: float | None
    seconds_left: float | None


class Sweep(BaseModel):
    """One sweep.

    Attributes:
        failed_packs: packs that have failed for good.
        error: why the first of them did.
    """

    id: str
    name: str
    state: SweepState
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    progress: Progress
    failed_packs: int
    error: str | None
    spec: dict[str, Any]

    @classmethod
    def of(cls, row: SweepRow) -> Sweep:
        """Build it from its row."""
        return cls(
            id=row.id,
            name=row.name,
            state=SweepState(row.state),
            created_at=_moment(row.created_at),
            started_at=None if row.started_at is None else _moment(row.started_at),
            finished_at=None if row.finished_at is None else _moment(row.finished_at),
            progress=_progress(row),
            failed_packs=row.failed_packs,
            error=row.error,
            spec=row.spec,
        )


class SweepPage(BaseModel):
    """Sweeps, newest first; `next` is the `after` of the following page, null on the last."""

    sweeps: list[Sweep]
    next: str | None


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _progress(row: SweepRow) -> Progress:
    rate = left = None
    if row.started_at is not None and row.run_steps_done > 0:
        elapsed = max((row.finished_at or row.now) - row.started_at, 1e-3)
        rate = row.run_steps_done / elapsed
        if row.finished_at is None:
            left = (row.run_steps_total - row.run_steps_done) / rate
    return Progress(
        runs_done=row.runs_done,
        runs_total=row.runs_total,
        runs_diverged=row.runs_diverged,
        run_steps_done=row.run_steps_done,
        run_steps_total=row.run_steps_total,
        run_steps_per_second=rate,
        seconds_left=left,
    )
