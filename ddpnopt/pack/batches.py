"""Each seed's batches, an epoch at a time.

Index legend: g seed among a pack's distinct seeds, b sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpnopt.pack import rng


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some updates within one epoch.

    Attributes:
        first: number of the first update, from 1.
        last: number of the last one.
        batches: (G, U, B) int64, the whole epoch's sample indices of each seed.
        place: of the first update's batch, within U.
    """

    first: int
    last: int
    batches: Tensor
    place: int

    def rows(self, update: int) -> Tensor:
        """Return the (G, B) sample indices of an update."""
        return self.batches[:, self.place + update - self.first]


class BatchStream:
    """The batches of a pack's seeds, drawn when they are asked for.

    Attributes:
        used: seeds whose batches anyone still trains on; the others' are not drawn.
    """

    def __init__(
        self, seeds: tuple[int, ...], samples: int, batch_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.seeds, self.samples, self.batch_size = seeds, samples, batch_size
        self.used = set(seeds)
        self.device = torch.device(device)
        self.per_epoch = samples // batch_size
        self._epoch = -1
        self._batches = torch.empty(0)

    def stretch(self, first: int, last: int) -> Stretch:
        """Return updates number `first` (from 1) to `last`, or to the end of the epoch if that is earlier."""
        epoch, place = divmod(first - 1, self.per_epoch)
        if epoch != self._epoch:
            drawn = np.zeros((len(self.seeds), self.per_epoch, self.batch_size), dtype=np.int64)
            for row, seed in enumerate(self.seeds):
                if seed in self.used:
                    drawn[row] = rng.epoch_batches(seed, epoch, self.samples, self.batch_size)
            self._batches = torch.from_numpy(drawn).to(self.device)
            self._epoch = epoch
        return Stretch(first, min(last, first + self.per_epoch - place - 1), self._batches, place)
