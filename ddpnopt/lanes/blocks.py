"""The runs of one program in blocks of lanes: their state, their updates, their metrics.

Arrays are indexed (copy, block, entry, lane); of the two copies one is read and the other written at every
step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ddpnopt.config import OptimizerConfig
from ddpnopt.lanes.library import Block
from ddpnopt.lanes.program import Compiled, betas_of, rates_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Left:
    """A run that left the finite numbers.

    Attributes:
        row: its place among the members.
        step: the update, from 1.
        loss: its batch's mean loss.
        last_loss: that of the batch before; NaN if there was none.
        before: the state before that update by name, each (C,); None where the loss was not finite, which
            forbids the update.
    """

    row: int
    step: int
    loss: float
    last_loss: float
    before: dict[str, Tensor] | None


@dataclass(frozen=True, slots=True)
class Rows:
    """Which samples the batches are made of.

    Attributes:
        inputs: (N, n_0), the training set.
        targets: (N,) int64.
        batches: (G, U, B) int64, an epoch's batches of each seed.
        place: that of the first update to do, within U.
    """

    inputs: Tensor
    targets: Tensor
    batches: Tensor
    place: int


class Blocks:
    """The members of one program.

    Attributes:
        compiled: the program.
        size: number of members R.
    """

    def __init__(
        self, compiled: Compiled, optimizers: Sequence[OptimizerConfig], u: Tensor, threads: int = 1
    ) -> None:
        """Start from controls u (R, C) with moments of zero."""
        self.compiled, self.threads = compiled, threads
        self._rates = np.stack([rates_of(optimizer) for optimizer in optimizers])
        self._betas = np.array([betas_of(optimizer) for optimizer in optimizers])
        lost = torch.full((len(u),), torch.nan, dtype=compiled.dtype)
        running = torch.zeros(len(u), 2, dtype=torch.float64)
        self._fill({"u": u, **{name: torch.zeros_like(u) for name in compiled.moments}}, lost, running)

    def _fill(self, state: dict[str, Tensor], loss: Tensor, running: Tensor) -> None:
        """Lay members out in lanes: state by name (R, C), the last batch's loss (R,), running sums (R, 2)."""
        lanes = self.compiled.library.lanes
        self.size = len(loss)
        self._count = -(-self.size // lanes)
        self._state = {
            name: torch.stack((blocked := self._to_lanes(values), torch.zeros_like(blocked)))
            for name, values in state.items()
        }
        self._rates_in_lanes = self._to_lanes(torch.from_numpy(self._rates).to(self.compiled.dtype))
        self._betas_in_lanes = self._to_lanes(torch.from_numpy(self._betas))
        self._loss = self._to_lanes(loss.unsqueeze(1))
        self._last_loss = self._loss.clone()
        self._running = self._to_lanes(running)
        whole = torch.int32 if self.compiled.dtype == torch.float32 else torch.int64
        self._alive = self._to_lanes(torch.full((self.size, 1), -1, dtype=whole))
        self._bad = torch.zeros(self._count, 2, lanes, dtype=whole)
        self._blocks = [self._block(i) for i in range(self._count)]

    def _to_lanes(self, values: Tensor) -> Tensor:
        return to_lanes(values, self.compiled.library.lanes)

    def _from_lanes(self, blocked: Tensor) -> Tensor:
        return from_lanes(blocked, self.size)

    def _block(self, i: int) -> Block:
        block = Block(
            rates=self._rates_in_lanes[i].data_ptr(),
            betas=self._betas_in_lanes[i].data_ptr(),
            loss=self._loss[i].data_ptr(),
            last_loss=self._last_loss[i].data_ptr(),
            running=self._running[i].data_ptr(),
            alive=self._alive[i].data_ptr(),
            bad_loss=self._bad[i, 0].data_ptr(),
            bad_controls=self._bad[i, 1].data_ptr(),
            current=0,
        )
        for name, values in self._state.items():
            getattr(block, name)[:] = [values[copy, i].data_ptr() for copy in (0, 1)]
        return block

    # --- state ---

    def state(self, name: str) -> Tensor:
        """Return the members' u or moments (R, C), entries in the order of the kernel."""
        values = self._state[name]
        return self._from_lanes(torch.stack([values[b.current, i] for i, b in enumerate(self._blocks)]))

    @property
    def last_loss(self) -> Tensor:
        """The mean loss of each member's last batch (R,); NaN before the first."""
        return self._from_lanes(self._loss).squeeze(1)

    def running(self, *, take: bool = False) -> Tensor:
        """Return the sums over batches since they were last taken: mean losses, right answers, (R, 2)."""
        sums = self._from_lanes(self._running).clone()
        if take:
            self._running.zero_()
        return sums

    def restore(self, state: dict[str, Tensor], loss: Tensor, running: Tensor) -> None:
        """Take back what `state`, `last_loss` and `running` returned, for as many members.

        Raises:
            ValueError: if it is not the state of such blocks; the kernel would read what is not there.
        """
        shapes = dict.fromkeys(("u", *self.compiled.moments), (self.size, self.compiled.controls))
        if {name: tuple(values.shape) for name, values in state.items()} != shapes:
            raise ValueError(f"a state of {sorted(state)}, expected {shapes}")
        self._fill(state, loss, running)

    def select(self, keep: Tensor) -> None:
        """Keep only the members of these rows (K,), whose numbers stay as they are."""
        state = {name: self.state(name)[keep] for name in self._state}
        loss, running = self.last_loss[keep], self.running()[keep]
        self._rates, self._betas = self._rates[keep.numpy()], self._betas[keep.numpy()]
        self._fill(state, loss, running)

    # --- work ---

    def advance(self, rows: Rows, seed_row: Tensor, first: int, last: int) -> list[Left]:
        """Do updates number `first` to `last` (from 1) and return who left the finite numbers.

        Args:
            rows: the batches, all updates in one epoch.
            seed_row: (R,) int64, each member's row of `rows.batches`.
            first: the first update.
            last: the last one.
        """
        seeds = self._to_lanes(seed_row.unsqueeze(1))
        for i, block in enumerate(self._blocks):
            block.seed_row = seeds[i].data_ptr()
        found = _each(lambda i: self._advance_block(i, rows, first, last), self._count, self.threads)
        return [left for of_block in found for left in of_block]

    def _advance_block(self, i: int, rows: Rows, first: int, last: int) -> list[Left]:
        compiled, block = self.compiled, self._blocks[i]
        per_epoch, batch = rows.batches.shape[1:]
        space = torch.empty(compiled.workspace, dtype=torch.uint8)
        left: list[Left] = []
        step = first
        while step <= last and bool(self._alive[i].any()):
            at = (rows.place + step - first) * batch * rows.batches.element_size()
            step += compiled.library.functions.train(
                ctypes.byref(compiled.program),
                ctypes.byref(block),
                space.data_ptr(),
                rows.inputs.data_ptr(),
                rows.targets.data_ptr(),
                rows.batches.data_ptr() + at,
                per_epoch * batch,
                step,
                last,
            )
            left += self._leaving(i, step - 1)
        return left

    def _leaving(self, i: int, step: int) -> list[Left]:
        """Collect the lanes of a block that the last step threw out, and switch them off."""
        lanes = self.compiled.library.lanes
        found = []
        for lane in self._bad[i].any(dim=0).nonzero().flatten().tolist():
            before = None
            if not bool(self._bad[i, 0, lane]):
                copy = 1 - self._blocks[i].current
                before = {name: values[copy, i, :, lane].clone() for name, values in self._state.items()}
            loss, last_loss = float(self._loss[i, 0, lane]), float(self._last_loss[i, 0, lane])
            found.append(Left(i * lanes + lane, step, loss, last_loss, before))
            self._alive[i, 0, lane] = 0
        return found

    def measure(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Measure every member on a whole set: see `measure`."""
        u = self._state["u"]
        current = [u[block.current, i] for i, block in enumerate(self._blocks)]
        return _measured(self.compiled, current, self.size, inputs, targets, self.threads)


def measure(compiled: Compiled, u: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Measure nets on a whole set.

    Args:
        compiled: the net's program.
        u: (R, C), entries in the order of the kernel.
        inputs: (N, n_0).
        targets: (N,) int64.

    Returns:
        Mean loss and accuracy in percent, each (R,) float64.
    """
    blocks = to_lanes(u, compiled.library.lanes)
    return _measured(compiled, list(blocks), len(u), inputs, targets, 1)


def _measured(
    compiled: Compiled, blocks: Sequence[Tensor], size: int, inputs: Tensor, targets: Tensor, threads: int
) -> tuple[Tensor, Tensor]:
    lanes, count = compiled.library.lanes, len(inputs)
    sums = torch.zeros(2, len(blocks), lanes, dtype=torch.float64)

    def one(i: int) -> None:
        space = torch.empty(compiled.workspace, dtype=torch.uint8)
        compiled.library.functions.evaluate(
            ctypes.byref(compiled.program),
            blocks[i].data_ptr(),
            space.data_ptr(),
            inputs.data_ptr(),
            targets.data_ptr(),
            count,
            sums[0, i].data_ptr(),
            sums[1, i].data_ptr(),
        )

    _each(one, len(blocks), threads)
    loss, right = sums.flatten(1)[:, :size]
    return loss / count, right * (100.0 / count)


@lru_cache(maxsize=4)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="lanes")


def _each(call: Callable[[int], T], count: int, threads: int) -> list[T]:
    """Call for every block, by so many threads: the kernel lets go of the interpreter."""
    if threads == 1 or count == 1:
        return [call(i) for i in range(count)]
    return list(_threads(threads).map(call, range(count)))


def to_lanes(values: Tensor, lanes: int) -> Tensor:
    """Return (R, C) as (blocks, C, lanes), in memory of its own; lanes without a run hold zeros."""
    blocks = -(-len(values) // lanes)
    padded = values.new_zeros(blocks * lanes, values.shape[1])
    padded[: len(values)] = values
    return padded.reshape(blocks, lanes, values.shape[1]).transpose(1, 2).contiguous()


def from_lanes(blocked: Tensor, size: int) -> Tensor:
    """Return (blocks, C, lanes) as the (R, C) of its first `size` runs."""
    return blocked.transpose(1, 2).flatten(0, 1)[:size]


def entries(controls: Sequence[Tensor]) -> Tensor:
    """Return controls, each (R, o, ī), as the kernel orders them, (R, C)."""
    return torch.cat([u.flatten(1) for u in controls], dim=1)


def layers_of(u: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return entries (R, C) layer by layer, each (R, o, ī); `shapes` are the (o, ī)."""
    parts = u.split([o * i for o, i in shapes], dim=1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
