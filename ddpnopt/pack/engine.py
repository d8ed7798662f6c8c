"""The training loop over a pack: its parts take turns, stretch by stretch, and metrics are taken on the way.

Members do not touch each other: on the CPU a run's bits do not depend on who shares its pack. A member
that leaves the finite numbers is recorded as diverged and leaves the pack; so does one that is told to go.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import wraps
from typing import Any, Final, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpnopt.config import NUMERICS_VERSION, RunConfig
from ddpnopt.datasets.load import Dataset, load
from ddpnopt.errors import ConfigError
from ddpnopt.lanes import rules
from ddpnopt.lanes.library import Library, library
from ddpnopt.layers.network import Controls
from ddpnopt.linalg import DTYPES
from ddpnopt.models import network
from ddpnopt.pack import cost
from ddpnopt.pack.batches import BatchStream
from ddpnopt.pack.checkpoint import Checkpoints, key_of
from ddpnopt.pack.lanes import LanePart
from ddpnopt.pack.part import Part, Samples
from ddpnopt.pack.probes import Recorder
from ddpnopt.pack.stack import distinct_seeds
from ddpnopt.pack.tensors import TensorPart
from ddpnopt.results import (
    METRICS,
    TEST_METRICS,
    TRAIN_METRICS,
    Divergence,
    EngineEvent,
    Finished,
    Progress,
    RunResult,
    Stopped,
    non_finite_kind,
)

log = logging.getLogger(__name__)

Leaving = Callable[[int], Collection[int]]
"""Takes a step and returns the places of the runs that are to leave the pack after it."""

Stopping = Callable[[], bool]
"""Tells whether training is to stop now."""

F = TypeVar("F", bound=Callable[..., Any])


def _on_one_thread(call: F) -> F:
    """Do a method's tensor operations on one thread, whatever the process has.

    Libraries cut convolutions, eigenvectors and lone products up by the number of threads, and round by the
    cuts. Lanes have threads of their own, since blocks of runs can be divided without a trace.
    """

    @wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return cast(F, wrapped)


LONGEST_STRETCH_S: Final = 2.0
"""About how long a pack trains between two looks at the clock."""


def train(
    runs: Sequence[RunConfig],
    data: Dataset | None = None,
    device: str = "cpu",
    *,
    checkpoints: Checkpoints | None = None,
    leaving: Leaving | None = None,
    stopping: Stopping | None = None,
) -> Iterator[EngineEvent]:
    """Train runs of one pack key together.

    Args:
        runs: at least one.
        data: the dataset; loaded by name if not given.
        device: where to train.
        checkpoints: where the state is kept now and then; if there is one of this very pack, training goes on
            from there, with the same bits as if it had never stopped. At the end it is removed. A state that
            cannot be written costs a warning.
        leaving: asked at every point of the curves but the last who leaves.
        stopping: asked at the start and after every stretch, of which one ends at each point of the curves.

    Yields:
        `Progress` where it goes on from a state and at every point of the curves, then one `Finished`, or
        `Stopped` if `stopping` said so.
        Closing the iterator stops the training too, and keeps nothing.

    Raises:
        ConfigError: if the runs cannot share a pack or their batch is larger than the training set.
        DataError: if the dataset cannot be read.
    """
    if not runs:
        raise ConfigError("runs", [], "at least one run")
    trainer = Trainer(runs, data or load(runs[0].dataset), torch.device(device))
    training, keeper = runs[0].training, _Keeper(trainer, checkpoints)
    yield from _resumed(trainer, checkpoints)
    if stopping is not None and stopping():
        yield Stopped(trainer.step, keeper.save())
        return
    for point in training.points():
        if point < trainer.step:
            continue
        for _ in trainer.stretches(point):
            # Before the point's metrics: a state is one without them, and they are taken on resuming.
            if stopping is not None and stopping():
                yield Stopped(trainer.step, keeper.save())
                return
            keeper.save_in_time()
        trainer.take_metrics()
        if leaving is not None and point < training.steps:
            trainer.cancel(leaving(point))
        yield Progress(point, training.steps, trainer.active)
        if trainer.active == 0:
            break
    keeper.discard()
    yield Finished(trainer.results())


def _resumed(trainer: Trainer, checkpoints: Checkpoints | None) -> Iterator[Progress]:
    """Go on from a state if there is one; say where, unless that is a point of the curves, which says it."""
    if checkpoints is None or not trainer.resume(checkpoints):
        return
    log.info("the pack goes on from its state at step %d of %d", trainer.step, trainer.training.steps)
    if trainer.step not in trainer.training.points():
        yield Progress(trainer.step, trainer.training.steps, trainer.active)


class _Keeper:
    """Keeps a pack's state now and then, if there is a place for it."""

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints | None) -> None:
        self._trainer, self._checkpoints = trainer, checkpoints
        self._saved = time.monotonic()

    def save(self) -> bool:
        """Keep the state; false if that is not possible."""
        if self._checkpoints is None:
            return False
        try:
            self._trainer.save(self._checkpoints)
        except OSError as error:  # a full disk is no reason to lose what was trained
            log.warning("the pack's state could not be written to %s: %s", self._checkpoints.folder, error)
            return False
        return True

    def save_in_time(self) -> None:
        """Keep the state if the last time is long enough ago."""
        if self._checkpoints is None or time.monotonic() - self._saved < self._checkpoints.every:
            return
        self.save()
        self._saved = time.monotonic()

    def discard(self) -> None:
        """Forget the state that was kept."""
        if self._checkpoints is not None:
            self._checkpoints.discard(self._trainer.key)


RunCurve = tuple[NDArray[np.int64], NDArray[np.float64]]
"""One run's steps (P,) and values (P, 2)."""


@dataclass(slots=True)
class Curves:
    """The points of the curves of one set's metrics.

    Attributes:
        names: of the metrics.
        points: (step, places of the members (R,), values (R, 2)) of each.
    """

    names: tuple[str, ...]
    points: list[tuple[int, NDArray[np.int64], NDArray[np.float64]]] = field(default_factory=list)

    def by_run(self, runs: int) -> list[RunCurve]:
        """Return each run's points, in the order of their places."""
        found: list[list[tuple[int, NDArray[np.float64]]]] = [[] for _ in range(runs)]
        for step, places, values in self.points:
            for place, own in zip(places.tolist(), values, strict=True):
                found[place].append((step, own))
        return [
            (
                np.array([step for step, _ in own], dtype=np.int64),
                np.array([values for _, values in own]).reshape(len(own), len(self.names)),
            )
            for own in found
        ]


class Trainer:
    """A pack in training. Drive it by `train`.

    Args:
        runs: at least one, of one pack key.
        data: the dataset.
        device: where to train.
        lanes: whether the fast path may be taken where there is one; without, all is done by tensors.
        threads: of the fast path; the tensor path has one.

    Attributes:
        step: updates done.
        diverged: why runs left, by place.
    """

    def __init__(
        self,
        runs: Sequence[RunConfig],
        data: Dataset,
        device: torch.device,
        *,
        lanes: bool = True,
        threads: int | None = None,
    ) -> None:
        first = runs[0]
        if len({run.pack_key() for run in runs}) != 1:
            raise ConfigError("runs", len(runs), "runs of one pack_key")
        samples, batch_size = len(data.train_targets), first.training.batch_size
        if batch_size > samples:
            raise ConfigError("training.batch_size", batch_size, f"at most {samples}, the training set")
        self.runs, self.training, self.device = tuple(runs), first.training, device
        self.train_set = _on_device(data.train_inputs, data.train_targets, first, device)
        self.test_set = _on_device(data.test_inputs, data.test_targets, first, device)
        usable = library(first.dtype) if lanes and device.type == "cpu" else None
        self.parts = _parts(runs, data, device, usable, threads or torch.get_num_threads())
        layers = first.model.layers(data.shape, int(data.train_targets.max()) + 1)
        self.recorder = Recorder(
            first.probes,
            first.training,
            layers,
            data.shape,
            self.train_set,
            self.test_set,
            _cost_of(runs, data, self.train_set, usable),
        )
        self.batches = BatchStream(distinct_seeds(runs), samples, batch_size, device)
        self.step = 0
        self._updates = 1  # grows fast; a large net's first stretch must not be minutes
        self._last_point = 0
        self.train_curves, self.test_curves = Curves(TRAIN_METRICS), Curves(TEST_METRICS)
        self.diverged: dict[int, Divergence] = {}
        self.cancelled: dict[int, int] = {}
        self.key = key_of(
            runs,
            *(str(NUMERICS_VERSION), torch.__version__, str(device), data.checksum),
            usable.name if usable else "tensors",
        )

    @property
    def active(self) -> int:
        """Count the members that have not left."""
        return sum(len(part.index) for part in self.parts)

    def advance(self, to: int) -> None:
        """Do all updates up to number `to`."""
        for _ in self.stretches(to):
            pass

    def stretches(self, to: int) -> Iterator[None]:
        """Do all updates up to number `to`, coming up for air after each stretch."""
        while self.step < to and self.parts:
            self._advance(min(to, self.step + self._updates))
            yield

    @_on_one_thread
    def _advance(self, to: int) -> None:
        """Do the updates up to number `to`, or to the end of the epoch."""
        started = time.monotonic()
        stretch = self.batches.stretch(self.step + 1, to)
        left = {
            place: why for part in self.parts for place, why in part.advance(stretch, self.train_set).items()
        }
        if left:
            self.diverged |= left
            self._shrink()
        self.step = stretch.last
        self._adapt(stretch.last - stretch.first + 1, time.monotonic() - started)

    def _adapt(self, updates: int, seconds: float) -> None:
        # How updates are cut into stretches changes nothing in the numbers.
        if seconds > LONGEST_STRETCH_S:
            self._updates = max(1, updates // 2)
        elif seconds < LONGEST_STRETCH_S / 4 and updates == self._updates:
            self._updates *= 2

    @_on_one_thread
    def take_metrics(self) -> None:
        """Add the points of the curves that belong to this step; members with non-finite numbers leave."""
        if self.training.takes_train_metrics(self.step):
            if self.training.train_metrics == "full":
                self._take(self.train_curves, lambda part: part.measure(self.train_set))
            else:
                updates = self.step - self._last_point
                self._take(self.train_curves, lambda part: part.take_running(updates))
            self._last_point = self.step
        if self.training.takes_test_metrics(self.step):
            self._take(self.test_curves, lambda part: part.measure(self.test_set))
        if self.runs[0].probes:
            self.recorder.take(self.step, self.parts)

    def _take(self, curves: Curves, measure: Callable[[Part], Tensor]) -> None:
        for part in self.parts:
            values = measure(part).numpy(force=True)
            finite = np.isfinite(values).all(axis=1)
            if finite.any():
                curves.points.append((self.step, part.index[finite].copy(), values[finite]))
            for row in np.flatnonzero(~finite):
                column = int(np.flatnonzero(~np.isfinite(values[row]))[0])
                kind = non_finite_kind(float(values[row, column]))
                place = int(part.index[row])
                self.diverged[place] = Divergence(self.step, curves.names[column], kind, None)
            if not finite.all():
                part.select(finite)
        self._shrink()

    def cancel(self, places: Collection[int]) -> None:
        """Let runs leave the pack; those that have left already are ignored."""
        for part in self.parts:
            going = np.isin(part.index, list(places))
            if going.any():
                self.cancelled.update(dict.fromkeys(part.index[going].tolist(), self.step))
                part.select(~going)
        self._shrink()

    def _shrink(self) -> None:
        """Let go of parts and seeds without members, after some have left."""
        self.parts = [part for part in self.parts if len(part.index)]
        self.batches.used = {self.runs[place].seed for part in self.parts for place in part.index}

    # --- single members ---

    def controls_of(self, place: int) -> list[Tensor]:
        """Return a copy of a member's u_t, each (o_t, ī_t)."""
        part, row = self._find(place)
        return [u[row] for u in part.controls()]

    def set_controls_of(self, place: int, controls: Sequence[Tensor]) -> None:
        """Put other u_t, each (o_t, ī_t), in the place of a member's."""
        part, row = self._find(place)
        changed = part.controls()
        for u, new in zip(changed, controls, strict=True):
            u[row] = new
        part.set_controls(changed)

    def _find(self, place: int) -> tuple[Part, int]:
        for part in self.parts:
            if len(row := np.flatnonzero(part.index == place)):
                return part, int(row[0])
        raise ConfigError("place", place, "that of a run still in training")

    # --- checkpoints ---

    def save(self, checkpoints: Checkpoints) -> None:
        """Write all that the rest of the training depends on.

        Raises:
            OSError: if the file cannot be written.
        """
        checkpoints.save(
            self.key,
            {
                "step": self.step,
                "last_point": self._last_point,
                "parts": [
                    {"index": torch.from_numpy(part.index.copy()), "state": part.state()}
                    for part in self.parts
                ],
                "curves": [
                    [
                        (step, torch.from_numpy(places), torch.from_numpy(values))
                        for step, places, values in c.points
                    ]
                    for c in (self.train_curves, self.test_curves)
                ],
                "diverged": {place: asdict(found) for place, found in self.diverged.items()},
                "cancelled": self.cancelled,
                "records": self.recorder.state(),
            },
        )

    def resume(self, checkpoints: Checkpoints) -> bool:
        """Go on from where this very pack was saved; false if there is no such file."""
        state = checkpoints.load(self.key)
        if state is None:
            return False
        remaining = {tuple(own["index"].tolist()): own["state"] for own in state["parts"]}
        present = np.array([place for places in remaining for place in places], dtype=np.int64)
        for part in self.parts:
            part.select(np.isin(part.index, present))
        self._shrink()
        for part in self.parts:
            part.load_state(remaining[tuple(part.index.tolist())])
        self.step, self._last_point = state["step"], state["last_point"]
        for curves, points in zip((self.train_curves, self.test_curves), state["curves"], strict=True):
            curves.points = [(step, places.numpy(), values.numpy()) for step, places, values in points]
        self.diverged = {place: Divergence(**found) for place, found in state["diverged"].items()}
        self.cancelled = state["cancelled"]
        self.recorder.load_state(state["records"])
        return True

    # --- results ---

    def results(self) -> tuple[RunResult, ...]:
        """Return one result per run, in the order in which the runs were handed in."""
        digests: dict[int, str] = {}
        for part in self.parts:
            controls = part.controls()  # once: it copies those of all members
            digests |= {place: _digest(controls, row) for row, place in enumerate(part.index.tolist())}
        curves = zip(*(c.by_run(len(self.runs)) for c in (self.train_curves, self.test_curves)), strict=True)
        return tuple(self._result(place, digests.get(place, ""), *own) for place, own in enumerate(curves))

    def _result(self, place: int, digest: str, train_curve: RunCurve, test_curve: RunCurve) -> RunResult:
        (train_steps, train_values), (test_steps, test_values) = train_curve, test_curve
        divergence, cancelled = self.diverged.get(place), self.cancelled.get(place)
        table = dict(zip(METRICS, (*train_values.T, *test_values.T), strict=True))
        done = divergence is None and cancelled is None
        return RunResult(
            index=place,
            steps=self._steps(divergence, cancelled),
            metrics={name: float(values[-1]) for name, values in table.items()} if done else {},
            curve_steps=train_steps,
            test_steps=test_steps,
            curves={name: _as_curve(values) for name, values in table.items()},
            weights_digest=digest,
            divergence=divergence,
            cancelled=cancelled is not None,
            records=self.recorder.of(place),
        )

    def _steps(self, divergence: Divergence | None, cancelled: int | None) -> int:
        """Count the updates that a run has done: a batch loss that is not finite forbids its own."""
        if divergence is not None:
            return divergence.step - (divergence.quantity == "batch_loss")
        return self.step if cancelled is None else cancelled


def _parts(
    runs: Sequence[RunConfig],
    data: Dataset,
    device: torch.device,
    usable: Library | None,
    threads: int,
) -> list[Part]:
    """Sort the runs by how they train: in lanes where that is possible, else as tensors."""
    first, seeds = runs[0], distinct_seeds(runs)
    classes = int(data.train_targets.max()) + 1
    shapes = first.model.layers(data.shape, classes)
    net = network(first.model, data.shape, classes)
    fast = [i for i, run in enumerate(runs) if usable and rules.trains(run, shapes)]
    slow = [i for i in range(len(runs)) if i not in set(fast)]
    parts: list[Part] = []
    if usable and fast:
        parts.append(LanePart(usable, [runs[i] for i in fast], fast, seeds, net, shapes, threads))
    if slow:
        running = first.training.train_metrics == "running"
        chosen = [runs[i] for i in slow]
        norms = "update_norm" in first.probes
        parts.append(
            TensorPart(chosen, slow, seeds, net, shapes, device, running=running, norms=norms, library=usable)
        )
    return parts


def _cost_of(
    runs: Sequence[RunConfig], data: Dataset, train_set: Samples, usable: Library | None
) -> Callable[[int], Tensor]:
    """Return what tells the cost of an update of the run at a place, alone and by tensors: `cost.measure`."""
    device = train_set.inputs.device

    def of(place: int) -> Tensor:
        run = runs[place]

        def make() -> Part:
            (part,) = _parts([run], data, device, usable, 1)
            return part

        batches = BatchStream((run.seed,), len(data.train_targets), run.training.batch_size, device)
        return cost.measure(make, batches, train_set)

    return of


def _on_device(
    inputs: NDArray[Any], targets: NDArray[np.int64], run: RunConfig, device: torch.device
) -> Samples:
    return Samples(
        torch.from_numpy(inputs).to(device=device, dtype=DTYPES[run.dtype]).contiguous(),
        torch.from_numpy(targets).to(device=device),
    )


def _as_curve(values: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # a loss beyond float32 is infinite in a picture
        return values.astype(np.float32)


def _digest(controls: Controls, row: int) -> str:
    digest = hashlib.sha256()
    for u in controls:
        digest.update(u[row].contiguous().numpy(force=True).tobytes())
    return digest.hexdigest()
