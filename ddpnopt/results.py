"""What training yields. Plain values and numpy arrays; importable without torch.

Metrics, all over the whole set in question, by the weights after the named step:
`train_loss` and `train_accuracy` (%) over the training set (or running means over the batches: see
`ddpnopt.config.TrainingConfig.train_metrics`), `test_loss` and `accuracy` (%) over the test set. Baseline and
partner are measured by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

TRAIN_METRICS: Final = ("train_loss", "train_accuracy")
TEST_METRICS: Final = ("test_loss", "accuracy")
METRICS: Final = (*TRAIN_METRICS, *TEST_METRICS)

RunState = Literal["completed", "diverged", "cancelled"]
NonFinite = Literal["nan", "+inf", "-inf"]


def non_finite_kind(value: float) -> NonFinite:
    """Name a value that is not finite."""
    if np.isnan(value):
        return "nan"
    return "+inf" if value > 0 else "-inf"


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a run left the finite numbers.

    Attributes:
        step: the update (counted from 1) whose forward pass or result was not finite.
        quantity: what was not finite: `batch_loss`, the name of a metric, or what an update was made of and
            where, such as `V_xx of layer 3` (`M` is a preconditioner, `J_u` a baseline's gradient).
        kind: how it was not finite.
        last_finite: the quantity's last finite value before; None if it never had one.
    """

    step: int
    quantity: str
    kind: NonFinite
    last_finite: float | None


@dataclass(frozen=True, slots=True)
class Record:
    """What a run recorded by a probe.

    Attributes:
        steps: (P,) int64.
        values: (P, *shape) float32, the shape by `ddpnopt.probes.shape`; not all of them need be finite.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RunResult:
    """The outcome of one run.

    Attributes:
        index: the run's place in the sequence that was handed to the engine.
        steps: updates done.
        metrics: final value of every name in `METRICS`; empty if the run did not come to its end.
        curve_steps: (P,) int64, the steps at which the metrics of the training set were taken.
        test_steps: (Q,) int64, those of the test set.
        curves: name to (P,) or (Q,) float32, for every name in `METRICS`.
        weights_digest: SHA-256 of the final weights' bytes, layer by layer, in hexadecimal; empty without.
        divergence: set if and only if the run diverged.
        cancelled: whether it was told to leave before its end.
        records: by the name of the probe.
    """

    index: int
    steps: int
    metrics: dict[str, float]
    curve_steps: NDArray[np.int64]
    test_steps: NDArray[np.int64]
    curves: dict[str, NDArray[np.float32]]
    weights_digest: str
    divergence: Divergence | None = None
    cancelled: bool = False
    records: dict[str, Record] = field(default_factory=dict)

    @property
    def state(self) -> RunState:
        """`diverged`, `cancelled` or `completed`."""
        if self.divergence is not None:
            return "diverged"
        return "cancelled" if self.cancelled else "completed"


@dataclass(frozen=True, slots=True)
class Progress:
    """A pack's state: `active` members have done `step` of `steps` updates."""

    step: int
    steps: int
    active: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a pack: one result per run, in the order of the runs."""

    results: tuple[RunResult, ...]


@dataclass(frozen=True, slots=True)
class Stopped:
    """The end of a pack that was asked to stop after `step` updates.

    Attributes:
        step: updates done.
        kept: whether its state is kept, so that training can go on from there.
    """

    step: int
    kept: bool


EngineEvent: TypeAlias = Progress | Finished | Stopped
