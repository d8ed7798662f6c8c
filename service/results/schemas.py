"""What the API answers about results."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ddpnopt.results import NonFinite
from service.results.statistics import CellState


class _FromObject(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class CellOut(_FromObject):
    """One cell; see `service.results.statistics.Cell`."""

    learning_rate: float
    vxx_reg: float
    n: int
    n_ended: int
    n_diverged_baseline: int
    n_diverged_ddpnopt: int
    baseline_mean: float | None
    ddpnopt_mean: float | None
    improvement: float | None
    ci_low: float | None
    ci_high: float | None
    p_value: float | None
    q_value: float | None
    state: CellState


class HeatmapOut(_FromObject):
    """A panel, cells row by row: learning rates down, V_xx regularisations across.

    `improvement` is positive where DDPNOpt is better: baseline − DDPNOpt for a loss, DDPNOpt − baseline
    for an accuracy (percent points).
    """

    sweep_id: str
    name: str
    grid: int
    baseline: str
    metric: str
    learning_rate: list[float]
    vxx_reg: list[float]
    cells: list[CellOut]


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


class RunPage(BaseModel):
    """Runs in order of id; `next` is the `after` of the following page, null on the last."""

    runs: list[RunOut]
    next: int | None


class CurveOut(_FromObject):
    """One run's metric; a value is null where it is not finite."""

    run_id: int
    method: str
    learning_rate: float
    vxx_reg: float | None
    seed: int
    steps: list[int]
    values: list[float | None]


class CurvesOut(BaseModel):
    """Curves of a grid's runs that have ended."""

    sweep_id: str
    metric: str
    curves: list[CurveOut]
