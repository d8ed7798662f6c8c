"""What the API answers about results."""

from __future__ import annotations

from pydantic import BaseModel

from ddpnopt.results import NonFinite
from service.results.queries import Curve
from service.results.records import RunRecord


class RunOut(BaseModel):
    """One run; metrics are null until it has ended, and for ever if it diverged."""

    id: int
    grid: int
    baseline: str
    method: str
    learning_rate: float
    vxx_reg: float | None
    seed: int
    pack: int
    state: str
    attempt: int | None
    steps: int | None
    train_loss: float | None
    train_accuracy: float | None
    test_loss: float | None
    accuracy: float | None
    diverged_step: int | None
    diverged_quantity: str | None
    diverged_kind: NonFinite | None
    last_finite: float | None
    weights_digest: str | None
    reused_from: int | None


class RunPage(BaseModel):
    """Runs in order of id; `next` is the `after` of the following page, null on the last."""

    runs: list[RunOut]
    next: int | None


class CurvesOut(BaseModel):
    """Curves of a grid's runs that have ended."""

    sweep_id: str
    metric: str
    curves: list[Curve]


class RecordsPage(BaseModel):
    """What a probe recorded, in order of run.

    Attributes:
        shape: of each point's values, which come flat, in C order.
        next: the `after` of the following page, null on the last.
    """

    sweep_id: str
    probe: str
    shape: list[int]
    records: list[RunRecord]
    next: int | None
