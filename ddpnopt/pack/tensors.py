"""Runs of any kind as batched tensor operations: one forward pass for all members, then each group's update.

No reduction runs over the leading dimension, so that on the CPU a run's bits do not depend on who shares its
pack. This path does everything; lanes do some of it faster and are held to it.

Index legend: r run in the pack, b sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpnopt.config import EVAL_CHUNK, LayerShape, RunConfig
from ddpnopt.lanes import rules
from ddpnopt.lanes.blocks import entries, measure
from ddpnopt.lanes.eigen import solver
from ddpnopt.lanes.library import Library
from ddpnopt.lanes.program import compiled_net
from ddpnopt.layers.losses import LOSSES, Loss
from ddpnopt.layers.network import Controls, Network, predict, rollout
from ddpnopt.linalg import eigensolver
from ddpnopt.optimizers.ddpnopt import DDPNOpt
from ddpnopt.pack.batches import Stretch
from ddpnopt.pack.part import Samples
from ddpnopt.pack.stack import Stack, stack
from ddpnopt.results import Divergence, non_finite_kind


class TensorPart:
    """Runs as one tensor program over [R, ...].

    Args:
        runs: at least one, of one pack key.
        places: of these runs in the sequence that the pack is made of.
        seeds: the pack's distinct seeds, in the order of its batches.
        network: the nets' layers.
        shapes: the sizes of those with controls.
        device: where it trains.
        running: whether running means are kept.
        norms: whether the norms of the updates are.
        library: the kernel, where there is one: it takes the metrics of small nets and finds the eigenvectors
            of small matrices.
    """

    def __init__(
        self,
        runs: Sequence[RunConfig],
        places: Sequence[int],
        seeds: Sequence[int],
        network: Network,
        shapes: Sequence[LayerShape],
        device: torch.device,
        *,
        running: bool,
        norms: bool = False,
        library: Library | None = None,
    ) -> None:
        first = runs[0]
        self.network, self.loss = network, LOSSES[first.loss]
        self._measuring = None
        if library is not None and rules.measures(first.model, shapes):
            self._measuring = compiled_net(library, first.model, shapes, first.loss, first.dtype)
        self._eigensolver = None if library is None else solver(library)
        self.stack: Stack = stack(runs, network, shapes, device, places=places, seeds=seeds)
        members = len(self.stack.index)
        self.last_loss = self.stack.controls[0].new_full((members,), torch.nan)
        self._running: Tensor | None = None
        if running:
            self._running = torch.zeros(members, 2, dtype=torch.float64, device=device)
        self._norms: Tensor | None = None
        self._norm_updates = 0
        if norms:
            self._norms = torch.zeros(members, len(shapes), dtype=torch.float64, device=device)

    @property
    def index(self) -> NDArray[np.int64]:
        """See `Part.index`."""
        places: NDArray[np.int64] = self.stack.index.numpy(force=True)
        return places

    @torch.inference_mode()
    def advance(self, stretch: Stretch, train_set: Samples) -> Mapping[int, Divergence]:
        """See `Part.advance`."""
        left: dict[int, Divergence] = {}
        with eigensolver(self._eigensolver):
            for update in range(stretch.first, stretch.last + 1):
                if len(self.stack.index) == 0:
                    break
                self._update(update, stretch.rows(update)[self.stack.seed_row], train_set, left)
        return left

    def _update(self, step: int, rows: Tensor, train_set: Samples, left: dict[int, Divergence]) -> None:
        """Do update number `step` (from 1) on the samples `rows` (R, B).

        Members whose batch loss is not finite leave instead, members whose new weights are not leave after.
        """
        inputs, targets = train_set.inputs[rows], train_set.targets[rows]
        trajectory = rollout(self.network, self.stack.controls, inputs)
        loss = self.loss.value(trajectory.output, targets).mean(dim=-1)
        finite = torch.isfinite(loss)
        if not bool(finite.all()):
            for row in (~finite).nonzero().flatten().tolist():
                last = float(self.last_loss[row])
                found = Divergence(
                    step, "batch_loss", non_finite_kind(float(loss[row])), None if np.isnan(last) else last
                )
                left[int(self.stack.index[row])] = found
            self._keep(finite)
            if len(self.stack.index) == 0:
                return
            # The members that stay take this step on their own forward pass, made anew without the others.
            loss, targets, inputs = loss[finite], targets[finite], inputs[finite]
            del trajectory  # before there is another
            trajectory = rollout(self.network, self.stack.controls, inputs)
        self.last_loss = loss
        if self._running is not None:
            right = (trajectory.output.argmax(dim=-1) == targets).sum(dim=-1)
            self._running += torch.stack((loss.double(), right.double() / targets.shape[1]), dim=1)
        before = [] if self._norms is None else [u.clone() for u in self.stack.controls]
        finite, blamed = self.stack.step(trajectory, targets)
        if self._norms is not None:
            self._norms += _lengths(before, self.stack.controls)
            self._norm_updates += 1
        if blamed:
            for row, found_at in blamed.items():
                kind = non_finite_kind(found_at.value)
                left[int(self.stack.index[row])] = Divergence(step, found_at.quantity, kind, None)
            self._keep(finite)

    @torch.inference_mode()
    def measure(self, samples: Samples) -> Tensor:
        """See `Part.measure`."""
        if self._measuring is not None:
            u = entries(self.stack.controls)
            return torch.stack(measure(self._measuring, u, samples.inputs, samples.targets), dim=1)
        return torch.stack(evaluate(self.network, self.stack.controls, self.loss, samples), dim=1)

    @torch.inference_mode()
    def take_running(self, updates: int) -> Tensor:
        """See `Part.take_running`."""
        assert self._running is not None
        means = self._running / updates
        means[:, 1] *= 100.0
        self._running = torch.zeros_like(self._running)
        return means

    def take_update_norms(self) -> Tensor:
        """Return |Δu_t| averaged over the updates since the last time, (R, T) float64."""
        assert self._norms is not None
        means = self._norms / self._norm_updates
        self._norms, self._norm_updates = torch.zeros_like(self._norms), 0
        return means

    def sweepers(self) -> Iterator[tuple[int, DDPNOpt, Controls]]:
        """Yield each DDPNOpt member's place, its optimizer as one of its own, and its u_t (1, o, ī)."""
        for group in self.stack.groups:
            if not isinstance(group.optimizer, DDPNOpt):
                continue
            for row in range(group.start, group.stop):
                alone = DDPNOpt(group.optimizer.members)
                alone.load_state(group.optimizer.state())
                alone.select(self.stack.index.new_tensor([row - group.start]))
                yield int(self.stack.index[row]), alone, [u[row : row + 1] for u in self.stack.controls]

    @torch.inference_mode()
    def select(self, keep: NDArray[np.bool_]) -> None:
        """See `Part.select`."""
        self._keep(torch.from_numpy(keep).to(self.stack.index.device))

    def _keep(self, keep: Tensor) -> None:
        self.stack.select(keep)
        self.last_loss = self.last_loss[keep]
        if self._running is not None:
            self._running = self._running[keep]
        if self._norms is not None:
            self._norms = self._norms[keep]

    def controls(self) -> Controls:
        """See `Part.controls`."""
        return [u.clone() for u in self.stack.controls]

    @torch.inference_mode()
    def set_controls(self, controls: Sequence[Tensor]) -> None:
        """See `Part.set_controls`."""
        own = self.stack.controls
        self.stack.controls = [new.to(u).clone() for new, u in zip(controls, own, strict=True)]

    def state(self) -> dict[str, Any]:
        """See `Part.state`."""
        return {
            "controls": self.stack.controls,
            "optimizers": [group.optimizer.state() for group in self.stack.groups],
            "last_loss": self.last_loss,
            "running": self._running,
            "norms": self._norms,
            "norm_updates": self._norm_updates,
        }

    @torch.inference_mode()
    def load_state(self, state: dict[str, Any]) -> None:
        """See `Part.load_state`."""
        self.set_controls(state["controls"])
        for group, own in zip(self.stack.groups, state["optimizers"], strict=True):
            group.optimizer.load_state(own)
        self.last_loss, self._running = state["last_loss"], state["running"]
        self._norms, self._norm_updates = state["norms"], state["norm_updates"]


def _lengths(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Return |u - v| of each member and layer, (R, T) float64."""
    return torch.stack(
        [(v - u).double().square().flatten(1).sum(dim=1).sqrt() for u, v in zip(before, after, strict=True)],
        dim=1,
    )


def evaluate(layers: Network, controls: Controls, loss: Loss, samples: Samples) -> tuple[Tensor, Tensor]:
    """Measure every member on a whole set.

    Args:
        layers: the nets.
        controls: u_t, each (R, o_t, ī_t).
        loss: φ.
        samples: the set.

    Returns:
        Mean loss and accuracy in percent, each (R,) float64.
    """
    inputs, targets = samples.inputs, samples.targets
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
