"""The training loop over a pack: one forward pass for all members, then each group's update.

Members do not touch each other: no reduction runs over the leading dimension, so that on the CPU a run's
bits do not depend on who shares its pack. A member that leaves the finite numbers is recorded as diverged
and leaves the pack.

Index legend: r run in the pack, b sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpnopt.config import EVAL_CHUNK, RunConfig
from ddpnopt.datasets.load import Dataset, load
from ddpnopt.errors import ConfigError
from ddpnopt.layers.losses import LOSSES, Loss
from ddpnopt.layers.network import Controls, Network, predict, rollout
from ddpnopt.models import network
from ddpnopt.pack import rng
from ddpnopt.pack.stack import DTYPES, Stack, stack
from ddpnopt.results import (
    METRICS,
    Divergence,
    EngineEvent,
    Finished,
    Progress,
    RunResult,
    non_finite_kind,
)


def train(
    runs: Sequence[RunConfig], data: Dataset | None = None, device: str = "cpu"
) -> Iterator[EngineEvent]:
    """Train runs of one pack key together.

    Args:
        runs: at least one.
        data: the dataset; loaded by name if not given.
        device: where to train.

    Yields:
        `Progress` at step 0 and at every point of the curves, then one `Finished`. Closing the iterator
        stops the training.

    Raises:
        ConfigError: if the runs cannot share a pack or their batch is larger than the training set.
        DataError: if the dataset cannot be read.
    """
    first = runs[0] if runs else None
    if first is None:
        raise ConfigError("runs", [], "at least one run")
    trainer = Trainer(runs, data or load(first.dataset), torch.device(device))
    steps = first.training.steps
    for step in range(steps + 1):
        if step > 0:
            # inference_mode must not stay on across a yield: it would leak into the caller's thread.
            with torch.inference_mode():
                trainer.update(step)
        if step % first.training.eval_every == 0 or step == steps:
            with torch.inference_mode():
                trainer.take_metrics(step)
            yield Progress(step, steps, len(trainer.stack.index))
        if len(trainer.stack.index) == 0:
            break
    yield Finished(trainer.results(steps))


class Trainer:
    """A pack in training. Drive it by `train`."""

    def __init__(self, runs: Sequence[RunConfig], data: Dataset, device: torch.device) -> None:
        first = runs[0]
        self.batch_size = first.training.batch_size
        self.samples = len(data.train_targets)
        if self.batch_size > self.samples:
            raise ConfigError(
                "training.batch_size", self.batch_size, f"at most {self.samples}, the training set"
            )
        self.device = device
        self.dtype = DTYPES[first.dtype]
        self.loss: Loss = LOSSES[first.loss]
        classes = int(data.train_targets.max()) + 1
        self.network = network(first.model, data.shape, classes)
        self.train_set = self._on_device(data.train_inputs, data.train_targets)
        self.test_set = self._on_device(data.test_inputs, data.test_targets)
        layers = first.model.layers(data.shape, classes)
        self.stack: Stack = stack(runs, self.network, layers, device)
        self.batches = BatchStream(self.stack.seeds, self.samples, self.batch_size, device)
        self.last_loss: Tensor | None = None
        self.curves: list[tuple[int, NDArray[np.int64], NDArray[np.float64]]] = []
        self.diverged: dict[int, Divergence] = {}

    def _on_device(self, x: NDArray[np.float64], y: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return (
            torch.from_numpy(x).to(device=self.device, dtype=self.dtype),
            torch.from_numpy(y).to(device=self.device),
        )

    def update(self, step: int) -> None:
        """Do update number `step` (from 1).

        Members whose batch loss is not finite leave instead, members whose new weights are not leave after.
        """
        rows = self.batches.at(step - 1)[self.stack.seed_row]
        inputs, targets = self.train_set[0][rows], self.train_set[1][rows]
        trajectory = rollout(self.network, self.stack.controls, inputs)
        loss = self.loss.value(trajectory.output, targets).mean(dim=-1)
        finite = torch.isfinite(loss)
        if not bool(finite.all()):
            self._drop(~finite, step, "batch_loss", loss, self.last_loss)
            if len(self.stack.index) == 0:
                return
            # The members that stay take this step on their own forward pass, made anew without the others.
            loss, targets = loss[finite], targets[finite]
            trajectory = rollout(self.network, self.stack.controls, inputs[finite])
        self.last_loss = loss
        finite, blamed = self.stack.step(trajectory, targets)
        if blamed:
            for row, found in blamed.items():
                self._record(row, Divergence(step, found.quantity, non_finite_kind(found.value), None))
            self._keep(finite)

    def take_metrics(self, step: int) -> None:
        """Add a point to the curves of all active members; those with non-finite numbers leave."""
        if len(self.stack.index) == 0:
            return
        point = torch.stack(
            [
                *evaluate(self.network, self.stack.controls, self.loss, *self.train_set),
                *evaluate(self.network, self.stack.controls, self.loss, *self.test_set),
            ],
            dim=1,
        )
        finite = torch.isfinite(point).all(dim=1)
        self.curves.append(
            (step, self.stack.index[finite].numpy(force=True), point[finite].numpy(force=True))
        )
        for column, name in enumerate(METRICS):
            bad = ~torch.isfinite(point[:, column])
            if bool(bad.any()):
                self._drop(bad, step, name, point[:, column], None)
                point = point[~bad]

    def _drop(self, bad: Tensor, step: int, quantity: str, now: Tensor, before: Tensor | None) -> None:
        for row in bad.nonzero().flatten().tolist():
            last = None if before is None else float(before[row])
            self._record(row, Divergence(step, quantity, non_finite_kind(float(now[row])), last))
        self._keep(~bad)

    def _record(self, row: int, divergence: Divergence) -> None:
        self.diverged[int(self.stack.index[row])] = divergence

    def _keep(self, finite: Tensor) -> None:
        self.stack.select(finite)
        if self.last_loss is not None:
            self.last_loss = self.last_loss[finite]

    def results(self, steps: int) -> tuple[RunResult, ...]:
        """Return one result per run, in the order in which the runs were handed in."""
        weights = {
            int(index): _digest([u[row] for u in self.stack.controls])
            for row, index in enumerate(self.stack.index.tolist())
        }
        return tuple(self._result(i, steps, weights) for i in range(len(weights) + len(self.diverged)))

    def _result(self, index: int, steps: int, weights: dict[int, str]) -> RunResult:
        points = [
            (step, values[place[0]])
            for step, members, values in self.curves
            if len(place := np.flatnonzero(members == index))
        ]
        taken = np.array([step for step, _ in points], dtype=np.int64)
        table = np.array([values for _, values in points]).reshape(len(points), len(METRICS))
        divergence = self.diverged.get(index)
        return RunResult(
            index=index,
            steps=steps if divergence is None else _updates_before(divergence),
            metrics={} if divergence else dict(zip(METRICS, table[-1].tolist(), strict=True)),
            curve_steps=taken,
            curves={name: table[:, k].astype(np.float32) for k, name in enumerate(METRICS)},
            weights_digest=weights.get(index, ""),
            divergence=divergence,
        )


class BatchStream:
    """Each seed's batches, an epoch at a time."""

    def __init__(self, seeds: tuple[int, ...], samples: int, batch_size: int, device: torch.device) -> None:
        self.seeds, self.samples, self.batch_size, self.device = seeds, samples, batch_size, device
        self.per_epoch = samples // batch_size
        self._epoch = -1
        self._batches = torch.empty(0)

    def at(self, update: int) -> Tensor:
        """Return the (G, B) sample indices of update number `update`, counted from 0."""
        epoch, place = divmod(update, self.per_epoch)
        if epoch != self._epoch:
            drawn = [rng.epoch_batches(seed, epoch, self.samples, self.batch_size) for seed in self.seeds]
            self._batches = torch.from_numpy(np.stack(drawn)).to(self.device)
            self._epoch = epoch
        return self._batches[:, place]


def evaluate(
    layers: Network, controls: Controls, loss: Loss, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Measure every member on a whole set.

    Args:
        layers: the nets.
        controls: u_t, each (R, o_t, ī_t).
        loss: φ.
        inputs: (N, n_0).
        targets: (N,).

    Returns:
        Mean loss and accuracy in percent, each (R,) float64.
    """
    members = controls[0].shape[0]
    total = torch.zeros(members, dtype=torch.float64, device=inputs.device)
    right = torch.zeros_like(total)
    for start in range(0, len(inputs), EVAL_CHUNK):
        x = inputs[start : start + EVAL_CHUNK].expand(members, -1, -1)
        y = targets[start : start + EVAL_CHUNK].expand(members, -1)
        logits = predict(layers, controls, x)
        total += loss.value(logits, y).sum(dim=-1, dtype=torch.float64)
        right += (logits.argmax(dim=-1) == y).sum(dim=-1)
    return total / len(inputs), right * (100.0 / len(inputs))


def _updates_before(divergence: Divergence) -> int:
    """Count the updates that a diverged run has done: a batch loss that is not finite forbids its own."""
    return divergence.step - (divergence.quantity == "batch_loss")


def _digest(controls: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for u in controls:
        digest.update(u.numpy(force=True).tobytes())
    return digest.hexdigest()
