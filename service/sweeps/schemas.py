"""What the API answers about sweeps."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Self

from pydantic import BaseModel

from service.dispatch.states import Action, PackState, SweepState, possible_actions
from service.sweeps.expand import Plan
from service.sweeps.packs import PackRow
from service.sweeps.queries import SweepRow
from service.sweeps.spec import SweepSpec


class Validated(BaseModel):
    """What a spec comes to; nothing was stored.

    Attributes:
        estimated_seconds: device time on one CPU core.
    """

    runs: int
    packs: int
    run_steps: int
    estimated_seconds: float

    @classmethod
    def of(cls, spec: SweepSpec, plan: Plan) -> Self:
        """Count what is planned."""
        return cls(
            runs=plan.runs_total,
            packs=len(plan.packs),
            run_steps=plan.runs_total * spec.training.steps,
            estimated_seconds=round(plan.seconds, 1),
        )


class Progress(BaseModel):
    """How far a sweep is.

    Attributes:
        runs_reused: done without training, since equal results were there.
        run_steps_done: updates done over all runs, those of reused results included.
        run_steps_per_second: since the sweep started.
        seconds_left: at that rate; null before the first report, and while it does not run.
    """

    runs_done: int
    runs_total: int
    runs_diverged: int
    runs_reused: int
    run_steps_done: int
    run_steps_total: int
    run_steps_per_second: float | None
    seconds_left: float | None


class Usage(BaseModel):
    """What was taken of the cluster.

    Attributes:
        device_seconds: of attempts that have ended.
        run_steps: updates that they did, those included that came to nothing.
    """

    device_seconds: float
    run_steps: int


class Sweep(BaseModel):
    """One sweep.

    Attributes:
        team: whose it is.
        actions: what can be asked of it now, that would change something.
        usage: what its attempts took that have ended.
        failed_packs: packs that have failed for good.
        error: why the first of them did.
    """

    id: str
    team: str
    name: str
    state: SweepState
    priority: int
    actions: list[Action]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    progress: Progress
    usage: Usage
    packs_queued: int
    packs_running: int
    failed_packs: int
    error: str | None
    spec: dict[str, Any]

    @classmethod
    def of(cls, row: SweepRow) -> Sweep:
        """Build it from its row."""
        return cls(
            id=row.id,
            team=row.team,
            name=row.name,
            state=SweepState(row.state),
            priority=row.priority,
            actions=list(possible_actions(SweepState(row.state), failed_packs=row.failed_packs)),
            created_at=_moment(row.created_at),
            started_at=_maybe(row.started_at),
            finished_at=_maybe(row.finished_at),
            progress=_progress(row),
            usage=Usage(device_seconds=row.device_seconds, run_steps=row.run_steps_trained),
            packs_queued=row.packs_queued,
            packs_running=row.packs_running,
            failed_packs=row.failed_packs,
            error=row.error,
            spec=row.spec,
        )


class SweepPage(BaseModel):
    """Sweeps, newest first; `next` is the `after` of the following page, null on the last."""

    sweeps: list[Sweep]
    next: str | None


class Attempt(BaseModel):
    """One try at a pack.

    Attributes:
        outcome: `stopped` was asked for; `released` and `lost` ended with their dispatcher.
        device_seconds: that it took.
        run_steps: updates that it did.
    """

    attempt: int
    outcome: str
    node: str | None
    device: str | None
    claimed_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    device_seconds: float
    run_steps: int
    error: str | None


class Pack(BaseModel):
    """Runs that train together.

    Attributes:
        pack: its position in the sweep.
        max_attempts: after which it has failed for good.
    """

    pack: int
    state: PackState
    runs: int
    step: int
    steps: int
    attempt: int
    max_attempts: int
    error: str | None
    error_detail: str | None
    attempts: list[Attempt]

    @classmethod
    def of(cls, row: PackRow) -> Pack:
        """Build it from its rows."""
        return cls(
            pack=row.pack.position,
            state=PackState(row.pack.state),
            runs=row.pack.runs_total,
            step=row.pack.step,
            steps=row.pack.steps,
            attempt=row.pack.attempt,
            max_attempts=row.pack.max_attempts,
            error=row.pack.error,
            error_detail=row.pack.error_detail,
            attempts=[
                Attempt(
                    attempt=tried.attempt,
                    outcome=tried.outcome,
                    node=tried.node,
                    device=tried.device,
                    claimed_at=_moment(tried.claimed_at),
                    started_at=_maybe(tried.started_at),
                    ended_at=_maybe(tried.ended_at),
                    device_seconds=tried.device_seconds,
                    run_steps=tried.run_steps,
                    error=tried.error,
                )
                for tried in row.attempts
            ],
        )


class PackPage(BaseModel):
    """Packs by position; `next` is the `after` of the following page, null on the last."""

    packs: list[Pack]
    next: int | None


class Log(BaseModel):
    """The end of what an attempt wrote."""

    attempt: int
    log: str


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _maybe(seconds: float | None) -> datetime | None:
    return None if seconds is None else _moment(seconds)


def _progress(row: SweepRow) -> Progress:
    rate = left = None
    if row.started_at is not None and row.run_steps_done > 0:
        elapsed = max((row.finished_at or row.now) - row.started_at, 1e-3)
        rate = row.run_steps_done / elapsed
        if row.state == SweepState.RUNNING:
            left = (row.run_steps_total - row.run_steps_done) / rate
    return Progress(
        runs_done=row.runs_done,
        runs_total=row.runs_total,
        runs_diverged=row.runs_diverged,
        runs_reused=row.runs_reused,
        run_steps_done=row.run_steps_done,
        run_steps_total=row.run_steps_total,
        run_steps_per_second=rate,
        seconds_left=left,
    )
