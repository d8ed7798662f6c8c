"""Runs in lanes: small fully connected nets whose updates are done by native code, many at a time.

What a run that left the finite numbers has to say, the tensor path finds out: it does that one update again.

Index legend: r run in the part, b sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpnopt.config import LayerShape, RunConfig
from ddpnopt.lanes.blocks import Blocks, Left, Rows, entries, layers_of
from ddpnopt.lanes.library import Library
from ddpnopt.lanes.program import block_key, compiled
from ddpnopt.layers.network import Controls, Network, rollout
from ddpnopt.pack.batches import Stretch
from ddpnopt.pack.part import Samples
from ddpnopt.pack.stack import initial_controls, stack
from ddpnopt.results import Divergence, non_finite_kind


class LanePart:
    """Runs whose updates are done in lanes.

    Args:
        library: the kernel.
        runs: at least one, of one pack key.
        places: of these runs in the sequence that the pack is made of.
        seeds: the pack's distinct seeds, in the order of its batches.
        network: the nets' layers.
        shapes: the sizes of those with controls.
        threads: that blocks are divided among.
    """

    def __init__(
        self,
        library: Library,
        runs: Sequence[RunConfig],
        places: Sequence[int],
        seeds: Sequence[int],
        network: Network,
        shapes: Sequence[LayerShape],
        threads: int = 1,
    ) -> None:
        self.network, self.shapes = network, shapes
        order = sorted(range(len(runs)), key=lambda i: (repr(block_key(runs[i].optimizer)), i))
        self._runs = {places[i]: runs[i] for i in order}
        self._index = np.array([places[i] for i in order], dtype=np.int64)
        rows = {seed: row for row, seed in enumerate(seeds)}
        self._seed_row = torch.tensor([rows[runs[i].seed] for i in order])
        self._blocks: list[Blocks] = []
        for _, members in groupby(order, key=lambda i: block_key(runs[i].optimizer)):
            chosen = [runs[i] for i in members]
            u = entries(initial_controls(chosen, shapes))
            optimizers = [run.optimizer for run in chosen]
            self._blocks.append(Blocks(compiled(library, chosen[0], shapes), optimizers, u, threads))
        self._batch_size = runs[0].training.batch_size

    @property
    def index(self) -> NDArray[np.int64]:
        """See `Part.index`."""
        return self._index

    def _slices(self) -> list[tuple[Blocks, slice]]:
        """Return the groups with their members' place in the part."""
        ends = list(accumulate(blocks.size for blocks in self._blocks))
        return [(group, slice(end - group.size, end)) for group, end in zip(self._blocks, ends, strict=True)]

    def advance(self, stretch: Stretch, train_set: Samples) -> Mapping[int, Divergence]:
        """See `Part.advance`."""
        rows = Rows(train_set.inputs, train_set.targets, stretch.batches, stretch.place)
        left: dict[int, Divergence] = {}
        keep = np.ones(len(self._index), dtype=bool)
        for blocks, part in self._slices():
            for gone in blocks.advance(rows, self._seed_row[part], stretch.first, stretch.last):
                row = part.start + gone.row
                left[int(self._index[row])] = self._divergence(row, gone, stretch, train_set)
                keep[row] = False
        if left:
            self.select(keep)
        return left

    def _divergence(self, row: int, gone: Left, stretch: Stretch, train_set: Samples) -> Divergence:
        if gone.before is None:
            last = None if np.isnan(gone.last_loss) else gone.last_loss
            return Divergence(gone.step, "batch_loss", non_finite_kind(gone.loss), last)
        samples = stretch.rows(gone.step)[self._seed_row[row]]
        return self._blame(int(self._index[row]), gone, samples, train_set)

    @torch.inference_mode()
    def _blame(self, place: int, gone: Left, samples: Tensor, train_set: Samples) -> Divergence:
        """Do an update again as tensors, to name the first quantity in it that is not finite."""
        assert gone.before is not None
        alone = stack([self._runs[place]], self.network, self.shapes, torch.device("cpu"))
        alone.controls = self._layers(gone.before["u"].unsqueeze(0))
        alone.groups[0].optimizer.load_state(self._optimizer_state(gone.before, gone.step))
        trajectory = rollout(self.network, alone.controls, train_set.inputs[samples].unsqueeze(0))
        _, blamed = alone.step(trajectory, train_set.targets[samples].unsqueeze(0))
        if not blamed:  # by a rounding: one path just inside of the finite numbers, the other outside
            return Divergence(gone.step, "weights", "nan", None)
        return Divergence(gone.step, blamed[0].quantity, non_finite_kind(blamed[0].value), None)

    def _optimizer_state(self, before: Mapping[str, Tensor], step: int) -> dict[str, Any]:
        """Return one run's moments before update number `step` as the tensor path's optimizers hold them."""
        names = {"moment2": "v", "moment1": "m", "velocity": "v"}
        state: dict[str, dict[str, Any]] = {"preconditioner": {}, "momentum": {}}
        for name, values in before.items():
            if name == "u" or step == 1:
                continue
            of = state["momentum" if name == "velocity" else "preconditioner"]
            for t, layer in enumerate(self._layers(values.unsqueeze(0))):
                of.setdefault(str(t), {"runs": 1, "step": step - 1})[names[name]] = layer
        return state

    def _layers(self, u: Tensor) -> Controls:
        return layers_of(u, [(shape.outputs, shape.inputs + 1) for shape in self.shapes])

    def measure(self, samples: Samples) -> Tensor:
        """See `Part.measure`."""
        found = [
            torch.stack(blocks.measure(samples.inputs, samples.targets), dim=1) for blocks in self._blocks
        ]
        return torch.cat(found)

    def take_running(self, updates: int) -> Tensor:
        """See `Part.take_running`."""
        sums = torch.cat([blocks.running(take=True) for blocks in self._blocks])
        return sums / updates * torch.tensor([1.0, 100.0 / self._batch_size], dtype=torch.float64)

    def select(self, keep: NDArray[np.bool_]) -> None:
        """See `Part.select`."""
        for blocks, part in self._slices():
            blocks.select(torch.from_numpy(np.flatnonzero(keep[part])))
        self._blocks = [blocks for blocks in self._blocks if blocks.size]
        self._index, self._seed_row = self._index[keep], self._seed_row[torch.from_numpy(keep)]

    def controls(self) -> Controls:
        """See `Part.controls`."""
        return self._layers(torch.cat([blocks.state("u") for blocks in self._blocks]))

    def set_controls(self, controls: Sequence[Tensor]) -> None:
        """See `Part.set_controls`."""
        u = entries(controls)
        for blocks, part in self._slices():
            state = {name: blocks.state(name) for name in blocks.compiled.moments} | {"u": u[part]}
            blocks.restore(state, blocks.last_loss, blocks.running())

    def state(self) -> dict[str, Any]:
        """See `Part.state`."""
        return {
            "blocks": [
                {
                    "state": {name: blocks.state(name) for name in ("u", *blocks.compiled.moments)},
                    "last_loss": blocks.last_loss,
                    "running": blocks.running(),
                }
                for blocks in self._blocks
            ]
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Part.load_state`."""
        for blocks, own in zip(self._blocks, state["blocks"], strict=True):
            blocks.restore(own["state"], own["last_loss"], own["running"])
